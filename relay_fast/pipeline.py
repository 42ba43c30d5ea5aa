"""Runs stages in their order, several at a time where the run says so, and shows how far they are.

Each stage runs in a worker process; only this process writes the run's bookkeeping, so that an
interruption at any moment loses at most what a stage had not yet saved.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch

from relay_fast._cores import usable_cores
from relay_fast.display import Display
from relay_fast.runs import RunFolder
from relay_fast.stages import NEEDS, Context, run_stage, scratch_files, stage_files

GRACE = 30.0  # seconds that a worker has to save when its parent is gone


class OutOfTime(Exception):
    """The minutes that a run was given are over; the same command continues it."""


class WorkerDied(RuntimeError):
    """A worker process was killed, by the system for want of memory most likely."""


def with_needs(names: Iterable[str]) -> list[str]:
    """The stages and what they need, in the pipeline's order. Raises ValueError for unknowns."""
    wanted: set[str] = set()

    def add(name: str) -> None:
        if name not in NEEDS:
            raise ValueError(f"stage {name!r} is unknown: use some of {', '.join(NEEDS)}")
        for need in NEEDS[name]:
            add(need)
        wanted.add(name)

    for name in names:
        add(name)
    return [name for name in NEEDS if name in wanted]


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
    Ctrl-C does the same, and so do OutOfTime after `minutes` and WorkerDied.
    """
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    names = with_needs(names)
    _clear(folder, filter(folder.stage_done, names))
    waiting = _unfinished(folder, names)
    workers = max(1, int(folder.config["workers"]))
    threads = max(1, usable_cores() // workers)  # however few stages wait: sums depend on it
    context = multiprocessing.get_context("spawn")
    manager = SyncManager(ctx=context)
    manager.start(_serve)
    with manager:
        events = manager.Queue()
        pool = ProcessPoolExecutor(workers, context, _initialize, (threads,))
        running: dict[Future, str] = {}
        try:
            while waiting or running:
                blocked = {*waiting, *running.values()}
                for name in _ready(waiting, blocked, workers - len(running)):
                    waiting.remove(name)
                    task = (str(folder.path), folder.config, device, impl, name, events)
                    running[pool.submit(_run, *task)] = name
                    display.start(name)
                finished, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                _drain(events, display)
                for future in finished:
                    name, result = running[future], future.result()
                    del running[future]
                    display.finish(name, result["seconds"])
                    done(name, result)
                    _clear(folder, [name])
                if not all(process.is_alive() for process in _workers(pool)):
                    raise BrokenProcessPool  # the pool itself may notice much later
                if time.monotonic() > deadline:
                    raise OutOfTime
        except BrokenProcessPool as error:
            _interrupt(pool)
            raise WorkerDied(
                f"a worker process was killed while {' and '.join(running.values())} ran, as "
                f"happens where memory runs out; free some, then the same command continues this "
                f"run."
            ) from error
        except BaseException:
            _interrupt(pool)
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _unfinished(folder: RunFolder, names: list[str]) -> list[str]:
    """The stages still to run: those that are not done, and those whose files are gone (left out
    when the folder was copied, for their size) while a stage to run needs them."""
    waiting: set[str] = set()
    for name in reversed(names):
        needed = any(name in NEEDS[later] for later in waiting)
        lost = not all(file.exists() for file in stage_files(folder.path, name))
        if not folder.stage_done(name) or (needed and lost):
            waiting.add(name)
    return [name for name in names if name in waiting]


def _clear(folder: RunFolder, done: Iterable[str]) -> None:
    """Deletes what finished stages kept only to be continued."""
    for name in done:
        for file in scratch_files(folder.path, name):
            file.unlink()


def _ready(waiting: list[str], unfinished: set[str], room: int) -> list[str]:
    """The stages whose needs are done, as many as there is room for."""
    return [name for name in waiting if unfinished.isdisjoint(NEEDS[name])][:room]


def _drain(events: Any, display: Display) -> None:
    while True:
        try:
            display.progress(*events.get_nowait())
        except queue.Empty:
            return


def _workers(pool: ProcessPoolExecutor) -> list[multiprocessing.Process]:
    return list((pool._processes or {}).values())


def _interrupt(pool: ProcessPoolExecutor) -> None:
    """Asks the workers to save and stop."""
    for process in _workers(pool):
        if process.is_alive():
            process.terminate()


# In the other processes


def _serve() -> None:
    """The manager: there until the workers have saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _leave_with_parent()


def _initialize(threads: int) -> None:
    torch.set_num_threads(threads)
    _on_interrupt(_leave)
    _leave_with_parent()


def _on_interrupt(handler: Callable) -> None:
    """What Ctrl-C (unless it is ignored, as in the background) and SIGTERM do."""
    for kind in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(kind) is not signal.SIG_IGN:
            signal.signal(kind, handler)


def _leave(*_) -> None:
    os._exit(1)


def _leave_with_parent() -> None:
    """Interrupts this process when its parent is gone (killed, out of memory)."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run(path: str, config: dict, device: str, impl: str, name: str, events: Any) -> dict:
    """One stage, in a worker: its part of results.json and the seconds it took.

    An interrupted worker saves and leaves: a pool that is broken tells it nothing more.
    """
    started = time.monotonic()
    _on_interrupt(signal.default_int_handler)
    try:
        context = Context(Path(path), config, device, impl)
        result = run_stage(context, name, lambda progress: events.put((name, progress)))
    except KeyboardInterrupt:
        _leave()
    finally:
        _on_interrupt(_leave)
    return {"result": result, "seconds": round(time.monotonic() - started, 2)}
