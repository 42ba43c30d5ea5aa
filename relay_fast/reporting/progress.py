"""Progress of running stages: one line each, with the rate and the time left."""

from __future__ import annotations

import sys
import time
from typing import NamedTuple

PLAIN_EVERY = 10.0  # seconds between two lines of a stage without a terminal


class Progress(NamedTuple):
    """Progress of a training stage, with loss and accuracy of the last step."""

    step: int
    steps: int
    samples_per_s: float
    loss: float
    chain_accuracy: float


class Problems(NamedTuple):
    """Progress of a stage that writes or evaluates chains, counted in problems."""

    done: int
    total: int


class Compiling(NamedTuple):
    """Progress of compiling the kernels of a stage, counted in calls of its model."""

    done: int
    total: int


_UNITS = {Problems: "problem", Compiling: "warm-up call"}


class Display:
    """Shows progress bars on a terminal and prints plain lines elsewhere."""

    def __init__(self) -> None:
        self._bars = _bars() if sys.stdout and sys.stdout.isatty() else None
        self._ids: dict[str, int] = {}
        self._printed: dict[str, float] = {}
        self._last: dict[str, tuple[str, int]] = {}  # unit that was counted, and how far
        self._first: dict[str, tuple[float, int]] = {}  # start of the phase: time, count

    def __enter__(self) -> Display:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bars:
            self._bars.stop()

    def start(self, name: str) -> None:
        """Announces the stage `name`."""
        self._last.pop(name, None)
        if self._bars:
            self._ids[name] = self._bars.add_task(name, total=None, note="")
        else:
            print(f"{name:24s} started", flush=True)

    def progress(self, name: str, p: Progress | Problems | Compiling) -> None:
        """Updates the stage `name`. A count that falls, or another unit, begins a new phase."""
        unit, done, total = _UNITS.get(type(p), "step"), p[0], p[1]
        now = time.monotonic()
        last_unit, last = self._last.get(name, ("", 0))
        anew = unit != last_unit or done < last
        self._last[name] = unit, done
        if anew:
            self._first[name] = now, done
        begun, first = self._first[name]
        rate = (done - first) / (now - begun) if now > begun else 0.0
        note = _speed(rate, "problems")
        if isinstance(p, Progress):
            correct = f"correct {p.chain_accuracy:6.1%}"
            note = f"loss {p.loss:.4f}  {correct}  {_speed(p.samples_per_s, 'samples')}"
        elif isinstance(p, Compiling):
            note = "compiling kernels"
        if self._bars:
            if anew:
                self._bars.reset(self._ids[name])
            self._bars.update(self._ids[name], total=total, completed=done, note=note)
        elif now - self._printed.get(name, 0.0) >= PLAIN_EVERY:
            self._printed[name] = now
            left = f"{(total - done) / rate:4.0f} s left" if rate else ""
            print(f"{name:24s} {unit} {done}/{total}  {note}  {left}", flush=True)

    def finish(self, name: str, seconds: float) -> None:
        """Marks the stage `name` as done."""
        if self._bars:
            self._bars.update(
                self._ids[name], total=1, completed=1, note=f"done in {seconds:.0f} s"
            )
        else:
            print(f"{name:24s} done in {seconds:.0f} s", flush=True)


def _speed(rate: float, unit: str) -> str:
    """Returns the rate with its unit; nothing for 0, which is one that is not known yet."""
    return f"{rate:{'.0f' if rate >= 1 else '.1g'}} {unit}/s" if rate else ""


def _bars():
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description:24s}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
