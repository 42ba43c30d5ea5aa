"""Chains read off a looped model together with the log-probability of every token."""

from __future__ import annotations

import torch
from torch import Tensor

from relay_fast.batch import PackedBatch
from relay_fast.engine import iterate
from relay_fast.modules import LoopedTransformer
from relay_fast.plain import check_pass


@torch.no_grad()
def read_scored(
    model: LoopedTransformer, batch: PackedBatch
) -> tuple[list[Tensor], Tensor, list[Tensor], Tensor]:
    """What `model.read` gives, and the same shapes again with log-probabilities in fp32.

    Logits exist for a part of the rows at a time only. Raises TypeError for a subclass with a pass
    of its own.
    """
    check_pass(model, LoopedTransformer, "forward", "loss", "_pass", "read", "_read_iterations")
    model.check_parts()
    c, norm, plan = model.config.block, model.norm, batch.plan
    run = model.block.run(plan)

    def best(states: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        head = head.to(run.compute_dtype)
        ids = run.ops.argmax(states, norm.weight, norm.bias, head, c.eps, c.norm)
        loss, _, _ = run.ops.cross_entropy_fwd(
            states, ids, norm.weight, norm.bias, head, eps=c.eps, kind=c.norm
        )
        return ids, -loss.float()

    x = model.embed(batch)
    final = x.clone()
    rounds, scores = [], []
    for t, state in iterate(run, x, list(model.block.parameters())):
        ids, own = best(state, model.chain_head.weight)
        rounds.append(ids)
        scores.append(own)
        final[plan.rows_at(t + 1) : len(state)] = state[plan.rows_at(t + 1) :]
    answers, answer_scores = best(final[plan.last_rows], model.answer_head.weight)
    return rounds, answers, scores, answer_scores
