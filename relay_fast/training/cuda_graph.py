"""A whole training step as one CUDA graph: zero_grad → loss → backward → clipping → optimizer.

The first steps run eagerly over the static buffers, which also compiles every kernel. Then the step
is captured; from then on, each batch is copied into the buffers and the graph is replayed, without
launches, allocations or synchronization in Python. Where a graph is not possible, the step runs
eagerly and `GraphedStep.reason` says why.

A graph replays all iterations of its capacity, so there are a few of different depths, each
captured when a batch first needs it: the short problems that a curriculum begins with take a short
one. They share their memory, since only one runs at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from relay_fast.batch.capacity import Capacity, CapacityBatch
from relay_fast.batch.packed import PackedBatch
from relay_fast.kernels.supports import Unsupported
from relay_fast.models.transformers import AutoregressiveTransformer, LoopedTransformer, Losses
from relay_fast.ops.dispatch import on_device
from relay_fast.utils.draws import Rewind

__all__ = ["Capacity", "GraphedStep", "graph_reason", "take_step"]

# Tokens per pass for batches whose iterations train side by side; bounds the memory of a pass.
PART_TOKENS = {"cpu": 1 << 14, "cuda": 1 << 17}
WARM_UP = 3  # eager steps before the first capture, as PyTorch recommends
DEPTHS = 3  # graphs of different depths


def graph_reason(device: torch.device, optimizer: torch.optim.Optimizer) -> str | None:
    """Returns why a step cannot be captured, or None if a capture may be tried."""
    if device.type != "cuda":
        return f"CUDA graphs need a CUDA device, the model is on {device.type!r}"
    if not all("capturable" in group for group in optimizer.param_groups):
        return f"{type(optimizer).__name__} has no capturable form: use AdamW"
    return None


def feedback_graph_reason(model: nn.Module) -> str | None:
    """Returns why a model with feedback is not captured; None without feedback."""
    if model.config.feedback == "none":
        return None
    return "batches with rounds that are fed back have no fixed shape yet"


def take_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Any,
    *,
    clip: float | None = None,
    autocast: torch.dtype | None = None,
    exchange: Callable[[Any], Any] | None = None,
) -> Any:
    """Takes one eager training step.

    Args:
        model: called with the batch; returns a tuple with a `loss`.
        optimizer: of the model's parameters.
        batch: on the model's device.
        clip: largest norm of all gradients, None for no clipping.
        autocast: dtype of the GEMMs, None for that of the parameters.
        exchange: called between backward and clipping with what the model returned; adds up the
            gradients of several processes and returns the losses of all.

    Returns:
        What `model(batch)`, or `exchange`, returns.
    """
    optimizer.zero_grad()
    losses = add_gradients(model, batch, autocast)
    if exchange is not None:
        losses = exchange(losses)
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return losses


def add_gradients(
    model: nn.Module, batch: Any, autocast: torch.dtype | None, part_tokens: int | None = None
) -> Any:
    """Computes the losses of a batch and adds their gradients to the parameters'.

    Args:
        model: called with the batch.
        batch: on the model's device; one whose iterations train side by side goes in parts.
        autocast: dtype of the GEMMs, None for that of the parameters.
        part_tokens: tokens of a part, default PART_TOKENS.
    """
    if not isinstance(batch, PackedBatch) or batch.fed is None:
        return _backward(model, batch, autocast)
    parts = list(batch.parts(part_tokens or PART_TOKENS[model.device.type]))
    rewind, losses = Rewind(model.device), []
    for part in parts:
        rewind()
        losses.append(_backward(model, part, autocast))
    return _joined(losses, parts)


def _backward(model: nn.Module, batch: Any, autocast: torch.dtype | None) -> Any:
    # No cache: a captured graph would keep casts in memory that is freed after the capture.
    with torch.autocast(
        model.device.type, autocast, enabled=autocast is not None, cache_enabled=False
    ):
        losses = model(batch)
    losses.loss.backward()
    return losses


def _joined(losses: Sequence[Losses], parts: Sequence[PackedBatch]) -> Losses:
    """Combines the losses of a batch's parts into those of the batch."""
    if len(parts) == 1:
        return losses[0]
    total = [torch.stack([own[i] for own in losses]).detach() for i in range(5)]
    counts = [[len(part.targets) for part in parts], [len(part) for part in parts]]
    shares = [
        (values * values.new_tensor(count)).sum() / max(1, sum(count))
        for values, count in zip(total[3:], counts, strict=True)
    ]
    return Losses(*(values.sum() for values in total[:3]), *shares)


@dataclass
class _Depth:
    """The step over batches that loop up to so many times, and what its graph computes into."""

    capacity: Capacity
    static: CapacityBatch | None = None
    warm: bool = False  # whether an eager step over the static batch has compiled its kernels
    graph: torch.cuda.CUDAGraph | None = None
    losses: Losses | None = None
    gradients: list[Tensor | None] = field(default_factory=list)


class GraphedStep:
    """Takes training steps of a model, as replays of CUDA graphs where it can.

        step = GraphedStep(model, optimizer, Capacity.of(some_batches), clip=1.0)
        losses = step(batch)

    A batch may be on the host: then it takes one asynchronous copy, beside the previous replay. One
    that exceeds the capacity takes an eager step; later batches use the graph again. Each call
    takes exactly one optimizer step, warm-up included. After `model.eval()` or another change of
    mode, make a new GraphedStep.

    Args:
        model: the model to train.
        optimizer: AdamW or `MuonAdamW`. On CUDA its learning rates become tensors, which
            `relay_fast.training.optim.set_lr_scale` updates in place.
        capacity: the largest batch of the graphs.
        clip: largest norm of all gradients, None for no clipping.
        autocast: dtype of the GEMMs, None for that of the parameters.
        depths: number of graphs, of evenly spaced numbers of iterations.

    Attributes:
        reason: why the last step was not a replay; None if it was.
    """

    def __init__(
        self,
        model: LoopedTransformer | AutoregressiveTransformer,
        optimizer: torch.optim.Optimizer,
        capacity: Capacity,
        *,
        clip: float | None = None,
        autocast: torch.dtype | None = None,
        depths: int = DEPTHS,
    ):
        self.model, self.optimizer, self.capacity = model, optimizer, capacity
        self.clip, self.autocast = clip, autocast
        self.reason: str | None = None
        self._never = graph_reason(model.device, optimizer) or feedback_graph_reason(model)
        self._depths = [_Depth(part) for part in capacity.depths(depths)]
        self._pool: Any = None  # of the graphs' memory
        self._warm = 0
        if self._never is None:
            for group in optimizer.param_groups:
                group["capturable"] = True
                if not isinstance(group["lr"], Tensor):
                    group["lr"] = torch.tensor(float(group["lr"]), device=model.device)

    def __call__(self, batch: PackedBatch) -> Losses:
        """Takes one step; returns the batch's losses on the device."""
        with on_device(self.model.device):  # streams and captures are the current device's
            return self._step(batch)

    def _step(self, batch: PackedBatch) -> Losses:
        self.model._check(batch)
        self.reason = self._never or self.capacity.reason(batch)
        if self.reason is not None:
            return self._take(batch)
        depth = next(d for d in self._depths if batch.plan.max_loops <= len(d.capacity.rows))
        if depth.static is None:
            depth.static = CapacityBatch(depth.capacity, self.model.device)
        depth.static.load(batch)
        if self._warm < WARM_UP or (WARM_UP and not depth.warm):
            self._warm, depth.warm = self._warm + 1, True
            self.reason = f"warming up, step {self._warm} of {WARM_UP}"
            if self._warm > WARM_UP:
                self.reason = f"warming up {len(depth.capacity.rows)} iterations"
            try:
                return self._own(self._warm_up(depth), batch, depth)
            except (
                Unsupported
            ) as error:  # raised before the optimizer step, which is still to be taken
                self.reason = self._never = str(error)
                return self._take(batch)
        if depth.graph is None:
            self.reason = self._capture(depth)
            if self.reason is not None:
                self._never = self.reason
                return self._take(batch)
        depth.graph.replay()
        for parameter, gradient in zip(self.model.parameters(), depth.gradients, strict=True):
            parameter.grad = gradient
        return self._own(depth.losses, batch, depth)

    def _take(self, batch: PackedBatch) -> Losses:
        """Takes one eager step; this is what a graph captures."""
        batch = batch.to(self.model.device)
        losses = take_step(
            self.model, self.optimizer, batch, clip=self.clip, autocast=self.autocast
        )
        return Losses(*(value.detach() for value in losses))

    def _warm_up(self, depth: _Depth) -> Losses:
        """Takes an eager step on a side stream, as a capture does."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            losses = self._take(depth.static.batch)
        torch.cuda.current_stream().wait_stream(side)
        return losses

    def _capture(self, depth: _Depth) -> str | None:
        """Captures the step without running it; returns the reason if that fails."""
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                depth.losses = self._take(depth.static.batch)
        except RuntimeError as error:  # kernels raise their reasons as RuntimeError too
            torch.cuda.synchronize()
            return f"the step could not be captured: {' '.join(str(error).split())[:300]}"
        # The next capture may use all that is not held.
        depth.graph, depth.gradients = graph, [p.grad for p in self.model.parameters()]
        return None

    def _own(self, losses: Losses, batch: PackedBatch, depth: _Depth) -> Losses:
        """Rescales the accuracies of the padded static batch to the batch's own rows."""
        full = depth.static.batch
        rows = len(full.targets) / max(1, len(batch.targets))
        sequences = len(full) / max(1, len(batch))
        return Losses(
            losses.loss.clone(),
            losses.chain.clone(),
            losses.answer.clone(),
            losses.chain_correct * rows,
            losses.answer_correct * sequences,
        )
