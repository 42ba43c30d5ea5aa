"""Presets: runs as data. Each is a TOML file beside this one."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

from relay_fast.config import FEEDBACKS
from relay_fast.policy import Policy
from relay_fast.schedule import DECAYS


class _Range(NamedTuple):
    """The numbers that an option takes, and how to say so."""

    holds: Callable[[float], bool]
    words: str


_COUNT = _Range(lambda x: 1 <= x < math.inf, "at least 1")
_NOT_NEGATIVE = _Range(lambda x: 0 <= x < math.inf, "at least 0")
_POSITIVE = _Range(lambda x: 0 < x < math.inf, "a positive number")
_SHARE = _Range(lambda x: 0 <= x <= 1, "0 to 1")
_BELOW_1 = _Range(lambda x: 0 <= x < 1, "at least 0 and less than 1")

# Of numbers, and of those in a list or table of that name.
_RANGES = {
    **dict.fromkeys(
        ("workers", "problems", "steps", "batch_size", "batch_tokens", "lengths_per_batch",
         "dataset_size", "train", "test", "self_lengths", "self_counts", "merge_inside",
         "merge_beyond", "hit_matrix"),
        _COUNT,
    ),
    **dict.fromkeys(
        ("seed", "data_workers", "pad_to", "weight_decay", "chain_weight", "task_weights",
         "state_noise", "position_range"),
        _NOT_NEGATIVE,
    ),
    **dict.fromkeys(("lr", "muon_lr", "clip", "epochs", "token_iterations"), _POSITIVE),
    **dict.fromkeys(("warmup", "curriculum", "pad_probability", "truth"), _SHARE),
    **dict.fromkeys(("betas", "ema", "dropout", "feedback_noise"), _BELOW_1),
}  # fmt: skip
_CHOICES = {
    "lengths": ("proportional", "uniform"),
    "decay": DECAYS,
    "autocast": ("fp32", "bf16"),
    "weighting": ("sequence", "row"),
    "feedback": FEEDBACKS,
}
# What a preset may leave out, with an example: of every stage's training, and of all together.
_OF_STAGES = {
    "lr": 1e-3, "muon_lr": 0.01, "weight_decay": 0.01, "betas": [0.9, 0.95], "warmup": 0.01,
    "decay": "linear", "clip": 1.0, "ema": 0.999, "autocast": "bf16", "graph": True,
    "batch_size": 32, "batch_tokens": 4096, "weighting": "sequence",
}  # fmt: skip
_OF_TRAINING = _OF_STAGES | {
    "lengths": "proportional", "lengths_per_batch": 4, "dataset_size": 1000, "curriculum": 0.5,
    "pad_probability": 0.3, "pad_to": 32, "truth": 0.5, "chain_weight": 1.0, "recompute": "none",
}  # fmt: skip
_OF_MODEL = {
    "feedback": "none", "carry_state": False, "feedback_noise": 0.1, "position_range": 48,
}  # fmt: skip


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(
        p.name.removesuffix(".toml") for p in files(__name__).iterdir() if p.name.endswith(".toml")
    )


def load_preset(name: str) -> dict[str, Any]:
    """The run config of a preset, a fresh dictionary. Raises ValueError for an unknown name."""
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
    """The config with a run's own choices put in; raises ValueError for what it does not know.

    steps: so many in every training stage (and about one batch of problems in every generated set,
    at least one of each length), for a smoke run. scale: this share (0 < scale ≤ 1) of the steps,
    of the problems in every generated set and of those in evaluation, at least one each, for a
    rehearsal. values: texts like "model.d_model=64" for what the preset holds, or what every
    training takes. They are put in first, then scale, then the others.
    """
    for text in values:
        _put(config, text)
    if tasks is not None:
        unknown = [name for name in tasks if name not in config["tasks"]]
        if unknown or not tasks:
            raise ValueError(
                f"task {unknown[0] if unknown else ''!r} is not in preset {config['name']!r}: "
                f"use some of {', '.join(config['tasks'])}"
            )
        config["tasks"] = {name: config["tasks"][name] for name in config["tasks"] if name in tasks}
    _check(config)
    if scale is not None:
        if not 0 < scale <= 1:
            raise ValueError(f"scale = {scale:g}: give more than 0 and at most 1")
        _shrink(config, scale)
    for what, value in (("steps", steps), ("batch size", batch_size), ("problems", eval_problems)):
        if value is not None and value < 1:
            raise ValueError(f"{what} = {value}: give at least 1")
    if seed is not None and seed < 0:
        raise ValueError(f"seed = {seed}: give at least 0")
    if batch_size is not None:
        for recipe in (config["training"], *config["stages"].values()):
            recipe.pop("batch_tokens", None)
            if "batch_size" in recipe or recipe is config["training"]:
                recipe["batch_size"] = batch_size
    if steps is not None:
        size = config["training"]["batch_size"]
        for recipe in config["stages"].values():
            for key in ("epochs", "token_iterations"):
                recipe.pop(key, None)
            recipe["steps"] = steps
        for task in config["tasks"].values():
            task["merge_inside"] = min(task["merge_inside"], steps * size)
            for key in ("merge_beyond", "self_counts"):
                share = max(1, size // len(task[key]))
                task[key] = [min(n, share) for n in task[key]]
    if eval_problems is not None:
        config["evaluation"]["problems"] = eval_problems
    if seed is not None:
        config["seed"] = seed
    return config


def recipe(config: dict[str, Any], stage: str) -> dict[str, Any]:
    """A training stage's recipe: what all stages share, overridden by its own."""
    return {**config["training"], **config["stages"][stage]}


def _put(config: dict[str, Any], text: str) -> None:
    """Puts in "key.of.a.value=value"."""
    key, equals, value = text.partition("=")
    *path, name = key.split(".")
    table: Any = config
    for part in path:
        table = table.get(part) if isinstance(table, dict) else None
    known = {**_missing(config, path), **table} if isinstance(table, dict) else {}
    if not equals or name not in known:
        raise ValueError(
            f"{text!r} sets nothing that preset {config['name']!r} holds: give a key of "
            f"relay_fast/presets/{config['name']}.toml and a value, like model.d_model=64"
        )
    if key == "name":
        raise ValueError(f"{text!r}: the name is the preset's own: choose another with --preset")
    try:
        new = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        new = value  # a bare word is text
    old = known[name]
    if isinstance(old, dict):
        raise ValueError(f"{text!r}: {key} holds {', '.join(old)}: set one of them, {key}.NAME=…")
    if not _same_kind(new, old):
        raise ValueError(f"{text!r}: {key} is {old!r}, give another {type(old).__name__}")
    if isinstance(old, list) and not all(_same_kind(x, old[0]) for x in new):
        raise ValueError(f"{text!r}: {key} is {old!r}, give a list of {type(old[0]).__name__}")
    table[name] = new


def _missing(config: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """Options that the table at `path` may get, with an example of each; none that every stage
    would overrule."""
    if path == ["training"]:
        own = set.intersection(*(set(stage) for stage in config["stages"].values()))
        return {name: value for name, value in _OF_TRAINING.items() if name not in own}
    if path in (["model"], ["model", "looped"]):
        return _OF_MODEL
    return _OF_STAGES if len(path) == 2 and path[0] == "stages" else {}


def _same_kind(new: Any, old: Any) -> bool:
    return type(new) is type(old) or (type(old), type(new)) == (float, int)


def _check(config: dict[str, Any]) -> None:
    """Raises ValueError for the first value that a run could not use."""
    for path, value in _leaves(config):
        key = ".".join(path)
        accepted = next((_RANGES[name] for name in reversed(path) if name in _RANGES), None)
        for number in value if isinstance(value, list) else [value]:
            if accepted and not accepted.holds(number):
                raise ValueError(f"{key} = {value}: give {accepted.words}")
        choices = _CHOICES.get(path[-1], (value,))
        if value not in choices:
            raise ValueError(f"{key} = {value!r} is unknown: use one of {', '.join(choices)}")
        if path[-1] == "betas" and len(value) != 2:
            raise ValueError(f"{key} = {value}: give two numbers, like [0.9, 0.95]")
    Policy.parse(config["training"].get("recompute", "none"))
    phases = {len(task["self_lengths"]) for task in config["tasks"].values()}
    for name, task in config["tasks"].items():
        for key in ("train", "test"):
            if len(task[key]) != 2 or task[key][0] > task[key][1]:
                raise ValueError(
                    f"tasks.{name}.{key} = {task[key]}: give the shortest and the longest length, "
                    f"like [1, 10]"
                )
        if task["test"][1] < task["train"][0]:
            raise ValueError(
                f"tasks.{name}.test = {task['test']} ends below train = {task['train']}: "
                f"test up to longer problems"
            )
        for key in ("merge_beyond", "self_lengths", "self_counts"):
            if not task[key]:
                raise ValueError(f"tasks.{name}.{key} = []: give at least one number")
        farthest = max(
            task["test"][1], task["train"][1] + len(task["merge_beyond"]), *task["self_lengths"]
        )
        if max(task["hit_matrix"], default=0) > farthest:
            raise ValueError(
                f"tasks.{name}.hit_matrix = {task['hit_matrix']}: give lengths up to {farthest}, "
                f"the longest that this run reads"
            )
        sizes = {len(task["self_lengths"]), len(task["self_counts"])} | phases
        if len(sizes) > 1:
            raise ValueError(
                f"tasks.{name}.self_lengths = {task['self_lengths']} and self_counts = "
                f"{task['self_counts']}: give one of each for every phase, as many in all tasks"
            )


def _leaves(table: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple, Any]]:
    """(path, value) of all that is in the table and those inside it."""
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


def _shrink(config: dict[str, Any], scale: float) -> None:
    """Takes this share of everything that makes a run long."""
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
