"""How often to loop in a training step: samplers of loop counts.

    sampler = PoissonLogNormalDepth(mean=8, max_loops=32, seed=0)
    h = block(x, sampler(step, len(x)))

A draw depends on the seed and the step only, so that a run which continues draws what it would have
drawn. Every sequence gets a count of its own; `int(sampler(step, 1)[0])` is one for the whole
batch.

| sampler | counts |
|---|---|
| `FixedDepth` | all alike |
| `UniformDepth` | uniform between two bounds |
| `PoissonLogNormalDepth` | Huginn's: 1 + Poisson(e^τ), τ normal (arXiv 2502.05171) |
| `CurriculumDepth` | any of them with a mean that grows linearly with the step |
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from relay_fast.utils.arguments import kind_of
from relay_fast.utils.numbers import as_float, as_int


class DepthSampler:
    """Base class of samplers.

    Args:
        mean: mean of the counts, at least 1.
        max_loops: the largest count, such as the size of the block's loop-index embedding: larger
            draws are cut to it; None or 0: no bound.
        seed: of the draws.

    Raises:
        ValueError: for a mean below 1, or above max_loops.
    """

    def __init__(self, mean: float, max_loops: int | None = None, seed: int = 0):
        self.mean = as_float("mean", mean, least=1)
        self.max_loops = 0 if max_loops is None else as_int("max_loops", max_loops, least=0)
        self.seed = as_int("seed", seed, least=0)
        if self.max_loops and self.mean > self.max_loops:
            raise ValueError(
                f"the mean depth {self.mean:g} is more than the {self.max_loops} iterations that "
                "the loop-index embedding holds: lower it, or build the block with a larger "
                "max_loops"
            )

    def __call__(self, step: int, sequences: int) -> np.ndarray:
        """Draws the loop counts of a step, (sequences,) int64, each 1 or more."""
        step, sequences = as_int("step", step, least=0), as_int("sequences", sequences, least=0)
        return self.bounded(np.random.default_rng((self.seed, step)), step, sequences)

    def bounded(self, rng: np.random.Generator, step: int, sequences: int) -> np.ndarray:
        """Draws counts of iterations, cut to 1..max_loops.

        Args:
            rng: The random generator.
            step: The step of the training.
            sequences: How many to draw.

        Returns:
            (sequences,) int64.
        """
        counts = self.draw(rng, step, sequences)
        return np.clip(counts, 1, self.max_loops or None).astype(np.int64)

    def draw(self, rng: np.random.Generator, step: int, sequences: int) -> np.ndarray:
        """Draws counts of iterations, which are cut to the allowed range afterwards.

        Args:
            rng: The random generator.
            step: The step of the training.
            sequences: How many to draw.

        Returns:
            (sequences,).
        """
        raise NotImplementedError


class FixedDepth(DepthSampler):
    """The same count for all sequences.

    Args:
        loops: the count.
        max_loops, seed: as in `DepthSampler`.
    """

    def __init__(self, loops: int, max_loops: int | None = None, seed: int = 0):
        super().__init__(as_int("loops", loops, least=1), max_loops, seed)

    def draw(self, rng: np.random.Generator, step: int, sequences: int) -> np.ndarray:
        return np.full(sequences, self.mean)


class UniformDepth(DepthSampler):
    """Uniform counts.

    Args:
        least: the smallest count, at least 1.
        most: the largest count.
        max_loops: as in `DepthSampler`; must not be below `most`.
        seed: of the draws.
    """

    def __init__(self, least: int, most: int, max_loops: int | None = None, seed: int = 0):
        self.least = as_int("least", least, least=1)
        self.most = as_int("most", most, least=self.least)
        super().__init__((self.least + self.most) / 2, max_loops, seed)
        if self.max_loops and self.most > self.max_loops:
            raise ValueError(
                f"most = {self.most} is more than the {self.max_loops} iterations of max_loops: "
                "lower it"
            )

    def draw(self, rng: np.random.Generator, step: int, sequences: int) -> np.ndarray:
        return rng.integers(self.least, self.most, sequences, endpoint=True)


class PoissonLogNormalDepth(DepthSampler):
    """Huginn's heavy-tailed counts: τ ~ N(log r − σ²/2, σ), then 1 + Poisson(e^τ).

    Args:
        mean: r; the mean of the counts is r + 1, as in the paper, before they are cut.
        sigma: standard deviation of τ.
        max_loops, seed: as in `DepthSampler`; without max_loops counts have no bound.
    """

    def __init__(
        self, mean: float, sigma: float = 0.5, max_loops: int | None = None, seed: int = 0
    ):
        super().__init__(mean, max_loops, seed)
        self.sigma = as_float("sigma", sigma, least=0)

    def draw(self, rng: np.random.Generator, step: int, sequences: int) -> np.ndarray:
        tau = rng.normal(math.log(self.mean) - self.sigma**2 / 2, self.sigma, sequences)
        return 1 + rng.poisson(np.exp(tau))


class CurriculumDepth(DepthSampler):
    """A sampler whose mean grows linearly from `first` to `last` in `steps` steps, then stays.

    Args:
        make: mean → sampler, such as `lambda mean: PoissonLogNormalDepth(mean, seed=1)`; default:
            every sequence gets the mean, rounded.
        first: mean at step 0.
        last: mean from step `steps` on.
        steps: length of the growth, at least 1.
        max_loops, seed: as in `DepthSampler`; they also hold for what `make` draws.
    """

    def __init__(
        self,
        first: float,
        last: float,
        steps: int,
        make: Callable[[float], DepthSampler] | None = None,
        max_loops: int | None = None,
        seed: int = 0,
    ):
        self.first, self.last = as_float("first", first, least=1), as_float("last", last, least=1)
        super().__init__(max(self.first, self.last), max_loops, seed)
        self.steps = as_int("steps", steps, least=1)
        if make is not None and not callable(make):
            raise TypeError(f"make is {kind_of(make)}: give a function of the mean, or None")
        self.make = (lambda mean: FixedDepth(round(mean))) if make is None else make
        for mean in (self.first, self.last):  # says at once what is wrong
            if not isinstance(sampler := self.make(mean), DepthSampler):
                raise TypeError(
                    f"make returned {kind_of(sampler)}: return a sampler, as in "
                    "`lambda mean: PoissonLogNormalDepth(mean)`"
                )

    def mean_at(self, step: int) -> float:
        """Returns the mean at a step."""
        return self.first + (self.last - self.first) * min(step / self.steps, 1)

    def draw(self, rng: np.random.Generator, step: int, sequences: int) -> np.ndarray:
        return self.make(self.mean_at(step)).bounded(rng, step, sequences)
