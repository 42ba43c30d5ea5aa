"""What lies on disk: strict JSON, no litter, one writer a folder; samplers and cores."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from relay_fast.relay.run_folder import RunFolder, RunFolderError
from relay_fast.tasks._jit import sources_digest
from relay_fast.utils import cores as _cores
from relay_fast.utils.files import clear_partials, finite, json_text, write_json
from relay_fast.utils.locks import FolderInUse, lock_folder
from relay_fast.utils.tensor_files import save_checkpoint

# JSON


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_no_file_holds_what_is_no_json(tmp_path, number) -> None:
    value = {"history": [{"loss": 1.0}, {"loss": number}]}
    for write in (json_text, lambda v: write_json(tmp_path / "x.json", v)):
        with pytest.raises(ValueError, match=r"history\[1\].loss = (nan|inf|-inf): JSON holds"):
            write(value)
    with pytest.raises(ValueError, match="loss"):
        save_checkpoint(tmp_path / "x.safetensors", {}, value)
    with pytest.raises(ValueError, match="loss"):
        RunFolder(tmp_path / "run", value)
    assert not list(tmp_path.iterdir())


def test_results_hold_null_for_it(tmp_path) -> None:
    folder = RunFolder(tmp_path / "run", {"seed": 1})
    folder.update_results({"loss": math.nan, "rows": [(1.0, math.inf), {"a": -math.inf}]})
    folder.write("evaluation.json", {"x": math.nan})
    assert folder.results() == {"loss": None, "rows": [[1.0, None], {"a": None}]}
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text()) == {"x": None}
    assert finite({"a": (1, "nan", None, True)}) == {"a": [1, "nan", None, True]}


# Litter


def test_partial_files_of_the_dead_go_and_others_stay(tmp_path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    orphan = subprocess.Popen(  # as a worker is called
        [sys.executable, "-c", "import sys; sys.stdin.read()", "multiprocessing"],
        stdin=subprocess.PIPE,
    )
    folder = RunFolder(tmp_path / "run", {"seed": 1})
    del folder
    scratch = tmp_path / "run" / "checkpoints"
    litter = [
        scratch / f".ar_relay.state.{dead.pid}.partial.safetensors",
        scratch / f".ar_relay.state.1a2b3c4d-1.{dead.pid}.partial.safetensors",
        tmp_path / "run" / f".results.{dead.pid}.partial.json",
    ]
    if Path("/proc/self/cmdline").exists():  # a live process, but no worker
        litter.append(tmp_path / "run" / f".results.{os.getppid()}.partial.json")
    kept = [
        scratch / f".mine.{orphan.pid}.partial.safetensors",  # it lives, and may go on writing
        scratch / "notes.partial.txt",
        scratch / ".notes.partial",
        tmp_path / "run" / f".evaluation.{dead.pid}.partial.json",  # an evaluation's to clear
    ]
    for file in litter + kept:
        file.write_text("half")
    RunFolder(tmp_path / "run", {"seed": 1})
    assert not any(file.exists() for file in litter) and all(file.exists() for file in kept)
    RunFolder.open(tmp_path / "run", write=True)
    assert not kept[-1].exists() and all(file.exists() for file in kept[:-1])
    clear_partials(tmp_path / "nowhere")
    clear_partials(scratch, workers=False)
    assert not kept[0].exists() and kept[1].exists() and kept[2].exists()
    orphan.communicate()


# Locks

HOLD = """
import sys
from pathlib import Path
from relay_fast.utils.locks import lock_folder
lock = lock_folder(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_the_second_process_is_refused_and_a_killed_one_holds_nothing(tmp_path) -> None:
    run = tmp_path / "run"
    folder = RunFolder(run, {"seed": 1})
    again = RunFolder(run, {"seed": 1})  # of this very process
    assert again._lock is folder._lock
    del folder, again
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    with pytest.raises(RunFolderError, match=f"another process runs.*process {process.pid} on "):
        RunFolder(run, {"seed": 1})
    with pytest.raises(FolderInUse):
        lock_folder(run)
    RunFolder.open(run)
    RunFolder.open(run, write=True)  # evaluating does not disturb it
    process.kill()
    process.communicate()
    RunFolder(run, {"seed": 1})
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "config.json"]


def test_a_foreign_folder_gets_no_lock(tmp_path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunFolderError, match="not empty"):
        RunFolder(tmp_path, {"seed": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


# Samplers


def test_compiled_samplers_are_of_the_present_sources(tmp_path) -> None:
    from relay_fast.tasks import _arithmetic_jit, _edit_distance_jit, _jit, _lis_jit, _random

    digest = sources_digest(_jit.Path(_jit.__file__).parent)
    for module in (_arithmetic_jit, _edit_distance_jit, _lis_jit, _random):
        own = [x for x in vars(module).values() if hasattr(x, "py_func")]
        assert own and all(x.py_func.__qualname__.endswith(f"_{digest}") for x in own)
        # Constants and functions come from the folder that the digest is of.
        lines = [n for n in open(module.__file__) if n.startswith(("import", "from"))]
        roots = ("from __future__", "import numpy", "from relay_fast.tasks.")
        assert all(line.startswith(roots) for line in lines), lines
    (tmp_path / "a.py").write_text("X = 1\n")
    first = sources_digest(tmp_path)
    (tmp_path / "a.py").write_text("X = 2\n")  # as long, and within the same second
    assert sources_digest.__wrapped__(tmp_path) != first


# Cores


def test_threads_are_the_least_of_cores_quota_and_the_users_limits(monkeypatch) -> None:
    for name in _cores._LIMITS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_cores, "usable_cores", lambda: 8)
    assert (_cores.usable_threads(), _cores.usable_threads(3), _cores.usable_threads(99)) == (
        8,
        2,
        1,
    )
    for name in _cores._LIMITS:
        monkeypatch.setenv(name, "3,2")
        assert _cores.usable_threads() == 3 and _cores.usable_threads(4) == 2
        for nonsense in ("", "0", "many", "-1"):
            monkeypatch.setenv(name, nonsense)
            assert _cores.usable_threads() == 8
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    "membership, files, cores",
    [
        ("0::/job/step\n", {"job/cpu.max": "250000 100000"}, 2),
        ("0::/job\n", {"job/cpu.max": "max 100000", "cpu.max": "50000 100000"}, 1),
        ("0::/job\n", {"job/cpu.max": "max 100000"}, 64),
        ("3:cpu,cpuacct:/docker/1\n0::/\n",
         {"cpu,cpuacct/cpu.cfs_quota_us": "300000", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 3),
        ("nonsense\n0::/\n", {"cpu.max": "200000 0"}, 64),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ("4:cpuset:/\n0::/\n", {}, 64),
    ],
)  # fmt: skip
def test_a_containers_quota_counts(tmp_path, monkeypatch, membership, files, cores) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "membership").write_text(membership)
    monkeypatch.setattr(_cores, "_GROUPS", tmp_path)
    monkeypatch.setattr(_cores, "_MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    assert _cores.usable_cores() == cores
    monkeypatch.setattr(_cores, "_MEMBERSHIP", tmp_path / "none")  # no Linux
    assert _cores.usable_cores() == 64
