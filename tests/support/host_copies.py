"""Copies from the host to a device, counted on a device without memory."""

from __future__ import annotations

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HostCopies(TorchDispatchMode):
    """Counts copies from the host to the meta device, and those that the host would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.all = self.blocking = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.__name__.split(".")[0]
        given = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = {t.device.type for t in tree_leaves(out) if isinstance(t, Tensor)}
        if name in ("_to_copy", "copy_") and "cpu" in given and "meta" in made:
            self.all += 1
            own = kwargs.get(
                "non_blocking", args[2] if name == "copy_" and len(args) > 2 else False
            )
            self.blocking += not own
        else:
            assert not ("cpu" in given and "meta" in made), name
        return out
