"""Graphs of the reading of chains, when the model or the reader does not stay as it was."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from relay_fast.decoding import chain_reader
from relay_fast.decoding._inference import inference
from relay_fast.decoding.chain_reader import ChainReader
from relay_fast.decoding.reading import read_batch
from relay_fast.decoding.static_reading import StaticReading
from relay_fast.models.transformers import LoopedTransformer
from relay_fast.utils.cuda_graph import device_graph_reason
from tests.support.fed_models import TASKS
from tests.support.graph_models import assert_same, batches, model_of
from tests.support.played_graphs import Played, played  # noqa: F401


def new_weight(model: LoopedTransformer) -> None:
    model.chain_head.weight = nn.Parameter(model.chain_head.weight.flip(0))


def swapped_data(model: LoopedTransformer) -> None:
    model.embedding.weight.data = model.embedding.weight.data.flip(0).clone()


def computed_weight(model: LoopedTransformer) -> None:
    nn.utils.parametrizations.weight_norm(model.block.layers[0].up)
    with torch.no_grad():
        model.block.layers[0].up.parametrizations.weight.original0.mul_(3)


def other_dtype(model: LoopedTransformer) -> None:
    model.double()


@pytest.mark.parametrize("change", [new_weight, swapped_data, computed_weight, other_dtype])
def test_a_graph_is_dropped_with_the_memory_of_the_weights(played: Played, change) -> None:  # noqa: F811
    """Between two batches of a stream, a caller may swap weights; what he changes in place is read
    by the same graph."""
    model, (own,) = model_of("fed"), batches(6)
    reader = ChainReader(model, TASKS, False)
    with inference(model):
        for _ in range(3):
            first = reader.read(own)
        model.norm.weight.neg_()
        assert_same(before := reader.read(own), read_batch(model, own, TASKS, False))
        assert not np.array_equal(before[0].rounds, first[0].rounds)
    assert reader.reason is None and len(played.captures) == 1
    change(model)
    with inference(model):
        truth, reasons = read_batch(model, own, TASKS, False), []
        same = np.array_equal(truth[0].rounds, before[0].rounds)
        assert same == (change is other_dtype)
        for _ in range(3):
            assert_same(reader.read(own), truth)
            reasons.append(reader.reason)
    assert reasons == ["the first batch of its size", "warming up", None]
    assert len(played.captures) == 2


def test_a_device_is_asked_for_at_every_batch(played: Played, monkeypatch) -> None:  # noqa: F811
    """What a CPU does cannot be captured: a replay would bring the chains of an earlier batch."""
    model, (own,) = model_of("latent"), batches(4)
    reader = ChainReader(model, TASKS, False)
    with inference(model):
        reader.read(own)
        monkeypatch.setattr(chain_reader, "device_graph_reason", device_graph_reason)
        for _ in range(2):
            reader.read(own)
    assert reader.reason == "CUDA graphs need a CUDA device, the model is on 'cpu'"
    assert not played.captures


def test_a_batch_that_is_refused_is_no_warm_up(played: Played, monkeypatch) -> None:  # noqa: F811
    model, (own,) = model_of("latent"), batches(4)
    reader, reasons = ChainReader(model, TASKS, False), []
    with inference(model):
        reader.read(own)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(StaticReading, "load", interrupted)
            reader.read(own)
        for _ in range(2):
            reader.read(own)
            reasons.append(reader.reason)
    assert reasons == ["warming up", None]


def interrupted(self, loaded) -> None:
    raise KeyboardInterrupt


def test_graphs_and_their_buffers_go_with_the_reader(played: Played) -> None:  # noqa: F811
    """Without the collector of cycles, which may come late."""
    model, (own,) = model_of("fed"), batches(4)
    reader = ChainReader(model, TASKS, True)
    with inference(model):
        for _ in range(3):
            reader.read(own)
    (graph,) = reader._graphs.values()
    held = weakref.ref(graph.reading), weakref.ref(graph.replay)
    gc.disable()
    try:
        del reader, graph
        assert [ref() for ref in held] == [None, None]
    finally:
        gc.enable()


def test_a_sharded_model_is_read_op_by_op(monkeypatch) -> None:
    """Whole weights are in other memory at each call."""
    model = model_of("latent")
    monkeypatch.setattr(
        chain_reader, "shards", lambda modules: [m for m in modules if m is model.embedding]
    )
    said = "fully_shard gathers the model's weights in hooks, which a replay would not call"
    assert chain_reader.model_reason(model) == said
