"""How many samples a looped model needs, by the size of the problems, and what larger ones need.

    python benchmarks/learning_curves.py --runs runs/cpu-lis-10 runs/cpu-lis-0 runs/cpu-lis-40 …

Reads runs of one task each, in several sizes a task (`--set tasks.lis.train=[1,10]`): the samples
after which the looped model has 99 % and 99.9 % of the tokens right on the problems that it trains
on, given the true rounds before them. A power law of the longest trained length, through the sizes
of a task, tells what the ranges of preset `paper-fast` would need with the same model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common  # noqa: E402
from benchmarks.card.table import markdown  # noqa: E402
from benchmarks.three_tasks import read_results  # noqa: E402
from relay_fast.relay.presets import load_preset, recipe  # noqa: E402
from relay_fast.reporting.palette import COLORS  # noqa: E402
from relay_fast.reporting.plots import new_figure, save_figure  # noqa: E402
from relay_fast.reporting.tables import LENGTH_NAMES, TASK_NAMES  # noqa: E402
from relay_fast.utils.files import write_text  # noqa: E402

STAGE, LEVELS = "looped_aligned", (0.99, 0.999)
WINDOW = 5  # entries of a history whose mean counts


def curve(results: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Samples seen, and the mean of the last `WINDOW` shares of tokens right."""
    history, record = results["history"][STAGE], results["training"][STAGE]
    share = record["samples"] / history[-1]["step"]
    steps = np.array([entry["step"] for entry in history])
    right = np.array([entry["chain_accuracy"] for entry in history])
    total = np.concatenate([[0.0], np.cumsum(right)])
    first = np.maximum(np.arange(1, len(right) + 1) - WINDOW, 0)
    mean = (total[1:] - total[first]) / (np.arange(1, len(right) + 1) - first)
    return steps * share, mean


def needed(samples: np.ndarray, right: np.ndarray, level: float) -> float | None:
    """Samples from which on the level is held, None if it is not at the end."""
    below = np.flatnonzero(right < level)
    start = below[-1] + 1 if len(below) else 0
    return float(samples[start]) if start < len(samples) else None


def row_of(results: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What a run tells. Raises ValueError for runs of several tasks."""
    config = results["config"]
    if len(config["tasks"]) != 1:
        raise ValueError(f"{name} is a run of {len(config['tasks'])} tasks: give runs of one")
    if STAGE not in results.get("history", {}):
        raise ValueError(f"{name} has no looped model that was trained: finish its training first")
    ((task, entry),) = config["tasks"].items()
    samples, right = curve(results)
    row = {"task": task, "longest": entry["train"][1], "seed": config["seed"],
           "d_model": config["model"]["d_model"], "samples": round(float(samples[-1])),
           "batch_size": recipe(config, STAGE)["batch_size"],
           "max_number": config["vocabulary"]["max_number"]}  # fmt: skip
    for level in LEVELS:
        found = needed(samples, right, level)
        row[f"samples_{level:g}"] = "" if found is None else round(found)
    row["right_at_end"] = round(float(right[-1]), 5)
    return row | {"run": name, "commit": results["versions"]["commit"]}


def power_law(lengths: Sequence[float], samples: Sequence[float]) -> tuple[float, float]:
    """(a, b) of samples = a · length ** b, least squares of the logarithms."""
    b, a = np.polyfit(np.log(lengths), np.log(samples), 1)
    return float(np.exp(a)), float(b)


def predictions(rows: Sequence[Mapping[str, Any]]) -> list[tuple]:
    """For each task and level with two sizes or more: what the ranges of `paper-fast` need."""
    preset, found = load_preset("paper-fast"), []
    settings = recipe(preset, STAGE)
    given = settings["steps"] * (settings["batch_size"] // len(preset["tasks"]))
    for task, entry in preset["tasks"].items():
        for level in LEVELS:
            pairs = [(row["longest"], row[f"samples_{level:g}"]) for row in rows
                     if row["task"] == task and row[f"samples_{level:g}"] != ""]  # fmt: skip
            if len({length for length, _ in pairs}) < 2:
                continue
            a, b = power_law(*zip(*pairs, strict=True))
            longest = entry["train"][1]
            most = max(length for length, _ in pairs)
            measured = max(samples for length, samples in pairs if length == most)
            wanted = max(a * longest**b, measured)  # no falling curve is extrapolated
            sizes = ", ".join(f"{n}: {samples:,}" for n, samples in sorted(pairs))
            found.append((TASK_NAMES[task], f"{level:.1%}", sizes, f"{b:.2f}", longest,
                          f"{wanted:,.0f}", f"{given:,}", f"{given / wanted:.0f}×"))  # fmt: skip
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = ("task", "tokens right", "samples by longest length", "power of the length",
               "paper's longest", "samples it needs", "`paper-fast` gives", "times")  # fmt: skip
    note = (
        "Tokens right given the true rounds before them, in training; the models of the CPU "
        "presets, batches and schedules as in results.csv; the last errors go as the rate decays. "
        "Where the samples fall with the length, those of the longest measured. Extrapolated: none "
        "of what `paper-fast` needs was measured."
    )
    return markdown(columns, predictions(rows)) + "\n" + note + "\n"


def plot(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Tokens wrong against samples seen: a panel a task, a line a size."""
    by_task: dict[str, list[Mapping[str, Any]]] = {}
    for results in runs:
        by_task.setdefault(next(iter(results["config"]["tasks"])), []).append(results)
    figure = new_figure(4.6 * len(by_task), 4.2)
    panels = figure.subplots(1, len(by_task), sharey=True, squeeze=False)[0]
    for panel, (task, own) in zip(panels, by_task.items(), strict=True):
        longest = lambda results, task=task: results["config"]["tasks"][task]["train"][1]
        for color, results in zip(COLORS * len(own), sorted(own, key=longest), strict=False):
            samples, right = curve(results)
            wrong = np.maximum(100 * (1 - right), 1e-3)
            panel.plot(samples, wrong, color=color, label=f"1 to {longest(results)}")
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_title(TASK_NAMES.get(task, task))
        panel.set_xlabel("samples")
        panel.legend(title=LENGTH_NAMES.get(task, "length"), frameon=False)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("tokens wrong in training (%)")
    save_figure(figure, path)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, nargs="+", required=True, metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "learning_curves")
    args = parser.parse_args(argv)
    try:
        runs = [read_results(folder) for folder in args.runs]
        rows = [row_of(run, folder.name) for run, folder in zip(runs, args.runs, strict=True)]
    except ValueError as error:
        parser.error(str(error))
    rows.sort(key=lambda row: (row["task"], row["longest"], row["seed"]))
    args.out.mkdir(parents=True, exist_ok=True)
    common.write_rows(args.out / "results.csv", rows)
    text = table(rows)
    write_text(args.out / "table.md", text)
    plot(runs, args.out / "curves.png")
    print(text)
    return rows


if __name__ == "__main__":
    main()
