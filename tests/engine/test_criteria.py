"""Criteria to stop at: their values by their formulas, padded and packed alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import relay_fast
from relay_fast.engine.criteria import (
    CosineChange,
    HaltingGate,
    ReadoutEntropy,
    ReadoutKL,
    StateChange,
    sequence_mean,
)

D, CLASSES = 4, 5


def pair() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(3, 2, D, dtype=torch.float64), torch.randn(3, 2, D, dtype=torch.float64)


def values_of(kind: str, new: Tensor, old: Tensor, head: nn.Module) -> Tensor:
    a, b = new.flatten(1), old.flatten(1)
    p, q = (head(h).softmax(-1) for h in (new, old))
    return {
        "change": (a - b).norm(dim=1) / b.norm(dim=1),
        "cosine": 1 - torch.cosine_similarity(a, b),
        "entropy": torch.distributions.Categorical(p).entropy().mean(1),
        "kl": (p * (p / q).log()).sum(-1).mean(1),
    }[kind]


@pytest.mark.parametrize("kind", ["change", "cosine", "entropy", "kl"])
def test_stops_at_the_value_of_its_formula(kind: str) -> None:
    new, old = pair()
    head = nn.Linear(D, CLASSES).double()
    make = {
        "change": StateChange,
        "cosine": CosineChange,
        "entropy": lambda *a: ReadoutEntropy(head, *a),
        "kl": lambda *a: ReadoutKL(head, *a),
    }[kind]
    values = values_of(kind, new, old, head)
    cu = torch.tensor([0, 2, 4, 6])
    for value in values.tolist():
        for bound in (value * (1 - 1e-9), value * (1 + 1e-9)):
            expected = values <= bound
            assert torch.equal(make(bound)(1, new, old), expected)
            flat = make(bound)(1, new.flatten(0, 1), old.flatten(0, 1), cu)
            assert torch.equal(flat, expected)
        assert not make(value * 2, 3)(2, new, old).any()  # min_loops
    assert make(1e9, 3)(3, new, old).all()


def test_gate_adds_its_probabilities_up_by_sequence() -> None:
    new, old = pair()
    gate = nn.Linear(D, 1).double()
    p = gate(new).sigmoid().mean((1, 2)).detach()
    stops = HaltingGate(gate, float(2 * p[1] - 1e-9))
    everyone, some = torch.arange(3), torch.tensor([0, 1])
    assert torch.equal(stops(1, new, old, sequences=everyone), p >= 2 * p[1])
    assert stops(2, new[:2], old[:2], sequences=some).tolist() == [bool(p[0] >= p[1]), True]
    assert torch.equal(stops(1, new, old, sequences=everyone), p >= 2 * p[1])  # starts anew
    pooled = HaltingGate(lambda h: gate(h.mean(1))[:, 0], 0.5, accumulate=False)
    assert torch.equal(pooled(1, new, old), gate(new.mean(1))[:, 0].sigmoid() >= 0.5)


def test_criteria_serve_the_loop() -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(D, D), nn.Tanh()), torch.randn(5, 2, D)
    head = nn.Linear(D, CLASSES)
    for until in (
        StateChange(0.05),
        CosineChange(0.01),
        ReadoutEntropy(head, 1.5),
        ReadoutKL(head, 1e-3),
        HaltingGate(nn.Linear(D, 1), 2.5),
    ):
        out, loops = relay_fast.loop(module, x, 50, until=until, return_loops=True)
        assert out.shape == x.shape and 1 <= int(loops.max()) < 50, until


def test_sequence_mean_of_packed_rows() -> None:
    values = torch.tensor([1.0, 3.0, 5.0])
    assert sequence_mean(values, torch.tensor([0, 2, 3])).tolist() == [2, 5]


@pytest.mark.parametrize(
    ("threshold", "min_loops", "message"),
    [(-1, 1, "threshold = -1"), (float("nan"), 1, "threshold = nan"), (1, 0, "min_loops = 0")],
)
def test_bad_bounds(threshold: float, min_loops: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StateChange(threshold, min_loops)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_measured_in_fp32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    old = (30 * torch.randn(2, 64, 64)).to(dtype)  # squares beyond fp16's largest number
    new = (old.float() * (1 + 0.02 * torch.randn(2, 64, 64))).to(dtype)
    a, b = new.double().flatten(1), old.double().flatten(1)
    change = (a - b).norm(dim=1) / b.norm(dim=1)
    cosine = 1 - torch.cosine_similarity(a, b)
    cu = torch.tensor([0, 64, 128])
    for criterion, truth in ((StateChange(0), change), (CosineChange(0), cosine)):
        for value in (
            criterion.measure(new, old, None),
            criterion.measure(new.flatten(0, 1), old.flatten(0, 1), cu),
        ):
            torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=0)
    gate = HaltingGate(lambda h: torch.full((2,), -5.5, dtype=dtype), 1.0)
    p = 1 / (1 + torch.tensor(5.5, dtype=torch.float64).exp())
    for t in range(1, 101):
        gate(t, new, old)
    torch.testing.assert_close(gate._sums.double(), (100 * p).expand(2), rtol=1e-5, atol=0)


def test_what_does_not_change_stops() -> None:
    zero = torch.zeros(2, 3, D)
    for criterion in (StateChange(0), CosineChange(0)):
        assert criterion(1, zero, zero).all()
        assert not criterion(1, zero + 1, zero).any()
        empty = torch.tensor([0, 0, 6])  # a sequence without tokens does not wait
        assert criterion(1, zero.flatten(0, 1), zero.flatten(0, 1), empty).all()


def test_classes_that_a_mask_excludes_count_as_nothing() -> None:
    new, old = pair()
    head = nn.Linear(D, CLASSES).double()
    masked = lambda h: torch.cat([head(h), torch.full((*h.shape[:-1], 1), -torch.inf)], -1)
    for kind in (ReadoutEntropy, ReadoutKL):
        value = kind(masked, 1.0).measure(new, old, None)
        torch.testing.assert_close(value, kind(head, 1.0).measure(new, old, None))


def test_what_is_refused() -> None:
    for make in (lambda: ReadoutKL(None, 0.1), lambda: HaltingGate("gate")):
        with pytest.raises(
            TypeError, match=r"(readout is None|gate is an object of type str): give a module or a"
        ):
            make()
    new, old = pair()
    gate = HaltingGate(lambda h: h[:, 0, 0], 0.9)
    gate(1, new[:2], old[:2])
    with pytest.raises(ValueError, match="3 sequences at iteration 2, but has the sums of 2 from"):
        gate(2, new, old)
