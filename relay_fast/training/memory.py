"""Whether a batch will fit: the bytes that training on it takes, without running it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from relay_fast.batch.capacity import Capacity, CapacityBatch
from relay_fast.batch.packed import PackedBatch
from relay_fast.config import ModelConfig
from relay_fast.engine.recompute import RecomputePolicy
from relay_fast.kernels.supports import device_reason, interpreted
from relay_fast.models.transformers import AutoregressiveTransformer, LoopedTransformer
from relay_fast.utils.arguments import as_device, check_dtype, check_kind, kind_of
from relay_fast.utils.memory import TensorBytes

MODELS = (LoopedTransformer, AutoregressiveTransformer)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training takes.

    Args:
        weights: the parameters.
        optimizer: AdamW's two moments of every parameter.
        batch: the batch's tensors.
        step: the most at any moment of forward and backward: states, activations, gradients.
    """

    weights: int
    optimizer: int
    batch: int
    step: int

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.batch + self.step


def memory_estimate(
    config: ModelConfig | Mapping[str, Any],
    batch: PackedBatch | Capacity,
    recompute: str = "state",
    *,
    model: type[nn.Module] = LoopedTransformer,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
) -> MemoryEstimate:
    """Returns the bytes that a training step takes, from a rehearsal on tensors without data.

    Args:
        config: sizes and options of the model.
        batch: a batch, or the capacity of batches with fixed shapes.
        recompute: recompute policy (`relay_fast.engine.recompute`), any but "auto".
        model: LoopedTransformer or AutoregressiveTransformer.
        dtype: dtype of the GEMMs (autocast's); the parameters are in fp32.
        device: "cuda" counts the kernels' buffers, "cpu" those of plain torch; default: "cuda" if
            there is one.

    Raises:
        ValueError: for an unknown policy, or "auto", which is a choice by what is free; for what is
            no dtype in floating point and no device; for a batch that the model does not take.
        TypeError: for another kind of config, batch or model.
    """
    _check(config, batch, model, dtype)
    if RecomputePolicy.parse(recompute).kind == "auto":
        raise ValueError(
            'recompute = "auto" chooses by the free memory: estimate one of the policies that it '
            "chooses from (relay_fast.engine.auto_policy.ORDER)"
        )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    kind = as_device(default if device is None else device).type
    kernels = kind == "cuda" and not interpreted() and device_reason("meta") is None
    impl = "triton" if kernels else "torch"
    with torch.device("meta"):
        network = model(ModelConfig.of(config), recompute=recompute, impl=impl)
    weights = sum(p.nbytes for p in network.parameters())
    for module in network.modules():
        if isinstance(module, nn.Linear):  # as autocast casts them, once a pass
            module.to(dtype)
    if isinstance(batch, Capacity):
        moved = CapacityBatch(batch, "meta").batch
    else:
        moved = batch.to("meta")
    own = [t for t in vars(moved).values() if isinstance(t, Tensor)]
    with _without_launches(), TensorBytes([*network.parameters(), *own]) as count:
        network.loss(moved).loss.backward()
    cast = [p for p in network.parameters() if p.dtype != torch.float32]
    # Their copies for the GEMMs, and that their gradients stay in fp32.
    more = sum(p.nbytes + p.numel() * (4 - p.itemsize) for p in cast)
    return MemoryEstimate(weights, 2 * weights, sum(t.nbytes for t in own), count.peak + more)


def _check(config: Any, batch: Any, model: Any, dtype: Any) -> None:
    """Raises TypeError or ValueError for arguments of another kind than `memory_estimate` takes."""
    ModelConfig.of(config)
    check_kind("batch", batch, (PackedBatch, Capacity), "give a PackedBatch or a Capacity")
    if not isinstance(model, type) or not issubclass(model, MODELS):
        raise TypeError(
            f"model is {kind_of(model)}: give the class LoopedTransformer or "
            "AutoregressiveTransformer, or one derived from them"
        )
    check_dtype("dtype", dtype)


@contextmanager
def _without_launches() -> Iterator[None]:
    """Makes this thread's launches of Triton kernels do nothing."""
    if device_reason("meta") is not None:  # no Triton
        yield
        return
    from triton.runtime.jit import JITFunction

    original, thread = JITFunction.run, threading.get_ident()

    def run(self, *arguments, **options):
        if threading.get_ident() != thread:
            return original(self, *arguments, **options)

    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = original
