"""The whole-loop kernel against the loop of reference ops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import interpreter
from benchmarks.numerics import assert_as_good_as_eager, assert_bitwise, describe, rms_ratio
from relay_fast.kernels.loop import loop_fwd
from relay_fast.kernels.loop_ref import LoopLayout, LoopWeights, loop_fwd_ref
from relay_fast.kernels.supports import Unsupported
from relay_fast.models.looped_block import LoopedBlock
from tests.support.kernel_checks import guarded, guarded_outputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreter.mend()
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def inputs(
    dtype: torch.dtype,
    lengths: tuple[int, ...],
    d: int = 24,
    kv_heads: int = 1,
    head_dim: int = 16,
    gated: bool = False,
    loop_norm: bool = False,
    layers: int = 2,
) -> tuple[Tensor, LoopWeights, Tensor, Tensor]:
    """x, weights, cos, sin: GEMM weights rounded to `dtype`, the rest fp32 (all fp64 for fp64)."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def weight(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        return drawn.to(torch.bfloat16).to(DEVICE, dtype)  # the same values in every dtype

    def norm(*shape: int) -> Tensor:
        return (1 + 0.1 * torch.randn(shape, generator=generator)).to(DEVICE, wide)

    heads, hidden = 2 * kv_heads, 40
    weights = LoopWeights(
        norm(layers, d),
        weight(layers, (heads + 2 * kv_heads) * head_dim, d),
        weight(layers, d, heads * head_dim),
        norm(layers, d),
        weight(layers, hidden, d),
        weight(layers, hidden, d) if gated else None,
        weight(layers, d, hidden),
        norm(d) if loop_norm else None,
        norm(d),
        weight(21, d),
    )
    rows = sum(lengths)
    x = torch.randn(rows, d, generator=generator).to(DEVICE, wide)
    angle = torch.randn(rows, head_dim // 2, generator=generator).to(DEVICE, wide)
    return x, weights, angle.cos(), angle.sin()


CASES = [  # lengths, loops, options of the weights, causal, activation, kind, rope
    ((9, 3, 25, 1), (3, 2, 2, 0), {}, False, "gelu_tanh", "rms", True),  # two programs
    ((32,), (1,), {"d": 33, "head_dim": 24, "layers": 1}, True, "gelu", "layer", True),
    ((5, 0, 4), (2, 2, 1), {"gated": True, "loop_norm": True}, True, "swiglu", "rms", False),
    ((), (), {}, False, "relu2", "rms", True),
]


@pytest.mark.parametrize(("lengths", "loops", "options", "causal", "act", "kind", "rope"), CASES)
def test_equals_reference(lengths, loops, options, causal, act, kind, rope) -> None:
    layout = LoopLayout(np.array(lengths, np.int64), np.array(loops, np.int64), DEVICE)
    kv_heads = options.get("kv_heads", 1)

    def run(function, dtype: torch.dtype, protect=lambda t: t) -> tuple[Tensor, Tensor]:
        x, weights, cos, sin = inputs(dtype, lengths, **options)
        x, cos, sin = protect(x), protect(cos), protect(sin)
        weights = LoopWeights(*map(protect, weights))
        tables = (cos, sin) if rope else (None, None)
        heads = (2 * kv_heads, kv_heads)
        return function(x, layout, weights, *tables, *heads, causal, act, 1e-6, kind)

    with guarded_outputs():
        value = run(loop_fwd, torch.float32, guarded)
    again = run(loop_fwd, torch.float32)
    truth = run(loop_fwd_ref, torch.float64)
    assert_bitwise("final", value[0], again[0])
    assert_bitwise("ids", value[1], truth[1])
    if sum(lengths):
        assert rms_ratio(value[0], truth[0]) <= 1e-5, describe("final", value[0], truth[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    """65 rows in one sequence: a program of 128."""
    layout = LoopLayout(np.array([65, 3]), np.array([2, 1]), DEVICE)

    def run(function, dtype: torch.dtype) -> Tensor:
        x, weights, cos, sin = inputs(dtype, (65, 3), layers=1)
        return function(x, layout, weights, cos, sin, 2, 1)[0]

    truth, eager = run(loop_fwd_ref, torch.float64), run(loop_fwd_ref, dtype)
    assert_as_good_as_eager("final", run(loop_fwd, dtype), eager, truth, dtype)


def test_equals_the_engine() -> None:
    """The reference itself is what LoopedBlock computes."""
    torch.manual_seed(0)
    block = LoopedBlock(d_model=24, n_heads=2, n_layers=2, impl="torch").to(DEVICE).double()
    x = torch.randn(12, 24, dtype=torch.float64, device=DEVICE)
    with torch.no_grad():
        expected = block(x, loops=[3, 1], cu_seqlens=[0, 7, 12])
    named = dict(block.named_parameters())

    def stack(name: str) -> Tensor:
        return torch.stack([named[f"layers.{i}.{name}.weight"].detach() for i in range(2)])

    parts = [stack(n) for n in ("norm1", "qkv", "out", "norm2", "up")]
    ones = torch.ones(24, dtype=torch.float64, device=DEVICE)
    weights = LoopWeights(*parts, None, stack("down"), None, ones, torch.eye(24).to(ones))
    positions = torch.tensor([*range(7), *range(5)], device=DEVICE)
    at = torch.arange(6, device=DEVICE, dtype=torch.float64)
    angle = positions[:, None].double() * 10_000.0 ** (-at / 6)
    layout = LoopLayout(np.array([7, 5]), np.array([3, 1]), DEVICE)
    final, ids = loop_fwd_ref(x, layout, weights, angle.cos(), angle.sin(), 2, 2)
    torch.testing.assert_close(final, expected)
    assert ids.shape == (3 * 7 + 5,)


def test_refusals() -> None:
    x, weights, cos, sin = inputs(torch.float32, (33,))
    layout = LoopLayout(np.array([33]), np.array([1]), DEVICE)
    with pytest.raises(Unsupported, match="sequences of up to 32 rows, not 33"):
        loop_fwd(x, layout, weights, cos, sin, 2, 1)
    x, weights, cos, sin = inputs(torch.float32, (3,), d=65)
    layout = LoopLayout(np.array([3]), np.array([1]), DEVICE)
    with pytest.raises(Unsupported, match="widths up to 64, not 65"):
        loop_fwd(x, layout, weights, cos, sin, 2, 1)
