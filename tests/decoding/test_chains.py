"""Looped and autoregressive chains: what is read off, and what is kept."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from relay_fast.batch.packed import PackedBatch
from relay_fast.decoding import chains
from relay_fast.decoding.autoregressive import Decoded
from relay_fast.decoding.chains import (
    generate_ar_chains,
    generate_looped_chains,
    generate_scored,
    stream_chains,
    unseen_problems,
)
from relay_fast.models.transformers import LoopedTransformer
from relay_fast.tasks import NO_ANSWER, Samples
from relay_fast.tasks.verify import verify_chains
from relay_fast.tasks.vocabulary import EOS, NUMBER0, PAD
from relay_fast.utils.ragged import lengths_to_offsets
from relay_fast.utils.seeds import EVAL_SEED_OFFSET
from tests.support.chain_models import (
    TASKS,
    VOCABULARY,
    ar_model,
    looped_copy,
    looped_model,
    mixed_problems,
)
from tests.support.memory import peak_bytes


class Oracle(LoopedTransformer):
    """Reads the truth off, with garbage left of each round's boundary <pad>."""

    def __init__(self, problems: Samples):
        super().__init__(looped_model().config)
        self.answers = {
            tuple(problems.problem_of(i).tolist()): (
                [r.tolist() for r in problems.rounds_of(i)],
                int(problems.answer[i]),
            )
            for i in range(len(problems))
        }
        self.batches: list[PackedBatch] = []

    def predict_rounds(self, batch: PackedBatch):
        self.batches.append(batch)
        plan, tokens = batch.plan, batch.tokens.numpy()
        known = []
        for a, b in zip(plan.offsets[:-1], plan.offsets[1:], strict=True):
            row = tokens[a:b]
            known.append(self.answers[tuple(row[row != PAD].tolist())])
        rounds = []
        for t, active in enumerate(plan.active_sequences):
            ids = np.full(plan.rows_at(t + 1), 7)
            for s in range(active):
                text = known[s][0][t]
                end = plan.offsets[s + 1]
                ids[end - len(text) : end] = text
                ids[end - len(text) - 1] = PAD
            rounds.append(torch.from_numpy(ids))
        return rounds, torch.tensor([answer for _, answer in known])


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_rounds_are_read_from_the_right_in_the_callers_order(batch_tokens):
    problems = mixed_problems()
    oracle = Oracle(problems)
    seen = []
    written = generate_looped_chains(
        oracle, problems, TASKS, batch_tokens=batch_tokens, progress=lambda *a: seen.append(a)
    )
    for name in Samples.__dataclass_fields__:
        assert np.array_equal(getattr(written, name), getattr(problems, name)), name
    assert seen[-1] == (len(problems), len(problems))
    assert len(oracle.batches) == len(seen)
    loops = [batch.plan.loops for batch in oracle.batches]
    assert np.all(np.diff(np.concatenate(loops)) <= 0), "batches of similar loop counts"
    assert verify_chains(written, TASKS, "task").all()


def test_the_truth_is_not_read():
    problems = mixed_problems()
    lies = replace(
        problems, rounds=np.full_like(problems.rounds, 5), answer=np.full_like(problems.answer, 6)
    )
    model = looped_model()
    written, again = (generate_looped_chains(model, p, TASKS) for p in (problems, lies))
    for name in Samples.__dataclass_fields__:
        assert np.array_equal(getattr(written, name), getattr(again, name)), name


def test_batching_does_not_change_what_a_model_writes():
    problems = mixed_problems()
    model = looped_model()
    one = generate_looped_chains(model, problems, TASKS, batch_tokens=1)
    all_at_once = generate_looped_chains(model, problems, TASKS)
    assert np.array_equal(one.rounds, all_at_once.rounds)
    assert np.array_equal(one.round_offsets, all_at_once.round_offsets)
    assert np.array_equal(one.answer, all_at_once.answer)
    assert np.array_equal(one.loops, problems.loops)


def test_rows_of_pad_and_rows_without_any():
    problems = TASKS["arithmetic"].sample([2, 3], 0)
    model = looped_model()

    def read(batch):
        ids = [torch.full((n,), PAD if t else 9) for t, n in enumerate(batch.plan.active_rows)]
        return ids, torch.zeros(len(batch), dtype=torch.int64)

    model.predict_rounds = read
    written = generate_looped_chains(model, problems, TASKS)
    sizes = np.diff(problems.problem_offsets).tolist()
    assert np.diff(written.round_offsets).tolist() == [sizes[0], 0, sizes[1], 0, 0]


def test_no_problems():
    problems = TASKS["lis"].sample([], 0)
    assert len(generate_looped_chains(looped_model(), problems, TASKS)) == 0
    assert len(generate_ar_chains(ar_model(), problems, TASKS)) == 0


def test_training_mode_is_kept():
    model = looped_model().train()
    generate_looped_chains(model, mixed_problems(2), TASKS)
    assert model.training


def test_a_problem_longer_than_the_model_takes():
    with pytest.raises(ValueError, match="prompt 19 of 19 tokens is longer .* limit of 8: shorten"):
        generate_looped_chains(looped_model(max_tokens=8), mixed_problems(), TASKS)
    # The input is padded to 6 tokens: `min_input_tokens` counts as the model sees it.
    with pytest.raises(ValueError, match="prompt 0 of 6 tokens is longer .* limit of 5"):
        generate_looped_chains(looped_model(max_tokens=5), TASKS["lis"].sample([2], 0), TASKS)


@pytest.mark.parametrize("token", [-1, VOCABULARY.size])
def test_a_problem_with_an_unknown_token(token):
    problems = TASKS["arithmetic"].sample([2, 3, 2], 0)
    problems.problem[problems.problem_offsets[1] + 2] = token
    with pytest.raises(ValueError, match=f"token {token} of prompt 1 is outside the model's voc"):
        generate_looped_chains(looped_model(), problems, TASKS)


def test_another_kind_of_model_a_missing_task_and_no_batch():
    problems = mixed_problems(2)
    with pytest.raises(
        TypeError,
        match="generate_looped_chains needs a looped model: use .*generate_ar_chains for",
    ):
        generate_looped_chains(ar_model(), problems, TASKS)
    with pytest.raises(ValueError, match="the model is not causal"):
        generate_ar_chains(looped_model(), problems, TASKS)
    for write, model in (
        (generate_looped_chains, looped_model()),
        (generate_ar_chains, ar_model()),
    ):
        with pytest.raises(
            ValueError, match="hold 'edit_distance', which is not among the tasks given"
        ):
            write(model, problems, {k: TASKS[k] for k in ("arithmetic", "lis")})
    with pytest.raises(ValueError, match="batch_tokens = 0: it must be 1 or more"):
        generate_looped_chains(looped_model(), problems, TASKS, batch_tokens=0)


def test_batches_come_as_they_are_done():
    problems = mixed_problems()
    model = looped_model()
    whole = generate_looped_chains(model, problems, TASKS)
    seen, loops = [], []
    for chosen, written in stream_chains(model, problems, TASKS, batch_tokens=60):
        part = whole.take(chosen)
        for name in Samples.__dataclass_fields__:
            assert np.array_equal(getattr(written, name), getattr(part, name)), name
        assert np.diff(written.problem_offsets).sum() <= 60
        seen += chosen.tolist()
        loops += written.loops.tolist()
    assert sorted(seen) == list(range(len(problems))) and loops == sorted(loops, reverse=True)


def test_out_of_memory_halves_the_batch(monkeypatch):
    problems = mixed_problems()
    model = looped_model()
    sizes = []

    def read(batch):
        sizes.append(batch.plan.rows)
        if batch.plan.rows > 100:
            raise torch.OutOfMemoryError("no room")
        return LoopedTransformer.predict_rounds(model, batch)

    model.predict_rounds = read
    expected = generate_looped_chains(looped_copy(model), problems, TASKS)
    written = generate_looped_chains(model, problems, TASKS)
    for name in Samples.__dataclass_fields__:
        assert np.array_equal(getattr(written, name), getattr(expected, name)), name
    failed = [size for size in sizes if size > 100]
    assert sizes[: len(failed)] == failed, "what comes later is cut as small from the start"
    assert 2 <= len(failed) <= 5
    model.predict_rounds = lambda batch: (_ for _ in ()).throw(torch.OutOfMemoryError("no room"))
    with pytest.raises(torch.OutOfMemoryError):
        generate_looped_chains(model, problems, TASKS)


def test_batches_fit_into_free_memory(monkeypatch):
    problems = mixed_problems()
    model = looped_model()
    seen = []
    monkeypatch.setattr(chains, "free_bytes", lambda device: 1 << 20)
    generate_looped_chains(model, problems, TASKS, progress=lambda *a: seen.append(a))
    few = len(seen)
    monkeypatch.setattr(chains, "free_bytes", lambda device: 1 << 40)
    generate_looped_chains(model, problems, TASKS, progress=lambda *a: seen.append(a))
    assert few > 1 and len(seen) == few + 1


def test_log_probabilities_of_looped_chains():
    problems = mixed_problems(4)
    model = looped_model()
    written, scores = generate_scored(model, problems, TASKS, batch_tokens=50)
    plain = generate_looped_chains(model, problems, TASKS)
    for name in Samples.__dataclass_fields__:
        assert np.array_equal(getattr(written, name), getattr(plain, name)), name
    assert scores.rounds.dtype == scores.answer.dtype == np.float32

    def log_softmax(state, head):
        y = torch.nn.functional.rms_norm(state, state.shape[-1:], model.norm.weight, 1e-6)
        return head(y).log_softmax(-1)

    for i in range(len(problems)):
        batch = PackedBatch.looped(problems.take([i]), TASKS)
        with torch.no_grad():
            x = model.embedding(batch.tokens)
            states = model.block(x[None], int(problems.loops[i]), return_states=True)
            own = []
            for state, text in zip(states, written.rounds_of(i), strict=True):
                rows = log_softmax(state[0], model.chain_head)[len(x) - len(text) :]
                own += rows[torch.arange(len(text)), torch.from_numpy(text).long()].tolist()
            answer = log_softmax(states[-1][0, -1], model.answer_head)[int(written.answer[i])]
        a, b = written.round_offsets[written.first_round[i : i + 2]]
        np.testing.assert_allclose(scores.rounds[a:b], own, atol=1e-5)
        np.testing.assert_allclose(scores.answer[i], float(answer), atol=1e-5)


def test_memory_is_flat_in_loops_and_in_problems():
    model = looped_model()
    one = TASKS["arithmetic"].sample(np.full(40, 3), 0)

    def peak(problems: Samples, **options) -> int:
        def call() -> None:
            for _ in stream_chains(model, problems, TASKS, **options):
                pass

        return peak_bytes(call)

    base = peak(one, batch_tokens=200)
    many = Samples.concat([one] * 6)
    assert peak(many, batch_tokens=200) < 1.2 * base
    more_loops = replace(
        one,
        loops=np.full(40, 24, np.int32),
        rounds=np.zeros(0, np.int32),
        round_offsets=np.zeros(40 * 24 + 1, np.int64),
    )
    ids = 8 * 200 * 24  # the token ids of the further iterations, which leave the device
    assert peak(more_loops, batch_tokens=200) < 1.2 * base + 3 * ids


def corrupt_last_round(samples: Samples, i: int) -> Samples:
    rounds = samples.rounds.copy()
    end = samples.round_offsets[samples.first_round[i + 1]]
    rounds[end - 1] = PAD + 8
    return replace(samples, rounds=rounds)


def test_verification():
    problems = mixed_problems(4)
    assert verify_chains(problems, TASKS, "task").all()
    assert verify_chains(problems, TASKS, "self").all()

    broken = corrupt_last_round(problems, 3)
    for how in ("task", "self"):
        assert np.flatnonzero(~verify_chains(broken, TASKS, how)).tolist() == [3]
    assert verify_chains(broken, TASKS, None).all()

    answer = problems.answer.copy()
    answer[5] += 1
    wrong = replace(problems, answer=answer)
    for how in ("task", "self"):
        assert np.flatnonzero(~verify_chains(wrong, TASKS, how)).tolist() == [5]
    with pytest.raises(ValueError, match="verify = \"?'?truth"):
        verify_chains(problems, TASKS, "truth")


def test_a_consistent_error_passes_the_label_free_filter_only():
    task = TASKS["arithmetic"]
    problems = task.sample([3], 0)
    rounds = problems.rounds.copy()
    middle = problems.round_offsets[1]
    number = middle + int(np.argmax(rounds[middle:] >= NUMBER0))
    rounds[number] = NUMBER0 + 60
    written = replace(problems, rounds=rounds)
    assert verify_chains(written, TASKS, "self").all()
    assert not verify_chains(written, TASKS, "task").any()


def test_autoregressive_chains_are_split_as_the_task_says(monkeypatch):
    problems = mixed_problems(3)
    sequence, offsets, prompts = problems.sequences(TASKS)
    texts = [sequence[a + p : b] for a, b, p in zip(offsets, offsets[1:], prompts, strict=False)]
    texts[0] = np.array([8, 8, EOS], np.int32)  # can be read by no task
    texts[1] = np.zeros(0, np.int32)
    sizes = np.array([len(text) for text in texts])
    decoded = Decoded(np.concatenate(texts), lengths_to_offsets(sizes), np.ones(len(texts), bool))
    limits = {}

    def fake(model, prompt, prompt_offsets, *, max_new):
        limits["max_new"] = max_new
        assert np.array_equal(prompt, problems.problem)
        return decoded

    monkeypatch.setattr(chains, "decode", fake)
    written = generate_ar_chains(ar_model(), problems, TASKS)
    assert written.answer[:2].tolist() == [NO_ANSWER, NO_ANSWER]
    assert written.loops[1] == 0
    rest, truth = written.take(slice(2, None)), problems.take(slice(2, None))
    for name in Samples.__dataclass_fields__:
        assert np.array_equal(getattr(rest, name), getattr(truth, name)), name
    assert np.all(limits["max_new"] >= np.diff(offsets) - prompts)


def test_unseen_problems_are_nested_and_far_from_training_seeds():
    task = TASKS["arithmetic"]
    few, many = unseen_problems(task, 5, 3, seed=2), unseen_problems(task, 5, 9, seed=2)
    assert np.array_equal(few.problem, many.take(slice(0, 3)).problem)
    assert np.array_equal(few.problem, task.sample([5] * 3, 2 + EVAL_SEED_OFFSET).problem)
