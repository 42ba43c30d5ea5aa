"""The hand-picked configurations and their neighbours, timed case by case."""

from __future__ import annotations

import math

import torch

from benchmarks.card.cases import Case, Draw
from benchmarks.card.device import Timer
from benchmarks.card.kernels import own_calls
from benchmarks.card.session import Row
from relay_fast.kernels import tuning
from relay_fast.kernels._runtime import device_props
from relay_fast.kernels.autotune import better, search


def sweep(case: Case, timer: Timer, budget: float) -> list[Row]:
    """A row a configuration; `line` is what the table should say where another one is best."""
    device = timer.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    calls, _ = own_calls(case, case.make(Draw(0, dtype, device)), device)
    script = "run_all.py" if device == "cuda" else "run_all.py, interpreted"
    rows: list[Row] = []
    for direction in ("forward", "backward"):
        if direction not in calls:
            continue
        seconds = lambda call: timer.seconds({"": call}, budget / 40)[""]
        for rule, times in search(calls[direction], seconds).items():
            new = better(rule, times, device_props(torch.device(device)).arch, script)
            best = min(times, key=times.__getitem__)
            for config, taken in times.items():
                fits = taken < math.inf
                rows.append({
                    "op": rule.op, "shape": case.shape, "direction": direction,
                    "dtype": str(dtype).removeprefix("torch."), "rule": tuning.line(rule).strip(),
                    "block_m": config.block_m, "block_n": config.block_n,
                    "num_warps": config.num_warps, "num_stages": config.num_stages,
                    "seconds": f"{taken:.4g}" if fits else "", "best": config == best,
                    "of_picked": f"{taken / times[rule.config]:.3g}" if fits else "",
                    "line": tuning.line(new).strip() if new and config == best else "",
                    "note": "" if fits else "does not fit",
                })  # fmt: skip
    return rows
