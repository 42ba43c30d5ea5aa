"""Which modules are no more than their weights say.

The loop, the readouts and decoding compute with weights taken from modules. A forward of its own or
a hook on such a module would be ignored, so the module is called instead
(`relay_fast.engine.called_parts`), or an error names it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from relay_fast.engine.wrappers import is_shard_hook

T = TypeVar("T")

CUSTOM_FORWARD = "has a custom forward"
# Hooks that compute an attribute from parameters before each call.
REPARAMETRIZATIONS = (BasePruningMethod, SpectralNorm, WeightNorm)


class Holder(nn.Module):
    """A module that holds parameters for the engine; it is called only for its hooks to run."""

    def forward(self, x: Tensor, compute: Callable[[Tensor], T] | None = None) -> T:
        if compute is None:
            raise TypeError(
                f"{type(self).__name__} holds weights only, so a module around it cannot call it: "
                "put a torch.nn module there instead (such as torch.nn.RMSNorm)"
            )
        return compute(x)


# Forwards that are determined by the module's weights; containers have the first.
FORWARDS = frozenset({nn.Module.forward, nn.Linear.forward, nn.Embedding.forward, Holder.forward})


def is_plain(part: nn.Module) -> bool:
    """Returns whether a module has no hooks and no forward of its own; fast, since every pass asks
    it of each part."""
    kind = type(part)
    return not (
        kind.forward not in FORWARDS
        or kind.__call__ is not nn.Module.__call__
        or part._forward_pre_hooks
        or part._forward_hooks
        or part._backward_pre_hooks
        or part._backward_hooks
        or "forward" in part.__dict__
    )


def call_reason(part: nn.Module, kind: type[nn.Module] | None = None) -> str | None:
    """Returns why a part does more than its weights say, or None.

    Hooks that compute the part's weights, and those of `fully_shard`, are no reason.

    Args:
        part: the module.
        kind: the class whose forward it should have; None: any of `FORWARDS`.
    """
    known = FORWARDS if kind is None else {kind.forward}
    own_call = type(part).__call__ is not (kind or nn.Module).__call__
    if type(part).forward not in known or own_call or "forward" in part.__dict__:
        return CUSTOM_FORWARD
    for hook in (*part._forward_pre_hooks.values(), *part._forward_hooks.values()):
        if not (isinstance(hook, REPARAMETRIZATIONS) or is_shard_hook(hook)):
            return "has a forward hook"
    if part._backward_pre_hooks or part._backward_hooks:
        return "has a backward hook"
    return None


def unwrapped(part: nn.Module) -> nn.Module:
    """Returns the module inside torch.compile's wrapper."""
    return getattr(part, "_orig_mod", part)


def check_parts(owner: nn.Module, **kinds: type[nn.Module]) -> None:
    """Raises RuntimeError for a part of `owner` with a custom forward or a hook.

    Args:
        owner: the module that reads its parts' weights.
        kinds: expected class by attribute name; an attribute that is None is skipped. A Linear must
            have no bias, because it is used as a readout.
    """
    for name, kind in kinds.items():
        part = getattr(owner, name)
        if part is None:
            continue
        reason = call_reason(unwrapped(part), kind)
        if reason is None and kind is nn.Linear and part.bias is not None:
            reason = "has a bias"
        if reason:
            raise RuntimeError(
                f"{name} ({type(part).__name__}) {reason}, which {type(owner).__name__} would "
                f"ignore because it reads the weights without calling {name}: use a plain "
                f"{kind.__name__}"
            )


def check_not_overridden(model: nn.Module, known: type[nn.Module], *methods: str) -> None:
    """Raises TypeError if `model` overrides a method that a pass over its parts bypasses.

    Args:
        model: the model whose parts are used.
        known: the class whose computation the pass repeats.
        methods: names of the methods that are not called; `model` may lack them.
    """
    for name in methods:
        own = getattr(type(model), name, None)
        plain = own in (None, getattr(known, name), getattr(nn.Module, name, None))
        if name in model.__dict__ or not plain:
            raise TypeError(
                f"{type(model).__name__} overrides {name}, which would be ignored here because "
                f"the computation of {known.__name__} is repeated from the model's parts: use a "
                f"plain {known.__name__}, and add extra loss terms outside of the model"
            )


def reset_submodules(module: nn.Module) -> None:
    """Calls `reset_parameters` of every submodule, which initialises a module after
    `torch.nn.Module.to_empty`."""
    for part in module.modules():
        if part is not module and part._parameters and hasattr(part, "reset_parameters"):
            part.reset_parameters()
