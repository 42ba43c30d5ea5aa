"""Activations of the MLP's hidden layer, inside other kernels and as elementwise kernels.

    gelu_tanh(u) = u · σ(2z), z = √(2/π) · (u + 0.044715 u³);  gelu(u) = u · Φ(u)
    relu2(u) = max(u, 0)²;  swiglu(u, g) = g · σ(g) · u

All in fp32. The elementwise kernels are used for d > 256, where the hidden layer is in memory; they
are memory bound.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._runtime import cdiv, jit_kernel

_GELU_C = tl.constexpr(0.7978845608028654)
_GELU_K = tl.constexpr(0.044715)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_DENSITY = tl.constexpr(0.3989422804014327)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(up, gate, ACTIVATION: tl.constexpr):
    """Returns the hidden layer in fp32; only swiglu reads the gate."""
    if ACTIVATION == "gelu_tanh":
        return up * _sigmoid((up + up * up * up * _GELU_K) * (2.0 * _GELU_C))
    elif ACTIVATION == "gelu":
        return up * 0.5 * (1.0 + tl.erf(up * _SQRT_HALF))
    elif ACTIVATION == "relu2":
        positive = tl.maximum(up, 0.0)
        return positive * positive
    else:
        return gate * _sigmoid(gate) * up


@triton.jit
def activate_grad(dhidden, up, gate, ACTIVATION: tl.constexpr):
    """Returns dup and dgate in fp32; dgate is meaningful for swiglu only."""
    if ACTIVATION == "gelu_tanh":
        s = _sigmoid((up + up * up * up * _GELU_K) * (2.0 * _GELU_C))
        slope = (1.0 + up * up * (3.0 * _GELU_K)) * (2.0 * _GELU_C)
        return dhidden * (s + up * s * (1.0 - s) * slope), dhidden
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(up * _SQRT_HALF))
        return dhidden * (cdf + up * _DENSITY * tl.exp(-0.5 * up * up)), dhidden
    elif ACTIVATION == "relu2":
        return dhidden * 2.0 * tl.maximum(up, 0.0), dhidden
    else:
        s = _sigmoid(gate)
        return dhidden * gate * s, dhidden * up * s * (1.0 + gate * (1.0 - s))


@jit_kernel
def _activation_fwd_kernel(
    up_ptr, gate_ptr, hidden_ptr, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    up = tl.load(up_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    gate = up
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    hidden = activate(up, gate, ACTIVATION)
    tl.store(hidden_ptr + at, hidden.to(hidden_ptr.dtype.element_ty), mask=at < count)


@jit_kernel
def _activation_bwd_kernel(
    dhidden_ptr, up_ptr, gate_ptr, dup_ptr, dgate_ptr, count,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    dhidden = tl.load(dhidden_ptr + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
    gate = up
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
    dup, dgate = activate_grad(dhidden, up, gate, ACTIVATION)
    tl.store(dup_ptr + at, dup.to(dup_ptr.dtype.element_ty), mask=mask)
    if dgate_ptr is not None:
        tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)


def activation_fwd(activation: str, up: Tensor, gate: Tensor | None) -> Tensor:
    """Computes the hidden layer.

    Args:
        activation: Its name.
        up: Contiguous pre-activations (rows, hidden).
        gate: Those of the gate, or None.

    Returns:
        (rows, hidden).
    """
    hidden = torch.empty_like(up)
    if up.numel():
        _activation_fwd_kernel[(cdiv(up.numel(), 2048),)](
            up, gate, hidden, count=up.numel(), ACTIVATION=activation, BLOCK=2048, num_warps=4
        )
    return hidden


def activation_bwd(
    activation: str, dhidden: Tensor, up: Tensor, gate: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Computes the gradients of the pre-activations.

    Args:
        activation: Its name.
        dhidden: Gradient of the hidden layer, (rows, hidden).
        up: Contiguous pre-activations (rows, hidden).
        gate: Those of the gate, or None.

    Returns:
        dup and dgate (None without a gate), each (rows, hidden).
    """
    dup = torch.empty_like(up)
    dgate = None if gate is None else torch.empty_like(gate)
    if up.numel():
        _activation_bwd_kernel[(cdiv(up.numel(), 2048),)](
            dhidden, up, gate, dup, dgate, count=up.numel(), ACTIVATION=activation, BLOCK=2048,
            num_warps=4,
        )  # fmt: skip
    return dup, dgate
