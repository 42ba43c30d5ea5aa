"""`python -m relay_fast.generate`: what it prints, writes and refuses."""

from __future__ import annotations

import json

import pytest
import torch

from relay_fast.generate import chain_text, main
from relay_fast.tasks import NO_ANSWER
from relay_fast.tasks.vocabulary import EOS
from relay_fast.training.model_files import model_path, save_model
from tests.support.chain_models import TASKS, VOCABULARY, ar_model, looped_model


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
    arguments = f"--task arithmetic --length 5 --number 3 --model {model}".split()
    arguments += ["--out", str(run)]
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
        ({"--length": None}, "give --length to print chains, or --lengths and --dataset"),
        ({"--dataset": "d"}, "--dataset needs --lengths, for example --lengths 1-25"),
        ({"--export": "e"}, "--export needs --lengths, for example --lengths 1-25"),
        ({"--dataset": "d", "--lengths": "3-x"}, "--lengths '3-x' is not understood"),
        ({"--dataset": "/dev/null/d", "--lengths": "3"}, "d cannot be used (Not a directory)"),
        ({"--out": None}, "give --out RUN and --task, or --show DIR"),
        ({"--show": "/nowhere"}, "/nowhere is no folder of chains"),
        ({"--task": "sorting"}, "unknown task 'sorting'; this run has arithmetic, edit_distance."),
        ({"--task": "lis"}, "unknown task 'lis'"),
        ({"--length": "0"}, "length 0 is too short"),
        ({"--task": "edit_distance", "--length": "50"}, "can need numbers beyond 60"),
        ({"--length": "40"}, "arithmetic length 40 needs"),
        ({"--length": "40", "--model": "ar_relay"}, "beyond the model's limit of 200"),
        ({"--length": "100000"}, "needs 100000 tokens or more, beyond the model's limit of 64"),
        ({"--number": "1000000000000"}, "--number is 1000000000000; at most 10000 chains are"),
        ({"--device": "mps"}, "device 'mps' is unknown: use cpu or cuda"),
        ({"--model": "ar_baseline"}, "there is no checkpoint"),
        ({"--model": "gpt"}, "unknown model 'gpt'"),
        ({"--number": "0"}, "--number is 0"),
        ({"--out": "/nowhere"}, "is not a run folder"),
    ],
)
def test_bad_input_gets_one_sentence(run, capsys, change, message):
    options = {"--out": str(run), "--task": "arithmetic", "--length": "3", **change}
    options = {name: value for name, value in options.items() if value is not None}
    assert main([part for pair in options.items() for part in pair]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1 and (printed.out == "" or "--dataset" in options)


def test_command_writes_continues_and_shows_a_folder(run, capsys):
    folder = run / "chains"
    arguments = "--task edit_distance --lengths 1-3 --number 8 --shard 3".split()
    arguments += ["--out", str(run)]
    assert main([*arguments, "--dataset", str(folder), "--verify", "task"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["looped_aligned", "started"]
    assert lines[2].split()[:3] == ["looped_aligned", "problem", "2/8"]
    assert lines[3].split()[:3] == ["looped_aligned", "done", "in"]
    cells = [line.split() for line in lines if line.startswith("edit_distance")]
    assert [row[1:3] for row in cells] == [["1", "3"], ["2", "3"], ["3", "2"], ["all", "8"]]

    assert main([*arguments, "--dataset", str(folder)]) == 2  # another check
    assert "holds other chains: verify" in capsys.readouterr().err
    assert main(["--show", str(folder), "--number", "2"]) == 0
    text = capsys.readouterr().out
    assert text.count("edit_distance of length") == 2 and text.count("  answer ") == 2
    assert "passed: by the task's rules" in text and text.splitlines()[-1].split()[1] == "all"


def test_command_exports_new_and_old_chains(run, capsys):
    arguments = "--task edit_distance --lengths 1-3 --number 8 --shard 3".split()
    arguments += ["--out", str(run)]
    direct, both, old = (run / f"{name}.jsonl" for name in ("direct", "both", "old"))
    assert main([*arguments, "--export", str(direct)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"{direct}: 8 chains as rounds, ") and last.endswith("of them passed")
    folder = str(run / "chains")
    assert main([*arguments, "--dataset", folder, "--export", str(both)]) == 0
    assert both.read_text() == direct.read_text()
    assert main(["--show", folder, "--export", str(old), "--format", "sft"]) == 0
    chains = [json.loads(line) for line in old.read_text().splitlines()]
    assert [list(chain) for chain in chains] == 8 * [
        ["task", "length", "prompt", "completion", "passed"]
    ]
    capsys.readouterr()
    assert main(["--show", folder, "--export", str(old)]) == 2
    assert "old.jsonl exists already: delete it" in capsys.readouterr().err


def test_chains_that_never_end_are_reported(run, capsys):
    model = ar_model()
    with torch.no_grad():
        model.chain_head.weight[EOS] = 0  # hardly ever the largest
    save_model(model_path(run, "ar_baseline"), model, {})
    arguments = "--task arithmetic --length 3 --number 2 --model ar_baseline".split()
    assert main([*arguments, "--out", str(run)]) == 0
    assert capsys.readouterr().out.endswith(", 2 did not end within the limit\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda(run, capsys):
    arguments = "--task arithmetic --length 3 --device cuda".split()
    arguments += ["--out", str(run)]
    assert main(arguments) == 2
    assert "CUDA is not available" in capsys.readouterr().err
