"""Schedules: how many steps, the learning rate's scale, and the lengths of a curriculum."""

import math

import numpy as np
import pytest

from relay_fast.data.streams import curriculum_length
from relay_fast.training.schedule import Schedule


def test_steps_count_alike() -> None:
    schedule = Schedule.by_steps(4)
    assert schedule.steps == 4 and schedule.progress.tolist() == [0, 0.25, 0.5, 0.75]
    assert Schedule.by_steps(0).steps == 0


def test_work_counts_by_cost() -> None:
    even = Schedule.by_work(10.0, lambda progress: 2.0)
    assert even.progress.tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    growing = Schedule.by_work(100.0, lambda progress: 1 + 9 * progress)
    p = growing.progress
    assert p[0] == 0 and p[-1] < 1 and np.all(np.diff(p) > 0)
    assert np.diff(p).tolist() == pytest.approx(((1 + 9 * p[:-1]) / 100).tolist())
    assert np.sum(p < 0.5) > np.sum(p >= 0.5)  # cheap steps, more of them for the same work
    assert p[-1] + (1 + 9 * p[-1]) / 100 >= 1


@pytest.mark.parametrize(
    "decay, half, last",
    [
        ("linear", 0.5, 0.01),
        ("cosine", 0.5, 0.5 * (1 + math.cos(0.99 * math.pi))),
        ("wsd", 1.0, 0.025),
        ("constant", 1.0, 1.0),
    ],
)
def test_learning_rate_factor(decay, half, last) -> None:
    schedule = Schedule.by_steps(100, warmup=0.1, decay=decay)
    factors = [schedule.lr_scale(i) for i in range(100)]
    assert factors[0] == pytest.approx(0.1)  # never zero, 1/steps further each step
    assert factors[:10] == sorted(factors[:10])
    assert factors[50] == pytest.approx(half) and factors[99] == pytest.approx(last)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0 < min(factors) and max(factors) <= 1
    assert Schedule.by_steps(100, warmup=0.0, decay=decay).lr_scale(0) == 1.0


def test_a_schedule_knows_its_decays() -> None:
    with pytest.raises(ValueError, match="decay = 'cosin' is unknown: use one of linear, cosine"):
        Schedule.by_steps(10, decay="cosin")


def test_wsd_decay_begins_at_three_fifths() -> None:
    schedule = Schedule.by_steps(10, warmup=0.0, decay="wsd")
    factors = [schedule.lr_scale(i) for i in range(10)]
    assert factors == pytest.approx([1] * 7 + [0.75, 0.5, 0.25])


def test_curriculum_length() -> None:
    grown = [curriculum_length(p, 1, 10, 0.5) for p in np.linspace(0, 1, 21)]
    assert grown == sorted(grown) and grown[0] == 2 and set(grown[10:]) == {10}
    assert set(grown) == set(range(2, 11))
    assert curriculum_length(0.0, 1, 10, 0.0) == 10
    assert curriculum_length(0.0, 4, 4, 0.5) == 4  # no range to grow in
