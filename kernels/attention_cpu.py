"""Attention over packed sequences on a CPU: PyTorch's fused kernels, forward and backward.

The scores never lie in memory whole, and what a causal mask hides is not computed. Saved: qkv, o
and lse. Whatever the fused kernels do not take (other devices, shared key/value heads, fp16, an
older torch) goes to the reference (`attention_ref`).
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
    """Whether PyTorch's kernels take the call. Raises ValueError for a layout of another device:
    they would read its masks as if they were in this device's memory."""
    if layout.cu_seqlens.device != qkv.device:
        raise ValueError(
            f"the layout lies on {layout.cu_seqlens.device} and qkv on {qkv.device}: make the "
            "layout on qkv's device"
        )
    there = _FORWARD is not None and _BACKWARD is not None
    return there and qkv.is_cpu and heads == kv_heads and qkv.dtype in _DTYPES


def _by_rows(t: Tensor) -> Tensor:
    """t with contiguous columns. The fused kernels are called past the dispatcher that sees to it:
    they take any stride of rows and heads, but that of a head's columns for 1."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _heads(padded: Tensor, group: Group, heads: int) -> Tensor:
    """A group's slots (slots, heads · width) as (S, heads, L, width), a view."""
    rows = padded[group.first_slot : group.first_slot + group.sequences * group.length]
    return rows.view(group.sequences, group.length, heads, -1).transpose(1, 2)


def _bias(group: Group, dtype: torch.dtype, causal: bool) -> Tensor | None:
    """What is added to the scores, (S, 1, L, L), −∞ where no token is. Behind a causal mask no
    token sees the padding, which lies on the right."""
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
    """o (rows, heads * head_dim) in qkv's dtype and lse (rows, heads), wide; lse is None where the
    reference was taken, whose backward needs none."""
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
    lse: Tensor | None,  # None where the forward took the reference
    layout: PaddedLayout,
    heads: int,
    kv_heads: int,
    causal: bool,
) -> Tensor:
    """dqkv, of qkv's shape and dtype, in one buffer."""
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
