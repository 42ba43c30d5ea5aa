"""What training takes is told before it runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import relay_fast
from benchmarks.common import synthetic_batch
from relay_fast.batch.capacity import Capacity, CapacityBatch
from relay_fast.batch.packed import PackedBatch
from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.models.transformers import AutoregressiveTransformer, LoopedTransformer
from relay_fast.tasks import Samples
from relay_fast.training.cuda_graph import add_gradients
from relay_fast.training.memory import memory_estimate
from relay_fast.training.optim import make_optimizer
from tests.support.chain_models import TASKS, VOCABULARY, mixed_problems
from tests.support.fresh_python import run_fresh
from tests.support.memory import peak_bytes

LOOPED = ModelConfig(BlockConfig(32, 2, 2), VOCABULARY.size, 64)
SHARED = ModelConfig(
    BlockConfig(32, 4, 1, 2, norm="layer", bias=True, activation="swiglu", loop_norm="post"),
    VOCABULARY.size,
)
CAUSAL = ModelConfig(BlockConfig(32, 2, 2, causal=True), VOCABULARY.size, 200)


def long_batch() -> PackedBatch:
    loops = np.arange(40) % 12 + 1
    return synthetic_batch(np.arange(40) % 30 + 5, loops, 4, VOCABULARY.size, seed=0)


def measured(model: torch.nn.Module, batch: PackedBatch) -> int:
    step = lambda: model.loss(batch).loss.backward()
    step()  # fills the plan's caches
    model.zero_grad()
    return peak_bytes(step)


@pytest.mark.parametrize(
    ("config", "policy"),
    [(LOOPED, "none"), (LOOPED, "state"), (LOOPED, "sqrt"), (SHARED, "none"), (SHARED, "state")],
)
def test_a_looped_step_takes_what_is_estimated(config: ModelConfig, policy: str) -> None:
    batch = long_batch()
    estimate = memory_estimate(config, batch, policy, device="cpu")
    peak = measured(LoopedTransformer(config, recompute=policy), batch)
    assert estimate.step == pytest.approx(peak, rel=0.1)


def test_passes_over_parts_of_a_batch_take_no_more_for_more_samples() -> None:
    """Iterations that train side by side: four times as many take the memory of a pass, and their
    batch."""
    torch.manual_seed(0)
    model = LoopedTransformer(replace(LOOPED, feedback="tokens", max_tokens=200))

    def peak(copies: int, part_tokens: int | None) -> int:
        samples = Samples.concat([mixed_problems()] * copies)
        batch = PackedBatch.side_by_side(samples, TASKS)
        model.zero_grad()
        add_gradients(model, batch, None, part_tokens)  # gradients are there, as are the caches
        return peak_bytes(lambda: add_gradients(model, batch, None, part_tokens))

    few, many = (peak(copies, 400) for copies in (2, 8))
    assert many < 1.1 * few
    assert peak(8, None) > 10 * many, "what one pass would take"


def test_an_autoregressive_step_and_the_rest_of_training() -> None:
    batch = PackedBatch.autoregressive(mixed_problems(), TASKS)
    kind = AutoregressiveTransformer
    estimate = memory_estimate(CAUSAL, batch, "none", model=kind, device="cpu")
    model = kind(CAUSAL)
    assert estimate.step == pytest.approx(measured(model, batch), rel=0.1)
    assert estimate.weights == sum(p.nbytes for p in model.parameters())
    optimizer = make_optimizer(model, lr=1e-3)
    optimizer.step()
    moments = [t for s in optimizer.state.values() for t in s.values() if t.ndim]
    assert estimate.optimizer == sum(t.nbytes for t in moments)
    parts = (estimate.weights, estimate.optimizer, estimate.batch, estimate.step)
    assert estimate.total == sum(parts) and estimate.batch > batch.tokens.nbytes


def test_a_capacity_is_estimated_as_the_batch_that_holds_it() -> None:
    capacity = Capacity.of([long_batch()])
    estimate = relay_fast.memory_estimate(LOOPED.to_dict(), capacity, device="cpu")
    static = CapacityBatch(capacity, "cpu")
    static.load(long_batch())
    peak = measured(LoopedTransformer(LOOPED, impl="torch"), static.batch)
    assert estimate.step == pytest.approx(peak, rel=0.1)


def test_a_choice_is_not_estimated() -> None:
    with pytest.raises(ValueError, match="estimate one of the policies that it chooses from"):
        memory_estimate(LOOPED, long_batch(), "auto")
    with pytest.raises(ValueError, match="recompute policy 'half' is unknown"):
        memory_estimate(LOOPED, long_batch(), "half")


CARD = """
import torch
from relay_fast.tasks import Samples
from relay_fast.training.cuda_graph import add_gradients
from relay_fast.training.memory import memory_estimate
from tests.training.test_memory import LOOPED, long_batch
batch = long_batch()
sizes = [memory_estimate(LOOPED, batch, p, device="cuda").step for p in ("none", "state", "sqrt")]
half = memory_estimate(LOOPED, batch, "none", device="cuda", dtype=torch.bfloat16).step
assert half < sizes[0] and sizes == sorted(sizes, reverse=True), (half, sizes)
"""


def test_the_kernels_buffers_are_counted_without_a_card(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = run_fresh(CARD)
    assert done.returncode == 0, done.stderr
