"""What holds for every task."""

import dataclasses

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay_fast.tasks import TASK_NAMES, Samples, Vocabulary, build_tasks, make_task
from relay_fast.tasks.vocabulary import NUMBER0
from tests.support.fresh_python import run_fresh

VOCABULARY = Vocabulary()
TASKS = build_tasks(TASK_NAMES, VOCABULARY)
# The smallest, an odd one, the paper's training and test ends.
LENGTHS = {
    "arithmetic": [1, 2, 3, 7, 15, 25],
    "edit_distance": [1, 2, 3, 4, 13, 30, 40],
    "lis": [1, 2, 3, 9, 10, 11, 100, 101, 120, 124],
}

every_task = pytest.mark.parametrize("name", TASK_NAMES)


def many(name: str, copies: int = 40, seed: int = 3) -> Samples:
    return TASKS[name].sample(np.repeat(LENGTHS[name], copies), seed)


def assert_equal(a: Samples, b: Samples) -> None:
    for field in dataclasses.fields(Samples):
        assert np.array_equal(getattr(a, field.name), getattr(b, field.name)), field.name


def test_names_and_indices() -> None:
    assert TASK_NAMES == ("arithmetic", "edit_distance", "lis")
    assert [TASKS[name].index for name in TASK_NAMES] == [0, 1, 2]
    assert VOCABULARY.decode(TASKS[name].token for name in TASK_NAMES) == "[ARI] [ED] [LIS]"


@every_task
def test_the_same_seed_draws_the_same(name: str) -> None:
    assert_equal(many(name), many(name))
    assert not np.array_equal(many(name).problem, many(name, seed=4).problem)


@every_task
def test_parts_drawn_apart_are_the_whole(name: str) -> None:
    task = TASKS[name]
    lengths = np.random.default_rng(0).permutation(np.repeat(LENGTHS[name], 7))
    whole = task.sample(lengths, seed=9, start=100)
    cuts = [0, 1, 20, 20, len(lengths)]
    parts = [
        task.sample(lengths[a:b], seed=9, start=100 + a)
        for a, b in zip(cuts[:-1], cuts[1:], strict=True)
    ]
    assert_equal(whole, Samples.concat(parts))


@every_task
def test_a_sample_ignores_its_neighbours(name: str) -> None:
    a, b, c = LENGTHS[name][-3:]
    left = TASKS[name].sample([a, b, c], seed=1)
    right = TASKS[name].sample([c, b, a], seed=1)
    assert_equal(left.take(1), right.take(1))


def test_tasks_do_not_share_random_numbers() -> None:
    numbers = [many(name).problem[many(name).problem >= NUMBER0] for name in TASK_NAMES]
    assert not np.array_equal(numbers[0][:20] % 11, numbers[2][:20] % 11)


@every_task
def test_seeds_beyond_64_bits_and_below_zero(name: str) -> None:
    task = TASKS[name]
    assert_equal(task.sample([3], seed=-1), task.sample([3], seed=2**64 - 1))


@every_task
def test_samples_are_consistent(name: str) -> None:
    task, samples = TASKS[name], many(name)
    assert np.all(samples.task == task.index)
    assert np.array_equal(samples.length, np.repeat(LENGTHS[name], 40))
    assert np.array_equal(samples.loops, [task.loops(int(n)) for n in samples.length])
    assert np.all(np.diff(samples.problem_offsets) > 2)
    assert np.all(np.diff(samples.round_offsets) > 0)
    for i in range(len(samples)):
        problem, rounds = samples.problem_of(i), samples.rounds_of(i)
        assert problem[0] == task.token and problem[-1] == task.end
        assert task.length_of(problem) == samples.length[i]
        truth, answer = task.solve(problem)
        assert truth == [r.tolist() for r in rounds]
        assert answer == samples.answer[i] == task.answer_of(rounds)


@every_task
def test_sizes_stay_below_the_bounds(name: str) -> None:
    task, samples = TASKS[name], many(name)
    tokens, offsets, _ = samples.sequences(TASKS)
    problems, sequences = np.diff(samples.problem_offsets), np.diff(offsets)
    longest_round = np.maximum.reduceat(np.diff(samples.round_offsets), samples.first_round[:-1])
    chains = np.diff(samples.round_offsets[samples.first_round])
    for n in LENGTHS[name]:
        at = samples.length == n
        assert problems[at].max() <= task.max_problem_tokens(n)
        assert longest_round[at].max() <= task.max_round_tokens(n)
        assert chains[at].max() <= task.max_chain_tokens(n)
        assert sequences[at].max() <= task.max_sequence_tokens(n)
        if name != "arithmetic":
            assert problems[at].max() == task.max_problem_tokens(n)
            assert longest_round[at].max() == task.max_round_tokens(n)
            assert sequences[at].max() == task.max_sequence_tokens(n)
    assert tokens.max() < VOCABULARY.n_tokens


@every_task
def test_check_round_by_round(name: str) -> None:
    task, samples = TASKS[name], many(name)
    i = int(np.flatnonzero(samples.loops > 2)[0])
    problem, rounds = samples.problem_of(i), [r.copy() for r in samples.rounds_of(i)]
    right = [True] * len(rounds)
    assert task.check(problem, rounds) == right
    rounds[1][0] += 1
    assert task.check(problem, rounds) == [True, False, *right[2:]]
    rounds[1][0] -= 1
    assert task.check(problem, rounds[:-1]) == [*right[1:], False]
    assert task.check(problem, [*rounds, rounds[0]]) == [*right, False]
    assert task.check(problem, []) == [False] * len(rounds)
    assert task.check(problem, [rounds[0][:-1], *rounds[1:]]) == [False, *right[1:]]


@every_task
@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-3, 400), max_size=30))
def test_split_and_answer_of_survive_garbage(name: str, ids: list[int]) -> None:
    task = TASKS[name]
    rounds, answer = task.split(ids)
    assert answer is None or VOCABULARY.is_number(answer)
    implied = task.answer_of(rounds)
    assert implied is None or VOCABULARY.is_number(implied)
    assert sum(rounds, []) == ids[: len(sum(rounds, []))]


@every_task
@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 44), max_size=20))
def test_split_and_answer_of_survive_plausible_garbage(name: str, ids: list[int]) -> None:
    task = TASKS[name]
    rounds, answer = task.split(ids)
    assert sum(rounds, []) == ids[: len(sum(rounds, []))]
    for found in (answer, task.answer_of(rounds)):
        assert found is None or VOCABULARY.is_number(found)


@every_task
def test_text_round_trip(name: str) -> None:
    task, samples = TASKS[name], many(name, copies=3)
    for i in range(len(samples)):
        problem = samples.problem_of(i).tolist()
        assert task.encode(task.decode(problem)) == problem
        assert task.encode(VOCABULARY.decode(problem)) == problem


@every_task
def test_config_round_trip(name: str) -> None:
    assert TASKS[name].to_dict()["name"] == name
    again = make_task(vocabulary=VOCABULARY, **TASKS[name].to_dict())
    assert again.to_dict() == TASKS[name].to_dict()
    assert_equal(again.sample([3, 4], 0), TASKS[name].sample([3, 4], 0))


@every_task
def test_no_lengths_no_samples(name: str) -> None:
    samples = TASKS[name].sample([], seed=0)
    assert len(samples) == 0 and len(samples.rounds) == 0


def test_build_tasks() -> None:
    tasks = build_tasks(["lis", "arithmetic"], VOCABULARY, arithmetic={"prime": 7})
    assert list(tasks) == ["lis", "arithmetic"]
    assert tasks["arithmetic"].to_dict()["prime"] == 7


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: make_task("sort", VOCABULARY),
            "unknown task 'sort'; known are arithmetic, edit_distance, lis",
        ),
        (
            lambda: make_task("lis", VOCABULARY, gruop=3),
            "unknown parameter 'gruop' of task lis; known are group, low, high, max_runs: the "
            "nearest is group",
        ),
        (
            lambda: build_tasks(["lis"], VOCABULARY, arithmetic={}),
            "parameters for 'arithmetic', which is not among the tasks lis; add the task or drop",
        ),
    ],
)
def test_builder_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@every_task
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0], 0), "length 0 is too short; use at least 1"),
        (([3, -2], 0), "length -2 is too short"),
        (([1.5], 0), "lengths have shape .1,. and type float64; give a flat list of integers"),
        (([[1]], 0), "lengths have shape .1, 1. and type int64"),
        (([1], 0, -1), "start is -1; give the index of the first sample, at least 0"),
    ],
)
def test_sampling_errors(name: str, arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TASKS[name].sample(*arguments)


@every_task
@pytest.mark.parametrize("ids", [[], [0], [9, 9], [999, 6]])
def test_incomplete_problems(name: str, ids: list[int]) -> None:
    with pytest.raises(
        ValueError, match=f"{name} problem .* is incomplete; begin with .* end with"
    ):
        TASKS[name].solve(ids)


@every_task
def test_unknown_text(name: str) -> None:
    with pytest.raises(ValueError, match="unknown token '%' at position 1"):
        TASKS[name].encode("3 % 4")


def test_import_is_light() -> None:
    code = "import sys, relay_fast.tasks; sys.exit('numba' in sys.modules)"
    assert run_fresh(code).returncode == 0


def test_compiles_where_no_folder_is_writable(monkeypatch: pytest.MonkeyPatch) -> None:
    from relay_fast.tasks._jit import compiled

    real = numba.njit

    def njit(*functions, **options):
        if options.pop("cache", False):
            raise RuntimeError("cannot cache function 'f': no locator available")
        return real(*functions, **options)

    monkeypatch.setattr(numba, "njit", njit)
    assert compiled(lambda x: x + 1)(1) == 2
