"""What every kernel shares: the one `dot`, facts about the device, and launch configurations.

`dot` is the only place that calls `tl.dot`. Operands stay in their storage dtype on a device: an
upcast to fp32 there would compile to TF32 without a word. The interpreter multiplies the raw bits
of bf16, so there (and only there) operands are upcast. fp32 operands are multiplied in full fp32
(`ieee`).

Row counts on the device: a launcher's `row_count` (one int32 on the device, None: all rows) says
how many of its rows hold data, so that a CUDA graph captured at a capacity serves smaller batches.
The grid stays the capacity's; programs beyond the count leave at once. What the kernels sum over
rows (norm and weight gradients) covers the counted rows only; a cross-entropy's outputs are 0
beyond them, all other outputs hold there what the buffer held. Attention takes whole sequences:
those that start at or beyond the count, and empty ones, do nothing, so `cu_seqlens` of a capacity
repeats its last offset. All shapes stay the capacity's, and so do GEMMs that are left to cuBLAS.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc):
    """a · b + acc, accumulated in fp32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def counted_rows(M, count_ptr, first=0):
    """How many of the M rows from row `first` on hold data: all, or what the device says."""
    if count_ptr is not None:
        M = tl.minimum(M, tl.load(count_ptr) - first)
    return M


@triton.jit
def rows_left(M, base, BLOCK_M: tl.constexpr):
    """How many of a program's BLOCK_M rows from `base` (int64) on exist.

    Pointers are moved to `base` once, so that offsets inside a tile stay 32-bit: 64-bit ones cost
    two registers an element wherever a tile is touched twice.
    """
    return tl.minimum(M - base, BLOCK_M).to(tl.int32)


@dataclass(frozen=True)
class DeviceProps:
    """What launch configurations depend on."""

    arch: int  # compute capability, 90 for sm_90
    processors: int
    shared_bytes: int  # largest dynamic shared memory of one program


FACTS = {
    80: DeviceProps(80, 108, 163 << 10),
    90: DeviceProps(90, 132, 227 << 10),
    100: DeviceProps(100, 148, 227 << 10),
}
_assumed = FACTS[90]


def assume(arch: int) -> None:
    """The architecture that tensors without a GPU (interpreter, compile report) stand for."""
    global _assumed
    _assumed = FACTS[arch]


@cache
def _cuda_facts(index: int) -> DeviceProps:
    p = torch.cuda.get_device_properties(index)
    shared = getattr(p, "shared_memory_per_block_optin", FACTS[90].shared_bytes)
    return DeviceProps(10 * p.major + p.minor, p.multi_processor_count, shared)


def facts(device: torch.device) -> DeviceProps:
    """DeviceProps about a tensor's device, asked for once."""
    if device.type != "cuda":
        return _assumed
    return _cuda_facts(torch.cuda.current_device() if device.index is None else device.index)


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
    """The power of two that holds `size` columns; tensor cores want at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def contiguous_columns(x: Tensor) -> Tensor:
    """x with contiguous columns; any row stride, zero included, is read as it is."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def split_columns(tiles: int, row_blocks: int, device: torch.device) -> tuple[int, int]:
    """How many column tiles a program takes, and how many programs share a block of rows: one, or
    more where row blocks alone would not give every processor two programs."""
    programs = min(tiles, max(1, 2 * facts(device).processors // row_blocks))
    each = cdiv(tiles, programs)
    return each, cdiv(tiles, each)
