"""A block's options against eager autograd in fp64, under every recompute policy, and in the op
that torch.compile sees."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from benchmarks.numerics import assert_bitwise, assert_close, rms_ratio
from relay_fast.engine.fused_inference import block_reason
from relay_fast.models.looped_block import LoopedBlock
from tests.support.loop_cases import POLICIES, Case, D, check, run_all

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
ALL = {
    "head_dim": 12, "n_kv_heads": 1, "qk_norm": True, "sandwich_norm": True, "rotary_share": 0.5,
    "rope_frequencies": YARN, "activation": "swiglu", "bias": ("qkv", "down"), "causal": True,
}  # fmt: skip
OPTIONS = [
    {"head_dim": 6, "n_kv_heads": 1},
    {"qk_norm": True},
    {"qk_norm": True, "rope_base": None, "head_dim": 3, "n_kv_heads": 1},
    {"sandwich_norm": True, "norm": "layer", "bias": True},
    {"rotary_share": 0.5},
    {"rope_frequencies": (0.7, 0.01), "rope_scale": 1.5},
    {"bias": ("norm", "out", "gate"), "norm": "layer", "activation": "swiglu"},
]
ids = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o))


@ids
@pytest.mark.parametrize("policy", ["none", "state"])
def test_each_equals_eager(policy: str, options: dict) -> None:
    check(Case(options=options, policy=policy, states=(1, 5), readout=True, truncate=2))


@pytest.mark.parametrize("policy", POLICIES)
def test_all_of_them_equal_eager_under_every_policy(policy: str) -> None:
    check(Case(options=ALL, policy=policy, states=(2,), readout=True))


@pytest.mark.parametrize("lengths", [(), (0, 2), (2,)])
def test_few_rows(lengths: tuple[int, ...]) -> None:
    check(Case(lengths, (2,) * len(lengths), options=ALL))


def test_dropout_behind_a_sandwich_norm_is_recomputed_exactly() -> None:
    case = lambda policy: Case(
        options={**ALL, "dropout": 0.3}, policy=policy, training=True, readout=True
    )
    kept = run_all(case("none"))
    for policy in ("state", "every:3"):
        for name, value in run_all(case(policy)).items():
            assert_bitwise(name, value, kept[name])
    plain = run_all(Case(options=ALL, policy="none", readout=True))
    assert rms_ratio(kept["final"], plain["final"]) > 0.1  # something was dropped


def test_dropout_of_a_sandwich_norm_has_the_right_gradient() -> None:
    """Central differences in fp64, with the same mask each time."""
    block = LoopedBlock(8, 2, 1, sandwich_norm=True, dropout=0.4, qk_norm=True).double()
    x = torch.randn(1, 3, 8, dtype=torch.float64)
    names = ("layers.0.post_norm1.weight", "layers.0.post_norm2.weight", "layers.0.down.weight",
             "layers.0.out.weight", "layers.0.q_norm.weight", "layers.0.k_norm.weight")  # fmt: skip
    parameters = dict(block.named_parameters())

    def loss() -> torch.Tensor:
        torch.manual_seed(3)
        return block(x, loops=2).square().sum()

    loss().backward()
    for name in names:
        p, step = parameters[name], torch.randn_like(parameters[name]) * 1e-6
        with torch.no_grad():
            p += step
            above = loss()
            p -= 2 * step
            below = loss()
            p += step
        slope = (p.grad * step).sum()
        assert abs((above - below) / 2 - slope) < 1e-7 * p.grad.norm() * step.norm(), name


@pytest.mark.parametrize("ragged", [False, True])
def test_compiled_equals_eager(ragged: bool) -> None:
    torch.manual_seed(0)
    block = LoopedBlock(D, 2, 1, **ALL).double()
    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    loops = torch.tensor([3, 1]) if ragged else 2
    leaves = [x, *block.parameters()]
    truth = block(x, loops)
    grads = torch.autograd.grad(truth.sin().sum(), leaves)
    out = torch.compile(block, fullgraph=True, backend="aot_eager")(x, loops)
    assert_close("out", out, truth)
    for got, g in zip(torch.autograd.grad(out.sin().sum(), leaves), grads, strict=True):
        assert_close("gradient", got, g)


def test_the_op_passes_opcheck() -> None:
    block = LoopedBlock(D, 2, 1, **ALL).double()
    x = torch.randn(6, D, dtype=torch.float64, requires_grad=True)
    arguments = (
        x, list(block.parameters()), *block._spec, "state", "torch", 0, torch.float64, 2, None,
        2, None, None, None, 0, False, None, [], 0, True,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.relay_fast.loop_fwd, arguments)


def test_parts_that_are_called() -> None:
    """Hooks on the norms of heads and branches, and a projection with a forward of its own."""

    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    torch.manual_seed(0)
    block = LoopedBlock(D, 2, 1, **ALL).double()
    called = copy.deepcopy(block)
    layer, seen = called.layers[0], []
    for name in ("q_norm", "k_norm", "post_norm1", "post_norm2"):
        part = getattr(layer, name)
        part.register_forward_hook(lambda part, inputs, out: seen.append(tuple(out.shape)))
    layer.out.__class__ = Doubled
    with torch.no_grad():
        block.layers[0].out.weight *= 2
    x = torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True)
    truth, out = block(x, 2), called(x, 2)
    assert_close("out", out, truth)
    assert set(seen) == {(12, 12), (6, 12), (6, D)}  # (rows · heads, head_dim), (rows, d)
    leaves = lambda b: [x, *(p for n, p in b.named_parameters() if n != "layers.0.out.weight")]
    grads = torch.autograd.grad(truth.sin().sum(), leaves(block))
    for got, g in zip(torch.autograd.grad(out.sin().sum(), leaves(called)), grads, strict=True):
        assert_close("gradient", got, g)


def test_the_whole_loop_kernel_says_what_it_lacks() -> None:
    config = LoopedBlock(D, 2, 1, head_dim=12, rotary_share=0.5).config
    assert block_reason(config) is None
    lacks = "the whole-loop kernel supports neither qk_norm nor sandwich_norm"
    assert block_reason(LoopedBlock(D, 2, 1, qk_norm=True).config) == lacks
    assert block_reason(LoopedBlock(D, 2, 1, sandwich_norm=True).config) == lacks
    assert "biases" in block_reason(LoopedBlock(D, 2, 1, bias=("qkv",)).config)
