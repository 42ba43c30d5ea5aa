"""FLOP counts of the custom ops, for `torch.utils.flop_counter`: 2 a multiply-add of the GEMMs, as
torch counts its own; attention counts each sequence at its own length, and masked scores too."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# Products of every query with every key: forward, and backward with the scores recomputed.
ATTENTION_PRODUCTS = {False: 2, True: 5}


def linear_flops(rows: int, weights: Sequence[Tensor | None]) -> int:
    """Returns the FLOPs of one product of `rows` rows with each matrix."""
    return sum(2 * rows * w.shape[0] * w.shape[1] for w in weights if w is not None)


def attention_flops(lengths: np.ndarray, width: int, backward: bool = False) -> int:
    """Returns the FLOPs of attention.

    Args:
        lengths: rows of each sequence.
        width: query columns, heads · head_dim.
        backward: of the backward instead of the forward.
    """
    pairs = int((np.asarray(lengths, dtype=np.int64) ** 2).sum())
    return 2 * ATTENTION_PRODUCTS[backward] * pairs * width


def is_fake(t: Tensor) -> bool:
    """Returns whether a tensor has no values."""
    return isinstance(t, FakeTensor) or t.is_meta


def lengths_of(cu_seqlens: Tensor, rows: int) -> np.ndarray:
    """Returns the rows of each sequence; equal parts if the offsets have no values (fake tensors,
    meta)."""
    if is_fake(cu_seqlens):
        sequences = max(1, len(cu_seqlens) - 1)
        return np.full(sequences, rows // sequences)
    return np.diff(cu_seqlens.cpu().numpy())


_COUNTER = "torch.utils.flop_counter"
_formulas: dict[str, Callable[..., int]] = {}


def count_flops(op: str, formula: Callable[..., int]) -> None:
    """Registers the FLOP formula of a custom op.

    Importing torch's counter imports triton, which has to wait for its environment, so this happens
    when somebody else imports the counter.

    Args:
        op: name of the op in `torch.ops.relay_fast`.
        formula: gets the op's arguments, tensors included, and `out_val`.
    """
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER], op, formula)
        return
    if not _formulas:
        sys.meta_path.insert(0, _CounterFinder())
    _formulas[op] = formula


def _register(counter: ModuleType, op: str, formula: Callable[..., int]) -> None:
    counter.register_flop_formula(getattr(torch.ops.relay_fast, op), get_raw=True)(formula)


class _CounterFinder(MetaPathFinder):
    """Finds torch's counter where it is, with a loader that registers the formulas."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None:
            spec.loader = _CounterLoader(spec.loader)
        return spec


class _CounterLoader(Loader):
    def __init__(self, loader: Loader):
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        for op, formula in _formulas.items():
            _register(module, op, formula)
