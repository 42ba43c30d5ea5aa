"""Packs a training state into named tensors, and restores it.

| part | names in the file |
|---|---|
| module parameters and buffers | `model.{name}` |
| optimizer state, per parameter | `optimizer.{parameter}.{state}` |
| moving averages | `ema.{name}` |
| generator states | `rng.{name}`, uint8 |
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from relay_fast.utils.tensor_files import CheckpointError, _part


def pack_training_state(
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    ema: Mapping[str, Tensor] | None = None,
    generators: Mapping[str, torch.Generator] | None = None,
) -> dict[str, Tensor]:
    """Returns all tensors that an exact resume needs, named as in the table above.

    The tensors share memory with the live ones: save them before the next step.

    Args:
        module: its parameters and buffers are packed.
        optimizer: of parameters of `module`, with state made of tensors, such as AdamW's exp_avg,
            exp_avg_sq and step. Its hyperparameters are not packed.
        ema: moving averages by name.
        generators: by name; pass `torch.default_generator` for the global one.

    Raises:
        TypeError: for optimizer state that is not a tensor.
    """
    tensors = {f"model.{name}": value.detach() for name, value in module.state_dict().items()}
    if optimizer is not None:
        for name, parameter, _ in _named_parameters(module, optimizer):
            for key, value in optimizer.state.get(parameter, {}).items():
                if not isinstance(value, Tensor):
                    raise TypeError(
                        f"the state {key!r} of parameter {name} is a {type(value).__name__}, not a "
                        f"tensor: use an optimizer whose state is made of tensors"
                    )
                tensors[f"optimizer.{name}.{key}"] = value.detach()
    for name, value in (ema or {}).items():
        tensors[f"ema.{name}"] = value.detach()
    for name, generator in (generators or {}).items():
        tensors[f"rng.{name}"] = generator.get_state()
    return tensors


def unpack_training_state(
    tensors: Mapping[str, Tensor],
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    ema: Mapping[str, Tensor] | None = None,
    generators: Mapping[str, torch.Generator] | None = None,
    source: str | os.PathLike = "the checkpoint",
) -> None:
    """Restores a state of `pack_training_state` in place, on the devices of the live objects.

    Args:
        tensors: the packed state; parts whose argument is None are ignored.
        module: the module to restore.
        optimizer: as in `pack_training_state`.
        ema: as in `pack_training_state`.
        generators: as in `pack_training_state`.
        source: the file's name, for messages.

    Raises:
        CheckpointError: for missing, unexpected or misshapen tensors, before anything is changed.
    """
    groups = {} if optimizer is None else _optimizer_groups(tensors, module, optimizer, source)
    _check("model", tensors, module.state_dict(), source)
    if ema is not None:
        _check("ema", tensors, ema, source)
    for name, generator in (generators or {}).items():
        _check(f"rng.{name}", tensors, {"": generator.get_state()}, source)

    module.load_state_dict(_part("model", tensors))
    for parameter, (group, state) in groups.items():
        _restore_state(optimizer.state[parameter], state, parameter, group)
    with torch.no_grad():
        for name, value in (ema or {}).items():
            value.copy_(tensors[f"ema.{name}"])
    for name, generator in (generators or {}).items():
        # A copy: the loaded tensor may be a view of the file's memory map.
        generator.set_state(tensors[f"rng.{name}"].clone())


def _check(
    prefix: str,
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    source: str | os.PathLike,
) -> None:
    """Raises CheckpointError unless `tensors` has the wanted names and shapes under `prefix`."""
    full = {f"{prefix}.{name}" if name else prefix: value for name, value in wanted.items()}
    have = [name for name in tensors if name == prefix or name.startswith(f"{prefix}.")]
    missing = [name for name in full if name not in tensors]
    unexpected = [name for name in have if name not in full]
    if missing or unexpected:
        parts = []
        if missing:
            parts.append(f"lacks {_listed(missing)}")
        if unexpected:
            parts.append(f"has {_listed(unexpected)} that is unknown here")
        raise CheckpointError(
            f"{source} {' and '.join(parts)}; it was written for other objects: build them with "
            f"the config in its metadata."
        )
    for name, value in full.items():
        if tensors[name].shape != value.shape:
            raise CheckpointError(
                f"{source} has {name} of shape {tuple(tensors[name].shape)} where "
                f"{tuple(value.shape)} is needed; build the module with the config in its metadata."
            )


def _listed(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _named_parameters(
    module: nn.Module, optimizer: torch.optim.Optimizer
) -> list[tuple[str, nn.Parameter, dict[str, Any]]]:
    """Returns (name in the module, parameter, its group) in the optimizer's order."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise ValueError(
                    f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that is "
                    f"not the module's; pass the module that the optimizer was made for."
                )
            found.append((names[id(parameter)], parameter, group))
    return found


def _optimizer_groups(
    tensors: Mapping[str, Tensor],
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    source: str | os.PathLike,
) -> dict[nn.Parameter, tuple[dict[str, Any], dict[str, Tensor]]]:
    """Returns each parameter's group and its state in `tensors`."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for full, value in _part("optimizer", tensors).items():
        name, _, key = full.rpartition(".")
        by_name.setdefault(name, {})[key] = value
    if not by_name:
        raise CheckpointError(
            f"{source} holds no optimizer state to continue training from; load it without an "
            f"optimizer, or take a checkpoint written during training."
        )
    groups = {}
    for name, parameter, group in _named_parameters(module, optimizer):
        if name in by_name:
            groups[parameter] = (group, by_name.pop(name))
    if by_name:
        raise CheckpointError(
            f"{source} has optimizer state for {_listed(by_name)}, which the optimizer does not "
            f"hold; make the optimizer from the config in its metadata."
        )
    return groups


def _restore_state(
    live: dict[str, Any],
    state: Mapping[str, Tensor],
    parameter: nn.Parameter,
    group: Mapping[str, Any],
) -> None:
    for key, value in state.items():
        # In place where possible: a captured CUDA graph uses the address.
        if isinstance(live.get(key), Tensor) and live[key].shape == value.shape:
            live[key].copy_(value)
            continue
        # torch keeps `step` on the CPU unless the update itself runs on the device.
        stays = key == "step" and not (group.get("capturable") or group.get("fused"))
        live[key] = value.to("cpu" if stays else parameter.device, copy=True)
