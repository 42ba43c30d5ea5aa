"""Processes that run one task after the other, and what the process that started them sees.

They import nothing of the caller's script, need no `if __name__ == "__main__":` there, and talk
through a pipe: no manager, queue or lock that could be left behind by one that is killed.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from types import ModuleType
from typing import Any

from relay_fast.utils.errors import WorkerDied
from relay_fast.utils.interrupts import INTERRUPTS, interrupt_once, on_interrupt

START = 300.0  # seconds until a process must have imported what it needs
GRACE = 30.0  # seconds that a worker has to save when its parent is gone
STOP = 120.0  # seconds that a worker has to save when it is asked to stop
SILENT = 300.0  # seconds without a sign of life
_ALIVE_EVERY = 10.0


class Killed(WorkerDied):
    """A worker that had begun to work is gone."""


@contextmanager
def without_main() -> Iterator[None]:
    """Processes that are started meanwhile do not import the caller's script."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Ctrl-C reaches processes that are started meanwhile when they are ready for it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Worker:
    """A process, and what it is doing: `label`, or None.

    initialize(): called in it first. Raises WorkerDied where it cannot be started.
    """

    def __init__(self, initialize: Callable[[], Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there, initialize))
        self.label: str | None = None
        self._looked, self._silent, self._ready = time.monotonic(), 0.0, False
        try:
            with without_main(), _interrupts_blocked():
                self.process.start()
        except OSError as error:
            raise WorkerDied(
                f"a worker process cannot be started ({error.strerror}); free memory or processes "
                f"(ulimit -u), then the same command continues this run."
            ) from error
        finally:
            there.close()

    def run(self, label: str, function: Callable, *args: Any) -> None:
        """Lets it call function(*args, report=…); `messages` has what comes of it."""
        self.label = label
        with suppress(OSError):  # it died: `messages` says so
            self.connection.send((function, args))

    def messages(self) -> Iterator[tuple[str, Any]]:
        """What it said since: ("report", value) and, in the end, ("done", result).

        Raises what its function raised, and WorkerDied for a process that is gone, hangs or never
        began.
        """
        # Time in which this process slept too (Ctrl-Z, a closed lid) is no silence.
        now = time.monotonic()
        self._silent, self._looked = self._silent + min(now - self._looked, 1.0), now
        try:
            while self.connection.poll():
                kind, value = pickle.loads(self.connection.recv_bytes())
                self._ready, self._silent = True, 0.0
                if kind == "raised":
                    raise _with_note(*value)
                if kind == "done":
                    self.label = None
                if kind != "alive":
                    yield kind, value
        except (EOFError, ConnectionError):
            raise self._ended() from None
        if self._ready and self._silent > SILENT:
            self.process.kill()
            raise Killed(f"a worker process gave no sign of life for {SILENT:.0f} s")
        if not self._ready and self._silent > START:
            self.process.kill()
            raise WorkerDied(
                f"a worker process did not begin to work within {START:.0f} s; look for what holds "
                f"it up (memory, a slow disk), then the same command continues this run."
            )

    def _ended(self) -> WorkerDied:
        self.process.join(5.0)
        if self._ready:
            return Killed("a worker process was killed")
        return WorkerDied(
            f"a worker process ended before it could work (exit status {self.process.exitcode}); "
            f"what it printed says why, the same command then continues this run."
        )


def listen(workers: Sequence[Worker], seconds: float) -> None:
    """Returns when one of them has something to say, or after so many seconds."""
    if workers:
        wait([worker.connection for worker in workers], timeout=seconds)
    else:
        time.sleep(seconds)


def stop(workers: Sequence[Worker], interrupt: bool) -> None:
    """Ends them: at once those that have nothing to do; with `interrupt` the others are asked to
    save and leave. One that has not left after STOP seconds is killed."""
    for worker in workers:
        if interrupt and worker.process.is_alive():
            worker.process.terminate()
        else:
            worker.connection.close()
    deadline = time.monotonic() + STOP
    for worker in workers:
        worker.process.join(max(0.1, deadline - time.monotonic()))
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join(5.0)
        worker.connection.close()


def _with_note(error: BaseException, text: str) -> BaseException:
    error.add_note(f"\nin a worker process:\n{text}")
    return error


# In the process

_saying = threading.Lock()


def _serve(connection: Connection, initialize: Callable[[], Any]) -> None:
    on_interrupt(_leave)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    initialize()
    threading.Thread(target=_live, args=(connection,), daemon=True).start()
    while True:
        try:
            function, args = connection.recv()
        except (EOFError, OSError):
            return
        try:
            _say(connection, *_outcome(connection, function, args))
        except KeyboardInterrupt:
            _leave()


def _outcome(connection: Connection, function: Callable, args: tuple) -> tuple[str, Any]:
    """What to say in the end. An interrupted function saves, and the process leaves."""
    on_interrupt(interrupt_once)
    try:
        report = lambda value: _say(connection, "report", value)
        return "done", function(*args, report=report)
    except KeyboardInterrupt:
        _leave()
    except Exception as error:
        return "raised", (_picklable(error), traceback.format_exc())
    finally:
        on_interrupt(_leave)


def _live(connection: Connection) -> None:
    while True:
        _say(connection, "alive", None)
        time.sleep(_ALIVE_EVERY)


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(repr(error))


def _say(connection: Connection, kind: str, value: Any) -> None:
    message = pickle.dumps((kind, value))
    with suppress(OSError), _saying:  # OSError: the parent is gone, there is time left to save
        connection.send_bytes(message)


def _leave(*_: object) -> None:
    os._exit(1)


def _leave_with_parent() -> None:
    """Interrupts this process when its parent is gone (killed, out of memory)."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)
