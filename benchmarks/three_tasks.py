"""The three tasks: what each kind of model reaches inside and beyond the trained range.

    python benchmarks/three_tasks.py --runs runs/cpu-lis-0 runs/cpu-lis-1 runs/cpu-lis-latent-0 …

Collects finished runs of the presets, fed and latent ones, seeds together, from their results.json
(and lengths that were evaluated later from evaluation.json): every length into results.csv, a table
into table.md, plots by task, and hit matrices. Numbers on fewer than `--least` problems are left
out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common  # noqa: E402
from benchmarks.card.table import markdown  # noqa: E402
from benchmarks.recipe_search import beyond  # noqa: E402
from relay_fast.reporting.palette import BLACK, BLUE, GREEN, GREY, ORANGE, VERMILION  # noqa: E402
from relay_fast.reporting.plots import new_figure, plot_hit_matrix, save_figure  # noqa: E402
from relay_fast.reporting.tables import LENGTH_NAMES, METRIC_NAMES, TASK_NAMES  # noqa: E402
from relay_fast.utils.files import write_text  # noqa: E402

RESULTS = common.RESULTS / "three_tasks"
FED, LATENT, VANILLA = "looped, rounds fed back", "looped, latent", "looped, answer only"
BASELINE, RELAY = "AR baseline", "AR, RELAY-enhanced"
MODELS = (LATENT, FED, BASELINE, RELAY, VANILLA)
WRITERS = (LATENT, FED, BASELINE, RELAY)  # of chains
COLORS = {LATENT: ORANGE, FED: BLUE, BASELINE: BLACK, RELAY: VERMILION, VANILLA: GREY}
METRICS = ("chain", "answer", "bit", "answer_once")


class Run(NamedTuple):
    """A run folder: its name, results.json, and accuracies {model: {task: {length: metrics}}}."""

    name: str
    results: dict[str, Any]
    accuracy: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        return self.results["config"]

    @property
    def fed(self) -> bool:
        model = self.config["model"]
        return model.get("looped", {}).get("feedback", model.get("feedback", "none")) != "none"

    def names(self) -> dict[str, str]:
        """The names here of the run's models; chains of a latent loop enhance no model here."""
        own = {"looped_aligned": FED if self.fed else LATENT, "ar_baseline": BASELINE}
        own["looped_vanilla"] = VANILLA
        return own | ({"ar_relay": RELAY} if self.fed else {})


def read_results(folder: Path, file: str = "results.json") -> dict[str, Any]:
    """Reads a JSON file of a run folder. Raises ValueError where there is none of a run."""
    try:
        results = json.loads((folder / file).read_text())
        results["config"]["tasks"], results["versions"]["commit"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds no run of RELAY that can be read: {error}") from error
    return results


def open_run(folder: Path) -> Run:
    """Reads a run folder. Raises ValueError for one that holds no accuracy."""
    results = read_results(folder)
    accuracy = {
        m: {t: dict(by) for t, by in own.items()} for m, own in results.get("accuracy", {}).items()
    }
    if (folder / "evaluation.json").is_file():
        for model, tasks in read_results(folder, "evaluation.json")["accuracy"].items():
            for task, by_length in tasks.items():
                known = accuracy.setdefault(model, {}).setdefault(task, {})
                known |= {n: row for n, row in by_length.items() if n not in known}
    if not accuracy:
        raise ValueError(f"{folder} was not evaluated: finish the run first")
    return Run(folder.name, results, accuracy)


def rows_of(run: Run, least: int) -> list[dict[str, Any]]:
    """A row for each model, task and length that was measured on `least` problems or more."""
    rows, names = [], run.names()
    for model, tasks in run.accuracy.items():
        if model not in names:
            continue
        record = run.results.get("training", {}).get(model, {})
        seconds = record.get("cpu_seconds", record.get("seconds"))
        for task, by_length in tasks.items():
            longest = run.config["tasks"][task]["train"][1]
            for length, cell in sorted((int(n), cell) for n, cell in by_length.items()):
                if cell["n"] < least:
                    continue
                row = {"preset": run.config["name"], "task": task, "model": names[model],
                       "seed": run.config["seed"], "length": length,
                       "trained_to": longest, "n": cell["n"]}  # fmt: skip
                for metric in METRICS:
                    value = cell.get(metric)
                    written = model != "looped_vanilla" or metric in ("answer", "answer_once")
                    row[metric] = round(100 * value, 2) if written and value is not None else ""
                row["training_minutes"] = "" if seconds is None else round(seconds / 60, 2)
                row |= {"run": run.name, "commit": run.results["versions"]["commit"]}
                rows.append(row)
    return rows


def collected(runs: Iterable[Run], least: int) -> list[dict[str, Any]]:
    """The rows of all runs; what a fed and a latent run both hold is the fed one's."""
    rows, owner = [], {}
    for run in sorted(runs, key=lambda run: (not run.fed, run.name)):
        for row in rows_of(run, least):
            key = tuple(row[k] for k in ("preset", "task", "model", "seed"))
            if owner.setdefault(key, run.name) == run.name:
                rows.append(row)
            elif row["model"] in (FED, LATENT):
                raise ValueError(
                    f"{owner[key]} and {run.name} are both {row['model']!r} of {key[0]} with seed "
                    f"{key[3]}: give one of them"
                )
    order = list(TASK_NAMES)
    return sorted(
        rows,
        key=lambda r: (
            r["preset"],
            order.index(r["task"]) if r["task"] in order else len(order),
            r["task"],
            MODELS.index(r["model"]),
            r["seed"],
            r["length"],
        ),
    )


class Curves(NamedTuple):
    """One model on one task of one preset: values[metric][length] are those of its seeds."""

    seeds: list[int]
    minutes: list[float]
    values: dict[str, dict[int, list[float]]]

    @staticmethod
    def of(rows: Sequence[Mapping[str, Any]]) -> Curves:
        values: dict[str, dict[int, list[float]]] = {metric: {} for metric in METRICS}
        for row in rows:
            for metric in METRICS:
                if row[metric] != "":
                    values[metric].setdefault(row["length"], []).append(row[metric])
        minutes = {row["run"]: row["training_minutes"] for row in rows}
        return Curves(
            sorted({row["seed"] for row in rows}), [m for m in minutes.values() if m != ""], values
        )

    def cell(self, metric: str, length: int) -> str:
        return spread(self.values[metric].get(length, []))

    def inside(self, longest: int) -> tuple[str, str]:
        """The mean over the trained lengths, and the least of them."""
        by_seed = [self.values["chain"][n] for n in sorted(self.values["chain"]) if n <= longest]
        if not by_seed:
            return "", ""
        seeds = min(map(len, by_seed))
        values = np.array([row[:seeds] for row in by_seed])
        return spread(values.mean(0).tolist()), spread(values.min(0).tolist())


def spread(values: Sequence[float]) -> str:
    """Mean and range: "98.1 (97.2–99.0)"; one value alone."""
    if not values:
        return ""
    mean, low, high = np.mean(values), min(values), max(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ({low:.1f}–{high:.1f})"


def by_task(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, list]]:
    """{(preset, task): {model: its rows}} in the order of the rows."""
    found: dict[tuple[str, str], dict[str, list]] = {}
    for row in rows:
        models = found.setdefault((row["preset"], row["task"]), {})
        models.setdefault(row["model"], []).append(row)
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of the README: chains right in %, mean and range over seeds."""
    columns = ("preset, task", "model", "seeds", "minutes", "inside, mean", "inside, least length",
               "a fifth beyond", "a third beyond", "farthest", "answers, bits a fifth beyond",
               "answers of one iteration")  # fmt: skip
    lines = []
    for (preset, task), models in by_task(rows).items():
        longest = next(iter(models.values()))[0]["trained_to"]
        fifth, third = beyond(longest)
        for model, own in models.items():
            curves = Curves.of(own)
            measured = [n for by in curves.values.values() for n in by]
            far = max(measured, default=longest)
            chain = lambda n, curves=curves: (
                f"{n}: {text}" if (text := curves.cell("chain", n)) else ""
            )
            answers = [f"{curves.cell('answer', fifth)}", f"{curves.cell('bit', fifth)}"]
            minutes = f"{np.mean(curves.minutes):.1f}" if curves.minutes else ""
            lines.append((
                f"`{preset}`, {TASK_NAMES.get(task, task)} 1–{longest}", model, len(curves.seeds),
                minutes, *curves.inside(longest), chain(fifth), chain(third),
                chain(far) if far not in (fifth, third) else "",
                ", ".join(text for text in answers if text), curves.cell("answer_once", longest),
            ))  # fmt: skip
    counts = sorted({row["n"] for row in rows})
    commits = sorted({str(row["commit"])[:9] for row in rows})
    note = (
        f"Chains right in %, mean (lowest–highest seed); {counts[0]} problems a length or more; "
        f"processor minutes of training (older runs: minutes, other work beside them); answers of "
        f"one iteration: at the longest trained length, a control. Commit {', '.join(commits)}."
    )
    return markdown(columns, lines) + "\n" + note + "\n"


def plot(preset: str, task: str, models: Mapping[str, list], path: Path) -> None:
    """Chains and answers right by length: the mean over seeds, and a band from worst to best."""
    longest = next(iter(models.values()))[0]["trained_to"]
    figure = new_figure(11, 4.6)
    panels = figure.subplots(1, 2, sharey=True)
    handles: dict[str, Any] = {}
    for panel, metric in zip(panels, ("chain", "answer"), strict=True):
        panel.axvspan(0.5, longest + 0.5, color="0.92", zorder=0)
        for model, own in models.items():
            curves = Curves.of(own)
            drawn = [(metric, model, COLORS[model], "-")]
            if model == FED and metric == "answer":
                drawn.append(("answer_once", "rounds fed back, one iteration alone", GREEN, ":"))
            for what, label, color, line in drawn:
                by_length = curves.values[what]
                if not by_length:
                    continue
                lengths = sorted(by_length)
                mean = [float(np.mean(by_length[n])) for n in lengths]
                (handles[label],) = panel.plot(
                    lengths, mean, line, color=color, marker="o", markersize=3, clip_on=False
                )
                low, high = ([f(by_length[n]) for n in lengths] for f in (min, max))
                panel.fill_between(lengths, low, high, color=color, alpha=0.2, linewidth=0)
        panel.set_title(METRIC_NAMES[metric])
        panel.set_xlabel(LENGTH_NAMES.get(task, "length"))
        panel.set_ylim(-2, 103)
        panel.grid(alpha=0.3)
        panel.xaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylabel("correct (%)")
    figure.suptitle(f"{TASK_NAMES.get(task, task)} (preset {preset}), trained on 1 to {longest}")
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False)
    save_figure(figure, path)


def hit_matrices(runs: Iterable[Run]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """{(preset, task, length): {model: matrix}} of the lowest seed that has one."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for run in sorted(runs, key=lambda run: (not run.fed, run.config["seed"])):
        names = run.names()
        for task, by_length in run.results.get("hit_matrix", {}).items():
            for length, matrices in by_length.items():
                own = found.setdefault((run.config["name"], task, length), {})
                for model, matrix in matrices.items():
                    if names.get(model) in WRITERS:
                        own.setdefault(names[model], matrix)
    return {
        key: {model: own[model] for model in WRITERS if model in own} for key, own in found.items()
    }


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, nargs="+", required=True, metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--least", type=int, default=500, help="problems a length (500)")
    args = parser.parse_args(argv)
    try:
        runs = [open_run(folder) for folder in args.runs]
        rows = collected(runs, args.least)
        if not rows:
            raise ValueError(f"no length was measured on {args.least} problems: see --least")
    except ValueError as error:
        parser.error(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    common.write_rows(args.out / "results.csv", rows)
    text = table(rows)
    write_text(args.out / "table.md", text)
    for (preset, task), models in by_task(rows).items():
        plot(preset, task, models, args.out / f"{preset}_{task}.png")
    for (preset, task, length), matrices in hit_matrices(runs).items():
        title = f"{TASK_NAMES.get(task, task)} {length}: share of problems with the token correct"
        if matrices:
            plot_hit_matrix(matrices, title, args.out / f"hits_{preset}_{task}_{length}.png")
    print(text)
    return rows


if __name__ == "__main__":
    main()
