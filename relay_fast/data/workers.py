"""Worker processes that make a stream's steps ahead, and the transfer of steps from them.

A step is passed as anonymous memory whose descriptor goes through a socket: this needs neither
/dev/shm, which is small in containers, nor a file. On systems without such memory the step itself
goes through the socket. Every wait for a process times out; a working process sends a sign of life
every few seconds.
"""

from __future__ import annotations

import io
import mmap
import multiprocessing
import os
import pickle
import signal
import socket
import struct
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_convert

from relay_fast.utils.errors import WorkerDied
from relay_fast.utils.worker_processes import without_main

AHEAD = 4  # steps that a process may make ahead
FROZEN = 60  # seconds without a sign of life
SLOW = 600  # seconds for one step
START = 300  # seconds until the first sign of life: it imports torch
_ALIVE_EVERY = 5.0
_HEADER = struct.Struct("<qqq")  # kind, bytes of the table, bytes in total
_ALIVE, _IN_MEMORY, _IN_SOCKET, _RAISED = range(4)
_ALIGN = 64
_LONGEST_SOCKET_FOLDER = 70  # of the 104 to 108 characters that a socket's path may have


def steps_ahead(
    stream: Dataset, start: int, workers: int, stopped: Callable[[], bool]
) -> Iterator[Any]:
    """Yields the stream's steps from `start` on, made by worker processes.

    Args:
        stream: step → anything that pickles.
        start: the first step.
        workers: number of processes.
        stopped: polled every second of a wait; True raises KeyboardInterrupt.

    Raises:
        WorkerDied: if a process died, hangs, did not start or had no memory.
        Exception: what the stream raises.
    """
    team: list[_DataWorker] = []
    try:
        content = pickle.dumps(stream)
        for index in range(workers):
            team.append(_DataWorker(content, start + index, workers))
        for step in range(start, len(stream)):
            yield team[(step - start) % workers].take(stopped)
    finally:
        for worker in team:
            worker.socket.close()  # close all first, so that they end in parallel
        for worker in team:
            worker.stop()


class _DataWorker:
    """The trainer's end of a worker process."""

    def __init__(self, content: bytes, first: int, stride: int) -> None:
        self.socket, there = socket.socketpair()
        context = multiprocessing.get_context(_start_method())
        self.process = context.Process(target=_work, args=(there, first, stride), daemon=True)
        self._bound: int = START
        # What the caller's script defines can be unpickled only where the script is imported.
        own = nullcontext() if b"__main__" in content else without_main()
        try:
            with own:
                self.process.start()
            self.socket.settimeout(START)
            self.socket.sendall(struct.pack("<q", len(content)) + content)
        except (OSError, EOFError) as error:
            there.close()
            self.stop()
            raise WorkerDied(
                f"a data worker cannot be started ({error}); free memory or processes, or set "
                f"data_workers = 0, which makes the batches in the training process."
            ) from error
        except RuntimeError as error:  # multiprocessing: the script is being imported
            there.close()
            self.stop()
            raise WorkerDied(
                "a data worker cannot be started while the script is imported by another one; put "
                'the training under if __name__ == "__main__", or set data_workers = 0.'
            ) from error
        there.close()
        self.socket.settimeout(1.0)

    def take(self, stopped: Callable[[], bool]) -> Any:
        """Receives the next step."""
        since = 0
        while True:
            try:
                kind, table, total, descriptor = self._header(stopped)
                since += 1
                if kind == _ALIVE:
                    self._bound = FROZEN
                    if since * _ALIVE_EVERY > SLOW:
                        raise WorkerDied(
                            f"a data worker has made no batch for {SLOW} s; set data_workers = 0 "
                            f"to see why, in the training process."
                        )
                    continue
                self._bound = FROZEN
                if kind == _IN_MEMORY:
                    content = memoryview(mmap.mmap(descriptor, total))
                    os.close(descriptor)
                else:
                    content = memoryview(self._receive(total, stopped))
                self.socket.sendall(b"1")  # lets it make one more
            except (EOFError, OSError) as error:
                raise self._ended(stopped, error) from error
            if kind == _RAISED:
                error, text = pickle.loads(content)
                error.add_note(f"\nin a data worker:\n{text}")
                raise error
            return _unpacked(content, table)

    def stop(self) -> None:
        self.socket.close()
        if self.process.pid is not None:
            self.process.join(0.2)  # it ends when it next reads the socket
            self.process.kill()
            self.process.join(5.0)

    def _header(self, stopped: Callable[[], bool]) -> tuple[int, int, int, int]:
        descriptors: list[int] = []
        if hasattr(socket, "recv_fds"):
            receive = lambda: socket.recv_fds(self.socket, _HEADER.size, 1)[:2]
        else:
            receive = lambda: (self.socket.recv(_HEADER.size), [])
        data = b""
        while len(data) < _HEADER.size:
            part, found = self._patiently(receive, stopped)
            if not part:
                raise EOFError
            data, descriptors = data + part, descriptors + list(found)
        kind, table, total = _HEADER.unpack(data)
        return kind, table, total, descriptors[0] if descriptors else -1

    def _receive(self, size: int, stopped: Callable[[], bool]) -> bytearray:
        content = bytearray(size)
        view, done = memoryview(content), 0
        while done < size:
            into = view[done:]
            got = self._patiently(partial(self.socket.recv_into, into), stopped)
            if not got:
                raise EOFError
            done += got
        return content

    def _patiently(self, receive: Callable[[], Any], stopped: Callable[[], bool]) -> Any:
        # Counted by timeouts, not by a clock: time that the machine is suspended does not count.
        for _ in range(self._bound):
            try:
                return receive()
            except TimeoutError:
                if stopped():
                    raise KeyboardInterrupt from None
        raise WorkerDied(
            f"a data worker has given no sign of life for {self._bound} s; check memory and "
            f"stopped processes, or set data_workers = 0, then the same command continues this run."
        )

    def _ended(self, stopped: Callable[[], bool], error: Exception) -> Exception:
        self.process.join(5.0)
        if stopped():
            return KeyboardInterrupt()
        code = self.process.exitcode
        if code is not None and code < 0:
            how = f"was killed (signal {-code}), probably out of memory"
        elif isinstance(error, (EOFError, ConnectionError)) and code:
            how = (
                f"ended (exit status {code}): see its output for the reason; a stream that the "
                f'script itself defines needs the training under if __name__ == "__main__"'
            )
        else:
            how = f"cannot pass on a batch ({error or 'its process has ended'})"
        return WorkerDied(
            f"a data worker {how}; set data_workers to fewer, or to 0, then the same command "
            f"continues this run."
        )


def _start_method() -> str:
    """Returns "forkserver" where possible, so that each worker is a fork with all imports done.

    The fork server needs a socket in the folder for temporary files, whose path must be short.
    """
    room = len(os.fsencode(tempfile.gettempdir())) <= _LONGEST_SOCKET_FOLDER
    if "forkserver" not in multiprocessing.get_all_start_methods() or not room:
        return "spawn"
    multiprocessing.set_forkserver_preload(["relay_fast.batch.packed"])
    return "forkserver"


# In the worker process


def _work(link: socket.socket, first: int, stride: int) -> None:
    """Receives the stream; sends every `stride`-th step from `first` on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer handles Ctrl-C
    torch.set_num_threads(1)
    link.settimeout(None)
    writing, ended = threading.Lock(), threading.Event()

    def live() -> None:
        while not ended.wait(_ALIVE_EVERY):
            with suppress(OSError), writing:
                link.sendall(_HEADER.pack(_ALIVE, 0, 0))

    with suppress(OSError, EOFError):  # the trainer has ended or closed the socket
        stream = pickle.loads(_exactly(link, *struct.unpack("<q", _exactly(link, 8))))
        threading.Thread(target=live, daemon=True).start()
        room = AHEAD
        for step in range(first, len(stream), stride):
            if not room:
                room = len(link.recv(AHEAD))
                if not room:
                    break
            room -= 1
            _hand_over(link, writing, *_made(stream, step))
        with suppress(OSError):
            while link.recv(AHEAD):  # until the trainer has received the last step
                pass
    ended.set()


def _exactly(link: socket.socket, size: int) -> bytearray:
    """Receives `size` bytes."""
    content = bytearray()
    while len(content) < size:
        part = link.recv(min(1 << 20, size - len(content)))
        if not part:
            raise EOFError
        content += part
    return content


def _made(stream: Dataset, step: int) -> tuple[int, bytes, list]:
    """Makes a step; returns (kind, table, buffers) of it, or of the error that it raised."""
    try:
        return _IN_MEMORY, *_packed(default_convert(stream[step]))
    except Exception as error:
        text = traceback.format_exc()
        try:
            return _RAISED, pickle.dumps((error, text)), []
        except Exception:  # it does not pickle
            return _RAISED, pickle.dumps((RuntimeError(repr(error)), text)), []


def _hand_over(link: socket.socket, writing: Any, kind: int, table: bytes, buffers: list) -> None:
    """Sends a step: its header, and its content in memory or through the socket."""
    parts = [table, *buffers]
    places = [0]
    for part in parts:
        places.append(_aligned(places[-1] + len(part)))
    header = lambda kind: _HEADER.pack(kind, len(table), places[-1])
    if kind == _IN_MEMORY and hasattr(os, "memfd_create") and hasattr(socket, "send_fds"):
        try:
            descriptor = os.memfd_create("relay_fast step", os.MFD_CLOEXEC)
            try:
                os.ftruncate(descriptor, places[-1])
                with mmap.mmap(descriptor, places[-1]) as memory:
                    for place, part in zip(places, parts, strict=False):
                        memory[place : place + len(part)] = part
                with writing:
                    socket.send_fds(link, [header(kind)], [descriptor])
                return
            finally:
                os.close(descriptor)
        except ConnectionError:
            raise
        except OSError as error:
            problem = WorkerDied(
                f"a data worker has no memory to pass on a batch of {places[-1] >> 20} MiB "
                f"({error.strerror}); set data_workers to fewer, or to 0, then the same command "
                f"continues this run."
            )
            kind, table = _RAISED, pickle.dumps((problem, ""))
            parts, places = [table], [0, _aligned(len(table))]
    kind = _IN_SOCKET if kind == _IN_MEMORY else kind
    with writing:
        link.sendall(header(kind))
        for place, after, part in zip(places, places[1:], parts, strict=False):
            link.sendall(bytes(part).ljust(after - place, b"\0"))


class _Pickler(pickle.Pickler):
    """Pickles tensors as numpy arrays, whose bytes go into out-of-band buffers."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.device.type == "cpu":
            with suppress(TypeError):  # numpy knows no bfloat16
                return torch.from_numpy, (value.detach().numpy(),)
        return NotImplemented


def _packed(step: Any) -> tuple[bytes, list[memoryview]]:
    """Pickles a step; returns the table, with the sizes of the buffers, and the buffers."""
    file, buffers = io.BytesIO(), []
    _Pickler(file, protocol=5, buffer_callback=buffers.append).dump(step)
    views = [buffer.raw() for buffer in buffers]
    return pickle.dumps((file.getvalue(), [len(view) for view in views])), views


def _unpacked(content: memoryview, table: int) -> Any:
    main, sizes = pickle.loads(content[:table])
    place, buffers = _aligned(table), []
    for size in sizes:
        buffers.append(content[place : place + size])
        place = _aligned(place + size)
    return pickle.loads(main, buffers=buffers)


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN
