"""Samples and sequences of every task; timed by pytest tests/ --benchmark-only."""

import numpy as np
import pytest

from relay_fast.tasks import TASK_NAMES, Vocabulary, build_tasks

TASKS = build_tasks(TASK_NAMES, Vocabulary())
LONGEST = {"arithmetic": 15, "edit_distance": 30, "lis": 100}
COUNT = 4000


def paper_lengths(name: str) -> np.ndarray:
    """As the paper trains: the number of samples is proportional to the length."""
    lengths = np.arange(1, LONGEST[name] + 1)
    return np.random.default_rng(0).choice(lengths, COUNT, p=lengths / lengths.sum())


@pytest.mark.benchmark(group="tasks")
@pytest.mark.parametrize("name", TASK_NAMES)
def test_sample(name: str, benchmark) -> None:
    lengths = paper_lengths(name)
    TASKS[name].sample(lengths[:1], seed=0)
    samples = benchmark.pedantic(TASKS[name].sample, (lengths, 1), rounds=15, warmup_rounds=1)
    assert len(samples) == COUNT
    assert samples.length.tolist() == lengths.tolist()


@pytest.mark.benchmark(group="tasks")
@pytest.mark.parametrize("name", TASK_NAMES)
def test_sequences(name: str, benchmark) -> None:
    samples = TASKS[name].sample(paper_lengths(name), seed=1)
    tokens, offsets, prompts = benchmark.pedantic(
        samples.sequences, (TASKS,), rounds=15, warmup_rounds=1
    )
    assert len(offsets) == COUNT + 1
    assert offsets[0] == 0 and offsets[-1] == len(tokens) and len(prompts) == COUNT
    assert np.all((prompts > 0) & (prompts < np.diff(offsets)))
