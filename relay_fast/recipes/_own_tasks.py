"""Recipes on the tasks of a run: those of a config, as `relay_fast.train` takes them.

A recipe whose subject is the model and not the data can be run on them: its `run` takes `tasks`, an
`OwnTasks`. What is learned is the chain, token by token, of true problems in the training range.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from relay_fast.decoding._inference import inference
from relay_fast.models.classifier import LoopedClassifier
from relay_fast.recipes import RECIPES, load_recipe
from relay_fast.recipes._common import Draw
from relay_fast.recipes._compare import Sizes, compare, comparison_plot, comparison_rows
from relay_fast.relay.context import Context
from relay_fast.relay.presets.own import read_config, resolved
from relay_fast.relay.presets.saved import open_run
from relay_fast.relay.presets.schema import RunConfig
from relay_fast.relay.run_folder import RunFolder
from relay_fast.reporting.progress import Display
from relay_fast.tasks import Samples
from relay_fast.utils.seeds import TRAIN_STREAM
from relay_fast.utils.settings import check

PROBLEMS_AT_ONCE = 250


class OwnTasks:
    """The tasks of a run.

    Attributes:
        identity: The part of a config that builds them again.
        vocabulary: Their tokens.
        tasks: By name.
        ranges: {task: (shortest, longest)} lengths in training.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Builds and tries the tasks of a run's config.

        Raises:
            ValueError: The config is invalid, or a task cannot be used.
        """
        check(RunConfig, config)
        context = Context(Path(), config, "cpu", "torch")
        context.prove()
        self.identity = {key: config[key] for key in ("tasks", "vocabulary")}
        self.vocabulary, self.tasks, self.ranges = (
            context.vocabulary,
            context.tasks,
            context.ranges,
        )

    @classmethod
    def read(cls, path: str | Path) -> OwnTasks:
        """Reads the tasks of a config file, or of a run's folder.

        Raises ValueError as the class does, RunFolderError for a folder of something else.
        """
        config = open_run(path).config if Path(path).is_dir() else read_config(path)
        return cls(resolved(config))

    @property
    def label(self) -> dict[str, str]:
        """Returns title and unit, for tables and plots."""
        units = {task.unit for task in self.tasks.values()}
        title = ", ".join(task.title for task in self.tasks.values())
        return {"title": title, "unit": units.pop() if len(units) == 1 else "length"}

    @property
    def lengths(self) -> list[int]:
        """All lengths of which there are unseen problems, from the shortest trained to the longest
        tested one, ascending."""
        entries = self.identity["tasks"]
        found = set()
        for name, task in self.tasks.items():
            found |= {*task.tested_lengths(self.ranges[name][0], entries[name]["test"][1])}
        return sorted(map(int, found))

    def draw(self, batch_size: int, seed: int) -> Draw:
        """Makes the function that draws batches of chains, all tasks and lengths equally often."""
        share = max(1, batch_size // len(self.tasks))

        def draw(rng: np.random.Generator, step: int):
            parts = []
            for name, task in self.tasks.items():
                lengths = rng.choice(task.lengths_between(*self.ranges[name]), share)
                parts.append(task.sample(lengths, seed * 1000 + TRAIN_STREAM, step * share))
            return self._packed(Samples.concat(parts))

        return draw

    def accuracy(self, model: LoopedClassifier, problems: int, seed: int) -> dict[str, float]:
        """Returns {length: share of unseen chains with every token right, given those before it}.

        Args:
            model: A model of chains.
            problems: Of each task and length.
            seed: Selects them.
        """
        accuracy = {}
        for length in self.lengths:
            parts = [
                task.unseen(length, problems, seed)
                for task in self.tasks.values()
                if len(task.tested_lengths(length, length))
            ]
            right = self._right(model, Samples.concat(parts))
            accuracy[str(length)] = float(right.mean())
        return accuracy

    def _right(self, model: LoopedClassifier, samples: Samples) -> np.ndarray:
        device, right = model.embedding.weight.device, [np.zeros(0, bool)]
        with inference(model):
            for first in range(0, len(samples), PROBLEMS_AT_ONCE):
                part = samples.take(slice(first, first + PROBLEMS_AT_ONCE))
                tokens, rows, targets, cu_seqlens = self._packed(part)
                at, read = (torch.from_numpy(a).to(device) for a in (rows, tokens))
                chosen = model.predict(read, at, cu_seqlens=cu_seqlens).cpu().numpy()
                owner = np.searchsorted(cu_seqlens, rows, side="right") - 1
                wrong = np.bincount(owner[chosen != targets], minlength=len(part))
                right.append(wrong == 0)
        return np.concatenate(right)

    def _packed(self, samples: Samples) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
        """Returns tokens (N,), rows (R,) from a problem's last token on, the tokens behind these
        (R,) and cu_seqlens of sequences without their `<eos>`."""
        sequence, offsets, prompts = samples.sequences(self.tasks)
        sequence, sizes = sequence.astype(np.int64), np.diff(offsets)
        owner = np.repeat(np.arange(len(samples)), sizes)
        place = np.arange(len(sequence)) - offsets[:-1][owner]
        read = place < sizes[owner] - 1
        asked = read & (place >= prompts[owner] - 1)
        rows = (np.cumsum(read) - 1)[asked]
        return sequence[read], rows, sequence[1:][asked[:-1]], [0, *np.cumsum(sizes - 1).tolist()]


def check_takes_tasks(name: str, recipe: ModuleType) -> None:
    """Raises ValueError for a recipe that is about data of its own."""
    if "tasks" not in inspect.signature(recipe.run).parameters:
        others = [n for n in RECIPES if "tasks" in inspect.signature(load_recipe(n).run).parameters]
        raise ValueError(
            f"recipe {name} is about data of its own and takes no other tasks: use one of "
            f"{', '.join(others)} with --config"
        )


def compare_own(
    settings: Sizes,
    tasks: OwnTasks,
    folder: RunFolder,
    display: Display,
    *,
    seed: int,
    device: str,
) -> dict[str, Any]:
    """Does what `relay_fast.recipes._compare.compare` does, on the chains of `tasks`."""
    models = compare(
        settings,
        tasks.vocabulary.size,
        tasks.draw(settings.training.batch_size, seed),
        lambda model: tasks.accuracy(model, settings.problems, seed),
        folder,
        display,
        seed=seed,
        device=device,
    )
    return {"models": models, "own": tasks.label}


def own_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Makes the table of `compare_own`."""
    return comparison_rows(results["models"], {}, results["own"]["unit"])


def own_plot(results: Mapping[str, Any], path: Path) -> Path:
    """Plots `compare_own`."""
    title = f"{results['own']['title']}: looped layers against stacks"
    return comparison_plot(results["models"], {}, results["own"]["unit"], title, path)
