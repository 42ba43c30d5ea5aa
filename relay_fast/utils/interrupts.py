"""Ctrl-C and SIGTERM: raised once, or kept until a step or a file is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


def interrupt_once(*_: object) -> None:
    """A handler: KeyboardInterrupt the first time; what comes while that is acted on is ignored."""
    for kind in INTERRUPTS:
        signal.signal(kind, signal.SIG_IGN)
    raise KeyboardInterrupt


def on_interrupt(handler: Callable) -> None:
    """What Ctrl-C (unless it is ignored, as in the background) and SIGTERM do from now on.

    Outside the main thread, which gets no signals, it changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for kind in INTERRUPTS:
        if signal.getsignal(kind) is not signal.SIG_IGN:
            signal.signal(kind, handler)


@contextmanager
def interrupts_deferred() -> Iterator[Callable[[], bool]]:
    """Yields whether Ctrl-C was pressed meanwhile, instead of raising in the middle of something.

    Handlers of the caller's own are left alone. Outside the main thread it changes nothing.
    """
    asked: list[int] = []
    here = threading.current_thread() is threading.main_thread()
    ours = (signal.default_int_handler, interrupt_once)
    before = {kind: signal.getsignal(kind) for kind in INTERRUPTS if here}
    before = {kind: handler for kind, handler in before.items() if handler in ours}
    for kind in before:
        signal.signal(kind, lambda number, _: asked.append(number))
    try:
        yield lambda: bool(asked)
    finally:
        for kind, handler in before.items():
            spent = asked and handler is interrupt_once
            signal.signal(kind, signal.SIG_IGN if spent else handler)
