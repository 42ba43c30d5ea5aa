"""The rules of numerics in one place: when a tensor counts as equal to the truth."""

from __future__ import annotations

import torch
from torch import Tensor

RMS_RATIO = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}


def describe(name: str, value: Tensor, truth: Tensor) -> str:
    """Name, shape, RMS ratio, largest error and where it is."""
    value, truth = value.detach(), truth.detach()
    error = (value.double() - truth.double()).abs()
    if not error.numel():
        return f"{name} {tuple(value.shape)}: empty"
    worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    return (
        f"{name} {tuple(value.shape)}: RMS ratio {rms_ratio(value, truth):.3g}, largest error "
        f"{error.max():.3g} at {worst} ({value[worst]:.6g}, should be {truth[worst]:.6g}), "
        f"largest element {truth.double().abs().max():.3g}"
    )


def rms_ratio(value: Tensor, truth: Tensor) -> float:
    """RMS of the error over the RMS of the truth."""
    truth = truth.detach().double()
    size = float(truth.square().sum().sqrt())
    return float((value.detach().double() - truth).square().sum().sqrt()) / max(size, 1e-300)


def assert_close(name: str, value: Tensor, truth: Tensor, of_largest: float = 1e-10) -> None:
    """Shapes agree and no element is off by more than `of_largest` of the truth's largest one."""
    assert value.shape == truth.shape, f"{name}: shape {value.shape}, should be {truth.shape}"
    if not truth.numel():
        return
    value, truth = value.detach(), truth.detach()
    bound = of_largest * max(float(truth.abs().max()), 1e-30)
    error = float((value.double() - truth.double()).abs().max())
    assert error <= bound, describe(name, value, truth)  # false for NaN


def assert_bitwise(name: str, value: Tensor, other: Tensor) -> None:
    """Every bit agrees, NaN never does."""
    assert value.shape == other.shape, f"{name}: shape {value.shape}, should be {other.shape}"
    assert value.dtype == other.dtype, f"{name}: {value.dtype}, should be {other.dtype}"
    assert bool((value == other).all()), describe(name, value, other)


def assert_as_good_as_eager(
    name: str,
    value: Tensor,
    eager: Tensor,
    truth: Tensor,
    dtype: torch.dtype | None = None,
) -> None:
    """The error against the fp64 truth is at most twice eager's in the same dtype (plus
    twice the rounding noise of the truth itself). dtype: what was computed in, if not value's."""
    assert value.shape == truth.shape, f"{name}: shape {value.shape}, should be {truth.shape}"
    if not truth.numel():
        return
    value, eager, truth = value.detach(), eager.detach(), truth.detach()
    noise = float((truth.to(value.dtype).double() - truth.double()).abs().max())
    allowed = 2 * float((eager.double() - truth.double()).abs().max()) + 2 * noise
    error = float((value.double() - truth.double()).abs().max())
    assert error <= allowed, f"{describe(name, value, truth)}; allowed {allowed:.3g}"
    ratio = 2 * rms_ratio(eager, truth) + RMS_RATIO[dtype or value.dtype]
    assert rms_ratio(value, truth) <= ratio, f"{describe(name, value, truth)}; allowed {ratio:.3g}"
