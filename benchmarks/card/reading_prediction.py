"""What reading a batch of chains should take on a card: op by op and as one CUDA graph.

    python -m benchmarks.card.reading_prediction --out benchmarks/results/READING_PREDICTION.md

Launches are traced as in `benchmarks.card.step_prediction`, nothing runs. Work is that of the live
rows; the graph takes its nodes and PyTorch's ops over all rows of its capacity on top, and what
programs of dead rows take to leave. What the host does before and after is measured here, on one
core, in time of the process.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels have no launches to record

import numpy as np
import torch

from benchmarks import common
from benchmarks.card.readings import DTYPES, SIZES, drawn, lowered
from benchmarks.card.step_prediction import (
    ARCH,
    LAUNCH,
    NODE,
    Group,
    Step,
    predicted,
)
from benchmarks.card.table import markdown
from benchmarks.chain_generation import TASKS
from benchmarks.kernel_costs import CARDS, Card
from relay_fast.batch.packed import PackedBatch
from relay_fast.data.feedback import collate_next
from relay_fast.decoding.chain_reader import batch_reason
from relay_fast.decoding.static_reading import Loaded, StaticReading, capacity_of, prepare
from relay_fast.models.transformers import LoopedTransformer
from relay_fast.tasks import Samples, Written
from relay_fast.utils.files import write_text

# Assumed: seconds (floor, expected) that the host waits for a read-back, and that a whole launch of
# dead programs takes to leave.
SYNC = (10e-6, 30e-6)
DEAD = (0.0, 2e-6)
TORCH = "PyTorch's own"
# The H100 differs in memory: its data sheet's bandwidth, and the share of it that the H200 reaches.
H100 = replace(CARDS[ARCH], name="H100", bandwidth=3.35e12 * 4.3 / 4.8)
CARDS_MEANT = ((CARDS[ARCH], SIZES), (H100, SIZES[1:2]))

Range = tuple[float, float]


@dataclass
class Reading:
    """A batch as it is read one way: launches or nodes, and (floor, expected) seconds."""

    launches: int
    card: Range
    host: float

    def chains(self, problems: int) -> tuple[float, float]:
        """Chains a second, at the expected time and at the floor."""
        return tuple(problems / (seconds + self.host) for seconds in reversed(self.card))

    def stream(self, problems: int) -> tuple[float, float]:
        """The same of a stream of batches, of which the next is started before one is waited for:
        the card and the host work at the same time."""
        return tuple(problems / max(seconds, self.host) for seconds in reversed(self.card))


def model_of(feedback: str, dtype: torch.dtype) -> LoopedTransformer:
    config = replace(common.CONFIGS["relay"], feedback=feedback)
    return lowered(LoopedTransformer(config, impl="triton").eval(), dtype).to("meta")


@torch.no_grad()
def traced(runs: Sequence[Callable[[], object]], dtype: torch.dtype) -> tuple[Step, list[Step]]:
    """Returns all launches of some calls, and those of each, as one kind."""
    card, each = CARDS[ARCH], []
    peak = card.flops_fp32 if dtype == torch.float32 else card.flops_16_bit
    with predicted(peak) as (step, _):
        for run in runs:
            before = step.whole
            run()
            after = step.whole
            each.append(
                Step(
                    {
                        "all": Group(
                            after.nodes - before.nodes,
                            after.floor - before.floor,
                            after.expected - before.expected,
                        )
                    }
                )
            )
    return step, each


def as_graph(model: LoopedTransformer, loaded: Loaded, dtype: torch.dtype) -> tuple[int, Step]:
    capacity = capacity_of(loaded, model.config)
    reading = StaticReading(model, capacity, loaded.moves, scored=False)
    return len(capacity.rows), traced([reading.run], dtype)[0]


def graph_seconds(live: Group, static: Step) -> Range:
    """Args: work of the kernels on the live rows; nodes and PyTorch's ops of the graph."""
    own, nodes = static.groups[TORCH], static.whole.nodes
    kernels = nodes - own.nodes
    floor = live.floor + own.floor + nodes * NODE[0] + kernels * DEAD[0]
    return floor, live.expected + own.expected + nodes * NODE[1] + kernels * DEAD[1]


def kernels_of(step: Step) -> Group:
    return sum((g for name, g in step.groups.items() if name != TORCH), Group())


def host_seconds(work: Callable[[], object]) -> float:
    work()
    began = time.process_time()
    work()
    return time.process_time() - began


def graph_host(config, problems: Samples) -> float:
    """Seconds on the host beside a replay: the batch is made, and the chains are read out."""
    loaded = prepare(config, problems, TASKS)
    model = LoopedTransformer(replace(config, block=replace(config.block, d_model=16, n_heads=1)))
    reading = StaticReading(model, capacity_of(loaded, config), loaded.moves, scored=False)
    reading.load(loaded)
    ids = np.random.default_rng(0).integers(0, 50, reading._views[0].shape)
    reading._views[0].copy_(torch.from_numpy(ids))
    if loaded.moves:
        widths = torch.from_numpy(loaded.batch.plan.lengths)
        reading._views[-1][:, : len(widths)].copy_(widths)

    def all_of_it() -> None:
        reading.load(prepare(config, problems, TASKS))
        reading.result(reading.fetch(), problems, TASKS)

    return host_seconds(all_of_it)


def inputs_of(problems: Samples) -> list[PackedBatch]:
    """What a model that is fed its rounds reads, iteration by iteration, if it is right."""
    written = Written.truth(problems)
    owners = [np.flatnonzero(problems.loops > t) for t in range(int(problems.loops.max()))]
    return [
        collate_next(written, TASKS, owner, np.full(len(owner), t))
        for t, owner in enumerate(owners)
    ]


def compare(feedback: str, dtype: torch.dtype, number: int) -> tuple[int, Reading, Reading]:
    """Returns the graph's iterations, and both readings of a batch of so many problems."""
    problems, model = drawn(number), model_of(feedback, dtype)
    loaded = prepare(model.config, problems, TASKS)
    fed = feedback != "none"
    batches = inputs_of(problems) if fed else [loaded.batch]
    runs = [partial(model.predict_rounds, batch.to("meta")) for batch in batches]
    step, each = traced(runs, dtype)
    eager = tuple(sum(one.eager[i] + SYNC[i] for one in each) for i in (0, 1))
    loops, static = as_graph(model, loaded, dtype)
    host = graph_host(model.config, problems)
    made = host_seconds(lambda: inputs_of(problems)) if fed else 0.0
    return (
        loops,
        Reading(step.whole.nodes, eager, host + made),
        Reading(static.whole.nodes, graph_seconds(kernels_of(step), static), host),
    )


def taken(feedback: str, dtype: torch.dtype, number: int) -> str:
    """How a reader would read the batch."""
    reason = batch_reason(model_of(feedback, dtype), drawn(number))
    return "graph" if reason is None else "op by op"


def rows_of(card: Card, sizes: Sequence[int]) -> list[tuple[str, ...]]:
    ms = lambda pair: " to ".join(f"{1e3 * seconds:.3g}" for seconds in pair)
    rate = lambda pair: " to ".join(f"{value:,.0f}" for value in pair)
    rows = []
    with mock.patch.dict(CARDS, {ARCH: card}):
        for feedback in ("none", "tokens"):
            for name, dtype in DTYPES.items():
                for number in sizes:
                    loops, eager, graph = compare(feedback, dtype, number)
                    print(card.name, feedback, name, number, flush=True)
                    rows.append(
                        (
                            "fed" if feedback == "tokens" else "latent", name, f"{number:,}",
                            f"{eager.launches:,}", f"{graph.launches:,}",
                            f"{graph.launches / loops:.0f}", ms(eager.card), ms(graph.card),
                            f"{1e3 * eager.host:.3g}", f"{1e3 * graph.host:.3g}",
                            rate(eager.chains(number)), rate(graph.chains(number)),
                            rate(graph.stream(number)),
                            taken(feedback, dtype, number),
                        )
                    )  # fmt: skip
    return rows


def page(sections: dict[str, list[tuple[str, ...]]]) -> str:
    """Formats the prediction as Markdown."""
    columns = (
        "model", "GEMMs", "problems", "launches", "nodes", "nodes an iteration", "op by op, ms",
        "graph, ms", "host, op by op, ms", "host, graph, ms", "chains/s, op by op",
        "chains/s, graph", "chains/s, stream of graphs", "taken",
    )  # fmt: skip
    tables = "".join(f"## {name}\n\n{markdown(columns, rows)}\n" for name, rows in sections.items())
    block = common.CONFIGS["relay"].block
    return (
        "# Reading a batch of chains, op by op and as one CUDA graph\n\n"
        "**Predictions, none measured on a card.** Made by `python -m "
        f"benchmarks.card.reading_prediction`. d {block.d_model}, {block.n_layers} layers, the "
        'paper\'s mix of tasks and lengths, no scores; *fed*: `feedback="tokens"` without the '
        "state. Milliseconds of the card from floor to expected.\n\n"
        f"{tables}"
        "Op by op: the work or its launches, what takes longer, at "
        f"{1e6 * LAUNCH[0]:.0f} to {1e6 * LAUNCH[1]:.0f} µs each, and {1e6 * SYNC[0]:.0f} to "
        f"{1e6 * SYNC[1]:.0f} µs for each read-back, of which a fed model takes one an iteration. "
        f"Graph: the work on the live rows, {1e6 * NODE[0]:.1f} to {1e6 * NODE[1]:.1f} µs a node, "
        f"and up to {1e6 * DEAD[1]:.0f} µs a kernel for programs of dead rows. Host: one core of "
        f"{common.machine('cpu')['machine']}: the batch is made, the chains are read out, and op "
        "by op what a fed model gets is laid between the iterations. The card idles meanwhile, but "
        "not in a stream of graphs: the next is started before one is waited for. fp32: the card's "
        "fp32 peak, without tensor cores. Taken: what `relay_fast.decoding.chain_reader` does with "
        "such a batch, by the work of its launches.\n"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="file of the page; default: the terminal")
    options = parser.parse_args(argv)
    text = page({card.name: rows_of(card, sizes) for card, sizes in CARDS_MEANT})
    if options.out:
        write_text(options.out, text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
