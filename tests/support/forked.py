"""Other processes as forks of this one: they begin at once, with all that is imported here."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import torch

_CONTEXT = multiprocessing.get_context("fork")


class Ended(NamedTuple):
    """How a process ended, and what it said."""

    code: int
    out: str
    error: str


def fork(
    function: Callable[..., object],
    *arguments: object,
    environment: Mapping[str, object] | None = None,
    streams: Path | None = None,
) -> BaseProcess:
    """Starts `function(*arguments)` in a fork of this process.

    Args:
        function: where it returns a number, that is the exit status.
        arguments: of the function.
        environment: variables beside those of this process.
        streams: folder of the files `out` and `error`; None: where this process writes.
    """

    def run() -> None:
        os.environ.update({name: str(value) for name, value in (environment or {}).items()})
        torch.set_num_threads(1)  # the threads of OpenMP are not forked
        if streams is not None:
            sys.stdout, sys.stderr = (open(streams / name, "w") for name in ("out", "error"))
            os.dup2(sys.stdout.fileno(), 1)
            os.dup2(sys.stderr.fileno(), 2)
        returned = function(*arguments)
        sys.exit(returned if isinstance(returned, int) else 0)

    process = _CONTEXT.Process(target=run)
    process.start()
    return process


def variables_of_ranks(size: int) -> list[dict[str, object]]:
    """What torchrun tells each of `size` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(size)]


class Rank(NamedTuple):
    """One process of several, and the folder of what it says."""

    process: BaseProcess
    place: Path


def start_ranks(
    size: int, folder: Path, function: Callable[..., object], *arguments: object
) -> list[Rank]:
    """Calls `function(*arguments)` in `size` processes, each with the variables of its rank.

    Args:
        size: number of ranks; 1: one process without such variables.
        folder: for what they say.
        function: as `fork` takes it.
        arguments: of the function.
    """
    started = []
    for own in variables_of_ranks(size) if size > 1 else [{}]:
        place = Path(tempfile.mkdtemp(dir=folder, prefix=f"rank{len(started)}-"))
        process = fork(function, *arguments, environment=own, streams=place)
        started.append(Rank(process, place))
    return started


def ended(ranks: list[Rank], seconds: float = 240) -> list[Ended]:
    """Waits for processes, each for so many seconds at most, and kills what is left."""
    try:
        for rank in ranks:
            rank.process.join(timeout=seconds)
        codes = [rank.process.exitcode for rank in ranks]
    finally:
        for rank in ranks:
            rank.process.kill()
            rank.process.join()
    texts = [[(rank.place / name).read_text() for name in ("out", "error")] for rank in ranks]
    return [Ended(code, *text) for code, text in zip(codes, texts, strict=True)]
