"""Samples that a looped model needs, by size: power laws that are known, runs made by hand."""

import csv
import json

import numpy as np
import pytest

from benchmarks import learning_curves
from relay_fast.relay.presets import load_preset, override, recipe


def run_of(folder, name: str, preset: str, task: str, longest: int, reached: int):
    """A run with half of the tokens right, and all of them from `reached` samples on."""
    path = folder / name
    path.mkdir()
    lengths = [longest + k for k in range(1, 6)]
    values = [
        f"tasks.{task}.train=[1,{longest}]",
        f"tasks.{task}.test=[{longest},{longest + 1}]",
        f"tasks.{task}.self_lengths={lengths}",
        f"tasks.{task}.hit_matrix=[{longest}]",
    ]
    steps = range(1, 4 * reached // 10 + 1)
    history = [{"step": s, "loss": 1.0, "seconds": s, "chain_accuracy": float(10 * s >= reached)}
               for s in steps]  # fmt: skip
    results = {
        "config": override(load_preset(preset), values=values),
        "versions": {"commit": "abc"},
        "history": {"looped_aligned": history},
        "training": {"looped_aligned": {"samples": 10 * len(history), "seconds": 1.0}},
    }
    (path / "results.json").write_text(json.dumps(results))
    return path


def test_when_a_level_is_held() -> None:
    samples, right = np.arange(1, 6) * 10.0, np.array([0.5, 0.995, 0.98, 0.992, 0.9995])
    assert learning_curves.needed(samples, right, 0.99) == 40
    assert learning_curves.needed(samples, right, 0.999) == 50
    assert learning_curves.needed(samples, right, 0.4) == 10
    assert learning_curves.needed(samples, right, 0.9999) is None


def test_a_power_law_is_found() -> None:
    a, b = learning_curves.power_law([4, 8, 16], [7 * n**1.5 for n in (4, 8, 16)])
    assert (a, b) == (pytest.approx(7), pytest.approx(1.5))


def test_rows_and_predictions(tmp_path) -> None:
    window = 10 * (learning_curves.WINDOW - 1)  # samples until the mean has forgotten the rest
    runs = [
        run_of(tmp_path, f"lis{n}", "cpu-lis", "lis", n, 10 * n**2 - window) for n in (5, 10, 20)
    ]
    runs.append(run_of(tmp_path, "ari", "cpu-arithmetic", "arithmetic", 8, 200))
    out = tmp_path / "out"
    learning_curves.main(["--runs", *map(str, runs), "--out", str(out)])
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["task"], r["longest"], r["samples_0.99"]) for r in rows] == [
        ("arithmetic", "8", "240"), ("lis", "5", "250"), ("lis", "10", "1000"),
        ("lis", "20", "4000"),
    ]  # fmt: skip
    settings = recipe(load_preset("paper-fast"), "looped_aligned")
    given = settings["steps"] * settings["batch_size"] // 3
    lines = (out / "table.md").read_text().splitlines()
    sizes = "5: 250, 10: 1,000, 20: 4,000"
    assert lines[2] == (
        f"| LIS | 99.0% | {sizes} | 2.00 | 100 | 100,000 | {given:,} | {given / 1e5:.0f}× |"
    )
    assert not any(line.startswith("| Arithmetic") for line in lines)  # one size has no law
    assert (out / "curves.png").stat().st_size > 5000


def test_what_tells_nothing(tmp_path, capsys) -> None:
    path = run_of(tmp_path, "ari", "cpu-arithmetic", "arithmetic", 8, 200)
    results = json.loads((path / "results.json").read_text())
    for change, text in (
        ({"history": {}}, "ari has no looped model that was trained"),
        ({"config": load_preset("cpu-multitask")}, "ari is a run of 3 tasks: give runs of one"),
    ):
        (path / "results.json").write_text(json.dumps({**results, **change}))
        with pytest.raises(SystemExit):
            learning_curves.main(["--runs", str(path), "--out", str(tmp_path / "out")])
        assert text in capsys.readouterr().err
