"""The backward kernels of norms add another gradient to dx, and their own to earlier launches'."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import interpreter
from benchmarks.numerics import assert_close, describe, rms_ratio
from relay_fast.kernels.supports import Unsupported
from relay_fast.ops.dispatch import REFERENCE, Ops, _auto_ops, select
from tests.support.kernel_checks import DEVICE, guarded_outputs

interpreter.mend()
Case = Callable[[Ops, int, Tensor | None, dict], tuple]


def norm(ops: Ops, seed: int, residual: Tensor | None, options: dict, d: int = 20, rows: int = 67):
    del residual
    draw = drawing(seed)
    x, dy = draw(rows, d), draw(rows, d)
    return ops.norm_bwd(dy, x, drawing(9)(d), 1e-5, "layer", True, **options)


def norm_linear(
    ops: Ops, seed: int, residual: Tensor | None, options: dict, d: int = 20, rows: int = 67
):
    draw, fixed = drawing(seed), drawing(9)
    x, dout = draw(rows, d), draw(rows, 24)
    weights = fixed(d), fixed(d), fixed(24, d)
    return ops.norm_linear_bwd(
        dout, x, *weights, None, None, 0, 1e-5, "layer", residual, **options
    )[:3]


def mlp(ops: Ops, seed: int, residual: Tensor | None, options: dict, d: int = 20, rows: int = 67):
    draw, fixed = drawing(seed), drawing(9)
    x, dout, up = draw(rows, d), draw(rows, d), draw(rows, 40)
    weights = fixed(d), fixed(d), fixed(40, d), None, fixed(d, 40)
    return ops.mlp_bwd(
        dout, x, up, None, *weights, "gelu_tanh", 1e-5, "layer", None, residual, **options
    )[:3]


def drawing(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator).to(DEVICE)


CASES = pytest.mark.parametrize("case", [norm, norm_linear, mlp])
# 67 rows: a block of 64 and three; 530: over the widths that are fused in fp32.
WIDTHS = pytest.mark.parametrize("d", [20, 530])


@CASES
@WIDTHS
def test_gradients_add_up_over_launches(case: Case, d: int) -> None:
    ops = select("triton", DEVICE)
    sums = torch.zeros(40, d, device=DEVICE), torch.zeros(40, d, device=DEVICE)
    truth = [torch.zeros(d, device=DEVICE) for _ in range(2)]
    for seed, rows in enumerate((3, 67, 66)):
        with guarded_outputs():
            dx, *none = case(ops, seed, None, {"partials": sums}, d, rows)
        assert none == [None, None]
        expected, *grads = case(REFERENCE, seed, None, {}, d, rows)
        assert rms_ratio(dx, expected) < 1e-5, describe("dx", dx, expected)
        for total, grad in zip(truth, grads, strict=True):
            total += grad
    for value, total in zip(sums, truth, strict=True):
        assert rms_ratio(value.sum(0), total) < 1e-5, describe("sum", value.sum(0), total)


@pytest.mark.parametrize("case", [norm_linear, mlp])
@WIDTHS
def test_another_gradient_is_added(case: Case, d: int) -> None:
    # Rows of a wider buffer: its stride is not d.
    residual = drawing(5)(67, d + 3)[:, :d]
    with guarded_outputs():
        value = case(select("triton", DEVICE), 1, residual, {}, d)
    for v, t in zip(value, case(REFERENCE, 1, residual, {}, d), strict=True):
        assert rms_ratio(v, t) < 1e-5, describe("value", v, t)
    without = case(REFERENCE, 1, None, {}, d)[0]
    assert_close("dx", case(REFERENCE, 1, residual, {}, d)[0], without + residual, 1e-6)


@CASES
def test_rows_beyond_the_count_add_nothing(case: Case) -> None:
    ops, d = select("triton", DEVICE), 20
    count = torch.tensor([9], dtype=torch.int32, device=DEVICE)
    sums = torch.full((40, d), 2.0, device=DEVICE), torch.full((40, d), 3.0, device=DEVICE)
    case(ops, 1, None, {"partials": sums, "row_count": count}, d)
    _, *alone = case(ops, 1, None, {"row_count": count}, d)
    for value, start, grad in zip(sums, (2.0, 3.0), alone, strict=True):
        assert rms_ratio(value.sum(0) - 40 * start, grad) < 1e-5
        assert (value[1:] == start).all()  # one program has rows


@CASES
def test_sums_that_are_too_small_are_refused(case: Case) -> None:
    sums = torch.zeros(1, 20, device=DEVICE), None
    with pytest.raises(Unsupported, match=r"partial sums of shape \(1, 20\) do not hold \d+ × 20"):
        case(select("triton", DEVICE), 1, None, {"partials": sums}, 20, 300)


def test_a_norm_into_a_buffer() -> None:
    draw = drawing(3)
    x, weight, bias, buffer = draw(67, 20), draw(20), draw(20), draw(67, 31)
    for ops in (select("triton", DEVICE), REFERENCE):
        out = buffer[:, 5:25]
        made = ops.norm_fwd(x, weight, bias, 1e-5, "layer", out=out)
        assert made.data_ptr() == out.data_ptr()
        truth = torch.nn.functional.layer_norm(x, (20,), weight, bias, 1e-5)
        assert rms_ratio(out, truth) < 1e-6


@CASES
def test_auto_returns_what_it_cannot_add_up(case: Case) -> None:
    """Partial sums that are too small stand for any reason to fall back to plain torch."""
    sums = torch.zeros(1, 20, device=DEVICE), torch.zeros(1, 20, device=DEVICE)
    value = case(_auto_ops(), 1, None, {"partials": sums}, 20, 300)
    for v, t in zip(value, case(REFERENCE, 1, None, {}, 20, 300), strict=True):
        assert torch.equal(v, t)
    assert not any(part.any() for part in sums)
