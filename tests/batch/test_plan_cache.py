"""The same lengths and loops are planned once, and nothing of them is copied again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import relay_fast
from relay_fast.batch import plan_cache
from relay_fast.batch.plan import Plan
from relay_fast.batch.plan_cache import cached_plan
from relay_fast.functional import attention
from tests.support.host_copies import HostCopies

CPU = torch.device("cpu")


@pytest.fixture
def made(monkeypatch) -> list[Plan]:
    """The plans that are made."""
    plan_cache._plan.cache_clear()
    plans: list[Plan] = []

    def make(*args) -> Plan:
        plans.append(Plan(*args))
        return plans[-1]

    monkeypatch.setattr(plan_cache, "Plan", make)
    yield plans
    plan_cache._plan.cache_clear()


def test_equal_values_are_one_plan(made: list[Plan]) -> None:
    lengths, loops = np.array([3, 1]), np.array([1, 2])
    first = cached_plan(lengths, loops, CPU)
    assert cached_plan(lengths.astype(np.int32), loops.copy(), CPU) is first
    at = np.array([7, 8, 9, 0])
    others = [
        cached_plan(np.array([2, 2]), loops, CPU),
        cached_plan(lengths, np.array([2, 2]), CPU),
        cached_plan(lengths, loops, torch.device("meta")),
        cached_plan(lengths, loops, CPU, at),
    ]
    assert len({id(plan) for plan in (first, *others)}) == len(made) == 5
    assert others[-1].positions.tolist() == [0, 7, 8, 9]
    at[0] = 3
    assert cached_plan(lengths, loops, CPU, at).positions.tolist() == [0, 3, 8, 9]
    lengths[0] = 2  # the caller's array is not the plan's
    assert first.lengths.tolist() == [1, 3]


def test_a_block_called_again_copies_nothing(made: list[Plan]) -> None:
    block = relay_fast.LoopedBlock(16, 2, 1, impl="torch", causal=True).to("meta")
    x = torch.empty(9, 16, device="meta")

    def call(loops) -> HostCopies:
        with HostCopies() as copies:
            states = block(x, loops, cu_seqlens=[0, 4, 4, 9], return_states=True)
            sum(s.sum() for s in states).backward()
        return copies

    first, second = call([1, 2, 3]), call([1, 2, 3])
    assert first.all > 0 == first.blocking
    assert second.all == 0 and len(made) == 1
    assert call([3, 2, 1]).all > 0 and len(made) == 2


def test_a_module_called_again_copies_nothing(made: list[Plan]) -> None:
    module, x = torch.nn.Linear(4, 4), torch.randn(3, 4)
    outputs = [relay_fast.loop(module, x, loops=[1, 3, 2]) for _ in range(2)]
    assert torch.equal(*outputs) and len(made) == 1


def test_offsets_on_a_device_are_read_once(monkeypatch) -> None:
    """`cpu` copies, as it does from a device."""
    reads: list[int] = []
    plain = Tensor.cpu

    def cpu(t: Tensor) -> Tensor:
        reads.append(t.data_ptr())
        return plain(t).clone()

    monkeypatch.setattr(Tensor, "cpu", cpu)
    qkv, offsets = torch.randn(5, 24, requires_grad=True), torch.tensor([0, 2, 5])
    attention(qkv, offsets, 2).sum().backward()
    assert reads.count(offsets.data_ptr()) == 1
    assert qkv.grad.abs().sum() > 0
