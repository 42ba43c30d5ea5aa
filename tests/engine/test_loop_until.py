"""Sequences that stop while the loop runs, against the same counts given in advance and against
each sequence alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import relay_fast
from benchmarks.numerics import assert_bitwise, assert_close
from relay_fast.batch.plan import Plan
from relay_fast.batch.stopping import StoppingPlan
from relay_fast.engine.auto_policy import policy_bytes
from relay_fast.engine.criteria import StateChange
from relay_fast.engine.recompute import RecomputePolicy

POLICIES = ("none", "state", "every:2", "sqrt", "last:2", "budget:100000")
D, STOPS = 6, torch.tensor([2, 5, 1, 3, 5, 9])


class Rows(nn.Module):
    """Counts the rows that it computes; knows its iteration."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.linear, self.dropout, self.rows = nn.Linear(D, D), nn.Dropout(dropout), 0

    def forward(self, h: Tensor, iteration: int, bias: Tensor | float = 0.0) -> Tensor:
        self.rows += len(h)
        return self.dropout(torch.tanh(self.linear(h) + bias)) * (1 + 0.1 * iteration)


class Mean(nn.Module):
    """Mixes the rows of each packed sequence."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, h: Tensor, cu_seqlens: Tensor) -> Tensor:
        lengths = cu_seqlens.diff().long()
        owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        mean = h.new_zeros(len(lengths), D).index_add(0, owner, h) / lengths.clamp(min=1)[:, None]
        return h + self.linear(mean)[owner].tanh()


def at_stops(t: int, new: Tensor, old: Tensor, sequences: Tensor) -> Tensor:
    assert not torch.is_grad_enabled() and new.shape == old.shape
    return t >= STOPS[sequences]


def gradients(result: Tensor | list[Tensor], *inputs: Tensor) -> list[Tensor]:
    states = result if isinstance(result, list) else [result]
    torch.manual_seed(1)
    loss = sum((s * torch.randn_like(s)).sum() for s in states)
    return list(torch.autograd.grad(loss, inputs, materialize_grads=True, allow_unused=True))


@pytest.mark.parametrize("truncate", [None, 0, 1, [0, 1, 2, 3, 4, 5]], ids=str)
@pytest.mark.parametrize("want_states", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_stopped_is_as_counted(policy: str, want_states: bool, truncate) -> None:
    torch.manual_seed(0)
    module = Rows().double()
    x, bias = (torch.randn(6, n, D, dtype=torch.float64, requires_grad=True) for n in (3, 1))
    options = {"return_states": want_states, "truncate": truncate, "recompute": policy,
               "per_row": {"bias": bias}}  # fmt: skip
    limits = [7, 7, 7, 7, 4, 0]
    got, loops = relay_fast.loop(module, x, limits, until=at_stops, return_loops=True, **options)
    assert loops.tolist() == [2, 5, 1, 3, 4, 0]
    assert module.rows == sum(loops)
    truth, same = relay_fast.loop(module, x, loops, return_loops=True, **options)
    assert_bitwise("loops", same, loops)
    pairs = zip(got, truth, strict=True) if want_states else [(got, truth)]
    for value, expected in pairs:
        assert_bitwise("state", value, expected)
    inputs = [x, bias, *module.parameters()]
    for value, expected in zip(gradients(got, *inputs), gradients(truth, *inputs), strict=True):
        assert_close("gradient", value, expected, 1e-13)
    if want_states:
        assert [s.tolist() for s in got.sequences] == [s.tolist() for s in truth.sequences]
        assert [s.tolist() for s in got.sequences][:3] == [[0, 1, 2, 3, 4], [0, 1, 3, 4], [1, 3, 4]]


@pytest.mark.parametrize("policy", POLICIES)
def test_packed_equals_each_sequence_alone(policy: str) -> None:
    torch.manual_seed(0)
    module, lengths = Mean().double(), [2, 4, 1, 0, 3, 5]
    scales = torch.tensor([1, 3, 0.5, 1, 9, 5]).repeat_interleave(torch.tensor(lengths))
    x = (torch.randn(15, D, dtype=torch.float64) * scales[:, None]).requires_grad_()
    cu_seqlens = torch.tensor([0, 2, 6, 7, 7, 10, 15])
    until, seen = StateChange(0.16), []
    counted = lambda t, new, old, cu_seqlens: (
        seen.append(len(new)),
        until(t, new, old, cu_seqlens),
    )[1]
    out, loops = relay_fast.loop(
        module, x, 30, cu_seqlens=cu_seqlens, until=counted, return_loops=True, recompute=policy
    )
    assert len(set(loops.tolist())) > 2  # they do not stop together
    assert sum(seen) == sum(n * t for n, t in zip(lengths, loops.tolist(), strict=True))
    parts = []
    for i, h in enumerate(x.split(lengths)):
        for t in range(1, 31):
            if not len(h):
                break
            new = module(h, torch.tensor([0, len(h)]))
            stop = (new - h).norm() <= 0.16 * h.norm()
            h = new
            if stop:
                assert t == loops[i]
                break
        parts.append(h)
    truth = torch.cat(parts)
    assert_close("output", out, truth)
    for value, expected in zip(
        gradients(out, x, *module.parameters()),
        gradients(truth, x, *module.parameters()),
        strict=True,
    ):
        assert_close("gradient", value, expected)


@pytest.mark.parametrize("truncate", [None, 1, [0, 1, 2, 3, 2, 1]], ids=str)
@pytest.mark.parametrize("policy", POLICIES[1:])
def test_dropout_draws_the_same_mask_in_recompute(policy: str, truncate) -> None:
    """Truncation stops iterations that began with a gradient, and may stop whole ones."""
    module, x = Rows(dropout=0.5), torch.randn(6, 3, D, requires_grad=True)
    stop = lambda t, new, old, sequences: t >= STOPS.flip(0)[sequences] + 1
    results = []
    for recompute in ("none", policy):
        torch.manual_seed(3)
        options = {"until": stop, "recompute": recompute, "truncate": truncate}
        out = relay_fast.loop(module, x, 7, **options)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])])
        torch.rand(7)
    for value, expected in zip(*results, strict=True):
        assert_bitwise("result", value, expected)


def test_states_that_nothing_reached_are_empty() -> None:
    x = torch.randn(6, 3, D)
    with torch.no_grad():
        states = relay_fast.loop(Rows(), x, 20, until=at_stops, return_states=[2, 9, 12])
    assert [tuple(s.shape) for s in states] == [(5, 3, D), (1, 3, D), (0, 3, D)]
    assert [s.tolist() for s in states.sequences] == [[0, 1, 3, 4, 5], [5], []]
    everything = relay_fast.loop(Rows(), x, 20, until=at_stops, return_states=True)
    assert len(everything) == 9


def test_states_stay_a_list_of_tensors_for_wrappers() -> None:
    states = relay_fast.loop(Rows(), torch.randn(3, D), [1, 2, 0], return_states=True)
    assert isinstance(states, list) and [len(s) for s in states] == [2, 1]
    leaves, structure = torch.utils._pytree.tree_flatten(states)
    again = structure.unflatten(leaves)
    assert [s.tolist() for s in again.sequences] == [[0, 1], [1]]


def test_without_sequences_and_without_loops() -> None:
    never = lambda t, new, old: pytest.fail("called without a sequence")
    for x, loops in ((torch.randn(0, D), 3), (torch.randn(2, D), 0)):
        out, ran = relay_fast.loop(Rows(), x, loops, until=never, return_loops=True)
        assert_bitwise("output", out, x)
        assert ran.tolist() == [0] * len(x)
        assert relay_fast.loop(Rows(), x, loops, until=never, return_states=True) == []


def test_what_until_may_not_be() -> None:
    x = torch.randn(6, 3, D)
    answers = [
        (lambda t, new, old: True, TypeError, "until returned bool at iteration 1: return a bool"),
        (lambda t, new, old: new[:, 0, 0], TypeError, "until returned torch.float32 at iteration"),
        (lambda t, new, old: new[:, 0] > 0, ValueError, r"shape \(6, 6\) at iteration 1: .* of 6|"
         r"shape \(6, 6\) at iteration 1: return one bool for each of the 6 sequences"),
        (0.5, TypeError, "until is of type float: give a function"),
    ]  # fmt: skip
    for until, error, message in answers:
        with pytest.raises(error, match=message):
            relay_fast.loop(Rows(), x, 3, until=until)
    for change in (lambda t, new, old: new.zero_(), lambda t, new, old: old.mul_(2)):
        with pytest.raises(RuntimeError, match="until changed a state in place at iteration 1"):
            relay_fast.loop(Rows(), x, 3, until=change)


def test_policies_count_what_may_be_needed() -> None:
    plan = StoppingPlan([3, 1, 2], [4, 0, 2])
    assert plan.limit == 4 and plan.most_rows == (5, 5, 3, 3)
    sizes = [policy_bytes(RecomputePolicy.parse(p), plan, 8, 100) for p in ("none", "state")]
    same = [
        policy_bytes(RecomputePolicy.parse(p), Plan([3, 1, 2], [4, 0, 2]), 8, 100)
        for p in ("none", "state")
    ]
    assert sizes == same
    module, x = Rows(), torch.randn(6, 3, D, requires_grad=True)
    outs = [
        relay_fast.loop(module, x, 7, until=at_stops, recompute=policy, truncate=[1, 2, 3, 0, 1, 2])
        for policy in ("auto", "state")
    ]
    assert_bitwise("output", *outs)
    for value, expected in zip(*(gradients(out, x) for out in outs), strict=True):
        assert_bitwise("gradient", value, expected)
