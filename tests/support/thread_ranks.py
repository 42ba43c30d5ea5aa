"""Ranks that are threads of one process: what they exchange goes through a list."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from relay_fast.training.ranks import Ranks

SILENT = 60.0  # seconds until a rank that waits for the others in vain fails


class ThreadRanks(Ranks):
    """One of the ranks of `run_ranks`.

    Args:
        rank: this rank.
        told: what each rank has said last.
        barrier: of all ranks.
    """

    def __init__(self, rank: int, told: list[Any], barrier: threading.Barrier):
        super().__init__(rank, len(told))
        self._told, self._barrier = told, barrier

    def gather(self, value: Any) -> list[Any]:
        self._told[self.rank] = value
        self._barrier.wait()
        values = list(self._told)
        self._barrier.wait()  # nobody says the next thing before all have heard
        return values

    def same(self, value: Any) -> Any:
        return self.gather(value)[0]

    def add_up(self, values: torch.Tensor) -> None:
        values.copy_(torch.stack(self.gather(values.clone())).sum(0))


def run_ranks(size: int, body: Callable[[ThreadRanks], Any]) -> list[Any]:
    """Returns what `body` returns on each rank; raises the first error that is not of waiting."""
    told: list[Any] = [None] * size
    barrier = threading.Barrier(size, timeout=SILENT)
    found: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            found[rank] = body(ThreadRanks(rank, told, barrier))
        except BaseException as error:
            found[rank] = error
            barrier.abort()

    threads = [
        threading.Thread(target=run, args=(rank,), name=f"rank {rank}") for rank in range(size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [value for value in found if isinstance(value, BaseException)]
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
    return found
