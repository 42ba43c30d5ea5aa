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


@pytest.mark.parametrize("case", [norm, norm_linear])
@WIDTHS
def test_the_gradient_is_written_over_one_that_was_read(case: Case, d: int) -> None:
    """Into the residual's buffer, as into that of the gradient of the state; rows beyond the count
    keep what they have."""
    ops, residual = select("triton", DEVICE), drawing(5)(67, d)
    count = torch.tensor([9], dtype=torch.int32, device=DEVICE)
    given = None if case is norm else residual
    for implementation, options, live in ((ops, {}, 67), (ops, {"row_count": count}, 9),
                                          (REFERENCE, {}, 67)):  # fmt: skip
        truth = case(implementation, 1, given, options, d)[0]
        out = residual.clone()
        written = out if case is not norm else None
        dx = case(implementation, 1, written, {**options, "out": out}, d)[0]
        assert dx is out and torch.equal(out[:live], truth[:live])
        assert torch.equal(out[live:], residual[live:])


def test_a_norm_adds_another_gradient() -> None:
    """Behind the GEMMs of widths that are not fused."""
    draw = drawing(3)
    dy, x, weight, residual = draw(67, 20), draw(67, 20), draw(20), draw(67, 33)[:, :20]
    for ops in (select("triton", DEVICE), REFERENCE):
        plain, *_ = ops.norm_bwd(dy, x, weight, 1e-5, "layer", False)
        dx, *_ = ops.norm_bwd(dy, x, weight, 1e-5, "layer", False, residual=residual)
        assert rms_ratio(dx, plain + residual) < 1e-6


def test_buffers_that_cannot_be_written_are_refused() -> None:
    draw, ops = drawing(3), select("triton", DEVICE)
    dy, x, weight = draw(4, 20), draw(4, 20), draw(20)
    for out, reason in (
        (draw(3, 20), r"out is \(3, 20\) instead of \(4, 20\)"),
        (draw(4, 24)[:, :20], "out must be fp32 and contiguous"),
        (draw(4, 20).half(), "out must be fp32 and contiguous"),
    ):
        with pytest.raises(Unsupported, match=reason):
            ops.norm_bwd(dy, x, weight, 1e-5, "layer", False, out=out)


@pytest.mark.parametrize("bias", [True, False])
def test_a_readout_adds_up_over_launches(bias: bool) -> None:
    """The final norm's gradients in partial sums, the operands of the head's handed out."""
    ops, sums = select("triton", DEVICE), [torch.zeros(5, 20, device=DEVICE) for _ in "wb"]
    partials, total = (sums[0], sums[1] if bias else None), None
    norm_weight, norm_bias, head = (
        drawing(9)(20),
        drawing(8)(20) if bias else None,
        drawing(7)(30, 20),
    )
    for seed in (1, 2):
        h = drawing(seed)(33, 20)
        targets = torch.arange(33, device=DEVICE) % 31 - 1
        _, lse, _ = REFERENCE.cross_entropy_fwd(h, targets, norm_weight, norm_bias, head)
        args = (drawing(4)(33), h, targets, lse, norm_weight, norm_bias, head)
        truth = [torch.zeros_like(t) for t in (head, norm_weight, norm_weight)]
        into = (*truth[:2], truth[2] if bias else None)
        expected = REFERENCE.cross_entropy_bwd(*args, *into)
        untouched, operands = [torch.zeros_like(t) for t in truth], []
        with guarded_outputs():
            dh = ops.cross_entropy_bwd(*args, *untouched[:2], untouched[2] if bias else None,
                                       partials=partials, operands=operands)  # fmt: skip
        assert rms_ratio(dh, expected) < 1e-5 and not any(t.any() for t in untouched)
        ((dlogits, y),) = operands
        assert rms_ratio(dlogits.T @ y, truth[0]) < 1e-5
        total = truth if total is None else [a + b for a, b in zip(total, truth, strict=True)]
    assert rms_ratio(sums[0].sum(0), total[1]) < 1e-5
    assert rms_ratio(sums[1].sum(0), total[2]) < 1e-5 if bias else not sums[1].any()
