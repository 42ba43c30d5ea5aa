"""Rounds fed back to a looped model as tokens: the true ones in training, its own in generation.

Each iteration sees the problem and what was written before it, each token of that under the token
of the problem that it belongs to; the task says which (`Task.fed_places`). Given the true rounds,
the iterations of a sample do not depend on each other: `PackedBatch.side_by_side` makes each a
sequence of its own, so that they train in one pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from relay_fast.ragged import offsets_of, ragged_index
from relay_fast.tasks import TASK_NAMES, FedPlaces, Samples, Task
from relay_fast.tasks.feedback import FROM_ROUND, LATEST
from relay_fast.tasks.vocabulary import PAD


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
        starts = offsets_of(widths)[:-1]
        for k in present:
            own = np.flatnonzero(samples.task == k)
            rows = ragged_index(starts[own], widths[own])
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


@dataclass(frozen=True, eq=False)
class Feeder:
    """Turns the tokens that a model writes into what it is fed next, on the device.

    source (N,) int64: the row whose token is fed at each row of a batch; since, token (N,) int64:
    see `FedPlaces`; last (N,) int64: the last row of each row's sequence.
    """

    source: Tensor
    since: Tensor
    token: Tensor
    last: Tensor

    @staticmethod
    def of(places: FedPlaces, widths: np.ndarray, device: torch.device | str) -> Feeder:
        last = np.repeat(np.cumsum(widths) - 1, widths)
        columns = (last + 1 - places.from_end, places.since, places.token, last)
        return Feeder(*(torch.from_numpy(column).to(device) for column in columns))

    def to(self, device: torch.device | str) -> Feeder:
        columns = (self.source, self.since, self.token, self.last)
        return Feeder(*(column.to(device, non_blocking=True) for column in columns))

    def start(self) -> Tensor:
        """(N,) int64: what the first iteration is fed."""
        return torch.full_like(self.token, PAD)

    def after(self, iteration: int, ids: Tensor, fed: Tensor, rows: int) -> Tensor:
        """(rows,) int64: what the next iteration is fed.

        Args:
            iteration: the number of the one that is done, from 1.
            ids: (N_t,) the tokens that it wrote; a round begins after the last `<pad>`.
            fed: (N_t,) what it was fed.
            rows: of the batch's sequences that go on.
        """
        source, since, token = self.source[:rows], self.since[:rows], self.token[:rows]
        index = torch.arange(rows, device=ids.device)
        last_pad = torch.where(ids[:rows] == PAD, index, -1).cummax(0).values[self.last[:rows]]
        written = torch.where(source > last_pad, ids[source], PAD)
        shown = torch.where(token == FROM_ROUND, written, token)
        return torch.where((since == LATEST) | (since == iteration), shown, fed[:rows])
