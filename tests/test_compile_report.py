"""Every kernel at RELAY's sizes compiles for sm_90 and keeps its bound, without a GPU."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "compile_report.py"


def test_every_kernel_keeps_its_bound(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    table = tmp_path / "report.csv"
    command = [sys.executable, str(SCRIPT), "--quick", "--csv", str(table)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "kernel", "arch", "dtype", "config", "registers", "spill_bytes", "shared_bytes", "mma",
        "bound", "ok",
    ]  # fmt: skip
    bad = [row for row in rows if row["ok"] != "True"]
    assert not bad, bad
    compiled = {row["kernel"] for row in rows if row["dtype"] == "bf16"}
    assert compiled >= {
        "_norm_linear_fwd_kernel",
        "_norm_linear_bwd_kernel",
        "_attention_short_fwd_kernel",
        "_attention_short_bwd_kernel",
        "_linear_residual_fwd_kernel",
        "_linear_residual_bwd_kernel",
        "_mlp_fwd_kernel",
        "_mlp_bwd_kernel",
        "_cross_entropy_fwd_kernel",
        "_cross_entropy_bwd_kernel",
        "_weight_grad_kernel",
        "_weight_grad_sum_kernel",
        "_loop_fwd_kernel",
    }
    for row in rows:
        assert "tf32" not in row["mma"], row
        if row["dtype"] == "bf16" and "_sum_" not in row["kernel"]:
            assert "wgmma.bf16" in row["mma"], row
