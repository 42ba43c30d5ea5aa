"""Checks of modules whose weights are read without calling them.

The loop, the readouts and decoding compute with weights taken from modules. A custom forward or a
hook on such a module would be ignored, so it raises an error that names the module.
"""

from __future__ import annotations

from torch import nn

# Forwards that are determined by the module's weights; containers have the first.
_FORWARDS = frozenset({nn.Module.forward, nn.Linear.forward, nn.Embedding.forward})


def check_submodules(module: nn.Module, what: str) -> None:
    """Raises RuntimeError that names the first submodule of `module` (a `what`) with a custom
    forward or a hook."""
    if _all_plain(module):
        return
    for name, part in module.named_modules():
        if part is not module and (reason := _reason(part)):
            raise RuntimeError(
                f"{name} ({type(part).__name__}) {reason}, which the {what} would ignore because "
                "it reads the weights of its submodules without calling them: use a plain "
                f"torch.nn module, or wrap the {what} instead"
            )


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
        reason = _reason(part, kind)
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


def _all_plain(module: nn.Module) -> bool:
    """Returns whether all submodules are plain; fast, since every pass calls it."""
    for part in module._modules.values():
        if part is None:
            continue
        if (
            type(part).forward not in _FORWARDS
            or part._forward_pre_hooks
            or part._forward_hooks
            or part._backward_pre_hooks
            or part._backward_hooks
            or "forward" in part.__dict__
        ):
            return False
        if part._modules and not _all_plain(part):
            return False
    return True


def _reason(part: nn.Module, kind: type[nn.Module] | None = None) -> str | None:
    """Returns why a part is not plain, or None if it is."""
    part = getattr(part, "_orig_mod", part)  # torch.compile's wrapper
    known = _FORWARDS if kind is None else {kind.forward}
    if type(part).forward not in known or "forward" in part.__dict__:
        return "has a custom forward"
    if part._forward_pre_hooks or part._forward_hooks:
        return "has a forward hook"
    if part._backward_pre_hooks or part._backward_hooks:
        return "has a backward hook"
    return None
