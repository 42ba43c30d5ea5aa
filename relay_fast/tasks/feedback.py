"""What a looped model is fed of the rounds so far, and under which tokens of its input."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from relay_fast.tasks.vocabulary import PAD
from relay_fast.utils.ragged import concat_ranges, lengths_to_offsets

LATEST, FROM_ROUND = 0, -1  # of `FedPlaces.since`, of `FedPlaces.token`


class FedPlaces(NamedTuple):
    """What each token of inputs laid end to end is fed, N tokens in all.

    Rounds are right-aligned, so a token of a round is named by its distance from the round's end.

    from_end (N,) int64: which token of the round is fed, 1 for its last one; `<pad>` where the
        round has fewer.
    since (N,) int64: the number of the round, from 1, that is fed after it was written and from
        then on; LATEST: the last one that was written.
    token (N,) int64: a token that is fed in its place; FROM_ROUND: none.

    Before the first round, everything is fed `<pad>`.
    """

    from_end: np.ndarray
    since: np.ndarray
    token: np.ndarray

    @staticmethod
    def last_round(widths: np.ndarray) -> FedPlaces:
        """The last round, right-aligned as its targets are, in inputs of `widths` tokens."""
        from_end = np.repeat(np.cumsum(widths), widths) - np.arange(int(widths.sum()))
        return FedPlaces(
            from_end, np.full_like(from_end, LATEST), np.full_like(from_end, FROM_ROUND)
        )

    @staticmethod
    def nothing(widths: np.ndarray) -> FedPlaces:
        """`<pad>` everywhere, in inputs of `widths` tokens."""
        places = FedPlaces.last_round(widths)
        places.token.fill(PAD)
        return places


def body_rows(
    widths: np.ndarray, sizes: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The first `counts` tokens after the task token of problems of `sizes` tokens, right-aligned
    in inputs of `widths` tokens: their rows in the inputs laid end to end, and their numbers from
    0."""
    starts = lengths_to_offsets(widths)[1:] - sizes + 1
    return concat_ranges(starts, counts), concat_ranges(np.zeros_like(counts), counts)
