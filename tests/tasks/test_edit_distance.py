import random

import numpy as np
import pytest

from relay_fast.tasks import EditDistance, Samples, Vocabulary
from relay_fast.tasks.vocabulary import NUMBER0

VOCABULARY = Vocabulary()
TASK = EditDistance(VOCABULARY)


def table(first: list, second: list, insert=2, delete=2, replace=3, border=1) -> list[list[int]]:
    """The textbook dynamic programme, with a border that grows by `border` a step."""
    m = [[border * (i + j) for j in range(len(second) + 1)] for i in range(len(first) + 1)]
    for i in range(1, len(first) + 1):
        for j in range(1, len(second) + 1):
            change = 0 if first[i - 1] == second[j - 1] else replace
            m[i][j] = min(m[i - 1][j - 1] + change, m[i - 1][j] + delete, m[i][j - 1] + insert)
    return m


def strings(samples: Samples) -> list[tuple[list[str], list[str]]]:
    texts = [VOCABULARY.decode(samples.problem_of(i)) for i in range(len(samples))]
    halves = [text.removeprefix("[ED] ").removesuffix(" <sep>").split(" | ") for text in texts]
    return [(a.split(), b.split()) for a, b in halves]


def reference_draw(n: int, rng: random.Random) -> tuple[list[int], list[int]]:
    """Feng's procedure written anew: (the string of n letters, the other), not yet put in order."""
    edits = rng.randint(1, n)
    while True:
        letters = rng.sample(range(26), rng.randint(3, 10))
        first = rng.choices(letters, k=n)
        if rng.random() < 0.4:
            second = rng.choices(letters, k=rng.randint(n - 3, n + 2))
        else:
            second = first[:]
            for _ in range(edits):
                kind = rng.randrange(3)
                if kind == 0 and len(second) > 2:
                    del second[rng.randrange(len(second))]
                elif kind == 1:
                    second[rng.randrange(len(second))] = rng.choice(letters)
                else:
                    second.insert(rng.randint(0, len(second)), rng.choice(letters))
        if first != second and n - 3 <= len(second) <= n + 2:
            return first, second


def test_the_appendix_s_example() -> None:
    rounds, answer = TASK.solve(TASK.encode("o t m l | o t t m l <sep>"))
    rows = ["0 2 4 6 7 ,", "2 0 2 4 6 ,", "4 2 3 2 4 ,", "6 4 5 4 2 ,"]
    assert [TASK.decode(tokens) for tokens in rounds] == rows
    assert answer == NUMBER0 + 2


def test_the_border_counts_steps_not_costs() -> None:
    # The cheapest way to the end of row 1 goes along the border: 7 with steps of 1, 8 with 2.
    ids = TASK.encode("otml|ottml")
    wide = EditDistance(VOCABULARY, border=2)
    assert TASK.decode(TASK.solve(ids)[0][0]) == "0 2 4 6 7 ,"
    assert TASK.decode(wide.solve(ids)[0][0]) == "0 2 4 6 8 ,"


@pytest.mark.parametrize(
    "costs", [(2, 2, 3, 1), (1, 1, 1, 1), (1, 3, 2, 2), (3, 1, 9, 1), (2, 3, 1, 4)]
)
def test_every_round_against_the_textbook(costs: tuple[int, int, int, int]) -> None:
    task = EditDistance(VOCABULARY, *costs)
    lengths = [1, 1, 2, 2, 3, 3, 4, 7, 13, 20]
    samples = task.sample(lengths, seed=1)
    for i, (first, second) in enumerate(strings(samples)):
        rows = table(first, second, *costs)[1:]
        written = [VOCABULARY.decode(r) for r in samples.rounds_of(i)]
        assert written == [" ".join([*map(str, row[1:]), ","]) for row in rows]
        assert samples.answer[i] == NUMBER0 + rows[-1][-1]


def test_length_is_that_of_the_shorter_string_which_comes_first() -> None:
    lengths = np.repeat([1, 2, 3, 4, 5, 30, 40], 200)
    samples = TASK.sample(lengths, seed=2)
    for i, (first, second) in enumerate(strings(samples)):
        assert len(first) == samples.length[i] == samples.loops[i] == lengths[i]
        assert 0 <= len(second) - len(first) <= 2
        assert first != second
        assert 1 <= len(set(first + second)) <= 10
    for n in set(lengths.tolist()):
        surplus = {len(b) - len(a) for a, b in strings(samples.take(lengths == n))}
        assert surplus == {0, 1, 2}


def test_distribution_against_a_reference() -> None:
    n = 12
    rng = random.Random(0)
    pairs = []
    while len(pairs) < 1500:
        first, second = reference_draw(n, rng)
        if len(second) >= n:
            pairs.append((first, second))
    drawn = strings(TASK.sample(np.full(6000, n), seed=3))

    def means(pairs: list) -> np.ndarray:
        features = [
            (
                len(b) - len(a),
                len(b) == len(a),
                len(set(a)),
                table(a, b)[-1][-1],
                sum(x == y for x, y in zip(a, b, strict=False)),
            )
            for a, b in pairs
        ]
        return np.array([np.mean(features, axis=0), np.std(features, axis=0) / len(pairs) ** 0.5])

    (ours, _), (theirs, error) = means(drawn), means(pairs)
    assert np.all(np.abs(ours - theirs) < 4.5 * error), (ours, theirs, error)


def test_letters_are_used_evenly() -> None:
    samples = TASK.sample(np.full(4000, 10), seed=4)
    a = VOCABULARY.encode("a")[0]
    counts = np.bincount(samples.problem[(samples.problem >= a) & (samples.problem < a + 26)] - a)
    assert len(counts) == 26 and counts.min() > 0.9 * counts.mean()


def test_alphabet_and_letters() -> None:
    task = EditDistance(VOCABULARY, alphabet=(2, 2), letters=4)
    for first, second in strings(task.sample(np.repeat([1, 2, 9], 50), seed=0)):
        assert len(set(first + second)) <= 2
        assert set(first + second) <= set("abcd")


# relay.md's mean chains, 979 and 1,707, are those of raw draws, whose first string may be shorter.
@pytest.mark.parametrize(
    ("n", "raw", "ours", "longest", "query", "cell"),
    [(30, 979, 1024, 1056, 64, 66), (40, 1707, 1763, 1806, 84, 89)],
)
def test_sizes(n: int, raw: int, ours: int, longest: int, query: int, cell: int) -> None:
    samples = TASK.sample(np.full(1500, n), seed=5)
    queries = np.diff(samples.problem_offsets) - 1  # without the task token
    chains = queries + np.diff(samples.round_offsets[samples.first_round]) + 2
    assert queries.max() == query
    assert (chains.mean(), chains.max()) == (pytest.approx(ours, rel=0.005), longest)
    largest = samples.rounds.max() - NUMBER0
    assert cell - 4 <= largest <= cell + 6 <= TASK.largest_cell(n) == 3 * n + 2
    rng = random.Random(n)
    draws = [sorted(map(len, reference_draw(n, rng))) for _ in range(600)]
    mean = np.mean([a + b + 2 + a * (b + 1) + 2 for a, b in draws])
    assert mean == pytest.approx(raw, rel=0.008)


def test_half_of_the_raw_draws_would_be_no_extrapolation() -> None:
    rng = random.Random(1)
    short = [min(map(len, reference_draw(31, rng))) <= 30 for _ in range(600)]
    assert np.mean(short) == pytest.approx(0.48, abs=0.06)


@pytest.mark.parametrize("costs", [(2, 2, 3, 1), (1, 3, 2, 2), (3, 1, 9, 1), (2, 3, 1, 4)])
@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_largest_cell_is_exact(costs: tuple[int, int, int, int], n: int) -> None:
    cells = [row[1:] for row in table(["a"] * n, ["b"] * (n + 2), *costs)[1:]]
    assert EditDistance(VOCABULARY, *costs).largest_cell(n) == np.max(cells)


def test_text() -> None:
    ids = VOCABULARY.encode("[ED] o t m l | o t t m l <sep>")
    for text in ("otml|ottml", "otml | ottml<sep>", "[ED] o t m l | o t t m l <sep>"):
        assert TASK.encode(text) == ids
    assert TASK.decode(ids) == "o t m l | o t t m l <sep>"


def test_split() -> None:
    def split(text: str):
        rounds, answer = TASK.split(VOCABULARY.encode(text))
        return [VOCABULARY.decode(r) for r in rounds], answer

    two = NUMBER0 + 2
    assert split("1 2 , 3 2 , <sep> 2 <eos> 9") == (["1 2 ,", "3 2 ,"], two)
    assert split("1 2 , 3 2 , <sep> 2") == (["1 2 ,", "3 2 ,"], two)
    assert split("1 2 , 3 2 <sep> 2 <eos>") == (["1 2 ,", "3 2"], two)
    assert split("1 2 , <sep> 2 2 <eos>") == (["1 2 ,"], None)
    assert split("1 2 , <sep> a <eos>") == (["1 2 ,"], None)
    assert split("1 2 , <sep> <eos>") == (["1 2 ,"], None)
    assert split("1 2 , <sep> 2 <sep> 2 <eos>") == (["1 2 ,"], None)
    assert split("1 2 , 3 <eos>") == (["1 2 ,", "3"], None)
    assert split("") == ([], None)


def test_answer_of() -> None:
    two, comma = VOCABULARY.encode("2 ,")
    assert TASK.answer_of([[comma], np.array([9, two, comma])]) == two
    assert TASK.answer_of([[two]]) is None
    assert TASK.answer_of([[two, two]]) is None
    assert TASK.answer_of([[comma, comma]]) is None
    assert TASK.answer_of([[]]) is None
    assert TASK.answer_of([]) is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: EditDistance(VOCABULARY, insert=0),
            "cost insert is 0; give an integer of at leas",
        ),
        (lambda: EditDistance(VOCABULARY, border=-1), "cost border is -1; give"),
        (lambda: EditDistance(VOCABULARY, replace=2.5), "cost replace is 2.5; give"),
        (lambda: EditDistance(VOCABULARY, letters=27), "letters is 27; give 2..26"),
        (
            lambda: EditDistance(VOCABULARY, alphabet=(1, 5)),
            r"alphabet \(1, 5\) is no range of siz",
        ),
        (
            lambda: EditDistance(VOCABULARY, alphabet=(5, 4)),
            r"alphabet \(5, 4\) is no range of siz",
        ),
        (lambda: EditDistance(VOCABULARY, letters=9), r"\(3, 10\) .* least <= largest <= 9"),
        (
            lambda: TASK.check_length(83),
            "length 83 can need numbers beyond 249, .* use shorter str",
        ),
        (lambda: TASK.sample([10**9], 0), "length 1000000000 can need numbers beyond 249"),
        (lambda: TASK.encode("ab c"), "problem 'a b c' needs two strings; put one . between"),
        (lambda: TASK.encode("a|b|c"), "needs two strings"),
        (lambda: TASK.encode("ab | a 3"), "holds '3' at position 4; use the letters a..z"),
        (lambda: TASK.encode("abc|ab"), "strings of 3 and 2 letters; put the shorter string first"),
        (lambda: TASK.encode("|ab"), "strings of 0 and 2 letters; .* leave none empty"),
        (
            lambda: EditDistance(VOCABULARY, letters=3, alphabet=(3, 3)).encode("ad|aa"),
            "holds 'd' at position 1; use the letters a..c",
        ),
        (
            lambda: TASK.solve(TASK.encode("a" * 100 + "|" + "b" * 100)),
            "problem of 100 and 100 letters needs the number 300, the vocabulary ends at 249; use",
        ),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_the_longest_length_that_fits() -> None:
    TASK.check_length(82)
    EditDistance(Vocabulary(max_number=251)).check_length(83)
