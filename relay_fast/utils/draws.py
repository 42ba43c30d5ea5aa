"""Random draws that do not depend on how much of a batch is computed, or in how many parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def generator_of(device: torch.device) -> torch.Generator:
    """Returns the default generator of a device."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


@contextmanager
def one_draw(device: torch.device) -> Iterator[None]:
    """Lets a body draw any number of random numbers on a device while generators advance by one
    draw, on the CPU."""
    generator = generator_of(device)
    seed = torch.randint(2**62, (), dtype=torch.int64, device="cpu").item()
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


class Rewind:
    """Gives every part of a batch the random numbers that the first one drew.

    After the last part the generator stands where one part left it.

    Args:
        device: whose default generator is used.
    """

    def __init__(self, device: torch.device):
        self._generator = generator_of(device)
        self._state = self._generator.get_state()

    def __call__(self) -> None:
        self._generator.set_state(self._state)
