"""Shared parts of the kernels: `dot`, device properties, and launch configurations.

`dot` is the only function that calls `tl.dot`. On a device, operands stay in their storage dtype:
upcast to fp32 they would silently be multiplied as TF32. The interpreter multiplies the raw bits of
bf16, so there (and only there) operands are upcast. fp32 operands are multiplied in full fp32
(`ieee`).

Row counts on the device: a launcher's `row_count` (one int32 on the device, None: all rows) is the
number of rows that hold data, so that a CUDA graph captured at a fixed capacity also runs smaller
batches. The grid is that of the capacity; programs beyond the count return at once. Sums over rows
(norm and weight gradients) cover the counted rows only. Beyond them, the outputs of a cross-entropy
are 0 and all other outputs keep the buffer's content. Attention processes whole sequences: empty
ones, and those that start at or beyond the count, are skipped, so `cu_seqlens` of a capacity
repeats its last offset. All shapes are those of the capacity, and so are the GEMMs that cuBLAS
runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

# Arguments whose values change from launch to launch of one model. Triton compiles a kernel again
# for each pattern of integers that are 1 or divisible by 16, and of pointers that are aligned.
# Neither helps here: no column offset or column mask depends on these integers, and the pointers
# hold one element a row, often from the middle of a list. Model sizes and strides stay
# specialised, since the vector width of loads depends on them.
_VARYING_INTEGERS = (
    "M", "tiles_each", "column_blocks", "each", "rows_each", "splits", "offset", "counter", "add",
    "listed",
    *(f"{name}{k}" for name in ("M", "at", "dy", "x", "count") for k in range(1, 8)),
)  # fmt: skip
_PER_ROW_POINTERS = (
    "count_ptr", "cu_ptr", "index_ptr", "target_ptr", "grad_ptr", "loss_ptr", "lse_ptr",
    "correct_ptr", "tokens_ptr", "seed_ptr",
)  # fmt: skip


def jit_kernel(function):
    """Returns the Triton kernel of a function; `triton.jit` is for the functions that it calls."""
    decorate = triton.jit(
        do_not_specialize=_VARYING_INTEGERS, do_not_specialize_on_alignment=_PER_ROW_POINTERS
    )
    return decorate(function)


@triton.jit
def dot(a, b, acc):
    """a · b + acc, accumulated in fp32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def counted_rows(M, count_ptr, first=0):
    """Returns how many of the M rows from row `first` on hold data, according to the row count."""
    if count_ptr is not None:
        M = tl.minimum(M, tl.load(count_ptr) - first)
    return M


@triton.jit
def rows_left(M, base, BLOCK_M: tl.constexpr):
    """Returns how many of a program's BLOCK_M rows from `base` (int64) on exist.

    Pointers are moved to `base` once, so that offsets inside a tile stay 32-bit: 64-bit offsets
    cost two registers per element wherever a tile is used twice.
    """
    return tl.minimum(M - base, BLOCK_M).to(tl.int32)


@dataclass(frozen=True)
class DeviceProps:
    """The device properties that launch configurations depend on."""

    arch: int  # compute capability, 90 for sm_90
    processors: int
    shared_bytes: int  # largest dynamic shared memory of one program


# Processors: data sheet of the card named. Shared memory: CUDA C++ Programming Guide, table
# "Technical Specifications per Compute Capability" (maximum per thread block).
DEVICE_PROPS = {
    80: DeviceProps(80, 108, 163 << 10),  # A100
    86: DeviceProps(86, 82, 99 << 10),  # RTX 3090 (A40, A6000: 84)
    89: DeviceProps(89, 128, 99 << 10),  # RTX 4090 (L40S: 142)
    90: DeviceProps(90, 132, 227 << 10),  # H100, H200
    100: DeviceProps(100, 148, 227 << 10),  # B200
    103: DeviceProps(103, 148, 227 << 10),  # B300
    120: DeviceProps(120, 170, 99 << 10),  # RTX 5090
    121: DeviceProps(121, 48, 99 << 10),  # GB10
}
_SMALLEST = 99 << 10  # of every architecture from sm_80 on
_assumed = DEVICE_PROPS[90]


def facts(arch: int) -> DeviceProps:
    """Returns what is known of an architecture without a device: little if it is not listed."""
    return DEVICE_PROPS.get(arch) or DeviceProps(arch, 1, _SMALLEST)


def assume_arch(arch: int) -> None:
    """Sets the architecture assumed for tensors without a GPU (interpreter, compile report)."""
    global _assumed
    _assumed = DEVICE_PROPS[arch]


@cache
def _cuda_props(index: int) -> DeviceProps:
    p = torch.cuda.get_device_properties(index)
    arch = 10 * p.major + p.minor
    shared = getattr(p, "shared_memory_per_block_optin", facts(arch).shared_bytes)
    return DeviceProps(arch, p.multi_processor_count, shared)


def device_props(device: torch.device) -> DeviceProps:
    """Returns the properties of a device, cached."""
    if device.type != "cuda":
        return _assumed
    return _cuda_props(torch.cuda.current_device() if device.index is None else device.index)


@dataclass(frozen=True)
class Config:
    """A hand-picked launch configuration."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def block_of(size: int) -> int:
    """Returns the smallest power of two ≥ `size`, and at least 16 for the tensor cores."""
    return max(16, 1 << (size - 1).bit_length())


def contiguous_columns(x: Tensor) -> Tensor:
    """Returns x with contiguous columns; copies only if needed. Any row stride is kept, including
    0."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def split_columns(tiles: int, row_blocks: int, device: torch.device) -> tuple[int, int]:
    """Returns the column tiles per program, and the number of programs that share a block of rows:
    more than one if the row blocks alone give less than two programs per processor."""
    programs = min(tiles, max(1, 2 * device_props(device).processors // row_blocks))
    each = cdiv(tiles, programs)
    return each, cdiv(tiles, each)
