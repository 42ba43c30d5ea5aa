"""Streams of chains: where reading is started and waited for, the next batch is started before."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from relay_fast.decoding import chain_batches, static_reading
from relay_fast.decoding.chains import generate_looped_chains, stream_order, stream_scored
from relay_fast.decoding.reading import read_batch
from relay_fast.decoding.static_reading import StaticReading
from relay_fast.tasks import Samples
from relay_fast.tasks.vocabulary import PAD
from tests.support.fed_models import TASKS
from tests.support.graph_models import assert_same, model_of, problems
from tests.support.played_graphs import Played, played  # noqa: F401

DRAWN = TASKS["arithmetic"].sample([6] * 400, 0)
SIZES = np.diff(DRAWN.problem_offsets)
# As many tokens each, so that batches are of one capacity.
SIX = DRAWN.take(np.flatnonzero(SIZES == np.bincount(SIZES).argmax())[:48])


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What readers do over static buffers, in order."""
    seen: list[str] = []

    class Seen(StaticReading):
        def fetch(self):
            seen.append("started")
            return super().fetch()

        def result(self, *arguments):
            seen.append("waited for")
            return super().result(*arguments)

    monkeypatch.setattr("relay_fast.decoding.chain_reader.StaticReading", Seen)
    return seen


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["latent", "carried", "fed"])
def test_the_next_batch_is_started_before_one_is_waited_for(
    played: Played,  # noqa: F811
    events: list[str],
    kind: str,
) -> None:
    model, scored = model_of(kind), kind != "carried"
    tokens = int(SIX.problem_offsets[-1]) // 6
    parts, progress = [], []
    for part in stream_scored(
        model, SIX, TASKS, scored, batch_tokens=tokens, progress=lambda *done: progress.append(done)
    ):
        parts.append(part)
        events.append("yielded")
    assert len(parts) == 6 and played.replays == [0] * 4
    one = ["started", "waited for", "yielded"]
    # The first is read op by op, and yielded at once.
    assert events == ["yielded", "started", *4 * ["started", *one[1:]], *one[1:]]
    assert progress == [(8 * k, 48) for k in range(1, 7)]
    order = stream_order(SIX)
    for k, (chosen, *chains) in enumerate(parts):
        assert np.array_equal(chosen, order[8 * k : 8 * k + 8])
        with chain_batches.inference(model):
            assert_same(tuple(chains), read_batch(model, SIX.take(chosen), TASKS, scored))


@pytest.mark.parametrize("error", [ValueError, torch.OutOfMemoryError])
def test_a_batch_is_not_lost_to_the_next_ones_error(
    played: Played,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    error: type[Exception],
) -> None:
    model, seen = model_of("latent"), []

    class Failing(chain_batches.ChainBatch):
        def __init__(self, reader, problems, chosen, autocast):
            if len(seen) == 2:
                raise error("the fourth")
            super().__init__(reader, problems, chosen, autocast)

    monkeypatch.setattr("relay_fast.decoding.chains.ChainBatch", Failing)
    with pytest.raises(error, match="the fourth"):
        for _, samples, _ in stream_scored(
            model, SIX, TASKS, False, batch_tokens=int(SIX.problem_offsets[-1]) // 6
        ):
            seen.append(samples)
    assert len(seen) == 3


def test_a_stream_that_is_left_early_ends(played: Played) -> None:  # noqa: F811
    tokens = int(SIX.problem_offsets[-1]) // 6
    stream = stream_scored(model_of("latent"), SIX, TASKS, False, batch_tokens=tokens)
    assert [len(next(stream)[0]) for _ in range(3)] == [8, 8, 8]
    stream.close()
    assert next(stream, None) is None


@pytest.mark.parametrize("scored", [False, True])
def test_what_outgrew_a_graph_and_memory_is_read_in_parts(
    played: Played,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    scored: bool,
) -> None:
    """A model that writes no boundary makes its inputs longer each time."""
    model = model_of("fed")
    with torch.no_grad():
        model.chain_head.weight[PAD] = 0  # of the other logits some is positive
    for name, value in {"ROOM": 0.0, "ALIGN": 1, "_up": lambda size: size}.items():
        monkeypatch.setattr(static_reading, name, value)
    own = replace(SIX, rounds=SIX.rounds[:0], round_offsets=np.zeros_like(SIX.round_offsets))
    tokens = int(own.problem_offsets[-1]) // 4
    parts = list(stream_scored(model, own, TASKS, scored, batch_tokens=tokens))
    sizes: list[int] = []

    def small(model, problems: Samples, *options):
        if len(problems) > 5:
            raise torch.OutOfMemoryError("no room")
        sizes.append(len(problems))
        return read_batch(model, problems, *options)

    first = [True]

    def first_fits(model, problems: Samples, *options):
        if first.pop() if first else False:
            return read_batch(model, problems, *options)
        return small(model, problems, *options)

    monkeypatch.setattr("relay_fast.decoding.chain_reader.read_batch", first_fits)
    monkeypatch.setattr(chain_batches, "read_batch", small)
    again = list(stream_scored(model, own, TASKS, scored, batch_tokens=tokens))
    assert sizes == 3 * [3, 3, 3, 3]  # three batches of twelve outgrew what they were read over
    for (chosen, *chains), (other, *others) in zip(parts, again, strict=True):
        assert np.array_equal(chosen, other)
        assert_same(tuple(chains), tuple(others))


def test_on_a_cpu_nothing_is_started_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    model, many = model_of("latent"), problems(20)
    read, started = [], []

    class Counted(chain_batches.ChainBatch):
        def __init__(self, *arguments):
            started.append(1)
            super().__init__(*arguments)

    monkeypatch.setattr("relay_fast.decoding.chains.ChainBatch", Counted)
    stream = stream_scored(
        model, many, TASKS, False, batch_tokens=60, progress=lambda *done: read.append(done)
    )
    for k, _ in enumerate(stream, 1):
        assert len(read) == len(started) == k
    whole = generate_looped_chains(model, many, TASKS)
    assert len(read) > 3 and len(whole) == 60
