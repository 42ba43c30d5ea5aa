"""Feedback with the state carried too: the last round, right-aligned, true or the model's own."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.numerics import assert_close
from relay_fast.batch.feeder import Feeder
from relay_fast.batch.packed import PackedBatch
from relay_fast.functional import row_cross_entropy
from relay_fast.models.transformers import LoopedTransformer
from relay_fast.tasks import TASK_NAMES, Samples
from relay_fast.tasks.vocabulary import PAD
from tests.support.fed_models import TASKS, D, mixed, new_model


def true_feed(samples: Samples, i: int, t: int, n: int) -> torch.Tensor:
    """The round before iteration t (from 0) of a sample, right-aligned in n tokens."""
    fed = torch.full((n,), PAD)
    if t:
        text = samples.rounds_of(i)[t - 1]
        fed[n - len(text) :] = torch.from_numpy(text.astype(np.int64))
    return fed


def test_rounds_that_are_empty_or_have_no_end_are_carried_as_they_are() -> None:
    samples = TASKS["arithmetic"].sample([3, 2], 0)
    feeder = PackedBatch.looped(samples, TASKS, carry_state=True).feeder
    n, rows = int(np.diff(samples.problem_offsets)[0]), len(feeder.last)
    assert not feeder.start().any()
    ids = torch.arange(rows) + 1
    assert torch.equal(feeder.after(ids, rows), ids)
    ids[n - 1] = PAD  # of the first sequence alone
    fed = feeder.after(ids, rows)
    assert not fed[:n].any() and torch.equal(fed[n:], ids[n:])
    assert len(feeder.after(ids, n)) == n


def carried_pair(truth: float = 1.0, **options) -> tuple[LoopedTransformer, PackedBatch]:
    samples = mixed()
    extra = np.random.default_rng(3).integers(0, 5, len(samples))
    batch = PackedBatch.carried(samples, TASKS, extra_pad=extra, truth=truth, **options)
    return new_model(carry_state=True).double(), batch


@pytest.mark.parametrize(
    ("truth", "weighting"), [(1.0, "sequence"), (1.0, "row"), (0.0, "sequence")]
)
def test_carried_states_with_true_rounds_or_its_own(truth: float, weighting: str) -> None:
    """Against one sample after the other; without truth, what is fed is what the model reads."""
    task_weights = {"lis": 2.0, "arithmetic": 0.5}
    options = {"weighting": weighting, "task_weights": task_weights, "chain_weight": 0.7}
    model, batch = carried_pair(truth, **options)
    losses = model.loss(batch)
    losses.loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    samples, plan, total = mixed(), batch.plan, 0.0
    read, answers = model.predict_rounds(batch)
    head = (model.norm.weight, model.chain_head.weight)
    every_row = int((np.diff(samples.round_offsets) + 1).sum())
    for k, i in enumerate(batch.order.tolist()):
        rows = slice(int(plan.offsets[k]), int(plan.offsets[k + 1]))
        state, own = model.embedding(batch.tokens[rows]), batch.feeder.start()
        task_weight = task_weights.get(TASK_NAMES[samples.task[i]], 1.0)
        for t in range(1, int(plan.loops[k]) + 1):
            fed = true_feed(samples, i, t - 1, len(state)) if truth else own[rows]
            state = model.block((state + model.fed_embedding(fed))[None], 1)[0]
            target = torch.tensor([PAD, *samples.rounds_of(i)[t - 1].tolist()])
            last = torch.arange(len(state) - len(target), len(state))
            loss, _ = row_cross_entropy(state, last, target, *head)
            share = 1 / every_row
            if weighting == "sequence":
                share = 1 / (len(samples) * samples.loops[i] * len(target))
            total = total + loss.sum() * float(np.float32(0.7 * task_weight * share))
            own = batch.feeder.after(read[t - 1], plan.rows_at(t + 1))
            if not truth:
                y = torch.nn.functional.rms_norm(state, (D,), model.norm.weight, 1e-6)
                assert torch.equal(model.chain_head(y).argmax(-1), read[t - 1][rows])
        loss, right = row_cross_entropy(
            state,
            torch.tensor([len(state) - 1]),
            batch.answers[k : k + 1],
            model.norm.weight,
            model.answer_head.weight,
        )
        total = total + loss[0] * float(np.float32(task_weight / len(samples)))
        if not truth:
            assert bool(right) == bool(answers[k] == batch.answers[k])
    assert_close("loss", losses.loss, total, 1e-12)
    total.backward()
    for name, p in model.named_parameters():
        assert_close(name, ours[name], p.grad, 1e-12)


def test_a_share_of_the_sequences_is_fed_the_truth() -> None:
    model, batch = carried_pair(0.5)
    torch.manual_seed(0)
    losses = {round(model.loss(batch).loss.item(), 9) for _ in range(4)}
    torch.manual_seed(0)
    assert round(model.loss(batch).loss.item(), 9) in losses and len(losses) == 4


@pytest.mark.parametrize("truth", [0.25, 0.75])
def test_a_sequence_is_fed_the_true_round_or_all_of_its_own(truth: float, monkeypatch) -> None:
    """In each iteration anew, a share of them the true one."""
    model, batch = carried_pair(truth)
    fed, own, told = [], [], []
    embed, after = model._embed_fed, Feeder.after

    def embedded(tokens, plan):
        fed.append(list(tokens.split(plan.lengths.tolist())))
        return embed(tokens, plan)

    def written(feeder, ids, rows):
        own.append(after(feeder, ids, rows))
        return own[-1]

    monkeypatch.setattr(model, "_embed_fed", embedded)
    monkeypatch.setattr(Feeder, "after", written)
    plan = batch.plan
    for seed in range(5):
        fed.clear(), own.clear()
        torch.manual_seed(seed)
        with torch.no_grad():
            model.loss(batch)
        for t in range(2, plan.max_loops + 1):
            lengths = plan.lengths[: plan.active_sequences[t - 1]].tolist()
            true = batch.true_feed[plan.state_offsets[t - 1] : plan.state_offsets[t]]
            rows = zip(fed[t - 1], true.split(lengths), own[t - 2].split(lengths), strict=True)
            for seen, right, mine in rows:
                if torch.equal(right, mine):
                    continue
                told.append(torch.equal(seen, right))
                assert told[-1] or torch.equal(seen, mine)
    # Four standard deviations of a share.
    assert abs(np.mean(told) - truth) < 4 * (truth * (1 - truth) / len(told)) ** 0.5
    assert len(told) > 80


@pytest.mark.parametrize("truth", [1.0, 0.0])
def test_problems_without_rounds_are_in_no_iteration(truth: float) -> None:
    samples = mixed()
    first = samples.take(slice(0, 1))
    answered = replace(
        first, loops=first.loops * 0, rounds=first.rounds[:0], round_offsets=np.zeros(1, np.int64)
    )
    model = new_model(carry_state=True).double()
    alone, more = (
        PackedBatch.carried(s, TASKS, truth=truth)
        for s in (samples, Samples.concat([samples, answered]))
    )
    (rounds, answers), (same, others) = map(model.predict_rounds, (alone, more))
    assert all(map(torch.equal, rounds, same)) and torch.equal(answers, others[:-1])
    chains = [model.loss(batch).chain * len(batch) for batch in (alone, more)]
    assert_close("loss of the rounds", *chains, 2**-23)  # the weights are fp32
