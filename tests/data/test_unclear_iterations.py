"""Tasks whose rounds no model that is fed them can learn are found before they are trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from relay_fast.data.feedback import unclear_iterations
from relay_fast.relay.context import Context
from relay_fast.relay.presets import load_preset, override
from relay_fast.relay.presets.own import resolved
from relay_fast.tasks import TextTask, Vocabulary, build_tasks, make_task
from relay_fast.tasks.addition import Addition
from tests.support.text_tasks import VOCABULARY, Folded, Parity, Reversal


class Step(TextTask):
    """The second round depends on a bit that the problem does not show."""

    name = "parity"

    def sample(self, length, rng):
        last = str(rng.integers(0, 2))
        return "0 1", ["0", last], last


def test_the_first_two_iterations_that_see_the_same_are_found() -> None:
    task = Parity().bound(VOCABULARY, 3)
    samples = task.sample([1, 2, 6, 6], seed=0)
    i, first, second = unclear_iterations(task, samples)
    rounds = [task.decode(r) for r in samples.rounds_of(i)]
    assert 0 < first < second, "before the first round there is nothing that could be equal"
    assert rounds[first - 1] == rounds[second - 1] and rounds[first] != rounds[second]
    # In problems of three bits it takes two equal rounds and then another one.
    for bits, unclear in (("0 0 1", True), ("1 0 1", True), ("0 1 0", False), ("1 1 1", False)):
        solved, answer = Parity().solve(bits)
        one = task._samples(np.array([3]), [task.encoded(bits, solved, answer)])
        assert (unclear_iterations(task, one) is not None) == unclear, bits


@pytest.mark.parametrize("text", [Reversal(), Folded(), Step()])
def test_what_can_be_learned_is_left_alone(text) -> None:
    task = text.bound(VOCABULARY, 3)
    assert unclear_iterations(task, task.sample([2, 5, 8, 8], seed=0)) is None


def test_the_package_s_own_tasks_are_clear() -> None:
    parameters = {
        "arithmetic": {"prime": 11},
        "edit_distance": {"letters": 4, "alphabet": [2, 4]},
        "lis": {"group": 3, "low": 0, "high": 49},
    }
    tasks = build_tasks(parameters, Vocabulary(63, 1), **parameters)
    vocabulary = Vocabulary(None, 8, ("[addition]", *Addition.tokens))
    tasks["addition"] = make_task("addition", vocabulary)
    for task in tasks.values():
        samples = task.sample(np.repeat([1, 3, 6, 9], 6), seed=0)
        assert unclear_iterations(task, samples) is None, task.name


def test_a_run_says_so_unless_its_model_carries_a_state() -> None:
    def notes(*values: str) -> list[str]:
        config = load_preset("cpu")
        config["tasks"] = {"parity": {"train": [1, 6], "test": [6, 7]}}
        config = resolved(override(config, values=values), [Parity()])
        return Context(Path(), config, "cpu", "torch").notes

    (note,) = notes()
    assert note.startswith("note: parity cannot be learned by a model that is fed its rounds: in ")
    assert "are '0' and '1', and the" in note or "are '1' and '0', and the" in note
    assert notes("model.looped.feedback=none") == []
    assert notes("model.looped.carry_state=true") == []
