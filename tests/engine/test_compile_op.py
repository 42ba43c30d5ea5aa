"""torch.compile(fullgraph=True) of the block, and DDP: the same bits as without."""

from __future__ import annotations

import dataclasses
from itertools import product
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.numerics import assert_bitwise, assert_close
from relay_fast import LoopedBlock
from relay_fast.config import BlockConfig
from tests.support.forked import ended, start_ranks

D = 16


def compiled(block: nn.Module, backend: str = "aot_eager", **options):
    torch.compiler.reset()
    return torch.compile(block, fullgraph=True, backend=backend, **options)


def outcome(call, block: nn.Module, shape: tuple[int, ...], *args, **options) -> list[Tensor]:
    """Outputs and every gradient."""
    torch.manual_seed(1)
    x = torch.randn(*shape, dtype=next(block.parameters()).dtype, requires_grad=True)
    block.zero_grad()
    outputs = call(x, *args, **options)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    sum((i + 1) * s.square().sum() for i, s in enumerate(outputs)).backward()
    return [*outputs, x.grad, *(p.grad.clone() for p in block.parameters() if p.grad is not None)]


CALLS = {
    "padded": ((3, 4, D), (3,), {}),
    "no loops": ((3, 4, D), (0,), {}),
    "all states": ((3, 4, D), (3,), {"return_states": True}),
    "chosen states": ((3, 4, D), (5,), {"return_states": [4, 2], "truncate": 3}),
    "truncated": ((3, 4, D), (3,), {"truncate": 2}),
    "loops as list": ((2, 5, D), ([2, 4],), {}),
    "loops as tensor": ((3, 4, D), (torch.tensor([1, 3, 0]),), {}),
    "packed": ((9, D), (torch.tensor([1, 3, 2]),), {"cu_seqlens": torch.tensor([0, 2, 6, 9])}),
    "positions": ((2, 5, D), (2,), {"positions": 2 * torch.arange(5)}),
}


@pytest.mark.parametrize(
    ("policy", "call"),
    [*product(["none", "state", "sqrt", "budget:4000"], CALLS), ("auto", "truncated")],
)
def test_the_same_bits(policy: str, call: str) -> None:
    block = LoopedBlock(D, 2, 1, injection="concat", recompute=policy)
    shape, args, options = CALLS[call]
    truth = outcome(block, block, shape, *args, **options)
    got = outcome(compiled(block), block, shape, *args, **options)
    assert len(got) == len(truth)
    for i, (value, expected) in enumerate(zip(got, truth, strict=True)):
        assert_bitwise(f"{i}", value, expected)


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_backward_does_not_choose_the_implementation_again(how: str, monkeypatch) -> None:
    block = LoopedBlock(D, 2, 1, recompute="state")
    call = block if how == "eager" else compiled(block)
    truth = outcome(call, block, (3, 4, D), 3)

    def changed_behind(x: Tensor, loops: int) -> Tensor:
        out = call(x, loops)
        monkeypatch.setenv("RELAY_FAST_IMPL", "nothing that exists")
        return out

    got = outcome(changed_behind, block, (3, 4, D), 3)
    for i, (value, expected) in enumerate(zip(got, truth, strict=True)):
        assert_bitwise(f"{i}", value, expected)


MASK = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 0], [1, 1, 1, 1]])


@pytest.mark.parametrize(
    ("policy", "loops", "options"),
    [
        ("state", 3, {"attention_mask": MASK, "positions": torch.arange(12).view(3, 4)}),
        ("every:2", torch.tensor([1, 4, 0]), {"attention_mask": MASK.bool(), "seed": 7}),
        ("budget:4000", 3, {"attention_mask": MASK, "return_states": [1, 3], "truncate": 2}),
        ("sqrt", torch.tensor([1, 4, 2]), {"start": 2, "truncate": 1, "seed": torch.tensor(7)}),
    ],
)
def test_masks_injection_and_resumption(policy: str, loops, options: dict) -> None:
    block = LoopedBlock(
        D, 2, 1, injection="concat", max_loops=6, dropout=0.2, causal=True, recompute=policy
    )
    torch.nn.init.normal_(block.loop_embedding.weight)
    x, inject, *cotangents = torch.randn(5, 3, 4, D)
    leaves = [x.requires_grad_(), inject.requires_grad_(), *block.parameters()]

    def run(call) -> list[Tensor]:
        torch.manual_seed(2)
        outputs = call(x, loops, inject=inject, **options)
        outputs = outputs if isinstance(outputs, list) else [outputs]
        loss = sum((out * g).sum() for out, g in zip(outputs, cotangents, strict=False))
        return [*outputs, *torch.autograd.grad(loss, leaves)]

    for i, (got, truth) in enumerate(zip(run(compiled(block)), run(block), strict=True)):
        assert_bitwise(f"{i}", got, truth)


def test_bad_arguments_under_compile() -> None:
    block, x = LoopedBlock(D, 2, 1, injection="add", max_loops=4), torch.randn(3, 4, D)
    for options, message in (
        ({"attention_mask": 2 * MASK}, r"attention_mask\[0, 0\] = 2: give 1 for tokens"),
        ({"attention_mask": MASK[:2]}, "attention_mask has shape"),
        ({"start": 3}, "start \\+ loops = 3 \\+ 2 is more than the 4 iterations"),
        ({"inject": x[:2]}, "inject has shape"),
    ):
        with pytest.raises(Exception, match=message):
            compiled(block)(x, 2, **options)


def test_a_state_asked_for_twice_comes_once() -> None:
    block, x = LoopedBlock(D, 2, 1), torch.randn(2, 3, D)
    got = compiled(block)(x, 2, return_states=[1, 1])
    assert len(got) == len(block(x, 2, return_states=[1, 1])) == 1


def test_computed_weights_and_parameters_in_another_order() -> None:
    block = LoopedBlock(D, 2, 1, bias=True)
    prune.identity(block.layers[0].up, "weight")
    x = torch.randn(2, 3, D)
    assert_bitwise("output", compiled(block)(x, 2), block(x, 2))
    prune.remove(block.layers[0].up, "weight")  # which puts it after the bias
    assert_bitwise("output", compiled(block)(x, 2), block(x, 2))


def test_one_graph_for_all_shapes_and_loops() -> None:
    block = LoopedBlock(D, 2, 1)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    call = compiled(block, counter, dynamic=True)
    frames = []
    for batch, n in ((2, 4), (3, 5), (5, 7)):
        loops = torch.arange(batch) + 1
        truth = outcome(block, block, (batch, n, D), loops)
        for value, expected in zip(outcome(call, block, (batch, n, D), loops), truth, strict=True):
            assert_bitwise("value", value, expected)
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1]


def test_dropout_differs_from_call_to_call() -> None:
    block = LoopedBlock(D, 2, 1, dropout=0.5)
    call = compiled(block)
    x = torch.randn(2, 3, D)
    assert not torch.equal(call(x, 2), call(x, 2))


def test_frozen_parameters_and_no_grad() -> None:
    block = LoopedBlock(D, 2, 1)
    block.layers[0].up.weight.requires_grad_(False)
    truth = outcome(block, block, (2, 3, D), 2)
    for value, expected in zip(outcome(compiled(block), block, (2, 3, D), 2), truth, strict=True):
        assert_bitwise("value", value, expected)
    with torch.no_grad():
        x = torch.randn(2, 3, D)
        assert_bitwise("no grad", compiled(block)(x, 3), block(x, 3))


def test_autocast() -> None:
    block = LoopedBlock(D, 2, 1)
    x = torch.randn(2, 3, D)
    call = compiled(block)
    with torch.autocast("cpu", torch.bfloat16):
        assert_bitwise("autocast", call(x, 2), block(x, 2))


def test_inside_a_model() -> None:
    # Autograd, partitioner and decompositions as inductor's, without its C++ compiler.
    backend = "aot_eager_decomp_partition"

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.block = nn.Embedding(9, D), LoopedBlock(D, 2, 1)

        def forward(self, x: Tensor, loops) -> Tensor:
            return self.block(x + self.embedding.weight[3], loops).tanh()

    model = Model().double()
    loops = torch.tensor([2, 3])
    truth = outcome(model, model, (2, 3, D), loops)
    for value, expected in zip(
        outcome(compiled(model, backend), model, (2, 3, D), loops), truth, strict=True
    ):
        assert_close("value", value, expected)


def test_inductor() -> None:
    block = LoopedBlock(D, 2, 1)
    x, loops = torch.randn(2, 3, D), torch.tensor([2, 3])
    with torch.no_grad():
        assert_bitwise("output", compiled(block, "inductor")(x, loops), block(x, loops))


def op_arguments(block: LoopedBlock, x: Tensor, **changed) -> tuple:
    """Of torch.ops.relay_fast.loop_fwd: two sequences, three loops."""
    call = {
        "recompute": "state", "impl": "torch", "gather_rows": 256, "dtype": torch.float32,
        "batch": 2, "cu_seqlens": None, "count": 3, "loops": None, "positions": None, "mask": None,
        "start": 0, "injected": False, "seed": None, "states": [], "truncate": 0, "keep": True,
    } | changed  # fmt: skip
    return (x, list(block.parameters()), *block._spec, *call.values())


@pytest.mark.parametrize("options", [{}, {"rope_base": None, "n_kv_heads": 1, "bias": True}])
def test_ops_keep_the_rules_of_custom_ops(options) -> None:
    block = LoopedBlock(D, 2, 1, **options)
    x = torch.randn(6, D, requires_grad=True)
    op = torch.ops.relay_fast.loop_fwd.default
    torch.library.opcheck(op, op_arguments(block, x, states=[1, 3]))
    assert len(op._schema.arguments) == len(dataclasses.fields(BlockConfig)) + 18
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    torch.library.opcheck(op, op_arguments(block, x, states=[1, 3], mask=mask, start=2))


MATRICES = 16 * 48 + 16 * 16 + 3 * 16 * 64  # qkv, out; up, gate, down


@pytest.mark.parametrize(
    ("changed", "iterations"),
    [
        ({}, ([2, 2, 2], [1, 1, 1], 0)),
        ({"loops": torch.tensor([1, 3])}, ([2, 1, 1], [1, 1, 1], 0)),
        ({"recompute": "last:1", "count": 4}, ([2, 2, 2, 2], [1, 1, 1, 1], 2)),
        ({"truncate": 1}, ([2, 2, 2], [0, 0, 1], 0)),
        ({"truncate": 1, "loops": torch.tensor([1, 3])}, ([2, 1, 1], [0.5, 0, 1], 0)),
    ],
)
def test_flops_count_every_sequence_as_often_as_it_loops(changed, iterations) -> None:
    """3 tokens each: 2 FLOPs a multiply-add, forward; the same again and twice as many products
    (attention 5 for 2) in the backward of iterations that get a gradient."""
    block = LoopedBlock(D, 2, 2, activation="swiglu")
    x = torch.randn(6, D, requires_grad=True)
    sequences, with_gradient, again = iterations
    linears, attention = 2 * 2 * 3 * MATRICES, 2 * 4 * 3**2 * D  # of one sequence, two layers
    with FlopCounterMode(display=False) as forward:
        final, *_ = torch.ops.relay_fast.loop_fwd(*op_arguments(block, x, **changed))
    assert forward.get_total_flops() == sum(sequences) * (linears + attention)
    with FlopCounterMode(display=False) as backward:
        final.sum().backward()
    reached = sum(n * share for n, share in zip(sequences, with_gradient, strict=True))
    recomputed = (reached + 2 * again) * (linears + attention)
    assert backward.get_total_flops() == recomputed + reached * (2 * linears + 2.5 * attention)


@pytest.mark.parametrize("recompute", ["state", "every:2"])
def test_truncation_to_no_iteration(recompute: str) -> None:
    block, x = LoopedBlock(D, 2, 1, recompute=recompute), torch.randn(2, 3, D, requires_grad=True)
    for loops in (first := 3, torch.tensor([0, 2])):
        found = []
        for call in (block, compiled(block)):
            out = call(x, loops, truncate=0)
            found.append([out, *torch.autograd.grad(out.sum(), [x, *block.parameters()])])
        for value, expected in zip(*found, strict=True):
            assert_bitwise("result", value, expected)
        _, dx, *others = found[0]
        assert not any(g.any() for g in others) and not dx[1].any()
        assert bool((dx[0] == (0 if loops is first else 1)).all())  # it may not loop at all


def test_bad_input_under_compile() -> None:
    block = LoopedBlock(D, 2, 1, max_loops=2)
    x = torch.randn(2, 3, D)
    with pytest.raises(Exception, match="needs loops to be an int"):
        compiled(block)(x, torch.tensor([1, 2]), return_states=True)
    for options, message in (
        ({"return_states": 1}, "return_states = 1: pass True"),
        ({"return_states": [3]}, "has iterations .3.: give iterations in 1..2"),
        ({"truncate": -1}, "truncate = -1"),
        ({"truncate": 1.5}, "truncate = 1.5"),
        ({"positions": torch.rand(3)}, "positions must be integers"),
        ({"positions": torch.arange(5)}, "positions has shape"),
    ):
        with pytest.raises(Exception, match=message):
            compiled(block)(x, 2, **options)
    with pytest.raises(ValueError, match="larger max_loops"):
        compiled(block)(x, torch.tensor([1, 3]))
    with pytest.raises(ValueError, match="negative"):
        compiled(block)(x, torch.tensor([1, -3]))


def _worker(folder: Path) -> None:
    dist.init_process_group("gloo")
    _two_steps(dist.get_rank(), folder)  # its model is gone before the group is
    dist.barrier()
    dist.destroy_process_group()


def _two_steps(rank: int, folder: Path) -> None:
    torch.manual_seed(0)
    block = LoopedBlock(D, 2, 1).double()
    model = nn.parallel.DistributedDataParallel(block)
    x, loops = _data()
    for _ in range(2):  # two steps: buckets are rebuilt after the first
        model.zero_grad()
        model(x[2 * rank : 2 * rank + 2], loops[2 * rank : 2 * rank + 2]).square().sum().backward()
    if rank == 0:
        torch.save([p.grad for p in block.parameters()], folder / "grads.pt")


def _data() -> tuple[Tensor, list[int]]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(4, 3, D, dtype=torch.float64, generator=generator), [1, 4, 2, 0]


def test_ddp_averages_the_gradients(tmp_path) -> None:
    found = ended(start_ranks(2, tmp_path, _worker, tmp_path))
    assert [rank.code for rank in found] == [0, 0], found
    torch.manual_seed(0)
    block = LoopedBlock(D, 2, 1).double()
    x, loops = _data()
    (block(x, loops).square().sum() / 2).backward()
    grads = torch.load(tmp_path / "grads.pt")
    for (name, p), grad in zip(block.named_parameters(), grads, strict=True):
        assert_close(name, grad, p.grad)


@pytest.mark.parametrize("kind", ["ints", "lists"])
def test_other_counts_and_lengths_of_lists_compile_no_further(kind: str) -> None:
    block = LoopedBlock(8, 2, 1)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = compiled(block, counter)
    for n in range(2, 7):
        x, cu = torch.randn(2 * n, 8, requires_grad=True), list(range(0, 2 * n + 1, 2))
        call = (x.view(2, n, 8), n) if kind == "ints" else (x, [n % 4 + 1] * n)
        options = {} if kind == "ints" else {"cu_seqlens": cu}
        truth, out = block(*call, **options), fast(*call, **options)
        assert_close("output", out, truth, 1e-6)
        for value, expected in zip(
            torch.autograd.grad(out.sum(), [x, *block.parameters()]),
            torch.autograd.grad(truth.sum(), [x, *block.parameters()]),
            strict=True,
        ):
            assert_close("gradient", value, expected, 1e-5)
    assert counter.frame_count <= 3


def test_the_ops_do_not_see_the_callers_autocast() -> None:
    block = LoopedBlock(8, 2, 1)
    fast, x, grads = compiled(block), torch.randn(1, 4, 8), []
    for enabled in (False, True):
        out = fast(x, 2)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            grads.append(torch.autograd.grad(out.square().sum(), list(block.parameters())))
    for value, expected in zip(*grads, strict=True):
        assert torch.equal(value, expected)
