"""Processes that make a stream's steps ahead, and how a step comes from there.

A step lies in anonymous memory whose descriptor comes through a socket: it needs no /dev/shm, which
containers make small, and no file. Where the system has no such memory it comes through the socket
itself. Every wait for a process has an end; one that computes says every few seconds that it lives.
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

AHEAD = 4  # steps that a process may be ahead
FROZEN = 60  # seconds without a sign of life
SLOW = 600  # seconds for one step
START = 300  # seconds until the first sign of life: it imports torch
_ALIVE_EVERY = 5.0
_HEADER = struct.Struct("<qqq")  # kind, bytes of the table, bytes of all
_ALIVE, _IN_MEMORY, _IN_SOCKET, _RAISED = range(4)
_ALIGN = 64
_LONGEST_SOCKET_FOLDER = 70  # of the 104 to 108 characters that a socket's path may have


def steps_ahead(
    stream: Dataset, start: int, workers: int, stopped: Callable[[], bool]
) -> Iterator[Any]:
    """The stream's steps from `start` on, made by so many processes.

    stopped(): asked every second of a wait; then KeyboardInterrupt is raised. Raises what the
    stream raises, and WorkerDied for a process that died, hangs, did not start or had no memory.
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
            worker.socket.close()  # all of them first: they leave meanwhile
        for worker in team:
            worker.stop()


class _DataWorker:
    def __init__(self, content: bytes, first: int, stride: int) -> None:
        self.socket, there = socket.socketpair()
        context = multiprocessing.get_context(_start_method())
        self.process = context.Process(target=_work, args=(there, first, stride), daemon=True)
        self._bound: int = START
        # What is defined in the caller's script can be found only by importing that.
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
        except RuntimeError as error:  # what multiprocessing says of a script being imported
            there.close()
            self.stop()
            raise WorkerDied(
                "a data worker cannot be started while the script is imported by another one; put "
                'the training under if __name__ == "__main__", or set data_workers = 0.'
            ) from error
        there.close()
        self.socket.settimeout(1.0)

    def take(self, stopped: Callable[[], bool]) -> Any:
        """The next step."""
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
                self.socket.sendall(b"1")  # it may make one more
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
            self.process.join(0.2)  # it leaves when it next looks at the socket
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
        # Seconds are counted, not looked up: those in which a whole session sleeps are none.
        for _ in range(self._bound):
            try:
                return receive()
            except TimeoutError:
                if stopped():
                    raise KeyboardInterrupt from None
        raise WorkerDied(
            f"a data worker has given no sign of life for {self._bound} s; look for what holds it "
            f"up (memory, a stopped process), or set data_workers = 0, then the same command "
            f"continues this run."
        )

    def _ended(self, stopped: Callable[[], bool], error: Exception) -> Exception:
        self.process.join(5.0)
        if stopped():
            return KeyboardInterrupt()
        code = self.process.exitcode
        if code is not None and code < 0:
            how = f"was killed (signal {-code}), as happens where memory runs out"
        elif isinstance(error, (EOFError, ConnectionError)) and code:
            how = (
                f"ended (exit status {code}): what it printed says why; a stream that the script "
                f'itself defines needs a file whose training is under if __name__ == "__main__"'
            )
        else:
            how = f"cannot hand over a batch ({error or 'it is gone'})"
        return WorkerDied(
            f"a data worker {how}; set data_workers to fewer, or to 0, then the same command "
            f"continues this run."
        )


def _start_method() -> str:
    """Forks of one process that has imported all, where that can be: it talks through a socket in
    the folder for temporary files."""
    room = len(os.fsencode(tempfile.gettempdir())) <= _LONGEST_SOCKET_FOLDER
    if "forkserver" not in multiprocessing.get_all_start_methods() or not room:
        return "spawn"
    multiprocessing.set_forkserver_preload(["relay_fast.batch.packed"])
    return "forkserver"


# In the process


def _work(link: socket.socket, first: int, stride: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to act on
    torch.set_num_threads(1)
    link.settimeout(None)
    writing, ended = threading.Lock(), threading.Event()

    def live() -> None:
        while not ended.wait(_ALIVE_EVERY):
            with suppress(OSError), writing:
                link.sendall(_HEADER.pack(_ALIVE, 0, 0))

    with suppress(OSError, EOFError):  # the trainer is gone, or wants no more
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
            while link.recv(AHEAD):  # until the trainer has taken the last
                pass
    ended.set()


def _exactly(link: socket.socket, size: int) -> bytearray:
    content = bytearray()
    while len(content) < size:
        part = link.recv(min(1 << 20, size - len(content)))
        if not part:
            raise EOFError
        content += part
    return content


def _made(stream: Dataset, step: int) -> tuple[int, bytes, list]:
    """(kind, table, buffers) of a step, or of the error that it raised."""
    try:
        return _IN_MEMORY, *_packed(default_convert(stream[step]))
    except Exception as error:
        text = traceback.format_exc()
        try:
            return _RAISED, pickle.dumps((error, text)), []
        except Exception:  # it cannot be written
            return _RAISED, pickle.dumps((RuntimeError(repr(error)), text)), []


def _hand_over(link: socket.socket, writing: Any, kind: int, table: bytes, buffers: list) -> None:
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
                f"a data worker has no memory to hand over a batch of {places[-1] >> 20} MiB "
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
    """Tensors as numpy arrays, whose bytes pickle can leave out."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.device.type == "cpu":
            with suppress(TypeError):  # numpy knows no bfloat16
                return torch.from_numpy, (value.detach().numpy(),)
        return NotImplemented


def _packed(step: Any) -> tuple[bytes, list[memoryview]]:
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
