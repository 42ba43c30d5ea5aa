"""Checks of arguments that are no numbers: kinds, tensors, devices, dtypes, choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def kind_of(value: Any) -> str:
    """Says what a value is: "None", "the class Linear", "an object of type dict"."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"an object of type {type(value).__name__}"


def check_kind(name: str, value: Any, kinds: type | tuple[type, ...], remedy: str) -> None:
    """Raises TypeError for a value of another kind.

    Args:
        name: The name of the argument.
        value: The value.
        kinds: What it may be an instance of.
        remedy: What to give, as in "give a PackedBatch".
    """
    if not isinstance(value, kinds):
        raise TypeError(f"{name} is {kind_of(value)}: {remedy}")


def check_tensors(**tensors: Any) -> None:
    """Raises TypeError for the first argument that is no tensor."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is {kind_of(value)}: give a tensor")


def check_optional(**tensors: Any) -> None:
    """Does what `check_tensors` does, but for None."""
    check_tensors(**{name: value for name, value in tensors.items() if value is not None})


def check_one_device(**tensors: Tensor | None) -> None:
    """Raises ValueError for a tensor on another device than the first; None is left out."""
    names = [name for name, t in tensors.items() if t is not None]
    device = tensors[names[0]].device
    for name in names[1:]:
        if tensors[name].device != device:
            raise ValueError(
                f"{names[0]} is on {device} and {name} on {tensors[name].device}: move them to one "
                "device"
            )


def as_tensor(name: str, value: Any, device: str | None = None) -> Tensor:
    """Converts a tensor, an array or lists of numbers to a tensor.

    Args:
        name: The name of the argument.
        value: The numbers.
        device: Where the tensor is wanted, by default where the numbers are.

    Raises:
        TypeError: The value is something else.
    """
    try:
        return torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} is {kind_of(value)}: give a tensor, or lists of numbers") from None


def refuse_meta(name: str, tensor: Tensor) -> None:
    """Raises ValueError for a meta tensor where its values are needed."""
    if tensor.is_meta:
        raise ValueError(
            f"{name} is a meta tensor, which holds no values: give it on the CPU, or a list"
        )


def on_host(name: str, tensor: Tensor) -> np.ndarray:
    """Copies a tensor's values to the host; a CUDA tensor synchronises. Raises ValueError for a
    meta tensor."""
    refuse_meta(name, tensor)
    return tensor.detach().cpu().numpy()


def as_device(device: Any) -> torch.device:
    """Converts to a device. Raises ValueError for what is none."""
    try:
        return torch.device(device)
    except (TypeError, RuntimeError):
        raise ValueError(
            f'device = {device!r} is no device of torch: give "cpu", "cuda" or "cuda:0"'
        ) from None


def check_dtype(name: str, dtype: Any) -> None:
    """Raises ValueError for what is no dtype in floating point."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"{name} = {dtype!r}: give torch.float32, torch.bfloat16 or torch.float16")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises ValueError for a value that is none of the choices.

    Args:
        name: The name of the argument.
        value: The value.
        choices: What it may be.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} = {value!r} is unknown: use one of {', '.join(choices)}")
