"""Modules whose weights are read and that are not called: they have to be plain.

The loop, the read-outs and decoding compute with weights that they take from modules. What such a
module would do besides when it is called (a forward of its own, hooks) would be left out without a
word, so it is refused by name.
"""

from __future__ import annotations

from torch import nn

# What a module does when it is called, where its weights say all of it; a module that only holds
# others has the first.
_FORWARDS = frozenset({nn.Module.forward, nn.Linear.forward, nn.Embedding.forward})


def check_inside(module: nn.Module, what: str) -> None:
    """Raises RuntimeError, naming it, where a module inside of `module` (a `what`) is not plain."""
    if _all_plain(module):
        return
    for name, part in module.named_modules():
        if part is not module and (reason := _reason(part)):
            raise RuntimeError(
                f"{name} ({type(part).__name__}) {reason}, which the {what} would ignore: it reads "
                "the weights of the modules inside and does not call them, so make it a plain "
                f"torch.nn module again, or put what it does around the {what}"
            )


def check_parts(owner: nn.Module, **kinds: type[nn.Module]) -> None:
    """Raises RuntimeError where a part of `owner`, by name, is called like no module of its kind.

    A part that is None is passed over. A Linear must have no bias: it is taken for a read-out.
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
                f"ignore: it reads the weights and does not call {name}, so make it a plain "
                f"{kind.__name__}"
            )


def check_pass(model: nn.Module, known: type[nn.Module], *methods: str) -> None:
    """Raises TypeError where `model` has another version of a method than the class `known`; it may
    have none.

    For a pass over the model's parts that does what `known` does, and never asks those methods.
    """
    for name in methods:
        own = getattr(type(model), name, None)
        plain = own in (None, getattr(known, name), getattr(nn.Module, name, None))
        if name in model.__dict__ or not plain:
            raise TypeError(
                f"{type(model).__name__} has a {name} of its own, which would be ignored here: it "
                f"computes what {known.__name__} does, from the model's parts, so give a plain "
                f"{known.__name__} (a loss that only adds a term can be taken outside of the model)"
            )


def reset_inside(module: nn.Module) -> None:
    """Draws the parameters of every module inside of `module` anew, each by its own
    `reset_parameters`; what `torch.nn.Module.to_empty` leaves undefined is defined by it."""
    for part in module.modules():
        if part is not module and part._parameters and hasattr(part, "reset_parameters"):
            part.reset_parameters()


def _all_plain(module: nn.Module) -> bool:
    """Whether all modules inside are; quick, for every pass asks."""
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
    """Why a part is not plain; None if it is."""
    part = getattr(part, "_orig_mod", part)  # compiled: the same function
    known = _FORWARDS if kind is None else {kind.forward}
    if type(part).forward not in known or "forward" in part.__dict__:
        return "has a forward of its own"
    if part._forward_pre_hooks or part._forward_hooks:
        return "has a forward hook"
    if part._backward_pre_hooks or part._backward_hooks:
        return "has a backward hook"
    return None
