"""Which records serve for what: some are kept for evaluation, the others are drawn by a seed."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from relay_fast.tasks.record_index import RecordIndex

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_KEYS = np.arange(4, dtype=np.uint64) * _GOLDEN  # of the Feistel network's rounds
_UNSEEN = 0x7E57  # salt of the order in which records are tested


class RecordPools:
    """Two parts of the records of each length: one to draw from, one kept for evaluation.

    Args:
        index: The records.
        test: Those of a file of their own that are kept for evaluation; None to keep some of
            `index`.
        held_out: Share that is kept then. The problem's tokens decide, so that equal problems are
            in the same part.
    """

    def __init__(self, index: RecordIndex, test: RecordIndex | None, held_out: float) -> None:
        self.index, self.test = index, test or index
        self.held_out = 0.0 if test is not None else held_out
        self._drawn: dict[int, np.ndarray] = {}

    def drawn(self, length: int) -> np.ndarray:
        """Returns the positions in `index` of the records of a length that are drawn from."""
        if length not in self._drawn:
            positions = self.index.of_length(length)
            self._drawn[length] = positions[~self._kept(positions)]
        return self._drawn[length]

    def unseen(self, length: int) -> np.ndarray:
        """Returns the positions in `test` of the solved records of a length that are kept."""
        positions = self.test.of_length(length)
        solved = self.test.rows["solved"][positions]
        return positions[solved if self.test is not self.index else solved & self._kept(positions)]

    def draw(self, lengths: np.ndarray, seed: int, start: int) -> np.ndarray:
        """Draws one record for each length.

        Record i depends on lengths[i], seed and start + i alone. Of a length, records that are
        drawn in a row are different ones until all were drawn.

        Args:
            lengths: (S,) the lengths; each has records.
            seed: Selects the records.
            start: Number of the first draw.

        Returns:
            (S,) positions in `index`.
        """
        unique, inverse = np.unique(lengths, return_inverse=True)
        pools = [self.drawn(length) for length in unique.tolist()]
        sizes = np.array([len(pool) for pool in pools], np.uint64)[inverse]
        order = np.arange(start, start + len(lengths), dtype=np.uint64)
        places = permuted(order, sizes, seed, lengths.astype(np.uint64)).astype(np.int64)
        drawn = np.empty(len(lengths), np.int64)
        for k, pool in enumerate(pools):
            own = inverse == k
            drawn[own] = pool[places[own]]
        return drawn

    def chosen(self, length: int, number: int, seed: int) -> np.ndarray:
        """Selects records that are kept for evaluation.

        Args:
            length: Their length.
            number: The most records.
            seed: Selects them; a larger number adds to those of a smaller one.

        Returns:
            Positions in `test`.
        """
        rng = np.random.default_rng([_UNSEEN, seed, length])
        return rng.permutation(self.unseen(length))[:number]

    @cached_property
    def duplicates(self) -> int:
        """Number of records kept for evaluation whose problem is drawn too."""
        if self.test is self.index:
            return 0
        solved = self.test.rows["digest"][self.test.rows["solved"]]
        return int(np.isin(solved, self.index.rows["digest"]).sum())

    def _kept(self, positions: np.ndarray) -> np.ndarray:
        if not self.held_out:
            return np.zeros(len(positions), bool)
        rows = self.index.rows
        share = _mixed(rows["digest"][positions]) >> np.uint64(11)
        return (share.astype(np.float64) * 2.0**-53 < self.held_out) & rows["solved"][positions]


def permuted(order: np.ndarray, sizes: np.ndarray, seed: int, stream: np.ndarray) -> np.ndarray:
    """Returns (S,) uint64 numbers below `sizes`: n orders in a row that begin at a multiple of n
    give each number below n once. A Feistel network over at most 4 n numbers is applied until the
    result is below n.

    Args:
        order, sizes: (S,) uint64.
        seed: Selects the permutations.
        stream: (S,) uint64, selects them too.
    """
    epoch, place = order // sizes, order % sizes
    key = _mixed(_mixed(np.uint64(seed & 0xFFFFFFFFFFFFFFFF) ^ _mixed(stream)) ^ epoch)
    half = np.ceil(np.log2(np.maximum(sizes, 2).astype(np.float64)) / 2).astype(np.uint64)
    mask = (np.uint64(1) << half) - np.uint64(1)
    inside, todo = place, np.ones(len(order), bool)
    while todo.any():
        left, right = inside[todo] >> half[todo], inside[todo] & mask[todo]
        for k in _KEYS:
            mixed = _mixed(right ^ (key[todo] + k)) & mask[todo]
            left, right = right, left ^ mixed
        inside[todo] = (left << half[todo]) | right
        todo = inside >= sizes
    return inside


def _mixed(z: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser, of an array."""
    z = z + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * _MIX1
    z = (z ^ (z >> np.uint64(27))) * _MIX2
    return z ^ (z >> np.uint64(31))
