"""The stages of RELAY.

Stages communicate through files in the run folder only, so that each can run in its own process,
alone from the shell, or again after an interruption. A stage returns its part of results.json.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from relay_fast.data.sample_files import load_samples, save_samples
from relay_fast.data.streams import SampleStream, TruthStream, mean_cost
from relay_fast.decoding.chains import generate_ar_chains, generate_looped_chains
from relay_fast.decoding.confidence import (
    confident_in_order,
    generate_confident,
    stream_confident,
)
from relay_fast.models.transformers import LoopedTransformer
from relay_fast.relay import filter_metrics
from relay_fast.relay.context import Context
from relay_fast.relay.evaluation import evaluate_autoregressive, evaluate_looped, hit_matrix
from relay_fast.relay.label_free import PROBLEMS, confidence_bounds, label_free
from relay_fast.relay.presets import recipe
from relay_fast.relay.resumable_chains import generate_confident_in_parts
from relay_fast.reporting.progress import Compiling, Problems, Progress
from relay_fast.tasks import NO_ANSWER, FeedbackDraws, Samples
from relay_fast.tasks.verify import same_answers
from relay_fast.training.model_files import model_path
from relay_fast.training.schedule import Schedule
from relay_fast.training.trainer import LOG_EVERY, Trained, train_model
from relay_fast.utils.seeds import (
    CHAINS_STREAM,
    IN_RANGE_STREAM,
    SELF_CHAINS_STREAM,
    TRAIN_STREAM,
)

OnProgress = Callable[[Progress | Problems | Compiling], None]

# Stage -> stages that must be done before, in the order in which ready stages are started.
STAGE_DEPENDENCIES: dict[str, tuple[str, ...]] = {
    "looped_aligned": (),
    "ar_baseline": (),
    "looped_vanilla": (),
    "chains": ("looped_aligned",),
    "ar_relay": ("ar_baseline", "chains"),
    "ar_self_loop": ("ar_baseline", "looped_vanilla"),
    "ar_self_truth": ("ar_baseline",),
}
MODELS = tuple(name for name in STAGE_DEPENDENCIES if name != "chains")
STAGE_DEPENDENCIES |= {f"evaluate.{name}": (name,) for name in MODELS}


def stage_files(folder: Path, name: str) -> list[Path]:
    """Returns the files that a stage leaves for other stages."""
    if name == "chains":
        return [folder / "chains.safetensors"]
    return [model_path(folder, name)] if name in MODELS else []


def scratch_files(folder: Path, name: str) -> list[Path]:
    """Returns the files that a stage needs only to be continued after an interruption."""
    return list((folder / "checkpoints").glob(f"{name}.*.safetensors"))


def run_stage(context: Context, name: str, on_progress: OnProgress) -> dict[str, Any]:
    """Runs one stage.

    Args:
        context: The run.
        name: The stage, a key of `STAGE_DEPENDENCIES`.
        on_progress: Called now and then.

    Returns:
        The stage's part of results.json.
    """
    if name.startswith("evaluate."):
        return _evaluate(context, name.removeprefix("evaluate."), on_progress)
    return _STAGES[name](context, on_progress)


def _throttled(on_progress: OnProgress) -> Callable[[int, int], None]:
    """Returns a callback (problems done, problems in all) that calls `on_progress` at most every
    LOG_EVERY seconds."""
    called = -math.inf

    def progress(done: int, total: int) -> None:
        nonlocal called
        now = time.monotonic()
        if now - called >= LOG_EVERY:
            on_progress(Problems(done, total))
            called = now

    return progress


# Training from scratch


def _schedule(
    context: Context,
    settings: Mapping[str, Any],
    kind: str,
    samples: int,
    draws: Mapping[str, FeedbackDraws] | None = None,
) -> Schedule:
    """Builds a stage's schedule from its steps, epochs over `samples`, or token-iterations.

    Token-iterations are counted with what `draws` adds to iterations that train side by side.
    """
    options = {"warmup": settings["warmup"], "decay": settings["decay"]}
    if "token_iterations" in settings:
        cost = mean_cost(
            context.tasks,
            context.ranges,
            kind,
            settings["batch_size"],
            settings["lengths"],
            settings.get("curriculum", 0.0),
            draws,
        )
        return Schedule.by_work(settings["token_iterations"], cost, **options)
    if "epochs" in settings:
        steps = settings["epochs"] * samples // settings["batch_size"]
        return Schedule.by_steps(max(1, int(steps)), **options)
    return Schedule.by_steps(settings["steps"], **options)


def _from_scratch(context: Context, name: str, model, kind: str, on_progress: OnProgress):
    """Trains a fresh model on true chains."""
    settings = recipe(context.config, name)
    size = settings.get("dataset_size")
    names = (
        "batch_size",
        "lengths",
        "lengths_per_batch",
        "dataset_size",
        "curriculum",
        "pad_probability",
        "pad_to",
        "cut",
        "cut_probability",
        "truth",
    )
    form = replace(
        context.form(settings, kind),
        feedback=model.config.feedback != "none",
        carry_state=model.config.carry_state,
    )
    if form.side_by_side:
        form = replace(form, draws=context.draws(name))
    schedule = _schedule(
        context,
        settings,
        kind,
        (size or 0) * len(context.tasks),
        form.draws if form.side_by_side else None,
    )
    options = {k: settings[k] for k in names if k in settings}
    if not form.feedback:
        options.pop("truth", None)
    if form.side_by_side:
        for key in ("pad_probability", "cut"):  # each iteration is drawn for itself
            options.pop(key, None)
    stream = TruthStream(
        context.tasks,
        context.ranges,
        form,
        schedule,
        seed=context.stream_seed(TRAIN_STREAM),
        **options,
    )
    trained = train_model(
        model,
        stream,
        settings,
        context.state_path(name),
        seed=context.seed,
        data_workers=context.config["data_workers"],
        on_progress=on_progress,
        ranks=context.ranks,
        on_compiling=on_progress,
    )
    return context.finish(name, model, trained)


def _looped_aligned(context: Context, on_progress: OnProgress):
    model = context.new_model("looped", "chain")
    return _from_scratch(context, "looped_aligned", model, "looped", on_progress)


def _looped_vanilla(context: Context, on_progress: OnProgress):
    model = context.new_model("looped", "answer")
    return _from_scratch(context, "looped_vanilla", model, "looped", on_progress)


def _ar_baseline(context: Context, on_progress: OnProgress):
    model = context.new_model("autoregressive")
    return _from_scratch(context, "ar_baseline", model, "autoregressive", on_progress)


# Stage II


def _chains(context: Context, on_progress: OnProgress):
    """Generates chains with the looped model for the lengths beyond its training range."""
    model = context.load("looped_aligned")
    parts = []
    for name, task in context.tasks.items():
        longest = context.ranges[name][1]
        counts = context.task_config(name)["merge_beyond"]
        beyond = range(longest + 1, longest + 1 + len(counts))
        most = [task.most_problems(length) for length in beyond]
        counts = [c if m is None else min(c, m) for c, m in zip(counts, most, strict=True)]
        lengths = np.repeat(beyond, counts)
        parts.append(task.sample(lengths, context.stream_seed(CHAINS_STREAM)))
    problems = Samples.concat(parts)
    written, confidence = _written_together(context, model, problems, on_progress)
    if context.ranks.writes:
        save_samples(context.folder / "chains.safetensors", written, {"model": "looped_aligned"})
    context.ranks.same(None)
    few = min(PROBLEMS, context.config["evaluation"]["problems"])
    bounds = confidence_bounds(
        model, context.tasks, context.ranges, context.seed, few, **context.inference
    )

    def count(written: Samples, truth: Samples, confidence) -> filter_metrics.Table:
        kept = label_free(written, context.tasks, confidence, bounds)
        return filter_metrics.count(written, truth, context.tasks, kept=kept)

    counts = [count(written, problems, confidence)]
    if len(known := _kept_problems(context, problems)):
        written, confidence = generate_confident(model, known, context.tasks, **context.inference)
        counts.append(count(written, known, confidence))
    trust = filter_metrics.to_json(filter_metrics.add(counts))
    return {"trust": trust} | ({} if bounds is None else {"filter": {"bounds": bounds}})


def _kept_problems(context: Context, problems: Samples) -> Samples:
    """Returns what is kept for evaluation of the lengths whose problems have no truth, on which the
    filter can be measured."""
    parts = [problems.take(slice(0))]
    for task in context.tasks.values():
        unsolved = (problems.task == task.index) & (problems.answer == NO_ANSWER)
        for length in np.unique(problems.length[unsolved]).tolist():
            number = context.config["evaluation"]["problems"]
            parts.append(task.unseen(length, number, context.seed))
    return Samples.concat(parts)


def _written_together(
    context: Context, model, problems: Samples, on_progress
) -> tuple[Samples, np.ndarray | None]:
    """Generates chains and their confidences on all ranks; each takes every so manieth batch of
    those of one process."""
    ranks, options = context.ranks, {"progress": _throttled(on_progress), **context.inference}
    if ranks.alone:
        stem = context.folder / "checkpoints" / "chains"
        return generate_confident_in_parts(model, problems, context.tasks, stem, **options)
    shard = (ranks.rank, ranks.size)
    own = list(stream_confident(model, problems, context.tasks, shard=shard, **options))
    return confident_in_order([part for parts in ranks.gather(own) for part in parts], problems)


def _in_range_problems(context: Context) -> Samples:
    """Draws the true problems of the merged set: lengths of the training range, ∝ length."""
    parts = []
    for name, task in context.tasks.items():
        shortest, longest = context.ranges[name]
        rng = np.random.default_rng([IN_RANGE_STREAM, context.seed, task.index])
        choices = task.lengths_between(shortest, longest)
        size = context.task_config(name)["merge_inside"]
        lengths = rng.choice(choices, size=size, p=choices / choices.sum())
        parts.append(task.sample(lengths, context.stream_seed(IN_RANGE_STREAM)))
    return Samples.concat(parts)


def _fine_tune(
    context: Context, stage: str, name: str, model, added: Samples, on_progress: OnProgress
):
    """Fine-tunes on true problems in the training range merged with `added` chains of a model."""
    settings = recipe(context.config, stage)
    sizes = np.diff(added.sequences(context.tasks)[1])
    # A wrong chain may never end, and may hold no answer to learn.
    fits = (sizes <= model.config.max_tokens) & (added.answer != NO_ANSWER)
    in_range = _in_range_problems(context)
    merged = Samples.concat([in_range, added.take(fits)])
    longest_true = {
        name: int(in_range.length[in_range.task == task.index].max(initial=0))
        for name, task in context.tasks.items()
    }
    schedule = _schedule(context, settings, "autoregressive", len(merged))
    stream = SampleStream(
        merged,
        context.tasks,
        context.form(settings, "autoregressive"),
        schedule,
        batch_size=settings["batch_size"],
        seed=context.seed,
        longest_true=longest_true,
    )
    return train_model(
        model,
        stream,
        settings,
        context.state_path(name),
        seed=context.seed,
        data_workers=context.config["data_workers"],
        on_progress=on_progress,
        ranks=context.ranks,
        on_compiling=on_progress,
    )


def _ar_relay(context: Context, on_progress: OnProgress):
    model = context.load("ar_baseline")
    written = load_samples(context.folder / "chains.safetensors")
    trained = _fine_tune(context, "ar_relay", "ar_relay", model, written, on_progress)
    return context.finish("ar_relay", model, trained)


# Self-chain controls


def _ar_self(
    context: Context, name: str, keep_filter: Callable[[Samples, Samples], np.ndarray], on_progress
):
    """Trains an autoregressive model on its own chains, in phases of growing length.

    In each phase the model writes chains for lengths beyond its range; it is fine-tuned on those
    that `keep_filter` keeps and on the true problems.
    """
    model = context.load("ar_baseline")
    phases = max(len(context.task_config(task)["self_lengths"]) for task in context.tasks)
    kept, trained = [], []
    for phase in range(phases):
        problems, stage = _self_problems(context, phase), f"{name}.{phase + 1}"
        passed = _passed(context, stage, model, problems, keep_filter, on_progress)
        kept.append({"phase": phase + 1, "written": len(problems), "kept": len(passed)})
        trained.append(_fine_tune(context, "ar_self", stage, model, passed, on_progress))
    result = context.finish(name, model, Trained.of_phases(trained))
    return {**result, "kept": {name: kept}}


def _passed(
    context: Context, name: str, model, problems: Samples, keep_filter, on_progress
) -> Samples:
    """Generates the chains that `keep_filter` keeps, or reads those of an interrupted call."""
    path = context.folder / "checkpoints" / f"{name}.chains.safetensors"
    if context.ranks.writes and not path.exists():
        options = {"progress": _throttled(on_progress), **context.inference}
        written = generate_ar_chains(model, problems, context.tasks, **options)
        save_samples(path, written.take(keep_filter(problems, written)), {"stage": name})
    context.ranks.same(None)
    return load_samples(path)


def _self_problems(context: Context, phase: int) -> Samples:
    """Draws a phase's problems: all lengths up to the phase's own, equally many of each."""
    parts = []
    for name, task in context.tasks.items():
        entry = context.task_config(name)
        lengths = entry["self_lengths"][: phase + 1]
        drawn = np.repeat(lengths, entry["self_counts"][phase])
        parts.append(task.sample(drawn, context.stream_seed(SELF_CHAINS_STREAM) + phase))
    return Samples.concat(parts)


def _ar_self_truth(context: Context, on_progress: OnProgress):
    def keep_filter(problems: Samples, written: Samples) -> np.ndarray:
        return same_answers(written, problems, context.tasks)

    return _ar_self(context, "ar_self_truth", keep_filter, on_progress)


def _ar_self_loop(context: Context, on_progress: OnProgress):
    looped = context.load("looped_vanilla")

    def keep_filter(problems: Samples, written: Samples) -> np.ndarray:
        own = generate_looped_chains(looped, problems, context.tasks, **context.inference)
        return written.answer == own.answer

    return _ar_self(context, "ar_self_loop", keep_filter, on_progress)


# Evaluation


def _evaluate(context: Context, name: str, on_progress: OnProgress) -> dict[str, Any]:
    """Measures accuracy at every length from the shortest to the longest, and hit matrices."""
    model = context.load(name)
    problems = context.config["evaluation"]["problems"]
    looped = isinstance(model, LoopedTransformer)
    evaluate = evaluate_looped if looped else evaluate_autoregressive
    accuracy, matrices = {}, {}
    own = slice(context.ranks.rank, None, context.ranks.size)  # lengths are shared out
    for task, entry in context.config["tasks"].items():
        lengths = (
            context.tasks[task].tested_lengths(entry["train"][0], entry["test"][1]).tolist()[own]
        )
        accuracy[task] = evaluate(
            model,
            context.tasks,
            task,
            lengths,
            problems,
            context.seed,
            progress=_throttled(on_progress),
            **context.inference,
        )
        matrices[task] = {}
        for length in entry["hit_matrix"][own]:
            few = min(problems, 200)
            matrix = hit_matrix(model, context.tasks[task], length, few, **context.inference)
            if not matrix.size:  # a file may hold no problem of this length
                continue
            rows = np.where(np.isnan(matrix), None, matrix.round(4)).tolist()
            matrices[task][str(length)] = {name: rows}
    found = context.ranks.gather((accuracy, matrices))
    accuracy = {
        task: {str(n): row for n, row in sorted(_merged(a[task] for a, _ in found).items())}
        for task in accuracy
    }
    matrices = {task: _merged(m[task] for _, m in found) for task in matrices}
    return {"accuracy": {name: accuracy}, "hit_matrix": matrices}


def _merged(parts: Iterable[Mapping]) -> dict:
    """Returns one dict of the entries of several."""
    return {key: value for part in parts for key, value in part.items()}


_STAGES: dict[str, Callable[[Context, OnProgress], dict[str, Any]]] = {
    "looped_aligned": _looped_aligned,
    "looped_vanilla": _looped_vanilla,
    "ar_baseline": _ar_baseline,
    "chains": _chains,
    "ar_relay": _ar_relay,
    "ar_self_loop": _ar_self_loop,
    "ar_self_truth": _ar_self_truth,
}
