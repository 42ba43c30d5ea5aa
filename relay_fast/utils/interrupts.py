"""Handling of Ctrl-C and SIGTERM: raise once, or defer until a step is complete."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


def interrupt_once(*_: object) -> None:
    """Handles a signal by raising KeyboardInterrupt; further signals are ignored."""
    for kind in INTERRUPTS:
        signal.signal(kind, signal.SIG_IGN)
    raise KeyboardInterrupt


def on_interrupt(handler: Callable) -> None:
    """Sets the handler of Ctrl-C and SIGTERM, except where they are ignored (in the background).

    Outside the main thread, which gets no signals, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for kind in INTERRUPTS:
        if signal.getsignal(kind) is not signal.SIG_IGN:
            signal.signal(kind, handler)


@contextmanager
def interrupts_deferred() -> Iterator[Callable[[], bool]]:
    """Defers Ctrl-C and SIGTERM; yields a function that tells whether one of them arrived.

    Handlers of the caller's own are kept. Outside the main thread it does nothing.
    """
    received: list[int] = []
    here = threading.current_thread() is threading.main_thread()
    ours = (signal.default_int_handler, interrupt_once)
    before = {kind: signal.getsignal(kind) for kind in INTERRUPTS if here}
    before = {kind: handler for kind, handler in before.items() if handler in ours}
    for kind in before:
        signal.signal(kind, lambda number, _: received.append(number))
    try:
        yield lambda: bool(received)
    finally:
        for kind, handler in before.items():
            spent = received and handler is interrupt_once
            signal.signal(kind, signal.SIG_IGN if spent else handler)
