import random

import numpy as np
import pytest

from relay_fast.tasks import LIS, Samples, Vocabulary
from relay_fast.tasks.vocabulary import NUMBER0

VOCABULARY = Vocabulary()
TASK = LIS(VOCABULARY)


def ending_at(values: list[int]) -> list[int]:
    """O(n²): the longest strictly increasing subsequence that ends at each value."""
    best = []
    for i, value in enumerate(values):
        best.append(1 + max((best[j] for j in range(i) if values[j] < value), default=0))
    return best


def folded(lengths: list[int], group: int) -> list[str]:
    lengths = lengths + [lengths[-1]] * (-len(lengths) % group)
    groups = [lengths[k : k + group] for k in range(0, len(lengths), group)]
    return [" ".join([*map(str, g), "<sep>"]) for g in groups]


def values_of(samples: Samples) -> list[list[int]]:
    return [(samples.problem_of(i)[1:-1] - NUMBER0).tolist() for i in range(len(samples))]


def reference_draw(n: int, rng: random.Random) -> list[int]:
    """Feng's procedure written anew."""
    runs, total = rng.randint(1, 3), rng.randint(3, n)
    if runs == 1:
        sizes = [total]
    elif runs == 2:
        size = rng.randint(1, total // 2 + 1)
        sizes = [size, total - size]
    else:
        size = rng.randint(1, total // 3 + 1)
        second = rng.randint(1, (total - size) // 2 + 1)
        sizes = [size, second, total - size - second]
    planted = [v for size in sizes for v in sorted(rng.sample(range(n + 1, 250), size))]
    values = [rng.randint(n + 1, 249) for _ in range(n)]
    for place, value in zip(sorted(rng.sample(range(n), total)), planted, strict=True):
        values[place] = value
    return values


def test_the_paper_s_example() -> None:
    problem = TASK.encode("103 110 145 217 233 18 30 82 141 150 159 161 167 239 <sep>")
    rounds, answer = TASK.solve(problem)
    assert [TASK.decode(r) for r in rounds] == [
        "1 2 3 4 5 1 2 3 4 5 <sep>",
        "6 7 8 9 9 9 9 9 9 9 <sep>",
    ]
    assert answer == NUMBER0 + 9


@pytest.mark.parametrize("text", ["5 5 5", "9 5 1", "1 2 3 4 5 6 7 8 9 10", "3 1 2 2 3 1 4", "7"])
def test_strictly_increasing(text: str) -> None:
    expected = ending_at([int(word) for word in text.split()])
    rounds, answer = TASK.solve(TASK.encode(text))
    assert [TASK.decode(r) for r in rounds] == folded(expected, 10)
    assert answer == NUMBER0 + max(expected)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"group": 1},
        {"group": 7, "max_runs": 1},
        {"low": 0, "high": 60, "max_runs": 6},
    ],
)
def test_every_round_against_the_quadratic_rule(params: dict) -> None:
    task = LIS(VOCABULARY, **params)
    lengths = [1, 2, 3, 3, 9, 10, 11, 20, 37, 60]
    samples = task.sample(lengths, seed=1)
    for i, values in enumerate(values_of(samples)):
        expected = ending_at(values)
        written = [VOCABULARY.decode(r) for r in samples.rounds_of(i)]
        assert written == folded(expected, task.group)
        assert samples.answer[i] == NUMBER0 + max(expected)
        assert len(values) == samples.length[i] == lengths[i]
        assert samples.loops[i] == -(-lengths[i] // task.group)


@pytest.mark.parametrize("n", [1, 2, 3, 100, 120, 124])
def test_values_lie_between_n_plus_1_and_249(n: int) -> None:
    values = np.array(values_of(TASK.sample(np.full(1000, n), seed=2)))
    assert values.min() >= n + 1 and values.max() <= 249
    if n >= 100:
        assert (values.min(), values.max()) == (n + 1, 249)


def test_given_low_and_high() -> None:
    values = np.array(values_of(LIS(VOCABULARY, low=3, high=40).sample(np.full(500, 30), seed=0)))
    assert (values.min(), values.max()) == (3, 40)


def test_one_run_may_cover_everything() -> None:
    # With n distinct values in all, a run over all positions leaves one possibility.
    samples = LIS(VOCABULARY, low=1, high=4, max_runs=1).sample(np.full(400, 4), seed=0)
    covered = [values == [1, 2, 3, 4] for values in values_of(samples)]
    assert 0.4 < np.mean(covered) < 0.65


def test_short_problems() -> None:
    # n < 3 plants n values: with one run, two values always rise.
    task = LIS(VOCABULARY, max_runs=1)
    assert np.all(task.sample(np.full(200, 2), 0).answer == NUMBER0 + 2)
    assert np.all(TASK.sample(np.full(200, 1), 0).answer == NUMBER0 + 1)


@pytest.mark.parametrize("n", [5, 20, 100])
def test_distribution_against_a_reference(n: int) -> None:
    rng = random.Random(n)

    def means(sequences: list[list[int]]) -> np.ndarray:
        features = [
            (max(ending_at(v)), np.mean(v), v[0], v[-1], np.mean(np.diff(v) > 0)) for v in sequences
        ]
        return np.array([np.mean(features, 0), np.std(features, 0) / len(sequences) ** 0.5])

    theirs, error = means([reference_draw(n, rng) for _ in range(400)])
    ours, other = means(values_of(TASK.sample(np.full(1000, n), seed=n)))
    assert np.all(np.abs(ours - theirs) < 4 * np.hypot(error, other)), (ours, theirs, error)


def test_sizes() -> None:
    samples = TASK.sample([100, 120], seed=0)
    # Without the task token, 121 at n = 120; the looped input has 122.
    assert (np.diff(samples.problem_offsets) - 1).tolist() == [101, 121]
    assert np.all(np.diff(samples.round_offsets) == 11)
    assert samples.loops.tolist() == [10, 12]


def test_text() -> None:
    ids = VOCABULARY.encode("[LIS] 103 110 7 <sep>")
    assert TASK.encode("103 110 7") == TASK.encode("[LIS] 103 110 7 <sep>") == ids
    assert TASK.decode(ids) == "103 110 7 <sep>"


def test_split() -> None:
    def split(text: str):
        rounds, answer = TASK.split(VOCABULARY.encode(text))
        return [VOCABULARY.decode(r) for r in rounds], answer

    two = NUMBER0 + 2
    assert split("1 2 <sep> 2 2 <sep> 2 <eos> 9") == (["1 2 <sep>", "2 2 <sep>"], two)
    assert split("1 2 <sep> 2") == (["1 2 <sep>"], two)
    assert split("1 2 <sep> 2 2 <eos>") == (["1 2 <sep>", "2 2"], None)
    assert split("1 2 <sep> a <eos>") == (["1 2 <sep>", "a"], None)
    assert split("1 2 <sep> <eos>") == (["1 2 <sep>"], None)
    assert split("") == ([], None)


def test_answer_of() -> None:
    def answer_of(*rounds: str) -> int | None:
        return TASK.answer_of([np.array(VOCABULARY.encode(text), int) for text in rounds])

    assert answer_of("1 2 3 <sep>", "1 1 1 <sep>") == NUMBER0 + 3
    assert answer_of("1 2 3 <sep>", "1 1 1") is None
    assert answer_of("1 a 3 <sep>", "1 1 1 <sep>") is None
    assert answer_of("1 2 3 <sep>", "<sep>") is None
    assert answer_of("") is None
    assert answer_of() is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LIS(VOCABULARY, group=0), "lis group is 0; give at least 1"),
        (lambda: LIS(VOCABULARY, max_runs=0), "lis max_runs is 0; give at least 1"),
        (lambda: LIS(VOCABULARY, high=250), "high is 250, the vocabulary ends at 249; use a small"),
        (lambda: LIS(VOCABULARY, low=9, high=8), "values 9..8 are no range; give 0 <= low <= high"),
        (lambda: LIS(VOCABULARY, low=-1), "values -1..249 are no range"),
        (
            lambda: TASK.check_length(125),
            "125 needs 125 distinct values, there are 124 in 126..249;",
        ),
        (
            lambda: TASK.sample([300], 0),
            "length 300 needs 300 .* are 0 in 301..249; use at most 124",
        ),
        (
            lambda: LIS(VOCABULARY, low=240).check_length(11),
            "there are 10 in 240..249; use at most 1",
        ),
        (lambda: TASK.encode(""), "lis problem has no values; give at least one number"),
        (lambda: TASK.encode("3 a 4"), "lis problem holds 'a' at position 1; use numbers only"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_the_longest_length_that_fits() -> None:
    TASK.check_length(124)
    LIS(VOCABULARY, low=0).check_length(249)
    with pytest.raises(ValueError, match="length 250"):
        LIS(VOCABULARY, low=0).check_length(250)
