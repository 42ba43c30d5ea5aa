"""In 16 bits the weight gradients of several iterations are taken together: the same sums, the same
bits under every policy, and nothing of dead rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import relay_fast
from benchmarks import interpreter
from benchmarks.common import synthetic_batch
from benchmarks.numerics import assert_bitwise, describe, rms_ratio
from relay_fast.batch.capacity import Capacity, CapacityBatch
from relay_fast.batch.packed import PackedBatch
from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.engine.block_iteration import BlockIteration
from relay_fast.models.transformers import LoopedTransformer
from relay_fast.ops import gradients as module
from relay_fast.ops.gradients import GradientBuffers
from tests.support.kernel_checks import DEVICE

interpreter.mend()
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
OPTIONS = {"bias": True, "injection": "add", "max_loops": 4, "loop_norm": "post"}


def batch_of(lengths, loops) -> PackedBatch:
    return synthetic_batch(np.array(lengths), np.array(loops), 1, 40, seed=1).to(DEVICE)


BATCH = ([3, 1, 4], [3, 2, 1])  # one token, and loops that differ


def gradients(batch: PackedBatch, policy: str = "state", **options) -> dict[str, Tensor]:
    torch.manual_seed(0)
    block = BlockConfig(16, 1, 1, d_hidden=16, **options)
    model = LoopedTransformer(ModelConfig(block, 40), recompute=policy, impl="triton").to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        losses = model.loss(batch)
    losses.loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def agree(values: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    assert values.keys() == truth.keys()
    for name, t in truth.items():
        same = rms_ratio(values[name], t) <= 1e-5 if t.any() else not values[name].any()
        assert same, describe(name, values[name], t)


@pytest.fixture
def alone(monkeypatch) -> dict[str, Tensor]:
    """The gradients where each iteration's are taken by themselves."""
    with monkeypatch.context() as patch:
        own = BlockIteration.__init__

        def ungrouped(self, *args, **options):
            own(self, *args, **options)
            self.keeps_operands = False

        patch.setattr(BlockIteration, "__init__", ungrouped)
        return gradients(batch_of(*BATCH), **OPTIONS)


def test_together_or_alone(alone, monkeypatch) -> None:
    seen: list[int] = []
    add = GradientBuffers._add

    def watched(self, index, operands):
        seen.append(len(operands))
        add(self, index, operands)

    monkeypatch.setattr(GradientBuffers, "_add", watched)
    values = gradients(batch_of(*BATCH), **OPTIONS)
    agree(values, alone)
    # Four weights of three iterations, and the head: its rows are read out in one call.
    assert sorted(seen) == [1] * (len(seen) - 4) + [3] * 4 and len(seen) >= 5
    monkeypatch.setattr(module, "SUMS_BYTES", 0)  # no partial sums stay
    agree(gradients(batch_of(*BATCH), **OPTIONS), alone)


@pytest.mark.parametrize("policy", ["none", "every:2", "last:1"])
def test_every_policy_gives_the_same_bits(policy: str, monkeypatch) -> None:
    monkeypatch.setattr("relay_fast.engine.loop.GROUP_ROWS", 9)  # more than one group
    truth = gradients(batch_of(*BATCH))
    for name, value in gradients(batch_of(*BATCH), policy).items():
        assert_bitwise(name, value, truth[name])


def test_static_batches_of_nan(alone) -> None:
    """What a kernel does not write stays NaN here, and none of it comes through."""
    static = CapacityBatch(Capacity.of([batch_of([3, 2, 4], [4, 2, 2])], 0.5), DEVICE)
    static.load(batch_of(*BATCH))
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is allocated with NaN
    try:
        values = gradients(static.batch, "none", **OPTIONS)
    finally:
        torch.use_deterministic_algorithms(False)
    agree(values, alone)


def test_empty_sequences_and_gradients_of_what_is_injected(monkeypatch) -> None:
    """Into the input, which is injected, and the loop embedding."""

    def run(keeps: bool) -> list[Tensor]:
        torch.manual_seed(0)
        block = relay_fast.LoopedBlock(16, 1, 1, injection="add", max_loops=3, impl="triton")
        block, x = block.to(DEVICE), torch.randn(6, 16, device=DEVICE, requires_grad=True)
        cu = torch.tensor([0, 3, 3, 4, 6], device=DEVICE)
        own = BlockIteration.__init__

        def chosen(self, *args, **options):
            own(self, *args, **options)
            self.keeps_operands = self.keeps_operands and keeps

        with monkeypatch.context() as patch, torch.autocast(DEVICE, torch.bfloat16):
            patch.setattr(BlockIteration, "__init__", chosen)
            block(x, loops=torch.tensor([2, 3, 3, 0]), cu_seqlens=cu).square().sum().backward()
        return [x.grad, *(p.grad for p in block.parameters())]

    for i, (value, t) in enumerate(zip(run(True), run(False), strict=True)):
        assert rms_ratio(value, t) <= 1e-5, i
