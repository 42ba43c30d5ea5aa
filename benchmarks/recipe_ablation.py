"""What each choice of a recipe is worth, at a small scale.

The looped model of preset `cpu`, with one choice taken back at a time:

    python benchmarks/recipe_ablation.py [--work 2e6] [--seeds 0 1] [--only base no_curriculum]

One row a training: the share of chains right at the longest trained length and beyond it, and the
mean over all trained lengths. Every training gets the same work in token-iterations and never sees
a problem longer than its range.
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

from benchmarks import common  # noqa: E402
from relay_fast.evaluate import evaluate_looped  # noqa: E402
from relay_fast.presets import load_preset, override  # noqa: E402
from relay_fast.stages import Context, run_stage  # noqa: E402

TASK, STAGE = "arithmetic", "looped_aligned"
Config = dict[str, Any]


def _without(*keys: str) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        for key in keys:
            config["stages"][STAGE].pop(key, None)
            config["training"].pop(key, None)

    return change


def _with(**values: Any) -> Callable[[Config], None]:
    return lambda config: config["stages"][STAGE].update(values)


def _no_loop_norm(config: Config) -> None:
    config["model"]["looped"] = {}


CHANGES: dict[str, Callable[[Config], None]] = {
    "base": lambda config: None,
    "adamw": _without("muon_lr"),
    "no_curriculum": _with(curriculum=0.0),
    "uniform_lengths": _with(lengths="uniform"),
    "no_padding": _without("pad_probability", "pad_to"),
    "linear_decay": _with(decay="linear"),
    "no_loop_norm": _no_loop_norm,  # and no noise on the states, which needs the norm's scale
    "batch_128": _with(batch_size=128),
    "ema": _with(ema=0.99),
    "fixed_data": _with(dataset_size=20000),
    "bf16": _with(autocast="bf16"),
}


def trained(name: str, work: float, seed: int, problems: int) -> dict[str, float]:
    """Chains right after the training `name`."""
    config = override(load_preset("cpu"), seed=seed)
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


def main(argv: list[str] | None = None) -> list[dict[str, object]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=float, default=2e6, help="token-iterations a training (2e6)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=CHANGES, default=list(CHANGES))
    parser.add_argument("--problems", type=int, default=500, help="problems a length (500)")
    parser.add_argument("--csv", type=Path, default=common.RESULTS / "recipe_ablation.csv")
    args = parser.parse_args(argv)
    rows = []
    for seed in args.seeds:
        for name in args.only:
            row = {"change": name, "seed": seed, "token_iterations": f"{args.work:g}"}
            row |= trained(name, args.work, seed, args.problems)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            common.append_rows(args.csv, [row | common.machine("cpu")])
            rows.append(row)
    return rows


if __name__ == "__main__":
    main()
