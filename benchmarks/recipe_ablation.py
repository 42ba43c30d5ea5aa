"""What each choice of a recipe is worth, at a small scale.

The looped model of preset `cpu-latent`, with noise on its state and no cut in its positions, and
one choice taken back at a time:

    python benchmarks/recipe_ablation.py [--work 3e6] [--seeds 0 1] [--only base no_curriculum]

One row a training, written as it ends: the share of chains right at the longest trained length and
beyond it, and the mean over all trained lengths. Every training gets the same work in
token-iterations and never sees a problem longer than its range. The same command goes on with the
trainings that the CSV does not hold yet, and draws all that it holds.

With --task it is the search of the recipes for rounds fed back as tokens, one task at a time
(`benchmarks/recipe_search.py`):

    python benchmarks/recipe_ablation.py --task edit_distance [--variants base,no_cut] [--seeds 0,1]
        [--scale 0.4]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common, recipe_search  # noqa: E402
from relay_fast.relay.evaluation import evaluate_looped  # noqa: E402
from relay_fast.relay.presets import load_preset, override  # noqa: E402
from relay_fast.relay.stages import Context, run_stage  # noqa: E402
from relay_fast.reporting.palette import SKY  # noqa: E402
from relay_fast.reporting.plots import new_figure  # noqa: E402

TASK, STAGE = "arithmetic", "looped_aligned"
Config = dict[str, Any]
# The base of the rows that the CSV holds, whatever the preset has learned from them.
BASE = ["model.looped.state_noise=0.1", "stages.looped_aligned.cut=0"]


def _without(*keys: str) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        for key in keys:
            config["stages"][STAGE].pop(key, None)
            config["training"].pop(key, None)

    return change


def _with(**values: Any) -> Callable[[Config], None]:
    return lambda config: config["stages"][STAGE].update(values)


def _looped(**values: Any) -> Callable[[Config], None]:
    return lambda config: config["model"]["looped"].update(values)


def _plain_state(config: Config) -> None:
    config["model"]["looped"].clear()  # with the norm goes the noise, which needs its scale


def _both(*changes: Callable[[Config], None]) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        for one in changes:
            one(config)

    return change


CHANGES: dict[str, Callable[[Config], None]] = {
    "base": lambda config: None,
    "adamw": _without("muon_lr"),
    "adamw_lr_3e-3": _both(_without("muon_lr"), _with(lr=3e-3)),
    "no_loop_norm": _plain_state,
    "adamw_lr_3e-3_no_loop_norm": _both(_without("muon_lr"), _with(lr=3e-3), _plain_state),
    "no_noise": _looped(state_noise=0.0),
    "adamw_lr_3e-3_no_noise": _both(_without("muon_lr"), _with(lr=3e-3), _looped(state_noise=0.0)),
    "no_padding": _without("pad_probability", "pad_to"),
    "no_curriculum": _with(curriculum=0.0),
    "ema": _with(ema=0.99),
    "uniform_lengths": _with(lengths="uniform"),
    "batch_128": _with(batch_size=128),
    "row_weighting": _with(weighting="row"),
    "layers_3": lambda config: config["model"].update(n_layers=3),
    "linear_decay": _with(decay="linear"),
    "all_lengths": _without("lengths_per_batch"),
    "fixed_data": _with(dataset_size=20000),
    "bf16": _with(autocast="bf16"),
}


def trained(name: str, work: float, seed: int, problems: int) -> dict[str, float]:
    """Chains right after the training `name`."""
    config = override(load_preset("cpu-latent"), seed=seed, values=BASE)
    config["stages"][STAGE]["token_iterations"] = work
    CHANGES[name](config)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "checkpoints").mkdir()
        context = Context(Path(folder), config, "cpu", "auto")
        result = run_stage(context, STAGE, lambda progress: None)
        model = context.load(STAGE)
    longest = context.ranges[TASK][1]
    right = evaluate_looped(model, context.tasks, TASK, range(1, longest + 4), problems, seed)
    chain = {length: row["chain"] for length, row in right.items()}
    return {
        "trained_mean": round(float(np.mean([chain[n] for n in range(1, longest + 1)])), 4),
        "longest": chain[longest],
        "beyond_1": chain[longest + 1],
        "beyond_2": chain[longest + 2],
        "beyond_3": chain[longest + 3],
        "longest_true_problem": result["longest_true_problem"][TASK],
    }


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """Chains right inside and beyond the trained range: a bar a change, a dot a seed."""
    names = [name for name in CHANGES if any(row["change"] == name for row in rows)]
    columns = {"trained_mean": "mean of 1 to 10", "beyond_1": "11", "beyond_2": "12",
               "beyond_3": "13"}  # fmt: skip
    figure = new_figure(11, 0.32 * len(names) + 1.2)
    places = range(len(names))
    for axis, (column, title) in zip(
        figure.subplots(1, 4, sharey=True), columns.items(), strict=True
    ):
        seen = [[100 * float(r[column]) for r in rows if r["change"] == name] for name in names]
        axis.barh(places, [float(np.mean(values)) for values in seen], color=SKY)
        for place, values in zip(places, seen, strict=True):
            axis.plot(values, [place] * len(values), "k.", markersize=4)
        axis.set_title(title)
        axis.set_xlim(0, 101)
        axis.grid(axis="x", alpha=0.3)
    axis.set_yticks(places, names)
    axis.invert_yaxis()
    figure.supxlabel("chains right (%), by number of operators; trained on 1 to 10")
    figure.savefig(path, dpi=120)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=float, default=3e6, help="token-iterations a training (3e6)")
    parser.add_argument("--seeds", type=common.comma_separated(int), nargs="+", default=[[0]])
    parser.add_argument("--only", nargs="+", choices=CHANGES, default=list(CHANGES))
    parser.add_argument("--problems", type=int, default=500, help="problems a length (500)")
    parser.add_argument("--csv", type=Path, help="file of the rows, by default the one in results")
    search = parser.add_argument_group("search of the recipes with feedback")
    search.add_argument("--task", choices=recipe_search.PRESETS)
    search.add_argument("--variants", type=common.comma_separated(str), help="default all")
    search.add_argument("--scale", type=float, default=1.0, help="share of the preset's work (1)")
    search.add_argument("--show", action="store_true", help="only print the variants' settings")
    return parser


def main(argv: list[str] | None = None) -> list[dict[str, object]]:
    parser = _parser()
    args = parser.parse_args(argv)
    seeds = [seed for several in args.seeds for seed in several]
    if args.task is not None:
        path = args.csv or recipe_search.ROWS
        try:
            if args.show:
                print(recipe_search.shown(args.task, args.variants))
                return []
            return recipe_search.search(
                args.task, args.variants, seeds, args.scale, args.problems, path
            )
        except ValueError as error:
            parser.error(str(error))
    args.csv = args.csv or common.RESULTS / "recipe_ablation.csv"
    rows = []
    for seed in seeds:
        for name in args.only:
            row = {"change": name, "seed": seed, "token_iterations": f"{args.work:g}",
                   "problems": args.problems}  # fmt: skip
            held = common.read_rows(args.csv)
            if any(all(old.get(k) == str(v) for k, v in row.items()) for old in held):
                continue
            row |= trained(name, args.work, seed, args.problems)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            common.append_rows(args.csv, [row | common.machine("cpu")])
            rows.append(row)
    same = {"token_iterations": f"{args.work:g}", "problems": str(args.problems)}
    held = [r for r in common.read_rows(args.csv) if same.items() <= r.items()]
    plot(held, args.csv.with_suffix(".png"))
    return rows


if __name__ == "__main__":
    main()
