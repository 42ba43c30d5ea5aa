"""`recompute="auto"`: the first policy, in the documented order, that fits the free memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.numerics import assert_bitwise
from relay_fast.batch.plan import Plan
from relay_fast.config import BlockConfig
from relay_fast.engine import auto_policy
from relay_fast.engine.auto_policy import ORDER, inside_row_bytes, policy_bytes
from relay_fast.engine.loop import forward_pass, run_loop
from relay_fast.engine.module_loop import loop
from relay_fast.engine.recompute import RecomputePolicy
from relay_fast.models.looped_block import LoopedBlock
from tests.support.memory import peak_bytes

LENGTHS, LOOPS = [5, 4, 3], [9, 6, 2]
CONFIGS = [
    BlockConfig(16, 2, 2),
    BlockConfig(16, 2, 1, activation="swiglu", norm="layer", bias=True, loop_norm="post"),
    BlockConfig(16, 2, 2, loop_norm="pre"),
    BlockConfig(16, 4, 1, d_hidden=40, injection="add"),
    BlockConfig(16, 4, 2, head_dim=6, qk_norm=True, sandwich_norm=True),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_what_an_iteration_keeps_is_counted_to_the_byte(config: BlockConfig) -> None:
    block, plan = LoopedBlock(config=config, recompute="none"), Plan(LENGTHS, LOOPS)
    x = torch.randn(plan.rows, 16)
    with torch.no_grad():
        done = forward_pass(block.run(plan), x, list(block.parameters()), keep=True)
    states = {t.untyped_storage().data_ptr() for t in (x, *done.kept.values(), done.outputs[0])}
    inside = {
        t.untyped_storage().data_ptr(): t.nbytes
        for t in done.saved
        if t is not None and t.untyped_storage().data_ptr() not in states
    }
    row = inside_row_bytes(config, torch.float32, torch.float32)
    assert sum(inside.values()) == plan.token_iterations * row


def test_policies_are_counted_by_what_they_keep() -> None:
    plan = Plan([2, 1], [9, 3])  # 3 rows for 3 iterations, then 2 for 6
    beside = 3 * 100 + 4 * 3 * 10  # the backward of the largest iteration, four states
    count = lambda text: policy_bytes(RecomputePolicy.parse(text), plan, 10, 100) - beside
    assert count("none") == (3 * 3 + 5 * 2) * 10 + (3 * 3 + 6 * 2) * 100
    assert count("state") == (3 * 3 + 5 * 2) * 10 + 3 * 100
    assert count("every:3") == (3 + 2) * 10 + 3 * 100 + 2 * 3 * 10


def test_the_first_in_order_that_fits_is_taken(monkeypatch) -> None:
    plan, config = Plan([40] * 4, [16] * 4), CONFIGS[0]
    block = LoopedBlock(config=config, recompute="auto")
    x, parameters = torch.randn(plan.rows, 16), list(block.parameters())
    inside = inside_row_bytes(config, torch.float32, torch.float32)
    gradients = sum(p.nbytes for p in parameters)
    need = lambda text: gradients + policy_bytes(RecomputePolicy.parse(text), plan, 64, inside)
    sizes = [need(text) for text in ORDER]
    assert sizes[0] > sizes[1] > sizes[2]

    def chosen(free: int | None) -> RecomputePolicy:
        monkeypatch.setattr(auto_policy, "free_bytes", lambda device: free)
        auto_policy._chosen.clear()
        return auto_policy.choose_policy(block.run(plan), x, parameters).policy

    for text, size in zip(ORDER[:3], sizes[:3], strict=True):
        enough = int(size / auto_policy.SHARE) + 1
        assert chosen(enough) == RecomputePolicy.parse(text)
        assert chosen(enough - 2) != RecomputePolicy.parse(text)
    assert need(ORDER[sizes.index(min(sizes))]) == need("sqrt") or chosen(0).kind == "every"
    assert chosen(None) == RecomputePolicy("state")
    # A plan keeps its policy.
    monkeypatch.setattr(auto_policy, "free_bytes", lambda device: 1 << 40)
    assert auto_policy.choose_policy(block.run(plan), x, parameters).policy.kind == "state"


@pytest.mark.parametrize("policy", ["none", "state", "sqrt"])
def test_no_more_is_taken_than_counted(policy: str) -> None:
    config, plan = BlockConfig(32, 2, 2), Plan(np.full(40, 24), np.full(40, 9))
    block = LoopedBlock(config=config, recompute=policy)
    x = torch.randn(plan.rows, 32, requires_grad=True)
    offsets = torch.tensor(plan.offsets)
    step = lambda: block(x, loops=9, cu_seqlens=offsets).sum().backward()
    step()
    block.zero_grad()
    x.grad = None
    inside = inside_row_bytes(config, torch.float32, torch.float32)
    counted = policy_bytes(RecomputePolicy.parse(policy), plan, 128, inside)
    counted += sum(p.nbytes for p in block.parameters())
    assert 0.5 * counted < peak_bytes(step) <= counted


def test_gradients_are_those_of_the_chosen_policy(monkeypatch) -> None:
    x = torch.randn(12, 16)
    results = {}
    for policy, free in (("none", 0), ("auto", 1 << 40), ("auto", 1)):
        monkeypatch.setattr(auto_policy, "free_bytes", lambda device, free=free: free)
        torch.manual_seed(0)
        block = LoopedBlock(config=CONFIGS[0], recompute=policy)
        out = block(x, loops=LOOPS, cu_seqlens=[0, 5, 9, 12])
        out.sum().backward()
        results[policy, free] = [out.detach(), *(p.grad for p in block.parameters())]
    expected = results["none", 0]
    for found in results.values():
        for a, b in zip(found, expected, strict=True):
            assert_bitwise("auto", a, b)


def test_around_any_module_it_begins_at_state(monkeypatch) -> None:
    monkeypatch.setattr(auto_policy, "free_bytes", lambda device: 1 << 40)
    module, x = torch.nn.Linear(8, 8), torch.randn(3, 8)
    found = []
    real = auto_policy.choose_policy

    def choose(spec, *rest):
        found.append(real(spec, *rest).policy.kind)
        return real(spec, *rest)

    monkeypatch.setattr("relay_fast.engine.loop.choose_policy", choose)
    loop(module, x, 4, recompute="auto").sum().backward()
    assert found == ["state"] and module.weight.grad is not None


def test_parts_that_are_called_begin_at_state(monkeypatch) -> None:
    """Also on a plan that another block has used."""
    monkeypatch.setattr(auto_policy, "free_bytes", lambda device: 1 << 40)
    results, plan, x = {}, Plan([5, 4, 3], [9, 6, 2]), torch.randn(12, 16, requires_grad=True)
    for policy in ("none", "auto"):
        torch.manual_seed(0)
        block = LoopedBlock(config=CONFIGS[0], recompute=policy)
        run_loop(block.run(plan), x, list(block.parameters()))  # its plain parts take "none"
        block.layers[0].up.register_forward_hook(lambda part, given, out: 2 * out)
        weights = block.weights()
        final = run_loop(block.run(plan, weights), x, weights.tensors)[0]
        inputs = [x, *block.parameters()]
        results[policy] = [final.detach(), *torch.autograd.grad(final.sum(), inputs)]
    for found, expected in zip(results["auto"], results["none"], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
