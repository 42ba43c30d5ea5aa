"""What each iteration of a model with feedback sees, by task, and what training varies of it."""

from dataclasses import replace

import numpy as np
import pytest

from relay_fast.data.collate import collate_side_by_side
from relay_fast.data.feedback import iterations_of, true_rounds
from relay_fast.tasks import TASK_NAMES, FeedbackDraws, Samples, Vocabulary, Written, build_tasks
from relay_fast.tasks.vocabulary import BAR, NUMBER0
from tests.support.fed_inputs import naive_inputs

VOCABULARY = Vocabulary(63, 1)
TASKS = build_tasks(
    TASK_NAMES,
    VOCABULARY,
    arithmetic={"prime": 11},
    edit_distance={"letters": 4, "alphabet": [2, 4]},
    lis={"group": 3, "low": 0, "high": 49},
)


def drawn(name: str, number: int = 12, most: int = 9) -> Samples:
    lengths = np.random.default_rng(0).integers(1, most, number)
    return TASKS[name].sample(lengths, seed=1)


def every_iteration(samples: Samples) -> tuple[np.ndarray, np.ndarray]:
    owner = np.repeat(np.arange(len(samples)), samples.loops)
    return owner, np.arange(len(owner)) - samples.first_round[owner]


def seen(name: str, problem: str) -> list[tuple[str, str]]:
    """Tokens and what is fed beside them in each iteration of a problem; `_` for `<pad>`."""
    task = TASKS[name]
    ids = np.array(task.encode(problem), np.int32)
    one = task.sample([task.length_of(ids)], 0)
    one = replace(one, problem=ids, problem_offsets=np.array([0, len(ids)]))
    one = task.solve_samples(one)
    inputs, widths, _ = iterations_of(Written.truth(one), TASKS, *every_iteration(one))
    ends = np.cumsum(widths)[:-1]
    text = lambda row: VOCABULARY.decode(row).replace("<pad>", "_")
    rows = zip(np.split(inputs.tokens, ends), np.split(inputs.fed, ends), strict=True)
    return [(text(tokens), text(fed)) for tokens, fed in rows]


def test_arithmetic_sees_the_expression_that_is_left_alone() -> None:
    rows = seen("arithmetic", "3*2+6/3=")
    assert [tokens for tokens, _ in rows] == [
        "[ARI] 3 * 2 + 6 / 3 =", "[ARI] 6 + 6 / 3 =", "[ARI] 6 + 2 =",
    ]  # fmt: skip
    assert all(set(fed.split()) == {"_"} for _, fed in rows)


def test_edit_distance_sees_the_last_row_its_border_and_two_marks() -> None:
    assert seen("edit_distance", "ab|bab<sep>") == [
        ("[ED] a b | b a b <sep>", "_ | _ 0 1 2 3 _"),
        ("[ED] a b | b a b <sep>", "_ , | 1 3 1 3 ,"),
    ]


def test_lis_sees_every_length_under_its_value_and_marks_under_the_next_group() -> None:
    assert [fed for _, fed in seen("lis", "5 7 6 8 9 1 2 <sep>")] == [
        "_ a b c _ _ _ _ _", "_ 1 2 2 a b c _ _", "_ 1 2 2 3 4 1 a _",
    ]  # fmt: skip
    assert seen("lis", "5 <sep>") == [("[LIS] _ _ 5 <sep>", "_ _ _ a _")], "padded to a round"


@pytest.mark.parametrize("name", TASK_NAMES)
def test_inputs_are_those_of_one_sample_at_a_time(name: str) -> None:
    samples, rng = drawn(name), np.random.default_rng(2)
    owner, before = every_iteration(samples)
    task, written = TASKS[name], Written.truth(samples)
    widths = task.input_sizes(written, owner, before) + rng.integers(0, 4, len(owner))
    inputs = task.inputs(written, owner, before, widths)
    ends = np.cumsum(widths)
    for k, (i, t) in enumerate(zip(owner, before, strict=True)):
        texts = [text.tolist() for text in samples.rounds_of(i)[:t]]
        tokens, fed, positions = naive_inputs(
            task, samples.problem_of(i).tolist(), texts, int(widths[k])
        )
        row = slice(ends[k] - widths[k], ends[k])
        assert inputs.tokens[row].tolist() == tokens and inputs.fed[row].tolist() == fed
        assert inputs.positions is None or inputs.positions[row].tolist() == positions
        assert inputs.positions is not None or positions == list(range(widths[k]))


@pytest.mark.parametrize("name", TASK_NAMES)
def test_inputs_do_not_depend_on_what_is_not_written_yet(name: str) -> None:
    samples, rng = drawn(name), np.random.default_rng(3)
    owner, before = every_iteration(samples)
    truth = Written.truth(samples)
    other = replace(samples, answer=samples.answer * 0, rounds=samples.rounds[:0])
    for i, t in zip(owner, before, strict=True):
        later = np.ones(len(truth.sizes), bool)
        later[samples.first_round[i] : samples.first_round[i] + t] = False
        sizes = np.where(later, rng.integers(0, 3, len(later)), truth.sizes)
        tokens = truth.tokens.copy()
        tokens[np.repeat(later, truth.sizes)] = rng.integers(1, VOCABULARY.n_tokens)
        blind = Written(other, tokens, np.where(later, 0, truth.starts), sizes)
        one = np.array([i]), np.array([t])
        ours, seen_now = iterations_of(truth, TASKS, *one), iterations_of(blind, TASKS, *one)
        for a, b in zip(ours.inputs, seen_now.inputs, strict=True):
            assert np.array_equal(a, b)


def test_shifted_rows_of_edit_distance_follow_from_the_fed_row() -> None:
    task, samples = TASKS["edit_distance"], drawn("edit_distance")
    owner, before = every_iteration(samples)
    shift = np.random.default_rng(0).integers(0, 9, len(owner))
    rounds, sizes = true_rounds(samples, TASKS, owner, before, shift)
    for k, text in enumerate(np.split(rounds, np.cumsum(sizes)[:-1])):
        problem, t = samples.problem_of(owner[k]).tolist(), int(before[k])
        texts = [text.tolist() for text in samples.rounds_of(owner[k])[:t]]
        _, fed, _ = naive_inputs(task, problem, texts)
        first, second = task._strings(problem)
        above = [token - NUMBER0 + shift[k] for token in fed[len(first) + 1 : -1]]
        row = [above[0] + 1]  # the border grows by one a row
        for j, letter in enumerate(second, start=1):
            match = above[j - 1] + (0 if letter == first[t] else 3)
            row.append(min(match, above[j] + 2, row[-1] + 2))
        assert (text[:-1] - NUMBER0).tolist() == row[1:]


def test_shifted_lengths_of_lis_follow_from_the_fed_ones() -> None:
    task, samples = TASKS["lis"], drawn("lis", most=14)
    owner, before = every_iteration(samples)
    shift = np.random.default_rng(0).integers(0, 9, len(owner))
    rounds, sizes = true_rounds(samples, TASKS, owner, before, shift)
    changed = 0
    for k, text in enumerate(np.split(rounds, np.cumsum(sizes)[:-1])):
        values, t = samples.problem_of(owner[k])[1:-1].tolist(), int(before[k])
        true = np.concatenate([r[:-1] for r in samples.rounds_of(owner[k])])[: len(values)]
        lengths = (true[: t * task.group] - NUMBER0 + shift[k]).tolist()
        for v in range(len(lengths), min(len(values), (t + 1) * task.group)):
            below = [lengths[j] for j in range(v) if values[j] < values[v]]
            lengths.append(1 + max(below, default=0))
        group = lengths[t * task.group :]
        group += group[-1:] * (task.group - len(group))
        assert (text[:-1] - NUMBER0).tolist() == group
        changed += group != (samples.rounds_of(owner[k])[t][:-1] - NUMBER0).tolist()
    assert changed > 5


def test_what_is_drawn_lies_in_its_range_and_comes_from_the_rng() -> None:
    draws = {"edit_distance": FeedbackDraws(0.5, 40, cut=7, shift=5, shift_probability=0.25)}
    samples = drawn("edit_distance", 200)
    owner, before = every_iteration(samples)
    make = lambda seed: iterations_of(
        Written.truth(samples), TASKS, owner, before, draws, np.random.default_rng(seed)
    )
    ours, again, other = make(0), make(0), make(1)
    assert np.array_equal(ours.inputs.fed, again.inputs.fed)
    assert not np.array_equal(ours.shifts, other.shifts)
    sizes = np.diff(samples.problem_offsets)[owner]
    padded = ours.widths > sizes
    assert np.all(ours.widths >= sizes) and ours.widths.max() == 40 and 0.4 < padded.mean() < 0.5
    moved = ours.shifts > 0
    assert 0.2 < moved.mean() < 0.3 and set(ours.shifts[moved]) == {1, 2, 3, 4, 5}
    last = np.cumsum(ours.widths) - 1
    assert set(ours.inputs.positions[last] - ours.widths + 1) == set(range(8))
    plain = iterations_of(Written.truth(samples), TASKS, owner, before, draws)
    assert not plain.shifts.any() and np.array_equal(plain.widths, sizes), "nothing without an rng"


def test_cuts_move_all_positions_behind_one_place() -> None:
    samples = drawn("arithmetic", 300)
    owner, before = every_iteration(samples)
    draws = {"arithmetic": FeedbackDraws(cut=6, cut_probability=0.25)}
    inputs, widths, _ = iterations_of(
        Written.truth(samples), TASKS, owner, before, draws, np.random.default_rng(0)
    )
    cuts, places = [], []
    for row in np.split(inputs.positions, np.cumsum(widths)[:-1]):
        steps = np.diff(row) - 1
        assert row[0] == 0 and np.count_nonzero(steps) <= 1 and steps.min() == 0
        cuts.append(int(steps.max()))
        places += np.flatnonzero(steps).tolist()
    assert set(cuts) == set(range(7)) and 0.2 < np.mean(np.array(cuts) > 0) < 0.3
    assert min(places) == 0 and len(set(places)) > 20
    one = FeedbackDraws(cut=6, cut_probability=1.0)
    moves = one.moves(np.array([1]), None, np.random.default_rng(0))
    assert moves.tolist() == [0], "an input of one token has no distances"


def test_edit_distance_is_cut_before_the_bar() -> None:
    samples = drawn("edit_distance", 60)
    owner, before = every_iteration(samples)
    draws = {"edit_distance": FeedbackDraws(0.5, 30, cut=4, cut_probability=0.75)}
    inputs, widths, _ = iterations_of(
        Written.truth(samples), TASKS, owner, before, draws, np.random.default_rng(0)
    )
    ends = np.cumsum(widths)[:-1]
    rows = zip(np.split(inputs.tokens, ends), np.split(inputs.positions, ends), strict=True)
    for tokens, row in rows:
        bar = tokens.tolist().index(BAR)
        assert (np.diff(row)[: bar - 1] == 1).all() and (np.diff(row)[bar:] == 1).all()
    assert set(inputs.positions[np.cumsum(widths) - 1] - widths + 1) == set(range(5))


def test_draws_that_do_not_fit() -> None:
    for values, message in (
        ({"pad_probability": 1.5}, r"pad_probability = 1.5: it must lie in \[0, 1\]"),
        ({"shift_probability": -1}, r"shift_probability = -1: it must lie in"),
        ({"cut": -1}, "cut = -1: it must be 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            FeedbackDraws(**values)
    for name, values, message in (
        ("arithmetic", {"shift": 3}, "'arithmetic' has no rule for shifted numbers, shift = 3"),
        ("lis", {"cut": 3}, "'lis' shows no distance that grows with the length, cut = 3 does"),
    ):
        samples = drawn(name)
        with pytest.raises(ValueError, match=message):
            iterations_of(
                Written.truth(samples),
                TASKS,
                *every_iteration(samples),
                {name: FeedbackDraws(**values)},
                np.random.default_rng(0),
            )
    samples, far = drawn("edit_distance"), {"edit_distance": FeedbackDraws(shift=60)}
    with pytest.raises(ValueError, match="'edit_distance' needs numbers up to .* ends at 63: use"):
        collate_side_by_side(samples, TASKS, draws=far, rng=np.random.default_rng(0))
    samples = drawn("arithmetic", 2)
    with pytest.raises(ValueError, match="'arithmetic' has no rule for shifted numbers: use shift"):
        true_rounds(samples, TASKS, *every_iteration(samples), np.ones(int(samples.loops.sum())))


def test_more_marks_than_letters() -> None:
    task = build_tasks(["lis"], VOCABULARY, lis={"group": 27, "low": 0, "high": 49})
    samples = task["lis"].sample([3], 0)
    with pytest.raises(ValueError, match="lis group is 27; with feedback each .* there are 26"):
        iterations_of(Written.truth(samples), task, *every_iteration(samples))
