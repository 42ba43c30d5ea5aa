"""The list of states that a loop returns, with the sequences that each of them holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from relay_fast.batch.paddings import device_tensor


class States(list):
    """A list of states, one for each iteration that was asked for.

    Sequences that have finished are no longer in a state: `sequences` says which are.
    """

    _held: Sequence[np.ndarray] = ()
    _device: torch.device | str = "cpu"

    @classmethod
    def of(cls, states: Sequence, held: Sequence[np.ndarray], device: torch.device) -> States:
        """Makes the list.

        Args:
            states: the states.
            held: caller's indices of the sequences in each state, ascending.
            device: where `sequences` are.
        """
        made = cls(states)
        made._held, made._device = held, device
        return made

    def map(self, function: Callable[[Tensor, np.ndarray], object]) -> States:
        """Returns the list of function(state, indices of its sequences)."""
        mapped = [function(*pair) for pair in zip(self, self._held, strict=True)]
        return States.of(mapped, self._held, self._device)

    def first(self, count: int) -> States:
        """Returns the first `count` states."""
        return States.of(self[:count], self._held[:count], self._device)

    @property
    def sequences(self) -> list[Tensor]:
        """For each state, (sequences,) int64: the indices of its sequences in the batch."""
        return [device_tensor(held, torch.int64, self._device) for held in self._held]


# Otherwise a subclass of list counts as a leaf, and wrappers would not find its tensors.
register_pytree_node(
    States,
    lambda states: (list(states), (states._held, states._device)),
    lambda values, context: States.of(values, *context),
)
