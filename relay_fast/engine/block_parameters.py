"""What a block's config says of its parameters, and of the passes that it cannot make."""

from __future__ import annotations

from relay_fast.batch.plan import Plan
from relay_fast.config import BlockConfig


def check_max_loops(config: BlockConfig, plan: Plan, start: int = 0) -> None:
    """Raises ValueError if the plan, after `start` earlier iterations, loops more often than the
    loop-index embedding has entries."""
    if config.max_loops and start + plan.limit > config.max_loops:
        asked = f"start + loops = {start} + {plan.limit}" if start else f"loops = {plan.limit}"
        raise ValueError(
            f"{asked} is more than the {config.max_loops} iterations that the loop-index embedding "
            "holds: build the block with a larger max_loops"
        )


def parameter_names(config: BlockConfig) -> list[str]:
    """Returns the state-dict keys of a block's parameters."""
    kinds = lambda part: ("weight", "bias") if config.has_bias(part) else ("weight",)
    norm = kinds("norm")
    layer = {"norm1": norm, "qkv": kinds("qkv")}
    if config.qk_norm:
        layer |= {"q_norm": ("weight",), "k_norm": ("weight",)}
    layer["out"] = kinds("out")
    if config.sandwich_norm:
        layer["post_norm1"] = norm
    layer |= {"norm2": norm, "up": kinds("up")}
    if config.activation == "swiglu":
        layer["gate"] = kinds("gate")
    layer["down"] = kinds("down")
    if config.sandwich_norm:
        layer["post_norm2"] = norm
    parts = {
        f"layers.{i}.{name}": kinds for i in range(config.n_layers) for name, kinds in layer.items()
    }
    if config.loop_norm != "none":
        parts["loop_norm"] = norm
    if config.injection == "concat":
        parts["injection"] = ("weight",)
    if config.max_loops:
        parts["loop_embedding"] = ("weight",)
    return [f"{part}.{kind}" for part, kinds in parts.items() for kind in kinds]


def dead_rows_reason(config: BlockConfig) -> str | None:
    """Returns why the kernels cannot skip dead rows in this block, or None if they can: biases,
    injection and the loop-index embedding are plain torch sums over all rows."""
    parts = {
        "biases": config.bias,
        "injection": config.injection != "none",
        "a loop-index embedding": config.max_loops > 0,
    }
    found = " and ".join(name for name, there in parts.items() if there)
    return f"fixed-capacity batches do not support {found}" if found else None


def is_linear(name: str) -> bool:
    """Returns whether a parameter is a GEMM operand, which is cast to the compute dtype."""
    return "norm" not in name and "embedding" not in name
