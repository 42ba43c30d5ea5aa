"""Chains of a looped model together with the log-probability of every token."""

from __future__ import annotations

import torch
from torch import Tensor

from relay_fast.batch.packed import PackedBatch
from relay_fast.engine.plain_modules import check_not_overridden
from relay_fast.models.transformers import LoopedTransformer


@torch.no_grad()
def read_scored(
    model: LoopedTransformer, batch: PackedBatch
) -> tuple[list[Tensor], Tensor, list[Tensor], Tensor]:
    """Returns what `model.predict_rounds` does, then fp32 log-probabilities in the same shapes.

    Logits are held for a part of the rows at a time. Raises TypeError for a subclass that
    overrides the pass.
    """
    methods = ("forward", "loss", "_pass", "predict_rounds", "read", "_read_iterations")
    check_not_overridden(model, LoopedTransformer, *methods)
    model.check_parts()
    c, norm, plan = model.config.block, model.norm, batch.plan
    run = model.block.run(plan)

    def score(states: Tensor, ids: Tensor, head: Tensor) -> Tensor:
        loss, _, _ = run.ops.cross_entropy_fwd(
            states, ids, norm.weight, norm.bias, head, eps=c.eps, kind=c.norm
        )
        return -loss.float()

    x = model.embed(batch)
    final = x.clone()
    rounds, scores = [], []
    chain_head = model.chain_head.weight.to(run.compute_dtype)
    for t, state, ids in model.iterations(run, x, batch):
        rounds.append(ids)
        scores.append(score(state, ids, chain_head))
        final[plan.rows_at(t + 1) : len(state)] = state[plan.rows_at(t + 1) :]
    if not model.has_answer_head:
        return rounds, batch.tokens[:0], scores, x.new_zeros(0)
    last, answer_head = final[plan.last_rows], model.answer_head.weight.to(run.compute_dtype)
    answers = run.ops.argmax(last, norm.weight, norm.bias, answer_head, c.eps, c.norm)
    return rounds, answers, scores, score(last, answers, answer_head)
