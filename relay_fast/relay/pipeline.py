"""Runs the stages of a run in order, in up to `workers` processes, and shows their progress.

Only the calling process writes the run's bookkeeping, so that an interruption loses at most what a
stage had not yet saved.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from relay_fast.relay.run_folder import RunFolder
from relay_fast.relay.stages import (
    STAGE_DEPENDENCIES,
    Context,
    run_stage,
    scratch_files,
    stage_files,
)
from relay_fast.reporting.progress import Display
from relay_fast.utils.cores import limit_threads, usable_threads
from relay_fast.utils.errors import Diverged, RunStopped, WorkerDied
from relay_fast.utils.interrupts import interrupts_deferred
from relay_fast.utils.worker_processes import Killed, Worker, listen, stop

__all__ = ["OutOfTime", "RunStopped", "WorkerDied", "run_pipeline", "with_needs"]


class OutOfTime(Exception):
    """Raised when a run's minutes are over; the same command continues it."""


def with_needs(names: Iterable[str]) -> list[str]:
    """Adds the stages that the given ones depend on, in the pipeline's order.

    Raises ValueError for an unknown stage.
    """
    wanted: set[str] = set()

    def add(name: str) -> None:
        if name not in STAGE_DEPENDENCIES:
            raise ValueError(
                f"stage {name!r} is unknown: use some of {', '.join(STAGE_DEPENDENCIES)}"
            )
        for need in STAGE_DEPENDENCIES[name]:
            add(need)
        wanted.add(name)

    for name in names:
        add(name)
    return [name for name in STAGE_DEPENDENCIES if name in wanted]


def run_pipeline(
    folder: RunFolder,
    names: Iterable[str],
    display: Display,
    *,
    device: str = "cpu",
    impl: str = "auto",
    minutes: float | None = None,
    done: Callable[[str, Mapping[str, Any]], None],
) -> None:
    """Runs the given stages and their dependencies, except those that are done.

    When a stage fails, or at Ctrl-C, the other stages save their state before the error is raised.

    Args:
        folder: The run's folder.
        names: The stages to run.
        display: Shows the progress.
        device: Where the stages run; of several, separated by commas, each worker takes the next.
        impl: Implementation of the kernels.
        minutes: Time limit, by default none.
        done: Called with (stage, result) when a stage has finished.

    Raises:
        OutOfTime: `minutes` are over.
        WorkerDied: A worker process was killed, hangs or did not start.
        Diverged: A training diverged; its history goes into results.json.
    """
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    waiting = stages_to_run(folder, with_needs(names))
    team = _Team(folder, display, waiting, device, impl, done)
    with interrupts_deferred() as interrupted:
        try:
            while waiting or team.running():
                team.start_ready()
                team.handle_messages()
                if interrupted():
                    raise KeyboardInterrupt
                if time.monotonic() > deadline:
                    raise OutOfTime
        except BaseException as error:
            running = " and ".join(team.running())
            stop(team.workers, interrupt=True)
            if isinstance(error, Diverged):
                folder.update_results({"history": {team.handled: error.history}})
            if isinstance(error, WorkerDied) and interrupted():  # the signal reached it too
                raise KeyboardInterrupt from None
            if isinstance(error, Killed):
                raise WorkerDied(
                    f"{error} while {running} ran, probably out of memory; free some, then the "
                    f"same command continues this run."
                ) from error
            raise
        stop(team.workers, interrupt=False)


def stages_to_run(folder: RunFolder, names: list[str]) -> list[str]:
    """Returns the stages still to run; warns of lost results and clears what finished ones left."""
    waiting = _unfinished(folder, names)
    _warn_of_lost_results(folder, [name for name in names if name not in waiting])
    clear(folder, (name for name in names if name not in waiting and folder.stage_done(name)))
    return waiting


def _initialize(threads: int) -> None:
    """Prepares a training process: at most `threads` threads, fewer if the environment says so."""
    limit_threads(threads)


class _Team:
    """The worker processes of a run, and the stages that wait for one.

    Attributes:
        workers: The processes, idle ones included.
        handled: The stage whose messages were read last.
    """

    def __init__(self, folder, display, waiting: list[str], device: str, impl: str, done):
        """Starts no process; `waiting` shrinks as stages start, see `run_pipeline` for the rest."""
        self.workers: list[Worker] = []
        self.handled = ""
        self._folder, self._display, self._waiting, self._done = folder, display, waiting, done
        self._most = max(1, int(folder.config["workers"]))
        threads = usable_threads(self._most)  # for any number of stages: rounding depends on it
        self._initialize = partial(_initialize, threads)
        self._devices, self._impl = device.split(","), impl

    def running(self) -> list[str]:
        """Returns the stages that run."""
        return [worker.label for worker in self.workers if worker.label]

    def start_ready(self) -> None:
        """Starts stages whose dependencies are done, as many as there may be workers."""
        running = self.running()
        room = self._most - len(running)
        for name in _ready(self._waiting, {*self._waiting, *running}, room):
            self._waiting.remove(name)
            worker = next((worker for worker in self.workers if not worker.label), None)
            if worker is None:
                worker = Worker(self._initialize)
                self.workers.append(worker)
            device = self._devices[self.workers.index(worker) % len(self._devices)]
            path, config = str(self._folder.path), self._folder.config
            worker.run(name, _run, path, config, device, self._impl, name)
            self._display.start(name)

    def handle_messages(self) -> None:
        """Waits shortly for messages and acts on them; raises the errors of stages."""
        listen(self.workers, seconds=0.2)
        for worker in [worker for worker in self.workers if worker.label]:
            self.handled = worker.label
            for kind, value in worker.messages():
                if kind == "progress":
                    self._display.progress(self.handled, value)
                else:
                    self._display.finish(self.handled, value["seconds"])
                    self._done(self.handled, value)
                    clear(self._folder, [self.handled])


def _unfinished(folder: RunFolder, names: list[str]) -> list[str]:
    """Returns the stages still to run.

    These are the stages that are not done, those whose files are missing (from a copied folder,
    say) while a stage to run needs them, and evaluations whose numbers are missing.
    """
    results = folder.results()
    waiting: set[str] = set()
    for name in reversed(names):
        needed = any(name in STAGE_DEPENDENCIES[later] for later in waiting)
        lost = not all(file.exists() for file in stage_files(folder.path, name))
        no_numbers = name.startswith("evaluate.") and not _has_results(results, name)
        if not folder.stage_done(name) or (needed and lost) or no_numbers:
            waiting.add(name)
    return [name for name in names if name in waiting]


def _has_results(results: Mapping[str, Any], name: str) -> bool:
    """Tells whether results.json has the numbers of a stage."""
    if name == "chains":
        return "trust" in results
    section = "accuracy" if name.startswith("evaluate.") else "history"
    return name.removeprefix("evaluate.") in results.get(section, {})


def _warn_of_lost_results(folder: RunFolder, finished: list[str]) -> None:
    """Prints which numbers of finished stages are no longer in results.json."""
    results = folder.results()
    lost = [name for name in finished if not _has_results(results, name)]
    if lost:
        print(
            f"note: {folder.path / 'results.json'} was lost; it is made anew, without the curves "
            f"and counts of {', '.join(lost)}, which are kept nowhere else.",
            file=sys.stderr,
        )


def clear(folder: RunFolder, done: Iterable[str]) -> None:
    """Deletes the files that finished stages needed only to be continued."""
    for name in done:
        for file in scratch_files(folder.path, name):
            file.unlink()


def _ready(waiting: list[str], unfinished: set[str], room: int) -> list[str]:
    """Returns up to `room` stages whose dependencies are done."""
    return [name for name in waiting if unfinished.isdisjoint(STAGE_DEPENDENCIES[name])][:room]


def _run(
    path: str, config: dict, device: str, impl: str, name: str, *, on_progress: Callable
) -> dict:
    """Runs one stage, in a worker; returns its part of results.json and its seconds."""
    started = time.monotonic()
    result = run_stage(Context(Path(path), config, device, impl), name, on_progress)
    return {"result": result, "seconds": round(time.monotonic() - started, 2)}
