"""What reading as a graph should take, and the rows that a card measures of it."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.card import readings
from benchmarks.card.device import Timer
from benchmarks.card.reading_prediction import (
    DEAD,
    TORCH,
    Reading,
    graph_seconds,
    inputs_of,
    kernels_of,
    page,
    taken,
)
from benchmarks.card.readings import DTYPES, drawn
from benchmarks.card.step_prediction import NODE, Group, Step
from benchmarks.chain_generation import QUICK_LONGEST
from relay_fast.decoding.chains import stream_order


def test_seconds_of_a_graph_by_hand() -> None:
    """The kernels' work on live rows; what they take over the capacity does not count."""
    static = Step({"mlp_fwd": Group(7, 9.0, 99.0), TORCH: Group(3, 0.5, 0.75)})
    live = kernels_of(Step({"mlp_fwd": Group(5, 1.0, 2.0), TORCH: Group(2, 8.0, 8.0)}))
    assert live == Group(5, 1.0, 2.0)
    floor, expected = graph_seconds(live, static)
    assert floor == pytest.approx(1.5 + 10 * NODE[0] + 7 * DEAD[0])
    assert expected == pytest.approx(2.75 + 10 * NODE[1] + 7 * DEAD[1])
    assert Reading(10, (1.0, 3.0), 1.0).chains(8) == (2.0, 4.0)
    assert Reading(10, (1.0, 4.0), 2.0).stream(8) == (2.0, 4.0)


def test_every_iteration_of_a_right_chain_is_an_input() -> None:
    problems = drawn(6, QUICK_LONGEST)
    assert np.array_equal(stream_order(problems), np.arange(6))
    batches = inputs_of(problems)
    assert [batch.plan.sequences for batch in batches] == [
        int((problems.loops > t).sum()) for t in range(problems.loops.max())
    ]


@pytest.mark.parametrize(
    ("feedback", "dtype", "number", "how"),
    [
        ("none", "bf16", 64, "graph"),
        ("none", "fp32", 512, "op by op"),
        ("tokens", "fp32", 512, "graph"),
    ],
)
def test_how_a_batch_is_read_is_what_the_prediction_says(feedback, dtype, number, how) -> None:
    assert taken(feedback, DTYPES[dtype], number) == how


def test_the_page_says_that_nothing_was_measured() -> None:
    text = page({"H200": [("latent",) + ("1",) * 13]})
    assert "**Predictions, none measured on a card.**" in text and "## H200" in text


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_card_measures_both_ways_in_turns() -> None:
    """Rehearsed in the interpreter, where nothing is captured and the row says so."""
    timer = Timer("cpu", least=1)
    units = readings.units(True, timer)
    assert [u.name for u in units] == ["readings/latent 4 fp32", "readings/fed 4 fp32"]
    op_by_op, graph, stream = units[1].run()
    assert [row["provider"] for row in (op_by_op, graph, stream)] == [
        "op by op", "graph", "stream of graphs",
    ]  # fmt: skip
    assert stream["note"] == graph["note"] and 0 < float(stream["times_graph"]) < 10
    assert op_by_op["note"] == "" and graph["times_graph"] == "1"
    assert graph["note"] == "CUDA graphs need a CUDA device, the model is on 'cpu'"
    assert {row["same_chains"] for row in (op_by_op, graph, stream)} == {"1.0000"}
    assert len(readings.units(False, timer)) == 12
