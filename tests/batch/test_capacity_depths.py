"""Static batches of every depth that a capacity holds: loss and gradients of the batch itself, with
what is allocated and never written holding NaN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import interpreter
from benchmarks.common import synthetic_batch
from benchmarks.numerics import assert_close
from relay_fast.batch.capacity import Capacity, CapacityBatch
from relay_fast.batch.packed import PackedBatch
from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.models.transformers import LoopedTransformer

interpreter.mend()
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
VOCABULARY, DEPTH = 20, 3
LOOPS = [(a, b) for a in range(DEPTH + 1) for b in range(a + 1)]  # from (0, 0) to (3, 3)
RUNS = [  # every policy, and every norm between iterations
    ("none", "none"), ("none", "state"), ("pre", "state"), ("post", "none"), ("pre", "every:2"),
    ("post", "sqrt"), ("none", "last:1"), ("none", "budget:100000"),
]  # fmt: skip


def batch_of(loops: tuple[int, int]) -> PackedBatch:
    return synthetic_batch(np.array([3, 2]), np.array(loops), 2, VOCABULARY, seed=1)


CAPACITY = Capacity.of([batch_of((DEPTH, DEPTH))], slack=0.0)


def model_of(loop_norm: str, policy: str, impl: str) -> LoopedTransformer:
    torch.manual_seed(0)
    block = BlockConfig(8, 1, 1, d_hidden=16, loop_norm=loop_norm)
    model = LoopedTransformer(ModelConfig(block, VOCABULARY), recompute=policy, impl=impl)
    return model.double() if impl == "torch" else model


def results(model: LoopedTransformer, batch: PackedBatch) -> dict[str, Tensor]:
    model.zero_grad()
    losses = model.loss(batch)
    losses.loss.backward()
    found = {"loss": losses.loss.detach(), "chain": losses.chain, "answer": losses.answer}
    # Without a loop the batch itself has no use for the chain head.
    return found | {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()
    }


@cache
def truth(loop_norm: str, loops: tuple[int, int]) -> dict[str, Tensor]:
    return results(model_of(loop_norm, "state", "torch"), batch_of(loops))


@contextmanager
def memory_of_nan() -> Iterator[None]:
    """Everything that is allocated is filled with NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


def check(loop_norm: str, policy: str, impl: str, loops: tuple[int, int], bound: float) -> None:
    model = model_of(loop_norm, policy, impl)
    with memory_of_nan():
        static = CapacityBatch(CAPACITY, "cpu")
        static.load(batch_of(loops))
        value = results(model, static.batch)
    for name, expected in truth(loop_norm, loops).items():
        assert_close(f"{loops}: {name}", value[name], expected, bound)


@pytest.mark.parametrize(("loop_norm", "policy"), RUNS)
def test_torch(loop_norm: str, policy: str) -> None:
    for loops in LOOPS:
        check(loop_norm, policy, "torch", loops, 1e-12)


@pytest.mark.parametrize("loops", LOOPS, ids=str)
def test_kernels(loops: tuple[int, int]) -> None:
    check("none", "state", "triton", loops, 1e-5)


@pytest.mark.parametrize(("loop_norm", "policy"), RUNS)
def test_kernels_with_every_policy(loop_norm: str, policy: str) -> None:
    """One sequence is over early, and the last iteration has none."""
    check(loop_norm, policy, "triton", (2, 1), 1e-5)
