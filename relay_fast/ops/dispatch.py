"""Selects the implementation of the ops.

`impl = "auto" | "triton" | "torch"`: "auto" uses the Triton kernels for the calls that they support
and plain torch otherwise; "triton" raises an error with the reason if they do not support a call;
"torch" is the plain PyTorch reference (`REFERENCE`), except that attention on a CPU uses PyTorch's
fused kernels.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from functools import cache, wraps
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from relay_fast.kernels.attention_cpu import attention_bwd_cpu, attention_fwd_cpu
from relay_fast.kernels.attention_ref import attention_bwd_ref, attention_fwd_ref
from relay_fast.kernels.attention_varlen import (
    FLASH_ATTN,
    LIBRARIES,
    attention_bwd_varlen,
    attention_fwd_varlen,
    choose_library,
    is_installed,
    library_reason,
)
from relay_fast.kernels.cross_entropy_ref import (
    argmax_ref,
    cross_entropy_bwd_ref,
    cross_entropy_fwd_ref,
    cross_entropy_grad_ref,
)
from relay_fast.kernels.linear_residual_ref import linear_residual_bwd_ref, linear_residual_fwd_ref
from relay_fast.kernels.mlp_ref import mlp_bwd_ref, mlp_fwd_ref
from relay_fast.kernels.norm_linear_ref import norm_linear_bwd_ref, norm_linear_fwd_ref
from relay_fast.kernels.norm_ref import norm_fwd_ref, norm_grads_ref
from relay_fast.kernels.norm_residual_ref import norm_residual_bwd_ref, norm_residual_fwd_ref
from relay_fast.kernels.qk_norm_ref import qk_norm_bwd_ref, qk_norm_fwd_ref
from relay_fast.kernels.state_input_ref import state_input_bwd_ref, state_input_fwd_ref
from relay_fast.kernels.supports import (
    SHORT,
    Unsupported,
    activation_reason,
    device_reason,
    dtype_reason,
    heads_reason,
    loop_feedback_reason,
    require,
    vocabulary_reason,
    width_reason,
)
from relay_fast.kernels.weight_grad_ref import weight_grad_ref
from relay_fast.utils.arguments import as_device, kind_of

IMPLS = ("auto", "triton", "torch")
# Kinds of device with autocast, so not meta. Asked once: torch 2.11 cannot trace the question.
AUTOCAST = frozenset(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "mps", "xpu", "hpu")))


class Ops(NamedTuple):
    """One implementation of all ops of the block, forward and backward.

    loop_fwd runs the whole loop in one launch, for inference; None if the implementation has no
    such kernel.
    """

    state_input_fwd: Callable
    state_input_bwd: Callable
    norm_fwd: Callable
    norm_bwd: Callable
    norm_linear_fwd: Callable
    norm_linear_bwd: Callable
    qk_norm_fwd: Callable
    qk_norm_bwd: Callable
    attention_fwd: Callable
    attention_bwd: Callable
    linear_residual_fwd: Callable
    linear_residual_bwd: Callable
    norm_residual_fwd: Callable
    norm_residual_bwd: Callable
    mlp_fwd: Callable
    mlp_bwd: Callable
    cross_entropy_fwd: Callable
    cross_entropy_bwd: Callable
    cross_entropy_grad: Callable
    argmax: Callable
    weight_grad: Callable
    loop_fwd: Callable | None


REFERENCE = Ops(
    state_input_fwd_ref,
    state_input_bwd_ref,
    norm_fwd_ref,
    norm_grads_ref,
    norm_linear_fwd_ref,
    norm_linear_bwd_ref,
    qk_norm_fwd_ref,
    qk_norm_bwd_ref,
    attention_fwd_ref,
    attention_bwd_ref,
    linear_residual_fwd_ref,
    linear_residual_bwd_ref,
    norm_residual_fwd_ref,
    norm_residual_bwd_ref,
    mlp_fwd_ref,
    mlp_bwd_ref,
    cross_entropy_fwd_ref,
    cross_entropy_bwd_ref,
    cross_entropy_grad_ref,
    argmax_ref,
    weight_grad_ref,
    None,
)
TORCH = REFERENCE._replace(attention_fwd=attention_fwd_cpu, attention_bwd=attention_bwd_cpu)


def supports(
    device: torch.device | str = "cuda",
    *,
    dtype: torch.dtype = torch.bfloat16,
    d_model: int | None = None,
    head_dim: int | None = None,
    vocabulary: int | None = None,
    activation: str | None = None,
    norm: str = "rms",
) -> str | None:
    """Returns why the Triton kernels cannot be used on `device` for these sizes, or None if they
    can.

    Args:
        device: where the tensors are.
        dtype: dtype of the GEMMs.
        d_model: width of the model; this and the next three are not checked if None.
        head_dim: columns of an attention head.
        vocabulary: number of tokens.
        activation: activation of the MLP.
        norm: "rms" or "layer".
    """
    device = as_device(device)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype is {kind_of(dtype)}: give a torch.dtype")
    reason = device_reason(device) or dtype_reason(dtype)
    if reason is None and d_model is not None:
        reason = width_reason(d_model, norm)
    if reason is None and head_dim is not None:
        reason = heads_reason(3 * head_dim, 1, 1)
    if reason is None and vocabulary is not None:
        reason = vocabulary_reason(vocabulary)
    if reason is None and activation is not None:
        reason = activation_reason(activation, activation == "swiglu")
    return reason


def explain(device: torch.device | str = "cuda", *, feedback: str = "none", **sizes) -> str:
    """Returns one sentence that says which implementation `impl="auto"` uses on `device`, and why.
    feedback: the model's, `ModelConfig.feedback`; sizes: as in `supports`."""
    unfit = loop_feedback_reason(feedback)
    also = f"; {unfit}" if unfit else ""
    forced = os.environ.get("RELAY_FAST_IMPL", "auto")
    if forced != "auto":
        return f"{forced}: RELAY_FAST_IMPL={forced} is set in the environment{also}"
    reason = supports(device, **sizes)
    if reason is None and torch.device(device).type != "cuda":
        reason = 'Triton\'s interpreter is for tests, and needs impl="triton"'
    return (
        f"torch: {reason}" if reason else "triton" + _explain_attention(as_device(device))
    ) + also


def _explain_attention(device: torch.device) -> str:
    """Returns which library takes the attention over long sequences, and why flash-attn does not
    if it is there."""
    reasons = {library: library_reason(library, device) for library in LIBRARIES}
    taken = next((library for library, reason in reasons.items() if reason is None), None)
    said = f", and {taken.name} for sequences of over {SHORT} tokens" if taken else ""
    if reasons[FLASH_ATTN] is not None and is_installed(FLASH_ATTN):
        said += f" ({reasons[FLASH_ATTN]})"
    return said


@cache
def _triton_ops() -> Ops:
    """Returns the Triton launchers, which raise `Unsupported` before any launch. With
    RELAY_FAST_AUTOTUNE=1 they search for launch configurations on a GPU."""
    from relay_fast.kernels.attention import attention_fwd
    from relay_fast.kernels.attention_bwd import attention_bwd
    from relay_fast.kernels.cross_entropy import argmax, cross_entropy_fwd
    from relay_fast.kernels.cross_entropy_bwd import cross_entropy_bwd
    from relay_fast.kernels.cross_entropy_grad import cross_entropy_grad
    from relay_fast.kernels.linear_residual import linear_residual_bwd, linear_residual_fwd
    from relay_fast.kernels.loop import loop_fwd
    from relay_fast.kernels.mlp import mlp_fwd
    from relay_fast.kernels.mlp_bwd import mlp_bwd
    from relay_fast.kernels.norm import norm_bwd, norm_fwd
    from relay_fast.kernels.norm_linear import norm_linear_bwd, norm_linear_fwd
    from relay_fast.kernels.norm_residual import norm_residual_bwd, norm_residual_fwd
    from relay_fast.kernels.qk_norm import qk_norm_bwd, qk_norm_fwd
    from relay_fast.kernels.state_input import state_input_bwd, state_input_fwd
    from relay_fast.kernels.weight_grad import weight_grad

    ops = Ops(
        state_input_fwd,
        state_input_bwd,
        norm_fwd,
        norm_bwd,
        norm_linear_fwd,
        norm_linear_bwd,
        qk_norm_fwd,
        qk_norm_bwd,
        attention_fwd,
        attention_bwd,
        linear_residual_fwd,
        linear_residual_bwd,
        norm_residual_fwd,
        norm_residual_bwd,
        mlp_fwd,
        mlp_bwd,
        cross_entropy_fwd,
        cross_entropy_bwd,
        cross_entropy_grad,
        argmax,
        weight_grad,
        loop_fwd,
    )
    if os.environ.get("RELAY_FAST_AUTOTUNE") == "1":
        from relay_fast.kernels.autotune import autotuned

        ops = Ops(*map(autotuned, ops))
    return Ops(*map(_with_device_guard, ops))


def _with_device_guard(launcher: Callable) -> Callable:
    """Wraps a launcher to make its first tensor's device the current one, where Triton launches,
    and to name what a launch lacks. That is no Unsupported: an op that has begun does not go on in
    torch, so that a pass keeps to one implementation."""
    from triton.runtime.errors import OutOfResources

    @wraps(launcher)
    def op(*args, **kwargs):
        try:
            if _is_current(args[0].device):
                return launcher(*args, **kwargs)
            with torch.cuda.device(args[0].device):
                return launcher(*args, **kwargs)
        except OutOfResources as error:
            raise RuntimeError(
                f"the kernel {launcher.__name__} needs {error.required} of {error.name}, and "
                f'{_card_name(args[0].device)} has {error.limit}: use impl="torch", or set '
                "RELAY_FAST_IMPL=torch in the environment"
            ) from error

    return op


def _card_name(device: torch.device) -> str:
    if device.type != "cuda":
        return f"the device {device}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"


def _is_current(device: torch.device) -> bool:
    """Returns whether `device` is the current CUDA device, or no CUDA device."""
    return device.type != "cuda" or device.index in (None, torch.cuda.current_device())


def on_device(device: torch.device) -> AbstractContextManager:
    """Returns a context in which a CUDA device is the current one."""
    return nullcontext() if _is_current(device) else torch.cuda.device(device)


@cache
def _auto_ops() -> Ops:
    """Returns the Triton ops, which fall back to plain torch for calls that they do not support.

    Where only strides are in the way, the kernel gets copies: a backward knows of its forward's
    sizes and dtypes, so that it decides alike, but not of all its tensors.
    """

    def with_fallback(name: str, kernel: Callable, reference: Callable | None) -> Callable:
        if reference is None:
            return kernel

        @wraps(kernel)
        def op(*args, **kwargs):
            try:
                return kernel(*args, **kwargs)
            except Unsupported:
                dense = _dense(name, args)
                if dense is not None:
                    with suppress(Unsupported):
                        return kernel(*dense, **kwargs)
                if kwargs.get("row_count") is not None:  # the reference cannot read it
                    raise
                for option in ("row_count", "partials", "operands"):  # added up at once instead
                    kwargs.pop(option, None)
                return reference(*args, **kwargs)

        return op

    pairs = zip(Ops._fields, _triton_ops(), TORCH, strict=True)
    ops = Ops(*(with_fallback(*pair) for pair in pairs))
    return ops._replace(
        attention_fwd=_long_attention_fwd(ops.attention_fwd),
        attention_bwd=_long_attention_bwd(ops.attention_bwd),
    )


def _dense(name: str, args: tuple) -> list | None:
    """Returns the arguments of an op with contiguous tensors, or None if they are. Only tensors
    that the op reads are copied: all of a forward, and the gradient, a backward's first."""
    read = {"fwd": len(args), "bwd": 1}.get(name.rpartition("_")[2], 0)
    dense = [a.contiguous() if isinstance(a, Tensor) else a for a in args[:read]]
    copied = any(a is not b for a, b in zip(dense, args, strict=False))
    return [*dense, *args[read:]] if copied else None


def _long_attention_fwd(otherwise: Callable) -> Callable:
    """Wraps attention to leave long sequences to a library that serves them. The backward asks
    about the same qkv and layout, so it decides alike."""

    @wraps(otherwise)
    def attention_fwd(qkv, layout, heads, kv_heads, causal, *, row_count=None):
        library = choose_library(qkv, layout, heads, kv_heads, row_count)
        if library is None:
            return otherwise(qkv, layout, heads, kv_heads, causal, row_count=row_count)
        with on_device(qkv.device):
            return attention_fwd_varlen(library, qkv, layout, heads, kv_heads, causal)

    return attention_fwd


def _long_attention_bwd(otherwise: Callable) -> Callable:
    """The backward of `_long_attention_fwd`."""

    @wraps(otherwise)
    def attention_bwd(do, qkv, o, lse, layout, heads, kv_heads, causal, *, row_count=None):
        library = choose_library(qkv, layout, heads, kv_heads, row_count)
        if library is None:
            return otherwise(do, qkv, o, lse, layout, heads, kv_heads, causal, row_count=row_count)
        with on_device(qkv.device):
            return attention_bwd_varlen(library, do, qkv, layout, heads, kv_heads, causal)

    return attention_bwd


def check_impl(impl: str) -> None:
    """Raises ValueError for an unknown implementation."""
    if not isinstance(impl, str) or impl not in IMPLS:
        raise ValueError(f"impl = {impl!r} is unknown: use one of {IMPLS}")


def select(impl: str = "auto", device: torch.device | str = "cpu") -> Ops:
    """Returns the ops of an implementation; RELAY_FAST_IMPL in the environment overrides "auto".

    "auto" means plain torch on a CPU. The ops of "triton" raise RuntimeError, before any launch,
    for calls that they do not support.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: if "triton" cannot be used on `device`.
    """
    return chosen_ops(requested_impl(impl), device)


def requested_impl(impl: str) -> str:
    """Returns `impl`, or in place of "auto" what RELAY_FAST_IMPL in the environment says.

    An op whose backward is called later asks in its forward alone, so that both use the same
    implementation; under torch.compile that is when the forward is traced.

    Raises ValueError for an unknown name.
    """
    if isinstance(impl, str) and impl == "auto":
        impl = os.environ.get("RELAY_FAST_IMPL", "auto")
    check_impl(impl)
    return impl


def chosen_ops(impl: str, device: torch.device | str) -> Ops:
    """Does what `select` does, for the result of `requested_impl`."""
    if impl == "torch" or (impl == "auto" and as_device(device).type != "cuda"):
        return TORCH
    reason = device_reason(device)
    if impl == "auto":
        return TORCH if reason else _auto_ops()
    require(reason)
    return _triton_ops()


def launch_context(x: Tensor) -> AbstractContextManager:
    """Returns the context of all hand-written passes over x: x's device is the current one, and
    autocast is off, since a pass chooses the dtype of each product itself."""
    kind = x.device.type
    if kind not in AUTOCAST or not torch.is_autocast_enabled(kind):
        return on_device(x.device)
    stack = ExitStack()
    stack.enter_context(on_device(x.device))
    stack.enter_context(torch.autocast(kind, enabled=False))
    return stack


def differentiable_once(backward: Callable) -> Callable:
    """Wraps the hand-written backward of an autograd.Function: runs it in `launch_context`, and
    raises RuntimeError for create_graph=True instead of returning gradients that look constant."""

    @wraps(backward)
    def checked(ctx, *grads):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "relay_fast's hand-written gradients cannot be differentiated again: call backward "
                "without create_graph=True"
            )
        given = next((g for g in grads if g is not None), None)
        with nullcontext() if given is None else launch_context(given):
            return backward(ctx, *grads)

    return checked


def refuse_transforms(*tensors: Tensor | None, module: nn.Module | None = None) -> None:
    """Raises RuntimeError if these tensors, or the module's parameters, carry a forward-mode
    tangent or are inside a torch.func transform, which would be lost."""
    forward = forward_ad._current_level >= 0
    if not (forward or torch._C._are_functorch_transforms_active()):
        return
    for t in (*tensors, *(() if module is None else module.parameters())):
        if t is None:
            continue
        dual = forward and forward_ad.unpack_dual(t).tangent is not None
        if dual or torch._C._functorch.is_functorch_wrapped_tensor(t):
            raise RuntimeError(
                "relay_fast's hand-written gradients do not support forward-mode AD and the "
                "transforms of torch.func (jvp, grad, vmap, …): use backward() or "
                "torch.autograd.grad"
            )


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """Returns the dtype of GEMMs with a parameter: autocast's if enabled, else the parameter's."""
    kind = parameter.device.type
    if kind in AUTOCAST and parameter.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return parameter.dtype
