"""A whole training step as one CUDA graph: zero_grad → loss → backward → clipping → optimizer.

The first steps run eagerly over the static buffers, which also compiles every kernel. Then the step
is captured; from then on, each batch is copied into the buffers and the graph is replayed, without
launches, allocations or synchronization in Python. Where a graph is not possible, the step runs
eagerly and `GraphedStep.reason` says why.

A graph replays all iterations of its capacity, so there are a few of different depths, each
captured when a batch first needs it: the short problems that a curriculum begins with take a short
one. They share their memory, since only one runs at a time.

Of several ranks, each has two graphs, and adds up the gradients with the others between them: what
is before, each rank replays or computes eagerly as its own batches allow; what comes after, all of
them replay or none, so that their weights stay equal bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from relay_fast.batch.capacity import Capacity, CapacityBatch
from relay_fast.batch.packed import PackedBatch
from relay_fast.engine.adapters import weights_read
from relay_fast.kernels.supports import Unsupported
from relay_fast.models.transformers import AutoregressiveTransformer, LoopedTransformer, Losses
from relay_fast.ops.dispatch import on_device
from relay_fast.training.exchange import Exchange
from relay_fast.utils.cuda_graph import (
    captured,
    device_graph_reason,
    not_captured,
    on_side_stream,
)
from relay_fast.utils.draws import Rewind

__all__ = ["Capacity", "GraphedStep", "graph_reason", "take_step"]

# Tokens per pass for batches whose iterations train side by side; bounds the memory of a pass.
PART_TOKENS = {"cpu": 1 << 14, "cuda": 1 << 17}
WARM_UP = 3  # eager steps before the first capture, as PyTorch recommends
DEPTHS = 3  # graphs of different depths


def graph_reason(device: torch.device, optimizer: torch.optim.Optimizer) -> str | None:
    """Returns why a step cannot be captured, or None if a capture may be tried."""
    reason = device_graph_reason(device)
    if reason is not None:
        return reason
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
    _apply_gradients(model, optimizer, clip)
    return losses


def _apply_gradients(
    model: nn.Module, optimizer: torch.optim.Optimizer, clip: float | None
) -> None:
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()


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
    replay: Callable[[], Losses] | None = None
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
        depths: number of graphs, of evenly spaced numbers of iterations; several ranks have one.
        exchange: of several ranks, which all make this object and call it equally often; its
            `begin` comes before each call with this rank's share.

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
        exchange: Exchange | None = None,
    ):
        self.model, self.optimizer, self.capacity = model, optimizer, capacity
        self.clip, self.autocast, self.exchange = clip, autocast, exchange
        self.reason: str | None = None
        self._never = graph_reason(model.device, optimizer) or feedback_graph_reason(model)
        count = depths if exchange is None else 1
        self._depths = [_Depth(part) for part in capacity.depths(count)]
        self._pool: Any = None  # of the graphs' memory
        self._weights: tuple | None = None  # that the graphs train
        self._update: Callable[[], Any] = self._update_eagerly
        self._eager_update: str | None = "warming up"
        self._warm = self._steps = 0
        if self._never is None:
            for group in optimizer.param_groups:
                group["capturable"] = True
                if not isinstance(group["lr"], Tensor):
                    group["lr"] = torch.tensor(float(group["lr"]), device=model.device)

    def __call__(self, batch: PackedBatch) -> Losses:
        """Takes one step; returns the batch's losses on the device.

        Raises:
            RuntimeError: weights were replaced (not merely changed) since a step was captured.
        """
        with on_device(self.model.device):  # streams and captures are the current device's
            return self._step(batch)

    def _step(self, batch: PackedBatch) -> Losses:
        self.model._check(batch)
        losses = self._captured_part(batch)
        if self.exchange is None:
            return losses
        self.exchange.send()
        if self._steps == WARM_UP:
            self._capture_update()
        self._update()
        self._steps += 1
        self.reason = self.reason or self._eager_update
        return self.exchange.losses()

    def _captured_part(self, batch: PackedBatch) -> Losses:
        """Takes the step, or with an exchange the part before the ranks' message."""
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
                losses = on_side_stream(lambda: self._take(depth.static.batch))
                return self._own(losses, batch, depth)
            except Unsupported as error:  # raised before the optimizer step, still to be taken
                self.reason = self._never = str(error)
                return self._take(batch)
        if depth.replay is None:
            try:
                depth.replay = self._captured(lambda: self._take_depth(depth))
            except RuntimeError as error:  # kernels raise their reasons as RuntimeError too
                self.reason = self._never = not_captured("the step", error)
                return self._take(batch)
            self._weights = self._weights or weights_read(self.model)
        if weights_read(self.model) != self._weights:
            raise RuntimeError(
                "weights of the model were replaced after a step was captured as a CUDA graph, "
                "which would train the old ones: make a new GraphedStep"
            )
        losses = depth.replay()
        if self.exchange is None:
            for parameter, gradient in zip(self.model.parameters(), depth.gradients, strict=True):
                parameter.grad = gradient
        return self._own(losses, batch, depth)

    def _take_depth(self, depth: _Depth) -> Losses:
        """Computes what a depth's graph captures, and holds the gradients: the next capture may use
        all memory that is not held."""
        losses = self._take(depth.static.batch)
        depth.gradients = [p.grad for p in self.model.parameters()]
        return losses

    def _take(self, batch: PackedBatch) -> Losses:
        """Computes eagerly what a graph captures."""
        batch = batch.to(self.model.device)
        if self.exchange is None:
            losses = take_step(
                self.model, self.optimizer, batch, clip=self.clip, autocast=self.autocast
            )
        else:
            self.optimizer.zero_grad()
            losses = add_gradients(self.model, batch, self.autocast)
            self.exchange.pack(losses, batch)
        return Losses(*(value.detach() for value in losses))

    def _update_eagerly(self) -> None:
        self.exchange.unpack()
        _apply_gradients(self.model, self.optimizer, self.clip)

    def _capture_update(self) -> None:
        """Captures the update where all ranks can; each must call this after the same step."""
        replay, reason = None, self._never
        if reason is None:
            try:
                replay = self._captured(self._update_eagerly)
            except RuntimeError as error:
                reason = not_captured("the step", error)
        self._eager_update = self.exchange.ranks.first_reason(reason)
        if self._eager_update is None:
            self._update = replay

    def _captured(self, body: Callable[[], Any]) -> Callable[[], Any]:
        if self.exchange is not None:
            return captured(body)
        if self._pool is None and torch.cuda.is_available():
            self._pool = torch.cuda.graph_pool_handle()
        return captured(body, self._pool)

    def _own(self, losses: Losses, batch: PackedBatch, depth: _Depth) -> Losses:
        """Rescales the accuracies of the padded static batch to the batch's own rows."""
        if self.exchange is not None:  # it has counted what is right, and the batches' own rows
            return losses
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
