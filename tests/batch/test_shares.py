"""Shares of a batch: equal work, and losses and gradients that sum to the batch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from relay_fast.batch.packed import PackedBatch
from relay_fast.batch.shares import deal, share_of
from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.data.collate import (
    collate_autoregressive,
    collate_carried,
    collate_looped,
    collate_side_by_side,
)
from relay_fast.models.transformers import AutoregressiveTransformer, LoopedTransformer
from relay_fast.tasks import FeedbackDraws
from tests.support.fed_models import TASKS, VOCABULARY, mixed

D = 16
NOISY = {"dropout": 0.1, "state_noise": 0.1}


def kinds(samples):
    """A model and a batch of every kind, all random options on."""
    draws = {name: FeedbackDraws(pad_probability=0.5, pad_to=40) for name in TASKS}
    rng = np.random.default_rng(3)
    looped = collate_looped(samples, TASKS, extra_pad=np.arange(len(samples)) % 3)
    return {
        "looped": ({}, looped),
        "side_by_side": (
            {"feedback": "tokens", "feedback_noise": 0.2},
            collate_side_by_side(samples, TASKS, draws=draws, rng=rng, weighting="row"),
        ),
        "carried": (
            {"feedback": "tokens", "carry_state": True, "feedback_noise": 0.2},
            collate_carried(samples, TASKS, truth=0.5),
        ),
        "autoregressive": (None, collate_autoregressive(samples, TASKS)),
    }


def model_of(options, recompute="state"):
    torch.manual_seed(1)
    block = BlockConfig(D, 2, 1, causal=options is None, **NOISY)
    if options is None:
        model = AutoregressiveTransformer(ModelConfig(block, VOCABULARY.size))
    else:
        config = ModelConfig(block, VOCABULARY.size, **options)
        model = LoopedTransformer(config, recompute=recompute)
    return model.double().train()


def gradients(model, batches):
    """Loss and gradients of batches that all draw the same random numbers."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        torch.manual_seed(7)
        loss = model(batch).loss
        loss.backward()
        total += loss.item()
    drawn = torch.randint(2**31, ()).item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}, drawn


@pytest.mark.parametrize("kind", ["looped", "side_by_side", "carried", "autoregressive"])
@pytest.mark.parametrize("shares", [2, 3])
def test_shares_sum_to_the_batch(kind, shares):
    options, batch = kinds(mixed())[kind]
    model = model_of(options)
    whole, expected, after = gradients(model, [batch])
    parts = [share_of(batch, k, shares) for k in range(shares)]
    assert sum(len(part.targets) for part in parts) == len(batch.targets)
    total, found, drawn = gradients(model, parts)
    assert drawn == after  # a share draws as many random numbers as the batch
    assert total == pytest.approx(whole, abs=1e-12)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("recompute", ["none", "sqrt", "every:2", "last:1"])
def test_every_policy(recompute):
    options, batch = kinds(mixed())["looped"]
    model = model_of(options, recompute)
    _, expected, _ = gradients(model, [batch])
    _, found, _ = gradients(model, [share_of(batch, k, 2) for k in range(2)])
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["looped", "side_by_side", "carried", "autoregressive"])
def test_a_share_without_sequences(kind):
    options, batch = kinds(mixed(1).take(np.array([0])))[kind]
    shares = batch.plan.sequences + 1
    parts = [share_of(batch, k, shares) for k in range(shares)]
    assert min(part.plan.sequences for part in parts) == 0
    model = model_of(options)
    whole, expected, after = gradients(model, [batch])
    total, found, drawn = gradients(model, parts)
    assert drawn == after
    assert total == pytest.approx(whole, abs=1e-12)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12)


def test_micro_batches_draw_as_the_batch():
    """A share that is split into passes has the same dropout as in one pass."""
    from relay_fast.training import cuda_graph

    options, batch = kinds(mixed())["side_by_side"]
    model = model_of(options)
    found = []
    for tokens in (1 << 14, 60):
        parts = list(batch.parts(tokens))
        model.zero_grad()
        torch.manual_seed(7)
        cuda_graph.add_gradients(model, batch, None, tokens)
        found.append([p.grad.clone() for p in model.parameters()])
    assert len(parts) > 3
    for one, many in zip(*found, strict=True):
        torch.testing.assert_close(many, one, rtol=0, atol=1e-12)


def test_deal():
    assert [share.tolist() for share in deal([5, 1, 4, 2, 3], 2)] == [[0, 1, 3], [2, 4]]
    assert [share.tolist() for share in deal([0, 0], 3)] == [[0], [1], []]
    assert [share.tolist() for share in deal([], 2)] == [[], []]


def test_imbalance_of_the_papers_mix():
    """512 samples over 8 ranks: within 3 % of the mean, where dealing by number is not."""
    from relay_fast.relay.presets import load_preset
    from relay_fast.tasks import Samples
    from relay_fast.training.model_files import run_tasks

    config = load_preset("paper")
    _, tasks = run_tasks(config)
    rng = np.random.default_rng(0)
    worst = {"cost": 0.0, "number": 0.0}
    for step in range(5):
        parts = []
        for name, task in tasks.items():
            low, high = config["tasks"][name]["train"]
            parts.append(task.sample(rng.integers(low, high + 1, 171), seed=step))
        plan = collate_looped(Samples.concat(parts), tasks).plan
        costs = plan.lengths * plan.loops
        by_number = [np.arange(k, len(costs), 8) for k in range(8)]
        for name, shares in (("cost", deal(costs, 8)), ("number", by_number)):
            totals = np.array([costs[share].sum() for share in shares])
            worst[name] = max(worst[name], totals.max() / totals.mean() - 1)
    assert worst["cost"] <= 0.03
    assert worst["cost"] < worst["number"]


def test_a_whole_batch_is_its_only_share():
    batch: PackedBatch = kinds(mixed())["looped"][1]
    assert share_of(batch, 0, 1) is batch
