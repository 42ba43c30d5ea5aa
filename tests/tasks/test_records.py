"""Tasks of records: samples are the records, whoever draws them, and some are never drawn."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from relay_fast.data.collate import collate_autoregressive, collate_looped
from relay_fast.data.streams import BatchFormat, TruthStream, prefetch
from relay_fast.tasks import NO_ANSWER, RecordsTask, Samples, Task, Vocabulary
from relay_fast.tasks.record_pools import permuted
from relay_fast.tasks.verify import verify_chains


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RELAY_FAST_CACHE", str(tmp_path / "cache"))


def sums(length: int, k: int = 0) -> dict:
    """Running sums of digits, modulo 10."""
    digits = np.random.default_rng([length, k]).integers(0, 10, length).tolist()
    rounds = [f"{sum(digits[: t + 1]) % 10}" for t in range(length)]
    return {"problem": " ".join(map(str, digits)), "rounds": rounds, "answer": rounds[-1]}


def many(lengths=range(1, 6), number: int = 40) -> list[dict]:
    return [sums(length, k) for length in lengths for k in range(number)]


def bound(task: RecordsTask) -> Task:
    tokens = [*task.special_tokens(), *task.vocabulary_tokens([])]
    made = task.bound(Vocabulary(max_number=None, multiple=1, tokens=tuple(tokens)), 3)
    made.prove([])
    return made


def as_records(task: Task, samples: Samples) -> list[tuple]:
    """(problem, rounds, answer) of samples, as texts."""
    texts = []
    for i in range(len(samples)):
        rounds = [r.tolist() for r in samples.rounds_of(i)]
        answer = task.answer_text(rounds, int(samples.answer[i]))
        texts.append((task.plain_text(samples.problem_of(i)), [*map(task.decode, rounds)], answer))
    return texts


def as_tuples(records: list[dict]) -> list[tuple]:
    return [(r["problem"], r["rounds"], r["answer"]) for r in records]


def equal(a: Samples, b: Samples) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in vars(a))


@pytest.mark.parametrize("tokeniser", ["whitespace", "characters", "bytes"])
def test_samples_are_the_records(tokeniser):
    records = many()
    task = bound(RecordsTask.of("sums", records, tokeniser=tokeniser, held_out=0.0))
    lengths = np.repeat(np.arange(1, 6), 40)
    samples = task.sample(lengths, seed=1)
    assert samples.length.tolist() == samples.loops.tolist() == lengths.tolist()
    assert sorted(as_records(task, samples)) == sorted(as_tuples(records))
    assert verify_chains(samples, {"sums": task}, "self").all()
    assert (task.answers_of(samples) == samples.answer).all()
    assert max(np.diff(samples.problem_offsets)) == task.max_problem_tokens(5)
    assert max(np.diff(samples.round_offsets)) == task.max_round_tokens(5)
    sizes = np.diff(samples.sequences({"sums": task})[1])
    assert sizes.max() == task.max_sequence_tokens(5)


def test_a_sample_depends_on_seed_and_number_alone():
    task = bound(RecordsTask.of("sums", many()))
    lengths = np.random.default_rng(0).integers(1, 6, 64)
    whole = task.sample(lengths, seed=7, start=100)
    again = pickle.loads(pickle.dumps(task))
    parts = [again.sample(lengths[a : a + 16], 7, 100 + a) for a in range(0, 64, 16)]
    assert equal(Samples.concat(parts), whole)
    assert not equal(task.sample(lengths, seed=8, start=100), whole)
    assert len(task.sample(lengths[:0], 1)) == 0


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 63, 64, 65, 1000])
def test_each_record_is_drawn_once_before_one_is_drawn_again(size):
    order = np.arange(3 * size, dtype=np.uint64)
    sizes, stream = np.full_like(order, size), np.full_like(order, 9)
    drawn = permuted(order, sizes, 5, stream).reshape(3, size)
    assert (np.sort(drawn, axis=1) == np.arange(size)).all()
    if size >= 63:
        assert not (drawn[0] == drawn[1]).all()
        assert (drawn[0] == np.arange(size)).mean() < 0.1
        other = permuted(order, sizes, 5, stream + np.uint64(1)).reshape(3, size)
        assert (other == drawn).mean() < 0.1


def test_records_that_are_kept_are_never_drawn():
    records = many(number=200)
    records += [{**r, "note": "again"} for r in records[:300]]  # equal problems stay together
    task = bound(RecordsTask.of("sums", records, held_out=0.25))
    drawn = {
        text[0]
        for length in range(1, 6)
        for text in as_records(task, task.sample(np.full(900, length), 0))
    }
    kept = {text[0] for n in range(1, 6) for text in as_records(task, task.unseen(n, 10**6, 0))}
    assert not drawn & kept
    assert drawn | kept == {r["problem"] for r in records}
    assert 0.2 < len(kept) / len(drawn | kept) < 0.3
    few, more = task.unseen(4, 5, seed=2), task.unseen(4, 20, seed=2)
    assert equal(few, more.take(slice(5))) and not equal(few, task.unseen(4, 5, seed=3))
    report = task.report(1, 4)
    assert report["records"] == 1300 and report["duplicates"] == 0
    assert report["test"] == sum(len(task.unseen(n, 10**6, 0)) for n in range(1, 6))
    assert report["train"] == sum(task.most_problems(n) for n in range(1, 5))


def test_a_file_for_tests_alone(tmp_path):
    train, test = many([1, 2, 3], 30), many([2, 4], 10)
    for name, records in (("train", train), ("test", test)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    files = [str(tmp_path / f"{name}.jsonl") for name in ("train", "test")]
    task = bound(RecordsTask("sums", files[0], test_data=files[1]))
    assert [task.most_problems(n) for n in (1, 2, 3)] == [30, 30, 30]
    assert sorted(as_records(task, task.unseen(4, 99, 0))) == sorted(as_tuples(test[10:]))
    assert task.lengths_between(2, 9).tolist() == [2, 3, 4]
    # The ten problems of length 2 are among those that are trained on.
    assert task.report(1, 3)["duplicates"] == 10
    with pytest.raises(ValueError, match="train.jsonl has no records of length 4|are kept for"):
        task.sample(np.array([4]), 0)


def test_problems_alone_have_empty_rounds():
    records = [*many([1, 2]), *({"problem": r["problem"], "length": 3} for r in many([3], 8))]
    task = bound(RecordsTask.of("sums", records))
    samples = task.sample(np.array([3, 2, 3, 1]), 0)
    assert samples.loops.tolist() == [3, 2, 3, 1]
    assert (samples.answer == NO_ANSWER).tolist() == [True, False, True, False]
    sizes = [[len(r) for r in samples.rounds_of(i)] for i in range(4)]
    assert sizes == [[0, 0, 0], [2, 2], [0, 0, 0], [2]]
    assert np.diff(samples.problem_offsets).tolist() == [5, 4, 5, 3]
    assert len(task.unseen(3, 5, 0)) == 0 and task.most_problems(3) == 8
    task.check_range(1, 2)
    with pytest.raises(ValueError, match=r"line 81 has no rounds, but its length 3 is in the"):
        task.check_range(1, 3)


LONG = [{"problem": "a b", "rounds": ["c d e f g", "h"], "answer": "h", "length": 2}]


def test_inputs_are_padded_for_long_rounds():
    task = bound(RecordsTask.of("long", LONG, held_out=0.0))
    samples = task.sample(np.array([2]), 0)
    assert task.min_widths(np.array([2])).tolist() == [7]  # 5 tokens, <sep> and the <pad> before
    assert collate_looped(samples, {"long": task}).plan.lengths.tolist() == [7]
    assert task.report(2, 2)["rounds_padded"] == 1


def test_long_rounds_are_split():
    task = bound(RecordsTask.of("long", LONG, long_rounds="split", held_out=0.0))
    samples = task.sample(np.array([2, 2]), 0)
    rounds = [[task.vocabulary.decode(r) for r in samples.rounds_of(i)] for i in (0, 1)]
    assert rounds == 2 * [["c d e", "f g <sep>", "h <sep>"]]
    assert samples.loops.tolist() == [3, 3] and task.loops(2) == 3
    assert collate_looped(samples, {"long": task}).plan.lengths.tolist() == [4, 4]
    assert (task.answers_of(samples) == samples.answer).all()
    assert samples.answer.tolist() == [task.vocabulary.id_of("h")] * 2
    collate_autoregressive(samples, {"long": task})
    assert task.report(2, 2)["rounds_split"] == 1


@pytest.mark.parametrize("answer_is", ["token", "added"])
def test_answers_of_split_rounds(answer_is):
    # The last round and its <sep> are split behind the third token, so that <sep> stands alone.
    values = [{"problem": "a b", "rounds": ["b", "c d e"], "answer": "e", "length": 2}]
    if answer_is == "added":
        values[0]["answer"] = "f e d g"
    task = bound(
        RecordsTask.of("long", values, long_rounds="split", held_out=0.0, answer_is=answer_is)
    )
    truth = task.sample(np.array([2]), 0)
    rounds = [r.tolist() for r in truth.rounds_of(0)]
    assert task.decode(rounds[-1]) == ("" if answer_is == "token" else "g")
    assert verify_chains(truth, {"long": task}, "self").all()
    assert task.answer_text(rounds, int(truth.answer[0])) == values[0]["answer"]
    # An autoregressive model writes whole rounds, which are split as the true ones are.
    tokens, offsets, prompts = truth.sequences({"long": task})
    assert task.split_for(tokens[prompts[0] :].tolist(), 4) == (rounds, truth.answer[0])
    wrong = truth.rounds.copy()
    wrong[-3] = task.vocabulary.id_of("a")
    written = replace(truth, rounds=wrong)
    assert task.same_answers(written, truth).tolist() == [answer_is == "token"]


def stream(task: Task) -> TruthStream:
    schedule = SimpleNamespace(steps=6, progress=np.linspace(0, 1, 6))
    form = BatchFormat("looped")
    return TruthStream(
        {"sums": task}, {"sums": (1, 4)}, form, schedule, batch_size=8, seed=3, curriculum=0.5
    )


def test_batches_do_not_depend_on_workers_nor_on_an_interruption():
    steps = stream(bound(RecordsTask.of("sums", [*many([1, 2, 4]), *many([9], 3)])))
    alone = [steps[k] for k in range(6)]
    assert {n for step in alone for n in step.longest_true.values()} <= {1, 2, 4}
    by_workers = list(prefetch(steps, 1, workers=2))  # as after an interruption at step 1
    for one, other in zip(alone[1:], by_workers, strict=True):
        assert np.array_equal(one.batch.tokens, other.batch.tokens)
        assert np.array_equal(one.batch.targets, other.batch.targets)
        assert one.longest_true == other.longest_true


def test_the_answer_may_have_many_tokens():
    records = [sums(3, k) for k in range(4)]
    for record in records:
        record["answer"] = f"so {record['answer']} it is"
    task = bound(RecordsTask.of("sums", records, answer_is="added", held_out=0.0))
    samples = task.sample(np.full(4, 3), 0)
    assert samples.loops.tolist() == [4] * 4 and samples.length.tolist() == [3] * 4
    found = as_records(task, samples)
    assert sorted(text[2] for text in found) == sorted(r["answer"] for r in records)
    assert all(text[1][-1] == text[2] for text in found)


@pytest.mark.parametrize(
    ("options", "vocabulary", "message"),
    [
        ({"held_out": 1.0}, None, "held_out = 1.0: give a share of at least 0, less than 1"),
        ({"long_rounds": "cut"}, None, "long_rounds = 'cut' is unknown: use one of pad, split"),
        ({"answer_is": "last"}, None, "answer_is = 'last' is unknown: use one of token, round, a"),
        ({"shows": "all"}, None, "shows = 'all' is unknown: use one of both, round"),
        ({"tokeniser": "words"}, None, "tokeniser = 'words' is unknown: give \"whitespace\""),
        ({"content": "other"}, None, "jsonl has changed since the run began: restore the file"),
        ({}, "0 1 2 3 4", "line 1 has the token '7', which the vocabulary lacks: add it to vo"),
    ],
)
def test_refusals(options, vocabulary, message):
    records = [{"problem": "7 1", "rounds": ["7", "8"], "answer": "8"}]
    with pytest.raises(ValueError, match=message):
        task = RecordsTask.of("sums", records, **options)
        tokens = [*task.special_tokens(), *(vocabulary or "7 1 8").split()]
        task.bound(Vocabulary(max_number=None, tokens=tuple(tokens)), 3).prove([])
        assert task.pools is None


def test_a_length_without_records_is_refused():
    task = bound(RecordsTask.of("sums", many([1, 2, 4, 7, 8], 3), held_out=0.9))
    with pytest.raises(ValueError, match=r"has no records of length 3: it has 1..2, 4, 7..8"):
        task.sample(np.array([3]), 0)
    with pytest.raises(ValueError, match="all records of length . in .* are kept for evaluation"):
        for length in (1, 2, 4, 7, 8):
            task.sample(np.array([length]), 0)


def test_a_run_that_kept_records_by_their_texts_is_refused_where_that_differs():
    """Tokens decide what is kept for evaluation: where they are not the text, an earlier version
    kept others, some of which a run begun by it has trained on."""
    made = lambda problem, **options: RecordsTask.of(
        "sums", [{"problem": problem, "rounds": ["8"], "answer": "8"}] * 4, held_out=0.5, **options
    )
    plain, spaced = made("7 1"), made("7  1")
    before = spaced._content(spaced.pools).removesuffix("-tokens")
    assert before != spaced._content(spaced.pools)
    with pytest.raises(ValueError, match="begun by an earlier version, which kept other records"):
        assert made("7  1", content=before).pools is None
    same = plain._content(plain.pools)
    assert "tokens" not in same and made("7 1", content=same).pools is not None
