"""What the precision of the GEMMs in training costs: looped models in fp32 and in bf16.

    python benchmarks/precision.py [PRESET ...] [--seed 0] [--out runs/precision]

Trains the looped model of each preset twice from the same seed on the same batches, in fp32 and
with bf16 autocast, and evaluates both in fp32. One row a preset, precision and length, written when
a model is done; models that the CSV holds are not trained again, and an interrupted one continues.
A finished run of the preset, copied to `<out>/<preset>-fp32-<seed>`, serves as it is.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common  # noqa: E402
from benchmarks.three_tasks import read_results  # noqa: E402
from relay_fast.relay.presets import load_preset, override, recipe  # noqa: E402
from relay_fast.reporting.plots import new_figure, save_figure  # noqa: E402
from relay_fast.train import train  # noqa: E402

CSV = common.RESULTS / "precision.csv"
PRECISIONS = ("fp32", "bf16")
STAGES = ("looped_aligned", "evaluate.looped_aligned")
OF_TASK = ("train", "test", "parameters", "feedback")  # what a looped model's training depends on
Row = dict[str, str]


def measured(preset: str, precision: str, seed: int, out: Path, scale: float | None) -> list[Row]:
    """Trains and evaluates a looped model; returns its rows."""
    values = [f"training.autocast={precision}", "workers=1"]
    config = override(load_preset(preset), seed=seed, scale=scale, values=values)
    run = out / f"{preset}-{precision}-{seed}"
    results = finished(run, config) or train(config, run, stages=STAGES, print_table=False)
    facts = {"seconds": results["seconds"]["looped_aligned"]} | common.machine("cpu")
    facts["commit"] = results["versions"]["commit"]  # of the training, which may be an older run
    return [
        {"preset": preset, "precision": precision, "seed": str(seed), "task": task,
         "length": length, "trained_to": str(config["tasks"][task]["train"][1]),
         **{key: str(row[key]) for key in ("chain", "answer", "n")}, **facts}
        for task, by_length in results["accuracy"]["looped_aligned"].items()
        for length, row in by_length.items()
    ]  # fmt: skip


def finished(run: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """What a run of the same looped model recorded, None if there is none that is evaluated."""
    if not (run / "results.json").exists():
        return None
    results = read_results(run)
    said = [
        (c["model"], {"autocast": "fp32"} | recipe(c, STAGES[0]),
         {name: [task.get(k) for k in OF_TASK] for name, task in c["tasks"].items()})
        for c in (results["config"], config)
    ]  # fmt: skip
    same = said[0] == said[1]
    return results if same and "looped_aligned" in results["accuracy"] else None


def worst(rows: list[Row]) -> dict[tuple[str, str], float]:
    """Returns per preset and task by how many points, at the worst trained length, the chains of
    the model trained in bf16 are fewer than those of the one trained in fp32."""
    chains = {
        (r["preset"], r["task"], r["precision"], r["seed"], r["length"]): 100 * float(r["chain"])
        for r in rows
        if int(r["length"]) <= int(r["trained_to"])
    }
    lost: dict[tuple[str, str], float] = {}
    for (preset, task, precision, seed, length), chain in chains.items():
        other = chains.get((preset, task, "bf16", seed, length))
        if precision == "fp32" and other is not None:
            key = preset, task
            lost[key] = max(lost.get(key, -100.0), chain - other)
    return lost


def plot(rows: list[Row], path: Path) -> None:
    """Plots chains right by length of both precisions, a panel a preset and task."""
    panels = sorted({(r["preset"], r["task"]) for r in rows})
    wide = min(4, len(panels))
    high = math.ceil(len(panels) / wide)
    figure = new_figure(3.4 * wide + 0.6, 3.2 * high)
    axes = list(figure.subplots(high, wide, squeeze=False, sharey=True).flat)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, key in zip(axes, panels, strict=False):
        own = [r for r in rows if (r["preset"], r["task"]) == key]
        for precision, style in zip(PRECISIONS, ("o-", "x--"), strict=True):
            shown = [r for r in own if r["precision"] == precision]
            chains = [100 * float(r["chain"]) for r in shown]
            axis.plot([int(r["length"]) for r in shown], chains, style, label=precision)
        axis.axvspan(0.5, int(own[0]["trained_to"]) + 0.5, color="0.92", zorder=0)
        axis.set(title=f"{key[0]}: {key[1]}", xlabel="length", ylim=(-3, 103))
        axis.grid(alpha=0.3)
    for first in figure.axes[::wide]:
        first.set_ylabel("chains right, %")
    figure.axes[0].legend(frameon=False)
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("presets", nargs="*", default=["cpu"], metavar="PRESET")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/precision"))
    parser.add_argument("--csv", type=Path, default=CSV)
    parser.add_argument("--scale", type=float, help="share of the training, to try it out")
    a = parser.parse_args(argv)
    a.csv.parent.mkdir(parents=True, exist_ok=True)
    rows = common.read_rows(a.csv)
    for preset in a.presets:
        for precision in PRECISIONS:
            key = preset, precision, str(a.seed)
            if any((r["preset"], r["precision"], r["seed"]) == key for r in rows):
                continue
            rows += measured(preset, precision, a.seed, a.out, a.scale)
            common.write_rows(a.csv, rows)
    plot(rows, a.csv.with_suffix(".png"))
    for (preset, task), points in worst(rows).items():
        print(f"{preset}, {task}: bf16 at most {points:.1f} points below fp32 at a trained length")


if __name__ == "__main__":
    main()
