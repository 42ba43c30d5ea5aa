"""Nested states, auxiliary values and the iteration's number, against a loop in plain Python."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import relay_fast
from benchmarks.numerics import assert_bitwise, assert_close

POLICIES = ("none", "state", "every:2", "sqrt", "last:2", "budget:100000")
D, E = 4, 3


class TwoLevels(nn.Module):
    """A carry of two levels: the lower one is updated twice for each update of the higher one."""

    def __init__(self):
        super().__init__()
        self.low, self.high = nn.Linear(D + E, D), nn.Linear(D + E, E)

    def forward(self, carry: dict, x0: Tensor, iteration: int) -> tuple[dict, dict]:
        low, (high,) = carry["low"], carry["high"]
        for _ in range(2):
            low = torch.tanh(self.low(torch.cat((low, high.expand(*low.shape[:-1], E)), -1)) + x0)
        pooled = low.mean(1, keepdim=True)
        high = torch.tanh(self.high(torch.cat((pooled, high), -1))) / iteration
        aux = {"size": high.square().sum(), "each": low.sum((0, 1))}
        return {"low": low, "high": (high,)}, aux


def inputs(sequences: int) -> tuple[dict, Tensor]:
    torch.manual_seed(0)
    new = lambda *s: torch.randn(*s, dtype=torch.float64, requires_grad=True)
    return {"low": new(sequences, 2, D), "high": (new(sequences, 1, E),)}, new(sequences, 2, D)


def naive(module: nn.Module, carry: dict, x0: Tensor, loops: list[int], start: int):
    """Final carries and the sums of aux, one sequence at a time."""
    lows, highs, size, each = [], [], 0, 0
    for i, count in enumerate(loops):
        one = {"low": carry["low"][i : i + 1], "high": (carry["high"][0][i : i + 1],)}
        for t in range(1, count + 1):
            one, aux = module(one, x0[i : i + 1], start + t)
            size, each = size + aux["size"], each + aux["each"]
        lows.append(one["low"])
        highs.append(one["high"][0])
    return torch.cat(lows), torch.cat(highs), size, each


@pytest.mark.parametrize("loops", [[3, 3, 3], [2, 5, 1]], ids=["uniform", "ragged"])
@pytest.mark.parametrize("policy", POLICIES)
def test_nested_state_and_aux(policy: str, loops: list[int]) -> None:
    module, (carry, x0) = TwoLevels().double(), inputs(3)
    leaves = [carry["low"], carry["high"][0], x0, *module.parameters()]
    got, ran, aux = relay_fast.loop(
        module,
        carry,
        loops,
        per_row={"x0": x0},
        aux=True,
        return_loops=True,
        start=4,
        recompute=policy,
    )
    truth = naive(module, carry, x0, loops, 4)
    results = (got["low"], got["high"][0], aux["size"], aux["each"])
    assert isinstance(got["high"], tuple) and ran.tolist() == loops
    for value, expected in zip(results, truth, strict=True):
        assert_close("value", value, expected)
    loss = lambda low, high, size, each: low.sum() + high.prod(2).sum() + size**2 + each.prod()
    for value, expected in zip(
        torch.autograd.grad(loss(*results), leaves),
        torch.autograd.grad(loss(*truth), leaves),
        strict=True,
    ):
        assert_close("gradient", value, expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_nested_states_of_all_iterations_and_until(policy: str) -> None:
    module, (carry, x0) = TwoLevels().double(), inputs(3)
    leaves = [carry["low"], carry["high"][0], x0, *module.parameters()]

    def until(t: int, new: dict, old: dict, sequences: Tensor) -> Tensor:
        assert (new["low"] != old["low"]).any() and len(new["high"][0]) == len(sequences)
        return t >= torch.tensor([2, 4, 1])[sequences]

    options = {"per_row": {"x0": x0}, "aux": True, "recompute": policy, "return_states": True}
    results = []
    for stops in ({"loops": 9, "until": until}, {"loops": [2, 4, 1]}):
        states, aux = relay_fast.loop(module, carry, **stops, **options)
        assert [s.tolist() for s in states.sequences] == [[0, 1, 2], [0, 1], [1], [1]]
        assert [s["high"][0].shape[0] for s in states] == [3, 2, 1, 1]
        loss = sum(s["low"].sum() + s["high"][0].square().sum() for s in states) + aux["size"]
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for value, expected in zip(*results, strict=True):
        assert_close("result", value, expected)


class Balanced(nn.Module):
    """A mixture of two experts with a load-balancing loss; `stores` keeps it as an attribute."""

    def __init__(self, stores: bool = False):
        super().__init__()
        self.gate, self.stores = nn.Linear(D, 2), stores
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(2))

    def forward(self, h: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        p = self.gate(h).softmax(-1)
        new = sum(p[..., i, None] * torch.tanh(e(h)) for i, e in enumerate(self.experts))
        aux = p.sum((0, 1)).square().sum()
        if self.stores:
            self.aux = aux
            return new
        return new, aux


@pytest.mark.parametrize("policy", POLICIES)
def test_the_gradient_of_aux_alone(policy: str) -> None:
    module, x = Balanced().double(), torch.randn(3, 2, D, dtype=torch.float64)
    loops = [4, 2, 3]
    _, aux = relay_fast.loop(module, x, loops, aux=True, recompute=policy)
    states, truth = list(x.split(1)), 0
    for t in range(1, 5):
        active = [i for i, count in enumerate(loops) if count >= t]
        new, value = module(torch.cat([states[i] for i in active]))
        truth = truth + value
        for i, state in zip(active, new.split(1), strict=True):
            states[i] = state
    assert_close("aux", aux, truth)
    for value, expected in zip(
        torch.autograd.grad(aux, list(module.gate.parameters())),
        torch.autograd.grad(truth, list(module.gate.parameters())),
        strict=True,
    ):
        assert_close("gradient", value, expected)


def test_aux_without_an_iteration_and_without_grad() -> None:
    module, x = Balanced(), torch.randn(3, 2, D)
    out, aux = relay_fast.loop(module, x, 0, aux=True)
    assert_bitwise("output", out, x)
    assert aux.shape == () and aux == 0
    with torch.no_grad():
        out, aux = relay_fast.loop(module, x, 2, aux=True)
    h, first = module(x)
    _, second = module(h)
    assert_close("aux", aux, (first + second).detach(), 1e-6)


class Sees(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.seen = nn.Linear(D, D), []

    def forward(self, h: Tensor, iteration: int) -> Tensor:
        self.seen.append(iteration)
        return torch.tanh(self.linear(h))


def test_the_iteration_is_the_same_in_recomputation() -> None:
    module, x = Sees(), torch.randn(2, D)
    relay_fast.loop(module, x, [3, 1], recompute="last:1", start=10).sum().backward()
    assert module.seen[:3] == [11, 12, 13] and set(module.seen[3:]) == {11, 12, 13}
    module.seen.clear()
    relay_fast.loop(module, x, 2, shared={"iteration": 7})  # the caller's own is kept
    assert module.seen == [7, 7]


def test_resumed_is_uninterrupted() -> None:
    module, x = Sees().double(), torch.randn(3, D, dtype=torch.float64)
    whole = relay_fast.loop(module, x, [5, 2, 3])
    part = relay_fast.loop(module, x, [2, 2, 2])
    assert_bitwise("state", relay_fast.loop(module, part, [3, 0, 1], start=2), whole)
    assert module.seen == [1, 2, 3, 4, 5, 1, 2, 3, 4, 5]


class Returns(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make, self.weight = make, nn.Parameter(torch.ones(()))

    def forward(self, h: object) -> object:
        return self.make(h, self.weight)


def test_what_is_refused() -> None:
    x, n = torch.randn(2, D), torch.arange(2)
    sizes = itertools.count(1)
    cases = [
        (Balanced(), x[None], {}, TypeError, "type tuple, .* or pass aux=True if it returns"),
        (Balanced(stores=True), x[None], {}, RuntimeError, "'aux' .* return it beside the state"),
        (Returns(lambda h, w: h * w), x, {"aux": True}, TypeError, r"return the tuple \(state, au"),
        (Returns(lambda h, w: (h * w, 1.0)), x, {"aux": True}, TypeError, "aux holds float"),
        (Returns(lambda h, w: (h * w, n)), x, {"aux": True}, TypeError, "aux holds torch.int64"),
        (Returns(lambda h, w: (h * w, w.new_ones(next(sizes)))), x, {"aux": True}, ValueError,
         r"aux changed its shapes from \[\(\d,\)\] to \[\(\d,\)\] between"),
        (Returns(lambda h, w: h[0] * w), (x, x), {}, TypeError, "type Tensor, which is not built"),
        (Returns(lambda h, w: (h[0], h[1][:, :1])), (x, x), {}, ValueError,
         r"the state\[1\] from \(2, 4\) to \(2, 1\)"),
        (Returns(lambda h, w: h), (x, n), {}, TypeError, r"x\[1\] is torch.int64: a state holds"),
        (Returns(lambda h, w: h), {"a": x, "b": 2}, {}, TypeError, r"x\['b'\] is int: a state"),
        (Returns(lambda h, w: h), (x, x.double()), {}, TypeError, "has one dtype and one device"),
        (Returns(lambda h, w: h), (x, x[:1]), {}, ValueError, r"x\[1\] has 1 rows and x\[0\] 2"),
        (Returns(lambda h, w: h), (), {}, ValueError, "holds no tensor"),
        (Returns(lambda h, w: h), x, {"start": -1}, ValueError, "start = -1"),
        (Returns(lambda h, w: h), x, {"truncate": [1, 2, 3]}, ValueError, "for each of the 2 seq"),
        (Returns(lambda h, w: h), x, {"truncate": [1, -2]}, ValueError, "for each of the 2 seq"),
        (Returns(lambda h, w: h), x, {"truncate": 1.5}, ValueError, "a whole number of iterations"),
        (Returns(lambda h, w: (h * w, w)), x, {"aux": True, "truncate": 2, "until": torch.eq},
         ValueError, "aux=True with until and truncate: .* leave out truncate"),
    ]  # fmt: skip
    for policy in ("none", "state"):
        for module, state, options, error, message in cases:
            with pytest.raises(error, match=message):
                relay_fast.loop(module, state, 3, recompute=policy, **options)
