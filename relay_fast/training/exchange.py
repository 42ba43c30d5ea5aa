"""The one message of a training step in which the ranks add up their gradients and losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from relay_fast.batch.packed import PackedBatch
from relay_fast.models.transformers import Losses
from relay_fast.training.ranks import Ranks

TOLD = 3  # numbers at the message's end that the host knows: targets, answers, asked to stop
SUMS = 5 + TOLD  # before them the losses, and how many targets and answers were right


class Exchange:
    """Sums gradients and losses over all ranks; each step, `begin` comes before it.

    A step calls the exchange between backward and clipping. A CUDA graph cannot hold the message
    itself: the one of the backward pass ends with `pack`, the one of the update begins with
    `unpack`, and `send` goes between them. The message's memory is the same in every step.

    Args:
        model: has the gradients of its rank's share; a parameter without one counts as zero.
        ranks: that exchange them.
    """

    def __init__(self, model: nn.Module, ranks: Ranks):
        self._model, self.ranks = model, ranks
        self._parameters: list[nn.Parameter] = []
        self._part: PackedBatch | None = None
        self._stop = False
        self._stopping: Tensor | None = None  # of the last step: how many were asked to stop
        self._before: Tensor | None = None  # of the step before it

    def begin(self, part: PackedBatch, stop: bool) -> None:
        """Tells this rank's share of the next step, and whether this rank was asked to stop."""
        self._part, self._stop = part, stop
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        if list(map(id, parameters)) != list(map(id, self._parameters)):  # a model may grow
            self._lay_out(parameters)

    def _lay_out(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        dtype = torch.float32
        for p in parameters:
            dtype = torch.promote_types(dtype, p.dtype)
        sizes = [p.numel() for p in parameters]
        message = torch.zeros(sum(sizes) + SUMS, dtype=dtype, device=parameters[0].device)
        *pieces, self._sums = message.split([*sizes, SUMS])
        self._gradients = [piece.view(p.shape) for p, piece in zip(parameters, pieces, strict=True)]
        self._message = message

    def __call__(self, losses: Losses) -> Losses:
        """Replaces the gradients of this rank by those of the batch; returns its losses."""
        self.pack(losses, self._part)
        self.send()
        self.unpack()
        return self.losses()

    @torch.no_grad()
    def pack(self, losses: Losses, batch: PackedBatch) -> None:
        """Writes the gradients and the losses of this rank's share into the message.

        Args:
            losses: what the model returned.
            batch: what it was called with: the share, or a static batch that holds it.
        """
        values = torch.stack([value.detach().to(self._message.dtype) for value in losses])
        right = (values[3:4] * len(batch.targets), values[4:] * len(batch))
        grads = [
            p.new_zeros(p.numel()) if p.grad is None else p.grad.reshape(-1)
            for p in self._parameters
        ]
        pieces = [piece.to(self._message.dtype) for piece in (*grads, values[:3], *right)]
        torch.cat(pieces, out=self._message[:-TOLD])

    @torch.no_grad()
    def send(self) -> None:
        """Adds up the messages of all ranks. Raises WorkerDied."""
        told = (len(self._part.targets), len(self._part), float(self._stop))
        for place, value in zip(self._sums[-TOLD:].unbind(), told, strict=True):
            place.fill_(value)  # without a copy from the host, which would wait for the device
        self.ranks.add_up(self._message)
        self._before, self._stopping = self._stopping, self._sums[-1].clone()

    @torch.no_grad()
    def unpack(self) -> None:
        """Gives the parameters their gradients out of the message."""
        for p, gradient in zip(self._parameters, self._gradients, strict=True):
            p.grad = gradient.to(p.dtype)

    def losses(self) -> Losses:
        """Returns the losses of the batch, from the message."""
        sums = self._sums.clone()
        return Losses(*sums[:3], *(sums[3:5] / sums[5:7].clamp(min=1)))

    def stopped_before(self) -> bool:
        """Tells whether a rank was asked to stop by the step before; the same on all ranks.

        One step later than the request, so that no GPU is waited for.
        """
        return self._before is not None and bool(self._before)
