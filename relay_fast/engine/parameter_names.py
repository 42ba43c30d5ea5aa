"""Names of a block's parameters, the keys of its state dict."""

from __future__ import annotations

from relay_fast.config import BlockConfig


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


def is_linear(name: str) -> bool:
    """Returns whether a parameter is a GEMM operand, which is cast to the compute dtype."""
    return "norm" not in name and "embedding" not in name
