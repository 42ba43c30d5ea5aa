"""Small measurements with a bound each; exit status 1 where one is not kept.

    python benchmarks/micro.py [--quick]

One loop of the block, forward and backward, takes at most 5 % longer than the same block in eager
PyTorch (in turn, median of the ratios; on a CPU). `relay_fast.loop` around a tiny module takes at
most twice as long as the loop in Python, where all sequences loop as often and nothing is
recomputed. Every task gives 5,000 samples a second at least
on one core, rounds included, lengths drawn in proportion to length as the paper trains.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common, measuring  # noqa: E402
from benchmarks.baselines import EagerBlock  # noqa: E402
from relay_fast.config import BlockConfig  # noqa: E402
from relay_fast.engine.module_loop import loop  # noqa: E402
from relay_fast.models.looped_block import LoopedBlock  # noqa: E402
from relay_fast.tasks import TASK_NAMES, Vocabulary, build_tasks  # noqa: E402

LOOP_RATIO, TINY_RATIO, SAMPLES_PER_SECOND = 1.05, 2.0, 5000  # the bounds
TINY_LOOPS, TINY_CALLS = 8, 20  # calls of each side in one round
CONFIG, SEQUENCES, LENGTH = BlockConfig(256, 4, 3), 8, 64
COUNT = 4000  # samples drawn at once


def blocks() -> tuple[EagerBlock, LoopedBlock]:
    """The same weights in an eager block and in ours."""
    eager, ours = EagerBlock(CONFIG), LoopedBlock(config=CONFIG, recompute="none")
    ours.load_state_dict(eager.state_dict())
    return eager, ours


def one_loop_ratio(rounds: int) -> float:
    """Seconds of one loop over those of eager: the median of `rounds` ratios."""
    eager, ours = blocks()
    x = torch.randn(SEQUENCES, LENGTH, CONFIG.d_model)
    calls = (lambda: list(eager.states(x, 1))[-1], lambda: ours(x, 1))
    torch.testing.assert_close(calls[0](), calls[1](), rtol=1e-4, atol=1e-4)
    ratios = []
    for _ in range(rounds + 3):  # three to warm up
        seconds = []
        for call, model in zip(calls, (eager, ours), strict=True):
            model.zero_grad()
            seconds.append(measuring.seconds_of(lambda c=call: c().sum().backward(), "cpu"))
        ratios.append(seconds[1] / seconds[0])
    return statistics.median(ratios[3:])


def tiny_module_ratio(rounds: int) -> float:
    """Seconds of `relay_fast.loop` around a linear layer and a tanh over those of the loop in
    Python, forward and backward: of the lower quartiles, since one call is shorter than the time
    for which another process may interrupt it."""
    module, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), torch.randn(4, 8, requires_grad=True)

    def plain() -> torch.Tensor:
        h = x
        for _ in range(TINY_LOOPS):
            h = module(h)
        return h

    ours = lambda: loop(module, x, TINY_LOOPS, recompute="none")
    torch.testing.assert_close(plain(), ours(), rtol=0, atol=0)
    seconds: dict[object, list[float]] = {plain: [], ours: []}
    for i in range(TINY_CALLS * (rounds + 3)):
        for call in (plain, ours) if i % 2 else (ours, plain):
            start = time.perf_counter()
            call().sum().backward()
            seconds[call].append(time.perf_counter() - start)
    quartile = lambda call: statistics.quantiles(seconds[call][3 * TINY_CALLS :])[0]
    return quartile(ours) / quartile(plain)


def samples_per_second(task: str, rounds: int) -> float:
    lengths = np.arange(1, common.LONGEST[task] + 1)
    drawn = np.random.default_rng(0).choice(lengths, COUNT, p=lengths / lengths.sum())
    sample = build_tasks(TASK_NAMES, Vocabulary())[task].sample
    sample(drawn[:1], seed=0)  # compiles
    seconds = []
    for seed in range(rounds):
        start = time.perf_counter()
        sample(drawn, seed=seed)
        seconds.append(time.perf_counter() - start)
    return COUNT / statistics.median(seconds)


def kept(what: str, value: float, bound: float, at_most: bool) -> bool:
    """Prints a value beside its bound; whether it is kept."""
    keeps = value <= bound if at_most else value >= bound
    side = "at most" if at_most else "at least"
    print(f"{'ok  ' if keeps else 'FAIL'} {what}: {value:,.5g} ({side} {bound:,.5g})")
    return keeps


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    rounds = 5 if parser.parse_args(argv).quick else 40
    found = [kept("one loop, relay_fast / eager", one_loop_ratio(rounds), LOOP_RATIO, True)]
    found.append(
        kept("a tiny module, relay_fast.loop / Python", tiny_module_ratio(rounds), TINY_RATIO, True)
    )
    for task in TASK_NAMES:
        rate = samples_per_second(task, rounds)
        found.append(kept(f"{task}, samples/s", rate, SAMPLES_PER_SECOND, False))
    return 0 if all(found) else 1


if __name__ == "__main__":
    sys.exit(main())
