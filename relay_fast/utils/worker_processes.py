"""Worker processes that run one task after the other.

They do not import the caller's script, so it needs no `if __name__ == "__main__":`, and communicate
through a pipe: a killed worker leaves no manager, queue or lock behind.
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

START = 300.0  # seconds until a worker must have imported its modules
GRACE = 30.0  # seconds to save after the parent has died
STOP = 120.0  # seconds to save after a request to stop
SILENT = 300.0  # seconds without a sign of life until a worker is killed
_ALIVE_EVERY = 10.0


class Killed(WorkerDied):
    """Raised when a worker that had begun to work died."""


@contextmanager
def without_main() -> Iterator[None]:
    """Keeps processes that are started in the body from importing the caller's script."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Blocks Ctrl-C in processes that are started in the body, until they unblock it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Worker:
    """A worker process.

    Args:
        initialize: Called in the process first.

    Attributes:
        label: The task that it runs, None when idle.

    Raises:
        WorkerDied: The process cannot be started.
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
        """Starts function(*args, on_progress=…) in the worker; `messages` yields its results.

        Args:
            label: Name of the task.
            function: A picklable function.
            args: Its picklable arguments.
        """
        self.label = label
        with suppress(OSError):  # it died, which `messages` reports
            self.connection.send((function, args))

    def messages(self) -> Iterator[tuple[str, Any]]:
        """Yields its new messages: ("progress", value) and, at the end, ("done", result).

        Raises the error of its function, and WorkerDied if the process died, hangs or did not
        start.
        """
        # Time in which this process was suspended too (Ctrl-Z, a closed lid) does not count.
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
                f"a worker process did not begin to work within {START:.0f} s; check memory and "
                f"disk, then the same command continues this run."
            )

    def _ended(self) -> WorkerDied:
        self.process.join(5.0)
        if self._ready:
            return Killed("a worker process was killed")
        return WorkerDied(
            f"a worker process ended before it could work (exit status {self.process.exitcode}); "
            f"fix what it printed, then the same command continues this run."
        )


def listen(workers: Sequence[Worker], seconds: float) -> None:
    """Waits until a worker has sent a message, or for so many seconds."""
    if workers:
        wait([worker.connection for worker in workers], timeout=seconds)
    else:
        time.sleep(seconds)


def stop(workers: Sequence[Worker], interrupt: bool) -> None:
    """Ends idle workers, and with `interrupt` also busy ones, which save first.

    A worker that has not ended after STOP seconds is killed.
    """
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


# In the worker process

_sending = threading.Lock()


def _serve(connection: Connection, initialize: Callable[[], Any]) -> None:
    on_interrupt(_exit)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    initialize()
    threading.Thread(target=_send_alive, args=(connection,), daemon=True).start()
    while True:
        try:
            function, args = connection.recv()
        except (EOFError, OSError):
            return
        try:
            _send(connection, *_outcome(connection, function, args))
        except KeyboardInterrupt:
            _exit()


def _outcome(connection: Connection, function: Callable, args: tuple) -> tuple[str, Any]:
    """Runs the function; returns its last message. An interrupt ends the process afterwards."""
    on_interrupt(interrupt_once)
    try:
        on_progress = lambda value: _send(connection, "progress", value)
        return "done", function(*args, on_progress=on_progress)
    except KeyboardInterrupt:
        _exit()
    except Exception as error:
        return "raised", (_picklable(error), traceback.format_exc())
    finally:
        on_interrupt(_exit)


def _send_alive(connection: Connection) -> None:
    while True:
        _send(connection, "alive", None)
        time.sleep(_ALIVE_EVERY)


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(repr(error))


def _send(connection: Connection, kind: str, value: Any) -> None:
    message = pickle.dumps((kind, value))
    with suppress(OSError), _sending:  # OSError: the parent died, but the task can still save
        connection.send_bytes(message)


def _exit(*_: object) -> None:
    os._exit(1)


def _exit_with_parent() -> None:
    """Interrupts this process when its parent dies (killed, out of memory)."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)
