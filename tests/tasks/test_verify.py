"""Many chains at once are judged as each by itself."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from relay_fast.tasks import NO_ANSWER, TASK_NAMES, Samples, Vocabulary, build_tasks
from relay_fast.tasks.verify import verify_chains
from relay_fast.tasks.vocabulary import COMMA, EQUALS, NUMBER0, PAD, SEP

TASKS = build_tasks(
    TASK_NAMES,
    Vocabulary(max_number=60, multiple=64),
    arithmetic={"prime": 5},
    lis={"group": 4, "high": 60},
)
# Delimiters, numbers, and an id that only pads the vocabulary.
ODD = np.array([EQUALS, SEP, COMMA, PAD, NUMBER0, NUMBER0 + 3, NUMBER0 + 60, NUMBER0 + 61])


def problems(number: int = 40) -> Samples:
    rng = np.random.default_rng(0)
    parts = [task.sample(rng.integers(1, 9, number), 0) for task in TASKS.values()]
    return Samples.concat(parts).take(rng.permutation(3 * number))


def spoiled(truth: Samples, rng: np.random.Generator) -> Samples:
    """Other tokens, answers, round boundaries and numbers of rounds here and there."""
    rounds, offsets, answer = truth.rounds.copy(), truth.round_offsets.copy(), truth.answer.copy()
    ends = offsets[1:] - 1 - rng.integers(0, 3, len(offsets) - 1)
    ends = rng.choice(np.maximum(ends, 0), 15)
    rounds[ends] = rng.choice(ODD, len(ends))
    answer[rng.integers(0, len(answer), 4)] += 1
    answer[rng.integers(0, len(answer), 4)] = NO_ANSWER
    inner = rng.choice(np.arange(1, len(offsets) - 1), 8)
    offsets[inner] = rng.integers(offsets[inner - 1], offsets[inner] + 1)
    offsets = np.maximum.accumulate(offsets)
    # A sample gives its last round to the next, which may be of another task.
    loops = truth.loops.copy()
    giver = rng.integers(0, len(loops) - 1, 5)
    for i in giver[loops[giver] > 0]:
        given = rng.integers(1, loops[i] + 1)
        loops[i] -= given
        loops[i + 1] += given
    return replace(truth, rounds=rounds, round_offsets=offsets, answer=answer, loops=loops)


def one_by_one(written: Samples, verify: str) -> list[bool]:
    passed = []
    for i in range(len(written)):
        task, rounds = TASKS[TASK_NAMES[written.task[i]]], written.rounds_of(i)
        right = task.answer_of(rounds) == written.answer[i]
        if verify == "task":
            right = right and all(task.check(written.problem_of(i), rounds))
        passed.append(bool(right))
    return passed


@pytest.mark.parametrize("case", range(20))
def test_all_at_once_is_one_by_one(case):
    written = spoiled(problems(), np.random.default_rng(case))
    for verify in ("self", "task"):
        expected = one_by_one(written, verify)
        assert 0 < sum(expected) < len(expected)
        assert verify_chains(written, TASKS, verify).tolist() == expected
    assert verify_chains(written, TASKS, None).all()
    unread = 0
    for k, name in enumerate(TASK_NAMES):
        own = written.take(written.task == k)
        answers = TASKS[name].answers_of(own)
        each = [TASKS[name].answer_of(own.rounds_of(i)) for i in range(len(own))]
        assert answers.tolist() == [NO_ANSWER if a is None else a for a in each]
        assert answers.dtype == np.int32
        unread += each.count(None)
    assert unread, "the case should hold some"


def test_solved_samples_are_the_samplers():
    everything = problems()
    for k, name in enumerate(TASK_NAMES):
        own = everything.take(everything.task == k)
        empty = replace(
            own,
            rounds=own.rounds[:0],
            round_offsets=np.zeros(len(own) + 1, np.int64),
            loops=np.ones_like(own.loops),
            answer=np.zeros_like(own.answer),
        )
        solved = TASKS[name].solve_samples(empty)
        for field in fields(Samples):
            value, truth = getattr(solved, field.name), getattr(own, field.name)
            assert np.array_equal(value, truth) and value.dtype == truth.dtype, field.name


def test_nothing_to_verify():
    none = problems().take(slice(0, 0))
    for verify in ("self", "task", None):
        assert verify_chains(none, TASKS, verify).shape == (0,)
    for task in TASKS.values():
        assert len(task.answers_of(none)) == 0 and len(task.solve_samples(none)) == 0


def test_what_is_no_problem_is_refused():
    task = TASKS["arithmetic"]
    written = task.sample([1, 2], 0)
    written.problem[-2] = EQUALS  # its answer is still the one that the rounds imply
    with pytest.raises(ValueError, match="arithmetic problem .* does not fit at position"):
        verify_chains(written, TASKS, "task")
    assert verify_chains(written, TASKS, "self").all()
    with pytest.raises(ValueError, match='verify = .truth. is unknown: use "task", "self" or None'):
        verify_chains(written, TASKS, "truth")
