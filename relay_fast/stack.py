"""The stack of layers inside a model, and a model with another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from relay_fast._numbers import whole
from relay_fast.config import ModelConfig
from relay_fast.modules import LoopedBlock


def stack_of(model: nn.Module) -> LoopedBlock:
    """The LoopedBlock that `model` is, has as its `block`, or holds as its only one.

    Raises ValueError where there is none, or more than one to choose from.
    """
    if isinstance(model, LoopedBlock):
        return model
    if isinstance(getattr(model, "block", None), LoopedBlock):
        return model.block
    found = [module for module in model.modules() if isinstance(module, LoopedBlock)]
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(found)} LoopedBlocks: pass the one that is meant"
        )
    return found[0]


def set_stack(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Exchanges the layers of the model's stack, in its configuration too."""
    block = stack_of(model)
    block.set_layers(layers)
    if isinstance(getattr(model, "config", None), ModelConfig):
        model.config = replace(model.config, block=block.config)
    noted = getattr(model, "_hub_mixin_config", None)  # for huggingface_hub's mixin
    if model is not block and isinstance(noted, dict):
        for name, config in (("config", getattr(model, "config", None)), ("block", block.config)):
            if name in noted:
                noted[name] = config.to_dict()


def check_period(period: int, depth: int) -> int:
    """period as an int. Raises ValueError unless `depth` layers are several whole blocks of it."""
    period = whole("period", period)
    if period < 1 or depth % period or depth == period:
        raise ValueError(
            f"period = {period} does not cut a stack of {depth} layers into equal blocks, two at "
            "least: choose a smaller divisor"
        )
    return period
