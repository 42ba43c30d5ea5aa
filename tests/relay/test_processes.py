"""Other processes: each wait for one ends, with a sentence, and interrupts leave things whole."""

import multiprocessing
import os
import signal
import time
from functools import partial

import pytest
import torch
from torch.utils.data import Dataset

from relay_fast.data import workers as _data_workers
from relay_fast.data.streams import prefetch
from relay_fast.relay import pipeline
from relay_fast.relay.presets import load_preset, override
from relay_fast.relay.run_folder import RunFolder, RunFolderError
from relay_fast.relay.stages import MODELS, STAGE_DEPENDENCIES, stage_files
from relay_fast.reporting.progress import Display
from relay_fast.train import main
from relay_fast.utils import worker_processes
from relay_fast.utils.errors import Diverged, WorkerDied
from relay_fast.utils.interrupts import interrupt_once, interrupts_deferred

linux = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux")


class Sabotaged(Dataset):
    """Ten steps; something happens at the third, in the process that makes it."""

    def __init__(self, what: str):
        self.what = what

    def __len__(self) -> int:
        return 10

    def __getitem__(self, step: int) -> tuple:
        if self.what == "without memfd" and hasattr(os, "memfd_create"):
            del os.memfd_create
        if step == 3:
            self._happen()
        return torch.full((3, step), float(step)), torch.ones(2, dtype=torch.bfloat16), {"n": step}

    def _happen(self) -> None:
        if self.what == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.what == "stops":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.what == "is slow":
            time.sleep(60)
        elif self.what == "raises":
            raise LookupError("no step 3")
        elif self.what == "has no memory":
            os.memfd_create = self._refuse

    @staticmethod
    def _refuse(*_) -> int:
        raise OSError(12, "Cannot allocate memory")


@pytest.fixture(autouse=True)
def nothing_left_running():
    yield
    assert not multiprocessing.active_children()


def steps(what: str, **options) -> list:
    return list(prefetch(Sabotaged(what), 0, 2, **options))


@pytest.mark.parametrize("what", ["nothing", "without memfd"])
def test_steps_come_whole_and_in_order(what, monkeypatch) -> None:
    monkeypatch.setattr("relay_fast.data.streams.usable_cores", lambda: 2)
    come = steps(what)
    assert len(come) == 10
    for step, (x, y, record) in enumerate(come):
        assert torch.equal(x, torch.full((3, step), float(step)))
        assert y.dtype == torch.bfloat16 and record == {"n": step}
        x += 1  # as good as the stream's own


@linux
@pytest.mark.parametrize(
    "what, error, text",
    [
        ("dies", WorkerDied, r"was killed \(signal 9\).*set data_workers to fewer"),
        ("stops", WorkerDied, r"no sign of life for 2 s.*set data_workers = 0"),
        ("is slow", WorkerDied, r"has made no batch for 4 s; set data_workers = 0"),
        ("has no memory", WorkerDied, r"pass on a batch.*Cannot allocate.*set data_workers"),
        ("raises", LookupError, "no step 3"),
    ],
)
def test_a_data_worker_that_fails_ends_the_wait(what, error, text, monkeypatch) -> None:
    monkeypatch.setattr("relay_fast.data.streams.usable_cores", lambda: 2)
    monkeypatch.setattr(_data_workers, "FROZEN", 2 if what == "stops" else 20)
    monkeypatch.setattr(_data_workers, "SLOW", 4)
    began = time.monotonic()
    with pytest.raises(error, match=text) as caught:
        steps(what)
    assert time.monotonic() - began < 60 and "\n" not in str(caught.value)


def test_ctrl_c_ends_the_wait_for_a_data_worker(monkeypatch) -> None:
    monkeypatch.setattr("relay_fast.data.streams.usable_cores", lambda: 2)
    with pytest.raises(KeyboardInterrupt):
        steps("is slow", stopped=lambda: True)


def test_a_data_worker_that_cannot_be_started(monkeypatch) -> None:
    def fail(process):
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", fail)
    with pytest.raises(WorkerDied, match="cannot be started.*data_workers = 0"):
        steps("nothing")
    with pytest.raises(WorkerDied, match="worker process cannot be started .Resource temp"):
        worker_processes.Worker(partial(int))


def test_a_script_without_the_main_guard(monkeypatch) -> None:
    monkeypatch.setattr(multiprocessing.process.current_process(), "_inheriting", True, False)
    with pytest.raises(WorkerDied, match='put the training under if __name__ == "__main__"'):
        steps("nothing")


def test_a_worker_that_ends_before_it_works(monkeypatch) -> None:
    worker = worker_processes.Worker(partial(os._exit, 3))
    worker.run("stage", print)
    with pytest.raises(WorkerDied, match=r"ended before it could work \(exit status 3\)"):
        while True:
            worker_processes.listen([worker], 0.2)
            list(worker.messages())
    worker_processes.stop([worker], interrupt=True)


def test_a_worker_that_never_begins(monkeypatch) -> None:
    monkeypatch.setattr(worker_processes, "START", 1.0)
    monkeypatch.setattr(worker_processes, "STOP", 0.5)
    worker = worker_processes.Worker(partial(time.sleep, 1000))
    with pytest.raises(WorkerDied, match="did not begin to work within 1 s"):
        while True:
            worker_processes.listen([worker], 0.2)
            list(worker.messages())
    began = time.monotonic()
    worker_processes.stop([worker], interrupt=True)
    assert time.monotonic() - began < 20


def _freeze(on_progress) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@linux
def test_a_worker_that_hangs(monkeypatch) -> None:
    monkeypatch.setattr(worker_processes, "SILENT", 15.0)  # longer than between two signs of life
    worker = worker_processes.Worker(partial(int))
    while not worker._ready:
        worker_processes.listen([worker], 0.2)
        list(worker.messages())
    monkeypatch.setattr(worker_processes, "SILENT", 1.0)
    worker.run("stage", _freeze)
    with pytest.raises(WorkerDied, match="no sign of life for 1 s"):
        while True:
            worker_processes.listen([worker], 0.2)
            list(worker.messages())
    worker_processes.stop([worker], interrupt=True)


# Interrupts


def test_interrupts_raise_once_and_never_in_the_middle() -> None:
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        for kind in before:
            signal.signal(kind, interrupt_once)
        with interrupts_deferred() as asked:
            assert not asked()
            for _ in range(3):
                signal.raise_signal(signal.SIGINT)
            assert asked()
        signal.raise_signal(signal.SIGTERM)  # spent: what is left to do is done
        for kind in before:
            signal.signal(kind, interrupt_once)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def test_a_notebooks_own_handler_is_back_afterwards() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with interrupts_deferred() as asked:
            signal.raise_signal(signal.SIGINT)
            assert asked()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


# The pipeline, with workers that are none


class Here:
    """Stands for a Worker: runs at once, in this process."""

    outcome: object = None

    def __init__(self, initialize):
        self.label = None

    def run(self, label, function, *args):
        self.label = label

    def messages(self):
        if isinstance(self.outcome, Exception):
            raise self.outcome
        name, self.label = self.label, None
        yield "done", {"result": self.outcome[name], "seconds": 0.1}


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(pipeline, "Worker", Here)
    monkeypatch.setattr(pipeline, "listen", lambda workers, seconds: None)
    monkeypatch.setattr(pipeline, "stop", lambda workers, interrupt: None)
    return Here


SMALL = ["--preset", "cpu", "--steps", "2", "--batch-size", "8", "--eval-problems", "4"]


def test_a_diverged_stage_is_told_and_its_curve_kept(tmp_path, capsys, here, monkeypatch) -> None:
    history = [{"step": 1, "loss": 3.5}, {"step": 9, "loss": None}]
    monkeypatch.setattr(
        here, "outcome", Diverged("the training of looped_vanilla diverged", history)
    )
    command = [*SMALL, "--stages", "looped_vanilla", "--out", str(tmp_path / "run")]
    assert main(command) == 1
    assert capsys.readouterr().err == "\nerror: the training of looped_vanilla diverged\n"
    folder = RunFolder.open(tmp_path / "run")
    assert folder.results()["history"] == {"looped_vanilla": history}
    assert not folder.stage_done("looped_vanilla")


def test_lost_results_are_made_again_or_named(tmp_path, capsys, here, monkeypatch) -> None:
    config = override(load_preset("cpu"), steps=2, batch_size=8, eval_problems=4)
    folder = RunFolder(tmp_path / "run", config)
    for name in STAGE_DEPENDENCIES:
        for file in stage_files(folder.path, name):
            file.touch()
        folder.mark_done(name)
    assert pipeline._unfinished(folder, list(STAGE_DEPENDENCIES)) == [
        f"evaluate.{name}" for name in MODELS
    ]
    numbers = {f"evaluate.{name}": {"accuracy": {name: {}}} for name in MODELS}
    monkeypatch.setattr(here, "outcome", numbers)
    done = lambda name, result: folder.update_results(result["result"])
    with Display() as display:
        pipeline.run_pipeline(folder, STAGE_DEPENDENCIES, display, done=done)
    assert set(folder.results()["accuracy"]) == set(MODELS)
    error = capsys.readouterr().err
    assert error.startswith("note: ") and "results.json was lost" in error
    assert "looped_aligned" in error and "chains" in error and error.count("\n") == 1
    assert pipeline._unfinished(folder, list(STAGE_DEPENDENCIES)) == []


def test_workers_may_change_and_other_numbers_may_not(tmp_path) -> None:
    config = load_preset("cpu")
    RunFolder(tmp_path / "run", config)
    more = override(load_preset("cpu"), values=["workers=7", "data_workers=3"])
    folder = RunFolder(tmp_path / "run", more)
    assert folder.config["workers"] == 7 and folder.config["data_workers"] == 3
    with pytest.raises(RunFolderError, match=r"another config: seed \(5 here"):
        RunFolder(tmp_path / "run", override(load_preset("cpu"), seed=5))
