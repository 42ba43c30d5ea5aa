"""What preset `paper-fast` should take on an H200, written down before the first run.

    python -m benchmarks.card.predict --out benchmarks/results/paper/PREDICTION.md
    python -m benchmarks.card.predict --measured runs/paper-fast/results.json --out COMPARED.md

Training steps are traced on meta tensors as in `benchmarks.card.profile`: every launch with its own
configuration, FLOPs and bytes, over the preset's own batches. What the host does is measured here.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels have no launches to record

import numpy as np
import torch
from torch import nn

from benchmarks import common
from benchmarks.card.profile import ARCH, LAUNCH, traced
from benchmarks.card.table import markdown
from benchmarks.kernel_costs import CARDS
from relay_fast.batch.capacity import Capacity, CapacityBatch
from relay_fast.batch.packed import PackedBatch
from relay_fast.data.feedback import collate_next
from relay_fast.data.streams import TruthStream
from relay_fast.decoding.step import LENGTH_STEP
from relay_fast.relay.presets import load_preset, override, recipe
from relay_fast.relay.stages import Context
from relay_fast.tasks import Written
from relay_fast.training.cuda_graph import PART_TOKENS
from relay_fast.training.schedule import Schedule
from relay_fast.training.trainer import CAPACITY_BATCHES, SLACK, SPREAD
from relay_fast.utils.files import write_text

# Assumed.
NODE = 1e-6  # seconds that each node of a graph takes beside its work
HOST = {"looped": 5e-3, "autoregressive": 3e-3}  # seconds a step in which the card has no work yet
MUON = 2e-3  # seconds a step: small fp32 products that leave most of the card idle
ROWS_AT_WORK = 0.7  # of the decoding cache's, on average
FP32_SHARE = 0.4  # of the fp32 peak, in the looped model's writing
BEGIN = 20.0  # seconds until a stage's first step: process, CUDA, compiled kernels, data workers

PLACES = 5  # of the curriculum that are traced
EXAMPLES = 16  # problems a length that sizes are taken from
ALIGNED = "looped_aligned"
SCRATCH = {
    "looped_aligned": "looped", "looped_vanilla": "looped", "ar_baseline": "autoregressive",
}  # fmt: skip
KIND = {**SCRATCH, "ar_relay": "autoregressive", "ar_self": "autoregressive"}


@dataclass
class Training:
    """A training stage as predicted; times in seconds."""

    stage: str
    batch: int
    steps: int
    token_iterations: int  # of a step with problems of every length
    flops: float  # of that step, as launched
    longest: float  # that step
    mean: float  # over the curriculum
    nodes: int
    memory: float  # bytes

    @property
    def seconds(self) -> float:
        return self.mean * self.steps


def stream_of(context: Context, stage: str) -> TruthStream:
    """The stage's batches; those of a fine-tuning stage as if it trained from scratch."""
    settings = recipe(context.config, stage)
    names = ("batch_size", "lengths", "curriculum", "pad_probability", "pad_to")
    options = {name: settings[name] for name in names if name in settings}
    if stage not in SCRATCH:
        options["curriculum"] = 0.0
    form = context.form(settings, KIND[stage])
    if fed(context, stage):
        form = replace(form, feedback=True, draws=context.draws(stage))
        options.pop("pad_probability", None)
    return TruthStream(
        context.tasks,
        context.ranges,
        form,
        Schedule.by_steps(settings["steps"]),
        seed=1,
        **options,
    )


def fed(context: Context, stage: str) -> bool:
    """Whether the stage's iterations are fed true rounds, so that they train side by side."""
    config = context.model_config("looped", "chain" if stage == ALIGNED else "answer")
    return stage == ALIGNED and config.feedback != "none" and not config.carry_state


def training(context: Context, stage: str) -> Training:
    stream, steps = stream_of(context, stage), recipe(context.config, stage)["steps"]
    model = context.new_model(KIND[stage], "answer" if stage == "looped_vanilla" else "chain")
    for module in model.modules():
        if isinstance(module, nn.Linear):  # as autocast casts them, once a step
            module.to(torch.bfloat16)
    model, side_by_side = model.to("meta"), stream.form.side_by_side

    def trace(batch: PackedBatch):
        with traced() as seen:
            for part in batch.parts(PART_TOKENS["cuda"]):
                model.loss(part.to("meta")).loss.backward()
        return list(seen.parts.values())

    def seconds(parts) -> float:
        """On the card; without a graph no sooner than the host has launched all of it."""
        work = sum(part.waves for part in parts)
        return max(work, LAUNCH * sum(part.launches for part in parts)) if side_by_side else work

    fixed = HOST[KIND[stage]] + MUON * ("muon_lr" in recipe(context.config, stage))
    last = stream[steps - 1].batch
    parts = trace(last)
    if side_by_side:
        nodes = sum(part.launches for part in parts)
        held = min(last.plan.token_iterations, PART_TOKENS["cuda"])
    else:
        drawn = np.linspace(0, steps - 1, CAPACITY_BATCHES).astype(int).tolist()
        capacity = Capacity.of((stream[i].batch for i in drawn), SLACK, SPREAD)
        with traced() as graph:
            model.loss(CapacityBatch(capacity, "meta").batch).loss.backward()
        nodes = sum(part.launches for part in graph.parts.values())
        fixed, held = fixed + NODE * nodes, capacity.token_iterations
    growth = stream.curriculum
    places = [growth * (k + 0.5) / PLACES for k in range(PLACES)] if growth else []
    growing = [fixed + seconds(trace(stream[int(x * steps)].batch)) for x in places]
    longest = fixed + seconds(parts)
    mean = growth * float(np.mean(growing or [0.0])) + (1 - growth) * longest
    memory = peak_bytes(context.config["training"]["recompute"]) * held
    flops = sum(part.flops for part in parts)
    return Training(
        stage, len(last), steps, last.plan.token_iterations, flops, longest, mean, nodes, memory
    )


def latent(context: Context) -> Context:
    """The same run with the latent loop, its iterations one after another, in one CUDA graph."""
    values = ["model.looped.feedback=none", "stages.looped_aligned.graph=true"]
    config = override(context.config, values=values)
    return Context(Path("nowhere"), config, "cpu", "triton")


def peak_bytes(policy: str) -> float:
    """Peak bytes of a token-iteration in fp32 on a CPU, from the benchmark's file."""
    with (common.RESULTS / "loop_throughput.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if (row["config"], row["provider"], row["policy"]) == ("relay", "relay_fast", policy):
                per_sample = float(row["token_iterations_per_s"]) / float(row["samples_per_s"])
                return float(row["peak_bytes"]) / (per_sample * float(row["batch"]))
    raise ValueError(f"loop_throughput.csv has no row of policy {policy!r}: run it with --policies")


def made_per_second(stream: TruthStream, batches: int = 5) -> float:
    """Samples that one core of this machine makes in a second of its own time, of the longest
    problems."""
    first = len(stream) - 1 - batches
    stream[first]
    began = time.process_time()
    samples = sum(len(stream[first + 1 + k].batch) for k in range(batches))
    return samples / (time.process_time() - began)


@dataclass
class Writing:
    """What models write in a stage: chains, tokens, and seconds by kind of model."""

    chains: int = 0
    tokens: float = 0.0
    autoregressive: float = 0.0
    looped: float = 0.0
    inputs: float = 0.0  # of a model that is fed its rounds: made on the host


def inputs_per_second(context: Context, name: str) -> float:
    """Tokens of what a model that is fed its rounds sees, made on one core of this machine."""
    task, length = context.tasks[name], context.ranges[name][1]
    problems = task.sample(np.full(8 * EXAMPLES, length), 7)
    written, owner = Written.truth(problems), np.arange(len(problems))
    tokens = 0
    collate_next(written, context.tasks, owner, np.zeros_like(owner))
    began = time.process_time()
    for before in range(task.loops(length)):
        batch = collate_next(written, context.tasks, owner, np.full_like(owner, before))
        tokens += batch.plan.rows
    return tokens / (time.process_time() - began)


def writing(context: Context, wanted: Iterable[tuple[str, int, int]]) -> Writing:
    """Of so many chains (task, length, number).

    autoregressive: every step reads the cache, as long as the sequence's end, in fp32; looped:
    forward FLOPs; inputs: each token of each iteration is made on one core.
    """
    c, card, total = context.model_config("looped").block, CARDS[ARCH], Writing()
    rates = (
        {n: inputs_per_second(context, n) for n in context.tasks} if fed(context, ALIGNED) else {}
    )
    position = 2 * 4 * c.n_layers * c.kv_heads * c.head_dim  # bytes of the cache
    linear = 2 * c.n_layers * (c.d_model * (4 * c.d_model) + 2 * c.d_model * c.hidden)
    for name, length, number in wanted:
        problems = context.tasks[name].sample(np.full(EXAMPLES, length), 7)
        sizes, prompts = (
            np.diff(x) for x in (problems.sequences(context.tasks)[1], problems.problem_offsets)
        )
        tokens, ends = sizes - prompts, -(-sizes // LENGTH_STEP) * LENGTH_STEP
        reads = float((tokens * ends).mean()) * position / (card.bandwidth * ROWS_AT_WORK)
        seen = float((prompts * problems.loops).mean())
        work = seen * linear / (card.flops_fp32 * FP32_SHARE)
        total.inputs += number * seen / rates[name] if rates else 0.0
        total.chains += number
        total.tokens += number * float(tokens.mean())
        total.autoregressive += number * reads
        total.looped += number * work
    return total


def sets(context: Context) -> dict[str, Writing]:
    """What is written: to be evaluated, as chains to learn from, by a control in its phases."""
    evaluated, beyond, own = [], [], []
    for name, entry in context.config["tasks"].items():
        shortest, longest = entry["train"]
        number = context.config["evaluation"]["problems"]
        evaluated += [(name, n, number) for n in range(shortest, entry["test"][1] + 1)]
        beyond += [(name, longest + 1 + k, n) for k, n in enumerate(entry["merge_beyond"])]
        for phase, count in enumerate(entry["self_counts"]):
            own += [(name, length, count) for length in entry["self_lengths"][: phase + 1]]
    wanted = {"evaluation": evaluated, "chains": beyond, "self chains": own}
    return {what: writing(context, counts) for what, counts in wanted.items()}


def measured_steps(results: dict) -> dict[str, tuple[float, float]]:
    """Seconds of a step, the start apart, and the share of waiting for data, by training stage."""
    found = {}
    for stage, history in results.get("history", {}).items():
        steps = [(e["step"], e["seconds"]) for e in history]
        forward = [
            (b[0] - a[0], b[1] - a[1])
            for a, b in zip(steps, steps[1:], strict=False)
            if b[0] > a[0]
        ]  # a phase counts anew
        if taken := sum(step for step, _ in forward):
            share = results["training"][stage]["data_wait_share"]
            found[stage] = sum(seconds for _, seconds in forward) / taken, share
    return found


def compared(trained: dict[str, Training], results: dict) -> str:
    """Predicted beside measured, of the stages that have been trained."""
    rows = []
    for stage, (seconds, waited) in measured_steps(results).items():
        t = trained["ar_self" if stage.startswith("ar_self") else stage]
        share = t.flops * t.mean / t.longest / seconds / CARDS[ARCH].flops_16_bit
        graph = results["training"][stage]["cuda_graph"]
        rows.append((stage, f"{1e3 * t.mean:.3g}", f"{1e3 * seconds:.3g}",
                     f"{seconds / t.mean:.2f}×", f"{1 / seconds:.3g}", f"{share:.1%}",
                     f"{waited:.1%}", graph))  # fmt: skip
    columns = ("stage", "predicted mean step, ms", "measured, ms", "ratio", "steps/s",
               "share of peak", "waiting for data", "CUDA graph")  # fmt: skip
    where = f"{results['versions']['device_name']}, commit {results['versions']['commit']}"
    return (
        f"\n## Measured: {where}\n\n" + markdown(columns, rows) + "\nShare of peak: the FLOPs "
        "that were predicted for the mean step, over the time measured and the bf16 peak.\n"
    )


def training_table(context: Context, trained: dict[str, Training]) -> str:
    made = {
        KIND[stage]: made_per_second(stream_of(context, stage))
        for stage in ("looped_aligned", "ar_baseline")
    }
    workers = context.config["data_workers"]
    columns = (
        "stage", "batch", "steps", "token-iterations", "TFLOP", "nodes", "longest step, ms",
        "mean step, ms", "minutes", "memory, GB", "samples/s", "made a core/s", "headroom",
    )  # fmt: skip
    rows = [
        (
            t.stage, f"{t.batch:,}", f"{t.steps:,}", f"{t.token_iterations:,}",
            f"{t.flops / 1e12:.3g}", f"{t.nodes:,}", f"{1e3 * t.longest:.3g}",
            f"{1e3 * t.mean:.3g}", f"{t.seconds / 60:.1f}", f"{t.memory / 1e9:.0f}",
            f"{t.batch / t.mean:,.0f}", f"{made[KIND[t.stage]]:,.0f}",
            f"{made[KIND[t.stage]] * workers * t.mean / t.batch:.1f}×",
        )
        for t in trained.values()
    ]  # fmt: skip
    return markdown(columns, rows)


def writing_table(written: dict[str, Writing]) -> str:
    columns = ("what", "chains", "tokens, M", "autoregressive, s", "looped, s", "its inputs, s")
    rows = [
        (
            what, f"{w.chains:,}", f"{w.tokens / 1e6:.0f}", f"{w.autoregressive:.0f}",
            f"{w.looped:.0f}", f"{w.inputs:.0f}",
        )
        for what, w in written.items()
    ]  # fmt: skip
    return markdown(columns, rows)


def page(results: dict | None = None) -> str:
    """The whole prediction as Markdown; beside what was measured, where `results` are given."""
    context = Context(Path("nowhere"), load_preset("paper-fast"), "cpu", "triton")
    trained = {stage: training(context, stage) for stage in KIND}
    written, phases = sets(context), 5
    whole = stages(trained, written, phases)
    card, t = CARDS[ARCH], trained[ALIGNED]
    return (
        "# What `paper-fast` should take on an H200\n\n"
        "**Predictions, none measured on a card.** Made by `python -m benchmarks.card.predict`. "
        f"{card.name}: {card.flops_16_bit / 1e12:.0f} TFLOP/s in bf16, "
        f"{card.flops_fp32 / 1e12:.0f} in fp32, {card.bandwidth / 1e12:.1f} TB/s.\n\n"
        "## Training\n\n" + training_table(context, trained) + "\n"
        "Step = Σ over its launches of max(FLOPs / peak, bytes / bandwidth) / share of processors "
        f"at work, + {1e6 * NODE:.0f} µs a node of the CUDA graph, + {1e3 * HOST['looped']:.0f} ms "
        f"(looped) or {1e3 * HOST['autoregressive']:.0f} ms (autoregressive) in which the host "
        f"copies the next batch, + {1e3 * MUON:.0f} ms where Muon is used; AdamW not counted. "
        "*Longest step*: problems of every length; "
        "*mean*: over the curriculum; ar_self: each of its phases. *Memory*: the peak of a "
        "token-iteration in fp32 (`loop_throughput.csv`) times the graph's capacity; bf16 needs "
        f"less. *Made a core*: measured on one core of {common.machine('cpu')['machine']}; "
        f"*headroom*: {context.config['data_workers']} workers over what the step takes.\n\n"
        f"The looped model's longest step does {t.flops / 1e12 / t.longest:.0f} TFLOP/s, "
        f"{t.flops / t.longest / card.flops_16_bit:.0%} of the peak.\n\n"
        + (side_by_side(context, t) if fed(context, ALIGNED) else "")
        + "## Writing chains\n\n"
        + writing_table(written)
        + "\nAutoregressive: every step reads the keys and values of its rows in fp32, "
        f"{ROWS_AT_WORK:.0%} of them at work. Looped: FLOPs at {FP32_SHARE:.0%} of the fp32 peak; "
        "its inputs: what a model that is fed its rounds sees is made on one core between the "
        "iterations, at the speed measured here.\n"
        "\n## The whole\n\n"
        + markdown(("stages", "minutes"), [(k, f"{v / 60:.1f}") for k, v in whole.items()])
        + f"\n{BEGIN:.0f} s are counted for the start of each stage.\n"
        + (compared(trained, results) if results else "")
    )


def side_by_side(context: Context, t: Training) -> str:
    """What it gives that the iterations of a sample are one batch: beside the latent loop."""
    other = training(latent(context), ALIGNED)
    rate = lambda one: one.token_iterations / one.longest / 1e6
    busy = lambda one: one.flops / one.longest / CARDS[ARCH].flops_16_bit
    return (
        "**Iterations side by side.** The looped model is fed true rounds in training, so that all "
        f"iterations of its {t.batch} samples are sequences of one batch, in parts of "
        f"{PART_TOKENS['cuda']:,} tokens: {t.nodes:,} launches, made one by one at "
        f"{1e6 * LAUNCH:.0f} µs each while the card works, and no iteration in which few samples "
        f"are left. The latent loop on the same samples: {other.nodes:,} launches in a graph, the "
        f"last iterations for a handful of samples. Step {1e3 * t.longest:.3g} ms against "
        f"{1e3 * other.longest:.3g}, {rate(t):.1f} against {rate(other):.1f} M token-iterations/s, "
        f"{busy(t):.0%} against {busy(other):.0%} of the peak.\n\n"
    )


def stages(
    trained: dict[str, Training], written: dict[str, Writing], phases: int
) -> dict[str, float]:
    """Seconds of every stage with its evaluation, and of all."""
    evaluated = written["evaluation"]
    looped = evaluated.looped + 2 * BEGIN
    autoregressive = evaluated.autoregressive + 2 * BEGIN
    own = phases * trained["ar_self"].seconds + written["self chains"].autoregressive
    result = {
        ALIGNED: trained[ALIGNED].seconds + looped + evaluated.inputs,
        "chains": written["chains"].looped + written["chains"].inputs + BEGIN,
        "ar_baseline": trained["ar_baseline"].seconds + autoregressive,
        "ar_relay": trained["ar_relay"].seconds + autoregressive,
        "looped_vanilla": trained["looped_vanilla"].seconds + looped,
        "ar_self_truth": own + autoregressive,
        "ar_self_loop": own + written["self chains"].looped + autoregressive,
    }
    result["all"] = sum(result.values())
    result["looped model, second seed"] = result["looped_aligned"]
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=common.RESULTS / "paper" / "PREDICTION.md")
    parser.add_argument("--measured", type=Path, help="results.json of a run on a card")
    options = parser.parse_args(argv)
    results = json.loads(options.measured.read_text()) if options.measured else None
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.out, page(results))
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
