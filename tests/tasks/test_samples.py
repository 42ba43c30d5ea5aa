import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay_fast.tasks import TASK_NAMES, Samples, Vocabulary, build_tasks

VOCABULARY = Vocabulary()
TASKS = build_tasks(TASK_NAMES, VOCABULARY)


def mixed() -> Samples:
    # Lengths that differ within and between tasks; LIS 10 and 11 are one and two rounds.
    lengths = {"arithmetic": [1, 4, 2], "edit_distance": [3, 1, 5], "lis": [11, 1, 10]}
    parts = [TASKS[name].sample(lengths[name], seed=5) for name in TASK_NAMES]
    return Samples.concat(parts).take([4, 0, 8, 2, 6, 1, 3, 7, 5])


def as_lists(samples: Samples) -> list[tuple]:
    return [
        (
            int(samples.task[i]),
            int(samples.length[i]),
            samples.problem_of(i).tolist(),
            [r.tolist() for r in samples.rounds_of(i)],
            int(samples.loops[i]),
            int(samples.answer[i]),
        )
        for i in range(len(samples))
    ]


def test_dtypes_and_shapes() -> None:
    samples = mixed()
    for field in dataclasses.fields(Samples):
        offsets = field.name.endswith("_offsets")
        assert getattr(samples, field.name).dtype == (np.int64 if offsets else np.int32), field
    assert len(samples) == 9
    assert samples.problem_offsets.shape == samples.first_round.shape == (10,)
    assert samples.round_offsets.shape == (samples.loops.sum() + 1,)
    assert samples.problem_offsets[-1] == len(samples.problem)
    assert samples.round_offsets[-1] == len(samples.rounds)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-9, 8), max_size=12))
def test_take_is_list_indexing(index: list[int]) -> None:
    samples = mixed()
    rows = as_lists(samples)
    taken = samples.take(np.array(index, np.int64))
    assert as_lists(taken) == [rows[i] for i in index]


def test_take_mask_slice_and_single() -> None:
    samples = mixed()
    rows = as_lists(samples)
    assert as_lists(samples.take(samples.task == 1)) == [r for r in rows if r[0] == 1]
    assert as_lists(samples.take(slice(None, None, -2))) == rows[::-2]
    assert as_lists(samples.take(3)) == [rows[3]]
    assert samples.problem_of(-1).tolist() == rows[-1][2]
    with pytest.raises(IndexError):
        samples.take([9])
    with pytest.raises(IndexError, match="sample 9 of 9"):
        samples.rounds_of(9)


def test_concat() -> None:
    samples = mixed()
    empty = Samples.concat([])
    assert len(empty) == 0 and empty.round_offsets.tolist() == [0]
    parts = [samples.take(slice(0, 2)), empty, samples.take(slice(2, 9))]
    assert as_lists(Samples.concat(parts)) == as_lists(samples)
    for field in dataclasses.fields(Samples):
        joined = getattr(Samples.concat(parts), field.name)
        assert joined.dtype == getattr(samples, field.name).dtype
        assert np.array_equal(joined, getattr(samples, field.name))


def test_sequences_of_the_documented_examples() -> None:
    texts = {
        "arithmetic": (
            "3 * 2 + 6 / 3 =",
            "[ARI] 3 * 2 + 6 / 3 = 6 + 6 / 3 = 6 + 2 = 8 <eos>",
        ),
        "edit_distance": (
            "o t m l | o t t m l <sep>",
            "[ED] o t m l | o t t m l <sep> 0 2 4 6 7 , 2 0 2 4 6 , 4 2 3 2 4 , 6 4 5 4 2 , "
            "<sep> 2 <eos>",
        ),
        "lis": (
            "103 110 145 217 233 18 30 82 141 150 159 161 167 239 <sep>",
            "[LIS] 103 110 145 217 233 18 30 82 141 150 159 161 167 239 <sep> "
            "1 2 3 4 5 1 2 3 4 5 <sep> 6 7 8 9 9 9 9 9 9 9 <sep> 9 <eos>",
        ),
    }
    parts = []
    for name, (text, _) in texts.items():
        task = TASKS[name]
        problem = task.encode(text)
        rounds, answer = task.solve(problem)
        sizes = [len(r) for r in rounds]
        parts.append(
            Samples(
                task=np.array([task.index], np.int32),
                length=np.array([task.length_of(problem)], np.int32),
                problem=np.array(problem, np.int32),
                problem_offsets=np.array([0, len(problem)]),
                rounds=np.array(sum(rounds, []), np.int32),
                round_offsets=np.cumsum([0, *sizes]),
                loops=np.array([len(rounds)], np.int32),
                answer=np.array([answer], np.int32),
            )
        )
    tokens, offsets, prompts = Samples.concat(parts).sequences(TASKS)
    for i, (name, (text, sequence)) in enumerate(texts.items()):
        written = tokens[offsets[i] : offsets[i + 1]]
        assert VOCABULARY.decode(written) == sequence
        assert written[: prompts[i]].tolist() == TASKS[name].encode(text)


def test_sequences_of_a_mixture() -> None:
    samples = mixed()
    tokens, offsets, prompts = samples.sequences(TASKS)
    assert (tokens.dtype, offsets.dtype, prompts.dtype) == (np.int32, np.int64, np.int32)
    assert offsets[-1] == len(tokens)
    for i in range(len(samples)):
        name = TASK_NAMES[samples.task[i]]
        chain = sum((r.tolist() for r in samples.rounds_of(i)), samples.problem_of(i).tolist())
        tail = {"arithmetic": [], "edit_distance": [6], "lis": []}[name]
        tail += [] if name == "arithmetic" else [int(samples.answer[i])]
        written = tokens[offsets[i] : offsets[i + 1]].tolist()
        assert written == [*chain, *tail, 1]
        rounds, answer = TASKS[name].split(written[prompts[i] :])
        assert rounds == [r.tolist() for r in samples.rounds_of(i)]
        assert answer == samples.answer[i]


def test_sequences_of_nothing() -> None:
    tokens, offsets, prompts = Samples.concat([]).sequences({})
    assert (len(tokens), offsets.tolist(), len(prompts)) == (0, [0], 0)


def test_sequences_needs_the_tasks() -> None:
    with pytest.raises(ValueError, match="hold 'lis', which is not among the tasks given; add it"):
        mixed().sequences({k: TASKS[k] for k in TASK_NAMES[:2]})
