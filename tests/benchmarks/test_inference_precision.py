"""Rows of chains written in fp32 and in bf16, and what README says of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import common
from benchmarks import inference_precision as bench
from tests.support.chain_models import TASKS

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


def test_one_command_compares_and_goes_on(tmp_path, capsys, monkeypatch) -> None:
    options = ["--number", "2", "--csv", str(tmp_path / "rows.csv")]
    bench.main([*options, "--models", "looped_aligned"])
    rows = common.read_rows(tmp_path / "rows.csv")
    assert [r["length"] for r in rows] == ["4", "8", "10", "11"]
    assert all(r["run"] == "trained" and r["n"] == "2" for r in rows)
    assert (tmp_path / "rows.png").stat().st_size > 10_000
    assert capsys.readouterr().out.startswith("looped, where at least half is right: bf16 at most")
    monkeypatch.setattr(bench, "compared", None)  # nothing is left to do
    bench.main([*options, "--models", "looped_aligned"])
    assert common.read_rows(tmp_path / "rows.csv") == rows


def test_tokens_that_differ() -> None:
    """Rounds count from the right; one that is missing differs in all of its tokens."""
    chains = TASKS["arithmetic"].sample([3, 3], 0)
    sizes = np.diff(chains.round_offsets)
    assert bench.same_rounds(chains, chains) == [True, True]
    total = [int(sizes[:3].sum()), int(sizes[3:].sum())]
    assert [*bench.differing(chains, chains)] == [(0, total[0]), (0, total[1])]
    changed = chains.rounds.copy()
    changed[chains.round_offsets[1] - 1] += 1  # the last token of the first round
    other = replace(chains, rounds=changed)
    assert bench.same_rounds(chains, other) == [False, True]
    assert [*bench.differing(chains, other)] == [(1, total[0]), (0, total[1])]
    shorter = replace(  # the first chain's first round without its first token
        chains, rounds=chains.rounds[1:], round_offsets=np.maximum(chains.round_offsets - 1, 0)
    )
    assert [*bench.differing(chains, shorter)] == [(1, total[0]), (0, total[1])]


def test_readme_says_what_was_found() -> None:
    rows = common.read_rows(bench.CSV)
    found = bench.summary(rows)
    text = " ".join(README.split())
    (lost, _, same), (ar_lost, _, ar_same) = found["looped"], found["ar"]
    assert len({r["run"] for r in rows if r["model"] == "looped_aligned"}) == 5
    assert f"five runs at most {lost:.1f} points of them, and {same:.1f} % or more are the" in text
    assert f"AR models at most {ar_lost:.1f} points and {ar_same:.1f} % (200 problems" in text
    assert {r["n"] for r in rows} == {"200"}


def test_points_lost_where_half_is_right() -> None:
    row = {"model": "looped_aligned", "same": "0.9"}
    rows = [
        row | {"right_fp32": "0.9", "right_bf16": "0.88"},
        row | {"right_fp32": "0.6", "right_bf16": "0.61", "same": "0.8"},
        row | {"right_fp32": "0.4", "right_bf16": "0.1", "same": "0.1"},
    ]
    assert bench.summary(rows) == {"looped": pytest.approx((2.0, 1.0, 80.0))}
