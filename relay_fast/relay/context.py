"""A run as its stages see it: folder, config, tasks, and the models of its sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.data.feedback import check_draws, every_iteration, unclear_iterations
from relay_fast.data.streams import BatchFormat
from relay_fast.models.transformers import AutoregressiveTransformer, LoopedTransformer
from relay_fast.relay.presets import recipe
from relay_fast.relay.presets.complete import used_lengths
from relay_fast.relay.presets.saved import run_autocast
from relay_fast.tasks import FeedbackDraws, Task
from relay_fast.training.model_files import load_run_model, model_path, run_tasks, save_model
from relay_fast.training.ranks import Ranks
from relay_fast.training.trainer import Trained
from relay_fast.utils.cores import machine_memory
from relay_fast.utils.lengths import ranges_text
from relay_fast.utils.seeds import TRAIN_STREAM

# Keys of the table `model` that only looped models have.
_OF_LOOPED = ("feedback", "carry_state", "feedback_noise")
# Settings of a stage that training inputs are drawn with; those of a task override them.
_DRAWN = ("pad_probability", "pad_to", "cut", "cut_probability")


class Context:
    """The run that a stage belongs to: folder, config, tasks, models.

    Attributes:
        vocabulary, tasks: Built from the config.
        seed: The run's seed.
        ranks: The processes that run the stage together, by default this one alone.
        ranges: {task: (shortest, longest)} lengths in training.
        inference: Options of all that reads a model.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        device: str,
        impl: str,
        ranks: Ranks | None = None,
    ):
        """Prepares a run.

        Args:
            folder: The run folder.
            config: The run's config.
            device: Where models run.
            impl: Implementation of the kernels.
            ranks: As the attribute.
        """
        self.ranks = ranks or Ranks()
        self.folder, self.config, self.device, self.impl = folder, config, device, impl
        self.vocabulary, self.tasks = run_tasks(config)
        self.seed: int = config["seed"]
        self.inference = {"autocast": run_autocast(config)}
        self.ranges = {name: tuple(config["tasks"][name]["train"]) for name in self.tasks}

    def stream_seed(self, stream: int) -> int:
        """Returns the seed of a sample stream of `relay_fast.utils.seeds`."""
        return self.seed * 1000 + stream

    def task_config(self, task: str) -> Mapping[str, Any]:
        """Returns a task's table of the config."""
        return self.config["tasks"][task]

    def max_length(self, task: str) -> int:
        """Returns the largest length of a task that any stage writes or reads."""
        entry = self.task_config(task)
        return max(
            entry["test"][1],
            self.ranges[task][1] + len(entry["merge_beyond"]),
            *entry["self_lengths"],
        )

    @property
    def data(self) -> dict[str, dict[str, int]]:
        """Counts of the records of the tasks that read them."""
        reports = {n: task.report(*self.ranges[n]) for n, task in self.tasks.items()}
        return {name: report for name, report in reports.items() if report}

    @property
    def untested(self) -> dict[str, list[int]]:
        """The lengths of each task that the run's evaluation has no problems of."""
        ranges = {n: (self.ranges[n][0], self.task_config(n)["test"][1]) for n in self.tasks}
        return untested_lengths(self.tasks, ranges)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of what the tasks draw, of those that have one."""
        found = {n: task.fingerprint(self.ranges[n]) for n, task in self.tasks.items()}
        return {name: digest for name, digest in found.items() if digest is not None}

    @property
    def notes(self) -> list[str]:
        """Warnings about the run before it begins, one sentence each."""
        return [*untested_notes(self.untested), *self._unclear_notes(), *self._unused_notes()]

    def _unused_notes(self) -> list[str]:
        """Names the settings of feedback that do nothing."""
        model, own = self.model_config("looped"), self.config["model"].get("autoregressive", {})
        notes = [
            f"note: model.autoregressive.{name} = {own[name]!r} does nothing: it is of looped "
            f"models, set model.looped.{name}"
            for name in _OF_LOOPED
            if own.get(name, getattr(ModelConfig, name)) != getattr(ModelConfig, name)
        ]
        truth = recipe(self.config, "looped_aligned").get("truth", 1.0)
        if model.feedback == "none" and truth < 1:
            notes.append(
                f"note: truth = {truth} of stages.looped_aligned does nothing: it is for a model "
                f"with feedback that carries its state"
            )
        if model.carry_state:
            notes += [
                f"note: tasks.{name}.feedback is not used: a model with carry_state = true is "
                f"trained with the padding and the cut of stages.looped_aligned"
                for name in self.tasks
                if self.task_config(name).get("feedback")
            ]
        elif model.feedback != "none":
            draws = self.draws("looped_aligned")
            for name, task in self.tasks.items():
                notes += self._unused_draws(task, draws[name], model.feedback_noise)
        return notes

    def _unused_draws(self, task: Task, draws: FeedbackDraws, noise: float) -> list[str]:
        """Does what `_unused_notes` does, for a task whose iterations train side by side."""
        lengths = task.lengths_between(*self.ranges[task.name])[[0, -1]]
        samples = task.sample(np.repeat(lengths, 8), self.stream_seed(TRAIN_STREAM))
        _, _, (inputs, widths, _) = every_iteration(task, samples)
        notes, least = [], widths.min()
        if draws.pad_probability and draws.pad_to <= least:
            notes.append(
                f"note: no input of {task.name} is padded: pad_to = {draws.pad_to}, and the "
                f"shortest has {least} tokens; raise pad_to or leave pad_probability out"
            )
        if noise and not inputs.fed.any():
            notes.append(
                f"note: feedback_noise does nothing for {task.name}, whose inputs have no fed "
                f"tokens beside the problem's"
            )
        return notes

    def _unclear_notes(self) -> list[str]:
        """Names the tasks whose rounds a model that is fed them cannot learn."""
        model = self.model_config("looped")
        if model.feedback == "none" or model.carry_state:
            return []
        notes = []
        for name, task in self.tasks.items():
            lengths = task.lengths_between(*self.ranges[name])[-4:]
            samples = task.sample(np.repeat(lengths, 4), self.stream_seed(TRAIN_STREAM))
            if (found := unclear_iterations(task, samples)) is None:
                continue
            i, *places = found
            problem, rounds = task.decode(samples.problem_of(i)), samples.rounds_of(i)
            one, other = (task.decode(rounds[k]) for k in places)
            notes.append(
                f"note: {name} cannot be learned by a model that is fed its rounds: in the problem "
                f"{problem!r:.60}, rounds {places[0] + 1} and {places[1] + 1} are {one!r:.30} and "
                f"{other!r:.30}, and the iterations that write them see the same; let a round hold "
                f"what is left to do, say more in shown, or set model.looped.feedback = none"
            )
        return notes

    @property
    def labels(self) -> dict[str, dict[str, str]]:
        """Names of the tasks and of what their lengths count, for tables and plots."""
        return {name: task.label for name, task in self.tasks.items()}

    def prove(self) -> None:
        """Raises ValueError for lengths that a task does not support or cannot draw, for invalid
        model sizes and for models that do not fit into this machine's memory."""
        for name, task in self.tasks.items():
            task.check_range(*self.ranges[name])
            entry = self.task_config(name)
            task.prove(used_lengths(entry))
            for length in entry["self_lengths"]:
                if task.most_problems(length) == 0:
                    raise ValueError(
                        f"tasks.{name}.self_lengths has {length}, of which no problem can be "
                        f"drawn: add some, which may come without rounds, or give other lengths"
                    )
        for kind in ("looped", "autoregressive"):
            _check_memory(self.model_config(kind))
        self._check_feedback(self.model_config("looped"))
        self._unclear_notes()  # makes what a model is fed, by a task's own code

    def _check_feedback(self, model: ModelConfig) -> None:
        """Raises ValueError for settings that the looped model's feedback does not fit."""
        if model.feedback == "none" or model.carry_state:
            return
        truth = recipe(self.config, "looped_aligned").get("truth", 1.0)
        if truth < 1:
            raise ValueError(
                f"truth = {truth} of stages.looped_aligned is for a model that carries its state: "
                f"leave it out, or set model.looped.carry_state = true"
            )
        for name, task in self.tasks.items():
            length, last = self.max_length(name), task.vocabulary.max_number
            if last is not None and (largest := task.largest_fed(length)) > last:
                raise ValueError(
                    f"tasks.{name}: with rounds fed back, length {length} can need numbers up to "
                    f"{largest}, the vocabulary ends at {last}: use shorter problems or a larger "
                    f"vocabulary.max_number"
                )

    def model_config(self, kind: str, supervise: str = "chain") -> ModelConfig:
        """Returns the config of the run's models of a kind.

        Args:
            kind: "looped" or "autoregressive".
            supervise: What a looped model is trained on, "chain" or "answer".

        Raises:
            ValueError: Sizes do not fit together.
        """
        kinds = ("looped", "autoregressive")
        shared = {k: v for k, v in self.config["model"].items() if k not in kinds}
        sizes = {**shared, **self.config["model"].get(kind, {})}
        causal = kind == "autoregressive"
        bound = max(
            (task.max_sequence_tokens if causal else task.max_input_tokens)(self.max_length(name))
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
            BlockConfig(causal=causal, **sizes),
            self.vocabulary.size,
            max(bound, pad_to, 16),
            **looped,
        )

    def new_model(self, kind: str, supervise: str = "chain"):
        """Builds a model of the run's sizes, initialised from the run's seed."""
        config = self.model_config(kind, supervise)
        torch.manual_seed(self.seed)
        options = {"impl": self.impl, "recompute": self.config["training"].get("recompute", "none")}
        if kind == "autoregressive":
            return AutoregressiveTransformer(config, **options).to(self.device)
        return LoopedTransformer(config, supervise=supervise, **options).to(self.device)

    def _longest_input(self, carry_state: bool) -> int:
        """Returns the tokens of the longest training input of the aligned looped model, padding and
        cuts included; 0 where longer inputs hold no other positions."""
        settings = recipe(self.config, "looped_aligned")
        shared = {k: settings[k] for k in _DRAWN if k in settings}
        plain = dict.fromkeys(self.tasks, FeedbackDraws(**shared))
        draws = plain if carry_state else self.draws("looped_aligned")
        inputs = [0]
        for name, task in self.tasks.items():
            if carry_state or not task.clips_positions:
                longest = task.max_input_tokens(self.ranges[name][1])
                padded = draws[name].pad_to if draws[name].pad_probability else 0
                shortest, last = self.ranges[name]
                least = int(task.min_widths(np.arange(shortest, last + 1)).max())
                inputs.append(max(longest, least, padded) + draws[name].cut)
        return max(inputs)

    def draws(self, stage: str) -> dict[str, FeedbackDraws]:
        """By task, the random changes of each iteration that a stage trains with feedback.

        Raises ValueError for draws that a task has not, and for a shift beyond the vocabulary.
        """
        settings = recipe(self.config, stage)
        shared = {k: settings[k] for k in _DRAWN if k in settings}
        draws = {}
        for name, task in self.tasks.items():
            own = self.task_config(name).get("feedback", {})
            if task.clips_positions:
                own = {"cut": 0, **own}
            draws[name] = FeedbackDraws(**{**shared, **own})
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
        """Loads a trained model of the run."""
        return load_run_model(self.folder, name, self.device, self.impl)

    def state_path(self, name: str) -> Path:
        """Returns the path of a stage's training state."""
        return self.folder / "checkpoints" / f"{name}.state.safetensors"

    def form(self, settings: Mapping[str, Any], kind: str) -> BatchFormat:
        """Returns the batch format of a stage with these settings."""
        names = ("task_weights", "chain_weight", "weighting", "batch_tokens")
        return BatchFormat(kind, **{k: settings[k] for k in names if k in settings})

    def finish(self, name: str, model, trained: Trained) -> dict[str, Any]:
        """Saves a model after training.

        Args:
            name: The model's name.
            model: The model.
            trained: What the training returned.

        Returns:
            The training's part of results.json.
        """
        if not self.ranks.writes:
            self.ranks.same(None)  # the model is there when other stages read it
            return {}
        info = {"seed": self.seed, "stage": name}
        if self.vocabulary.tokens:
            info["vocabulary"] = self.vocabulary.to_dict()
        save_model(model_path(self.folder, name), model, info)
        self.ranks.same(None)
        return {
            "history": {name: trained.history},
            "training": {name: trained.record()},
            "longest_true_problem": trained.longest_true,
        }


def untested_lengths(
    tasks: Mapping[str, Task], ranges: Mapping[str, Sequence[int]]
) -> dict[str, list[int]]:
    """Returns the lengths in these ranges that there are no unseen problems of, by task; tasks that
    lack none are left out."""
    missing = {}
    for name, task in tasks.items():
        shortest, longest = ranges[name]
        tested = set(task.tested_lengths(shortest, longest).tolist())
        missing[name] = [n for n in range(shortest, longest + 1) if n not in tested]
    return {name: lengths for name, lengths in missing.items() if lengths}


def untested_notes(untested: Mapping[str, Sequence[int]]) -> list[str]:
    """Says for each task which lengths no table shows."""
    return [
        f"note: {name} has no solved problems for evaluation of {ranges_text(lengths)}, which no "
        f"table shows"
        for name, lengths in untested.items()
    ]


def _check_memory(config: ModelConfig) -> None:
    """Raises ValueError for a model whose weights and gradients are more than the machine holds: on
    a CPU too they are allocated, one by one, until the system gives no more."""
    layers, one_layer = config.block.n_layers, replace(config.block, n_layers=1)
    try:
        with torch.device("meta"):
            model = LoopedTransformer(replace(config, block=one_layer))
        layer = sum(p.nbytes for p in model.block.layers.parameters())
        needed = 2 * (sum(p.nbytes for p in model.parameters()) + (layers - 1) * layer)
    except (RuntimeError, TypeError):  # sizes beyond what a tensor can have
        needed = math.inf
    if needed > (have := machine_memory()):
        raise ValueError(
            f"model: its weights and their gradients take {needed / 1e9:.3g} GB and this machine "
            f"has {have / 1e9:.3g}: give smaller sizes (d_model, n_layers, d_hidden)"
        )
