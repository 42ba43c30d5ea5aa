"""What the compile report allows a kernel: spilled bytes and shared memory."""

from __future__ import annotations

from relay_fast.kernels._runtime import DEVICE_PROPS
from relay_fast.kernels.tuning import Rule

# Spilled bytes a thread that are allowed: kernel, part of its configuration, bytes, reason.
_EPILOGUE = "values parked across the main loop and read once after it"
SPILLS: tuple[tuple[str, str, int, str], ...] = (
    ("_norm_linear_bwd_kernel", "D=256", 16, _EPILOGUE),
    ("_mlp_bwd_kernel", "ACTIVATION=swiglu", 80, _EPILOGUE),
    ("_cross_entropy_bwd_kernel", "IS_LAYER=True", 40, _EPILOGUE),
    ("_attention_short_bwd_kernel", "HEAD_DIM=32", 8, _EPILOGUE),
    ("_attention_short_bwd_kernel", "BLOCK_N=32", 8, "fp32 with shared keys; " + _EPILOGUE),
    ("_attention_long_bwd_dkdv_kernel", "BLOCK_M=16", 8, "fp32 multiply-adds at head_dim 128"),
    ("_loop_fwd_kernel", "D=128", 344, "addresses of weight tiles, hoisted out of every loop"),
)
# Configurations are picked for sm_90's instructions. With others both operands lie in registers
# beside the accumulator; for sm_100 ptxas stops at 128 registers where two programs fit.
SPILL_ELSEWHERE = 112
# Kernels that a size gets although sm_80 runs it with others, and why.
_TILE = "with head_dim 128 a whole sequence's tile needs 128 KB of shared memory"
APART = {
    "_attention_long_bwd_dq_kernel": _TILE,
    "_attention_long_bwd_dkdv_kernel": _TILE,
    "_weight_grad_sum_kernel": "with more processors than there are tiles, several share a tile",
}
# Their matrix instructions read registers, not shared memory.
REGISTER_OPERANDS = (80, 86, 89, 120, 121)


def allowed_spill(kernel: str, config: str, arch: int) -> int:
    """Bytes a thread that a kernel may spill in a configuration, by whose matrix instructions it
    takes."""
    fits = (size for name, part, size, _ in SPILLS if name == kernel and part in config.split())
    return max(fits, default=0) if arch == 90 else max((SPILL_ELSEWHERE, *fits))


def allowed_shared(arch: int, rule: Rule | None) -> int:
    """Bytes of shared memory that a launch may need: its rule's, where that decides (`tuning`)."""
    device = DEVICE_PROPS[arch].shared_bytes
    decides = rule is not None and arch in REGISTER_OPERANDS
    return min(device, rule.shared << 10) if decides else device
