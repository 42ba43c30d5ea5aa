"""Correctness before any timing: every kernel against its reference in fp64, on fresh inputs.

Outputs are NaN until they are written. The rules are the tests' (`benchmarks/numerics.py`): fp32 to
an RMS ratio of 1e-5 (or twice the reference's own, in long sums), 16 bits within twice the
reference's own error.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.card.cases import Case, Draw, Named, upcast_inputs
from benchmarks.card.device import ROOT, poisoned
from benchmarks.card.session import Row, Skip
from benchmarks.numerics import RMS_RATIO, assert_as_good_as_eager, describe, rms_ratio
from relay_fast.functional import REFERENCE, select
from relay_fast.kernels.supports import WHOLE_LOOP

SANITIZER_SECONDS = 75.0
APART = ("whole_loop",)  # ops that are refused on GPUs until these checks have passed on one
APART_SECONDS = 60.0


def wrong(name: str, value: Tensor, eager: Tensor, truth: Tensor, dtype: torch.dtype) -> str:
    """Why an output is wrong; "" if it is not."""
    if value.shape != truth.shape:
        return f"{name} has shape {tuple(value.shape)} instead of {tuple(truth.shape)}"
    if not truth.is_floating_point():  # token ids: rounded logits may tie, as often as eager's
        share = lambda ids: float((ids != truth).float().mean())
        allowed = 0.0 if dtype == torch.float32 else 2 * share(eager) + 0.01
        return f"{name}: {share(value):.2%} differ" if share(value) > allowed else ""
    if dtype == torch.float32:
        # Long sums: eager's own error grows with the root of their length.
        allowed = max(RMS_RATIO[dtype], 2 * rms_ratio(eager, truth))
        right = rms_ratio(value, truth) <= allowed  # false for NaN
        return "" if right else describe(name, value, truth)
    try:
        assert_as_good_as_eager(name, value, eager, truth, dtype)
    except AssertionError as error:
        return str(error)
    return ""


def check(case: Case, dtype: torch.dtype, seed: int, device: str) -> list[Row]:
    """One row: whether forward and backward are right, and two runs have the same bits."""
    kernels = select("triton", device)
    inputs = case.make(Draw(seed, dtype, device))

    def outputs(ops, given) -> Named:
        found = case.forward(ops, given)
        if case.both:
            joined = case.both(ops, given)
            found |= {f"{name} (both)": value for name, value in joined.items()}
        return found | (case.backward(ops, given, found) if case.backward else {})

    with poisoned():
        value, again = outputs(kernels, inputs), outputs(kernels, inputs)
    with torch.no_grad():
        truth = outputs(REFERENCE, upcast_inputs(inputs))
        eager = outputs(REFERENCE, inputs)  # last: a reference may overwrite what it is given
    names = [name for name in truth if name in value]  # the reference may leave lse to autograd
    reasons = [wrong(n, value[n], eager[n], truth[n], dtype) for n in names]
    reasons += [f"{n} differs between two runs" for n, v in value.items() if not v.equal(again[n])]
    reason = next(filter(None, reasons), "")
    ratios = {n: rms_ratio(value[n], truth[n]) for n in names if truth[n].is_floating_point()}
    worst = max(ratios, key=ratios.get, default="")
    return [{
        "op": case.op, "shape": case.shape, "dtype": str(dtype).removeprefix("torch."),
        "seed": seed, "worst_output": worst, "rms_ratio": f"{ratios.get(worst, 0.0):.3g}",
        "eager_rms_ratio": f"{rms_ratio(eager[worst], truth[worst]):.3g}" if worst else "",
        "status": "failed" if reason else "ok", "note": reason,
    }]  # fmt: skip


def check_apart(case: Case, index: int, seed: int, script: Path) -> list[Row]:
    """As `check`, in a process of its own, for a kernel that may take the card away from it. There
    the kernel is let in where it is refused otherwise. index: of the case among all that are
    checked."""
    command = [sys.executable, str(script), "--check", f"{index}/{seed}"]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {WHOLE_LOOP: "1"},
            capture_output=True,
            text=True,
            timeout=APART_SECONDS,
        )
        text, ended = done.stdout + done.stderr, done.returncode == 0
    except subprocess.TimeoutExpired:
        text, ended = f"took more than {APART_SECONDS:.0f} s", False
    if ended:
        return json.loads(done.stdout.splitlines()[-1])
    note = " ".join(text.split())[-300:]
    return [{"op": case.op, "shape": case.shape, "seed": seed, "status": "failed", "note": note}]


def sanitize(device: str, script: Path, apart: bool = False) -> list[Row]:
    """compute-sanitizer's memcheck over the smallest cases, in a process of its own. apart: of the
    kernels that are checked in processes of their own, and of no others."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if device != "cuda":
        raise Skip("compute-sanitizer needs a CUDA device")
    if not Path(tool).exists():
        raise Skip("compute-sanitizer is not installed")
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, str(script),
               "--sanitize", "apart" if apart else "usual"]  # fmt: skip
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | ({WHOLE_LOOP: "1"} if apart else {}),
            capture_output=True,
            text=True,
            timeout=SANITIZER_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise Skip(f"compute-sanitizer took more than {SANITIZER_SECONDS:.0f} s") from error
    ended, ops = done.returncode == 0, ", ".join(APART) if apart else "all other ops"
    return [{
        "op": "", "shape": f"small, {ops}", "dtype": "bfloat16", "worst_output": "memcheck",
        "status": "ok" if ended else "failed",
        "note": "" if ended else " ".join((done.stdout + done.stderr).split())[-300:],
    }]  # fmt: skip
