"""Example: RELAY on records of one's own, from a JSONL file to an enhanced autoregressive model.

`write_records` stands for your data. A record has a problem, the rounds of its solution and the
answer; here the parity of bits, a round being the bits that are left once the first two are added:

    {"problem": "1 0 1 1", "rounds": ["1 1 1", "0 1", "1"], "answer": "1"}

The rest is `CONFIG`, the same as a TOML file for `python -m relay_fast.train --config FILE`. The
looped model learns from short records and writes chains of longer ones; the autoregressive model
that learned from those chains solves longer problems than the one that did not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from relay_fast.recipes._common import Panel, Problems, draw_panels
from relay_fast.relay.run_folder import RunFolder
from relay_fast.reporting.progress import Display
from relay_fast.reporting.tables import MODEL_NAMES
from relay_fast.utils.settings import Count, Positive, settings

PUBLISHED: dict[str, Any] = {}  # an example, no paper's experiment
MODELS = ("looped_aligned", "ar_baseline", "ar_relay")

CONFIG = """
base = "cpu"                # a preset, whose settings this file changes

[tasks.parity]
data = "parity.jsonl"
train = [1, {trained}]      # rounds of a record
test = [{trained}, {tested}]
hit_matrix = []

[tasks.parity.parameters]
shows = "round"             # a round holds all that the next one needs
title = "Parity"
unit = "rounds"
"""


@settings
class Settings:
    trained: Count = Field(8, description="the most rounds in training")
    tested: Count = Field(10, description="the most rounds of the test")
    records: Count = Field(1500, description="records of each length in the file")
    scale: Positive = Field(0.1, description="share of the preset's steps and problems")
    problems: Problems = 100

    def __post_init__(self) -> None:
        if self.tested <= self.trained:
            raise ValueError(
                f"tested = {self.tested}: give more than trained = {self.trained}, so that there "
                f"is something beyond the training to solve"
            )


PRESETS = {"cpu": Settings()}


def write_records(path: Path, longest: int, each: int, seed: int) -> Path:
    """Writes records of 1, 2, ... `longest` rounds.

    Args:
        path: The JSONL file.
        longest: The most rounds.
        each: Records of each number of rounds.
        seed: Selects the records.

    Returns:
        The path.
    """
    rng = np.random.default_rng(seed)
    with open(path, "w", encoding="utf-8") as file:
        for length in range(1, longest + 1):
            for _ in range(each):
                file.write(json.dumps(parity(rng.integers(0, 2, length + 1).tolist())) + "\n")
    return path


def parity(bits: list[int]) -> dict[str, Any]:
    """Returns the record of a problem."""
    text = lambda bits: " ".join(map(str, bits))
    problem, rounds = text(bits), []
    while len(bits) > 1:
        bits = [bits[0] ^ bits[1], *bits[2:]]
        rounds.append(text(bits))
    return {"problem": problem, "rounds": rounds, "answer": rounds[-1]}


def write_config(folder: Path, s: Settings, seed: int) -> dict[str, Any]:
    """Writes records and a TOML file into a folder.

    Args:
        folder: The folder.
        s: The settings.
        seed: Selects the records.

    Returns:
        The config that `relay_fast.train` takes.
    """
    from relay_fast.relay.presets import override
    from relay_fast.relay.presets.own import read_config

    write_records(folder / "parity.jsonl", s.tested, s.records, seed)
    file = folder / "parity.toml"
    file.write_text(CONFIG.format(trained=s.trained, tested=s.tested))
    return override(read_config(file), scale=s.scale, eval_problems=s.problems, seed=seed)


def run(
    settings: Settings, folder: RunFolder, *, seed: int, device: str, display: Display
) -> dict[str, Any]:
    from relay_fast.train import train

    config = write_config(folder.path, settings, seed)
    stages = [f"evaluate.{name}" for name in MODELS]
    run = folder.path / "relay"
    results = train(config, run, stages=stages, device=device, print_table=False, display=display)
    accuracy = {name: results["accuracy"][name]["parity"] for name in MODELS}
    chains = {
        name: {length: row["chain"] for length, row in by_length.items()}
        for name, by_length in accuracy.items()
    }
    return {"trained": settings.trained, "chains": chains, "trust": results["trust"]["parity"]}


def rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Makes the table: whole chains right, by rounds."""
    lengths = list(results["chains"][MODELS[0]])
    lines = [
        [MODEL_NAMES[name], *(f"{results['chains'][name][length]:.0%}" for length in lengths)]
        for name in MODELS
    ]
    return [f"chains right; trained to {results['trained']} rounds", *lengths], lines


def plot(results: Mapping[str, Any], path: Path) -> Path:
    """Plots the share of chains against their rounds."""
    curves = {
        MODEL_NAMES[name]: ([*map(int, by_length)], [100 * share for share in by_length.values()])
        for name, by_length in results["chains"].items()
    }
    title = f"parity, trained to {results['trained']} rounds"
    panel = Panel(title, "rounds", "chains right (%)", curves, y_range=(-2, 103))
    return draw_panels(path, [panel])
