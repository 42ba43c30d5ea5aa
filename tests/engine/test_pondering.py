"""Losses over all halting times (PonderNet) and halting by a learned gate (ACT), from the states
of all iterations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import relay_fast
from benchmarks.numerics import assert_close
from relay_fast.engine.criteria import HaltingGate

D, CLASSES, PRIOR = 5, 3, 0.3


class Ponder(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.Sequential(nn.Linear(D, D), nn.Tanh())
        self.gate, self.head = nn.Linear(D, 1), nn.Linear(D, CLASSES)

    def loss(self, x: Tensor, targets: Tensor, loops: list[int], policy: str) -> Tensor:
        """Σ_t p_t · CE_t + KL(p ‖ geometric prior): p_t is the probability of halting at t."""
        states = relay_fast.loop(self.cell, x, loops, return_states=True, recompute=policy)
        going = x.new_ones(len(x))  # the probability of having come so far
        total = x.new_zeros(())
        for t, (state, who) in enumerate(zip(states, states.sequences, strict=True), start=1):
            last = torch.tensor(loops)[who] == t
            halts = torch.where(last, x.new_tensor(1), self.gate(state)[:, 0].sigmoid())
            p = going[who] * halts
            prior = torch.where(last, x.new_tensor(1), PRIOR) * (1 - PRIOR) ** (t - 1)
            ce = nn.functional.cross_entropy(self.head(state), targets[who], reduction="none")
            total = total + (p * ce + p * (p / prior).log()).sum()
            going = going.index_put((who,), going[who] * (1 - halts))
        return total / len(x)


def naive(model: Ponder, x: Tensor, targets: Tensor, loops: list[int]) -> Tensor:
    """The same loss, one sequence at a time."""
    total = 0
    for i, count in enumerate(loops):
        h, going = x[i], 1.0
        for t in range(1, count + 1):
            h = model.cell(h)
            halts = 1.0 if t == count else model.gate(h)[0].sigmoid()
            prior = (1.0 if t == count else PRIOR) * (1 - PRIOR) ** (t - 1)
            p = going * halts
            ce = nn.functional.cross_entropy(model.head(h), targets[i])
            total = total + p * ce + p * torch.log(torch.as_tensor(p / prior, dtype=x.dtype))
            going = going * (1 - halts)
    return total / len(x)


@pytest.mark.parametrize("policy", ["none", "state", "sqrt"])
def test_ponder_net(policy: str) -> None:
    torch.manual_seed(0)
    model = Ponder().double()
    x = torch.randn(4, D, dtype=torch.float64, requires_grad=True)
    targets, loops = torch.tensor([0, 2, 1, 2]), [3, 1, 4, 2]
    loss, truth = model.loss(x, targets, loops, policy), naive(model, x, targets, loops)
    assert_close("loss", loss, truth)
    inputs = [x, *model.parameters()]
    for value, expected in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(truth, inputs), strict=True
    ):
        assert_close("gradient", value, expected)


def test_act_trains_through_the_iterations_that_ran() -> None:
    """The gate decides without a gradient; its own comes from the weights of the states."""
    torch.manual_seed(0)
    model, x = Ponder().double(), torch.randn(6, D, dtype=torch.float64)
    states, loops = relay_fast.loop(
        model.cell, x, 20, until=HaltingGate(model.gate, 1.4), return_states=True, return_loops=True
    )
    p = torch.zeros(6, len(states), dtype=torch.float64)
    mean, going = torch.zeros_like(x), torch.ones(6, dtype=torch.float64)
    for t, (state, who) in enumerate(zip(states, states.sequences, strict=True)):
        halts = model.gate(state)[:, 0].sigmoid()
        p[who, t] = halts.detach()
        share = going[who] * torch.where(loops[who] == t + 1, 1.0, halts)
        mean = mean.index_add(0, who, share[:, None] * state)
        going = going.index_put((who,), going[who] - share)
    assert len(set(loops.tolist())) > 1 and going.abs().max() < 1e-12
    for row, count in zip(p, loops.tolist(), strict=True):
        assert row[:count].sum() >= 1.4 > row[: count - 1].sum() and not row[count:].any()
    mean.square().sum().backward()
    assert all(q.grad is not None and q.grad.abs().max() > 0 for q in model.gate.parameters())
