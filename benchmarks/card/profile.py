"""Where the time of a training step goes, by kernel: the prediction, and what a card measured.

    python -m benchmarks.card.profile --out benchmarks/results/PROFILE.md
    python -m benchmarks.card.profile --out PROFILE.md --measured profile.csv

The paper's mix (d = 256, 3 layers, bf16) takes one step on meta tensors: every launch is recorded
with its own configuration instead of made, and costed by `kernel_costs.py`; PyTorch's own kernels
cost the bytes that they read and write. Nothing runs, so no GPU is needed.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels have no launches to record

import torch
from torch import Tensor, nn
from triton.runtime.jit import JITFunction

from benchmarks import common, measuring
from benchmarks.card.table import INTERPRETED, markdown
from benchmarks.card.torch_ops import TorchOps
from benchmarks.kernel_costs import CARDS, FLOPS, launch_cost
from benchmarks.launches import recorded
from relay_fast.batch.capacity import Capacity, CapacityBatch
from relay_fast.batch.packed import PackedBatch
from relay_fast.kernels._runtime import DEVICE_PROPS
from relay_fast.models.transformers import LoopedTransformer
from relay_fast.utils.files import write_text

ARCH = 90
LAUNCH = 11e-6  # seconds from Python (docs: triton_without_a_gpu); a graph's node costs far less
OTHER = "PyTorch's own"


@dataclass
class Part:
    """All launches of one kernel in a step."""

    launches: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    floor: float = 0.0  # seconds, each launch at the card's ceiling
    waves: float = 0.0  # seconds, with the processors that a launch leaves idle


@dataclass
class Trace:
    """The launches of one step."""

    parts: dict[str, Part] = field(default_factory=lambda: defaultdict(Part))
    torch_ops: Counter = field(default_factory=Counter)

    def add(self, name: str, flops: float, moved: float, programs: int | None) -> None:
        part, card = self.parts[name], CARDS[ARCH]
        floor = max(flops / card.flops_16_bit, moved / card.bandwidth)
        part.launches += 1
        part.flops += flops
        part.bytes += moved
        part.floor += floor
        part.waves += floor / (1.0 if programs is None else utilisation(programs))


def short(kernel: str) -> str:
    """A kernel's name without what all of them have."""
    return kernel.strip("_").removesuffix("_kernel")


def utilisation(programs: int) -> float:
    """Share of the processors' time that programs of equal length use, one a processor at once."""
    processors = DEVICE_PROPS[ARCH].processors
    return programs / (-(-programs // processors) * processors)


class _TorchOps(TorchOps):
    """Records PyTorch's own kernels."""

    def __init__(self, trace: Trace):
        super().__init__()
        self.trace = trace

    def launched(self, name: str, given: list[Tensor], made: list[Tensor]) -> None:
        self.trace.torch_ops[name] += 1
        flops = 0.0
        if name in ("mm", "addmm", "addmm_"):
            a, b = given[-2:]
            flops = 2.0 * a.shape[0] * a.shape[1] * b.shape[1]
        moved = sum(t.numel() * t.element_size() for t in (*given, *made))
        self.trace.add(OTHER, flops, moved, None)


@contextmanager
def traced() -> Iterator[Trace]:
    """Yields a trace of what is launched inside, on meta tensors."""
    trace = Trace()

    def add(kernel: JITFunction, values, options, grid) -> None:
        cost = launch_cost(kernel.__name__, values)
        trace.add(kernel.__name__, cost.flops, cost.bytes, math.prod(grid))

    with recorded(ARCH, add), _TorchOps(trace):
        yield trace


def trace_step(samples: int) -> tuple[Trace, float, int]:
    """A step (loss and backward) over the paper's mix; its useful FLOPs and token-iterations."""
    batch, _ = common.task_batch("multitask", samples, 0, "cpu")
    useful = common.useful_flops(common.CONFIGS["relay"], batch)
    return _trace(batch.to("meta")), useful, batch.plan.token_iterations


def trace_graph(samples: int) -> tuple[Trace, int]:
    """The same step as one CUDA graph with room for other batches; its token-iterations."""
    drawn = [common.task_batch("multitask", samples, seed, "cpu")[0] for seed in range(3)]
    capacity = Capacity.of(drawn, 0.05)
    return _trace(CapacityBatch(capacity, "meta").batch), capacity.token_iterations


def _trace(batch: PackedBatch) -> Trace:
    model = LoopedTransformer(common.CONFIGS["relay"], impl="triton")
    for module in model.modules():
        if isinstance(module, nn.Linear):  # as autocast casts them, once a step
            module.to(torch.bfloat16)
    model = model.to("meta")
    with traced() as trace:
        model.loss(batch).loss.backward()
    return trace


def section(samples: int, measured: dict[str, tuple[int, float]]) -> str:
    """The table of one batch size, with what is next."""
    trace, useful, token_iterations = trace_step(samples)
    graph, room = trace_graph(samples)
    nodes = sum(part.launches for part in graph.parts.values())
    parts = sorted(trace.parts.items(), key=lambda item: -item[1].waves)
    total = Part()
    for _, part in parts:
        for name in vars(total):
            setattr(total, name, getattr(total, name) + getattr(part, name))
    ms = lambda seconds: f"{1e3 * seconds:.3g}"

    def line(name: str, part: Part) -> tuple:
        calls, seconds = measured.get(name, (0, 0.0))
        return (
            name, part.launches, f"{part.flops / 1e9:.4g}", f"{part.bytes / 1e9:.3g}",
            ms(part.floor), ms(part.waves), f"{part.waves / total.waves:.0%}",
            ms(seconds) if seconds else "–", calls or "–",
            f"{part.floor / seconds:.0%}" if seconds else "–",
        )  # fmt: skip

    if measured:
        everything = sum(seconds for _, seconds in measured.values())
        measured = measured | {"all": (sum(calls for calls, _ in measured.values()), everything)}
    columns = ("kernel", "launches", "GFLOP", "GB", "floor, ms", "with idle processors, ms",
               "share", "measured, ms", "calls", "floor / measured")  # fmt: skip
    lines = [line(short(name), part) for name, part in parts]
    lines.append(line("all", total))
    peak = CARDS[ARCH].flops_16_bit
    common_ops = ", ".join(f"{name} {n}" for name, n in trace.torch_ops.most_common(6))
    return (
        f"## {samples:,} samples a step ({token_iterations:,} token-iterations)\n\n"
        f"{markdown(columns, lines)}\n"
        f"Predicted: {total.launches:,} launches a step, of which "
        f"{trace.parts[OTHER].launches:,} are PyTorch's own ({common_ops}); launched one by one "
        f"from Python they alone take {1e3 * LAUNCH * total.launches:.3g} ms at "
        f"{1e6 * LAUNCH:.0f} µs each. As one graph with room for {room:,} token-iterations it is "
        f"{nodes:,} nodes, {graph.parts[OTHER].launches:,} of them PyTorch's own. "
        f"Floor {ms(total.floor)} ms, with idle processors {ms(total.waves)} ms: "
        f"{4 / 3 * useful / peak / total.waves:.0%} of the matmul peak, recomputation counted "
        f"({useful / 1e12:.3g} TFLOP useful, {total.flops / 1e12:.3g} TFLOP launched).\n\n"
        + next_steps(parts, total)
    )


def next_steps(parts: list[tuple[str, Part]], total: Part) -> str:
    """What the prediction says to look at first."""
    ms = lambda seconds: f"{1e3 * seconds:.3g} ms"
    name, largest = parts[0]
    idle = max(parts, key=lambda item: item[1].waves - item[1].floor)
    memory = sum(
        p.floor
        for _, p in parts
        if p.bytes / CARDS[ARCH].bandwidth >= p.flops / CARDS[ARCH].flops_16_bit
    )
    return (
        "Next, by this prediction: "
        f"{short(name)} is the largest ({ms(largest.waves)}); "
        f"{short(idle[0])} loses most to idle processors "
        f"({ms(idle[1].waves - idle[1].floor)} of {ms(total.waves - total.floor)}); "
        f"{memory / total.floor:.0%} of the floor is memory's, so fewer bytes help there and "
        f"faster arithmetic does not.\n"
    )


def read_measured(path: Path | None) -> tuple[dict[int, dict[str, tuple[int, float]]], bool]:
    """Calls and seconds by batch size and kernel; and whether they are interpreted."""
    found: dict[int, dict[str, tuple[int, float]]] = defaultdict(dict)
    interpreted = False
    if path is not None and path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                interpreted |= row["mode"] == "interpreted"
                if row["status"] == "ok":
                    value = (int(row["calls"]), float(row["seconds"]))
                    found[int(row["samples"])][row["kernel"]] = value
    return found, interpreted


def page(sizes: list[int], measured_csv: Path | None) -> str:
    measured, interpreted = read_measured(measured_csv)
    card = CARDS[ARCH]
    head = (
        "# A training step by kernel: the paper's mix, d = 256, 3 layers, bf16, policy `state`\n\n"
        + (INTERPRETED if interpreted else "")
        + "Made by `python -m benchmarks.card.profile`. **Everything but the measured columns is a "
        f"prediction**: {card.name}, {card.flops_16_bit / 1e12:.0f} TFLOP/s and "
        f"{card.bandwidth / 1e12:.1f} TB/s, every launch recorded with its own "
        "configuration, FLOPs and bytes by `benchmarks/kernel_costs.py`. *Floor*: each launch at "
        "the ceiling that binds it, nothing read twice. *With idle processors*: the same over the "
        f"share of the {DEVICE_PROPS[ARCH].processors} processors that the launch's programs keep "
        "busy, one program a processor. Without the optimiser.\n"
    )
    return head + "".join("\n" + section(n, measured.get(n, {})) for n in sizes)


def write(path: Path, sizes: list[int], measured_csv: Path | None = None) -> None:
    write_text(path, page(sizes, measured_csv))


def measured_rows(step: Callable[[], object], samples: int, device: str) -> list[dict]:
    """Calls and seconds of every kernel in one step, from PyTorch's profiler."""
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU, activity.CUDA] if device == "cuda" else [activity.CPU]
    step()
    profile = torch.profiler.profile(activities=activities)
    with measuring.quiet():
        profile.start()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    with measuring.quiet():
        profile.stop()
    calls, seconds = Counter(), Counter()
    kind = torch.autograd.DeviceType.CUDA if device == "cuda" else torch.autograd.DeviceType.CPU
    for event in profile.key_averages():
        own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        if own <= 0 or event.device_type != kind:  # an op's own kernels are listed apart
            continue
        name = short(event.key) if event.key in FLOPS else OTHER
        calls[name] += event.count
        seconds[name] += own / 1e6
    return [
        {"samples": samples, "kernel": name, "calls": calls[name], "seconds": f"{s:.5g}"}
        for name, s in seconds.most_common()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=common.RESULTS / "PROFILE.md")
    parser.add_argument("--measured", type=Path, help="profile.csv of a session on a card")
    parser.add_argument("--samples", type=int, nargs="+", default=[512, 4096])
    options = parser.parse_args()
    write(options.out, options.samples, options.measured)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
