"""The reading of chains as a graph: what is recorded of one batch reads the others as they are read
op by op."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.decoding import chain_reader, static_reading
from relay_fast.decoding._inference import inference
from relay_fast.decoding.chain_reader import MOST_GRAPHS, ChainReader, model_reason
from relay_fast.decoding.chains import (
    ChainLogProbs,
    generate_looped_chains,
    generate_scored,
    stream_order,
)
from relay_fast.decoding.reading import read_batch
from relay_fast.decoding.static_reading import StaticReading, capacity_of, prepare
from relay_fast.kernels.supports import Unsupported
from relay_fast.models.transformers import LoopedTransformer
from relay_fast.tasks import Samples
from relay_fast.tasks.vocabulary import PAD
from tests.support import fed_models
from tests.support.fed_models import TASKS
from tests.support.graph_models import KINDS, assert_same, batches, model_of, problems
from tests.support.host_copies import HostCopies
from tests.support.played_graphs import Played, Recording, played, tensors  # noqa: F401


@contextmanager
def nan_filled() -> Iterator[None]:
    """Fills what is allocated with NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_reads_every_batch_as_op_by_op(played: Played, kind: str, scored: bool) -> None:  # noqa: F811
    """One is recorded; the later ones are smaller, shorter, and end before it does."""
    model = model_of(kind)
    reader, reasons, pairs = ChainReader(model, TASKS, scored), [], []
    drawn = batches(8, 8, 7, 8, 7)
    largest = max(drawn, key=lambda own: int(own.problem_offsets[-1] * own.loops.max()))
    few = largest.take(np.flatnonzero(largest.loops < largest.loops.max()))
    with inference(model), nan_filled():
        for own in [largest, *drawn, few]:
            truth = read_batch(model, own, TASKS, scored)
            pairs.append((reader.read(own), truth))
            assert len(truth[0].rounds) > 20 and len(np.unique(np.diff(truth[0].round_offsets))) > 3
            reasons.append(reader.reason)
    for read, truth in pairs:  # not before: a later batch must not write into an earlier one
        assert_same(read, truth)
    assert reasons == ["the first batch of its size", "warming up", *[None] * 5]
    assert len(played.captures) == 1 and played.replays == [0] * 5


@pytest.mark.parametrize("kind", ["latent", "fed"])
def test_a_whole_call_is_read_by_few_graphs(played: Played, kind: str) -> None:  # noqa: F811
    model, many = model_of(kind), problems(24)
    truth = read_all(model, many)
    written, scores = generate_scored(model, many, TASKS, batch_tokens=40)
    assert_same((written, scores), truth)
    assert 0 < len(played.captures) <= 4 * MOST_GRAPHS and len(played.replays) > 2
    assert_same(
        (generate_looped_chains(model, many, TASKS, batch_tokens=40), None), (truth[0], None)
    )


def read_all(model: LoopedTransformer, many: Samples) -> tuple[Samples, ChainLogProbs]:
    """Op by op, each problem alone, in the caller's order."""
    with inference(model):
        alone = [read_batch(model, many.take([i]), TASKS, True) for i in range(len(many))]
    scores = [np.concatenate(parts) for parts in zip(*(own for _, own in alone), strict=True)]
    return Samples.concat([samples for samples, _ in alone]), ChainLogProbs(*scores)


@pytest.mark.parametrize("kind", ["latent", "fed"])
def test_a_graph_reads_in_the_precision_of_autocast(played: Played, kind: str) -> None:  # noqa: F811
    """Rounded alike: chains of bf16 that are as good as those of fp32 need not be equal to them."""
    model, many = model_of(kind), problems(12)
    reader = ChainReader(model, TASKS, False)
    with inference(model, "bf16"):
        for _ in range(3):
            own = many.take(stream_order(many))
            read, _ = reader.read(own)
        alike = read_batch(model, own, TASKS, False)[0]
    assert reader.reason is None and len(played.replays) == 1
    assert np.mean(read.round_offsets == alike.round_offsets) > 0.9
    dtypes = {t.dtype for op in played.captures[0].ops for t in tensors(op[3])}
    assert torch.bfloat16 in dtypes


def test_only_so_many_graphs_are_kept(played: Played) -> None:  # noqa: F811
    model = model_of("latent")
    reader = ChainReader(model, TASKS, False)
    with inference(model):
        for number in (1, 3, 9, 27, 40, 80):
            (own,) = batches(number, names=("lis",))
            assert_same(reader.read(own), read_batch(model, own, TASKS, False))
    assert len(reader._graphs) == MOST_GRAPHS


@pytest.mark.parametrize("kind", ["latent", "fed"])
def test_problems_without_rounds_and_of_one_token(played: Played, kind: str) -> None:  # noqa: F811
    model = model_of(kind)
    own = batches(6)[0]
    shortest = replace(
        own.take(slice(0, 1)), problem=own.problem[:1], problem_offsets=np.array([0, 1])
    )
    if kind == "latent":  # what a task says of a problem is not asked for
        own = Samples.concat([own, shortest])
        own = replace(own, loops=np.where(np.arange(len(own)) == 3, 0, own.loops))
        own = replace(own, rounds=own.rounds[:0], round_offsets=np.zeros(own.loops.sum() + 1, int))
        own = own.take(stream_order(own))
    reader = ChainReader(model, TASKS, True)
    with inference(model):
        for _ in range(3):
            assert_same(reader.read(own), read_batch(model, own, TASKS, True))
        assert reader.reason is None
        none = own.take(np.flatnonzero(own.loops == 0))
        assert len(none) == (kind == "latent")
        assert_same(reader.read(none), read_batch(model, none, TASKS, True))
    assert reader.reason == "no problem of the batch has a round"


def test_iterations_beyond_a_batch_feed_tokens_of_the_vocabulary() -> None:
    """The border of an edit distance's table grows with every iteration of the graph."""
    model, (own,) = model_of("fed"), batches(4, names=("edit_distance",))
    loaded, loops = prepare(model.config, own, TASKS), fed_models.VOCABULARY.size
    capacity = capacity_of(loaded, model.config)
    sizes = {name: getattr(capacity, name)[:1] * loops for name in ("rows", "active", "targets")}
    with inference(model):
        reading = StaticReading(model, replace(capacity, **sizes), loaded.moves, True)
        reading.load(loaded)
        reading.run()
        assert_same(
            reading.result(reading.fetch(), own, TASKS), read_batch(model, own, TASKS, True)
        )


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ["latent", "fed"])
def test_kernels_leave_dead_rows_out(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """In Triton's interpreter, over memory that is NaN: nothing of it comes through."""
    monkeypatch.setattr(chain_reader, "device_graph_reason", lambda _: None)
    monkeypatch.setattr(chain_reader, "on_side_stream", lambda body: body())
    monkeypatch.setattr(chain_reader, "captured", lambda body, *_: body)
    model, plain = model_of(kind, "triton", n_layers=1), model_of(kind, n_layers=1)
    larger, smaller = (TASKS["arithmetic"].sample(lengths, seed=0) for lengths in ([2, 2], [2, 1]))
    reader = ChainReader(model, TASKS, kind == "latent")
    reader._one_launch = lambda _: None  # the whole-loop kernel reads such small ones
    with inference(model), nan_filled():
        for own in (larger, larger, smaller):
            if reader._graphs:  # the first one is read op by op
                read = reader.read(own)
            else:
                reader._start_static(own)
    assert reader.reason is None
    with inference(plain):
        assert_same(read, read_batch(plain, smaller, TASKS, kind == "latent"))


def test_work_that_outlasts_its_launches_is_read_op_by_op() -> None:
    """By hand, at d 256: a layer has 12 · d² weights and five launches; in 25 µs a card does 1.5
    GFLOP in fp32 and 10 in bf16."""
    block = BlockConfig(256, 4, 3)
    model, bf16 = (LoopedTransformer(ModelConfig(block, 320)) for _ in range(2))
    (own,) = batches(4)
    rows = float(np.diff(own.problem_offsets) @ own.loops) / own.loops.max()
    a_row = 2 * 12 * 256 * 256 / 5  # FLOPs of a launch
    for module in bf16.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)
    for copies, expected in ((0.9 * 1.5e9, "no"), (1.1 * 1.5e9, "fp32"), (1.1 * 1e10, "both")):
        many = own.take(np.tile(np.arange(len(own)), round(copies / a_row / rows)))
        reasons = [chain_reader.batch_reason(m, many) for m in (model, bf16)]
        assert [r is not None for r in reasons] == [expected != "no", expected == "both"]
    assert reasons[0] == "the work of its launches takes longer than to launch them"
    fed = LoopedTransformer(ModelConfig(block, 320, feedback="tokens"))
    assert chain_reader.batch_reason(fed, many) is None


def reading_on_meta(kind: str, scored: bool = True) -> tuple[StaticReading, Samples]:
    model, (own,) = model_of(kind), batches(4)
    loaded = prepare(model.config, own, TASKS)
    capacity = capacity_of(loaded, model.config)
    reading = StaticReading(model.to("meta"), capacity, loaded.moves, scored)
    with HostCopies() as copies:
        reading.load(loaded)
    assert (copies.all, copies.blocking) == (1, 0), "one copy brings a batch"
    return reading, own


@pytest.mark.parametrize("kind", ["latent", "carried", "fed"])
def test_a_reading_neither_asks_the_host_nor_brings_anything_from_it(kind: str) -> None:
    """On meta tensors a read-back raises, and a tensor from the host is seen."""
    reading, _ = reading_on_meta(kind)
    with HostCopies() as copies, Recording() as recording:
        reading.run()
    assert copies.all == 0 and len(recording.ops) > 300


def test_what_cannot_be_captured_says_why(played: Played, monkeypatch) -> None:  # noqa: F811
    (own,), fed = batches(4), model_of("fed")

    def reason_of(model: LoopedTransformer, tasks=TASKS, count: int = 3) -> str | None:
        reader = ChainReader(model, tasks, False)
        with inference(model):
            for _ in range(count):
                assert_same(reader.read(own), read_batch(model, own, tasks, False))
        return reader.reason

    assert reason_of(fed) is None

    def fails(body, *_):
        raise RuntimeError("operation not permitted\n  when capturing")

    monkeypatch.setattr(chain_reader, "captured", fails)
    said = "the reading of a batch could not be captured: operation not permitted when capturing"
    with pytest.warns(UserWarning, match=f"{said}.*; chains are read without CUDA graphs"):
        reason = reason_of(fed)
    assert reason.startswith(f"{said} (at raise RuntimeError(")

    def refuses(self) -> None:
        raise Unsupported("the kernels do not support this")

    with monkeypatch.context() as patch:
        patch.setattr(StaticReading, "run", refuses)
        assert reason_of(fed) == "the kernels do not support this"
    with monkeypatch.context() as patch:
        patch.undo()
        patch.setattr(chain_reader, "device_graph_reason", static_device_reason)
        assert reason_of(fed) == "CUDA graphs need a CUDA device, the model is on 'cpu'"


static_device_reason = chain_reader.device_graph_reason


def test_a_model_that_is_more_than_its_weights_is_read_op_by_op() -> None:
    class Other(LoopedTransformer):
        pass

    assert model_reason(model_of("fed")) is None
    assert model_reason(Other(model_of("fed").config)) == (
        "Other may read in a way of its own: use a LoopedTransformer"
    )
    parts = ("block", "embedding", "fed_embedding", "block.layers.0.up", "chain_head", "norm")
    for name in parts:
        model = model_of("fed")
        model.get_submodule(name).register_forward_hook(lambda *_: None)
        reason = model_reason(model)
        assert name.split(".")[-1] in reason and reason.endswith("which a replay would not call")
    model = model_of("fed")
    model.embedding.forward = nn.Embedding.forward.__get__(model.embedding)
    assert "custom forward" in model_reason(model)
    model.predict_rounds = None
    assert model_reason(model) == "the model has a method predict_rounds of its own"


def test_rounds_that_outgrow_the_inputs_are_read_again(played: Played, monkeypatch) -> None:  # noqa: F811
    """A model that writes no boundary makes its inputs longer each time."""
    model, own = model_of("fed"), TASKS["arithmetic"].sample([6] * 6, 0)
    own = replace(own, rounds=own.rounds[:0], round_offsets=np.zeros(37, np.int64))
    own = own.take(stream_order(own))
    with torch.no_grad():
        model.chain_head.weight[PAD] = 0  # of the other logits some is positive
    monkeypatch.setattr(static_reading, "ROOM", 0.0)
    monkeypatch.setattr(static_reading, "ALIGN", 1)
    monkeypatch.setattr(static_reading, "_up", lambda size: size)
    reader = ChainReader(model, TASKS, True)
    with inference(model):
        for _ in range(3):
            read = reader.read(own)
        assert_same(read, read_batch(model, own, TASKS, True))
    assert reader.reason == "the model's rounds outgrew the inputs that they are fed to"
    shorter = own.take(slice(0, 3))  # as many tokens, but for the rows that the others had
    with inference(model):
        assert_same(reader.read(shorter), read_batch(model, shorter, TASKS, True))
    assert reader.reason is None, "a batch that fits is replayed"


def test_batches_whose_graphs_find_no_memory_are_read_without(
    played: Played,  # noqa: F811
    monkeypatch,
) -> None:
    model, (few, many) = model_of("latent"), batches(12, 60)
    most, tried = int(few.problem_offsets[-1]), []

    class Small(StaticReading):
        def __init__(self, model, capacity, *options):
            tried.append(capacity.rows[0])
            if capacity.rows[0] > 2 * most:
                raise torch.OutOfMemoryError("no room")
            super().__init__(model, capacity, *options)

    monkeypatch.setattr(chain_reader, "StaticReading", Small)
    reader, reasons = ChainReader(model, TASKS, True), []
    with inference(model):
        for batch in (few, few, few, many, many, many, few, few, few):
            assert_same(reader.read(batch), read_batch(model, batch, TASKS, True))
            reasons.append(reader.reason)
    of_few = ["the first batch of its size", "warming up", None]
    of_many = ["the first batch of its size", *2 * [chain_reader.TOO_MANY]]
    assert reasons == [*of_few, *of_many, *of_few], "the others' graphs left for op by op"
    assert sum(rows > 2 * most for rows in tried) == 1 and len(played.replays) > 1


def test_unknown_tokens_are_refused_in_the_models_words(played: Played) -> None:  # noqa: F811
    model = model_of("fed")
    model.config = replace(model.config, vocabulary_size=20)
    (own,) = batches(3, names=("arithmetic",))
    reader = ChainReader(model, TASKS, False)
    with inference(model), pytest.raises(ValueError, match="outside the model's vocabulary of 20"):
        reader.read(own)
