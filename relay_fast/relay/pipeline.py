"""Runs stages in their order, several at a time where the run says so, and shows how far they are.

Each stage runs in a worker process; only this process writes the run's bookkeeping, so that an
interruption at any moment loses at most what a stage had not yet saved.
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
    """The minutes that a run was given are over; the same command continues it."""


def with_needs(names: Iterable[str]) -> list[str]:
    """The stages and what they need, in the pipeline's order. Raises ValueError for unknowns."""
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


# Long: one loop over the running stages, whose state it holds.
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
    """Runs the stages, and what they need, that are not done yet; `done(name, result)` is called as
    each finishes.

    A stage that fails stops the run with its error, after the others have saved their state;
    Ctrl-C does the same, and so do OutOfTime after `minutes`, WorkerDied, and Diverged, whose
    history goes into results.json.
    """
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    names = with_needs(names)
    waiting = _unfinished(folder, names)
    _say_what_is_lost(folder, [name for name in names if name not in waiting])
    _clear(folder, (name for name in names if name not in waiting and folder.stage_done(name)))
    most = max(1, int(folder.config["workers"]))
    threads = usable_threads(most)  # however few stages wait: sums depend on it
    task = (str(folder.path), folder.config, device, impl)
    workers: list[Worker] = []
    busy = lambda: [worker for worker in workers if worker.label]
    with interrupts_deferred() as asked:
        try:
            while waiting or busy():
                blocked = {*waiting, *(worker.label for worker in busy())}
                for name in _ready(waiting, blocked, most - len(busy())):
                    waiting.remove(name)
                    idle = [worker for worker in workers if not worker.label]
                    if not idle:
                        idle = [Worker(partial(_initialize, threads))]
                        workers += idle
                    idle[0].run(name, _run, *task, name)
                    display.start(name)
                listen(workers, seconds=0.2)
                for worker in busy():
                    stage = worker.label
                    for kind, value in worker.messages():
                        if kind == "report":
                            display.progress(stage, value)
                        else:
                            display.finish(stage, value["seconds"])
                            done(stage, value)
                            _clear(folder, [stage])
                if asked():
                    raise KeyboardInterrupt
                if time.monotonic() > deadline:
                    raise OutOfTime
        except BaseException as error:
            running = " and ".join(worker.label for worker in busy())
            stop(workers, interrupt=True)
            if isinstance(error, Diverged):
                folder.update_results({"history": {stage: error.history}})
            if isinstance(error, WorkerDied) and asked():  # it was interrupted as this process was
                raise KeyboardInterrupt from None
            if isinstance(error, Killed):
                raise WorkerDied(
                    f"{error} while {running} ran, as happens where memory runs out; free some, "
                    f"then the same command continues this run."
                ) from error
            raise
        stop(workers, interrupt=False)


def _unfinished(folder: RunFolder, names: list[str]) -> list[str]:
    """The stages still to run: those that are not done, those whose files are gone (left out when
    the folder was copied, for their size) while a stage to run needs them, and evaluations whose
    numbers are gone."""
    results = folder.results()
    waiting: set[str] = set()
    for name in reversed(names):
        needed = any(name in STAGE_DEPENDENCIES[later] for later in waiting)
        lost = not all(file.exists() for file in stage_files(folder.path, name))
        unread = name.startswith("evaluate.") and not _told(results, name)
        if not folder.stage_done(name) or (needed and lost) or unread:
            waiting.add(name)
    return [name for name in names if name in waiting]


def _told(results: Mapping[str, Any], name: str) -> bool:
    """Whether results.json has a stage's part."""
    if name == "chains":
        return "trust" in results
    section = "accuracy" if name.startswith("evaluate.") else "history"
    return name.removeprefix("evaluate.") in results.get(section, {})


def _say_what_is_lost(folder: RunFolder, finished: list[str]) -> None:
    results = folder.results()
    lost = [name for name in finished if not _told(results, name)]
    if lost:
        print(
            f"note: {folder.path / 'results.json'} was lost; it is made anew, without the curves "
            f"and counts of {', '.join(lost)}, which are kept nowhere else.",
            file=sys.stderr,
        )


def _clear(folder: RunFolder, done: Iterable[str]) -> None:
    """Deletes what finished stages kept only to be continued."""
    for name in done:
        for file in scratch_files(folder.path, name):
            file.unlink()


def _ready(waiting: list[str], unfinished: set[str], room: int) -> list[str]:
    """The stages whose needs are done, as many as there is room for."""
    return [name for name in waiting if unfinished.isdisjoint(STAGE_DEPENDENCIES[name])][:room]


# In the other processes


def _initialize(threads: int) -> None:
    limit_threads(threads)


def _run(path: str, config: dict, device: str, impl: str, name: str, *, report: Callable) -> dict:
    """One stage, in a worker: its part of results.json and the seconds it took."""
    started = time.monotonic()
    result = run_stage(Context(Path(path), config, device, impl), name, report)
    return {"result": result, "seconds": round(time.monotonic() - started, 2)}
