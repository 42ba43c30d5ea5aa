"""Looped and autoregressive chains: what is read off, what is kept, what the command prints."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from relay_fast import generate
from relay_fast.batch import PackedBatch
from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.decode import Decoded
from relay_fast.generate import (
    NO_ANSWER,
    UNSEEN,
    generate_chains,
    main,
    unseen_problems,
    verify_chains,
    write_chains,
)
from relay_fast.generate_command import chain_text
from relay_fast.modules import AutoregressiveTransformer, LoopedTransformer
from relay_fast.ragged import offsets_of
from relay_fast.store import model_path, save_model
from relay_fast.tasks import Samples, Vocabulary, build_tasks
from relay_fast.tasks.vocabulary import EOS, PAD

VOCABULARY = Vocabulary(max_number=60, multiple=1)
TASKS = build_tasks(
    ["arithmetic", "edit_distance", "lis"],
    VOCABULARY,
    arithmetic={"prime": 5},
    lis={"group": 4, "high": 60},
)


def looped_model(supervise: str = "chain", max_tokens: int = 64) -> LoopedTransformer:
    config = ModelConfig(BlockConfig(16, 2, 1), VOCABULARY.size, max_tokens)
    return LoopedTransformer(config, supervise=supervise)


def ar_model(max_tokens: int = 200) -> AutoregressiveTransformer:
    config = ModelConfig(BlockConfig(16, 2, 1, causal=True), VOCABULARY.size, max_tokens)
    return AutoregressiveTransformer(config)


def mixed_problems(number: int = 12) -> Samples:
    """All tasks, mixed lengths, in an order that no batch keeps."""
    rng = np.random.default_rng(0)
    parts = [task.sample(rng.integers(1, 7, number), 1) for task in TASKS.values()]
    problems = Samples.concat(parts)
    return problems.take(rng.permutation(len(problems)))


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

    def read(self, batch: PackedBatch):
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
    written = generate_chains(
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
    written, again = (generate_chains(model, p, TASKS) for p in (problems, lies))
    for name in Samples.__dataclass_fields__:
        assert np.array_equal(getattr(written, name), getattr(again, name)), name


def test_batching_does_not_change_what_a_model_writes():
    problems = mixed_problems()
    model = looped_model()
    one = generate_chains(model, problems, TASKS, batch_tokens=1)
    all_at_once = generate_chains(model, problems, TASKS)
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

    model.read = read
    written = generate_chains(model, problems, TASKS)
    sizes = np.diff(problems.problem_offsets).tolist()
    assert np.diff(written.round_offsets).tolist() == [sizes[0], 0, sizes[1], 0, 0]


def test_no_problems():
    problems = TASKS["lis"].sample([], 0)
    assert len(generate_chains(looped_model(), problems, TASKS)) == 0
    assert len(write_chains(ar_model(), problems, TASKS)) == 0


def test_training_mode_is_kept():
    model = looped_model().train()
    generate_chains(model, mixed_problems(2), TASKS)
    assert model.training


def test_a_problem_longer_than_the_model_takes():
    with pytest.raises(ValueError, match="longer than the model's limit of 8"):
        generate_chains(looped_model(max_tokens=8), mixed_problems(), TASKS)


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
    number = middle + int(np.argmax(rounds[middle:] >= VOCABULARY.number0))
    rounds[number] = VOCABULARY.number(60)
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
    decoded = Decoded(np.concatenate(texts), offsets_of(sizes), np.ones(len(texts), bool))
    limits = {}

    def fake(model, prompt, prompt_offsets, *, max_new):
        limits["max_new"] = max_new
        assert np.array_equal(prompt, problems.problem)
        return decoded

    monkeypatch.setattr(generate, "decode", fake)
    written = write_chains(ar_model(), problems, TASKS)
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
    assert np.array_equal(few.problem, task.sample([5] * 3, 2 + UNSEEN).problem)


def test_chain_text_marks_each_round():
    task = TASKS["arithmetic"]
    problem = task.encode("1 + 2 + 1 + 4 =")
    rounds, answer = task.solve(problem)
    right = chain_text(task, problem, rounds, answer)
    assert right.splitlines() == ["1+2+1+4=", "  ✓ 3+1+4=", "  ✓ 4+4=", "  ✓ 3", "  answer 3 ✓"]

    wrong = chain_text(task, problem, [rounds[0], rounds[2]], NO_ANSWER)
    assert wrong.splitlines()[2:] == [
        "  ✗ 3   expected 4+4=",
        "  ✗ (no round)   expected 3",
        "  answer (none) ✗ expected 3",
    ]
    surplus = chain_text(task, problem, [*rounds, []], answer).splitlines()
    assert surplus[-2] == "  ✗ (nothing)   expected no further round"
    assert len(chain_text(task, problem, None, answer).splitlines()) == 2


@pytest.fixture
def run(tmp_path):
    """A run folder of untrained models."""
    config = {
        "vocabulary": VOCABULARY.to_dict(),
        "tasks": {
            "arithmetic": {"parameters": {"prime": 5}, "train": [1, 4], "test": [4, 6]},
            "edit_distance": {"parameters": {}, "train": [1, 3], "test": [3, 4]},
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_model(model_path(tmp_path, "looped_aligned"), looped_model(), {})
    save_model(model_path(tmp_path, "looped_vanilla"), looped_model("answer"), {})
    save_model(model_path(tmp_path, "ar_relay"), ar_model(), {})
    return tmp_path


@pytest.mark.parametrize("model", ["looped_aligned", "looped_vanilla", "ar_relay"])
def test_command(run, capsys, model):
    arguments = f"--out {run} --task arithmetic --length 5 --number 3 --model {model}".split()
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{model} on arithmetic of length 5; trained on 1 to 4\n\n")
    summary = text.splitlines()[-1]
    assert "of 3 answers right" in summary
    assert ("chains right" in summary) == (model != "looped_vanilla")
    assert text.count("  answer ") == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--task": "sorting"}, "unknown task 'sorting'; this run has arithmetic, edit_distance."),
        ({"--task": "lis"}, "unknown task 'lis'"),
        ({"--length": "0"}, "length 0 is too short"),
        ({"--task": "edit_distance", "--length": "50"}, "can need numbers beyond 60"),
        ({"--length": "40"}, "more than the model's limit of 64"),
        ({"--length": "40", "--model": "ar_relay"}, "more than the model's limit of 200"),
        ({"--model": "ar_baseline"}, "there is no checkpoint"),
        ({"--model": "gpt"}, "unknown model 'gpt'"),
        ({"--number": "0"}, "--number is 0"),
        ({"--out": "/nowhere"}, "is not a run folder"),
    ],
)
def test_bad_input_gets_one_sentence(run, capsys, change, message):
    options = {"--out": str(run), "--task": "arithmetic", "--length": "3", **change}
    assert main([part for pair in options.items() for part in pair]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1 and printed.out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda(run, capsys):
    arguments = f"--out {run} --task arithmetic --length 3 --device cuda".split()
    assert main(arguments) == 2
    assert "CUDA is not available" in capsys.readouterr().err
