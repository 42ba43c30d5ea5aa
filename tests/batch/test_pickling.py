"""What a user keeps can be pickled, saved and copied, after it was used too."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from relay_fast import (
    AutoregressiveTransformer,
    IterationCrossEntropy,
    LoopedBlock,
    LoopedClassifier,
    LoopedTransformer,
    PackedBatch,
    Plan,
)
from relay_fast.batch.capacity import Capacity, CapacityBatch
from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.tasks import Vocabulary, build_tasks

VOCABULARY = Vocabulary()
TASKS = build_tasks(["arithmetic"], VOCABULARY)
CAUSAL = BlockConfig(d_model=8, n_heads=2, n_layers=1, causal=True)


def pickled(value):
    return pickle.loads(pickle.dumps(value))


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = pytest.mark.parametrize("carry", [pickled, copy.deepcopy, saved])


def make_model(kind: str):
    torch.manual_seed(0)
    cls = LoopedTransformer if kind == "looped" else AutoregressiveTransformer
    return cls(ModelConfig(CAUSAL, VOCABULARY.size))


def make_batch(kind: str) -> PackedBatch:
    samples = TASKS["arithmetic"].sample(np.array([2, 3, 4]), 0)
    return getattr(PackedBatch, kind)(samples, TASKS)


@WAYS
@pytest.mark.parametrize("kind", ["looped", "autoregressive"])
def test_used_batches_and_models(kind, carry) -> None:
    model, batch = make_model(kind), make_batch(kind)
    model.loss(batch).loss.backward()
    wanted = [p.grad for p in model.parameters()]
    model.zero_grad()
    twin, twin_batch = carry(model), carry(batch)
    assert torch.equal(twin_batch.tokens, batch.tokens)
    assert twin_batch.plan.active_rows == batch.plan.active_rows
    twin.loss(twin_batch).loss.backward()
    for p, g in zip(twin.parameters(), wanted, strict=True):
        assert torch.equal(p.grad, g)


@WAYS
def test_a_used_static_batch(carry) -> None:
    model, batch = make_model("looped"), make_batch("looped")
    static = CapacityBatch(Capacity.of([batch]), "cpu")
    static.load(batch)
    wanted = model.loss(static.batch).loss
    assert torch.equal(model.loss(carry(static).batch).loss, wanted)


@WAYS
@pytest.mark.parametrize("kind", ["block", "classifier", "loss"])
def test_used_modules(kind, carry) -> None:
    torch.manual_seed(0)
    tokens, rows = torch.arange(6).view(2, 3), torch.tensor([2, 5])
    makers: dict[str, tuple[nn.Module, tuple]] = {
        "block": (LoopedBlock(config=CAUSAL), (torch.randn(2, 3, 8), [1, 2])),
        "classifier": (LoopedClassifier(CAUSAL, 11, loops=2, prelude=1), (tokens,)),
        "loss": (IterationCrossEntropy(8, 11), (torch.randn(6, 8), rows, torch.tensor([3, 4]))),
    }
    module, inputs = makers[kind]
    first = lambda out: out if isinstance(out, Tensor) else out.loss
    wanted = first(module(*inputs))
    wanted.sum().backward()
    assert torch.equal(first(carry(module)(*inputs)), wanted)
    # What torch.compile wraps is still the module.
    compiled = torch.compile(module, backend="eager")
    assert torch.equal(first(carry(compiled._orig_mod)(*inputs)), wanted)


def test_a_dropped_batch_is_freed_at_once() -> None:
    model, batch = make_model("looped"), make_batch("looped")
    gc.collect()
    gc.disable()
    try:
        model.loss(batch).loss.backward()
        plan = weakref.ref(batch.plan)
        del batch
        assert plan() is None
    finally:
        gc.enable()


def test_a_used_plan_pads_as_before() -> None:
    plan = Plan([3, 1, 4], [2, 2, 1])
    before = plan.layout(0, 2)
    twin, fresh = pickled(plan), pickled(Plan([3, 1, 4], [2, 2, 1]))
    for other in (twin, fresh):
        after = other.layout(0, 2)
        assert after.slots == before.slots and torch.equal(after.cu_seqlens, before.cu_seqlens)
        assert (after.slot is None) == (before.slot is None)
        if after.slot is not None:
            assert torch.equal(after.slot, before.slot)


def test_batches_pin_their_memory(monkeypatch) -> None:
    pinned = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda t: pinned.append(t) or t.clone())
    batch = make_batch("looped")
    other = batch.pin_memory()
    assert len(pinned) == 6 and len(other) == len(batch)
    assert torch.equal(other.tokens, batch.tokens) and other.plan is batch.plan
