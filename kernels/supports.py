"""The limits of the Triton kernels: each check returns a reason why a call is not supported, or
None.

This module does not import triton, so `relay_fast.explain` works everywhere.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from functools import cache

import torch
from torch import Tensor

from .attention_ref import PaddedLayout
from .loop_ref import LoopLayout, LoopWeights
from .mlp_ref import ACTIVATIONS
from .norm_ref import NORMS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (8, 128)
SHORT = 128  # rows of the longest sequence that one tile of attention holds
FUSED_WIDTH = 512  # above, cuBLAS runs the GEMMs
MAX_WIDTH = 8192
MAX_VOCABULARY = 1 << 18
MAX_LENGTH = 65_535 * 16  # the grid's second axis, blocks of at least 16 rows
TILE_ROWS = 128  # of the largest tile
WHOLE_LOOP = "RELAY_FAST_WHOLE_LOOP"  # environment variable: 1 lets the whole-loop kernel on GPUs
_INT32 = 2**31 - 1


class Unsupported(RuntimeError):
    """A call that the Triton kernels do not support; raised before any launch."""


def require(reason: str | None) -> None:
    """Raises Unsupported if there is a reason."""
    if reason is not None:
        raise Unsupported(f'impl="triton" cannot be used: {reason}; use impl="torch" or "auto"')


def norm_is_fused(d: int, dtype: torch.dtype) -> bool:
    """Returns whether a norm of this width is fused with the GEMM after it."""
    return d <= (256 if dtype == torch.float32 else FUSED_WIDTH)


def mlp_is_fused(d: int, dtype: torch.dtype) -> bool:
    """Returns whether the MLP's hidden layer stays on the SM."""
    return d <= (128 if dtype == torch.float32 else 256)


def up_is_fused(d: int, dtype: torch.dtype, gated: bool) -> bool:
    """Returns whether the activation is fused with the projection before it.

    In fp32, where products are multiply-adds, the tiles of two weights at d > 128 would spill
    kilobytes.

    Args:
        d: Width of the model.
        dtype: The dtype of the GEMMs.
        gated: Whether the MLP has a gate.
    """
    return norm_is_fused(d, dtype) and not (gated and dtype == torch.float32)


def interpreted() -> bool:
    """Returns whether Triton kernels run in the interpreter, on a CPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _card_reason(index: int | None) -> str | None:
    """Returns why kernels cannot run on this GPU."""
    if torch.version.hip is not None:
        return "this is a GPU for ROCm, and the kernels are for NVIDIA's from sm_80 on"
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not cards:
        return "torch finds no CUDA device on this machine"
    if index is not None and index >= cards:
        return f"CUDA device {index} was requested, but this machine has {cards}"
    major, minor = torch.cuda.get_device_capability(index)
    if major >= 8:
        return None
    name = torch.cuda.get_device_name(index)
    return f"the GPU {name} is sm_{major}{minor}, older than sm_80"


def device_reason(device: torch.device | str) -> str | None:
    """Returns why kernels cannot run on `device`, or None if they can; they can be compiled for
    meta."""
    device = torch.device(device)
    if not _has_triton():
        return "the package triton is not installed"
    if device.type == "cuda":
        return _card_reason(device.index)
    if device.type == "meta" or (device.type == "cpu" and interpreted()):
        return None
    return f"Triton kernels run on CUDA devices, not on {device.type!r}"


def dtype_reason(*dtypes: torch.dtype) -> str | None:
    """Returns why these dtypes are not supported."""
    for dtype in dtypes:
        if dtype not in DTYPES:
            known = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            return f"dtype {str(dtype).removeprefix('torch.')} is not one of {known}"
    return None


def tensor_reason(*tensors: Tensor | None) -> str | None:
    """Returns why these tensors are not supported: device, dtype, layout or size."""
    present = [t for t in tensors if t is not None]
    for t in present:
        if t.device != present[0].device:
            return f"tensors are on {present[0].device} and {t.device}"
        if t.numel() and t.shape[-1] * max(t.stride(-1), 1) > _INT32:
            return f"a row of {tuple(t.shape)} overflows 32-bit offsets"
        if t.ndim == 2 and t.stride(0) * TILE_ROWS > _INT32:
            return f"{TILE_ROWS} rows of stride {t.stride(0)} overflow 32-bit offsets"
    return device_reason(present[0].device) or dtype_reason(*(t.dtype for t in present))


def row_count_reason(row_count: Tensor | None, x: Tensor) -> str | None:
    """Returns why this row count on the device is not supported (see `_runtime`)."""
    if row_count is None:
        return None
    if row_count.numel() != 1 or row_count.dtype != torch.int32:
        kind = f"{tuple(row_count.shape)} {str(row_count.dtype).removeprefix('torch.')}"
        return f"row_count is {kind} instead of one int32"
    if row_count.device != x.device:
        return f"row_count is on {row_count.device} and the rows on {x.device}"
    return None


def width_reason(d: int, kind: str = "rms") -> str | None:
    """Returns why a norm of this width or kind is not supported."""
    if kind not in NORMS:
        return f"norm {kind!r} is not one of {NORMS}"
    if not 1 <= d <= MAX_WIDTH:
        return f"width {d} is not in 1..{MAX_WIDTH}"
    return None


def shapes_reason(*expected: tuple[str, Tensor | None, tuple[int, ...]]) -> str | None:
    """Returns why these named tensors are not supported: an unexpected shape, or a strided
    vector."""
    for name, t, shape in expected:
        if t is None:
            continue
        if t.shape != shape:
            return f"{name} is {tuple(t.shape)} instead of {tuple(shape)}"
        if t.ndim == 1 and shape[0] > 1 and t.stride(0) != 1:
            return f"{name} has stride {t.stride(0)} instead of 1"
    return None


def list_reason(name: str, t: Tensor | None, shape: tuple[int, ...], x: Tensor) -> str | None:
    """Returns why this list of integers, one per row, is not supported.

    Args:
        name: Its name in the message.
        t: The list, or None.
        shape: The shape that it has to have.
        x: The rows.
    """
    if t is None:
        return None
    if t.shape != shape or t.dtype not in (torch.int32, torch.int64):
        kind = f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}"
        return f"{name} is {kind} instead of {tuple(shape)} int32 or int64"
    return None if t.device == x.device else f"{name} is on {t.device} and the rows on {x.device}"


def rows_reason(x: Tensor, *tensors: Tensor | None) -> str | None:
    """Returns why x (rows, columns) and the tensors that belong to it are not supported."""
    if x.ndim != 2:
        return f"a tensor of rows has {x.ndim} dimensions instead of 2"
    return tensor_reason(x, *tensors)


def norm_reason(x: Tensor, *tensors: Tensor | None, kind: str = "rms") -> str | None:
    """Returns why a norm of x (rows, d) is not supported."""
    return rows_reason(x, *tensors) or width_reason(x.shape[1], kind)


def weights_reason(*weights: Tensor | None) -> str | None:
    """Returns why these GEMM weights are not supported."""
    present = [w for w in weights if w is not None]
    for w in present:
        if w.dtype != present[0].dtype:
            return f"weights are {present[0].dtype} and {w.dtype}"
        if w.stride(-1) != 1:
            return f"a weight {tuple(w.shape)} has column stride {w.stride(-1)} instead of 1"
        if w.shape[0] * w.stride(0) > _INT32:
            return f"a weight {tuple(w.shape)} overflows 32-bit offsets"
    return None


def rope_reason(
    rows: int, columns: int, rotary: int, cos: Tensor | None, sin: Tensor | None
) -> str | None:
    """Returns why this rotary embedding is not supported.

    Args:
        rows: Number of rows.
        columns: Columns of the projection.
        rotary: Columns that are rotated.
        cos: (rows, head_dim / 2), or None.
        sin: As cos.
    """
    if not rotary:
        return None
    if cos is None or sin is None:
        return f"rotary = {rotary} but cos or sin is missing"
    head_dim = 2 * cos.shape[1]
    if columns % head_dim or rotary % head_dim or rotary > columns:
        return f"columns {columns} and rotary {rotary} are not whole heads of {head_dim}"
    if cos.shape != (rows, head_dim // 2) or sin.shape != cos.shape:
        return f"cos and sin have {tuple(cos.shape)}, {tuple(sin.shape)} entries for {rows} rows"
    if cos.dtype != torch.float32 or cos.stride() != sin.stride() or cos.stride(1) != 1:
        return "cos and sin must be fp32 tables of one layout with contiguous columns"
    return None


def layout_reason(
    layout: PaddedLayout, x: Tensor, row_count: Tensor | None, *others: Tensor
) -> str | None:
    """Returns why these sequences of the rows of x (and of `others`) are not supported.

    If the layout does not know the last offset, the offsets are copied to the host, once. With a
    row count, x may have more rows than the last offset.

    Args:
        layout: The sequences.
        x: (rows, columns).
        row_count: Number of live rows on the device, or None.
        others: Further tensors with the rows of x.
    """
    cu, rows = layout.cu_seqlens, x.shape[0]
    if cu.ndim != 1 or len(cu) == 0 or cu.dtype != torch.int32 or not cu.is_contiguous():
        kind = f"{tuple(cu.shape)} {str(cu.dtype).removeprefix('torch.')}"
        return f"cu_seqlens is {kind} instead of (sequences + 1,) int32, contiguous"
    if cu.device != x.device:
        return f"cu_seqlens is on {cu.device} and the rows on {x.device}"
    if not 0 <= layout.max_length <= MAX_LENGTH:
        return f"max_length {layout.max_length} is not in 0..{MAX_LENGTH}"
    stride = max(t.stride(0) for t in (x, *others))
    if layout.max_length * stride > _INT32:
        return f"{layout.max_length} rows of stride {stride} overflow 32-bit offsets"
    if layout.rows is None:
        offsets = cu.tolist()
        lengths = [b - a for a, b in itertools.pairwise(offsets)]
        if offsets[0] != 0:
            return f"cu_seqlens starts at {offsets[0]} instead of 0"
        if min(lengths, default=0) < 0:
            at = next(i for i, n in enumerate(lengths) if n < 0)
            return f"cu_seqlens decreases from {offsets[at]} to {offsets[at + 1]} at sequence {at}"
        if max(lengths, default=0) > layout.max_length:
            return (
                f"a sequence of {max(lengths)} rows is longer than max_length {layout.max_length}"
            )
        layout.rows = offsets[-1]
    if layout.rows > rows or (layout.rows < rows and row_count is None):
        return f"cu_seqlens ends at {layout.rows} but there are {rows} rows"
    return None


def heads_divide_reason(columns: int, heads: int, kv_heads: int) -> str | None:
    """Returns why these columns are not whole heads, which fit each other.

    Args:
        columns: Columns of queries, keys and values together.
        heads: Query heads.
        kv_heads: Key and value heads.
    """
    if not 1 <= kv_heads <= heads or heads % kv_heads:
        return f"{heads} heads are not divisible by {kv_heads} key/value heads"
    if columns % (heads + 2 * kv_heads):
        return f"{columns} columns are not {heads} + 2 · {kv_heads} heads"
    return None


def heads_reason(columns: int, heads: int, kv_heads: int) -> str | None:
    """Returns why these attention heads are not supported.

    Args:
        columns: Columns of queries, keys and values together.
        heads: Query heads.
        kv_heads: Key and value heads.
    """
    reason = heads_divide_reason(columns, heads, kv_heads)
    if reason:
        return reason
    head_dim = columns // (heads + 2 * kv_heads)
    low, high = HEAD_DIMS
    if not low <= head_dim <= high:
        return f"head_dim {head_dim} is not in {low}..{high}"
    return None


def activation_reason(activation: str, gated: bool) -> str | None:
    """Returns why this activation is not supported."""
    if activation not in ACTIVATIONS:
        return f"activation {activation!r} is not one of {ACTIVATIONS}"
    if gated != (activation == "swiglu"):
        needs = "does not support a" if gated else "needs a"
        return f"activation {activation!r} {needs} gate weight"
    return None


def vocabulary_reason(vocabulary: int) -> str | None:
    """Returns why this vocabulary size is not supported."""
    if not 1 <= vocabulary <= MAX_VOCABULARY:
        return f"vocabulary {vocabulary} is not in 1..{MAX_VOCABULARY}"
    return None


def loop_feedback_reason(feedback: str) -> str | None:
    """Returns why the whole-loop kernel does not support a model's feedback, or None if it does."""
    if feedback == "none":
        return None
    return f"the whole-loop kernel does not support feedback = {feedback!r}"


def loop_reason(
    x: Tensor,
    layout: LoopLayout,
    weights: LoopWeights,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    kv_heads: int,
    activation: str,
    kind: str,
) -> str | None:
    """Returns why the whole-loop kernel does not support this call.

    Args:
        x: The loop's input, (rows, d).
        layout: The sequences and their iterations.
        weights: The block's weights.
        cos: RoPE's cosines (rows, head_dim / 2), or None.
        sin: As cos.
        heads: Query heads.
        kv_heads: Key and value heads.
        activation: The activation of the MLP.
        kind: "rms" or "layer".
    """
    if x.device.type == "cuda" and os.environ.get(WHOLE_LOOP) != "1":
        # Its only run on a card, an H200 under triton 3.6, read beyond its shared memory, by code
        # that it no longer has (`loop._code_generation`).
        return f"the whole-loop kernel has not been right on a GPU yet ({WHOLE_LOOP}=1 tries it)"
    w, rows = weights, int(layout.lengths.sum())
    reason = (
        norm_reason(x, *w, cos, sin, kind=kind)
        or weights_reason(w.qkv, w.out, w.up, w.gate, w.down, w.head)
        or heads_reason(w.qkv.shape[1], heads, kv_heads)
        or activation_reason(activation, w.gate is not None)
        or vocabulary_reason(w.head.shape[0])
        or shapes_reason(("x", x, (rows, x.shape[1])))
    )
    if reason:
        return reason
    widest = 64 if w.qkv.dtype == torch.float32 else 128
    if x.shape[1] > widest:
        return f"the whole-loop kernel supports widths up to {widest}, not {x.shape[1]}"
    longest = int(layout.lengths.max(initial=0))
    most = 32 if w.qkv.dtype == torch.float32 else 128
    if longest > most:
        return f"the whole-loop kernel supports sequences of up to {most} rows, not {longest}"
    head_dim = w.qkv.shape[1] // (heads + 2 * kv_heads)
    if x.shape[1] > 64 and longest > 64 and head_dim > 32:  # 0.8 KB a thread would be spilled
        return (
            "the whole-loop kernel supports head_dim up to 32 for widths and sequences of over 64, "
            f"not {head_dim}"
        )
    if not all(t is None or t.is_contiguous() for t in (*w, cos, sin)):
        return "the whole-loop kernel needs contiguous weights and tables"
    return None
