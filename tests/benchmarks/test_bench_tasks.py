"""Samples a second on one core, rounds included: pytest tests/benchmarks/test_bench_tasks.py."""

import numpy as np
import pytest

from relay_fast.tasks import TASK_NAMES, Vocabulary, build_tasks

TASKS = build_tasks(TASK_NAMES, Vocabulary())
LONGEST = {"arithmetic": 15, "edit_distance": 30, "lis": 100}
COUNT = 4000


def report(benchmark, capsys: pytest.CaptureFixture, what: str) -> None:
    if benchmark.stats is None:  # under xdist nothing is timed
        return
    rate = COUNT / benchmark.stats["median"]
    benchmark.extra_info["samples_per_second"] = round(rate)
    with capsys.disabled():
        print(f"\n{what}: {rate:,.0f} samples/s", end="")
    assert rate > 5000


def paper_lengths(name: str) -> np.ndarray:
    """As the paper trains: the number of samples is proportional to the length."""
    lengths = np.arange(1, LONGEST[name] + 1)
    return np.random.default_rng(0).choice(lengths, COUNT, p=lengths / lengths.sum())


@pytest.mark.benchmark(group="tasks")
@pytest.mark.parametrize("name", TASK_NAMES)
def test_sample(name: str, benchmark, capsys) -> None:
    lengths = paper_lengths(name)
    TASKS[name].sample(lengths[:1], seed=0)
    samples = benchmark.pedantic(TASKS[name].sample, (lengths, 1), rounds=15, warmup_rounds=1)
    assert len(samples) == COUNT
    report(benchmark, capsys, f"sample {name} <= {LONGEST[name]}")


@pytest.mark.benchmark(group="tasks")
@pytest.mark.parametrize("name", TASK_NAMES)
def test_sequences(name: str, benchmark, capsys) -> None:
    samples = TASKS[name].sample(paper_lengths(name), seed=1)
    _, offsets, _ = benchmark.pedantic(samples.sequences, (TASKS,), rounds=15, warmup_rounds=1)
    assert len(offsets) == COUNT + 1
    report(benchmark, capsys, f"sequences {name} <= {LONGEST[name]}")
