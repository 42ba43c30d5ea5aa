"""README's pictures: they show the numbers of the files, and are those of today's files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from benchmarks import picture_of_loop, pictures
from benchmarks.picture_style import digest

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def test_accuracy_is_that_of_the_files() -> None:
    panels = {panel.title: panel for panel in pictures.accuracy_panels()}
    assert len(panels) == 5
    latent = json.loads((RESULTS / "cpu_latent" / "results.json").read_text())
    panel = panels["arithmetic mod 3, +, the paper's loop"]
    assert panel.trained_to == 10 and set(panel.curves) == set(pictures.MODELS)
    ((lengths, values),) = panel.curves["ar_relay"]
    rows = latent["accuracy"]["ar_relay"]["arithmetic"]
    assert {str(n): value / 100 for n, value in zip(lengths, values, strict=True)} == (
        pytest.approx({n: row["chain"] for n, row in rows.items()})
    )
    with open(RESULTS / "three_tasks" / "results.csv", newline="") as file:
        table = list(csv.DictReader(file))
    points = sum(
        len(lengths)
        for panel in list(panels.values())[:3]
        for curves in panel.curves.values()
        for lengths, _ in curves
    )
    assert points == sum(row["model"] in pictures.OF_TABLE for row in table) > 150


def test_memory_is_that_of_the_file() -> None:
    lines = pictures.memory_lines()
    with open(RESULTS / "memory_vs_loops.csv", newline="") as file:
        rows = [r for r in csv.DictReader(file) if (r["provider"], r["policy"]) == OURS]
    for column in ("saved_bytes", "peak_bytes"):
        assert set(lines[column]) == set(pictures.MEMORY_LINES.values())
        loops, values = lines[column]["relay_fast, state"]
        assert [f"{t} {v * 2**20:.0f}" for t, v in zip(loops, values, strict=True)] == (
            [f"{r['loops']} {r[column]}" for r in rows]
        )


OURS = ("relay_fast", "state")


def test_the_kept_pictures_show_the_files_of_today() -> None:
    """If not: python benchmarks/pictures.py."""
    for name, data in (
        ("loop", picture_of_loop.shown()),
        ("memory", pictures.memory_lines()),
        ("accuracy", pictures.accuracy_panels()),
    ):
        text = (RESULTS / "pictures" / f"{name}.svg").read_text()
        assert f"made of {digest(data)}" in text, name


def test_drawing_twice_gives_the_same_file(tmp_path) -> None:
    for folder in ("first", "second"):
        picture_of_loop.draw(tmp_path / folder / "loop.svg")
    first, second = ((tmp_path / f / "loop.svg").read_bytes() for f in ("first", "second"))
    assert first == second and b'style="fill: #ffffff' not in first
    assert picture_of_loop.kept_states("sqrt") == {3, 6}
