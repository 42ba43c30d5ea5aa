"""The session on the card, rehearsed: what is done when, what is saved, what is withheld."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import run_all
from benchmarks.card import agenda, checks, device, kernels, steps, table
from benchmarks.card.cases import Case, Draw, check_cases, linear_residual, timed_cases
from benchmarks.card.option_cases import option_cases
from benchmarks.card.session import Deadline, Session, Skip, Unit
from relay_fast.functional import TORCH
from relay_fast.kernels.supports import Unsupported
from tests.support.fresh_python import run_fresh

SCRIPT = Path(run_all.__file__)
LABEL = {"mode": "interpreted", "machine": "m", "versions": "v", "commit": "c", "date": "d"}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def session(folder: Path, seconds: float = 100, clock: Clock | None = None, **options) -> Session:
    deadline = Deadline(seconds, clock or Clock())
    return Session(folder, deadline, LABEL, say=lambda line: None, **options)


def unit(name: str, clock: Clock, takes: float = 10, rows=None, **options) -> Unit:
    def run():
        clock.now += takes
        return rows or [{"op": name, "value": 1}]

    return Unit(name, options.pop("table", "t"), options.pop("seconds", takes), run, **options)


def test_it_stops_in_time_and_goes_on_with_what_it_did_not_reach(tmp_path: Path) -> None:
    clock = Clock()
    units = [unit("a", clock, 40), unit("b", clock, 70), unit("c", clock, 50)]
    first = session(tmp_path, 100, clock)
    first.run(units)
    assert clock.now == 90 and [u.name for u in first.left] == ["b"]  # a shorter one still fits
    again = session(tmp_path, 100, clock)
    again.run(units)
    assert clock.now == 160 and not again.left
    assert [row["unit"] for row in again.rows("t")] == ["a", "c", "b"]
    assert again.summary() == ("ok 0 checks, 3 rows", True)


def test_what_is_measured_survives_a_crash(tmp_path: Path) -> None:
    clock = Clock()

    def killed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session(tmp_path).run([unit("a", clock), Unit("b", "t", 1, killed)])
    with (tmp_path / "t.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row == {"unit": "a", "status": "ok", "note": "", "op": "a", "value": "1"} | LABEL


def test_timings_of_a_kernel_that_failed_its_check_are_withheld(tmp_path: Path) -> None:
    clock = Clock()
    bad = [{"op": "mlp", "status": "failed", "note": "dx is NaN"}]
    units = [
        unit("checks/mlp", clock, rows=bad, table="checks", checks=("mlp",)),
        unit("checks/norm", clock, table="checks", checks=("norm",)),
        unit("time/mlp", clock, needs=("mlp", "norm")),
        unit("time/norm", clock, needs=("norm",)),
    ]
    first = session(tmp_path)
    first.run(units)
    status = {row["unit"]: row["status"] for row in first.rows()}
    assert status == {
        "checks/mlp": "failed", "checks/norm": "ok", "time/mlp": "withheld", "time/norm": "ok",
    }  # fmt: skip
    line, right = first.summary()
    assert not right
    assert line == "failed: checks/mlp failed, time/mlp withheld; 1 checks, 4 rows"
    # Mended, the same command takes both up again, and only them.
    units[0] = unit("checks/mlp", clock, table="checks", checks=("mlp",))
    before = clock.now
    again = session(tmp_path)
    again.run(units)
    assert clock.now == before + 20
    assert again.summary() == ("ok 2 checks, 4 rows", True)


def test_a_kernel_is_trusted_when_all_its_checks_have_passed(tmp_path: Path) -> None:
    clock = Clock()
    bad = [{"op": "mlp", "status": "failed", "note": "dx is NaN"}]
    first = session(tmp_path)
    first.run([
        unit("checks/mlp/bf16", clock, rows=bad, table="checks", checks=("mlp",)),
        unit("checks/mlp/fp32", clock, table="checks", checks=("mlp",)),
        unit("time/mlp", clock, needs=("mlp",)),
    ])  # fmt: skip
    assert [row["status"] for row in first.rows()] == ["failed", "ok", "withheld"]


def test_a_card_too_small_and_an_absent_tool_are_skipped_with_a_line(tmp_path: Path) -> None:
    clock, said = Clock(), []

    def absent():
        raise Skip("compute-sanitizer is not installed")

    def full():
        raise torch.OutOfMemoryError

    small = session(tmp_path, memory=40 << 30)
    small.say = said.append
    small.run([unit("big", clock, memory=100 << 30), Unit("tool", "t", 1, absent),
               Unit("full", "t", 1, full)])  # fmt: skip
    assert said == [
        "big: skipped: needs 100 GiB, the card has 40 GiB",
        "tool: skipped: compute-sanitizer is not installed",
        "full: skipped: the card ran out of memory",
    ]
    assert clock.now == 0 and small.summary() == ("ok 0 checks, 3 rows", True)


def test_a_unit_that_raises_fails_and_the_others_run(tmp_path: Path, capsys) -> None:
    clock = Clock()
    broken = Unit("x", "t", 1, lambda: 1 / 0)
    found = session(tmp_path)
    found.run([broken, unit("a", clock)])
    assert found.summary() == ("failed: x failed; 0 checks, 2 rows", False)
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_what_took_the_card_away_comes_last_and_what_is_refused_is_skipped(tmp_path: Path) -> None:
    clock, order = Clock(), []

    def lost():
        order.append("lost")
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def refused():
        order.append("refused")
        raise Unsupported("not on this card")

    units = [Unit("lost", "t", 1, lost), Unit("refused", "t", 1, refused), unit("a", clock)]
    session(tmp_path).run(units)
    again = session(tmp_path)
    again.run([*units, Unit("b", "t", 1, lambda: [{"n": order.append("b")}])])
    assert order == ["lost", "refused", "b", "lost"]
    status = {row["unit"]: row["status"] for row in again.rows("t")}
    assert status == {"lost": "failed", "refused": "skipped", "a": "ok", "b": "ok"}


def test_checks_catch_wrong_numbers_nan_and_other_shapes() -> None:
    truth = torch.randn(9, 5, dtype=torch.float64)
    eager = truth.to(torch.bfloat16)
    for dtype, near in ((torch.bfloat16, eager), (torch.float32, truth.float())):
        wrong = lambda value, e=near, d=dtype: checks.wrong("dx", value, e, truth, d)
        assert wrong(near) == ""
        off = near.clone()
        off[4, 2] += 0.5
        assert "dx (9, 5)" in wrong(off) and "(4, 2)" in wrong(off)
        off[4, 2] = float("nan")
        assert "nan" in wrong(off)
        assert "shape" in wrong(near[1:])
    ids = torch.arange(300)
    assert checks.wrong("ids", ids, ids, ids, torch.float32) == ""
    assert "differ" in checks.wrong("ids", ids + 1, ids, ids, torch.bfloat16)


def test_a_kernel_that_leaves_an_element_unwritten_fails_its_check(monkeypatch) -> None:
    """Outputs are NaN before they are written."""
    lazy = lambda a, *_: torch.empty(a.shape[0], 32)
    monkeypatch.setattr(checks, "select", lambda *_: TORCH._replace(linear_residual_fwd=lazy))
    (row,) = checks.check(linear_residual(5, 32), torch.float32, 0, "cpu")
    assert row["status"] == "failed" and "nan" in row["note"]


def packed(padded: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(…, B, heads, n, head_dim) as (rows, columns): the rows where the mask is set."""
    by_row = padded.movedim((-4, -2), (0, 1)).flatten(2)  # (B, n, columns)
    return by_row[mask]


def with_packed_inputs(case: Case, i: SimpleNamespace) -> tuple[SimpleNamespace, torch.Tensor]:
    """The attention case's inputs with eager's padded q, k, v packed; and the mask of its rows."""
    longest = i.padded.shape[-2]
    mask = torch.ones(i.padded.shape[1], longest, dtype=torch.bool)
    if i.mask is not None:
        mask = i.mask[:, 0, 0]
    return SimpleNamespace(**vars(i) | {"qkv": packed(i.padded, mask)}), mask


CASES = check_cases(True) + option_cases(True) + timed_cases(True)
WITH_BACKWARD = [case for case in CASES if case.backward is not None]


def eager_and_own(case: Case, i: SimpleNamespace) -> tuple[torch.Tensor, torch.Tensor]:
    """What a case's eager form gives, and what its op does, in the op's layout."""
    eager = case.eager(i)
    if case.op == "attention":
        i, mask = with_packed_inputs(case, i)
        eager = packed(eager, mask)
    value = next(iter(case.forward(TORCH, i).values()))
    return eager, value.mean() if eager.ndim == 0 else value


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_case_is_the_same_op_for_kernels_and_eager(case: Case) -> None:
    """The reference, which kernels are held to, against the eager form."""
    eager, value = eager_and_own(case, case.make(Draw(0, torch.float32, "cpu")))
    assert value.numel() > 1 or case.op == "cross_entropy"
    torch.testing.assert_close(value, eager)


@pytest.mark.parametrize("case", WITH_BACKWARD, ids=lambda c: c.name)
def test_every_gradient_is_autograds_through_the_eager_form(case: Case) -> None:
    i = case.make(Draw(0, torch.float32, "cpu"))
    leaves = {name: vars(i)[name].requires_grad_() for name in case.leaves}
    eager, _ = eager_and_own(case, i)
    g = None if eager.ndim == 0 else i.g.clone()
    grads = torch.autograd.grad(eager, list(leaves.values()), g)
    truth = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    with torch.no_grad():
        if case.op == "attention":
            i, mask = with_packed_inputs(case, i)
            truth = {"dqkv": packed(truth["dpadded"], mask)}
        own = case.backward(TORCH, i, case.forward(TORCH, i))
    if case.op == "mlp":
        own["dx"] = own["dx"] + i.g  # the residual's own
    assert own.keys() == truth.keys() - {"dresidual"}  # that is g
    for name, value in own.items():
        torch.testing.assert_close(value, truth[name], msg=lambda m, n=name: f"{n}: {m}")


def test_floors_and_fewest_bytes_by_hand() -> None:
    case = linear_residual(10, 4)
    i = case.make(Draw(0, torch.float32, "cpu"))
    out = case.forward(TORCH, i)
    grads = case.backward(TORCH, i, out)
    forward, backward = case.bytes(i, out, grads)
    assert forward == 4 * (40 + 16 + 40 + 40)  # a, weight, residual; out
    assert backward == forward + 4 * (40 + 40 + 16)  # g; da, dweight
    floor = kernels.floors(case, (forward, backward), {"matmul": 1.0, "copy": 1e9})
    assert floor["forward"] == 2 * 10 * 4 * 4 and floor["both"] == 3 * floor["forward"]


def test_the_best_baseline_is_named() -> None:
    def row(provider: str, ratio: str) -> dict[str, str]:
        return {"workload": "mix", "provider": provider, "times_relay_fast": ratio, "status": "ok"}

    rows = [row("relay_fast", "1.2"), row("eager padded", "0.5"), row("eager bucketed", "6"),
            row("compile reduce-overhead", "4.5"), row("compile x checkpoint", "5")]  # fmt: skip
    assert table.best_baselines(rows)[0][1]["provider"] == "compile reduce-overhead"


def test_a_baseline_that_does_not_run_is_skipped_and_ours_fails() -> None:
    with pytest.raises(Skip, match="compile x does not run here: ValueError: no"):
        with steps.others_may_fail("compile x"):
            raise ValueError("no")
    with pytest.raises(ValueError), steps.others_may_fail("relay_fast graph"):
        raise ValueError("no")
    with pytest.raises(torch.OutOfMemoryError), steps.others_may_fail("compile x"):
        raise torch.OutOfMemoryError


def test_what_matters_most_comes_first_and_nothing_is_lost() -> None:
    names, kinds = ["mix 512", "other"], ["policies", "eager padded"]
    order = steps.in_order(names, kinds)
    assert order[:2] == [("mix 512", "policies"), ("mix 512", "eager padded")]
    assert sorted(order) == sorted((n, k) for n in names for k in kinds)


def test_identity_names_changed_sources(monkeypatch) -> None:
    monkeypatch.setattr(device, "ROOT", Path("/nonexistent"))
    assert device.identity() == f"tree-{device.source_hash()}"


def test_bad_arguments_are_named(capsys) -> None:
    for argv, message in (
        (["--minutes", "0"], "leaves no time"), (["--quick"], "short form of --dry-run"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            run_all.main(argv)
        assert message in capsys.readouterr().err


def test_only_what_exists_can_be_asked_for(tmp_path: Path, capsys, monkeypatch) -> None:
    for name in ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES"):  # set by a dry run
        monkeypatch.setenv(name, os.environ.get(name, ""))
    argv = ["--dry-run", "--only", "flux", "--out", str(tmp_path)]
    assert run_all.main(argv) == 2
    said = capsys.readouterr().out
    assert "no unit of work has 'flux' in its name; there are steps/tiny mix/policies, " in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_says_what_dry_run_does(capsys) -> None:
    assert run_all.main(["--minutes", "1"]) == 2
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "--dry-run walks the same path on the CPU" in said


def test_the_rehearsal_leaves_every_file(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--dry-run", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert re.fullmatch(
        rf"ok {len(check_cases(True) + option_cases(True))} checks, \d+ rows", lines[-1]
    )
    (folder,) = tmp_path.iterdir()
    assert folder.name.endswith("-interpreted")
    names = {path.name for path in folder.iterdir()}
    tables = {"checks", "ceilings", "steps", "readings", "kernels", "sweep", "profile"}
    assert names == {f"{name}.csv" for name in tables} | {"RESULTS.md", "PROFILE.md"}
    for name in tables:
        with (folder / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert rows and {row["mode"] for row in rows} == {"interpreted"}, name
    for name in ("RESULTS.md", "PROFILE.md"):
        assert "No figure here says anything about a GPU" in (folder / name).read_text()


def test_what_needs_the_ceilings_waits_for_them(tmp_path: Path) -> None:
    """Too little time for the ceilings: a short unit that needs them is no failure."""
    found = session(tmp_path, 10)
    timer = device.Timer("cpu", least=1)
    work = agenda.units(found, timer, 0, True, True, 0, SCRIPT)
    found.run([u for u in work if u.name in ("ceilings", "sweep/linear_residual/20x32")])
    assert found.summary()[1]
    waiting = [u for u in work if u.name == "kernels/norm_linear/20x32"]
    found.run(waiting)
    assert waiting[0] in found.left and not found.rows("kernels")


def test_a_lost_card_ends_the_session(tmp_path: Path, monkeypatch) -> None:
    """An illegal memory access leaves no use of the card to this process."""

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    clock, found = Clock(), session(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    found.run([Unit("bad", "t", 1, lost), unit("a", clock)])
    assert clock.now == 0 and [u.name for u in found.left] == ["a"]
    line, right = found.summary()
    assert not right and "the card is lost to this process: CUDA error: an illegal" in line


def ending(code: str, tmp_path: Path) -> Path:
    """A script in the place of run_all.py."""
    script = tmp_path / "script.py"
    script.write_text(f"import os, sys\n{code}\n")
    return script


def test_a_kernel_that_may_take_the_card_is_checked_last_and_apart(tmp_path: Path) -> None:
    timer = device.Timer("cuda")
    units = agenda.units(session(tmp_path), timer, 0, False, False, 7, SCRIPT)
    ops = [u.checks[0] for u in units[: [u.name for u in units].index("ceilings")]]
    first = ops.index("whole_loop")
    assert set(ops[first:]) == {"whole_loop"} and len(ops[first:]) == 2 * 3 + 1
    unit = units[first]
    case, index, seed, _ = unit.run.args
    same, dtype = agenda.checked(False, False)[index]
    assert (same.name, dtype) == (case.name, torch.bfloat16)
    assert unit.name == f"checks/{case.name}/bfloat16" and seed == 7 + index

    reply = """said = os.environ["RELAY_FAST_WHOLE_LOOP"] + " ".join(sys.argv[1:])
print("other lines")
print('[{"note": "' + said + '"}]')"""
    rows = checks.check_apart(case, 3, 5, ending(reply, tmp_path))
    assert rows == [{"note": "1--check 3/5"}]
    lost = ending("sys.exit('CUDA error: unspecified launch failure')", tmp_path)
    (row,) = checks.check_apart(case, 3, 5, lost)
    assert row["op"] == "whole_loop" and row["status"] == "failed"
    assert row["note"] == "CUDA error: unspecified launch failure"
    assert "RELAY_FAST_WHOLE_LOOP" not in os.environ
    seen = lambda: os.environ.get("RELAY_FAST_WHOLE_LOOP")
    assert agenda.let_in(case, seen) == "1"
    assert agenda.let_in(linear_residual(5, 32), seen) is None is seen()


PROFILED = """
import os, sys
os.environ.pop("TRITON_INTERPRET", None)
from pathlib import Path
from benchmarks.card import profile
trace, useful, _ = profile.trace_step(6)
parts = trace.parts
loops = profile.common.task_batch("multitask", 6, 0, "cpu")[0].plan.max_loops
assert parts["_mlp_up_fwd_kernel"].launches == 2 * parts["_mlp_bwd_kernel"].launches == 6 * loops
gemms = sum(p.flops for name, p in parts.items() if name != profile.OTHER)
assert 1.2 * useful < gemms < 1.45 * useful, (gemms, useful)  # the forward again: 4 / 3
assert profile.utilisation(132) == 1 and profile.utilisation(133) == 133 / 264
assert all(0 < p.floor <= p.waves for p in parts.values())
path = Path(sys.argv[1])
path.write_text("samples,kernel,calls,seconds,mode,status\\n6,mlp_up_fwd,180,0.0123,measured,ok\\n")
page = profile.page([6], path)
(line,) = (s for s in page.splitlines() if s.startswith("| mlp_up_fwd |"))
assert line.split(" | ")[7:9] == ["12.3", "180"], line
assert "prediction" in page and "interpreted" not in page.lower()
assert "| – | – | – |" in profile.page([6], None)
"""


def test_the_profile_counts_launches_and_takes_measurements_in(tmp_path: Path) -> None:
    """A looped step of 3 layers an iteration: forward twice, backward once."""
    done = run_fresh(PROFILED, str(tmp_path / "profile.csv"))
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_session_on_a_card_checks_first_and_names_its_work_once(tmp_path: Path) -> None:
    timer = device.Timer("cuda")
    found = agenda.units(session(tmp_path), timer, 0, False, False, 0, SCRIPT)
    names = [u.name for u in found]
    assert len(set(names)) == len(names)
    ceilings = names.index("ceilings")
    assert all(name.startswith("checks/") for name in names[:ceilings])
    checked = {op for u in found[:ceilings] for op in u.checks}
    assert all(checked.issuperset(u.needs) for u in found)
    assert [u.table for u in found[ceilings + 1 : ceilings + 6]] == ["steps"] * 5
    for workload in ("mix 512", "mix 4096", "wide 1024", "alike 512"):
        kinds = [name for name in names if name.startswith(f"steps/{workload}/")]
        assert len(kinds) == 8, kinds  # policies, padded, 2 bucketed, 2 modes with and without
    # Before anything is compiled for long, the session has what the targets are about.
    assert sum(u.seconds for u in found[ceilings : ceilings + 7]) < 300
