"""What a kernel launch has to do at least: its FLOPs, its bytes, and the time below which a card
cannot finish it.

FLOPs: 2 a multiply-add of the GEMMs that the op is made of, recomputation in backward included,
padding of tiles not; kernels without a GEMM count their arithmetic an element. Attention counts
every sequence as long as the batch's mean, and half the scores where it is causal.
Bytes: every buffer of the launch once, as large as it is; what is updated in place twice. What is
read again, from L2 or from memory, comes on top: this is a floor.

    floor = max(FLOPs / peak, bytes / bandwidth);  memory binds below peak / bandwidth FLOP a byte
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from relay_fast.kernels.weight_grad import MOST_OPERANDS


@dataclass(frozen=True)
class Card:
    """Rates of a card of an architecture."""

    name: str
    flops_16_bit: float  # a second, tensor cores, fp32 accumulation
    flops_fp32: float  # a second, full fp32 (no TF32)
    bandwidth: float  # bytes a second, reads plus writes
    l2_bytes: int


# Of data sheets and architecture white papers, without sparsity. GeForce cards accumulate in fp32
# at half the rate of fp16, and that half is listed.
CARDS = {
    80: Card("A100 80 GB", 312e12, 19.5e12, 2.04e12, 40 << 20),
    86: Card("RTX 3090", 71e12, 35.6e12, 0.936e12, 6 << 20),
    89: Card("RTX 4090", 165.2e12, 82.6e12, 1.008e12, 72 << 20),
    # 16-bit and bandwidth measured on random data, the others from the data sheet.
    90: Card("H200", 790e12, 67e12, 4.3e12, 50 << 20),
    100: Card("B200", 2250e12, 75e12, 8e12, 126 << 20),
    103: Card("B300", 2250e12, 75e12, 8e12, 126 << 20),
    120: Card("RTX 5090", 209.5e12, 104.8e12, 1.792e12, 96 << 20),
    # A petaflop of sparse fp4, scaled by the RTX 5090's ratio of 16-bit to that.
    121: Card("GB10", 62.5e12, 31e12, 0.273e12, 24 << 20),
}


@dataclass(frozen=True)
class Cost:
    """Of one launch."""

    flops: int
    bytes: int

    @property
    def intensity(self) -> float:
        """FLOP a byte."""
        return self.flops / max(1, self.bytes)

    def floor(self, arch: int, dtype: str) -> tuple[float, str]:
        """Seconds at least on the architecture's card, and what binds: "memory" or "compute"."""
        card = CARDS[arch]
        peak = card.flops_fp32 if dtype == "fp32" else card.flops_16_bit
        compute, memory = self.flops / peak, self.bytes / card.bandwidth
        return max(compute, memory), "memory" if memory >= compute else "compute"


# FLOPs by kernel, from the launch's arguments: M rows, N columns, D width, H hidden, V vocabulary.


def _gemm(times: int, *sizes: str) -> Callable[[Any], int]:
    """`times` multiply-adds at every point of a space of these sizes."""

    def flops(a: Any) -> int:
        total = 2 * times
        for name in sizes:
            total *= getattr(a, name)
        return total

    return flops


def _attention(gemms: int) -> Callable[[Any], int]:
    """`gemms` products of every query with every key that it sees, in every head."""

    def flops(a: Any) -> int:
        rows, sequences = a.qkv_ptr.shape[0], max(1, a.cu_ptr.shape[0] - 1)
        keys = (rows / sequences + 1) / 2 if a.CAUSAL else rows / sequences
        return int(2 * gemms * rows * keys * a.HEADS * a.HEAD_DIM)

    return flops


def _elementwise(operations: int) -> Callable[[Any], int]:
    """`operations` an element of the first buffer, which holds all elements."""
    return lambda a: operations * next(v for v in vars(a).values() if _is_matrix(v)).numel()


def _mlp(a: Any) -> int:
    return 2 * (2 + (a.gate_weight_ptr is not None)) * a.M * a.H * a.D


def _mlp_up(a: Any) -> int:
    return 2 * (1 + (a.gate_weight_ptr is not None)) * a.M * a.H * a.D


def _loop(a: Any) -> int:
    """Of all row-iterations; RoPE's second product and scores of other sequences left out."""
    layer = 2 * a.D * (2 * a.HEADS + 2 * a.KV_HEADS) * a.HEAD_DIM
    layer += 2 * a.D * a.H * (2 + (a.gate_ptr is not None))
    sequences = a.bin_ptr.shape[0] - 1  # one a program in the report
    layer += 4 * a.x_ptr.shape[0] // max(1, sequences) * a.HEADS * a.HEAD_DIM
    return a.ids_ptr.numel() * (a.layers * layer + 2 * a.D * a.V)


FLOPS: Mapping[str, Callable[[Any], int]] = {
    "_state_input_fwd_kernel": _elementwise(2),
    "_state_input_bwd_kernel": _elementwise(2),
    "_norm_fwd_kernel": _elementwise(6),
    "_norm_bwd_kernel": _elementwise(12),
    "_norm_linear_fwd_kernel": _gemm(1, "M", "N", "D"),
    "_norm_linear_bwd_kernel": _gemm(1, "M", "N", "D"),
    "_qk_norm_fwd_kernel": _elementwise(8),
    "_qk_norm_bwd_kernel": _elementwise(18),
    "_norm_residual_fwd_kernel": _elementwise(7),
    "_norm_residual_bwd_kernel": _elementwise(13),
    "_rope_kernel": lambda a: 3 * a.M * a.rotary,
    "_attention_short_fwd_kernel": _attention(2),
    "_attention_long_fwd_kernel": _attention(2),
    "_attention_short_bwd_kernel": _attention(5),
    "_attention_long_bwd_dq_kernel": _attention(3),
    "_attention_long_bwd_dkdv_kernel": _attention(4),
    "_linear_residual_fwd_kernel": _gemm(1, "M", "N", "K"),
    "_linear_residual_bwd_kernel": _gemm(1, "M", "N", "K"),
    "_mlp_fwd_kernel": _mlp,
    "_mlp_bwd_kernel": _mlp,
    "_mlp_up_fwd_kernel": _mlp_up,
    "_activation_fwd_kernel": _elementwise(10),
    "_activation_bwd_kernel": _elementwise(20),
    "_cross_entropy_fwd_kernel": _gemm(1, "M", "V", "D"),
    "_cross_entropy_bwd_kernel": _gemm(2, "M", "V", "D"),
    "_logit_grad_kernel": _elementwise(12),
    "_weight_grad_kernel": lambda a: 2 * rows_together(a) * a.N * a.D,
    "_weight_grad_sum_kernel": lambda a: a.splits * a.N * a.D,
    "_loop_fwd_kernel": _loop,
}


def rows_together(a: Any) -> int:
    """Rows of all pairs of operands of a weight_grad launch."""
    return a.M + sum(getattr(a, f"M{k}", 0) for k in range(1, MOST_OPERANDS))


def _is_matrix(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2


def _updated(name: str, a: Any) -> tuple[Tensor, ...]:
    """Buffers that are read and written."""
    if name == "_rope_kernel":
        return (a.z_ptr,)
    if name == "_state_input_bwd_kernel":
        return () if a.x_grad_ptr is None else (a.x_grad_ptr,)
    if name == "_logit_grad_kernel":  # read twice, written once
        return (a.logits_ptr,) * 2
    if name == "_weight_grad_sum_kernel" or (name == "_weight_grad_kernel" and a.add):
        return (a.acc_ptr,)
    return ()


def launch_cost(name: str, arguments: Mapping[str, Any]) -> Cost:
    """Of a launch of the kernel `name` with its arguments by name."""
    a = SimpleNamespace(**arguments)
    unread = () if arguments.get("listed", 1) else ("index_ptr",)  # stands in for no list
    read = (v for k, v in arguments.items() if isinstance(v, Tensor) and k not in unread)
    tensors = (*read, *_updated(name, a))
    moved = sum(t.numel() * t.element_size() for t in tensors)
    if name == "_weight_grad_kernel":  # the arguments have the first pair of operands only
        moved += (rows_together(a) - a.M) * (a.N * a.dy_ptr.itemsize + a.D * a.x_ptr.itemsize)
    return Cost(int(FLOPS[name](a)), moved)
