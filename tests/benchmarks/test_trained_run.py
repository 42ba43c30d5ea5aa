"""The run folder that is shared: generate and evaluate use it, and its cards tell the truth."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import relay_fast.evaluate
import relay_fast.generate
from benchmarks.trained_run import SHARED, main, model_card
from relay_fast.training.model_files import load_model, model_hash, model_path

ROOT = Path(__file__).resolve().parents[2]
TRAINED = ROOT / "benchmarks" / "results" / "trained"
MEGABYTE = 10**6


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TRAINED, tmp_path / "run"))


def test_it_is_small() -> None:
    files = [path for path in TRAINED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2 * MEGABYTE
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".lock", ".owner", ""}


def test_generate_and_evaluate_use_it(run, capsys) -> None:
    arguments = ["--out", str(run), "--task", "arithmetic", "--length", "3", "--number", "2"]
    assert relay_fast.generate.main(arguments) == 0
    assert "2 of 2 chains right, 2 of 2 answers right" in capsys.readouterr().out
    arguments = ["--out", str(run), "--lengths", "2-3", "--problems", "4"]
    assert relay_fast.evaluate.main(arguments) == 0
    accuracy = json.loads((run / "evaluation.json").read_text())["accuracy"]
    assert set(accuracy) == set(SHARED)
    for name in SHARED:  # inside their range all of them are right
        rows = accuracy[name]["arithmetic"]
        assert {length: row["chain"] for length, row in rows.items()} == {"2": 1.0, "3": 1.0}


@pytest.mark.parametrize("name", SHARED)
def test_the_card_has_the_accuracy_of_the_results(name) -> None:
    results = json.loads((TRAINED / "results.json").read_text())
    _, info = load_model(model_path(TRAINED, name))
    card = info["card"]
    assert info["stage"] == name and "Licence MIT" in card and "2502.08482" in card
    for length, row in results["accuracy"][name]["arithmetic"].items():
        assert f"\n- {length}: {row['chain']:.1%}" in card


def test_a_run_is_shared(run, tmp_path, capsys) -> None:
    """Again from the shared one, whose results have no record of the training."""
    results = json.loads((run / "results.json").read_text())
    training = {"ar_relay": {"samples": 12_800, "seconds": 63.4}}
    (run / "results.json").write_text(json.dumps(results | {"training": training}))
    to = tmp_path / "shared"
    assert main(["--run", str(run), "--to", str(to), "--models", "ar_relay"]) == 0
    assert capsys.readouterr().out.startswith(f"{to}: 0.6")
    model, info = load_model(to / "ar_relay.safetensors")
    assert model_hash(model) == model_hash(load_model(run / "ar_relay.safetensors")[0])
    assert info["card"] == model_card(results | {"training": training}, "ar_relay")
    assert "12,800 samples in 63 s" in info["card"]
    assert set(json.loads((to / "results.json").read_text())["accuracy"]) == {"ar_relay"}
    assert main(["--run", str(run), "--to", str(to), "--models", "looped_vanilla"]) == 2
    error = capsys.readouterr().err
    assert error == f"error: {run} has no accuracy of looped_vanilla: finish the run first\n"
