"""Chains of a looped model together with the log-probability of every token."""

from __future__ import annotations

import torch
from torch import Tensor

from relay_fast.batch.packed import PackedBatch
from relay_fast.engine.plain_modules import check_not_overridden, check_parts
from relay_fast.models.looped_block import LoopedBlock
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
    check_parts(model, block=LoopedBlock)
    c, plan = model.config.block, batch.plan
    heads = ["chain_head"] + ["answer_head"] * model.has_answer_head
    read = {name: model.readout(name).weights_only("scoring") for name in heads}
    weights = model.block.weights()
    run = model.block.run(plan, weights)

    def score(states: Tensor, ids: Tensor, name: str) -> Tensor:
        w = read[name]
        loss, _, _ = run.ops.cross_entropy_fwd(
            states, ids, w.norm, w.bias, w.head.to(run.compute_dtype), eps=c.eps, kind=c.norm
        )
        return -loss.float()

    x = model.embed(batch)
    final = x.clone()
    rounds, scores = [], []
    for t, state, ids in model.iterations(run, weights, x, batch):
        rounds.append(ids)
        scores.append(score(state, ids, "chain_head"))
        final[plan.rows_at(t + 1) : len(state)] = state[plan.rows_at(t + 1) :]
    if not model.has_answer_head:
        return rounds, batch.tokens[:0], scores, x.new_zeros(0)
    last = final[plan.last_rows]
    answers = model.readout("answer_head").argmax(last, run.ops, run.compute_dtype)
    return rounds, answers, scores, score(last, answers, "answer_head")
