"""Runs the stages of a run one after the other on several ranks (`relay_fast.training.ranks`).

All ranks train in data parallel, and share out the problems of chains and evaluation. Rank 0 keeps
the folder and shows progress.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from relay_fast.relay.context import Context
from relay_fast.relay.pipeline import OutOfTime, clear, stages_to_run, with_needs
from relay_fast.relay.run_folder import RunFolder
from relay_fast.relay.stages import run_stage
from relay_fast.reporting.progress import Display
from relay_fast.training.ranks import Ranks, Stopped
from relay_fast.utils.errors import Diverged

Done = Callable[[str, Mapping[str, Any]], None]


def run_together(
    path: Path,
    config: Mapping[str, Any],
    folder: RunFolder | None,
    names: Iterable[str],
    ranks: Ranks,
    *,
    device: str = "cpu",
    impl: str = "auto",
    minutes: float | None = None,
    done: Done = lambda stage, result: None,
) -> None:
    """Runs the given stages and their dependencies, except those that are done, on all ranks.

    Args:
        path: The run's folder, which all ranks can read.
        config: The run's config.
        folder: The same folder, on rank 0; None on the others.
        names: The stages to run.
        ranks: The processes, all in this call.
        device: Where this rank runs.
        impl: Implementation of the kernels.
        minutes: Time limit, by default none.
        done: Called on rank 0 with (stage, result) when a stage has finished.

    Raises:
        OutOfTime: `minutes` are over.
        WorkerDied: A rank died or hangs.
        Diverged: A training diverged; its history goes into results.json.
    """
    names = with_needs(names)
    waiting = ranks.same(None if folder is None else stages_to_run(folder, names))
    context = Context(path, config, device, impl, ranks)
    with Display() as display, _Deadline(minutes, ranks):
        for name in waiting:  # dependencies come first
            started = time.monotonic()
            if folder is None:  # rank 0 speaks for all
                run_stage(context, name, lambda value: None)
                continue
            display.start(name)
            try:
                result = run_stage(context, name, partial(display.progress, name))
            except Diverged as error:
                folder.update_results({"history": {name: error.history}})
                raise
            seconds = round(time.monotonic() - started, 2)
            display.finish(name, seconds)
            done(name, {"result": result, "seconds": seconds})
            clear(folder, [name])


class _Deadline:
    """Asks this process to stop, as Ctrl-C does, when `minutes` are over; on rank 0 alone.

    The ranks then stop together, and all raise OutOfTime.
    """

    def __init__(self, minutes: float | None, ranks: Ranks):
        self._ranks, self._expired, self._timer = ranks, threading.Event(), None
        if minutes is not None and ranks.writes:
            self._timer = threading.Timer(max(0.0, 60 * minutes), self._ask)

    def _ask(self) -> None:
        self._expired.set()
        os.kill(os.getpid(), signal.SIGTERM)

    def __enter__(self) -> _Deadline:
        if self._timer is not None:
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if kind is Stopped and self._ranks.same(self._expired.is_set()):
            raise OutOfTime
