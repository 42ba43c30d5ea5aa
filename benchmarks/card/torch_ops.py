"""Sees PyTorch's own kernels while a step is recorded beside Triton's."""

from __future__ import annotations

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TorchOps(TorchDispatchMode):
    """Calls `launched` for every op that is neither a view nor an allocation."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        store = lambda t: t.untyped_storage()._cdata
        known = {store(t) for t in given}
        mutable = func._schema.is_mutable
        views = not mutable and all(store(t) in known for t in made)
        if not views and "empty" not in name and (made or mutable):
            self.launched(name, given, made)
        return out

    def launched(self, name: str, given: list[Tensor], made: list[Tensor]) -> None:
        """Called with an op's name, and the tensors that it was given and made."""
        raise NotImplementedError
