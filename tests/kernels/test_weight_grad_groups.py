"""Weight gradients of several iterations in one launch are the sum of theirs, and so are those of
the biases beside them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks import interpreter
from benchmarks.numerics import describe, rms_ratio
from relay_fast.kernels import weight_grad as module
from relay_fast.kernels.weight_grad import MOST_OPERANDS, weight_grad
from relay_fast.kernels.weight_grad_ref import weight_grad_ref
from relay_fast.ops import gradients
from relay_fast.ops.gradients import GradientBuffers
from tests.support.kernel_checks import DEVICE, guarded_outputs

interpreter.mend()
Pair = tuple[Tensor, Tensor, Tensor | None]


@pytest.fixture
def launches(monkeypatch) -> list[int]:
    """The number of pairs of each launch."""
    seen: list[int] = []
    add = module._add

    def watched(acc, bias, pairs, *rest):
        seen.append(len(pairs))
        add(acc, bias, pairs, *rest)

    monkeypatch.setattr(module, "_add", watched)
    return seen


def operands(rows, columns: int, d: int, dtype=torch.float32, counts=None) -> list[Pair]:
    """Rows of one buffer, so that their distance is a whole number of vectors; beyond a count they
    are NaN."""
    table = torch.tensor(counts or [0], dtype=torch.int32, device=DEVICE)
    width = -(-(columns + d) // 16) * 16
    buffer = torch.randn(sum(rows), width, device=DEVICE, dtype=dtype)
    found = []
    for i, part in enumerate(buffer.split(list(rows))):
        if counts:
            part[counts[i] :] = float("nan")
        found.append(
            (part[:, :columns], part[:, columns:][:, :d], table[i : i + 1] if counts else None)
        )
    return found


def truth(pairs: list[Pair], acc: Tensor, counts=None) -> tuple[Tensor, Tensor]:
    total, line = acc.double(), torch.zeros(len(acc), device=DEVICE, dtype=torch.float64)
    for i, (dy, x, _) in enumerate(pairs):
        live = slice(counts[i] if counts else None)
        total = total + dy[live].double().T @ x[live].double()
        line = line + dy[live].double().sum(0)
    return total, line


# Blocks of 32 rows: one row and many, one more than a block, an empty part, more than a launch
# takes.
@pytest.mark.parametrize(
    "rows", [(5,), (1, 300), (70, 0, 33), (9, 200, 40, 33, 65, 3, 31, 1, 64, 2)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_several_operands_in_one_launch(launches, rows, dtype) -> None:
    pairs = operands(rows, 24, 40, dtype)
    acc, bias = torch.randn(24, 40, device=DEVICE), torch.zeros(24, device=DEVICE)
    expected, line = truth(pairs, acc)
    with guarded_outputs():
        weight_grad(acc, *pairs[0][:2], bias=bias, more=pairs[1:])
    assert rms_ratio(acc, expected) < 1e-5, describe("acc", acc, expected)
    assert rms_ratio(bias, line) < 1e-5, describe("bias", bias, line)
    filled = sum(n > 0 for n in rows)
    assert launches == [MOST_OPERANDS] * (filled // MOST_OPERANDS) + [filled % MOST_OPERANDS]
    plain, plain_bias = torch.empty(24, 40, device=DEVICE), torch.zeros(24, device=DEVICE)
    weight_grad_ref(plain, *pairs[0][:2], fresh=True, bias=plain_bias, more=pairs[1:])
    again = torch.empty(24, 40, device=DEVICE)
    weight_grad(again, *pairs[0][:2], fresh=True, more=pairs[1:])
    assert rms_ratio(again, plain) < 1e-5, describe("again", again, plain)
    assert rms_ratio(bias, plain_bias) < 1e-5


def test_addresses_decide_what_goes_together(launches) -> None:
    near = operands((40, 50), 24, 40)
    odd = torch.randn(40 * 64 + 3, device=DEVICE)[3:].view(40, 64)  # between two vectors
    pairs = [*near, (odd[:, :24], odd[:, 24:], None)]
    acc = torch.zeros(24, 40, device=DEVICE)
    weight_grad(acc, *pairs[0][:2], more=pairs[1:])
    assert rms_ratio(acc, truth(pairs, torch.zeros_like(acc))[0]) < 1e-5
    assert launches == [2, 1]


def test_each_part_has_its_own_count() -> None:
    counts = [7, 0, 130, 65]
    pairs = operands((40, 33, 140, 65), 24, 40, counts=counts)
    acc, bias = torch.zeros(24, 40, device=DEVICE), torch.zeros(24, device=DEVICE)
    dy, x, count = pairs[0]
    with guarded_outputs():
        weight_grad(acc, dy, x, row_count=count, bias=bias, more=pairs[1:])
    expected, line = truth(pairs, torch.zeros_like(acc), counts)
    assert rms_ratio(acc, expected) < 1e-5, describe("acc", acc, expected)
    assert rms_ratio(bias, line) < 1e-5, describe("bias", bias, line)


def test_long_sums_are_taken_in_chains() -> None:
    """A part of 1,100 rows behind one of 40: chains begin where the part does."""
    pairs = operands((40, 1100), 16, 16)
    acc = torch.zeros(16, 16, device=DEVICE)
    weight_grad(acc, *pairs[0][:2], more=pairs[1:])
    expected, _ = truth(pairs, torch.zeros_like(acc))
    assert rms_ratio(acc, expected) < 1e-5, describe("acc", acc, expected)


def test_partials_stay_over_launches() -> None:
    """5 rows take one program a tile, 130 two, 300 three: the partials grow, and later launches add
    to them."""
    pairs = operands((5, 130, 300, 70), 24, 40)
    acc, bias = torch.zeros(24, 40, device=DEVICE), torch.zeros(24, device=DEVICE)
    sums: dict[str, Tensor] = {}
    with guarded_outputs():
        for dy, x, _ in pairs:
            weight_grad(acc, dy, x, bias=bias, sums=sums)
    expected, line = truth(pairs, torch.zeros_like(acc))
    assert sums["acc"].shape == (3, 24, 40) and sums["bias"].shape == (3, 24)
    assert not acc.any() and not bias.any()
    assert rms_ratio(sums["acc"].sum(0), expected) < 1e-5
    assert rms_ratio(sums["bias"].sum(0), line) < 1e-5


def test_partials_that_stay_are_bounded(monkeypatch) -> None:
    weights = [torch.zeros(24, 40, device=DEVICE) for _ in range(3)]
    pairs = operands((300, 350), 24, 40, torch.float16)
    kept: list[bool] = []

    def watched(acc, dy, x, *, sums=None, **options):
        kept.append(sums is not None)
        weight_grad(acc, dy, x, sums=sums, **options)

    monkeypatch.setattr(gradients, "SUMS_BYTES", 1)  # room for one weight's
    grads = GradientBuffers(weights, [True] * 3, watched, 0, group_rows=60)
    for dy, x, _ in pairs:
        grads.make_room(60)
        for index in range(3):
            grads.weight(index, dy, x)
    expected, _ = truth(pairs, torch.zeros_like(weights[0]))
    for value in grads.results():
        assert rms_ratio(value, expected) < 1e-5
    assert kept == [True, False, False] * 2


def test_iterations_are_grouped_by_their_rows() -> None:
    weight, bias = torch.zeros(3, 2), torch.zeros(3)
    calls: list[list[int]] = []

    def watched(acc, dy, x, *, fresh=False, bias=None, more=(), sums=None):
        calls.append([len(x), *(len(pair[1]) for pair in more)])
        weight_grad_ref(acc, dy, x, fresh=fresh, bias=bias, more=more)

    rows = [10, 20, 30, 40, 50, 95, 4, *(1 for _ in range(9))]
    pairs = [(torch.randn(n, 3), torch.randn(n, 2)) for n in rows]
    grouped = GradientBuffers([weight, bias], [True, True], watched, 0, group_rows=100)
    for pair in pairs:
        grouped.make_room(len(pair[0]))
        grouped.weight(0, *pair, bias=1)
    values = grouped.results()
    # No more than 100 rows, no more than eight iterations.
    assert calls == [[10, 20, 30, 40], [50], [95, 4, 1], [1] * 8] and gradients.GROUP == 8
    alone = GradientBuffers([weight, bias], [True, True], weight_grad_ref, 0)
    for pair in pairs:
        alone.weight(0, *pair, bias=1)
    for value, expected in zip(values, alone.results(), strict=True):
        assert torch.allclose(value, expected, atol=1e-5)
    assert torch.allclose(values[1], torch.cat([dy for dy, _ in pairs]).sum(0), atol=1e-5)


def test_a_bias_learns_beside_a_frozen_weight() -> None:
    dy, x = torch.randn(300, 3), torch.randn(300, 2)
    for group_rows in (0, 400):
        grads = GradientBuffers(
            [torch.zeros(3, 2), torch.zeros(3)], [False, True], weight_grad_ref, 0, group_rows
        )
        grads.make_room(300)
        grads.weight(0, dy, x, bias=1)
        weight, bias = grads.results()
        assert weight is None and torch.allclose(bias, dy.sum(0), atol=1e-5)
