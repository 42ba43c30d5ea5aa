"""Every kernel at RELAY's sizes compiles for sm_90 and keeps its bound, without a GPU."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.compile_rows import Row, write_rows
from benchmarks.kernel_costs import Cost, launch_cost
from relay_fast.kernels._runtime import DEVICE_PROPS

WITHOUT_PRODUCTS = ("_weight_grad_sum_", "_state_input_")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compile_report.py"


def test_costs_of_a_launch() -> None:
    """A projection of 10 rows of 4 to 3 columns: 2 · 10 · 4 · 3 FLOPs, every buffer once."""
    new = lambda *shape: torch.empty(shape, dtype=torch.float16, device="meta")
    arguments = {"a_ptr": new(10, 4), "weight_ptr": new(3, 4), "bias_ptr": None, "M": 10, "N": 3}
    cost = launch_cost("_linear_residual_fwd_kernel", arguments | {"out_ptr": new(10, 3), "K": 4})
    assert cost == Cost(240, 2 * (40 + 12 + 30))
    accumulate = {"acc_ptr": new(3, 4), "dy_ptr": new(10, 3), "x_ptr": new(10, 4), "add": 1}
    cost = launch_cost("_weight_grad_kernel", accumulate | {"M": 10, "N": 3, "D": 4})
    assert cost == Cost(240, 2 * (2 * 12 + 30 + 40))
    # Two sequences of 5 rows: 50 scores a head, 30 where 3 of 5 keys are seen on average.
    heads = {"qkv_ptr": new(10, 12), "cu_ptr": new(3), "HEADS": 1, "HEAD_DIM": 4}
    full = launch_cost("_attention_short_fwd_kernel", heads | {"CAUSAL": False})
    causal = launch_cost("_attention_short_fwd_kernel", heads | {"CAUSAL": True})
    assert (full.flops, causal.flops) == (4 * 50 * 4, 4 * 30 * 4)


def test_the_floor_is_what_binds() -> None:
    """On the H200: 4.3 TB/s, 790 TFLOP/s in 16 bits, 67 in fp32."""
    assert Cost(79, 43).floor(90, "bf16") == (pytest.approx(1e-11), "memory")
    assert Cost(790_000, 43).floor(90, "bf16") == (pytest.approx(1e-9), "compute")
    assert Cost(6_700, 43).floor(90, "fp32") == (pytest.approx(1e-10), "compute")


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
        "bound", "ok", "flops", "bytes", "flops_per_byte", "floor_us", "floor",
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
        "_state_input_fwd_kernel",
        "_state_input_bwd_kernel",
        "_cross_entropy_fwd_kernel",
        "_cross_entropy_bwd_kernel",
        "_weight_grad_kernel",
        "_weight_grad_sum_kernel",
        "_loop_fwd_kernel",
    }
    for row in rows:
        assert "tf32" not in row["mma"], row
        assert float(row["floor_us"]) > 0 and int(row["bytes"]) > 0 and int(row["flops"]) > 0, row
        assert row["floor"] in ("memory", "compute"), row
        assert "nothing has written" not in row["bound"], row
        if row["dtype"] == "bf16" and row["kernel"] == "_loop_fwd_kernel":
            assert row["mma"] == "mma.bf16", row  # ptxas 12.8 gets its warp-group ones wrong
        elif row["dtype"] == "bf16" and row["kernel"] == "_norm_linear_bwd_kernel":
            assert row["mma"] == "mma.bf16", row  # blocks of 32 rows, faster on an H200
        elif row["dtype"] == "bf16" and not row["kernel"].startswith(WITHOUT_PRODUCTS):
            assert "wgmma.bf16" in row["mma"], row


def test_the_file_keeps_what_was_not_asked_for(tmp_path: Path) -> None:
    row = Row("a", 90, "bf16", "N=16", 8, 0, 0, "-", "", True, 1, 1, 1.0, 1.0, "memory")
    path, archs, dtypes = tmp_path / "report.csv", (90, 120), ("bf16",)
    others = [replace(row, kernel="b"), replace(row, arch=80), replace(row, dtype="fp16")]
    gone = [row, replace(row, config="N=32"), replace(row, arch=120)]
    write_rows(path, [*others, *gone], lambda name: True, (80, 90, 120), ("bf16", "fp16"))
    new = replace(row, registers=9)
    write_rows(path, [new], lambda name: "a" in name, archs, dtypes)
    with path.open() as file:
        found = [(r["kernel"], r["arch"], r["dtype"], r["registers"]) for r in csv.DictReader(file)]
    assert found == [("a", "80", "bf16", "8"), ("a", "90", "bf16", "9"), ("a", "90", "fp16", "8"),
                     ("b", "90", "bf16", "8")]  # fmt: skip


def test_the_kept_table_holds_nothing_over_its_bound() -> None:
    with (SCRIPT.parent / "results" / "compile_report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {80, 90, 100} <= {int(row["arch"]) for row in rows} <= {80, 86, 89, 90, 100, 120}
    assert not [row for row in rows if row["ok"] != "True"]
    for row in rows:
        assert int(row["shared_bytes"]) <= DEVICE_PROPS[int(row["arch"])].shared_bytes
