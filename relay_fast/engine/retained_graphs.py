"""Finds tensors with an autograd graph that a module's forward stored, such as auxiliary losses and
cached activations.

Searches the attributes of the module and its class, the containers and plain objects in them, and
what methods and hooks refer to: closures, defaults, bound objects, and containers among the globals
that they name.
"""

from __future__ import annotations

import types
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice

from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

CONTAINERS = (dict, list, tuple, set, frozenset, deque)
DEPTH = 5  # levels of nesting that are searched
CONTAINERS_ONLY = 2  # of them the innermost, in which only containers are searched
ENTRIES = 1000  # newest entries searched in one container: vocabularies and logs are long
_OPAQUE = (str, bytes, int, float, complex, type, types.ModuleType, type(None))
_SCALARS = {str, int, float, bool, type(None)}
_EMPTYABLE = {dict, OrderedDict, set, list}


def find_retained_graphs(
    module: nn.Module, arguments: Mapping[str, object] | None = None
) -> dict[int, tuple[str, Tensor]]:
    """Returns the tensors with an autograd graph that a module, its submodules and the containers
    among its arguments refer to: id → (where, tensor)."""
    parts = dict(module.named_modules())
    seen, found = {id(part) for part in parts.values()}, {}
    for name, value in (arguments or {}).items():
        for where, tensor in _walk(name, value, DEPTH, seen):
            found[id(tensor)] = where, tensor
    for name, part in parts.items():
        # Hook-based reparametrizations store the weight that they compute from parameters.
        remade = {
            hook.name
            for hook in part._forward_pre_hooks.values()
            if isinstance(hook, WeightNorm | SpectralNorm)
        }
        skipped = {"_parameters", "_modules", *remade}
        for owner in (part, *type(part).__mro__):
            if owner is not part:
                if id(owner) in seen or owner.__module__.startswith(("torch.", "builtins")):
                    continue
                seen.add(id(owner))
            for key, value in vars(owner).items():
                kind = type(value)  # fast path: most are scalars and empty collections of hooks
                if kind in _SCALARS or (kind in _EMPTYABLE and not value) or key in skipped:
                    continue
                if key.startswith("__"):
                    continue
                for where, tensor in _walk(f"{name}.{key}" if name else key, value, DEPTH, seen):
                    found[id(tensor)] = where, tensor
    return found


def _walk(where: str, value: object, depth: int, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.grad_fn is not None:
            yield where, value
        return
    if isinstance(value, _OPAQUE) or not depth or id(value) in seen:
        return
    if depth <= CONTAINERS_ONLY and not isinstance(value, CONTAINERS):
        return
    seen.add(id(value))
    for name, part in _parts(where, value):
        yield from _walk(name, part, depth - 1, seen)


def _parts(where: str, value: object) -> Iterator[tuple[str, object]]:
    """Yields (where, value) for each value that an object refers to."""
    if isinstance(value, dict):
        for key in list(islice(reversed(value), ENTRIES)):
            yield f"{where}[{key!r}]", value[key]
    elif isinstance(value, list | tuple | deque):
        last = len(value) - 1
        for i, part in enumerate(islice(reversed(value), ENTRIES)):
            yield f"{where}[{last - i}]", part
    elif isinstance(value, CONTAINERS):
        for part in islice(value, ENTRIES):
            yield where, part
    elif isinstance(value, partial):
        yield where, value.func
        yield from ((where, part) for part in (*value.args, *value.keywords.values()))
    elif isinstance(value, types.MethodType):
        yield where, value.__func__
        yield where, value.__self__
    elif isinstance(value, types.FunctionType):
        yield from _of_function(where, value)
    elif not type(value).__module__.startswith("torch."):
        yield from (
            (f"{where}.{key}", part) for key, part in getattr(value, "__dict__", {}).items()
        )
        for kind in type(value).__mro__:
            slots = kind.__dict__.get("__slots__", ())
            for key in (slots,) if isinstance(slots, str) else slots:
                if not key.startswith("__") and hasattr(value, key):
                    yield f"{where}.{key}", getattr(value, key)


def _of_function(where: str, function: types.FunctionType) -> Iterator[tuple[str, object]]:
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f"{name} (in {where})", cell.cell_contents
        except ValueError:  # a cell that was never filled
            continue
    for part in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        yield where, part
    for name in code.co_names:
        value = function.__globals__.get(name)
        if isinstance(value, (Tensor, *CONTAINERS)):
            yield f"{name} (in {where})", value
