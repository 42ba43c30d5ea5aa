"""The weights of a block for one pass, read from its modules as attributes.

An attribute may be a parameter, or be computed from parameters (parametrizations, pruning, weight
norm, LoRA, a replica's copy): it is read once a pass, outside of the engine's autograd function, so
that gradients flow on into what it was computed from. A part that is more than its weights is
listed to be called in its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from relay_fast.engine.adapters import chosen_module, lora_base, lora_weight, mixes_adapters
from relay_fast.engine.plain_modules import (
    CUSTOM_FORWARD,
    REPARAMETRIZATIONS,
    Holder,
    call_reason,
    is_plain,
    unwrapped,
)
from relay_fast.engine.wrappers import refuse_replicas, refuse_sharded

Parameter = nn.Parameter


class BlockWeights(NamedTuple):
    """The weights that a pass computes with."""

    names: Sequence[str]
    tensors: list[Tensor]  # in the order of `names`
    called: Mapping[str, tuple[nn.Module, str]]  # the part, and why it is called, by its path

    @property
    def named(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.tensors, strict=True))

    @property
    def of_gemms(self) -> Tensor:
        """A weight whose dtype the block computes in."""
        floating = [t for t in self.tensors[:3] if t.is_floating_point() and t.ndim == 2]
        return floating[0] if floating else self._first_matrix()

    def _first_matrix(self) -> Tensor:
        floating = [t for t in self.tensors if t.is_floating_point()]
        return next((t for t in floating if t.ndim == 2), floating[0])

    def refuse_called(self, what: str) -> BlockWeights:
        """Returns the weights. Raises RuntimeError that names the first part that has to be called.

        Args:
            what: what reads the weights without calling parts.
        """
        for path, (part, reason) in self.called.items():
            raise RuntimeError(
                f"{path} ({type(part).__name__}) {reason}, which {what} would ignore because it "
                "reads the weights of submodules without calling them: use a plain torch.nn module "
                "there, or merge what changes its weights"
            )
        return self


class PartTable(NamedTuple):
    """The parts of a block, in the order of its parameters."""

    names: tuple[str, ...]  # of the parameters
    owners: tuple[tuple[str, tuple[tuple[str, tuple[str, ...]], ...]], ...]
    # (path of the owner, ((name of the part, kinds of its parameters), …))
    layers: int
    beside: int  # parts of the block beside the layers

    @staticmethod
    def of(names: Sequence[str]) -> PartTable:
        """Makes the table from the state-dict keys of a block."""
        owners: dict[str, dict[str, tuple[str, ...]]] = {}
        for name in names:
            path, _, kind = name.rpartition(".")
            owner, _, part = path.rpartition(".")
            parts = owners.setdefault(owner, {})
            parts[part] = (*parts.get(part, ()), kind)
        listed = tuple((path, tuple(parts.items())) for path, parts in owners.items())
        beside = len(owners.get("", ()))
        return PartTable(tuple(names), listed, len(owners) - bool(beside), beside)


def read_weights(block: nn.Module, table: PartTable) -> BlockWeights:
    """Reads the weights of a block.

    Raises:
        RuntimeError: if its parts are not those of the table, or are sharded.
    """
    tensors: list[Tensor] = []
    layers = block._modules["layers"]
    plain = (
        is_plain(layers)
        and len(layers._modules) == table.layers
        and len(block._modules) == table.beside + 1
        and not block._parameters
    )
    for path, parts in table.owners:
        owner = layers._modules.get(path[7:]) if path else block  # behind "layers."
        if owner is None or not plain:
            return _read_with_care(block, table)
        if path and not (
            is_plain(owner) and len(owner._modules) == len(parts) and not owner._parameters
        ):
            return _read_with_care(block, table)
        modules = owner._modules
        for name, kinds in parts:
            part = modules.get(name)
            if part is None or not is_plain(part):
                return _read_with_care(block, table)
            found = part._parameters
            for kind in kinds:
                value = found.get(kind)
                if type(value) is not Parameter:
                    return _read_with_care(block, table)
                tensors.append(value)
            if len(kinds) == 1 and found.get("bias") is not None:
                return _read_with_care(block, table)
    return BlockWeights(table.names, tensors, {})


def _read_with_care(block: nn.Module, table: PartTable) -> BlockWeights:
    """As `read_weights`, for any block."""
    _refuse_others(block, table)
    layers = block._modules["layers"]
    if reason := call_reason(layers):
        raise RuntimeError(f"layers ({type(layers).__name__}) {reason}, but is never called")
    reader = _Reader()
    for path, parts in table.owners:
        owner = block.get_submodule(path)
        if path and (reason := call_reason(owner)):
            if reason == CUSTOM_FORWARD:
                raise RuntimeError(
                    f"{path} ({type(owner).__name__}) {reason}, which the block would ignore "
                    "because it computes its layers from their parts: change the parts, or use "
                    "relay_fast.loop around a module of your own"
                )
            reader.called[path] = owner, reason
        for name, kinds in parts:
            reader.read(f"{path}.{name}" if path else name, owner._modules[name], kinds)
    return BlockWeights(tuple(reader.names), reader.tensors, reader.called)


def read_part(
    name: str, part: nn.Module, kinds: tuple[str, ...], kind: type[nn.Module] | None = None
) -> list[Tensor] | str:
    """Reads one part of a model.

    Args:
        name: of the part, for messages.
        part: the module.
        kinds: names of the weights to read.
        kind: the class whose forward the part should have; None: any plain one.

    Returns:
        The weights, or a phrase that says why the part has to be called.
    """
    inner = chosen_module(unwrapped(part))
    base = lora_base(inner)
    source = inner if base is None else base
    reason = call_reason(source, kind)
    if reason is None and "bias" not in kinds and getattr(source, "bias", None) is not None:
        reason = "has a bias"
    if reason is None:
        reader = _Reader()
        reader.read(name, part, kinds)
        if not reader.called:
            return reader.tensors
        _, reason = reader.called[name]
    return f"{name} ({type(part).__name__}) {reason}"


def _refuse_others(block: nn.Module, table: PartTable) -> None:
    """Raises RuntimeError if the block lacks a part of the table, or has parameters beside it."""
    parts = {
        f"{path}.{name}" if path else name for path, inside in table.owners for name, _ in inside
    }
    found = {name for name, _ in block.named_modules(remove_duplicate=False)}
    missing = sorted(parts - found)
    unknown = [
        name
        for name, _ in block.named_parameters(remove_duplicate=False)
        if not any(name.startswith(f"{part}.") for part in parts)
    ]
    if missing or unknown:
        _refuse_unfit(missing, unknown)


def _refuse_unfit(missing: Sequence[str], unknown: Sequence[str]) -> None:
    raise RuntimeError(
        f"the block's parts are not those of its config (missing: {list(missing)}, unknown: "
        f"{list(unknown)}): it computes with these only, so put an adapter into one of them, and "
        "what is new around the block"
    )


class _Reader:
    """Collects the weights of parts of any kind."""

    def __init__(self):
        self.names: list[str] = []
        self.tensors: list[Tensor] = []
        self.called: dict[str, tuple[nn.Module, str]] = {}

    def read(self, path: str, part: nn.Module, kinds: tuple[str, ...]) -> None:
        """Reads one part: its weights, or all parameters of one that is called."""
        part = chosen_module(unwrapped(part))
        base = lora_base(part)
        source = part if base is None else base
        reason, values = call_reason(source), []
        if reason is None or (isinstance(source, Holder) and reason != CUSTOM_FORWARD):
            values = _attributes(path, source, kinds)
            others = [value for value in values if _is_subclass(value)]
            if others and reason is None:
                refuse_sharded(f"{path}.{kinds[0]}", others[0])
                reason = f"has a weight of type {type(others[0]).__name__}"
        if reason is None:
            if base is not None:
                values[0] = lora_weight(part, values[0])
            self._add(path, kinds, values)
            return
        if mixes_adapters(part):
            raise RuntimeError(
                f"{path} ({type(part).__name__}) gets adapter_names, another adapter for each "
                "sample, but the loop packs the tokens of all samples: use one adapter in a call"
            )
        self.called[path] = part, reason
        if isinstance(part, Holder):
            self._add(path, kinds, values)
            return
        refuse_replicas(part)
        own = dict(part.named_parameters())
        self._add(path, own.keys(), own.values())

    def _add(self, path: str, kinds: Iterable[str], values: Iterable[Tensor]) -> None:
        for kind, value in zip(kinds, values, strict=True):
            name = f"{path}.{kind}"
            if _is_subclass(value):
                refuse_sharded(name, value)
            self.names.append(name)
            self.tensors.append(value)


def _is_subclass(value: Tensor) -> bool:
    """Returns whether a tensor is of a class of its own, such as a quantised or sharded one.

    The tensors that stand for others while torch traces a program are not.
    """
    if type(value) is Parameter or type(value) is Tensor:
        return False
    return not type(value).__module__.startswith("torch._subclasses.")


def _attributes(path: str, part: nn.Module, kinds: tuple[str, ...]) -> list[Tensor]:
    """Returns the part's weights of these kinds; computes those that a hook computes."""
    for hook in part._forward_pre_hooks.values():
        if isinstance(hook, REPARAMETRIZATIONS):
            hook(part, ())
    values = [getattr(part, kind, None) for kind in kinds]
    missing = [f"{path}.{k}" for k, value in zip(kinds, values, strict=True) if value is None]
    extra = "bias" not in kinds and getattr(part, "bias", None) is not None
    if missing or extra:
        _refuse_unfit(missing, [f"{path}.bias"] if extra else [])
    return values
