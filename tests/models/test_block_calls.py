"""How a call of the block begins and ends: injection, resumption, stopping, truncation by
sequence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.numerics import assert_bitwise, assert_close
from relay_fast.engine.criteria import StateChange
from relay_fast.models.initial_state import noise_state
from relay_fast.models.looped_block import LoopedBlock
from tests.support.block_alone import alone, twins

POLICIES = ("none", "state", "every:2", "sqrt", "last:2", "budget:100000")
D, LENGTHS = 16, [3, 1, 4, 2]
OFFSETS = [0, 3, 4, 8, 10]


def batch(seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(10, D, dtype=torch.float64, requires_grad=True)


def compare(ours: list[Tensor], theirs: list[Tensor], inputs: list, block, eager) -> None:
    """Values, and the gradients of a random sum of them."""
    weights = [torch.randn_like(value) for value in ours]
    anchor = lambda: sum(0 * t.sum() for t in inputs)  # else nothing may need a gradient
    total = lambda values: (
        sum((v * w).sum() for v, w in zip(values, weights, strict=True)) + (anchor())
    )
    for value, expected in zip(ours, theirs, strict=True):
        assert_close("value", value, expected)
    options = {"allow_unused": True, "materialize_grads": True}
    found = torch.autograd.grad(total(ours), [*inputs, *block.parameters()], **options)
    truth = torch.autograd.grad(total(theirs), [*inputs, *eager.parameters()], **options)
    for value, expected in zip(found, truth, strict=True):
        assert_close("gradient", value, expected)


@pytest.mark.parametrize("policy", [*POLICIES, "auto"])
@pytest.mark.parametrize("injection", ["add", "concat"])
def test_injection_start_and_truncation_by_sequence(injection: str, policy: str) -> None:
    block, eager = twins(injection=injection, max_loops=8, loop_norm="pre")
    block.recompute = policy
    x, e, loops, truncate = batch(), batch(1), [3, 5, 0, 4], [1, 5, 2, 0]
    out = block(x, loops, cu_seqlens=OFFSETS, inject=e, start=3, truncate=truncate)
    parts = zip(x.split(LENGTHS), e.split(LENGTHS), loops, truncate, strict=True)
    truth = [alone(eager, h, t, i, 3, k)[-1] for h, i, t, k in parts]
    compare([out], [torch.cat(truth)], [x, e], block, eager)


@pytest.mark.parametrize("policy", POLICIES)
def test_until_computes_what_each_sequence_needs(policy: str) -> None:
    block, eager = twins(injection="add", max_loops=9)
    block.recompute = policy
    x, until, seen = batch(), StateChange(0.25), []

    def counted(t: int, new: Tensor, old: Tensor, cu_seqlens: Tensor) -> Tensor:
        assert not new.requires_grad
        seen.append(len(new))
        return until(t, new, old, cu_seqlens)

    states, loops = block(
        x, 6, cu_seqlens=OFFSETS, until=counted, start=2, return_states=True, return_loops=True
    )
    each = lambda: [alone(eager, h, 6, start=2, until=until) for h in x.split(LENGTHS)]
    truth = each()
    assert loops.tolist() == [len(t) - 1 for t in truth] and len(set(loops.tolist())) > 1
    assert sum(seen) == sum(n * t for n, t in zip(LENGTHS, loops.tolist(), strict=True))
    expected = [
        torch.cat([t[i] for t in truth if len(t) > i]) for i in range(1, max(map(len, truth)))
    ]
    compare(states, expected, [x], block, eager)
    out = block(x, 6, cu_seqlens=OFFSETS, until=until, start=2)
    compare([out], [torch.cat([t[-1] for t in each()])], [x], block, eager)


@pytest.mark.parametrize("truncate", [0, 2, [0, 1, 2, 9]], ids=str)
@pytest.mark.parametrize("policy", ["none", "state", "every:2"])
def test_until_with_truncation(policy: str, truncate) -> None:
    block, eager = twins()
    block.recompute = policy
    x, stops = batch(), torch.tensor([2, 5, 1, 4])
    until = lambda t, new, old, sequences: t >= stops[sequences]
    out = block(x, 5, cu_seqlens=OFFSETS, until=until, truncate=truncate)
    each = truncate if isinstance(truncate, list) else [truncate] * 4
    parts = zip(x.split(LENGTHS), stops.tolist(), each, strict=True)
    truth = torch.cat([alone(eager, h, t, truncate=k)[-1] for h, t, k in parts])
    compare([out], [truth], [x], block, eager)


def test_padded_until_sees_states_of_the_batch() -> None:
    block, eager = twins()
    x = torch.randn(4, 3, D, dtype=torch.float64)
    shapes, until = [], StateChange(0.5)
    record = lambda t, new, old: (shapes.append(tuple(new.shape)), until(t, new, old))[1]
    out, loops = block(x, 7, until=record, return_loops=True)
    truth = [alone(eager, h, 7, until=until) for h in x]
    assert loops.tolist() == [len(t) - 1 for t in truth]
    assert_close("output", out, torch.stack([t[-1] for t in truth]))
    counts = [sum(len(t) > i for t in truth) for i in range(1, len(shapes) + 1)]
    assert shapes == [(count, 3, D) for count in counts]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("injection", ["none", "add", "concat"])
def test_resumed_is_uninterrupted_to_the_bit(injection: str, training: bool) -> None:
    block, _ = twins(injection=injection, max_loops=7, dropout=0.2, state_noise=0.1)
    block.train(training)
    x, loops = batch(), torch.tensor([7, 5, 2, 0])
    call = lambda h, t, **options: block(h, t, cu_seqlens=OFFSETS, seed=11, **options)
    inject = {} if injection == "none" else {"inject": x}
    whole = call(x, loops)
    part = call(x, loops.clamp(max=3))
    assert_bitwise("state", call(part, (loops - 3).clamp(min=0), start=3, **inject), whole)
    part = call(x, loops.flip(0).clamp(max=3))  # sorted in another way, which changes roundings
    rest = call(part, (loops.flip(0) - 3).clamp(min=0), start=3, **inject)
    assert_close("sorted", rest, call(x, loops.flip(0)), 1e-14)
    if training:
        again = block(x, loops, cu_seqlens=OFFSETS, seed=torch.tensor(12))
        assert (again - whole).abs().max() > 1e-3
        torch.manual_seed(5)
        drawn = block(x, loops, cu_seqlens=OFFSETS)
        torch.manual_seed(5)
        assert_bitwise("drawn", block(x, loops, cu_seqlens=OFFSETS), drawn)


def test_noise_state() -> None:
    like = torch.zeros(50, 40, dtype=torch.float64)
    state = noise_state(like, generator=torch.Generator().manual_seed(1))
    std = (2 / 5) ** 0.5
    assert state.shape == like.shape and state.dtype == like.dtype
    assert state.abs().max() <= 3 * std
    assert abs(float(state.std()) - 0.98658 * std) < 0.02 * std  # cut at three deviations
    assert_bitwise("seeded", noise_state(like, generator=torch.Generator().manual_seed(1)), state)
    assert not noise_state(like, 0).any()
    with pytest.raises(ValueError, match="std = -1"):
        noise_state(like, -1)


def test_bad_calls() -> None:
    block = LoopedBlock(D, 2, 1, injection="add", max_loops=4)
    x = torch.randn(2, 3, D)
    cases = [
        (lambda: block(x, 3, start=2), ValueError, r"start \+ loops = 2 \+ 3 is more than the 4"),
        (lambda: block(x, 9, until=StateChange(1)), ValueError, "loops = 9 is more than the 4"),
        (lambda: block(x, 1, start=-1), ValueError, "start = -1"),
        (lambda: block(x, 1, start=1.5), ValueError, "start = 1.5"),
        (lambda: block(x[..., :8], 1, start=1), ValueError, r"x has shape \(2, 3, 8\): pass"),
        (lambda: block(x, 1, inject=x[..., :8]), ValueError, r"inject has shape \(2, 3, 8\) but x"),
        (lambda: block(x, 1, inject=x.long()), TypeError, "inject is torch.int64"),
        (lambda: block(x, 1, seed=0.5), ValueError, "seed = 0.5"),
        (lambda: block(x, 2, truncate=[1, -1]), ValueError, "truncate = .* for each of the 2 seq"),
        (lambda: LoopedBlock(D, 2, 1)(x, 1, inject=x), ValueError, "built with injection='none'"),
        (lambda: block(x, torch.ones(2, 3).long()), ValueError, "tokens of a sequence attend to"),
        (lambda: block(x, [1, 2**63]), ValueError, r"loops = 9\d+: it must be below"),
        (lambda: block(x, 1, seed=2**70), ValueError, r"seed = \d+: it must be below 2\*\*63"),
        (lambda: block([1.0], 1), TypeError, "x is an object of type list: give"),
        (lambda: noise_state(x.long()), TypeError, "like is torch.int64"),
        (lambda: block(x, 3, until=lambda t, a, b: a[:, :, 0] > 0), ValueError, r"shape \(2, 3\)"),
    ]  # fmt: skip
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
    for name, value in (("until", StateChange(1)), ("return_loops", True)):
        compiled = torch.compile(block, backend="eager", fullgraph=True)
        with pytest.raises(Exception, match=f"does not take {name}: call it outside"):
            compiled(x, 2, **{name: value})
        torch._dynamo.reset()


class Twice(torch.nn.Linear):
    """A part with a forward of its own, which is called in the loop."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("policy", ["none", "state", "every:2"])
def test_a_block_whose_parts_are_called(policy: str) -> None:
    block, eager = twins(injection="concat", max_loops=9)
    block.recompute = policy
    up = block.layers[1].up
    called = Twice(up.in_features, up.out_features, bias=False).double()
    called.weight = torch.nn.Parameter(up.weight.detach() / 2)
    block.layers[1].up = called
    x, e, stops = batch(), batch(1), torch.tensor([3, 1, 4, 2])
    until = lambda t, new, old, sequences: t - 2 >= stops[sequences]
    truncate = [3, 1, 2, 0]
    options = {"cu_seqlens": OFFSETS, "inject": e, "start": 2, "truncate": truncate}
    parts = zip(x.split(LENGTHS), e.split(LENGTHS), stops.tolist(), truncate, strict=True)
    truth = torch.cat([alone(eager, h, t, i, 2, k)[-1] for h, i, t, k in parts])
    g = torch.randn_like(truth)
    wanted = torch.autograd.grad(truth, [x, e, *eager.parameters()], g)
    for out in (block(x, 6, until=until, **options), block(x, stops, **options)):
        assert_close("output", out, truth)
        found = torch.autograd.grad(out, [x, e, *block.parameters()], g)
        for (name, _), value, expected in zip(
            [("x", x), ("e", e), *block.named_parameters()], found, wanted, strict=True
        ):
            assert_close(name, value, 2 * expected if name == "layers.1.up.weight" else expected)
