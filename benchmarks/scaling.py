"""What more than one device costs: messages, imbalance of the ranks, a run, and a prediction.

    python benchmarks/scaling.py [--no-timing] [--quick]

Counted and measured on this machine's CPU; what GPUs would take is predicted, never measured. The
rows go to scaling.csv, all together as a page to SCALING.md beside it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels have no launches to record
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks import common  # noqa: E402
from benchmarks.card.predict import HOST, NODE, made_per_second  # noqa: E402
from benchmarks.card.profile import ARCH, LAUNCH, traced  # noqa: E402
from benchmarks.card.table import markdown  # noqa: E402
from benchmarks.kernel_costs import CARDS  # noqa: E402
from relay_fast.batch.packed import PackedBatch  # noqa: E402
from relay_fast.batch.shares import deal, share_of  # noqa: E402
from relay_fast.data.collate import input_widths  # noqa: E402
from relay_fast.data.streams import BatchFormat, TruthStream  # noqa: E402
from relay_fast.relay.context import Context  # noqa: E402
from relay_fast.relay.presets import load_preset, recipe  # noqa: E402
from relay_fast.training.cuda_graph import PART_TOKENS, take_step  # noqa: E402
from relay_fast.training.exchange import Exchange  # noqa: E402
from relay_fast.training.optim import make_optimizer  # noqa: E402
from relay_fast.training.ranks import Ranks, joined_ranks  # noqa: E402
from relay_fast.training.schedule import Schedule  # noqa: E402
from relay_fast.utils.cores import usable_cores  # noqa: E402
from relay_fast.utils.files import write_text  # noqa: E402

PRESETS = ("cpu-arithmetic", "paper")
STAGES = {"looped_aligned": "looped", "ar_baseline": "autoregressive"}
RANKS, SAMPLES, BATCHES = 8, 512, 1000  # of the imbalance
COLLECTIVES = (
    "all_reduce", "broadcast", "all_gather", "broadcast_object_list", "all_gather_object",
)  # fmt: skip
STEPS, WARM_UP = 6, 2  # of a timed run; those before them are not counted
TIMED_SAMPLES = {"cpu-arithmetic": None, "paper": 24}  # a step; None for the preset's own

# Assumed in the prediction.
NODE_GPUS = 8


class Link(NamedTuple):
    """What connects GPUs: bytes a second that each sends, while it receives as many, and the
    seconds until a message of the ring is on its way."""

    name: str
    bandwidth: float
    latency: float


# 80 % of what is written on them: NVLink 4, 18 links of 25 GB/s; NDR InfiniBand, one port a GPU.
NVLINK = Link("NVLink 4 (450 GB/s)", 0.8 * 450e9, 3e-6)
INFINIBAND = Link("InfiniBand NDR (50 GB/s a GPU)", 0.8 * 50e9, 10e-6)


def context_of(preset: str) -> Context:
    return Context(Path("nowhere"), load_preset(preset), "cpu", "auto")


def stream_of(
    context: Context,
    stage: str,
    samples: int | None = None,
    form: Callable[[BatchFormat], BatchFormat] = lambda own: own,
) -> TruthStream:
    """The batches of a stage at its full range of lengths, whatever its number of steps."""
    settings = recipe(context.config, stage)
    options = {k: settings[k] for k in ("lengths", "pad_probability", "pad_to") if k in settings}
    config = context.model_config(STAGES[stage])
    own = context.form(settings, STAGES[stage])
    if config.feedback != "none":
        fed = {"carry_state": config.carry_state, "draws": context.draws(stage)}
        own = replace(own, feedback=True, **fed)
        options.pop("pad_probability", None)
    return TruthStream(
        context.tasks,
        context.ranges,
        form(own),
        Schedule.by_steps(BATCHES),
        batch_size=samples or settings["batch_size"],
        seed=1,
        **options,
    )


# Messages and bytes


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """Yields the list of (collective, bytes that this process gave to it), while it grows."""
    seen: list[tuple[str, int]] = []

    def counting(name: str, original: Callable) -> Callable:
        def wrapped(value, *args, **options):
            seen.append((name, value.nbytes if isinstance(value, torch.Tensor) else 0))
            return original(value, *args, **options)

        return wrapped

    with ExitStack() as stack:
        for name in COLLECTIVES:
            wrapped = counting(name, getattr(dist, name))
            stack.enter_context(mock.patch.object(dist, name, wrapped))
        yield seen


@contextmanager
def single_group() -> Iterator[None]:
    """A process group of this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def train_step(model: nn.Module, optimizer, part: PackedBatch, exchange: Exchange) -> None:
    exchange.begin(part, stop=False)
    take_step(model, optimizer, part, clip=1.0, exchange=exchange)


def messages(preset: str, stage: str) -> dict[str, object]:
    """What a rank says in a training step of a stage: the model has its real size."""
    context = context_of(preset)
    model = context.new_model(STAGES[stage])
    optimizer = make_optimizer(model, lr=1e-4)
    batch = share_of(stream_of(context, stage, samples=8)[0].batch, 0, RANKS)
    with single_group(), counted() as seen:
        train_step(model, optimizer, batch, Exchange(model, Ranks(0, RANKS)))
    return {
        "what": "a step's messages",
        "preset": preset,
        "stage": stage,
        "parameters": sum(p.numel() for p in model.parameters()),
        "messages": len(seen),
        "bytes": sum(size for _, size in seen),
        "collectives": "+".join(name for name, _ in seen),
    }


# Imbalance


@dataclass(frozen=True)
class Costs(BatchFormat):
    """A form whose batches are the costs (S,) of their samples alone, which need no packing."""

    def collate(self, samples, tasks, extra_pad, **more) -> np.ndarray:
        if self.kind == "autoregressive":
            return np.diff(samples.sequences(tasks)[1]) - 1
        return input_widths(samples, tasks) * samples.loops


def share_excess(costs: np.ndarray, shares: list[np.ndarray]) -> float:
    """How much more than the mean the slowest share has."""
    own = np.array([costs[share].sum() for share in shares])
    return float(own.max() / own.mean() - 1)


def imbalance(preset: str, stage: str, batches: int = BATCHES) -> dict[str, object]:
    """Of RANKS ranks: dealt by cost, as training does, and by number (every eighth sample)."""
    form = lambda own: Costs(own.kind)
    stream = stream_of(context_of(preset), stage, SAMPLES, form)
    by_cost, by_number = [], []
    for step in range(batches):
        costs = stream[step].batch
        by_cost.append(share_excess(costs, deal(costs, RANKS)))
        every = [np.arange(k, len(costs), RANKS) for k in range(RANKS)]
        by_number.append(share_excess(costs, every))
    found = {"what": "imbalance", "preset": preset, "stage": stage, "ranks": RANKS,
             "samples": len(costs), "batches": batches}  # fmt: skip
    for name, values in (("by_cost", by_cost), ("by_number", by_number)):
        found |= {f"{name}_mean": np.mean(values), f"{name}_worst": np.max(values)}
    return found


# A run of several processes


def timed_steps(preset: str, samples: int | None) -> dict[str, float]:
    """Steps of the aligned looped model in this process, or rank: seconds of the median step, and
    of those in the all-reduce, waiting for the others included."""
    with joined_ranks("cpu") as (ranks, _):
        context, waited = context_of(preset), []
        model = context.new_model("looped").train()
        optimizer = make_optimizer(model, lr=1e-4)
        stream = stream_of(context, "looped_aligned", samples)
        reduce_all, seconds, exchange = dist.all_reduce, [], Exchange(model, ranks)

        def timing(tensor):
            began = time.perf_counter()
            reduce_all(tensor)
            waited.append(time.perf_counter() - began)

        with mock.patch.object(dist, "all_reduce", timing):
            for step in range(WARM_UP + STEPS):
                batch = stream[step].batch
                began = time.perf_counter()
                if ranks.alone:
                    take_step(model, optimizer, batch, clip=1.0)
                else:
                    train_step(model, optimizer, ranks.share(batch)[0], exchange)
                seconds.append(time.perf_counter() - began)
    in_exchange = float(np.median(waited[WARM_UP:])) if waited else 0.0
    return {"seconds": float(np.median(seconds[WARM_UP:])), "exchange": in_exchange}


def run_processes(preset: str, samples: int | None, size: int, threads: int) -> dict[str, float]:
    """Runs `timed_steps` in so many processes; returns what the first found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, str(Path(__file__).resolve()), "--timed-rank", preset]
    command += [str(samples or 0)]
    processes = []
    for rank in range(size):
        own = shared | {"RANK": rank, "LOCAL_RANK": rank} if size > 1 else {}
        own |= {"OMP_NUM_THREADS": threads}
        environment = os.environ | {name: str(value) for name, value in own.items()}
        started = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        processes.append(started)
    try:
        texts = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        raise RuntimeError(f"a timed run of {preset} with {size} processes failed")
    return json.loads(texts[0])


def timing(preset: str, rounds: int = 3) -> dict[str, object]:
    """A process a core with one thread, against one process with a thread a core; alternating."""
    cores, samples = usable_cores(), TIMED_SAMPLES[preset]
    several, one = [], []
    for _ in range(rounds):
        several.append(run_processes(preset, samples, cores, 1))
        one.append(run_processes(preset, samples, 1, cores))
    best = min(several, key=lambda run: run["seconds"])
    alone = min(run["seconds"] for run in one)
    samples = samples or recipe(load_preset(preset), "looped_aligned")["batch_size"]
    return {"what": "timing", "preset": preset, "processes": cores, "samples": samples,
            "one_process_s": alone, "processes_s": best["seconds"], "exchange_s": best["exchange"],
            "times_one_process": alone / best["seconds"]}  # fmt: skip


# Prediction


def device_work(context: Context, stage: str, samples: int) -> tuple[float, int]:
    """Seconds that the card works on a share of so many samples, and its launches."""
    model = context.new_model(STAGES[stage])
    for module in model.modules():
        if isinstance(module, nn.Linear):  # as autocast casts them, once a step
            module.to(torch.bfloat16)
    model = model.to("meta")
    batch = stream_of(context, stage, samples)[0].batch
    with traced() as seen:
        for part in batch.parts(PART_TOKENS["cuda"]) if batch.fed is not None else [batch]:
            model.loss(part.to("meta")).loss.backward()
    parts = seen.parts.values()
    return sum(part.waves for part in parts), sum(part.launches for part in parts)


def exchange_seconds(size: int, devices: int) -> float:
    """A ring all-reduce: each device sends 2 (n − 1)/n of the bytes, in 2 (n − 1) messages; and the
    two copies that gather the gradients and scatter them."""
    if devices == 1:
        return 0.0
    link = NVLINK if devices <= NODE_GPUS else INFINIBAND
    ring = 2 * (devices - 1) / devices * size / link.bandwidth + 2 * (devices - 1) * link.latency
    return ring + 4 * size / CARDS[ARCH].bandwidth


def predictions(
    preset: str, stage: str, size: int, excess: float, counts=(1, 8, 64)
) -> list[dict[str, object]]:
    """The same batch on more GPUs, and a batch that grows with them."""
    context = Context(Path("nowhere"), load_preset(preset), "cpu", "triton")
    made = made_per_second(stream_of(context, stage, SAMPLES))
    work, rows = {}, []
    for batch_of in ("the preset's", "grows"):
        for devices in counts:
            own = SAMPLES // devices if batch_of == "the preset's" else SAMPLES
            work[own] = work.get(own) or device_work(context, stage, own)
            on_card, launches = work[own]
            slowest = on_card * (1 + excess * (devices > 1))
            exchange = exchange_seconds(size, devices)
            beside = HOST[STAGES[stage]] + exchange
            step = max(slowest, LAUNCH * launches) + beside
            graphed = slowest + NODE * launches + beside
            rows.append({
                "what": "predicted", "preset": preset, "stage": stage, "batch": batch_of,
                "gpus": devices, "samples": own * devices, "card_ms": 1e3 * slowest,
                "launches_ms": 1e3 * LAUNCH * launches, "exchange_ms": 1e3 * exchange,
                "step_ms": 1e3 * step, "samples_per_s": own * devices / step,
                "graph_step_ms": 1e3 * graphed, "graph_samples_per_s": own * devices / graphed,
                "cores_for_data": own * devices / graphed / made,
            })  # fmt: skip
    for kind in ("", "graph_"):
        rate = f"{kind}samples_per_s"
        first = {row["batch"]: row[rate] for row in rows if row["gpus"] == 1}
        for row in rows:
            row[f"{kind}efficiency"] = row[rate] / first[row["batch"]] / row["gpus"]
    return rows


# The page


def page(rows: list[dict[str, object]]) -> str:
    of = lambda what: [row for row in rows if row["what"] == what]
    facts = common.machine("cpu")
    percent = lambda value: f"{100 * value:.2f} %"
    told = [(r["preset"], r["stage"], f"{r['parameters']:,}", r["messages"], f"{r['bytes']:,}",
             r["collectives"]) for r in of("a step's messages")]  # fmt: skip
    uneven = [(r["preset"], r["stage"], *(percent(r[f"{by}_{k}"]) for by in ("by_cost", "by_number")
               for k in ("mean", "worst"))) for r in of("imbalance")]  # fmt: skip
    unevenness = ("preset", "stage", "by cost, mean", "worst", "by number, mean", "worst")
    text = (
        "# What more than one device costs\n\n"
        f"`python benchmarks/scaling.py`, {facts['machine']}, {facts['versions']}, commit "
        f"{facts['commit']}. The path over NCCL has never run on a GPU.\n\n"
        "## A step's messages\n\nCounted around `torch.distributed`, in a step of the real model: "
        "gradients in fp32, eight numbers of losses and counts behind them.\n\n"
        + markdown(("preset", "stage", "parameters", "messages", "bytes", "what"), told)
        + f"\n## Imbalance\n\n{RANKS} ranks, {SAMPLES} samples a batch, "
        f"{max(r['batches'] for r in of('imbalance')):,} batches of the preset's mix: how much "
        "more Σ n·T than the mean the slowest rank has. By cost is what training does; by number "
        f"gives each rank every {RANKS}th sample.\n\n" + markdown(unevenness, uneven)
    )
    return text + _timing_text(of("timing")) + _prediction_text(of("predicted"))


def _timing_text(rows: list[dict[str, object]]) -> str:
    if not rows:
        return "\n## Several processes against one\n\nNot measured in this run (`--no-timing`).\n"
    lines = [(r["preset"], r["samples"], r["processes"], f"{1e3 * r['one_process_s']:.1f}",
              f"{1e3 * r['processes_s']:.1f}", f"{1e3 * r['exchange_s']:.2f}",
              f"{r['times_one_process']:.2f}×") for r in rows]  # fmt: skip
    columns = ("preset", "samples a step", "processes", "one process, ms", "processes, ms",
               "of it all-reduce, ms", "speed")  # fmt: skip
    return (
        "\n## Several processes against one\n\nEqual cores: one process with a thread a core, "
        "against a process a core with one thread (gloo). Aligned looped model, median of "
        f"{STEPS} steps, best of three alternating runs; all-reduce includes waiting for the "
        "slower rank. What one device cannot use of two cores is in the ratio too.\n\n"
        + markdown(columns, lines)
    )


PREDICTED = {
    "stage": "{stage}", "batch": "{batch}", "GPUs": "{gpus}", "samples": "{samples:,}",
    "card, ms": "{card_ms:.3g}", "launches, ms": "{launches_ms:.3g}",
    "all-reduce, ms": "{exchange_ms:.3g}", "step, ms": "{step_ms:.3g}",
    "samples/s": "{samples_per_s:,.0f}", "efficiency": "{efficiency:.0%}",
    "step in graphs, ms": "{graph_step_ms:.3g}", "samples/s ": "{graph_samples_per_s:,.0f}",
    "efficiency ": "{graph_efficiency:.0%}", "cores a rank for data": "{cores_for_data:.1f}",
}  # fmt: skip


def _prediction_text(rows: list[dict[str, object]]) -> str:
    card = CARDS[ARCH]
    lines = [[shown.format(**row) for shown in PREDICTED.values()] for row in rows]
    return (
        f"\n## Predicted: preset `paper` on {card.name}\n\n**None of it is measured.** Assumed:\n\n"
        "- Card: the launches of a share, each max(FLOPs / peak, bytes / bandwidth) over the share "
        f"of processors at work ({card.flops_16_bit / 1e12:.0f} TFLOP/s in bf16, "
        f"{card.bandwidth / 1e12:.1f} TB/s), times one plus the mean imbalance above.\n"
        f"- Launches: {1e6 * LAUNCH:.0f} µs each from Python, while the card works; in graphs "
        f"(before and after the all-reduce) {1e6 * NODE:.0f} µs each beside that work, without "
        "the rows that a graph's capacity has beyond the batch's.\n"
        "- Step: the larger of card and launches (in graphs their sum), the host's "
        + ", ".join(f"{1e3 * v:.0f} ms ({k})" for k, v in HOST.items())
        + ", and the all-reduce, which nothing hides: shared weights have their gradients only "
        "when the loop's backward is over.\n"
        "- All-reduce: a ring, 2 (n − 1)/n of the bytes over the slowest link and 2 (n − 1) times "
        f"its latency. {NODE_GPUS} GPUs: {NVLINK.name}, {1e6 * NVLINK.latency:.0f} µs; more: "
        f"{INFINIBAND.name}, {1e6 * INFINIBAND.latency:.0f} µs; 80 % of either bandwidth.\n"
        "- Data: every rank draws the whole batch and takes its share, so that the cores a rank "
        "needs grow with the batch (samples made a second by one core, measured here).\n\n"
        + markdown(tuple(PREDICTED), lines)
    )


def main(argv: list[str] | None = None) -> list[dict[str, object]]:
    parser = common.arguments(__doc__.splitlines()[0], "scaling.csv")
    parser.add_argument("--no-timing", action="store_true", help="count and predict only")
    parser.add_argument("--page", type=Path, help="default: SCALING.md beside the CSV")
    parser.add_argument("--timed-rank", nargs=2, help="one process of a timed run")
    args = parser.parse_args(argv)
    if args.timed_rank:
        preset, samples = args.timed_rank
        print(json.dumps(timed_steps(preset, int(samples) or None)))
        return []
    presets = PRESETS[:1] if args.quick else PRESETS
    rows = [messages(preset, stage) for preset in presets for stage in STAGES]
    sizes = {(row["preset"], row["stage"]): row["bytes"] for row in rows}
    batches = 3 if args.quick else BATCHES
    uneven = {stage: imbalance("paper", stage, batches) for stage in STAGES}
    rows += uneven.values()
    if not args.no_timing:
        rows += [timing(preset, 1 if args.quick else 3) for preset in presets]
    if not args.quick:
        for stage in STAGES:
            excess = float(uneven[stage]["by_cost_mean"])
            rows += predictions("paper", stage, sizes["paper", stage], excess)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    label = common.machine("cpu")
    args.csv.unlink(missing_ok=True)  # the page and the rows are of one run
    common.append_rows(args.csv, [{c: row.get(c, "") for c in columns} | label for row in rows])
    target = args.page or args.csv.with_name("SCALING.md")
    write_text(target, page(rows))
    print(target)
    return rows


if __name__ == "__main__":
    main()
