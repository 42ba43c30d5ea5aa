"""Weight gradient accumulated into an fp32 buffer: acc += dyᵀ · x (beta = 1), deterministic.

Shapes: acc (columns, d), dy (rows, columns), x (rows, d). The sum over rows is long and the output
small (768 × 256: 12 tiles for 132 processors), so the rows are split over programs. Each writes an
fp32 partial, and a second kernel adds the partials to acc in a fixed order: no float atomics, and
the same bits in every run on one machine. The sum of dy, the gradient of a bias, is taken from the
same loads.

One launch takes the operands of several iterations, which it reaches from the addresses of the
first: fewer partials, and fewer programs that wait for the last one.

FLOPs: 2 · rows · columns · d. Bytes: 2 · rows · (columns + d) + 8 · splits · columns · d; the
partials (8.6 MB at 768 × 256 and 11 splits) stay in L2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._runtime import (
    Config,
    cdiv,
    contiguous_columns,
    counted_rows,
    device_props,
    dot,
    jit_kernel,
)
from .supports import norm_reason, require, row_count_reason, shapes_reason, weights_reason
from .tuning import pick

# Rows summed in the tensor cores' accumulators, which truncate: on an H200 the error of a sum grows
# linearly, 1.1e-9 of its size a row. Chains are added up in fp32, which rounds.
CHAIN = 512
MOST_OPERANDS = 8  # pairs of dy and x that one launch takes
_VECTOR = 16  # elements: the distance of two pairs is a multiple, so that loads keep their width


@triton.jit
def _chosen(k, v0, v1, v2, v3, v4, v5, v6, v7):
    """Returns the k-th value."""
    low = tl.where(k < 2, tl.where(k < 1, v0, v1), tl.where(k < 3, v2, v3))
    high = tl.where(k < 6, tl.where(k < 5, v4, v5), tl.where(k < 7, v6, v7))
    return tl.where(k < 4, low, high)


@triton.jit
def _pair_of(row, at1, at2, at3, at4, at5, at6, at7):
    """Returns which pair of operands a row belongs to."""
    k = (row >= at1).to(tl.int32) + (row >= at2).to(tl.int32) + (row >= at3).to(tl.int32)
    k = k + (row >= at4).to(tl.int32) + (row >= at5).to(tl.int32)
    return k + (row >= at6).to(tl.int32) + (row >= at7).to(tl.int32)


@jit_kernel
def _weight_grad_kernel(
    # pointers
    acc_ptr, dy_ptr, x_ptr, bias_ptr, count_ptr,
    # strides
    stride_as, stride_bs, stride_an, stride_dm, stride_xm,
    # sizes, scalars
    M, M1, M2, M3, M4, M5, M6, M7, N, D, rows_each, offset, add,
    # the first row of each further pair of operands, among the rows of all
    at1, at2, at3, at4, at5, at6, at7,
    # where they are, in vectors from the first pair (row counts: in elements)
    dy1: tl.int64, dy2: tl.int64, dy3: tl.int64, dy4: tl.int64, dy5: tl.int64, dy6: tl.int64,
    dy7: tl.int64, x1: tl.int64, x2: tl.int64, x3: tl.int64, x4: tl.int64, x5: tl.int64,
    x6: tl.int64, x7: tl.int64, count1: tl.int64, count2: tl.int64, count3: tl.int64,
    count4: tl.int64, count5: tl.int64, count6: tl.int64, count7: tl.int64,
    # flags and blocks
    VECTOR: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    block = tl.arange(0, BLOCK_K)
    dy_at = block[:, None] * stride_dm + columns[None, :]
    x_at = block[:, None] * stride_xm + inside[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    line = tl.zeros((BLOCK_N,), tl.float32)
    split = tl.program_id(2)
    start = split * rows_each  # of the rows of all pairs, end to end
    end = tl.minimum(start + rows_each, at7 + M7)
    while start < end:
        k = _pair_of(start, at1, at2, at3, at4, at5, at6, at7)
        own = _chosen(k, 0, at1, at2, at3, at4, at5, at6, at7)
        rows = _chosen(k, M, M1, M2, M3, M4, M5, M6, M7)
        stop = tl.minimum(tl.minimum(start + CHAIN, end), own + rows)
        if count_ptr is not None:
            count = _chosen(k, 0, count1, count2, count3, count4, count5, count6, count7)
            rows = counted_rows(rows, count_ptr + count, offset)
        first = start - own
        left = tl.minimum(stop - own, rows) - first
        dy_shift = _chosen(k, 0, dy1, dy2, dy3, dy4, dy5, dy6, dy7).to(tl.int64) * VECTOR
        x_shift = _chosen(k, 0, x1, x2, x3, x4, x5, x6, x7).to(tl.int64) * VECTOR
        dy_rows = dy_ptr + dy_shift + first.to(tl.int64) * stride_dm
        x_rows = x_ptr + x_shift + first.to(tl.int64) * stride_xm
        part = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for row in range(0, left, BLOCK_K):
            there = (block < left - row)[:, None]
            dy = tl.load(dy_rows + dy_at, mask=there & (columns < N)[None, :], other=0.0)
            x = tl.load(x_rows + x_at, mask=there & (inside < D)[None, :], other=0.0)
            part = dot(tl.trans(dy), x, part)  # of [BLOCK_K, BLOCK_N] and [BLOCK_K, BLOCK_D]
            if bias_ptr is not None:
                line += tl.sum(dy.to(tl.float32), 0)
            dy_rows += BLOCK_K * stride_dm
            x_rows += BLOCK_K * stride_xm
        total += part
        start = stop
    split = split.to(tl.int64)
    at = acc_ptr + split * stride_as + columns[:, None] * stride_an + inside[None, :]
    mask = (columns < N)[:, None] & (inside < D)[None, :]
    total += tl.load(at, mask=mask & (add != 0), other=0.0)
    tl.store(at, total, mask=mask)
    if bias_ptr is not None:
        once = (columns < N) & (tl.program_id(0) == 0)  # all programs of these columns have it
        bias = bias_ptr + split * stride_bs + columns
        line += tl.load(bias, mask=once & (add != 0), other=0.0)
        tl.store(bias, line, mask=once)


@jit_kernel
def _weight_grad_sum_kernel(
    # pointers
    acc_ptr, partial_ptr,
    # strides, sizes
    stride_an, N, D, splits,
    # blocks
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < N * D
    acc = acc_ptr + at // D * stride_an + at % D
    total = tl.load(acc, mask=mask, other=0.0)
    partial = partial_ptr + at
    for _ in range(0, splits):
        total += tl.load(partial, mask=mask, other=0.0)
        partial += N * D
    tl.store(acc, total, mask=mask)


Operands = tuple[Tensor, Tensor, Tensor | None]  # dy, x and their row count


def weight_grad(
    acc: Tensor,
    dy: Tensor,
    x: Tensor,
    *,
    fresh: bool = False,
    row_count: Tensor | None = None,
    offset: int = 0,
    bias: Tensor | None = None,
    more: Sequence[Operands] = (),
    sums: dict[str, Tensor] | None = None,
) -> None:
    """acc += dyᵀ · x, summed in fp32.

    Args:
        acc: (columns, d) fp32.
        dy: (rows, columns).
        x: (rows, d).
        fresh: whether acc is uninitialised and must be zeroed first.
        row_count: (1,) int32 on the device, the number of rows that count; None: all.
        offset: index of dy's first row among the rows that `row_count` counts.
        bias: (columns,) fp32, to which the sum of dy over its rows is added; None: no such sum.
        more: further dy, x and row_count, which are added too; MOST_OPERANDS pairs take one launch.
        sums: where the partials stay if several programs may share a tile, so that later launches
            add to them; empty before the first one. If it then has "acc" (splits, columns, d) and
            "bias" (splits, columns), acc and bias were not touched, and the caller adds up these
            over the first dimension once. None: they are added to acc and bias at once.
    """
    pairs = [(dy, x, row_count), *more]
    for pair in pairs:
        _check(acc, *pair)
    _check_sums(acc, bias)
    pairs = [_operands(*pair) for pair in pairs if len(pair[1])]
    if fresh and not (pairs and _stay(acc, pairs[0][1], sums)):
        acc.zero_()
    while pairs:
        together = 1
        while together < min(len(pairs), MOST_OPERANDS) and _alike(pairs[0], pairs[together]):
            together += 1
        _add(acc, bias, pairs[:together], offset, sums)
        pairs = pairs[together:]


def _check(acc: Tensor, dy: Tensor, x: Tensor, row_count: Tensor | None) -> None:
    require(
        norm_reason(x, acc, dy)
        or shapes_reason(("acc", acc, (dy.shape[-1], x.shape[1])), ("dy", dy, (len(x), len(acc))))
        or row_count_reason(row_count, x)
    )


def _check_sums(acc: Tensor, bias: Tensor | None) -> None:
    reason = weights_reason(acc) or shapes_reason(("bias", bias, acc.shape[:1]))
    if reason is None and any(t.dtype != torch.float32 for t in (acc, bias) if t is not None):
        reason = "the accumulator must be fp32 with contiguous columns"
    require(reason)


def _operands(dy: Tensor, x: Tensor, row_count: Tensor | None) -> Operands:
    """Returns operands of one dtype with contiguous columns."""
    if dy.dtype != x.dtype:
        dtype = torch.promote_types(dy.dtype, x.dtype)
        dy, x = dy.to(dtype), x.to(dtype)
    return contiguous_columns(dy), contiguous_columns(x), row_count


def _shift(t: Tensor | None, base: Tensor | None) -> int:
    """Returns how many elements t is from base."""
    return 0 if t is None else (t.data_ptr() - base.data_ptr()) // t.element_size()


def _alike(a: Operands, b: Operands) -> bool:
    """Returns whether one launch can take both: it reaches b from a's addresses."""
    for s, t in zip(a[:2], b[:2], strict=True):
        if s.dtype != t.dtype or s.stride(0) != t.stride(0):
            return False
        if (t.data_ptr() - s.data_ptr()) % (_VECTOR * s.element_size()):
            return False
    return (a[2] is None) == (b[2] is None)


def _splits(rows: int, tiles: int, block_k: int, device: torch.device) -> tuple[int, int]:
    """Returns how many rows a program takes, and how many programs share a tile."""
    most = device_props(device).processors // tiles
    each = cdiv(cdiv(rows, max(1, min(cdiv(rows, 4 * block_k), most))), block_k) * block_k
    return each, cdiv(rows, each)


def _add(
    acc: Tensor,
    bias: Tensor | None,
    pairs: Sequence[Operands],
    offset: int,
    sums: dict[str, Tensor] | None = None,
) -> None:
    """Adds the products of at most MOST_OPERANDS pairs."""
    (dy, x, row_count), (columns, d) = pairs[0], acc.shape
    config = _config(acc, x)
    block_k = 32 if x.dtype == torch.float32 else 64
    rows = [len(pair[1]) for pair in pairs]
    grid = (cdiv(d, config.block_m), cdiv(columns, config.block_n))
    rows_each, splits = _splits(sum(rows), grid[0] * grid[1], block_k, x.device)
    target, line, own = acc, bias, splits > 1 and sums is None
    add = splits == 1
    if own:
        target, line = _new_partials(acc, bias, splits, torch.empty)
    elif _stay(acc, x, sums):
        add = bool(sums)
        target, line = _kept_partials(acc, bias, splits, sums)
    _weight_grad_kernel[(*grid, splits)](
        target, dy, x, line, row_count, stride_as=target.stride(0) if target.ndim == 3 else 0,
        stride_bs=line.stride(0) if line is not None and line.ndim == 2 else 0,
        stride_an=target.stride(-2), stride_dm=dy.stride(0), stride_xm=x.stride(0),
        N=columns, D=d, rows_each=rows_each, offset=offset, **_further(pairs, rows),
        add=int(add), BLOCK_N=config.block_n, BLOCK_D=config.block_m, BLOCK_K=block_k,
        CHAIN=CHAIN, VECTOR=_VECTOR, **config.launch,
    )  # fmt: skip
    if own:
        add_partials(acc, target)
        if bias is not None:
            add_partials(bias.unsqueeze(0), line.unsqueeze(1))


def _new_partials(
    acc: Tensor, bias: Tensor | None, splits: int, new: Callable[..., Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Allocates partials of acc and bias."""
    parts = (None if like is None else (splits, *like.shape) for like in (acc, bias))
    options = {"dtype": acc.dtype, "device": acc.device}
    return tuple(None if shape is None else new(shape, **options) for shape in parts)


def _kept_partials(
    acc: Tensor, bias: Tensor | None, splits: int, sums: dict[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Returns the partials in `sums`, which grow to as many as are needed."""
    more = splits - (len(sums["acc"]) if sums else 0)
    if more > 0:
        new = _new_partials(acc, bias, more, torch.zeros if sums else torch.empty)
        for name, part in zip(("acc", "bias"), new, strict=True):
            if part is not None:
                sums[name] = torch.cat((sums[name], part)) if name in sums else part
    return sums["acc"], sums.get("bias")


def _stay(acc: Tensor, x: Tensor, sums: dict[str, Tensor] | None) -> bool:
    """Returns whether partials stay over launches: where some do, or a tile may have several
    programs."""
    return sums is not None and (
        bool(sums) or device_props(x.device).processors >= 2 * _tiles(acc, x)
    )


def _tiles(acc: Tensor, x: Tensor) -> int:
    (columns, d), config = acc.shape, _config(acc, x)
    return cdiv(d, config.block_m) * cdiv(columns, config.block_n)


def _config(acc: Tensor, x: Tensor) -> Config:
    """Returns a configuration; block_m is the size of a tile along d."""
    return pick("weight_grad", x.dtype, min(acc.shape), 0, x.device)


def _further(pairs: Sequence[Operands], rows: Sequence[int]) -> dict[str, int]:
    """Returns the kernel's arguments about the pairs behind the first."""
    absent = [0] * (MOST_OPERANDS - len(pairs))
    arguments = {"M": rows[0]}
    lists = {
        "M": [*rows[1:], *absent],
        "at": [*accumulate(rows[:-1]), *(sum(rows) for _ in absent)],
    }
    for part, name in enumerate(("dy", "x", "count")):
        unit = 1 if name == "count" else _VECTOR
        shifts = [_shift(pair[part], pairs[0][part]) // unit for pair in pairs[1:]]
        lists[name] = shifts + absent
    for name, values in lists.items():
        arguments |= {f"{name}{k}": value for k, value in enumerate(values, 1)}
    return arguments


def add_partials(acc: Tensor, partials: Tensor) -> None:
    """Adds partials (splits, columns, d) to acc (columns, d)."""
    columns, d = acc.shape
    _weight_grad_sum_kernel[(cdiv(columns * d, 1024),)](
        acc, partials, stride_an=acc.stride(0), N=columns, D=d, splits=len(partials), BLOCK=1024,
        num_warps=4,
    )  # fmt: skip
