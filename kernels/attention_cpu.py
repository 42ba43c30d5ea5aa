"""Attention over packed sequences on a CPU with PyTorch's fused kernels, forward and backward.

The score matrix is never stored as a whole, and masked causal blocks are skipped. Saved: qkv, o and
lse. Calls that the fused kernels do not support (other devices, shared key/value heads, fp16, an
older torch) use the reference (`attention_ref`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention_ref import Group, PaddedLayout, attention_bwd_ref, attention_fwd_ref
from .norm_ref import upcast

_FORWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_BACKWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def _fused(qkv: Tensor, layout: PaddedLayout, heads: int, kv_heads: int) -> bool:
    """Returns whether PyTorch's fused kernels support the call. Raises ValueError for a layout on
    another device, whose masks they would read as host memory."""
    if layout.cu_seqlens.device != qkv.device:
        raise ValueError(
            f"the layout is on {layout.cu_seqlens.device} and qkv on {qkv.device}: build the "
            "layout on qkv's device"
        )
    there = _FORWARD is not None and _BACKWARD is not None
    # On meta tensors a pass is counted instead of run: as it would be on a CPU.
    return there and (qkv.is_cpu or qkv.is_meta) and heads == kv_heads and qkv.dtype in _DTYPES


def _by_rows(t: Tensor) -> Tensor:
    """Returns t with contiguous columns, which the fused kernels assume: they are called below the
    dispatcher that ensures it. Strides of rows and heads are free."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _heads(padded: Tensor, group: Group, heads: int) -> Tensor:
    """(slots, heads · width) → (S, heads, L, width) of a group, a view."""
    rows = padded[group.first_slot : group.first_slot + group.sequences * group.length]
    return rows.view(group.sequences, group.length, heads, -1).transpose(1, 2)


def _bias(group: Group, dtype: torch.dtype, causal: bool) -> Tensor | None:
    """Returns the bias of the scores, (S, 1, L, L), −∞ at padding. A causal mask hides the padding,
    which is on the right."""
    if group.pad_mask is None or causal:
        return None
    none = torch.zeros_like(group.pad_mask, dtype=dtype, memory_format=torch.contiguous_format)
    none.masked_fill_(group.pad_mask, float("-inf"))
    return none.unsqueeze(1).expand(-1, 1, group.length, -1)


def attention_fwd_cpu(
    qkv: Tensor,  # (rows, 3 * heads * head_dim)
    layout: PaddedLayout,
    heads: int,
    kv_heads: int,
    causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """Returns o (rows, heads · head_dim) in qkv's dtype and lse (rows, heads) in fp32 or fp64; lse
    is None if the reference was used, whose backward does not need it.

    Args: as `attention_fwd_ref`; lse is always computed by the fused kernels.
    """
    if not _fused(qkv, layout, heads, kv_heads):
        return attention_fwd_ref(qkv, layout, heads, kv_heads, causal)
    padded = layout.pad(_by_rows(qkv))
    o = qkv.new_empty(layout.slots, qkv.shape[1] // 3)
    lse = upcast(qkv[:0]).new_empty(layout.slots, heads)
    for group in layout.groups:
        q, k, v = _heads(padded, group, 3 * heads).chunk(3, dim=1)
        bias = _bias(group, qkv.dtype, causal)
        out, sums = _FORWARD(q, k, v, 0.0, causal, attn_mask=bias)
        _heads(o, group, heads).copy_(out)
        _heads(lse, group, heads).copy_(sums.unsqueeze(-1))
    return layout.unpad(o), layout.unpad(lse)


def attention_bwd_cpu(
    do: Tensor,  # (rows, heads * head_dim)
    qkv: Tensor,
    o: Tensor,
    lse: Tensor | None,  # None if the forward used the reference
    layout: PaddedLayout,
    heads: int,
    kv_heads: int,
    causal: bool,
) -> Tensor:
    """Returns dqkv, of qkv's shape and dtype.

    Args: as `attention_bwd_ref`; o and lse of the forward are used.
    """
    if lse is None or not _fused(qkv, layout, heads, kv_heads):
        return attention_bwd_ref(do, qkv, o, lse, layout, heads, kv_heads, causal)
    padded, do, o, lse = (layout.pad(_by_rows(part)) for part in (qkv, do, o, lse))
    dqkv = padded.new_empty(padded.shape)
    for group in layout.groups:
        q, k, v = _heads(padded, group, 3 * heads).chunk(3, dim=1)
        do_heads, o_heads, sums = (_heads(part, group, heads) for part in (do, o, lse))
        bias = _bias(group, qkv.dtype, causal)
        parts = _BACKWARD(do_heads, q, k, v, o_heads, sums.squeeze(-1), 0.0, causal, attn_mask=bias)
        for part, new in zip(_heads(dqkv, group, 3 * heads).chunk(3, dim=1), parts, strict=True):
            part.copy_(new)
    return layout.unpad(dqkv)
