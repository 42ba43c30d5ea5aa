"""Draws README's pictures from the files of results: `python benchmarks/pictures.py`.

One style for all: no background, middling greys and colours, so that they read in light and dark.

- `loop.svg`: what the engine computes and keeps, and how RELAY uses the iterations
- `memory.svg`: bytes of a training step against T (memory_vs_loops.csv)
- `accuracy.svg`: whole chains right by length, of every task that has results
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import picture_of_loop  # noqa: E402
from benchmarks.picture_style import (  # noqa: E402
    COLORS_OF,
    INK,
    STYLES_OF,
    save,
    styled,
    svg_figure,
)

RESULTS = Path(__file__).parent / "results"
WIDTH = 8.6  # inches: README's width
MIB = 2**20
MEMORY_LINES = {
    ("eager_bucketed", ""): "eager PyTorch",
    ("eager_bucketed_checkpoint", ""): "eager, a checkpoint an iteration",
    ("compile_bucketed", ""): "torch.compile",
    ("relay_fast", "none"): "relay_fast, none",
    ("relay_fast", "state"): "relay_fast, state",
    ("relay_fast", "sqrt"): "relay_fast, sqrt",
}
MODELS = {
    "looped_aligned": "looped, aligned",
    "ar_relay": "AR, RELAY-enhanced",
    "ar_baseline": "AR baseline",
}
OF_TABLE = {
    "looped, rounds fed back": "looped_aligned",
    "AR, RELAY-enhanced": "ar_relay",
    "AR baseline": "ar_baseline",
}

Curve = tuple[list[int], list[float]]


class Panel(NamedTuple):
    """Accuracy of one task: for each model the curves of its seeds, in percent."""

    title: str
    x: str
    trained_to: int
    curves: dict[str, list[Curve]]


def accuracy_panels(results: Path = RESULTS) -> list[Panel]:
    """Reads whole chains right by length of every task: three compiled ones, and two runs."""
    with open(results / "three_tasks" / "results.csv", newline="") as file:
        table = list(csv.DictReader(file))
    titles = {
        "arithmetic": ("arithmetic mod 11, + − × ÷", "operators"),
        "edit_distance": ("edit distance", "letters"),
        "lis": ("longest increasing subsequence", "numbers"),
    }
    panels = []
    for task, (title, unit) in titles.items():
        own = [row for row in table if row["task"] == task]
        curves: dict[str, list[Curve]] = {}
        for name, model in OF_TABLE.items():
            rows = [row for row in own if row["model"] == name]
            for seed in sorted({row["seed"] for row in rows}):
                points = [(int(r["length"]), float(r["chain"])) for r in rows if r["seed"] == seed]
                lengths, values = zip(*sorted(points), strict=True)
                curves.setdefault(model, []).append(([*lengths], [*values]))
        panels.append(Panel(title, unit, int(own[0]["trained_to"]), curves))
    addition = json.loads((results / "addition" / "results.json").read_text())
    panels.append(_panel_of_run(addition, "addition", "addition, a digit a round", "digits"))
    latent = json.loads((results / "cpu_latent" / "results.json").read_text())
    title = "arithmetic mod 3, +, the paper's loop"
    return [*panels, _panel_of_run(latent, "arithmetic", title, "operators")]


def _panel_of_run(results: Mapping[str, Any], task: str, title: str, unit: str) -> Panel:
    curves = {}
    for model in MODELS:
        by_length = results["accuracy"].get(model, {}).get(task)
        if by_length:
            lengths = sorted(map(int, by_length))
            curves[model] = [(lengths, [100 * by_length[str(n)]["chain"] for n in lengths])]
    return Panel(title, unit, results["train_lengths"][task][1], curves)


def memory_lines(path: Path = RESULTS / "memory_vs_loops.csv") -> dict[str, dict[str, Curve]]:
    """Reads MiB by loops: {"saved_bytes" or "peak_bytes": {label: (loops, MiB)}}."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    found: dict[str, dict[str, Curve]] = {}
    for column in ("saved_bytes", "peak_bytes"):
        found[column] = {}
        for (provider, policy), label in MEMORY_LINES.items():
            points = {
                int(row["loops"]): int(row[column]) / MIB
                for row in rows
                if (row["provider"], row["policy"]) == (provider, policy)
            }
            if points:
                found[column][label] = ([*sorted(points)], [points[t] for t in sorted(points)])
    return found


def draw_memory(lines: Mapping[str, Mapping[str, Curve]], path: Path) -> Path:
    """Draws MiB against loops, kept and at the peak."""
    figure = svg_figure(WIDTH, 3.7)
    panels = figure.subplots(1, 2, sharey=True)
    titles = ("kept between forward and backward", "peak of a training step")
    for axes, title, own in zip(panels, titles, lines.values(), strict=True):
        for label, (loops, values) in own.items():
            axes.loglog(loops, values, label=label, markersize=4, **STYLES_OF[label])
        ticks = next(iter(own.values()))[0]
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.minorticks_off()
        axes.set_title(title)
        axes.set_xlabel("loops T")
        styled(axes)
    panels[0].set_ylabel("MiB")
    handles, labels = panels[0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    for text in legend.get_texts():
        text.set_color(INK)
    return save(figure, path, lines)


def draw_accuracy(panels: Sequence[Panel], path: Path) -> Path:
    """Draws a panel for each task, three in a row, with the legend in the free place."""
    rows = -(-(len(panels) + 1) // 3)
    figure = svg_figure(WIDTH, 2.6 * rows)
    places = figure.subplots(rows, 3, sharey=True).flat
    handles = {}
    for axes, panel in zip(places, panels, strict=False):
        first = min(lengths[0] for curves in panel.curves.values() for lengths, _ in curves)
        last = max(lengths[-1] for curves in panel.curves.values() for lengths, _ in curves)
        axes.axvspan(first - 0.5, panel.trained_to + 0.5, color=INK, alpha=0.14, linewidth=0)
        for model, curves in panel.curves.items():
            for lengths, values in curves:
                (line,) = axes.plot(
                    lengths, values, markersize=3.5, clip_on=False, **COLORS_OF[model]
                )
            handles[MODELS[model]] = line
        axes.set_xlim(first - 0.5, last + 0.5)
        axes.set_ylim(-3, 103)
        axes.set_title(panel.title, fontsize=9)
        axes.set_xlabel(panel.x)
        styled(axes)
    for axes in [*figure.axes][::3]:
        axes.set_ylabel("chains right (%)")
    free = figure.axes[len(panels)]
    free.axis("off")
    order = [name for name in MODELS.values() if name in handles]
    legend = free.legend([handles[n] for n in order], order, loc="center", frameon=False)
    legend.set_title("shaded: the lengths of the training")
    for text in (*legend.get_texts(), legend.get_title()):
        text.set_color(INK)
    return save(figure, path, panels)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws all pictures into a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, default=RESULTS / "pictures", metavar="FOLDER")
    to = parser.parse_args(arguments).to
    for path in (
        picture_of_loop.draw(to / "loop.svg"),
        draw_memory(memory_lines(), to / "memory.svg"),
        draw_accuracy(accuracy_panels(), to / "accuracy.svg"),
    ):
        print(f"picture: {path}")
    return 0


if __name__ == "__main__":
    main()
