"""Presets: configs of runs, each a TOML file in this folder."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from relay_fast.relay.presets.complete import completed
from relay_fast.relay.presets.schema import LENGTHS_OF_A_STAGE, RunConfig, check_tables
from relay_fast.utils.settings import Count, Seed, changed, check, check_value


def preset_names() -> list[str]:
    """Returns the names of the presets that come with the package."""
    return sorted(
        p.name.removesuffix(".toml") for p in files(__name__).iterdir() if p.name.endswith(".toml")
    )


def load_preset(name: str) -> dict[str, Any]:
    """Reads the run config of a preset. Raises ValueError for an unknown name."""
    if name not in preset_names():
        raise ValueError(f"preset {name!r} is unknown: use one of {', '.join(preset_names())}")
    return tomllib.loads((files(__name__) / f"{name}.toml").read_text(encoding="utf-8"))


def override(
    config: dict[str, Any],
    *,
    tasks: list[str] | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    eval_problems: int | None = None,
    seed: int | None = None,
    scale: float | None = None,
    values: Sequence[str] = (),
) -> dict[str, Any]:
    """Copies a config with changed settings; the result is checked by `RunConfig`.

    `values` are applied first, then `scale`, then the others.

    Args:
        config: A preset.
        tasks: The tasks to keep, by default all.
        steps: Steps of every training stage; generated sets shrink to about one batch.
        batch_size: Batch size of every training stage.
        eval_problems: Problems of each length in evaluation.
        seed: The run's seed.
        scale: Share (0 < scale ≤ 1) of all steps, generated problems and evaluated problems that
            is kept, at least one each.
        values: Texts like "model.d_model=64".

    Raises:
        ValueError: A setting is unknown or out of range.
    """
    config = _with_values(completed(config), values)
    if tasks is not None:
        unknown = [name for name in tasks if name not in config["tasks"]]
        if unknown or not tasks:
            raise ValueError(
                f"task {unknown[0] if unknown else ''!r} is not in preset {config['name']!r}: "
                f"use some of {', '.join(config['tasks'])}"
            )
        config["tasks"] = {name: config["tasks"][name] for name in config["tasks"] if name in tasks}
    check(RunConfig, config)
    if scale is not None:
        if not 0 < scale <= 1:
            raise ValueError(f"scale = {scale:g}: give more than 0 and at most 1")
        _shrink(config, scale)
    for what, value in (("steps", steps), ("batch size", batch_size), ("problems", eval_problems)):
        if value is not None:
            check_value(what, value, Count)
    if seed is not None:
        check_value("seed", seed, Seed)
    if batch_size is not None:
        for stage in (config["training"], *config["stages"].values()):
            stage.pop("batch_tokens", None)
            if "batch_size" in stage or stage is config["training"]:
                stage["batch_size"] = batch_size
    if steps is not None:
        _set_steps(config, steps)
    if eval_problems is not None:
        config["evaluation"]["problems"] = eval_problems
    if seed is not None:
        config["seed"] = seed
    return config


def _set_steps(config: dict[str, Any], steps: int) -> None:
    """Sets the steps of every stage and reduces the generated sets to about a batch, in place."""
    size = config["training"]["batch_size"]
    for stage in config["stages"].values():
        for key in ("epochs", "token_iterations"):
            stage.pop(key, None)
        stage["steps"] = steps
    for task in config["tasks"].values():
        task["merge_inside"] = min(task["merge_inside"], steps * size)
        for key in ("merge_beyond", "self_counts"):
            share = max(1, size // len(task[key]))
            task[key] = [min(n, share) for n in task[key]]


def recipe(config: dict[str, Any], stage: str) -> dict[str, Any]:
    """Returns a training stage's settings: the shared ones, overridden by its own."""
    return {**config["training"], **config["stages"][stage]}


def _with_values(config: dict[str, Any], values: Sequence[str]) -> dict[str, Any]:
    """Copies a config with `values` applied. Raises ValueError for a text without effect."""
    check_tables(config)
    new = changed(config, values, RunConfig)
    check_tables(new)
    for text in values:
        path, _, name = text.partition("=")[0].rpartition(".")
        if (path, name) == ("", "name"):
            raise ValueError(
                f"{text!r}: the name is the preset's own: choose another with --preset"
            )
        if path == "training" and all(name in stage for stage in config["stages"].values()):
            raise ValueError(
                f"{text!r} sets nothing that preset {config['name']!r} holds: each stage has its "
                f"own {name}, set stages.{next(iter(config['stages']))}.{name}"
            )
    for stage, before in zip(new["stages"].values(), config["stages"].values(), strict=True):
        if any(key in stage and key not in before for key in LENGTHS_OF_A_STAGE):
            for key in LENGTHS_OF_A_STAGE:  # the new length replaces one of another kind
                if key in before:
                    del stage[key]
    return new


def _shrink(config: dict[str, Any], scale: float) -> None:
    """Reduces steps, generated problems and evaluated problems to this share, in place."""
    share = lambda n: max(1, math.ceil(n * scale))
    for stage in config["stages"].values():
        for key in ("steps", "epochs", "token_iterations"):
            if key in stage:
                stage[key] = share(stage[key]) if key == "steps" else stage[key] * scale
    for task in config["tasks"].values():
        task["merge_inside"] = share(task["merge_inside"])
        for key in ("merge_beyond", "self_counts"):
            task[key] = [share(n) for n in task[key]]
    config["evaluation"]["problems"] = share(config["evaluation"]["problems"])
