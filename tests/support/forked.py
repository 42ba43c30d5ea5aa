"""Other processes as forks of this one: they begin at once, with all that is imported here."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
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


def run_ranks(
    size: int, folder: Path, function: Callable[..., object], *arguments: object
) -> list[Ended]:
    """Calls `function(*arguments)` in `size` processes, each with the variables of its rank.

    Args:
        size: number of ranks; 1: one process without such variables.
        folder: a new one, for what they print.
        function: as `fork` takes it.
        arguments: of the function.

    Returns:
        how each ended, by rank.
    """
    places = [folder / f"rank{rank}" for rank in range(size)]
    for place in places:
        place.mkdir(parents=True)
    variables = variables_of_ranks(size) if size > 1 else [{}]
    started = [
        fork(function, *arguments, environment=own, streams=place)
        for own, place in zip(variables, places, strict=True)
    ]
    try:
        for process in started:
            process.join(timeout=240)
        codes = [process.exitcode for process in started]
    finally:
        for process in started:
            process.kill()
            process.join()
    texts = [[(place / name).read_text() for name in ("out", "error")] for place in places]
    return [Ended(code, *text) for code, text in zip(codes, texts, strict=True)]
