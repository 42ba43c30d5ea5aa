"""A batch takes one copy from the host to a device, which nothing waits for."""

from __future__ import annotations

import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.common import synthetic_batch, task_batch
from relay_fast.batch import transfer
from relay_fast.batch.capacity import Capacity, CapacityBatch
from relay_fast.batch.plan import Plan
from relay_fast.batch.transfer import BufferLayout, upload
from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.models.transformers import LoopedTransformer
from tests.support.host_copies import HostCopies

BATCH = synthetic_batch(np.array([3, 7, 1, 5]), np.array([1, 4, 3, 2]), 2, 40)
META = torch.device("meta")


def test_tensors_in_one_buffer() -> None:
    tensors = [
        torch.arange(3), torch.ones(2, 2), torch.tensor([True, False, True]), torch.zeros(0, 5),
        torch.arange(7, dtype=torch.int32), torch.tensor(2.5, dtype=torch.float64),
    ]  # fmt: skip
    layout = BufferLayout((t.shape, t.dtype) for t in tensors)
    buffer = layout.empty("cpu")
    assert buffer.shape == (32 + 16 + 16 + 0 + 32 + 16,)
    views = layout.views(buffer)
    for view, t in zip(views, tensors, strict=True):
        view.copy_(t)
        assert view.data_ptr() % min(16, view.element_size()) == 0
    for view, t in zip(views, tensors, strict=True):
        assert view.dtype == t.dtype and torch.equal(view, t)
    assert [(u.shape, u.dtype) for u in upload(tensors, META)] == [
        (t.shape, t.dtype) for t in tensors
    ]
    assert upload(tensors, "cpu")[0] is tensors[0]


def model_of(**options) -> LoopedTransformer:
    block = BlockConfig(16, 2, 1, dropout=0.1, state_noise=0.1, **options)
    return LoopedTransformer(ModelConfig(block, 40), impl="torch").to(META)


def test_a_batch_travels_in_one_copy_with_its_plan() -> None:
    carried, _ = task_batch("multitask", 3, 0, "cpu")
    for batch in (BATCH, carried):
        with HostCopies() as copies:
            moved = batch.to("meta")
            moved.plan.positions, moved.plan.cu_seqlens, moved.plan.last_rows, moved.plan.tokens  # noqa: B018
        assert (copies.all, copies.blocking) == (1, 0)
        assert moved.to("meta") is moved
        for name, t in batch._tensors().items():
            assert getattr(moved, name).shape == t.shape and getattr(moved, name).dtype == t.dtype


def test_a_step_of_a_static_batch_takes_one_copy() -> None:
    """Loading, loss, backward and clipping, with a graph's fixed shapes."""
    model, static = model_of(loop_norm="post"), CapacityBatch(Capacity.of([BATCH]), META)
    model.loss(static.batch)  # makes the table of the state noise
    with HostCopies() as copies:
        static.load(BATCH)
        model.loss(static.batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert (copies.all, copies.blocking) == (1, 0)


def test_moved_plans_are_those_of_before() -> None:
    plan = Plan([3, 1, 4], [1, 2, 2], positions=np.array([5, 6, 7, 0, 2, 3, 4, 5]))
    other = Plan([1, 4, 3], [2, 2, 1], positions=np.array([0, 2, 3, 4, 5, 5, 6, 7]))
    moved = plan.to("cpu")
    for name in ("positions", "cu_seqlens", "last_rows", "tokens"):
        assert torch.equal(getattr(moved, name), getattr(other, name)), name
    assert moved.to_sorted is None and moved.row_order is None


def test_a_batch_in_a_buffer_is_pickled_without_it() -> None:
    small, _ = task_batch("lis", 20, 0, "cpu")
    tensors = list(small._tensors().values())
    layout = BufferLayout((t.shape, t.dtype) for t in tensors)
    buffer = layout.empty("cpu")
    views = layout.views(buffer)
    for view, t in zip(views, tensors, strict=True):
        view.copy_(t)
    inside = replace(small, **dict(zip(small._tensors(), views, strict=True)))
    assert len(pickle.dumps(inside)) < 2 * len(pickle.dumps(small))
    twin = pickle.loads(pickle.dumps(inside))
    assert all(torch.equal(a, b) for a, b in zip(twin._tensors().values(), tensors, strict=True))


def test_on_cuda_the_copy_has_pinned_memory_and_a_stream_of_its_own(monkeypatch) -> None:
    """The order of calls, on stand-ins: the copy, then the current stream waits, then its claim."""
    calls: list[str] = []

    class Stream(SimpleNamespace):
        device_index = 0

        def wait_stream(self, other) -> None:
            calls.append(f"{self.name} waits for {other.name}")

    class Inside:
        def __init__(self, stream):
            calls.append(f"on {stream.name}")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            calls.append("back")

    class Host:
        def to(self, device, non_blocking):
            calls.append(f"to {device}, non_blocking={non_blocking}")
            return SimpleNamespace(record_stream=lambda s: calls.append(f"claimed by {s.name}"))

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(name="main"))
    monkeypatch.setattr(transfer, "_copy_stream", lambda index: Stream(name="side"))
    monkeypatch.setattr(torch.cuda, "stream", Inside)
    transfer.send(Host(), torch.device("cuda", 0))
    assert calls == [
        "on side", "to cuda:0, non_blocking=True", "back", "main waits for side", "claimed by main",
    ]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_batch_arrives_on_a_card() -> None:
    moved = BATCH.to("cuda")
    static = CapacityBatch(Capacity.of([BATCH]), "cuda")
    for batch in (BATCH, moved):
        static.load(batch)
        rows = len(BATCH.tokens)
        assert torch.equal(static.batch.tokens[:rows].cpu(), BATCH.tokens)
        assert torch.equal(static.plan.positions[:rows].cpu(), BATCH.plan.positions)
    for name, t in BATCH._tensors().items():
        assert torch.equal(getattr(moved, name).cpu(), t)
