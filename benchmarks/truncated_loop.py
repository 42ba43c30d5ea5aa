"""The latent loop trained with gradients that end at each iteration's first state.

Each round's loss trains one iteration; what an iteration leaves for later ones learns nothing. (The
engine's own `truncate` keeps gradients of the last iterations, which suits losses on the last.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from relay_fast.batch.packed import PackedBatch
from relay_fast.models.transformers import LoopedTransformer
from relay_fast.relay.context import Context


class TruncatedLoop(LoopedTransformer):
    """A looped model whose states are detached between iterations."""

    def _pass(self, batch: PackedBatch, supervised: bool) -> tuple[Tensor, Tensor, Tensor]:
        plan, state = batch.plan, self.embed(batch)
        final = [state[plan.rows_at(1) :]]
        losses, corrects = [], []
        for t in range(1, plan.max_loops + 1):
            part = slice(*batch.row_offsets[t - 1 : t + 1])
            rows = (batch.rows[part], batch.targets[part], (0, part.stop - part.start))
            entered = (state if t == 1 else state.detach())[: plan.rows_at(t)]
            state, loss, correct, _ = self._loop(plan.once(t), entered, rows)
            final.append(state[plan.rows_at(t + 1) :])
            losses.append(loss)
            corrects.append(correct)
        return torch.cat(final[::-1]), torch.cat(losses), torch.cat(corrects)


class TruncatedContext(Context):
    """A run whose looped models are trained so."""

    def new_model(self, kind: str, supervise: str = "chain"):
        model = super().new_model(kind, supervise)
        if kind == "looped":
            model.__class__ = TruncatedLoop  # the same parameters, from the same seed
        return model
