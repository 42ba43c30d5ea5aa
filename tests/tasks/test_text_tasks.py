"""Tasks of texts: their samples in token ids, what is read off rounds, what is refused."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from relay_fast.data.collate import collate_looped, collate_side_by_side
from relay_fast.tasks import (
    NO_ANSWER,
    Samples,
    Sizes,
    TextTask,
    Vocabulary,
    Written,
    make_task,
    tasks_of_config,
)
from relay_fast.tasks.own_code import OwnCodeError
from relay_fast.tasks.references import load_class, reference_of
from relay_fast.tasks.verify import correct_chains, verify_chains
from tests.support.text_tasks import Parity, Reversal, Total

CLASS = "tests.support.text_tasks:"
VOCABULARY = Vocabulary(None, 8, ("[parity]", "[total]", *"0123456789+"))


def bound(task: TextTask, vocabulary: Vocabulary = VOCABULARY):
    return tasks_of_config({task.name: task.reference()}, vocabulary)[task.name]


def test_samples_are_the_texts_in_token_ids() -> None:
    task, text = bound(Parity()), Parity()
    samples = task.sample([2, 3], seed=7, start=4)
    for i, length in enumerate((2, 3)):
        problem, rounds, answer = text.draw(length, 7, 4 + i)
        assert VOCABULARY.decode(samples.problem_of(i)) == f"[parity] {problem} <sep>"
        assert [VOCABULARY.decode(r) for r in samples.rounds_of(i)] == [
            f"{r} <sep>" for r in rounds
        ]
        assert VOCABULARY.decode([samples.answer[i]]) == answer
    assert samples.task.tolist() == [3, 3] and samples.loops.tolist() == [2, 3]
    assert {str(getattr(samples, n).dtype) for n in ("task", "problem", "rounds", "answer")} == {
        "int32"
    }


def test_a_sample_depends_on_seed_and_index_alone() -> None:
    task, lengths = bound(Parity()), np.arange(1, 9)
    whole = task.sample(lengths, seed=3)
    parts = Samples.concat([task.sample(lengths[:3], 3), task.sample(lengths[3:], 3, start=3)])
    other = task.sample(lengths, seed=4)
    assert np.array_equal(whole.problem, parts.problem)
    assert np.array_equal(whole.rounds, parts.rounds)
    assert not np.array_equal(whole.problem, other.problem)


def test_the_looped_input_is_padded_so_that_every_round_fits() -> None:
    task = bound(Total())
    samples = task.sample([1], seed=0)
    assert task.min_widths(np.array([1])).tolist() == [task.max_round_tokens(1) + 1]
    batch = collate_looped(samples, {"total": task})
    assert batch.plan.lengths.tolist() == [max(len(samples.problem), task.max_round_tokens(1) + 1)]
    problem, targets = samples.problem.tolist(), batch.targets.tolist()
    assert batch.tokens.tolist()[-len(problem) + 1 :] == problem[1:]
    assert targets == [0, *samples.rounds.tolist()]


def test_feedback_shows_the_last_round_under_the_problem() -> None:
    task = bound(Parity())
    samples = task.sample([3], seed=1)
    owner, before = np.zeros(3, np.int64), np.arange(3)
    written = Written.truth(samples)
    widths = task.input_sizes(written, owner, before)
    inputs = task.inputs(written, owner, before, widths)
    assert widths.tolist() == [5, 5, 5]
    assert inputs.tokens.reshape(3, 5).tolist() == [samples.problem.tolist()] * 3
    rounds = [r.tolist() for r in samples.rounds_of(0)]
    assert inputs.fed.reshape(3, 5).tolist() == [[0] * 5, [0] * 3 + rounds[0], [0] * 3 + rounds[1]]


def test_a_task_says_itself_what_an_iteration_sees() -> None:
    vocabulary = Vocabulary(None, 8, ("[reversal]", *"abc"))
    task = bound(Reversal(), vocabulary)
    samples = task.sample([3, 2], seed=1)
    batch = collate_side_by_side(samples, {"reversal": task})
    seen = np.split(batch.tokens.numpy(), batch.plan.offsets[1:-1])
    texts = [vocabulary.decode(tokens).replace("<pad> ", "") for tokens in seen]
    letters = [vocabulary.texts(samples.problem_of(i)[1:-1]) for i in (0, 1)]
    wanted = [
        f"[reversal] {' '.join(left)} <sep>"
        for own in letters
        for left in (own[:k] for k in range(len(own), 0, -1))
    ]
    assert sorted(texts) == sorted(wanted)
    assert not batch.fed.any()


def test_answers_of_several_tokens_are_compared_whole() -> None:
    task = bound(Total())
    truth = task.sample([4, 4], seed=2)
    assert task.same_answers(truth, truth).tolist() == [True, True]
    wrong = truth.rounds.copy()
    first = truth.round_offsets[truth.first_round[1] - 1]  # of the first sample's last round
    wrong[first] = VOCABULARY.id_of("9" if truth.rounds[first] != VOCABULARY.id_of("9") else "8")
    written = replace(truth, rounds=wrong)
    assert (written.answer == truth.answer).all()  # the last digit is the same
    assert task.same_answers(written, truth).tolist() == [False, True]


@pytest.mark.parametrize(
    ("rounds", "answer"),
    [
        ("0 <sep> 1 <sep>", "1"),
        ("0 <sep> 1", None),
        ("0 <sep> <sep>", None),
        ("0 <pad> <sep>", None),
        ("", None),
    ],
)
def test_the_answer_is_read_off_the_last_round(rounds: str, answer: str | None) -> None:
    task = bound(Parity())
    read, found = task.split([*VOCABULARY.encode(rounds), 1, 5])
    assert found == (None if answer is None else VOCABULARY.id_of(answer))
    assert [token for tokens in read for token in tokens] == VOCABULARY.encode(rounds)
    sizes = [len(tokens) for tokens in read]
    samples = Samples(
        task=np.array([3], np.int32),
        length=np.array([2], np.int32),
        problem=np.zeros(0, np.int32),
        problem_offsets=np.zeros(2, np.int64),
        rounds=np.array(VOCABULARY.encode(rounds), np.int32),
        round_offsets=np.cumsum([0, *sizes]),
        loops=np.array([len(read)], np.int32),
        answer=np.zeros(1, np.int32),
    )
    assert task.answers_of(samples).tolist() == [NO_ANSWER if found is None else found]


def test_chains_are_checked_by_solving_again() -> None:
    task = bound(Parity())
    truth = task.sample([3, 4], seed=2)
    wrong = truth.rounds.copy()
    wrong[0] = {VOCABULARY.id_of("0"): VOCABULARY.id_of("1")}.get(wrong[0], VOCABULARY.id_of("0"))
    written = replace(truth, rounds=wrong)
    assert verify_chains(written, {"parity": task}, "task").tolist() == [False, True]
    assert correct_chains(written, truth).tolist() == [False, True]
    assert task.check(truth.problem_of(0), written.rounds_of(0)) == [False, True, True]
    with pytest.raises(ValueError, match="'total' has no solver.*define Total.solve"):
        bound(Total()).solve(bound(Total()).sample([2], 0).problem)


def test_sizes_are_measured_with_room_where_they_vary() -> None:
    assert Parity().sizes(4) == Sizes(problem=4, round=1, chain=4, rounds=4)
    sizes, task = Total().sizes(6), bound(Total())
    samples = task.sample(np.full(300, 6), seed=11)
    assert sizes.round + 1 >= np.diff(samples.round_offsets).max()
    assert task.max_problem_tokens(6) >= np.diff(samples.problem_offsets).max()


class Rare(Parity):
    """One sample in 250 has a problem of four times the size."""

    def sample(self, length, rng):
        rare = rng.random() < 0.004
        return super().sample(4 * length if rare else length, rng)


def test_samples_beyond_the_sizes_are_refused_with_the_remedy() -> None:
    task = Rare().bound(VOCABULARY, 3)
    with pytest.raises(
        ValueError, match="length 3 has max_problem_tokens = 14, more than the 5 ex"
    ):
        task.sample(np.full(2000, 3), seed=0)


class Narrow(Parity):
    def sizes(self, length):
        return Sizes(1, 1, 1, 1)


def test_sizes_of_ones_own_are_proved_before_a_run() -> None:
    with pytest.raises(
        ValueError, match="length 3 has max_problem_tokens = .* define Narrow.sizes"
    ):
        Narrow().bound(VOCABULARY, 3).prove([3])


@pytest.mark.parametrize(
    ("shown", "message"),
    [
        (lambda self, problem, rounds: "7 7", "shown returned '7 7'; return two texts"),
        (lambda self, problem, rounds: ("7", None), r"shown returned \('7', None\); return two"),
        (lambda self, problem, rounds: rounds[0], r"IndexError in <lambda> .*; mend .*, line \d+$"),
    ],
)
def test_what_is_shown_is_two_texts(shown, message: str) -> None:
    task = type("Shows", (Parity,), {"shown": shown})().bound(VOCABULARY, 3)
    with pytest.raises(OwnCodeError, match=message):
        collate_side_by_side(task.sample([3], seed=1), {task.name: task})


def test_unknown_choices_are_refused() -> None:
    for name, value in (("title", 3), ("unit", None)):
        with pytest.raises(ValueError, match=f"task 'parity': {name} = {value} is no text"):
            type("Odd", (Parity,), {name: value})().bound(VOCABULARY, 3)
    for name, value in (("answer_is", "rounds"), ("shows", "all")):
        task = Parity()
        setattr(task, name, value)
        with pytest.raises(ValueError, match=f"task 'parity': {name} = '{value}' is unknown; use"):
            task.bound(VOCABULARY, 3)


def test_tasks_go_to_other_processes() -> None:
    task = pickle.loads(pickle.dumps(bound(Total(base=7))))
    assert task.text.base == 7
    assert np.array_equal(task.sample([3], 1).rounds, bound(Total(base=7)).sample([3], 1).rounds)
    again = make_task(vocabulary=VOCABULARY, **task.to_dict())
    assert (again.index, again.text.base) == (task.index, 7)


def test_own_tasks_are_numbered_behind_the_built_in_ones_by_name() -> None:
    vocabulary = Vocabulary(20, 1, VOCABULARY.tokens)
    entries = {"total": Total().reference(), "lis": {"parameters": {"high": 20}}}
    tasks = tasks_of_config(entries | {"parity": Parity().reference()}, vocabulary)
    assert {name: task.index for name, task in tasks.items()} == {"total": 4, "lis": 2, "parity": 3}
    assert vocabulary.n_tokens == Vocabulary(20, 1).n_tokens + 2  # digits and + are there already
    mixed = Samples.concat([tasks["lis"].sample([5], 0), tasks["total"].sample([2], 0)])
    tokens, offsets, prompts = mixed.sequences(tasks)
    assert vocabulary.texts([tokens[0], tokens[offsets[1]]]) == ["[LIS]", "[total]"]
    with pytest.raises(ValueError, match="hold a task of index 4, which is not among the tasks"):
        mixed.sequences({"lis": tasks["lis"]})


def test_a_class_is_found_by_its_module_or_its_file(tmp_path) -> None:
    assert reference_of(Parity) == f"{CLASS}Parity" and load_class(f"{CLASS}Parity") is Parity
    file = tmp_path / "own.py"
    file.write_text("from tests.support.text_tasks import Parity\nclass Own(Parity):\n    pass\n")
    own = load_class(f"{file}:Own")
    assert issubclass(own, Parity) and reference_of(own) == f"{file}:Own"
    assert load_class(reference_of(own)) is own


class Broken(Parity):
    def __init__(self, what: str = "") -> None:
        self.what = what

    def sample(self, length, rng):
        problem, rounds, answer = super().sample(length, rng)
        if self.what == "empty round":
            rounds[0] = " "
        return {
            "two things": (problem, rounds),
            "a text": (problem, " ".join(rounds), answer),
            "no round": (problem, iter([]), answer),
            "wrong answer": (problem, rounds, "7"),
            "other token": (f"{problem} x", rounds, answer),
            "reserved": (f"{problem} <sep>", rounds, answer),
        }.get(self.what, (problem, rounds, answer))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("two things", r"sample\(2, rng\) returned .*; return three things"),
        ("a text", "return three things"),
        ("no round", "of length 2 has no round; give at least one"),
        ("empty round", "has an empty round ' '; give every round at least one token"),
        ("wrong answer", "has the answer '7', but its rounds imply .*or define answer_of"),
        ("other token", "holds the token 'x', which the vocabulary lacks; name all of its tokens"),
        ("reserved", "holds the token '<sep>', which is reserved"),
    ],
)
def test_bad_samples_are_refused(what: str, message: str) -> None:
    task = Broken(what).bound(VOCABULARY, 3)
    with pytest.raises(ValueError, match=f"^task 'parity': .*{message}"):
        task.sample([2], seed=0)


class Raising(Parity):
    def __init__(self, where: str = "") -> None:
        self.where = where
        if where == "constructor":
            raise KeyError("colour")

    def sample(self, length, rng):
        if self.where == "sample":
            return 1 // 0
        if self.where == "library":
            np.zeros(2).reshape(3)
        if self.where == "exit":
            raise SystemExit(3)
        return None if self.where == "nothing" else super().sample(length, rng)

    def solve(self, problem):
        raise KeyError(problem)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("sample", r"ZeroDivisionError in sample \(.*by zero\); mend .*, line (\d+)$"),
        ("library", r"ValueError in sample \(cannot reshape .*\); mend .*, line (\d+)$"),
        ("exit", r"SystemExit in sample \(3\); mend .*, line (\d+)$"),
        ("nothing", r"sample\(2, rng\) returned None; return three .* text \(.*, line (\d+)\)$"),
        ("solve", r"KeyError in solve \('.*'\); mend .*, line (\d+)$"),
    ],
)
def test_a_task_that_raises_is_named_with_its_line(where: str, message: str) -> None:
    method = Raising.solve if where == "solve" else Raising.sample
    first = method.__code__.co_firstlineno
    line = first + {"sample": 2, "library": 4, "exit": 6, "nothing": 0, "solve": 1}[where]
    with pytest.raises(ValueError, match=f"^task 'parity': {message}") as caught:
        Raising(where).bound(VOCABULARY, 3).prove([2])
    assert __file__ in str(caught.value)
    assert int(str(caught.value).rstrip(")").rpartition(" ")[2]) == line


class Nameless(TextTask):
    def sample(self, length, rng):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"class": f"{__name__}:Nameless"}, "Nameless has no name: write name = 'parity' in the"),
        (
            {"class": f"{__name__}:Raising", "parameters": {"where": "constructor"}},
            "tasks.parity: Raising cannot be built .KeyError: 'colour'.",
        ),
        ({}, "tasks.parity: unknown task 'parity'; known are arithmetic, .*others need a class"),
        ({"class": "Parity"}, "tasks.parity.class = 'Parity': write it as \"module:Class\""),
        ({"class": f"{CLASS}Gone"}, "Gone' cannot be imported .AttributeError.*path of its file"),
        ({"class": "no_such_module:Parity"}, "cannot be imported .ModuleNotFoundError"),
        ({"class": "pathlib:Path"}, "tasks.parity.class = 'pathlib:Path' is no task; derive it"),
        ({"class": f"{CLASS}VALUE"}, "is no class"),
        ({"class": f"{CLASS}Total"}, "is the task 'total': write it under tasks.total"),
        (
            {"class": f"{CLASS}Parity", "parameters": {"n": 1}},
            "Parity cannot be built .unknown parameter 'n'; it has none",
        ),
        (
            {"class": f"{CLASS}Total", "parameters": {"bas": 1}},
            "Total cannot be built .unknown parameter 'bas'; known are base",
        ),
        ({"class": f"{CLASS}Parity", "data": "x"}, "has a class and data: give one of them"),
    ],
)
def test_bad_entries_are_refused(entry: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tasks_of_config({"parity": entry}, VOCABULARY)


def test_a_class_that_no_process_could_import_is_refused() -> None:
    class Inner(Parity):
        pass

    with pytest.raises(
        ValueError, match="Inner is defined in a function or an interactive session"
    ):
        Inner().reference()
    with pytest.raises(ValueError, match="an argument of Total cannot be saved with a run"):
        Total(base=object())


class Sized(Parity):
    def __init__(self, sizes) -> None:
        self.given = sizes

    def sample(self, length, rng):
        problem, rounds, answer = super().sample(length, rng)
        return problem, iter(rounds), answer  # any iterable will do

    def sizes(self, length):
        return self.given[str(length)] if isinstance(self.given, dict) else self.given


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            [2, 1, 2],
            r"sizes\(2\) returned \[2, 1, 2\]; return Sizes\(problem, round, chain, rounds",
        ),
        ([2, 1, 2, 1.5], r"sizes\(2\) returned .*, whole numbers"),
        (3, r"sizes\(2\) returned 3; return Sizes"),
        ({}, r"KeyError in sizes \('2'\); mend .*, line \d+"),
    ],
)
def test_sizes_of_ones_own(sizes, message) -> None:
    good = Sized([2, 1, 2, 2]).bound(VOCABULARY, 3)
    assert (good.max_problem_tokens(2), good.max_round_tokens(2)) == (4, 2)
    assert (good.max_chain_tokens(2), good.loops(2)) == (4, 2)
    assert len(good.sample([2, 2], 0)) == 2
    with pytest.raises(ValueError, match=f"^task 'parity': {message}"):
        Sized(sizes).bound(VOCABULARY, 3).max_problem_tokens(2)
