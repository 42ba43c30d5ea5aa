"""The weights of layers that peft adapted, merged differentiably for one pass; and what tells
whether a model's weights are still those that a graph reads.

LoRA on a Linear is another weight: W + Σ scaling · B · A over the active adapters; with DoRA,
f · (W + Δ), f = magnitude / ‖W + Δ‖ by rows, whose norm counts as a constant. The sum is formed in
fp32 (fp64 for fp64) and rounded to W's dtype. peft itself is not imported.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from relay_fast.engine.plain_modules import is_plain
from relay_fast.kernels.norm_ref import upcast


def chosen_module(part: nn.Module) -> nn.Module:
    """Returns the module that stands for `part` now if peft trains a copy of it (`modules_to_save`,
    norm tuning), else `part`."""
    if has_hooks(part):
        return part
    if _is_peft(part, "peft.utils.other", "ModulesToSaveWrapper"):
        copies, original = part.modules_to_save, part.original_module
    elif _is_peft(part, "peft.tuners.ln_tuning.layer", "LNTuningLayer"):
        copies, original = part.ln_tuning_layers, part.base_layer
        if part.merged:
            return original
    else:
        return part
    active = [] if part.disable_adapters else [n for n in part.active_adapters if n in copies]
    return copies[active[0]] if active else original


def lora_base(part: nn.Module) -> nn.Module | None:
    """Returns the adapted layer if `part` is a LoRA whose effect is another weight, else None:
    active dropout, a bias in B, other variants than DoRA and hooks depend on the input."""
    if not _is_peft(part, "peft.tuners.lora.layer", "Linear"):
        return None
    base = part.base_layer
    if has_hooks(part) or "forward" in part.__dict__ or type(base).forward is not nn.Linear.forward:
        return None
    if part.disable_adapters or part.merged:
        return base
    for name in _active(part):
        dropout, variant = part.lora_dropout[name], part.lora_variant.get(name)
        if variant is not None and (
            type(variant).__name__ != "DoraLinearVariant"
            or has_hooks(part.lora_magnitude_vector[name])
        ):
            return None
        if not (isinstance(dropout, nn.Identity) or not (part.training or dropout.training)):
            return None
        a, b = part.lora_A[name], part.lora_B[name]
        if not (is_plain(a) and is_plain(b)) or a.bias is not None or b.bias is not None:
            return None
    return base


def lora_weight(part: nn.Module, weight: Tensor) -> Tensor:
    """Returns the weight of a LoRA that `lora_base` accepts.

    Args:
        part: peft's layer.
        weight: that of the adapted layer.
    """
    if part.disable_adapters and part.merged:
        part.unmerge()  # as a call does
    if part.disable_adapters or part.merged or not _active(part):
        return weight
    start = merged = upcast(weight)
    for name in _active(part):
        a, b = upcast(part.lora_A[name].weight), upcast(part.lora_B[name].weight)
        change = (b @ a) * part.scaling[name]
        if name in part.lora_variant:
            magnitude = part.lora_magnitude_vector[name].weight
            norm = torch.linalg.vector_norm((start + change).detach(), dim=1)
            scale = (magnitude / norm).unsqueeze(1)
            merged = scale * (merged + change)
        else:
            merged = merged + change
    return merged.to(weight.dtype)


def adapter_state(model: nn.Module) -> tuple:
    """Returns what decides on the weights of adapted parts, beside their parameters."""
    return tuple(
        (
            name,
            part.disable_adapters,
            tuple(part.active_adapters),
            getattr(part, "merged", False),
            tuple(getattr(part, "scaling", {}).items()),
        )
        for name, part in model.named_modules()
        if hasattr(part, "active_adapters") and hasattr(part, "disable_adapters")
    )


def weights_read(model: nn.Module) -> tuple:
    """Returns what tells the memory that a graph reads a model's weights from, and what it makes of
    them."""
    weights = (*model.named_parameters(), *model.named_buffers())
    memory = tuple((name, t.data_ptr(), t.dtype, t.shape) for name, t in weights)
    return memory, adapter_state(model)


def mixes_adapters(part: nn.Module) -> bool:
    """Returns whether peft was asked for another adapter in each sample of the batch."""
    return any(
        isinstance(hook, functools.partial) and "adapter_names" in hook.keywords
        for hook in part._forward_pre_hooks.values()
    )


def has_hooks(part: nn.Module) -> bool:
    hooks = (
        part._forward_pre_hooks,
        part._forward_hooks,
        part._backward_pre_hooks,
        part._backward_hooks,
    )
    return any(len(kind) > 0 for kind in hooks)  # torch.compile of PyTorch 2.11 knows no bool of it


def _active(part: nn.Module) -> list[str]:
    return [name for name in part.active_adapters if name in part.lora_A]


def _is_peft(part: nn.Module, module: str, name: str) -> bool:
    kind = type(part)
    return kind.__module__ == module and kind.__name__ == name
