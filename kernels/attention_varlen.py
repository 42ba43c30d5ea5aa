"""Attention over long packed sequences with the kernels of another library: flash-attn where it is
installed, else torch's variable-length attention.

Both are FlashAttention: online softmax, nothing padded, key/value heads shared without copies. They
serve what no single tile holds (`varlen_reason`), in 16 bits.

| saved | recomputed in backward |
|---|---|
| qkv | o and lse: only public functions are called, and these keep both for themselves |

FLOPs: 4 · n² · head_dim per head, backward 14 (10 and the forward), half of it where causal.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from .attention_ref import PaddedLayout
from .supports import HEAD_DIMS, SHORT, heads_divide_reason, layout_reason

DEVICES = ("cuda",)
DTYPES = (torch.bfloat16, torch.float16)
WIDEST_HEAD = 256


class Library(NamedTuple):
    """A library with a function for attention over packed sequences."""

    name: str
    module: str
    function: str
    call: Callable[..., Tensor]  # (function, q, k, v, cu_seqlens, longest, causal) → o


def _call_flash_attn(function, q, k, v, cu_seqlens, longest: int, causal: bool) -> Tensor:
    deterministic = torch.are_deterministic_algorithms_enabled()
    return function(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest,
        causal=causal, deterministic=deterministic,
    )  # fmt: skip


def _call_torch(function, q, k, v, cu_seqlens, longest: int, causal: bool) -> Tensor:
    shared = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    window = (-1, 0) if causal else (-1, -1)
    return function(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=window, **shared)


FLASH_ATTN = Library("flash-attn", "flash_attn", "flash_attn_varlen_func", _call_flash_attn)
TORCH_VARLEN = Library(
    "torch's variable-length attention", "torch.nn.attention.varlen", "varlen_attn", _call_torch
)
LIBRARIES = (FLASH_ATTN, TORCH_VARLEN)


def is_installed(library: Library) -> bool:
    """Returns whether the library is there, usable or not."""
    try:
        return importlib.util.find_spec(library.module) is not None
    except (ImportError, ValueError):
        return False


@cache
def _load(library: Library) -> tuple[Callable | None, str | None]:
    """Returns the library's function, or None and why there is none."""
    if not is_installed(library):
        return None, f"{library.name} is not installed"
    try:
        return getattr(importlib.import_module(library.module), library.function), None
    except Exception as error:  # a wheel built for another torch or CUDA fails in many ways
        return None, f"{library.name} is installed but cannot be imported: {_first_line(error)}"


@cache
def library_reason(library: Library, device: torch.device) -> str | None:
    """Returns why the library cannot be used on a device; tries it once, on 16 rows."""
    function, reason = _load(library)
    if function is None:
        return reason
    try:
        with torch.enable_grad():
            q = torch.zeros(16, 1, 64, dtype=torch.float16, device=device, requires_grad=True)
            offsets = torch.tensor([0, 16], dtype=torch.int32, device=device)
            library.call(function, q, q, q, offsets, 16, True).sum().backward()
            q.grad.sum().item()  # what goes wrong on the device comes up here
    except Exception as error:  # no code for this card, another version's arguments
        return f"{library.name} is installed but does not run on {device}: {_first_line(error)}"
    return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


def varlen_reason(
    library: Library,
    qkv: Tensor,
    layout: PaddedLayout,
    heads: int,
    kv_heads: int,
    row_count: Tensor | None = None,
) -> str | None:
    """Returns why a library does not serve this call, forward and backward alike, or None.

    Args:
        library: The library.
        qkv: (rows, columns).
        layout: The sequences.
        heads: Query heads.
        kv_heads: Key and value heads.
        row_count: Number of live rows on the device, or None.
    """
    divided = heads_divide_reason(qkv.shape[1], heads, kv_heads)
    if divided:
        return divided
    head_dim = qkv.shape[1] // (heads + 2 * kv_heads)
    if layout.max_length <= SHORT and head_dim <= HEAD_DIMS[1]:
        return f"sequences of at most {SHORT} rows fit one tile"
    if qkv.device.type not in DEVICES:
        return f"{library.name} runs on CUDA devices, not on {qkv.device.type!r}"
    if qkv.dtype not in DTYPES:
        return f"{library.name} computes in bfloat16 and float16, not in {_name(qkv.dtype)}"
    if head_dim > WIDEST_HEAD or head_dim % 8:
        return f"head_dim {head_dim} is not a multiple of 8 up to {WIDEST_HEAD}"
    if row_count is not None:
        return "only the Triton kernels skip the rows beyond a row count"
    reason = library_reason(library, qkv.device)
    if reason is None and library is TORCH_VARLEN:
        if torch.are_deterministic_algorithms_enabled():
            reason = f"the gradients of {library.name} are not deterministic"
        elif heads != kv_heads and not _shares_heads():
            reason = f"{library.name} of this torch does not share key/value heads"
    return reason or layout_reason(layout, qkv, None)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def _shares_heads() -> bool:
    function, _ = _load(TORCH_VARLEN)
    return function is not None and "enable_gqa" in inspect.signature(function).parameters


def choose_library(
    qkv: Tensor, layout: PaddedLayout, heads: int, kv_heads: int, row_count: Tensor | None = None
) -> Library | None:
    """Returns the first library that serves this call, or None.

    Args:
        qkv: (rows, columns).
        layout: The sequences.
        heads: Query heads.
        kv_heads: Key and value heads.
        row_count: Number of live rows on the device, or None.
    """
    for library in LIBRARIES:
        if varlen_reason(library, qkv, layout, heads, kv_heads, row_count) is None:
            return library
    return None


def _attend(library: Library, parts: tuple[Tensor, ...], layout: PaddedLayout, causal: bool):
    function, _ = _load(library)
    return library.call(function, *parts, layout.cu_seqlens, layout.max_length, causal)


def _split(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    """Returns q, k, v (rows, heads, head_dim), views."""
    by_head = rearrange(qkv, "rows (head c) -> rows head c", head=heads + 2 * kv_heads)
    return by_head.split((heads, kv_heads, kv_heads), dim=1)


def attention_fwd_varlen(
    library: Library, qkv: Tensor, layout: PaddedLayout, heads: int, kv_heads: int, causal: bool
) -> tuple[Tensor, None]:
    """Returns o (rows, heads · head_dim) in qkv's dtype, and None for lse.

    Args: as `attention_fwd_ref`; library: as chosen by `choose_library`.
    """
    with torch.no_grad():
        o = _attend(library, _split(qkv, heads, kv_heads), layout, causal)
        return rearrange(o, "rows head c -> rows (head c)"), None


def attention_bwd_varlen(
    library: Library,
    do: Tensor,  # (rows, heads * head_dim)
    qkv: Tensor,
    layout: PaddedLayout,
    heads: int,
    kv_heads: int,
    causal: bool,
) -> Tensor:
    """Returns dqkv, of qkv's shape and dtype.

    Args: as `attention_bwd_ref`; library: as chosen by `choose_library`.
    """
    with torch.enable_grad():
        parts = [t.detach().requires_grad_() for t in _split(qkv, heads, kv_heads)]
        o = _attend(library, tuple(parts), layout, causal)
    grads = torch.autograd.grad(o, parts, do.to(o.dtype).view(o.shape))
    return rearrange(torch.cat(grads, dim=1), "rows head c -> rows (head c)")
