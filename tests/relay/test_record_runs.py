"""A run on files of records alone: what it reports, and what it refuses before it trains."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from relay_fast.evaluate import main as evaluate
from relay_fast.generate import main as generate
from relay_fast.relay import filter_metrics
from relay_fast.relay.presets.own import read_config, resolved
from relay_fast.relay.run_folder import RunFolderError
from relay_fast.tasks import NO_ANSWER, RecordsTask, Vocabulary
from relay_fast.train import prove, train

CONFIG = """\
base = "cpu"
workers = 1

[tasks.sums]
data = "chains.jsonl"
train = [1, 4]
test = [4, 6]
self_lengths = [5, 6]
self_counts = [2, 2]
merge_beyond = [5, 500]

[tasks.sums.parameters]
test_data = "test.jsonl"
unit = "digits"

[model]
d_model = 16

[evaluation]
problems = 6

[stages.looped_aligned]
steps = 4
"""


def record(length: int, k: int, solved: bool = True) -> dict:
    digits = np.random.default_rng([length, k]).integers(0, 10, length).tolist()
    rounds = [str(sum(digits[: t + 1]) % 10) for t in range(length)]
    problem = {"problem": " ".join(map(str, digits))}
    return problem | ({"rounds": rounds, "answer": rounds[-1]} if solved else {"length": length})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """sums.toml beside its files: lengths 1..4 are solved, 5 and 6 are problems alone, and all are
    tested but 5."""
    monkeypatch.setenv("RELAY_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir("/")
    train = [record(n, k) for n in range(1, 5) for k in range(20)]
    train += [record(n, k, solved=False) for n in (5, 6) for k in range(12)]
    test = [record(n, k) for n in (1, 2, 3, 4, 6) for k in range(100, 108)]
    for name, records in (("chains", train), ("test", test)):
        text = "".join(json.dumps(one) + "\n" for one in records)
        (tmp_path / f"{name}.jsonl").write_text(text)
    (tmp_path / "sums.toml").write_text(CONFIG)
    return tmp_path


def test_a_run_without_a_generator(folder, capsys):
    config = read_config(folder / "sums.toml")
    run = folder / "run"
    stages = ["chains", "evaluate.looped_aligned"]
    results = train(config, run, stages=stages, print_table=False)
    counts = results["data"]["sums"]
    assert (counts["records"], counts["train"], counts["test"]) == (104, 80, 40)
    assert counts["unsolved"] == 24 and counts["rounds_padded"] == 0
    train_problems = {record(n, k)["problem"] for n in range(1, 7) for k in range(20)}
    tested = [record(n, k)["problem"] for n in (1, 2, 3, 4, 6) for k in range(100, 108)]
    assert counts["duplicates"] == sum(problem in train_problems for problem in tested) > 0
    printed = capsys.readouterr().out
    assert f"duplicates {counts['duplicates']}" in printed
    assert counts["untested"] == [5]
    assert "note: sums has no solved problems for evaluation of 5, which no table shows" in printed
    # 5 chains of length 5 and all 12 of 6, whose truth is not known; 6 known ones of length 6.
    trust = filter_metrics.from_json(results["trust"])["sums"]
    assert (trust["5"].written, trust["5"].unjudged, trust["5"].keep_rate) == (5, 5, None)
    assert (trust["6"].written, trust["6"].unjudged) == (18, 12)
    accuracy = results["accuracy"]["looped_aligned"]["sums"]
    assert {length: row["n"] for length, row in accuracy.items()} == dict.fromkeys("12346", 6)
    assert results["longest_true_problem"] == {"sums": 4}

    arguments = ["--out", str(run), "--task", "sums", "--lengths", "5-6", "--number", "10"]
    export = folder / "out.jsonl"
    assert generate([*arguments, "--export", str(export)]) == 0
    problems = {json.loads(line)["problem"] for line in export.read_text().splitlines()}
    assert len(problems) == 10 and problems <= train_problems
    arguments[-1] = "26"
    assert generate([*arguments, "--export", str(folder / "more.jsonl")]) == 2
    assert "there are 12 problems of sums length 5" in capsys.readouterr().err

    by_rules = [*arguments, "--export", str(folder / "more.jsonl"), "--verify", "task"]
    assert generate(by_rules) == 2
    assert "length 5 have no rounds or no answer, so that chains" in capsys.readouterr().err

    assert evaluate(["--out", str(run), "--models", "looped_aligned", "--problems", "2"]) == 0
    assert "note: sums has no solved problems for evaluation of 5, " in capsys.readouterr().out
    assert json.loads((run / "evaluation.json").read_text())["untested"] == {"sums": [5]}
    assert evaluate(["--out", str(run), "--models", "looped_aligned", "--lengths", "5"]) == 2
    error = capsys.readouterr().err
    assert "sums has no solved problems of length 5 for evaluation: add some to" in error

    with open(folder / "chains.jsonl", "a") as file:
        file.write(json.dumps(record(3, 99)) + "\n")
    with pytest.raises(ValueError, match="chains.jsonl has changed since the run began"):
        train(json.loads((run / "config.json").read_text()), run, print_table=False)
    with pytest.raises(RunFolderError, match="chains.jsonl or .*test.jsonl has changed since the"):
        train(config, run, print_table=False)
    (folder / "chains.jsonl").unlink()
    assert generate([*arguments, "--export", str(folder / "more.jsonl")]) == 2
    assert "chains.jsonl' does not exist: give a file of records" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[1, 4]", "[1, 5]", "chains.jsonl, line 81 has no rounds, but its length 5 is in the tra"),
        ("[1, 4]", "[1, 9]", "chains.jsonl has no records of length 9: it has 1..6"),
        ("[5, 6]", "[6, 7]", "tasks.sums.self_lengths has 7, of which no problem can be drawn"),
        ('unit = "digits"', 'max_round_tokens = "a"', "max_round_tokens = 'a': it must be a whole"),
        ('unit = "digits"', "unit = 3", "unit = 3: give a text"),
        ('"test.jsonl"', '"."', "test_data = '.*' is a folder: give a file"),
        ("chains.jsonl", "chain.jsonl", "chain.jsonl' does not exist: give a file of records"),
        (
            'unit = "digits"',
            "units = 3",
            "RecordsTask cannot be built .* 'units'.*nearest is tasks.sums.parameters.unit$",
        ),
        (
            "[model]",
            '[vocabulary]\ntokens = ["0"]\n[model]',
            "chains.jsonl, line 1 has the token '4', which t",
        ),
    ],
)
def test_what_is_refused_before_training(folder, old, new, message):
    (folder / "sums.toml").write_text(CONFIG.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        prove(resolved(read_config(folder / "sums.toml")))


def test_chains_of_unknown_truth_are_not_judged(folder):
    task = RecordsTask("sums", str(folder / "chains.jsonl"), held_out=0.0)
    tokens = (*task.special_tokens(), *task.vocabulary_tokens([]))
    made = task.bound(Vocabulary(max_number=None, tokens=tokens), 3)
    truth = made.sample(np.array([4, 4, 5, 5]), 0)
    # The third agrees with its rounds, whatever these are; the second and the fourth do not.
    solved = made.sample(np.array([4, 4, 4, 4]), 0)
    wrong = np.where(np.arange(4) % 2, solved.answer[0] % 10 + 3, solved.answer)
    written = replace(
        truth,
        rounds=solved.rounds,
        round_offsets=solved.round_offsets,
        loops=solved.loops,
        answer=wrong.astype(np.int32),
    )
    assert (truth.answer == NO_ANSWER).tolist() == [False, False, True, True]
    table = filter_metrics.count(written, truth, {"sums": made})["sums"]
    four, five = table["4"], table["5"]
    assert (four.written, four.kept, four.correct, four.kept_and_correct) == (2, 1, 1, 1)
    assert (five.written, five.kept, five.correct, five.unjudged) == (2, 0, 0, 2)
    whole = four + five
    assert (whole.precision, whole.recall, whole.keep_rate) == (1.0, 1.0, 0.5)
    saved = filter_metrics.to_json({"sums": table})
    assert "unjudged" not in saved["sums"]["4"]
    assert filter_metrics.from_json(saved)["sums"] == table
