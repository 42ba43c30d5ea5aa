"""Addition: every round against the school rule, and what an iteration with feedback sees."""

from __future__ import annotations

import numpy as np
import pytest

from relay_fast.tasks import Vocabulary, Written, build_tasks
from relay_fast.tasks.addition import Addition

TEXT = Addition()
VOCABULARY = Vocabulary(None, 16, (*TEXT.special_tokens(), *TEXT.tokens))
TASK = build_tasks(["addition"], VOCABULARY)["addition"]


def test_the_documented_example() -> None:
    rounds, answer = TEXT.solve("3 7 5 + 1 2 8 =")
    assert rounds == ["3 7 +1 1 2 = 3", "3 +1 1 = 0 3", "5 0 3"] and answer == "5 0 3"
    assert TEXT.solve("9 + 9") == (["1 8"], "1 8")


@pytest.mark.parametrize("length", [1, 2, 7, 30])
def test_each_round_adds_one_digit(length: int) -> None:
    samples = TASK.sample(np.full(60, length), seed=length)
    assert (samples.loops == length).all()
    for i in range(len(samples)):
        problem = TASK.decode(samples.problem_of(i)).replace(" ", "")
        first, second = problem.removesuffix("=").split("+")
        assert len(first) == len(second) == length
        for count, tokens in enumerate(samples.rounds_of(i), start=1):
            ending = int(first[-count:]) + int(second[-count:])
            carry, digits = divmod(ending, 10**count)
            left = "".join(first[:-count]), "".join(second[:-count])
            joined = f"{left[0]} {'+1' if carry else '+'} {left[1]} = {digits:0{count}d}"
            done = f"{ending:0{count}d}"
            wanted = done if count == length else joined
            assert TASK.decode(tokens).replace(" ", "") == wanted.replace(" ", "")
        total = f"{int(first) + int(second):0{length}d}"
        assert TASK.answer_text(samples.rounds_of(i), int(samples.answer[i])) == " ".join(total)


def test_solving_again_gives_the_same() -> None:
    samples = TASK.sample([1, 5, 9], seed=0)
    again = TASK.solve_samples(samples)
    assert np.array_equal(again.rounds, samples.rounds)
    assert np.array_equal(again.answer, samples.answer)
    assert [TASK.length_of(samples.problem_of(i)) for i in range(3)] == [1, 5, 9]


def test_an_iteration_sees_the_last_round_in_the_problems_place() -> None:
    samples = TASK.sample([3], seed=0)
    owner, before, written = np.zeros(3, np.int64), np.arange(3), Written.truth(samples)
    widths = TASK.input_sizes(written, owner, before)
    tokens, fed, positions, cuts = TASK.inputs(written, owner, before, widths)
    assert not fed.any() and positions is None and cuts is None
    seen = np.split(tokens, np.cumsum(widths)[:-1])
    shown = [samples.problem_of(0)[1:], *samples.rounds_of(0)[:-1]]
    for own, wanted in zip(seen, shown, strict=True):
        assert own[0] == TASK.token and not own[1 : len(own) - len(wanted)].any()
        assert own[len(own) - len(wanted) :].tolist() == wanted.tolist()
    assert widths.min() > np.diff(samples.round_offsets).max()  # the boundary fits


@pytest.mark.parametrize("problem", ["3 7 + 5", "3 7", "a + b", "3 + 4 + 5", ""])
def test_malformed_problems_are_refused(problem: str) -> None:
    with pytest.raises(ValueError, match="is malformed; write two numbers of as many digits"):
        TEXT.solve(problem)
