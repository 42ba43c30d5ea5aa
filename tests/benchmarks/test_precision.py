"""Rows of looped models trained in fp32 and in bf16, and what the second loses."""

from __future__ import annotations

import pytest

from benchmarks import common, precision


def test_one_command_trains_both_and_goes_on(tmp_path, capsys, monkeypatch) -> None:
    options = ["cpu", "--out", str(tmp_path / "runs"), "--csv", str(tmp_path / "rows.csv")]
    precision.main([*options, "--scale", "0.002"])
    rows = common.read_rows(tmp_path / "rows.csv")
    lengths = [str(n) for n in range(1, 12)]
    for name in precision.PRECISIONS:
        assert [r["length"] for r in rows if r["precision"] == name] == lengths
    assert (tmp_path / "rows.png").stat().st_size > 10_000
    assert capsys.readouterr().out.splitlines()[-1].startswith("cpu, arithmetic: bf16 at most")
    monkeypatch.setattr(precision, "measured", None)  # nothing is left to do
    precision.main(options)
    assert common.read_rows(tmp_path / "rows.csv") == rows


def test_points_lost_at_the_worst_trained_length() -> None:
    row = {"preset": "cpu", "task": "lis", "seed": "0", "trained_to": "2"}
    chains = {("fp32", 1): 1.0, ("bf16", 1): 0.99, ("fp32", 2): 0.97, ("bf16", 2): 0.98}
    chains |= {("fp32", 3): 0.9, ("bf16", 3): 0.1}  # beyond the trained lengths
    rows = [
        row | {"precision": name, "length": str(length), "chain": str(chain)}
        for (name, length), chain in chains.items()
    ]
    assert precision.worst(rows) == {("cpu", "lis"): pytest.approx(1.0)}
