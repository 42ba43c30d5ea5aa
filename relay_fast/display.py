"""Progress on the terminal: one line a running stage, with rate and time left."""

from __future__ import annotations

import sys
import time

from relay_fast.trainer import Progress

PLAIN_EVERY = 10.0  # seconds between two lines of a stage where there is no terminal


class Display:
    """Bars where the output is a terminal and rich is installed, plain lines elsewhere."""

    def __init__(self) -> None:
        self._bars = _bars() if sys.stdout.isatty() else None
        self._ids: dict[str, int] = {}
        self._printed: dict[str, float] = {}
        self._first: dict[str, tuple[float, int]] = {}

    def __enter__(self) -> Display:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bars:
            self._bars.stop()

    def start(self, name: str) -> None:
        self._first.pop(name, None)
        if self._bars:
            self._ids[name] = self._bars.add_task(name, total=None, note="")
        else:
            print(f"{name:24s} started", flush=True)

    def progress(self, name: str, p: Progress) -> None:
        note = f"loss {p.loss:.4f}  right {p.chain_accuracy:6.1%}  {p.samples_per_s:.0f} samples/s"
        if self._bars:
            self._bars.update(self._ids[name], total=p.steps, completed=p.step, note=note)
            return
        now = time.monotonic()
        begun, first = self._first.setdefault(name, (now, p.step))
        if now - self._printed.get(name, 0.0) < PLAIN_EVERY:
            return
        self._printed[name] = now
        rate = (p.step - first) / (now - begun) if now > begun else 0.0
        left = f"{(p.steps - p.step) / rate:4.0f} s left" if rate else ""
        print(f"{name:24s} step {p.step}/{p.steps}  {note}  {left}", flush=True)

    def finish(self, name: str, seconds: float) -> None:
        if self._bars:
            self._bars.update(
                self._ids[name], total=1, completed=1, note=f"done in {seconds:.0f} s"
            )
        else:
            print(f"{name:24s} done in {seconds:.0f} s", flush=True)


def _bars():
    """rich's progress bars, or None without rich."""
    try:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    return Progress(
        TextColumn("{task.description:24s}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
