"""What a session on the card consists of, in its order, and the files that it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks import interpreter
from benchmarks.card import checks, profile, readings, steps, table
from benchmarks.card.cases import Case, check_cases, timed_cases
from benchmarks.card.device import ROOT, Timer, ceilings, identity
from benchmarks.card.kernels import time_case
from benchmarks.card.option_cases import option_cases
from benchmarks.card.session import Deadline, Later, Row, Session, Unit
from benchmarks.card.sweep import sweep
from benchmarks.common import machine
from relay_fast.kernels.supports import WHOLE_LOOP, Unsupported
from relay_fast.utils.cores import usable_cores
from relay_fast.utils.files import write_text

STEP_OPS = (
    "norm_linear", "attention", "linear_residual", "mlp", "cross_entropy", "weight_grad",
)  # fmt: skip


def run(
    out: Path,
    seconds: float,
    *,
    dry: bool,
    quick: bool,
    only: str,
    seed: int,
    script: Path,
    skip: str = "",
) -> int:
    """Measures what is not yet measured; the exit status. only: part of the names of the units that
    are wanted beside the checks and the ceilings; skip: of those that are left out, such as a
    kernel that takes the card away from the process."""
    device = "cpu" if dry else "cuda"
    deadline = Deadline(seconds - (0 if dry else 30))  # for the pages, and the way out
    if dry:
        interpreter.mend()
        warnings.filterwarnings("ignore", category=RuntimeWarning)  # of lanes that masks throw away
        torch.set_num_threads(min(2, torch.get_num_threads()))
    where = machine(device)
    commit = identity()
    mode = "interpreted" if dry else "measured"
    label = {"mode": mode, "machine": where["machine"], "versions": where["versions"],
             "commit": commit, "date": where["date"]}  # fmt: skip
    memory = 0 if dry else torch.cuda.get_device_properties(0).total_memory
    folder = out / (f"{commit}-interpreted" if dry else commit)
    others = sorted(p.name for p in out.glob("*") if p.is_dir() and p != folder)
    if others:
        print(f"results of other commits stay apart: {', '.join(others)}", flush=True)
    session = Session(folder, deadline, label, memory)
    timer = Timer(device, least=1 if dry else 3)
    work = units(session, timer, memory, dry, quick, seed, script)
    if skip:
        work = [unit for unit in work if skip not in unit.name]
    if only:
        always = [unit for unit in work if unit.table in ("checks", "ceilings")]
        wanted = [unit for unit in work if only in unit.name and unit not in always]
        if not wanted:
            names = ", ".join(unit.name for unit in work if unit not in always)
            print(f"no unit of work has {only!r} in its name; there are {names}")
            return 2
        work = always + wanted
    if not dry and not session.rows("checks"):
        compile_ahead(script, deadline)
    session.run(work)
    write_text(folder / "RESULTS.md", table.page(session, dry))
    profiled = not session.ran or write_profile(folder, [4] if quick else [512, 4096])
    if session.left:
        need = sum(unit.seconds for unit in session.left)
        print(f"not reached: {len(session.left)} units, about {need:.0f} s: run the same again")
    line, right = session.summary()
    if not profiled:
        line = f"failed: PROFILE.md was not written; {line}"
    print(f"{folder}\n{line}")
    return 0 if right and profiled else 1


def write_profile(folder: Path, sizes: list[int]) -> bool:
    """PROFILE.md by a process without the interpreter, which has no launches to record."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.card.profile", "--out", folder / "PROFILE.md",
               "--measured", folder / "profile.csv", "--samples", *map(str, sizes)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr)
    return done.returncode == 0


def profile_step(tiny: bool, samples: int, device: str) -> list[Row]:
    """Calls and seconds by kernel of one eager step of relay_fast: loss and backward."""
    if tiny:
        workload, dtype = steps.workloads(True)[0], torch.float32
    else:
        names = {w.name: w for w in steps.workloads(False)}
        workload, dtype = names[f"mix {samples}"], torch.bfloat16
    batch, _ = workload.make(0, device)
    provider = steps.relay(workload, batch, "state", False, dtype, device)
    step = lambda: provider.forward(batch).backward()
    return profile.measured_rows(step, len(batch), device)


def check_units(dry: bool, quick: bool, seed: int, device: str, script: Path) -> list[Unit]:
    """Every case's check; last, in processes of their own, those that may take the card away."""
    units, apart = [], []
    for number, (case, dtype) in enumerate(checked(dry, quick)):
        name = f"checks/{case.name}/{str(dtype).removeprefix('torch.')}"
        if case.op in checks.APART and device == "cuda":
            work = partial(checks.check_apart, case, number, seed + number, script)
            apart.append(Unit(name, "checks", 15.0, work, checks=(case.op,)))
            continue
        work = partial(checks.check, case, dtype, seed + number, device)
        units.append(Unit(name, "checks", 1.0 if dry else 4.0, work, checks=(case.op,)))
    return units + apart


def let_in(case: Case, work: Callable[[], list[Row]]) -> list[Row]:
    """Work on a case; a kernel that is refused on GPUs, whose checks have passed, is let in."""
    if case.op not in checks.APART:
        return work()
    with patch.dict(os.environ, {WHOLE_LOOP: "1"}):
        return work()


def units(
    session: Session, timer: Timer, memory: int, dry: bool, quick: bool, seed: int, script: Path
) -> list[Unit]:
    """Every unit of work, in the order in which it is wanted."""
    device, timed = timer.device, timed_cases(dry)

    def rates() -> dict[str, float]:
        rows = {r["what"]: float(r["rate"]) for r in session.rows("ceilings") if r.get("rate")}
        if set(rows) != {"copy", "matmul"}:
            raise Later("the ceilings are not measured yet, so no share can be told")
        return rows

    found = check_units(dry, quick, seed, device, script)
    found.append(Unit("ceilings", "ceilings", 15, lambda: ceilings(timer, dry)))
    step_units = steps.units(dry, timer, rates, memory, STEP_OPS)
    kernel_units = [
        Unit(
            f"kernels/{c.name}",
            "kernels",
            2 if dry else 30,
            lambda c=c: let_in(c, lambda: time_case(c, timer, rates(), 0 if dry else 6)),
            needs=(c.op,),
        )
        for c in timed
    ]
    sweep_units = [
        Unit(
            f"sweep/{c.name}",
            "sweep",
            4 if dry else 40,
            lambda c=c: let_in(c, lambda: sweep(c, timer, 0 if dry else 15)),
            needs=(c.op,),
        )
        for c in timed
    ]
    last = [
        Unit(
            f"profile/{n}",
            "profile",
            5 if dry else 30,
            partial(profile_step, dry, n, device),
            needs=STEP_OPS,
        )
        for n in ((512,) if dry else (512, 4096))
    ]
    for apart in (False, True):
        sanitize = partial(checks.sanitize, device, script, apart)
        name = "checks/compute-sanitizer" + (" apart" if apart else "")
        last.append(Unit(name, "checks", checks.SANITIZER_SECONDS, sanitize))
    reading_units = readings.units(dry, timer)
    if quick:
        wanted = ("mix/policies", "mix/compile reduce-overhead")
        step_units = [u for u in step_units if u.name.endswith(wanted)]
        kernel_units, sweep_units = kernel_units[:2], sweep_units[2:3]
        reading_units = reading_units[:1]
    some = 5  # the figures that most depends on; then kernels, before baselines that compile long
    return [
        *found, *step_units[:some], *last[:1], *reading_units, *kernel_units, *step_units[some:],
        *sweep_units, *last[1:],
    ]  # fmt: skip


def checked(dry: bool, quick: bool) -> list[tuple[Case, torch.dtype]]:
    """What is checked: odd shapes in every dtype, and what is timed, in its own."""
    odd = check_cases(dry) + option_cases(dry)
    if dry:
        dtypes = (torch.float32,) if quick else (torch.float32, torch.bfloat16)
        return [(case, dtype) for dtype in dtypes for case in odd]
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return [(case, dtype) for dtype in dtypes for case in odd] + [
        (case, torch.bfloat16) for case in timed_cases(False)
    ]


def compile_ahead(script: Path, deadline: Deadline) -> None:
    """Fills Triton's cache: as many processes as there are cores share the checks' kernels."""
    processes = max(1, min(12, usable_cores() - 2))
    command = [sys.executable, str(script), "--share"]
    began = time.monotonic()
    running = [
        subprocess.Popen(
            [*command, f"{i}/{processes}"],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for i in range(processes)
    ]
    for process in running:
        try:
            process.wait(max(1.0, min(120.0, deadline.left - 60) - (time.monotonic() - began)))
        except subprocess.TimeoutExpired:
            process.kill()  # the checks compile what is missing
            process.wait()
    print(f"compiled ahead in {time.monotonic() - began:.0f} s", flush=True)


def share(part: str) -> int:
    """One process's part of `compile_ahead`: its failures are the checks' to tell."""
    index, processes = (int(number) for number in part.split("/"))
    for case, dtype in checked(False, False)[index::processes]:
        with suppress(Exception):
            checks.check(case, dtype, 0, "cuda")
    return 0


def check_one(part: str) -> int:
    """One case's check; its rows are the last line."""
    index, seed = (int(number) for number in part.split("/"))
    case, dtype = checked(False, False)[index]
    try:
        rows = checks.check(case, dtype, seed, "cuda")
    except Unsupported as reason:
        rows = [{"op": case.op, "shape": case.shape, "status": "skipped", "note": str(reason)}]
    print(json.dumps(rows))
    return 0


def sanitized_cases(which: str) -> int:
    """Every small case once on the card: what compute-sanitizer watches. which: the usual ones, or
    those that are checked apart."""
    for case in check_cases(True) + option_cases(True):
        if (case.op in checks.APART) != (which == "apart"):
            continue
        try:
            rows = checks.check(case, torch.bfloat16, 0, "cuda")
        except Unsupported as reason:
            print(f"{case.name}: {reason}")
            continue
        for row in rows:
            if row["status"] == "failed":
                print(row["note"])
    torch.cuda.synchronize()
    return 0
