"""The stages of RELAY, each a function of a run folder: what it reads, trains, writes.

Stages talk through files in the run folder only, so that each can run in its own process, alone
from the shell, or again after an interruption. A stage returns what belongs into results.json.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.data.feedback import check_draws
from relay_fast.data.sample_files import load_samples, save_samples
from relay_fast.data.streams import BatchFormat, SampleStream, TruthStream, mean_cost
from relay_fast.decoding.chains import generate_ar_chains, generate_looped_chains
from relay_fast.models.transformers import AutoregressiveTransformer, LoopedTransformer
from relay_fast.relay import filter_metrics
from relay_fast.relay.evaluation import evaluate_autoregressive, evaluate_looped, hit_matrix
from relay_fast.relay.presets import recipe
from relay_fast.relay.resumable_chains import generate_in_parts
from relay_fast.reporting.progress import Problems, Progress
from relay_fast.tasks import NO_ANSWER, FeedbackDraws, Samples
from relay_fast.training.model_files import load_run_model, model_path, run_tasks, save_model
from relay_fast.training.schedule import Schedule
from relay_fast.training.trainer import LOG_EVERY, Trained, train_model

Report = Callable[[Progress | Problems], None]

# Seeds of the sample streams, so that no two of them meet.
_TRAIN, _CHAINS, _INSIDE, _SELF = 1, 2, 3, 4

# Options of the looped models alone, in the table that they share with the others.
_OF_LOOPED = ("feedback", "carry_state", "feedback_noise")

# What each stage needs before it can run, in the order in which ready stages are started.
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


class Context:
    """A run as a stage sees it: folder, config, tasks."""

    def __init__(self, folder: Path, config: Mapping[str, Any], device: str, impl: str):
        self.folder, self.config, self.device, self.impl = folder, config, device, impl
        self.vocabulary, self.tasks = run_tasks(config)
        self.seed: int = config["seed"]
        self.ranges = {name: tuple(config["tasks"][name]["train"]) for name in self.tasks}

    def stream_seed(self, salt: int) -> int:
        return self.seed * 1000 + salt

    def task_config(self, task: str) -> Mapping[str, Any]:
        return self.config["tasks"][task]

    def max_length(self, task: str) -> int:
        """The largest length that any stage writes or reads."""
        entry = self.task_config(task)
        return max(entry["test"][1], self.ranges[task][1] + len(entry["merge_beyond"]),
                   *entry["self_lengths"])  # fmt: skip

    def prove(self) -> None:
        """Raises ValueError for lengths that a task has not, and for models that cannot be."""
        for name, task in self.tasks.items():
            entry = self.task_config(name)
            for length in (self.ranges[name][0], *entry["self_lengths"], *entry["hit_matrix"]):
                task.check_length(length)
        for kind in ("looped", "autoregressive"):
            self.model_config(kind)

    def model_config(self, kind: str, supervise: str = "chain") -> ModelConfig:
        """The sizes of the run's models of a kind, looped or autoregressive.

        Raises ValueError for sizes that do not fit together.
        """
        shared = {k: v for k, v in self.config["model"].items() if not isinstance(v, dict)}
        sizes = {**shared, **self.config["model"].get(kind, {})}
        causal = kind == "autoregressive"
        bound = max(
            task.max_sequence_tokens(self.max_length(name))
            if causal
            else task.max_problem_tokens(self.max_length(name))
            for name, task in self.tasks.items()
        )
        pad_to = 0 if causal else recipe(self.config, "looped_aligned").get("pad_to", 0)
        own = [self.task_config(name).get("feedback", {}).get("pad_to", 0) for name in self.tasks]
        pad_to = pad_to if causal else max(pad_to, *own)
        looped = {name: sizes.pop(name) for name in _OF_LOOPED if name in sizes}
        if causal or supervise == "answer":  # they write no rounds that could be fed back
            looped = {}
        elif looped.get("feedback", "none") != "none":
            looped["trained_tokens"] = self._longest_input(looped.get("carry_state", False))
        return ModelConfig(
            BlockConfig(causal=causal, **sizes), self.vocabulary.size, max(bound, pad_to, 16),
            **looped,
        )  # fmt: skip

    def new_model(self, kind: str, supervise: str = "chain"):
        """A fresh model of the run's sizes, from the run's seed."""
        config = self.model_config(kind, supervise)
        torch.manual_seed(self.seed)
        options = {"impl": self.impl, "recompute": self.config["training"].get("recompute", "none")}
        if kind == "autoregressive":
            return AutoregressiveTransformer(config, **options).to(self.device)
        return LoopedTransformer(config, supervise=supervise, **options).to(self.device)

    def _longest_input(self, carry_state: bool) -> int:
        """Tokens of the longest input, padding and cuts included, that the aligned looped model
        trains on; 0 where longer ones hold no other positions."""
        settings = recipe(self.config, "looped_aligned")
        shared = {k: settings[k] for k in ("pad_probability", "pad_to") if k in settings}
        plain = dict.fromkeys(self.tasks, FeedbackDraws(**shared))
        draws = plain if carry_state else self.draws("looped_aligned")
        inputs = [0]
        for name, task in self.tasks.items():
            if carry_state or not task.clips_positions:
                longest = task.max_problem_tokens(self.ranges[name][1])
                padded = draws[name].pad_to if draws[name].pad_probability else 0
                inputs.append(max(longest, task.min_input_tokens, padded) + draws[name].cut)
        return max(inputs)

    def draws(self, stage: str) -> dict[str, FeedbackDraws]:
        """What is drawn for each iteration that a stage trains with feedback, by task.

        Raises ValueError for draws that a task has not, and for a shift beyond the vocabulary.
        """
        settings = recipe(self.config, stage)
        shared = {k: settings[k] for k in ("pad_probability", "pad_to") if k in settings}
        draws = {}
        for name, task in self.tasks.items():
            draws[name] = FeedbackDraws(**{**shared, **self.task_config(name).get("feedback", {})})
            check_draws(task, draws[name])
            shift, last = draws[name].shift, task.vocabulary.max_number
            largest = task.largest_fed(self.ranges[name][1]) + shift
            if shift and largest > last:
                raise ValueError(
                    f"tasks.{name}.feedback.shift = {shift} can need numbers up to {largest}, the "
                    f"vocabulary ends at {last}: use a smaller shift or a larger "
                    f"vocabulary.max_number"
                )
        return draws

    def load(self, name: str):
        return load_run_model(self.folder, name, self.device, self.impl)

    def state_path(self, name: str) -> Path:
        return self.folder / "checkpoints" / f"{name}.state.safetensors"

    def form(self, settings: Mapping[str, Any], kind: str) -> BatchFormat:
        names = ("task_weights", "chain_weight", "weighting", "batch_tokens")
        return BatchFormat(kind, **{k: settings[k] for k in names if k in settings})

    def finish(self, name: str, model, trained: Trained) -> dict[str, Any]:
        """Saves a trained model; the part of results.json that its training brings."""
        save_model(model_path(self.folder, name), model, {"seed": self.seed, "stage": name})
        return {
            "history": {name: trained.history},
            "training": {name: trained.record()},
            "longest_true_problem": trained.longest_true,
        }


def stage_files(folder: Path, name: str) -> list[Path]:
    """What a stage leaves for others, beside its part of results.json."""
    if name == "chains":
        return [folder / "chains.safetensors"]
    return [model_path(folder, name)] if name in MODELS else []


def scratch_files(folder: Path, name: str) -> list[Path]:
    """What a stage keeps only to be continued after an interruption."""
    return list((folder / "checkpoints").glob(f"{name}.*.safetensors"))


def run_stage(context: Context, name: str, report: Report) -> dict[str, Any]:
    """Runs one stage; returns its part of results.json."""
    if name.startswith("evaluate."):
        return _evaluate(context, name.removeprefix("evaluate."), report)
    return _STAGES[name](context, report)


def _reporter(report: Report) -> Callable[[int, int], None]:
    """A progress callback (problems done, all of them) that reports now and then."""
    reported = -math.inf

    def progress(done: int, total: int) -> None:
        nonlocal reported
        now = time.monotonic()
        if now - reported >= LOG_EVERY:
            report(Problems(done, total))
            reported = now

    return progress


# Training from scratch


def _schedule(
    context: Context,
    settings: Mapping[str, Any],
    kind: str,
    samples: int,
    draws: Mapping[str, FeedbackDraws] | None = None,
) -> Schedule:
    """The stage's steps: given as steps, as epochs over `samples`, or as token-iterations, which
    are counted with what is drawn for iterations that train side by side."""
    options = {"warmup": settings["warmup"], "decay": settings["decay"]}
    if "token_iterations" in settings:
        cost = mean_cost(
            context.tasks, context.ranges, kind, settings["batch_size"],
            settings["lengths"], settings.get("curriculum", 0.0), draws,
        )  # fmt: skip
        return Schedule.by_work(settings["token_iterations"], cost, **options)
    if "epochs" in settings:
        steps = settings["epochs"] * samples // settings["batch_size"]
        return Schedule.by_steps(max(1, int(steps)), **options)
    return Schedule.by_steps(settings["steps"], **options)


def _from_scratch(context: Context, name: str, model, kind: str, report: Report):
    settings = recipe(context.config, name)
    size = settings.get("dataset_size")
    names = ("batch_size", "lengths", "lengths_per_batch", "dataset_size", "curriculum",
             "pad_probability", "pad_to", "truth")  # fmt: skip
    form = replace(
        context.form(settings, kind),
        feedback=model.config.feedback != "none", carry_state=model.config.carry_state,
    )  # fmt: skip
    if form.side_by_side:
        form = replace(form, draws=context.draws(name))
    schedule = _schedule(
        context, settings, kind, (size or 0) * len(context.tasks),
        form.draws if form.side_by_side else None,
    )  # fmt: skip
    options = {k: settings[k] for k in names if k in settings}
    if not form.feedback:
        options.pop("truth", None)
    if form.side_by_side:
        options.pop("pad_probability", None)  # each iteration is padded for itself
    stream = TruthStream(
        context.tasks, context.ranges, form, schedule,
        seed=context.stream_seed(_TRAIN), **options,
    )  # fmt: skip
    trained = train_model(
        model, stream, settings, context.state_path(name), seed=context.seed,
        data_workers=context.config["data_workers"], report=report,
    )  # fmt: skip
    return context.finish(name, model, trained)


def _looped_aligned(context: Context, report: Report):
    model = context.new_model("looped", "chain")
    return _from_scratch(context, "looped_aligned", model, "looped", report)


def _looped_vanilla(context: Context, report: Report):
    model = context.new_model("looped", "answer")
    return _from_scratch(context, "looped_vanilla", model, "looped", report)


def _ar_baseline(context: Context, report: Report):
    model = context.new_model("autoregressive")
    return _from_scratch(context, "ar_baseline", model, "autoregressive", report)


# Stage II


def _chains(context: Context, report: Report):
    """The looped model writes chains for every length beyond its training range."""
    model = context.load("looped_aligned")
    parts = []
    for name, task in context.tasks.items():
        longest = context.ranges[name][1]
        counts = context.task_config(name)["merge_beyond"]
        lengths = np.repeat(np.arange(longest + 1, longest + 1 + len(counts)), counts)
        parts.append(task.sample(lengths, context.stream_seed(_CHAINS)))
    problems = Samples.concat(parts)
    stem = context.folder / "checkpoints" / "chains"
    written = generate_in_parts(model, problems, context.tasks, stem, _reporter(report))
    save_samples(context.folder / "chains.safetensors", written, {"model": "looped_aligned"})
    return {"trust": filter_metrics.to_json(filter_metrics.count(written, problems, context.tasks))}


def _in_range_problems(context: Context) -> Samples:
    """The original data of the merged set: true problems inside the training range, ∝ length."""
    parts = []
    for name, task in context.tasks.items():
        shortest, longest = context.ranges[name]
        rng = np.random.default_rng([_INSIDE, context.seed, task.index])
        choices = np.arange(shortest, longest + 1)
        size = context.task_config(name)["merge_inside"]
        lengths = rng.choice(choices, size=size, p=choices / choices.sum())
        parts.append(task.sample(lengths, context.stream_seed(_INSIDE)))
    return Samples.concat(parts)


def _fine_tune(context: Context, stage: str, name: str, model, added: Samples, report: Report):
    """Fine-tunes on the original data merged with `added`, whose chains a model wrote."""
    settings = recipe(context.config, stage)
    sizes = np.diff(added.sequences(context.tasks)[1])
    # A chain gone wrong may never end, and may hold no answer to learn.
    fits = (sizes <= model.config.max_tokens) & (added.answer != NO_ANSWER)
    inside = _in_range_problems(context)
    merged = Samples.concat([inside, added.take(fits)])
    longest_true = {
        name: int(inside.length[inside.task == task.index].max(initial=0))
        for name, task in context.tasks.items()
    }
    schedule = _schedule(context, settings, "autoregressive", len(merged))
    stream = SampleStream(
        merged, context.tasks, context.form(settings, "autoregressive"), schedule,
        batch_size=settings["batch_size"], seed=context.seed, longest_true=longest_true,
    )  # fmt: skip
    return train_model(
        model, stream, settings, context.state_path(name), seed=context.seed,
        data_workers=context.config["data_workers"], report=report,
    )  # fmt: skip


def _ar_relay(context: Context, report: Report):
    model = context.load("ar_baseline")
    written = load_samples(context.folder / "chains.safetensors")
    trained = _fine_tune(context, "ar_relay", "ar_relay", model, written, report)
    return context.finish("ar_relay", model, trained)


# Self-chain controls


def _ar_self(
    context: Context, name: str, keep_filter: Callable[[Samples, Samples], np.ndarray], report
):
    """Five growing phases: the AR model writes chains for lengths beyond its range, those whose
    answer passes `judge` are kept, and it is fine-tuned on them and the original data."""
    model = context.load("ar_baseline")
    phases = max(len(context.task_config(task)["self_lengths"]) for task in context.tasks)
    kept, trained = [], []
    for phase in range(phases):
        problems, stage = _self_problems(context, phase), f"{name}.{phase + 1}"
        passed = _passed(context, stage, model, problems, keep_filter, report)
        kept.append({"phase": phase + 1, "written": len(problems), "kept": len(passed)})
        trained.append(_fine_tune(context, "ar_self", stage, model, passed, report))
    result = context.finish(name, model, Trained.of_phases(trained))
    return {**result, "kept": {name: kept}}


def _passed(context: Context, name: str, model, problems: Samples, keep_filter, report) -> Samples:
    """The chains that the model writes and `judge` keeps; from disk where an interrupted run left
    them."""
    path = context.folder / "checkpoints" / f"{name}.chains.safetensors"
    if path.exists():
        return load_samples(path)
    written = generate_ar_chains(model, problems, context.tasks, progress=_reporter(report))
    passed = written.take(keep_filter(problems, written))
    save_samples(path, passed, {"stage": name})
    return passed


def _self_problems(context: Context, phase: int) -> Samples:
    """Problems of all the lengths up to this phase's, as many of each as the phase has."""
    parts = []
    for name, task in context.tasks.items():
        entry = context.task_config(name)
        lengths = entry["self_lengths"][: phase + 1]
        drawn = np.repeat(lengths, entry["self_counts"][phase])
        parts.append(task.sample(drawn, context.stream_seed(_SELF) + phase))
    return Samples.concat(parts)


def _ar_self_truth(context: Context, report: Report):
    def keep_filter(problems: Samples, written: Samples) -> np.ndarray:
        return written.answer == problems.answer

    return _ar_self(context, "ar_self_truth", keep_filter, report)


def _ar_self_loop(context: Context, report: Report):
    looped = context.load("looped_vanilla")

    def keep_filter(problems: Samples, written: Samples) -> np.ndarray:
        return written.answer == generate_looped_chains(looped, problems, context.tasks).answer

    return _ar_self(context, "ar_self_loop", keep_filter, report)


# Evaluation


def _evaluate(context: Context, name: str, report: Report) -> dict[str, Any]:
    """Accuracy at every length from the shortest to the max_length, and the hit matrices."""
    model = context.load(name)
    problems = context.config["evaluation"]["problems"]
    looped = isinstance(model, LoopedTransformer)
    evaluate = evaluate_looped if looped else evaluate_autoregressive
    accuracy, matrices = {}, {}
    for task, entry in context.config["tasks"].items():
        lengths = range(entry["train"][0], entry["test"][1] + 1)
        accuracy[task] = evaluate(
            model, context.tasks, task, lengths, problems, context.seed, progress=_reporter(report)
        )
        matrices[task] = {}
        for length in entry["hit_matrix"]:
            matrix = hit_matrix(model, context.tasks[task], length, min(problems, 200))
            rows = np.where(np.isnan(matrix), None, matrix.round(4)).tolist()
            matrices[task][str(length)] = {name: rows}
    accuracy = {t: {str(n): row for n, row in by.items()} for t, by in accuracy.items()}
    return {"accuracy": {name: accuracy}, "hit_matrix": matrices}


_STAGES: dict[str, Callable[[Context, Report], dict[str, Any]]] = {
    "looped_aligned": _looped_aligned,
    "looped_vanilla": _looped_vanilla,
    "ar_baseline": _ar_baseline,
    "chains": _chains,
    "ar_relay": _ar_relay,
    "ar_self_loop": _ar_self_loop,
    "ar_self_truth": _ar_self_truth,
}
