"""Metrics by length: against chains broken on purpose, and by hand on models barely trained."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from relay_fast import evaluate
from relay_fast.batch.packed import PackedBatch
from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.decoding.autoregressive import Decoded, decode
from relay_fast.decoding.chains import generate_looped_chains, unseen_problems
from relay_fast.evaluate import main
from relay_fast.models.transformers import AutoregressiveTransformer, LoopedTransformer
from relay_fast.relay import evaluation, run_folder
from relay_fast.relay.evaluation import (
    evaluate_autoregressive,
    evaluate_looped,
    evaluate_problems,
    grade_autoregressive,
    grade_looped,
    hit_matrix,
)
from relay_fast.reporting import progress
from relay_fast.tasks import Samples, Vocabulary, build_tasks
from relay_fast.tasks.vocabulary import EOS, NUMBER0
from relay_fast.training.model_files import model_path, save_model
from relay_fast.utils.ragged import lengths_to_offsets
from tests.support.users import as_nobody, open_folder

VOCABULARY = Vocabulary(max_number=40, multiple=1)
TASKS = build_tasks(
    ["arithmetic", "edit_distance", "lis"],
    VOCABULARY,
    arithmetic={"prime": 2, "operators": "+"},
    lis={"group": 4, "high": 40},
)
ONE = {"arithmetic": TASKS["arithmetic"]}


def new_model(kind: str):
    torch.manual_seed(0)
    block = BlockConfig(32, 2, 1, causal=kind == "autoregressive")
    config = ModelConfig(block, VOCABULARY.size, max_tokens=60)
    return (AutoregressiveTransformer if block.causal else LoopedTransformer)(config)


@pytest.fixture(scope="module")
def trained():
    """Both models after a few steps on short sums: right now and then."""
    models = {}
    for kind in ("looped", "autoregressive"):
        model = models[kind] = new_model(kind).train()
        optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
        pack = getattr(PackedBatch, kind)
        for step in range(60):
            lengths = np.random.default_rng(step).integers(1, 5, 64)
            model.loss(pack(ONE["arithmetic"].sample(lengths, step), ONE)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return models


def truth_of(problems: Samples) -> Decoded:
    """What a perfect autoregressive model writes."""
    sequence, offsets, prompts = problems.sequences(TASKS)
    texts = [sequence[a + p : b] for a, b, p in zip(offsets, offsets[1:], prompts, strict=False)]
    return decoded_of(texts)


def decoded_of(texts: list[np.ndarray]) -> Decoded:
    offsets = lengths_to_offsets(np.array([len(text) for text in texts]))
    return Decoded(np.concatenate(texts), offsets, np.ones(len(texts), bool))


def texts_of(decoded: Decoded) -> list[np.ndarray]:
    return np.split(decoded.tokens, decoded.offsets[1:-1])


@pytest.fixture
def writes(monkeypatch):
    """Makes every model write the given chains."""

    def set_written(written: Samples | Decoded) -> None:
        name = "decode_chains" if isinstance(written, Decoded) else "generate_looped_chains"
        monkeypatch.setattr(evaluation, name, lambda *_: written)

    return set_written


def problems_of(name: str, length: int, number: int = 3) -> Samples:
    return unseen_problems(TASKS[name], length, number, 0)


def counts(marks) -> tuple[list[bool], list[bool], int]:
    return marks.answer.tolist(), marks.chain.tolist(), int((~marks.tokens).sum())


class TestLooped:
    model = new_model("looped")

    def marks(self, writes, problems, rounds, answer=None):
        """rounds: one list of token lists a problem."""
        flat = [r for chain in rounds for r in chain]
        written = replace(
            problems,
            rounds=np.array([t for r in flat for t in r], np.int32),
            round_offsets=lengths_to_offsets(np.array([len(r) for r in flat])),
            answer=problems.answer if answer is None else answer,
        )
        writes(written)
        return grade_looped(self.model, problems, TASKS)

    @pytest.mark.parametrize("name", list(TASKS))
    def test_the_truth_is_right(self, writes, name):
        problems = problems_of(name, 5)
        marks = self.marks(writes, problems, [problems.rounds_of(i) for i in range(3)])
        assert marks.answer.all() and marks.chain.all() and marks.tokens.all()
        assert len(marks.tokens) == len(problems.rounds)

    def test_each_kind_of_error(self, writes):
        problems = problems_of("arithmetic", 3)
        rounds = [[r.tolist() for r in problems.rounds_of(i)] for i in range(3)]
        rounds[0][1] = rounds[0][1][2:]  # two tokens missing on the left
        rounds[1][0] = [9, *rounds[1][0]]  # one too many: all tokens right, the round wrong
        rounds[2][2] = []
        answer = problems.answer.copy()
        answer[2] += 1
        marks = self.marks(writes, problems, rounds, answer)
        assert counts(marks) == ([True, True, False], [False, False, False], 3)
        wrong = np.flatnonzero(~marks.tokens)
        first = problems.round_offsets
        assert wrong.tolist() == [first[1], first[1] + 1, first[8]]

    def test_metrics_by_length(self, trained):
        model = trained["looped"]
        table = evaluate_looped(model, ONE, "arithmetic", range(1, 6), 40, seed=3)
        assert list(table) == [1, 2, 3, 4, 5]
        again = evaluate_looped(model, ONE, "arithmetic", [4], 40, seed=3)
        assert again[4] == table[4], "other lengths do not matter"
        problems = unseen_problems(ONE["arithmetic"], 4, 40, seed=3)
        written = generate_looped_chains(model, problems, ONE)
        chains = [
            all(ONE["arithmetic"].check(problems.problem_of(i), written.rounds_of(i)))
            for i in range(40)
        ]
        assert table[4]["chain"] == np.mean(chains)
        assert table[4]["answer"] == np.mean(written.answer == problems.answer)
        assert table[4]["n"] == 40
        assert set(table[4]) == {"answer", "answer_once", "bit", "chain", "n"}
        assert all(0 < row["bit"] <= 1 for row in table.values())


class TestAutoregressive:
    model = new_model("autoregressive")

    @pytest.mark.parametrize("name", list(TASKS))
    def test_the_truth_is_right(self, writes, name):
        problems = problems_of(name, 3)
        writes(truth_of(problems))
        marks = grade_autoregressive(self.model, problems, TASKS)
        assert marks.answer.all() and marks.chain.all() and marks.tokens.all()
        assert len(marks.tokens) == len(marks.forced_tokens) == len(problems.rounds)

    def test_each_kind_of_error(self, writes):
        problems = problems_of("arithmetic", 3, 4)
        texts = texts_of(truth_of(problems))
        texts[0] = texts[0][:-3]  # `=`, the answer and <eos> are missing
        texts[1] = texts[1].copy()
        texts[1][0] = NUMBER0 + 30
        texts[2] = np.concatenate([texts[2][:-1], texts[2][-3:]])  # goes on after the answer
        texts[3] = texts[3][:0]
        writes(decoded_of(texts))
        marks = grade_autoregressive(self.model, problems, TASKS)
        chain = np.diff(problems.round_offsets[problems.first_round])
        assert counts(marks) == ([False, True, True, False], [False] * 4, 2 + 1 + chain[3])

    @pytest.mark.parametrize("name", ["edit_distance", "lis"])
    def test_an_answer_beside_the_chain(self, writes, name):
        problems = problems_of(name, 3)
        texts = texts_of(truth_of(problems))
        texts[0] = texts[0].copy()
        texts[0][-2] = NUMBER0 + 40
        texts[1] = np.concatenate([texts[1][:-1], [NUMBER0 + 1, EOS]])
        writes(decoded_of(texts))
        marks = grade_autoregressive(self.model, problems, TASKS)
        assert counts(marks) == ([False, False, True], [True] * 3, 0)

    def test_an_exact_chain_is_the_same_forced_or_free(self, trained):
        problems = Samples.concat([unseen_problems(ONE["arithmetic"], n, 60, 0) for n in (1, 2, 3)])
        model = trained["autoregressive"]
        correct = evaluation._forced(model, problems, ONE)
        sequence, offsets, prompts = problems.sequences(ONE)
        sizes = np.diff(offsets) - prompts
        decoded = decode(model, problems.problem, problems.problem_offsets, max_new=40)
        free = [
            text.tolist() == sequence[b - n : b].tolist()
            for text, n, b in zip(texts_of(decoded), sizes, offsets[1:], strict=True)
        ]
        forced = np.logical_and.reduceat(correct, lengths_to_offsets(sizes)[:-1])
        assert free == forced.tolist()
        assert 0 < sum(free) < len(free), "the case should hold both"
        # An arithmetic chain is the whole text.
        assert grade_autoregressive(model, problems, ONE).chain.tolist() == free

    def test_metrics_by_length(self, trained, monkeypatch):
        model = trained["autoregressive"]
        table = evaluate_autoregressive(model, ONE, "arithmetic", range(1, 5), 30, seed=3)
        assert set(table[2]) == {"answer", "bit", "bit_forced", "chain", "n"}
        assert all(row["chain"] <= row["answer"] for row in table.values())
        assert all(row["bit_forced"] > 0 for row in table.values())
        monkeypatch.setattr(evaluation, "FORCED_TOKENS", 16)
        again = evaluate_autoregressive(model, ONE, "arithmetic", [3], 30, seed=3)
        assert again[3] == table[3]

    def test_a_length_beyond_the_model(self):
        with pytest.raises(ValueError, match="arithmetic length 9 needs .* model's limit of 60"):
            evaluate_autoregressive(self.model, ONE, "arithmetic", [9], 2)


def test_the_answer_after_one_iteration(trained):
    """By hand: the answer head on the first state, whatever comes after it."""
    model = trained["looped"].eval()
    problems = Samples.concat([unseen_problems(ONE["arithmetic"], n, 40, 3) for n in (1, 2, 4)])
    batch = PackedBatch.looped(problems, ONE)
    weights, x = model.block.weights(), model.embed(batch)
    with torch.no_grad():
        run = model.block.run(batch.plan, weights)
        _, state, _ = next(iter(model.iterations(run, weights, x, batch)))
        last = torch.nn.functional.rms_norm(
            state[batch.plan.last_rows], (32,), model.norm.weight, 1e-6
        )
        best = model.answer_head(last).argmax(-1).numpy()
    expected = np.empty(len(problems), bool)
    expected[batch.order] = best == problems.answer[batch.order]
    assert evaluation.answers_once(model, problems, ONE).tolist() == expected.tolist()
    assert 0 < expected.sum() < len(expected)
    table = evaluate_problems(model, ONE, problems)
    assert [table[n]["answer_once"] for n in (1, 2, 4)] == [
        float(part.mean()) for part in np.split(expected, 3)
    ]
    assert table[1]["answer_once"] == table[1]["answer"] and set(table[4]) == {
        "answer",
        "answer_once",
        "bit",
        "chain",
        "n",
    }


def test_one_iteration_of_a_model_that_is_fed_its_rounds():
    """Its first round has to hold the answer, which it does for problems of one round only."""
    torch.manual_seed(0)
    config = ModelConfig(BlockConfig(16, 2, 1), VOCABULARY.size, max_tokens=60, feedback="tokens")
    model = LoopedTransformer(config).eval()
    for task in TASKS.values():
        problems = Samples.concat([unseen_problems(task, n, 20, 0) for n in (1, 6)])
        written = generate_looped_chains(model, problems, TASKS)
        implied = [task.answer_of([written.rounds_of(i)[0]]) for i in range(len(written))]
        expected = [a is not None and a == b for a, b in zip(implied, problems.answer, strict=True)]
        assert evaluation.answers_once(model, problems, TASKS).tolist() == expected, task.name


def test_hit_matrix(writes):
    problems = problems_of("lis", 7, 4)
    matrix = hit_matrix(new_model("looped"), TASKS["lis"], 7, 4)
    assert matrix.shape == (2, 5)
    rounds = problems.rounds.copy()
    rounds[problems.round_offsets[[1, 3]] + 2] = NUMBER0 + 39
    writes(replace(problems, rounds=rounds))
    matrix = hit_matrix(new_model("looped"), TASKS["lis"], 7, 4)
    expected = np.ones((2, 5))
    expected[1, 2] = 0.5
    assert np.array_equal(matrix, expected)

    problems = problems_of("arithmetic", 3, 4)
    writes(truth_of(problems))
    matrix = hit_matrix(new_model("autoregressive"), TASKS["arithmetic"], 3, 4)
    there = np.isfinite(matrix).sum(1)
    assert there.tolist() == [6, 4, 1]
    assert np.nanmin(matrix) == 1


@pytest.fixture
def run(tmp_path, trained):
    config = {
        "seed": 2,
        "vocabulary": VOCABULARY.to_dict(),
        "tasks": {
            "arithmetic": {
                "parameters": {"prime": 2, "operators": "+"}, "train": [1, 2], "test": [2, 3],
            }
        },
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_model(model_path(tmp_path, "looped_aligned"), trained["looped"], {})
    save_model(model_path(tmp_path, "ar_baseline"), trained["autoregressive"], {})
    return tmp_path


def test_command(run, capsys, trained):
    assert main(["--out", str(run), "--problems", "20"]) == 0
    results = json.loads((run / "evaluation.json").read_text())
    accuracy = results["accuracy"]
    assert list(accuracy) == ["looped_aligned", "ar_baseline"]
    assert list(accuracy["ar_baseline"]["arithmetic"]) == ["1", "2", "3"]
    table = evaluate_looped(trained["looped"], ONE, "arithmetic", [3], 20, seed=2)
    assert accuracy["looped_aligned"]["arithmetic"]["3"] == table[3]
    assert results["train_lengths"] == {"arithmetic": [1, 2]}
    text = capsys.readouterr().out
    assert "AR-CoT baseline" in text and "evaluation.json" in text

    assert main(["--out", str(run), "--problems=5", "--lengths=2", "--models=ar_baseline"]) == 0
    results = json.loads((run / "evaluation.json").read_text())
    assert results["accuracy"]["ar_baseline"]["arithmetic"].keys() == {"2"}
    assert results["accuracy"].keys() == {"ar_baseline"}


def test_the_command_says_how_far_it_is(run, capsys, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_EVERY", 0.0)
    assert main(["--out", str(run), "--problems", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ("looped_aligned", "ar_baseline"):
        own = [line.split() for line in lines if line.startswith(f"{name} ")]
        assert own[0][1] == "started" and own[-1][1:3] == ["done", "in"]
        counts = [int(words[2].removesuffix("/60")) for words in own[1:-1]]
        assert counts == sorted(counts) and counts[-1] == 60


def test_an_interruption_keeps_the_finished_models(run, capsys, monkeypatch):
    def interrupted_at(kind):
        def measure(model, *arguments, **options):
            if isinstance(model, kind):
                raise KeyboardInterrupt
            return evaluate_problems(model, *arguments, **options)

        return measure

    whole = evaluate.evaluate_run(str(run), ["looped_aligned"], number=5)
    (run / "evaluation.json").unlink()
    interrupted = interrupted_at(AutoregressiveTransformer)
    monkeypatch.setattr(evaluate, "evaluate_problems", interrupted)
    assert main(["--out", str(run), "--problems", "5"]) == 130
    error = capsys.readouterr().err.strip()
    assert error.startswith("interrupted; the models finished by then are in")
    assert error.endswith("evaluation.json, the same command begins anew") and "\n" not in error
    kept = json.loads((run / "evaluation.json").read_text())
    assert kept["accuracy"] == whole["accuracy"]
    assert whole["complete"] and not kept["complete"]

    monkeypatch.setattr(evaluate, "evaluate_problems", interrupted_at(LoopedTransformer))
    assert main(["--out", str(run), "--problems", "5"]) == 130
    error = capsys.readouterr().err.strip()
    assert error == "interrupted; no model was finished, the same command begins anew"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--models", "looped_aligned,ar_relay"], "there is no checkpoint"),
        (["--models", "ar_relay"], "there is no checkpoint"),
        (["--models", "gpt"], "unknown model 'gpt'"),
        (["--lengths", "3-2"], "--lengths '3-2' is not understood; give a range like 10-13."),
        (["--lengths", "3-"], "--lengths '3-' is not understood"),
        (["--lengths", "many"], "--lengths 'many' is not understood"),
        (["--lengths", "0-2"], "length 0 is too short"),
        (["--lengths", "2-70"], "arithmetic length 7 needs 72 tokens or more, beyond the"),
        (["--lengths", "9999999"], "length 9999999 needs 9999999 tokens or more, beyond"),
        (["--device", "meta"], "device 'meta' is unknown: use cpu or cuda"),
        (["--problems", "1000000000000"], "no memory for 1000000000000 problems a length"),
        (["--problems", "0"], "--problems is 0"),
        (["--out", "/nowhere"], "is not a run folder"),
    ],
)
def test_bad_input_gets_one_sentence(run, capsys, change, message):
    assert main(["--out", str(run), "--problems", "2", *change]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1
    assert not (run / "evaluation.json").exists()


def test_a_run_that_cannot_be_written(run, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "load_run_model", lambda *_: pytest.fail("work was begun"))
    with open_folder() as top:
        shutil.copytree(run, top / "run")
        os.chmod(top / "run", 0o555)
        with as_nobody():
            assert main(["--out", str(top / "run")]) == 2
        os.chmod(top / "run", 0o755)
    assert "no permission to write the run folder" in capsys.readouterr().err


def test_a_full_disk(run, capsys, monkeypatch):
    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_folder, "write_json", full)
    assert main(["--out", str(run), "--problems", "2"]) == 2
    error = capsys.readouterr().err
    assert "evaluation.json cannot be written (No space left on device); check that" in error
    assert error.startswith("error: ") and error.count("\n") == 1


def test_a_run_without_models(run, capsys):
    for file in run.glob("*.safetensors"):
        file.unlink()
    assert main(["--out", str(run)]) == 2
    assert "holds no trained model yet" in capsys.readouterr().err
