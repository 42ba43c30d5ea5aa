"""Samplers of loop counts: their distributions, seeds and bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from relay_fast.models.looped_block import LoopedBlock
from relay_fast.training.depth import (
    CurriculumDepth,
    DepthSampler,
    FixedDepth,
    PoissonLogNormalDepth,
    UniformDepth,
)

MANY = 40_000
SAMPLERS = [
    FixedDepth(3),
    UniformDepth(2, 5),
    PoissonLogNormalDepth(8),
    CurriculumDepth(1, 9, 10, lambda mean: PoissonLogNormalDepth(mean)),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_a_draw_depends_on_seed_and_step_only(sampler: DepthSampler) -> None:
    counts = sampler(7, 50)
    assert counts.dtype == np.int64 and counts.shape == (50,) and counts.min() >= 1
    sampler(3, 9)
    assert np.array_equal(sampler(7, 50), counts)
    if not isinstance(sampler, FixedDepth):
        assert not np.array_equal(sampler(8, 50), counts)
        other = type(sampler).__new__(type(sampler))
        vars(other).update(vars(sampler), seed=1)
        assert not np.array_equal(other(7, 50), counts)


def test_uniform_and_fixed() -> None:
    counts = np.bincount(UniformDepth(2, 5)(0, MANY), minlength=7)
    assert not counts[[0, 1, 6]].any()
    assert np.abs(counts[2:6] / MANY - 0.25).max() < 5 * (0.1875 / MANY) ** 0.5
    assert set(FixedDepth(3)(0, 9)) == {3}


def test_poisson_log_normal_has_huginns_moments() -> None:
    mean, sigma = 8.0, 0.5
    counts = PoissonLogNormalDepth(mean, sigma)(0, MANY)
    # Mean of the Poisson rates r, their variance r²(e^σ² − 1), and the Poisson's own r.
    variance = mean + mean**2 * (np.exp(sigma**2) - 1)
    assert abs(counts.mean() - (mean + 1)) < 5 * (variance / MANY) ** 0.5
    assert abs(counts.var() / variance - 1) < 0.1
    assert counts.min() >= 1 and counts.max() > 30  # the tail is heavy
    cut = PoissonLogNormalDepth(mean, sigma, max_loops=12)(0, MANY)
    assert np.array_equal(cut, counts.clip(max=12))


def test_curriculum() -> None:
    sampler = CurriculumDepth(2, 10, 4, max_loops=10)
    assert [int(sampler(step, 1)[0]) for step in (0, 1, 2, 3, 4, 99)] == [2, 4, 6, 8, 10, 10]
    down = CurriculumDepth(5, 1, 4)
    assert [int(down(step, 1)[0]) for step in (0, 4)] == [5, 1]
    grown = CurriculumDepth(2, 10, 4, lambda mean: PoissonLogNormalDepth(mean))
    assert abs(grown(2, MANY).mean() - 7) < 0.15
    cut = CurriculumDepth(2, 10, 4, lambda mean: PoissonLogNormalDepth(mean, max_loops=12))
    assert cut(4, MANY).max() == 12


def test_counts_go_into_a_block() -> None:
    block, x = LoopedBlock(8, 2, 1, max_loops=6), torch.randn(5, 3, 8)
    loops = PoissonLogNormalDepth(4, max_loops=6, seed=2)(0, 5)
    assert block(x, loops, return_loops=True)[1].tolist() == loops.tolist()


def test_what_is_refused() -> None:
    bound = "is more than the 4 iterations that the loop-index embedding holds"
    cases = [
        (lambda: PoissonLogNormalDepth(5, max_loops=4), f"the mean depth 5 {bound}"),
        (lambda: FixedDepth(5, 4), f"the mean depth 5 {bound}"),
        (lambda: UniformDepth(4, 6, 4), f"the mean depth 5 {bound}"),
        (lambda: UniformDepth(1, 5, 4), "most = 5 is more than the 4 iterations of max_loops"),
        (lambda: CurriculumDepth(1, 5, 10, max_loops=4), f"the mean depth 5 {bound}"),
        (lambda: PoissonLogNormalDepth(0.5), "mean = 0.5: it must be at least 1"),
        (lambda: PoissonLogNormalDepth(float("inf")), "mean = inf: it must be finite"),
        (lambda: PoissonLogNormalDepth(5, -1), "sigma = -1"),
        (lambda: UniformDepth(3, 2), "most = 2: it must be at least 3"),
        (lambda: UniformDepth(0, 2), "least = 0: it must be at least 1"),
        (lambda: FixedDepth(2.5), "loops = 2.5: it must be a whole number"),
        (lambda: CurriculumDepth(1, 2, 0), "steps = 0"),
        (lambda: FixedDepth(2)(-1, 3), "step = -1"),
        (lambda: FixedDepth(0), "loops = 0: it must be at least 1"),
        (lambda: CurriculumDepth(1, "5", 10), "last = '5': it must be a number"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    for make, kind in ((round, "an object of type int"), (lambda mean: None, "None")):
        with pytest.raises(TypeError, match=f"make returned {kind}: return a sampler"):
            CurriculumDepth(1, 5, 10, make=make)
