"""What the precision of the GEMMs in inference costs: chains of finished models in fp32 and bf16.

    python benchmarks/inference_precision.py [RUN ...] [--models NAMES] [--number 200]

Trained models solve the same problems in both precisions, at lengths inside their training range
and beyond it. One row a run, model, task and length, written when it is done: which share of the
chains is right in each precision, is the same token for token, and which share of the fp32 tokens
the chains in bf16 do not have at their place (in a looped model's round counted from the right).
Rows that the CSV holds are not measured again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common  # noqa: E402
from relay_fast.decoding.chains import (  # noqa: E402
    fitting_problems,
    generate_ar_chains,
    generate_looped_chains,
)
from relay_fast.models.transformers import LoopedTransformer  # noqa: E402
from relay_fast.relay.presets.saved import open_run  # noqa: E402
from relay_fast.reporting.plots import new_figure, save_figure  # noqa: E402
from relay_fast.tasks import Samples, Task  # noqa: E402
from relay_fast.tasks.base import matches  # noqa: E402
from relay_fast.training.model_files import (  # noqa: E402
    Model,
    load_run_model,
    model_hash,
    model_path,
    run_tasks,
)
from relay_fast.utils.precision import DTYPES  # noqa: E402

CSV = common.RESULTS / "inference_precision.csv"
MODELS = "looped_aligned,ar_relay"
KEY = ("run", "model", "task", "length")
Row = dict[str, str]


def compared(model: Model, task: Task, length: int, number: int) -> dict[str, str]:
    """Solves problems of one length in every precision; returns the shares."""
    problems, tasks = fitting_problems([model], task, length, number, seed=0), {task.name: task}
    generate = generate_ar_chains
    if isinstance(model, LoopedTransformer):
        generate = generate_looped_chains
    chains = {name: generate(model, problems, tasks, autocast=name) for name in DTYPES}
    right = {name: np.mean(same_rounds(problems, own)) for name, own in chains.items()}
    tokens = np.array([*differing(chains["fp32"], chains["bf16"])]).sum(0)
    shares = {f"right_{name}": share for name, share in right.items()}
    shares["same"] = np.mean(same_rounds(chains["fp32"], chains["bf16"]))
    shares["differing_tokens"] = tokens[0] / max(1, tokens[1])
    return {"n": str(len(problems)), **{name: f"{value:.5g}" for name, value in shares.items()}}


def same_rounds(a: Samples, b: Samples) -> list[bool]:
    """Tells of each chain of a whether b's has the same rounds, token for token."""
    return [all(matches(a.rounds_of(i), b.rounds_of(i))) for i in range(len(a))]


def differing(a: Samples, b: Samples) -> Iterator[tuple[int, int]]:
    """Yields per chain of a how many of its tokens b's has not at their place, and how many it
    has."""
    for i in range(len(a)):
        rounds, others = ([[*map(int, r)] for r in s.rounds_of(i)] for s in (a, b))
        others += [[]] * (len(rounds) - len(others))
        pairs = [zip(r[::-1], o[::-1], strict=False) for r, o in zip(rounds, others, strict=False)]
        kept = sum(x == y for pair in pairs for x, y in pair)
        size = sum(map(len, rounds))
        yield size - kept, size


def chosen_lengths(task: Task, train: list[int], test: list[int]) -> list[int]:
    """Returns half of the longest trained length, that itself, the middle of what is beyond it, and
    the longest tested one."""
    longest, last = train[1], test[1]
    there = task.tested_lengths(train[0], last)
    wanted = (longest // 2, longest, (longest + last + 1) // 2, last)
    return sorted({int(there[np.abs(there - length).argmin()]) for length in wanted})


def measured(run: Path, name: str, number: int, done: set[tuple[str, ...]]) -> Iterator[Row]:
    """Yields the rows of a model that are not `done`."""
    config = open_run(run).config
    _, tasks = run_tasks(config)
    model = load_run_model(str(run), name, "cpu")
    for task, entry in config["tasks"].items():
        for length in chosen_lengths(tasks[task], entry["train"], entry["test"]):
            key = dict(zip(KEY, (run.name, name, task, str(length)), strict=True))
            if tuple(key.values()) not in done:
                found = compared(model, tasks[task], length, number)
                yield {
                    **key, "trained_to": str(entry["train"][1]), **found,
                    "weights": model_hash(model), **common.machine("cpu"),
                    "command": f"python benchmarks/inference_precision.py {run} --models {name} "
                    f"--number {number}",
                }  # fmt: skip


def plot(rows: list[Row], path: Path) -> None:
    """Plots the looped models' chains right by length in both precisions, a panel a run and task,
    and the share that is the same."""
    rows = [r for r in rows if r["model"].startswith("looped")]
    panels = sorted({(r["run"], r["task"]) for r in rows})
    columns = min(4, len(panels))
    height = -(-len(panels) // columns)
    figure = new_figure(3.0 * columns + 0.6, 2.9 * height)
    axes = figure.subplots(height, columns, squeeze=False, sharey=True).flatten()
    lines = (("right_fp32", "o-", "right, fp32"), ("right_bf16", "x--", "right, bf16"),
             ("same", "k:", "same in both"))  # fmt: skip
    for axis, key in zip(axes, panels, strict=False):
        own = [r for r in rows if (r["run"], r["task"]) == key]
        for column, style, label in lines:
            shares = [100 * float(r[column]) for r in own]
            axis.plot([int(r["length"]) for r in own], shares, style, label=label)
        axis.axvspan(0.5, int(own[0]["trained_to"]) + 0.5, color="0.92", zorder=0)
        axis.set(title=f"{key[0]}: {key[1]}", xlabel="length", ylim=(-3, 103))
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.axis("off")
    axes[0].set_ylabel("chains, %")
    axes[0].legend(frameon=False)
    save_figure(figure, path)


def summary(rows: list[Row]) -> dict[str, tuple[float, float, float]]:
    """Returns for each kind of model the most points that bf16 loses at a length, the most that it
    gains, and the least share of chains that are the same, in %; of the lengths at which at least
    half of the chains in fp32 are right."""
    found = {}
    for kind in ("looped", "ar"):
        own = [r for r in rows if r["model"].startswith(kind) and float(r["right_fp32"]) >= 0.5]
        lost = [100 * (float(r["right_fp32"]) - float(r["right_bf16"])) for r in own]
        if own:
            found[kind] = max(lost), -min(lost), 100 * min(float(r["same"]) for r in own)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    trained = common.RESULTS / "trained"
    parser.add_argument("runs", nargs="*", type=Path, default=[trained], metavar="RUN")
    parser.add_argument("--models", default=MODELS, help=f"of the runs, default {MODELS}")
    parser.add_argument("--number", type=int, default=200, help="problems of a length")
    parser.add_argument("--csv", type=Path, default=CSV)
    a = parser.parse_args(argv)
    a.csv.parent.mkdir(parents=True, exist_ok=True)
    rows = common.read_rows(a.csv)
    for run in a.runs:
        for name in a.models.split(","):
            if not model_path(str(run), name).is_file():
                continue
            for row in measured(run, name, a.number, {tuple(r[k] for k in KEY) for r in rows}):
                rows.append(row)
                common.write_rows(a.csv, rows)
    plot(rows, a.csv.with_suffix(".png"))
    for kind, (lost, gained, same) in summary(rows).items():
        print(
            f"{kind}, where at least half is right: bf16 at most {lost:.1f} points below fp32 and "
            f"{gained:.1f} above, at least {same:.1f} % of the chains the same"
        )


if __name__ == "__main__":
    main()
