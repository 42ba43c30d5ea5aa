"""Counts the bytes of tensors: those that live while something runs, and those that are free."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that ops make inside the context, on one kind of device.

    On meta tensors nothing is computed or allocated, so a pass may be counted before it is run.
    What an op needs inside of itself does not count.

    Args:
        before: tensors that were there before, and do not count.
        kind: the kind of device, "meta" or "cpu" for example.

    Attributes:
        live: bytes of those that live now.
        peak: the most that lived at once.
    """

    def __init__(self, before: Iterable[Tensor] = (), kind: str = "meta"):
        super().__init__()
        self.kind, self.live, self.peak = kind, 0, 0
        self._known = {t.untyped_storage()._cdata for t in before}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(t, Tensor) and t.device.type == self.kind:
                self._add(t.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size).atexit = False

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)  # another storage may get the same address
        self.live -= size


def free_bytes(device: torch.device) -> int | None:
    """Returns the bytes that new tensors may take on a device, or None if it does not say.

    On a GPU: what the driver has, and what torch's allocator holds unused. On a CPU: what the
    system has without swapping.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    return psutil.virtual_memory().available
