"""Compilation of a run's kernels before the run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from relay_fast.batch.capacity import Capacity, CapacityBatch
from relay_fast.batch.packed import PackedBatch
from relay_fast.models.looped_block import LoopedBlock
from relay_fast.models.transformers import LoopedTransformer
from relay_fast.ops.dispatch import on_device
from relay_fast.utils.arguments import check_dtype, check_kind, kind_of

SHORTEST = 16  # attention has one kernel for each power of two up to the longest sequence


def warmup(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    autocast: torch.dtype | None = None,
    show: bool = True,
    on_call: Callable[[int, int], None] | None = None,
) -> None:
    """Compiles the Triton kernels that a run will need, with a progress bar on a terminal.

    In training mode each batch takes a forward and a backward, otherwise a forward without
    gradients. Later batches may have other numbers of rows, and any sequences up to the longest one
    given. Parameters, their `.grad` and the random numbers stay as they are. Call it after the
    model has its device, dtype and mode.

    Args:
        model: the model of the run, or a block.
        batches: what the run will compute: a PackedBatch, the `Capacity` of a CUDA graph, or the
            arguments of `model` (a tuple, or one argument). A few that differ in kind are enough.
        autocast: dtype of the GEMMs, None for that of the parameters.
        show: whether to show the bar.
        on_call: called before each call and after the last, instead of showing the bar, with how
            many are done and how many there are.

    Raises:
        TypeError: for a model that is no module with parameters, batches that are no sequence of
            batches, or an `on_call` that cannot be called.
        ValueError: without a batch, for a batch that the model does not take, and for an `autocast`
            that is no dtype in floating point.
    """
    device = _checked_device(model, autocast, on_call)
    calls = list(_calls(model, batches, device))
    if not calls:
        raise ValueError("batches is empty: give at least one batch of the run")
    indices = [device.index or 0] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(indices),
        on_device(device),
        nullcontext() if autocast is None else torch.autocast(device.type, autocast),
        torch.set_grad_enabled(model.training),
    ):
        for call in _shown(calls, show) if on_call is None else _counted(calls, on_call):
            try:
                _without_trace(call, model)
            except (TypeError, AttributeError) as error:
                raise TypeError(
                    f"batches: {type(model).__name__} cannot compute one of them ({error}); give "
                    "what the run will compute"
                ) from error


def _checked_device(
    model: nn.Module, autocast: torch.dtype | None, on_call: Callable[[int, int], None] | None
) -> torch.device:
    """Returns the model's device; raises the errors of `warmup` for these arguments."""
    check_kind("model", model, nn.Module, "give the model of the run, or a block")
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise TypeError("the model has no parameters: give the model of the run, or a block")
    if autocast is not None:
        check_dtype("autocast", autocast)
    if on_call is not None and not callable(on_call):
        raise TypeError(f"on_call is {kind_of(on_call)}: give a function, or None")
    return parameter.device


def _calls(
    model: nn.Module, batches: Iterable[Any], device: torch.device
) -> Iterator[Callable[[], Any]]:
    """Yields the calls that use every kernel of the run."""
    if isinstance(batches, PackedBatch | Capacity | Tensor | str | Mapping):
        raise TypeError(f"batches is {kind_of(batches)}: give a list of batches")
    check_kind("batches", batches, Iterable, "give a list of batches")
    longest = 0
    for item in batches:
        if isinstance(item, Capacity):
            item = CapacityBatch(item, device).batch  # without a live row: nothing to compute
        if not isinstance(item, PackedBatch):
            yield partial(model, *(item if isinstance(item, tuple) else (item,)))
            continue
        batch = item.to(device)
        longest = max(longest, int(batch.plan.lengths.max(initial=0)))
        reads = not model.training and isinstance(model, LoopedTransformer)
        yield partial(model.predict_rounds if reads else model, batch)
    length = SHORTEST
    while length < longest:
        for block in (m for m in model.modules() if isinstance(m, LoopedBlock)):
            yield partial(_short_pass, block, length)
        length *= 2


def _short_pass(block: LoopedBlock, length: int) -> Tensor:
    """Applies a block once to a single sequence of zeros."""
    d, device = block.config.d_model, next(block.parameters()).device
    return block(torch.zeros(length, d, device=device), 1, cu_seqlens=[0, length])


def _without_trace(call: Callable[[], Any], model: nn.Module) -> None:
    """Makes a call and its backward; leaves no gradients behind."""
    leaves = [t for t in tree_leaves(call()) if isinstance(t, Tensor) and t.requires_grad]
    if leaves:
        parameters = [p for p in model.parameters() if p.requires_grad]
        ones = [torch.ones_like(leaf) for leaf in leaves]
        torch.autograd.grad(leaves, parameters, ones, allow_unused=True)


def _shown(calls: list[Callable[[], Any]], show: bool) -> Iterable[Callable[[], Any]]:
    if not (show and sys.stdout and sys.stdout.isatty()):
        return calls
    from rich.progress import track

    return track(calls, "compiling kernels")


def _counted(
    calls: list[Callable[[], Any]], on_call: Callable[[int, int], None]
) -> Iterator[Callable[[], Any]]:
    for done, call in enumerate(calls):
        on_call(done, len(calls))
        yield call
    on_call(len(calls), len(calls))
