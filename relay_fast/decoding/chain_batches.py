"""The batches that chains are read in: each as large as memory allows, the next one started before
one that the device is at work on is waited for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from relay_fast.decoding._inference import halve_on_oom, inference
from relay_fast.decoding.chain_reader import ChainReader, Started
from relay_fast.decoding.reading import ChainLogProbs, Chains, read_batch
from relay_fast.tasks import Samples


def one_ahead(batches: Iterator[tuple[ChainBatch, int]]) -> Iterator[tuple[ChainBatch, int]]:
    """Yields the batches; one that is running only after the next has been started."""
    waiting = None
    while True:
        try:
            following = next(batches, None)
        except Exception:
            if waiting is not None:  # is not lost
                yield waiting
            raise
        if waiting is not None:
            yield waiting
        if following is None:
            return
        waiting = following if following[0].running else None
        if waiting is None:
            yield following


class ChainBatch:
    """A batch whose reading has been started.

    Args:
        reader: reads it.
        problems: all problems.
        chosen: which of them to read, as many of the first as fit into memory.
        autocast: as in `generate_looped_chains`.

    Attributes:
        chosen: those that are read.
        running: whether the device may be at work on them.
    """

    def __init__(self, reader: ChainReader, problems: Samples, chosen: np.ndarray, autocast: str):
        self._reader, self._problems, self._autocast = reader, problems, autocast
        self.chosen, device = chosen, reader.model.device
        self._started, fitted = halve_on_oom(self._start, len(chosen), device)
        self.chosen, self.running = chosen[:fitted], self._started.running

    def _start(self, count: int) -> Started:
        with inference(self._reader.model, self._autocast):
            return self._reader.start(self._problems.take(self.chosen[:count]))

    def chains(self) -> Chains:
        """Waits for the chains and returns them."""
        with inference(self._reader.model, self._autocast):
            try:
                return self._started.chains()
            except torch.OutOfMemoryError:
                pass
            return self._in_parts()

    def _in_parts(self) -> Chains:
        """Reads the batch op by op, in as many parts as memory asks for."""
        reader, parts, done, size = self._reader, [], 0, len(self.chosen)
        while done < len(self.chosen):
            rest = self._problems.take(self.chosen[done:])
            attempt = lambda n, rest=rest: read_batch(
                reader.model, rest.take(slice(0, n)), reader.tasks, reader.scored
            )
            part, size = halve_on_oom(attempt, min(size, len(rest)), reader.model.device)
            parts.append(part)
            done += size
        written, scores = zip(*parts, strict=True)
        if not reader.scored:
            return Samples.concat(written), None
        return Samples.concat(written), ChainLogProbs(
            *map(np.concatenate, zip(*scores, strict=True))
        )
