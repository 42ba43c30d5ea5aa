"""Rounds fed back to a looped model as tokens: the true ones in training, its own in generation.

Each iteration sees the problem and what was written before it, each token of that under the token
of the problem that it belongs to; the task says which (`Task.fed_places`). Given the true rounds,
the iterations of a sample do not depend on each other: `PackedBatch.side_by_side` makes each a
sequence of its own, so that they train in one pass.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from relay_fast.batch.feeder import Feeder
from relay_fast.tasks import TASK_NAMES, FedPlaces, Samples, Task
from relay_fast.tasks.feedback import FROM_ROUND, LATEST
from relay_fast.tasks.vocabulary import PAD
from relay_fast.utils.ragged import concat_ranges, lengths_to_offsets


def places_of(samples: Samples, tasks: Mapping[str, Task], widths: np.ndarray) -> FedPlaces:
    """The places of a batch's inputs, each sample's by its own task.

    Raises ValueError for a task that does not say, and for one that feeds a round's token from
    outside of the input.
    """
    present = np.unique(samples.task).tolist()
    if len(present) == 1:
        places = tasks[TASK_NAMES[present[0]]].fed_places(samples, widths)
    else:
        places = FedPlaces.nothing(widths)
        starts = lengths_to_offsets(widths)[:-1]
        for k in present:
            own = np.flatnonzero(samples.task == k)
            rows = concat_ranges(starts[own], widths[own])
            part = tasks[TASK_NAMES[k]].fed_places(samples.take(own), widths[own])
            for whole, values in zip(places, part, strict=True):
                whole[rows] = values
    width = np.repeat(widths, widths)
    outside = (places.token == FROM_ROUND) & ((places.from_end > width) | (places.from_end < 1))
    if np.any(outside):
        row = int(np.argmax(outside))
        name = TASK_NAMES[samples.task[np.searchsorted(np.cumsum(widths), row, side="right")]]
        raise ValueError(
            f"task {name!r} feeds the token {places.from_end[row]} from the end of a round into an "
            f"input of {width[row]} tokens, where no round is as long: raise its min_input_tokens"
        )
    return places


def true_tokens(
    samples: Samples,
    owner: np.ndarray,
    before: np.ndarray,
    widths: np.ndarray,
    places: FedPlaces,
) -> np.ndarray:
    """(N,) int64: what the iterations of samples are fed, given their true rounds.

    Args:
        samples: whose rounds are fed.
        owner: (S',) the sample that each input is of.
        before: (S',) the rounds that were written before its iteration.
        widths: (S',) the tokens of each input.
        places: what is fed, for the N tokens of all inputs.
    """
    before, first = np.repeat(before, widths), np.repeat(samples.first_round[owner], widths)
    which = np.where(places.since == LATEST, before, places.since)
    written = (which >= 1) & (which <= before)
    index = np.where(written, first + which - 1, 0)
    of_round = written & (places.token == FROM_ROUND)
    of_round &= places.from_end <= np.diff(samples.round_offsets)[index]
    fed = np.where(written & (places.token != FROM_ROUND), places.token, PAD)
    ends = samples.round_offsets[index[of_round] + 1]
    fed[of_round] = samples.rounds[ends - places.from_end[of_round]]
    return fed


def feeder_of(places: FedPlaces, widths: np.ndarray, device: torch.device | str) -> Feeder:
    """What turns a model's tokens into what it is fed, for inputs of `widths` tokens."""
    last = np.repeat(np.cumsum(widths) - 1, widths)
    columns = (last + 1 - places.from_end, places.since, places.token, last)
    return Feeder(*(torch.from_numpy(column).to(device) for column in columns), pad=PAD)
