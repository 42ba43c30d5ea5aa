"""`torchrun -m relay_fast.train`: the numbers of one process, killed ranks, bad input."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from relay_fast import evaluate
from relay_fast.train import main
from tests.support.forked import Ended, Rank, ended, start_ranks

ROOT = Path(__file__).parents[2]
SMALL = [
    *("--preset", "cpu-edit-distance", "--scale", "0.004", "--eval-problems", "8"),
    *("--stages", "looped_aligned,chains,evaluate.looped_aligned", "--no-report"),
    *("--set", "model.d_model=16", "--set", "model.n_heads=2", "--set", "model.n_layers=1"),
    *("--set", "tasks.edit_distance.merge_beyond=[24]"),
]


def train(out: Path, ranks: int, *more: str) -> list[Rank]:
    """Starts the ranks of a training, as torchrun does."""
    return start_ranks(ranks, out.parent, main, ["--out", str(out), *SMALL, *more])


def numbers(out: Path) -> dict:
    """Returns what must not depend on the number of processes."""
    results = json.loads((out / "results.json").read_text())
    last = results["history"]["looped_aligned"][-1]
    return {
        "loss": pytest.approx(last["loss"], rel=1e-4),
        "step": last["step"],
        "accuracy": results["accuracy"],
        "trust": results["trust"],
        "samples": results["training"]["looped_aligned"]["samples"],
    }


class Alone(NamedTuple):
    """What one process finds, and how long it takes."""

    numbers: dict
    seconds: float


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Alone:
    out, began = tmp_path_factory.mktemp("alone") / "run", time.monotonic()
    assert ended(train(out, 1))[0][0] == 0
    return Alone(numbers(out), time.monotonic() - began)


def test_two_ranks_find_what_one_process_finds(alone, tmp_path) -> None:
    found = ended(train(tmp_path / "run", 2))
    assert [code for code, _, _ in found] == [0, 0], found
    assert found[1][1] == ""  # rank 0 speaks for all
    assert numbers(tmp_path / "run") == alone.numbers
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    rows = results["training"]["looped_aligned"]["token_iterations_by_rank"]
    assert min(rows) >= 0.4 * sum(rows)


def children(parent: int) -> list[int]:
    """Returns the processes that a process has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        if int(fields[1]) == parent:
            found.append(int(stat.parent.name))
    return sorted(found)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the ranks in /proc")
def test_killed_ranks(alone, tmp_path) -> None:
    """Whichever rank of torchrun dies whenever: all end soon, and nothing is lost or doubled."""
    draw = random.Random(os.environ.get("KILLS_SEED", "0"))
    folders = (tmp_path / f"run{k}" for k in itertools.count())
    out = next(folders)
    for _ in range(int(os.environ.get("KILLS", "3"))):
        if killed(out, alone.seconds, draw) == 0:  # it came too late
            assert numbers(out) == alone.numbers
            out = next(folders)
    found = ended(train(out, 2))
    assert [code for code, _, _ in found] == [0, 0], found
    assert numbers(out) == alone.numbers


def killed(out: Path, seconds: float, draw: random.Random) -> int:
    """Starts torchrun and kills a rank; returns torchrun's exit status, when nothing is left of it.

    Args:
        out: the run's folder.
        seconds: what a run takes.
        draw: draws the moment, in one of four cases before the run begins, and the rank.
    """
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run += ["-m", "relay_fast.train", "--out", str(out), *SMALL]
    environment, ranks = os.environ | {"OMP_NUM_THREADS": "1"}, []
    owner, started, patience = out / ".lock.owner", time.time(), 60 + 10 * seconds
    begun = lambda: owner.exists() and owner.stat().st_mtime > started
    agent = subprocess.Popen(
        run, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    after, early = draw.uniform(0, 1.2) * seconds, draw.random() < 0.25
    while not (early or begun() or agent.poll() is not None or time.time() > started + patience):
        time.sleep(0.05)
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            agent.wait(timeout=after)
        ranks = children(agent.pid)
        if ranks:
            os.kill(draw.choice(ranks), signal.SIGKILL)
        agent.wait(timeout=patience)
        assert not [rank for rank in ranks if Path(f"/proc/{rank}").exists()]
    except subprocess.TimeoutExpired:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
        raise
    finally:
        agent.kill()
    return agent.returncode


@pytest.mark.parametrize(
    ("ranks", "more", "message"),
    [
        (2, ["--batch-size", "1"], "2 processes cannot share the 1 samples of a batch"),
        (2, ["--device", "cpu,cpu"], "names several, but each of the 2 processes has one"),
        (2, ["--device", "cuda:9"], "device 'cuda:9'"),  # though they cannot meet over NCCL
        (2, ["--set", "model.d_modell=8"], "d_modell"),  # before the ranks have met
    ],
)
def test_bad_input_is_said_once(ranks, more, message, tmp_path) -> None:
    said_once(ended(train(tmp_path / "run", ranks, *more)), message)
    assert not (tmp_path / "run").exists()


def test_bad_input_of_other_commands_is_said_once(tmp_path) -> None:
    arguments = ["--out", str(tmp_path / "run")]
    said_once(ended(start_ranks(2, tmp_path, evaluate.main, arguments)), "config.json")
    assert not (tmp_path / "run").exists()


def said_once(found: list[Ended], message: str) -> None:
    ranks = len(found)
    assert [code for code, _, _ in found] == [2] * ranks
    assert message in found[0][2]
    assert found[0][2].count("\n") == 1
    assert [errors for _, _, errors in found[1:]] == [""] * (ranks - 1)


def test_stages_side_by_side_on_named_devices(tmp_path) -> None:
    found = ended(train(tmp_path / "run", 1, "--device", "cpu,cuda:9"))
    assert found[0][0] == 2
    assert "cuda:9" in found[0][2]
