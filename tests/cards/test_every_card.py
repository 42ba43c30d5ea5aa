"""Every kernel at every size compiles for the cards with the least shared memory, and keeps its
bound. The others are in `tests/benchmarks/test_compile_report.py` and in the table of results."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compile_report.py"


@pytest.mark.parametrize(
    ("arch", "dtype"), [(86, "bf16"), (86, "fp32"), (89, "bf16"), (120, "bf16")]
)
def test_every_size_keeps_its_bound(
    environment: dict[str, str], tmp_path: Path, arch: int, dtype: str
) -> None:
    table = tmp_path / "report.csv"
    command = [sys.executable, str(SCRIPT), "--arch", str(arch), "--dtype", dtype]
    done = subprocess.run(
        [*command, "--csv", str(table)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 150 and all(row["ok"] == "True" for row in rows)
    assert {(row["arch"], row["dtype"]) for row in rows} == {(str(arch), dtype)}
