"""Tensors of several shapes and dtypes in one buffer, so that one copy takes them to a device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

ALIGN = 16  # bytes; every tensor starts at a multiple


class BufferLayout:
    """The places of tensors in one buffer of bytes.

    Args:
        tensors: shape and dtype of each.
    """

    def __init__(self, tensors: Iterable[tuple[Sequence[int], torch.dtype]]):
        self._tensors, self._places, end = [], [], 0
        for shape, dtype in tensors:
            size = prod(shape) * dtype.itemsize
            self._tensors.append((tuple(shape), dtype))
            self._places.append(slice(end, end + size))
            end += -(-size // ALIGN) * ALIGN
        self._bytes = end

    def empty(self, device: torch.device | str, pinned: bool = False) -> Tensor:
        """Returns an uninitialised buffer (bytes,) uint8."""
        return torch.empty(self._bytes, dtype=torch.uint8, device=device, pin_memory=pinned)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Returns the tensors in a buffer, which share its memory."""
        return [
            buffer[place].view(dtype).view(shape)
            for place, (shape, dtype) in zip(self._places, self._tensors, strict=True)
        ]


@cache
def _copy_stream(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)


def send(host: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor from the host to a device, or returns it if it is there.

    On CUDA the copy is asynchronous if `host` is pinned. It has a stream of its own, so that it
    runs beside what was launched before; the current stream waits for it.
    """
    if device.type != "cuda":
        return host.to(device, non_blocking=True)
    current = torch.cuda.current_stream(device)
    stream = _copy_stream(current.device_index)
    with torch.cuda.stream(stream):
        sent = host.to(device, non_blocking=True)
    current.wait_stream(stream)
    sent.record_stream(current)  # its memory is the copy stream's, but is not free before
    return sent


@torch.inference_mode(False)
def upload(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """Returns the tensors on a device; from the host they take one asynchronous copy together.

    They are never inference tensors, and share one buffer: none is to be changed in place.
    """
    device = torch.device(device)
    if device.type == "cpu" or any(t.device.type != "cpu" for t in tensors):
        return [t.to(device, non_blocking=device.type != "cpu") for t in tensors]
    layout = BufferLayout((t.shape, t.dtype) for t in tensors)
    host = layout.empty("cpu", pinned=device.type == "cuda")
    for view, tensor in zip(layout.views(host), tensors, strict=True):
        view.copy_(tensor)
    return layout.views(send(host, device))


def picklable(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an object's attributes with a copy of each tensor that is a part of a buffer.

    Pickled as it is, each would take the whole buffer along; torch.save refuses some of them.
    """
    part = lambda v: isinstance(v, Tensor) and v.nbytes < v.untyped_storage().nbytes()
    return {name: v.clone() if part(v) else v for name, v in state.items()}
