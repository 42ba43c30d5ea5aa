"""Writes records of addition, and a config that learns from them without a generator or a solver.

    python benchmarks/addition_records.py --out runs/sums            # the files
    python benchmarks/addition_records.py --out runs/sums --train    # and what is learned from them

`sums.jsonl` has solved sums of 1 to 10 digits, and problems alone of 11 and 12; `sums-test.jsonl`
has 500 solved sums of each length up to 16. The command that trains on them is printed: the looped
model writes chains for the problems alone. With --train it is run too, and then accuracy by length
is written, and precision and recall of the label-free filter on solved sums that no training saw.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

RESULTS = Path(__file__).parent / "results" / "addition_records"
TRAINED, BEYOND, TESTED = range(1, 11), range(11, 13), range(1, 17)
STAGES = ("chains", "evaluate.looped_aligned", "evaluate.ar_baseline", "evaluate.ar_relay")
QUICK = 0.004  # share of the training


def digit_by_digit(first: str, second: str) -> list[str]:
    """What is left to add, `+1` for a carry, then `=` and the digits so far; at last the sum."""
    rounds, carry, total = [], 0, ""
    for left in reversed(range(len(first))):
        carry, digit = divmod(int(first[left]) + int(second[left]) + carry, 10)
        total = f"{digit} {total}".strip()
        if left:
            upper, lower = " ".join(first[:left]), " ".join(second[:left])
            rounds.append(f"{upper} {'+1' if carry else '+'} {lower} = {total}")
    return [*rounds, f"1 {total}" if carry else total]


def records(lengths: range, number: int, seed: int, solved: bool = True) -> Iterator[dict]:
    rng = random.Random(seed)
    for length in lengths:
        for _ in range(number):
            first, second = ("".join(rng.choices("0123456789", k=length)) for _ in range(2))
            record = {"problem": f"{' '.join(first)} + {' '.join(second)} ="}
            if solved:
                rounds = digit_by_digit(first, second)
                yield record | {"rounds": rounds, "answer": rounds[-1]}
            else:
                yield record | {"length": length}


def write(path: Path, *parts: Iterator[dict]) -> None:
    if path.exists():  # a run is bound to its files
        return
    with open(path, "w") as file:
        for part in parts:
            file.writelines(json.dumps(record) + "\n" for record in part)


def write_files(out: Path) -> Path:
    """Writes the records and the config into a folder; returns the config's path."""
    out.mkdir(parents=True, exist_ok=True)
    write(
        out / "sums.jsonl",
        records(TRAINED, 4000, seed=0),
        records(BEYOND, 1500, seed=1, solved=False),
    )
    write(out / "sums-test.jsonl", records(TESTED, 500, seed=2))
    return Path(shutil.copy(Path(__file__).with_suffix(".toml"), out))


# What is learned from them


def filter_rows(run: Path, config: dict[str, Any]) -> list[dict[str, Any]]:
    """Measures the label-free filter of a run's looped model beyond its training range."""
    from relay_fast.decoding.confidence import generate_confident
    from relay_fast.relay import filter_metrics
    from relay_fast.relay.label_free import confidence_bounds, label_free
    from relay_fast.training.model_files import load_run_model, run_tasks

    model, tasks = load_run_model(run, "looped_aligned"), run_tasks(config)[1]
    number, rows = config["evaluation"]["problems"], []
    ranges = {name: config["tasks"][name]["train"] for name in tasks}
    bounds = confidence_bounds(model, tasks, ranges, config["seed"])
    for length in range(TRAINED.stop - 1, TESTED.stop):
        truth = tasks["addition"].unseen(length, number, config["seed"])
        written, confidence = generate_confident(model, truth, tasks)
        kept = label_free(written, tasks, confidence, bounds)
        counts = filter_metrics.count(written, truth, tasks, kept=kept)["addition"][str(length)]
        rows.append(
            {
                "length": length,
                "least_log_prob": bounds["addition"],
                **{name: getattr(counts, name) for name in ("written", "correct", "kept")},
                **{name: getattr(counts, name) for name in ("precision", "recall")},
            }
        )
    return rows


def accuracy_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"model": model, "length": int(length), **{k: row[k] for k in ("chain", "answer", "n")}}
        for model, by_task in results["accuracy"].items()
        for length, row in by_task["addition"].items()
    ]


def plot_filter(rows: list[dict[str, Any]], path: Path) -> None:
    """Plots by length: the share of chains that are right, and the filter's two measures."""
    from relay_fast.reporting.plots import new_figure, save_figure

    figure = new_figure(6.5, 4.2)
    axes = figure.subplots()
    lengths = [row["length"] for row in rows]
    curves = {
        "chains that are right": [row["correct"] / row["written"] for row in rows],
        "of those that the filter keeps (precision)": [row["precision"] for row in rows],
        "right ones that it keeps (recall)": [row["recall"] for row in rows],
    }
    for label, values in curves.items():
        shares = [float("nan") if v is None else 100 * v for v in values]
        axes.plot(lengths, shares, marker="o", markersize=4, label=label)
    axes.axvspan(lengths[0] - 0.3, TRAINED.stop - 0.5, color="0.92", zorder=0)
    axes.set(xlabel="number of digits, trained on 1 to 10", ylabel="%", ylim=(-3, 103))
    axes.set_title("Addition from a file: the label-free filter")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save_figure(figure, path)


def train_and_measure(config_file: Path, results: Path, scale: float | None) -> None:
    from benchmarks.common import show, write_rows
    from relay_fast.relay.presets import override
    from relay_fast.relay.presets.own import read_config
    from relay_fast.train import train
    from relay_fast.utils.files import json_text

    run = config_file.parent / "run"
    config = override(read_config(config_file), scale=scale)
    found = train(config, run, stages=STAGES)
    results.mkdir(parents=True, exist_ok=True)
    write_rows(results / "accuracy.csv", accuracy_rows(found))
    rows = filter_rows(run, found["config"])
    write_rows(results / "filter.csv", rows)
    plot_filter(rows, results / "filter.png")
    parts = ("data", "trust", "filter", "seconds", "training", "versions")
    (results / "run.json").write_text(json_text({key: found[key] for key in parts}, indent=1))
    shutil.copy(run / "accuracy_chain.png", results)
    show(rows, list(rows[0]))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="runs/sums", type=Path, help="the folder of the files")
    parser.add_argument("--train", action="store_true", help="train on them and measure")
    parser.add_argument("--results", default=RESULTS, type=Path, help="folder of what is measured")
    parser.add_argument("--quick", action="store_true", help="a small part of the training")
    a = parser.parse_args(argv)
    config = write_files(a.out)
    if a.train:
        train_and_measure(config, a.results, QUICK if a.quick else None)
    else:
        print(f"python -m relay_fast.train --config {config} --out {a.out / 'run'}")


if __name__ == "__main__":
    main()
