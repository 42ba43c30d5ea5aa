"""Writes README's tables of numbers from the files of results.

A table stands below `<!-- table: NAME -->`, and its lines are those of the function NAME here.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MODELS = ("looped, rounds fed back", "looped, latent", "AR baseline", "AR, RELAY-enhanced")
MARK = re.compile(r"<!-- table: (\w+) -->\n((?:\|.*\n)*)")


def _csv(name: str) -> list[dict[str, str]]:
    with open(RESULTS / name, newline="") as file:
        return list(csv.DictReader(file))


def _chains(name: str, task: str = "arithmetic") -> dict[str, dict[int, float]]:
    """Returns {model: {length: percent of whole chains right}} of a run's results."""
    accuracy = json.loads((RESULTS / name).read_text())["accuracy"]
    return {
        model: {int(n): 100 * row["chain"] for n, row in tasks[task].items()}
        for model, tasks in accuracy.items()
    }


def _percent(value: float) -> str:
    """One decimal, but 0 and 100 only for what is exactly that."""
    return f"{value:.0f}" if value in (0, 100) else f"{value:.1f}"


def _span(values: Sequence[float]) -> str:
    least, most = _percent(min(values)), _percent(max(values))
    return least if least == most else f"{least} to {most}"


def _lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    line = lambda cells: f"| {' | '.join(cells)} |".replace("|  |", "| |")
    return [line(header), f"|{'---|' * len(header)}", *map(line, rows)]


def _one(rows: Sequence[Mapping[str, str]], **wanted: str) -> Mapping[str, str]:
    """Returns the last row that has these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())][-1]


def results() -> list[str]:
    """What it is good for, in one table."""
    chains = _chains("cpu/results.json")
    relay, alone = chains["ar_relay"], chains["ar_baseline"]
    steps, memory = _csv("loop_throughput.csv"), _csv("memory_vs_loops.csv")
    speed = lambda provider, policy="": float(
        _one(steps, provider=provider, policy=policy)["samples_per_s"]
    )
    kept = lambda provider, policy="": (
        int(_one(memory, loops="30", provider=provider, policy=policy)["saved_bytes"]) / 1e6
    )
    mixed = _csv("chain_generation.csv")
    written = lambda provider: float(_one(mixed, task="mixed", provider=provider)["chains_per_s"])
    card = [r for r in _csv("h200/steps.csv") if r["unit"] == "steps/mix 512/eager padded"]
    ms = lambda provider: 1000 * float(_one(card, provider=provider)["seconds"])
    bold = lambda value, digits=1: f"**{value:.{digits}f}**"
    compiled, checkpoint = speed("compile_bucketed"), kept("eager_bucketed_checkpoint")
    return _lines(
        ["what", "relay_fast", "without it", "file"],
        [
            ["arithmetic of 10 operators, learned on 1 to 8, % right", f"**{_percent(relay[10])}**",
             _percent(alone[10]), "[`results.json`][demo]"],
            ["the same of 11 operators, % right", f"**{_percent(relay[11])}**",
             _percent(alone[11]), "[`results.json`][demo]"],
            ["training on the paper's tasks, samples/s", bold(speed("relay_fast", "none")),
             f"{speed('eager_padded'):.1f} (compiled: {compiled:.1f})",
             "[`loop_throughput.csv`][steps]"],
            ["kept for the backward pass, 30 loops, MB", bold(kept("relay_fast", "state")),
             f"{kept('eager_padded'):.0f} (checkpointed: {checkpoint:.1f})",
             "[`memory_vs_loops.csv`][memory]"],
            ["chains written per second", bold(written("relay_fast_torch")),
             f"{written('eager_padded'):.1f}", "[`chain_generation.csv`][chains]"],
            ["a training step of 512 samples on an H200, ms", bold(ms("relay_fast graph"), 0),
             f"{ms('eager padded'):.0f}", "[`steps.csv`][card]"],
        ],
    )  # fmt: skip


def demo() -> list[str]:
    """The preset `cpu`."""
    chains = _chains("cpu/results.json")
    names = {
        "looped_aligned": "looped, rounds fed back as tokens",
        "ar_baseline": "autoregressive (AR) baseline",
        "ar_relay": "AR, RELAY-enhanced: learned from the looped model's chains",
        "ar_self_truth": "AR + self chains, kept by the truth",
        "ar_self_loop": "AR + self chains, kept by a looped model's answer",
    }
    rows = []
    for model, name in names.items():
        inside = min(chains[model][n] for n in range(1, 9))
        beyond = [_percent(chains[model][n]) for n in (9, 10, 11)]
        rows.append([name, _percent(inside), *beyond])
    return _lines(["model", "1 to 8, least", "9", "10", "11"], rows)


def tasks() -> list[str]:
    """The three tasks, at a fifth and a third beyond their lengths."""
    titles = {
        ("cpu-arithmetic", "arithmetic"): ("arithmetic mod 11, 1–8 operators", 10, 11),
        ("cpu-edit-distance", "edit_distance"): ("edit distance, 1–8 of 4 letters", 10, 11),
        ("cpu-lis", "lis"): ("LIS, 1–20 numbers, groups of 4", 24, 27),
    }
    return _by_length("three_tasks/results.csv", titles)


def longer() -> list[str]:
    """The paper's range of arithmetic, and all three tasks in one model."""
    titles = {
        ("cpu-arithmetic-long", "arithmetic"): ("arithmetic mod 11, 1–15 operators", 18, 20),
        ("cpu-multitask", "arithmetic"): ("all in one: arithmetic, 1–8", 10, 11),
        ("cpu-multitask", "edit_distance"): ("all in one: edit distance, 1–8", 10, 11),
        ("cpu-multitask", "lis"): ("all in one: LIS, 1–20", 24, 27),
    }
    return _by_length("three_tasks_longer/results.csv", titles)


def _by_length(name: str, titles: Mapping[tuple[str, str], tuple[str, int, int]]) -> list[str]:
    """The models of each (preset, task) with its title and the lengths beyond that are shown."""
    table, rows = _csv(name), []
    for (preset, task), (title, fifth, third) in titles.items():
        for model in MODELS:
            key = preset, task, model
            own = [r for r in table if (r["preset"], r["task"], r["model"]) == key]
            if not own:  # not trained
                continue
            seeds = sorted({r["seed"] for r in own})
            inside = [
                min(
                    float(r["chain"])
                    for r in own
                    if r["seed"] == seed and int(r["length"]) <= int(r["trained_to"])
                )
                for seed in seeds
            ]
            at = lambda n, own=own: [float(r["chain"]) for r in own if int(r["length"]) == n]
            first = title if model == MODELS[0] else ""
            cells = [_span(values) for values in (inside, at(fifth), at(third))]
            rows.append([first, model, str(len(seeds)), *cells])
    return _lines(
        ["task, trained on", "model", "seeds", "inside, least", "a fifth beyond", "a third beyond"],
        rows,
    )


def latent() -> list[str]:
    """The preset `cpu-latent`."""
    chains = _chains("cpu_latent/results.json")
    names = {
        "looped_aligned": "looped + alignment",
        "ar_baseline": "autoregressive (AR) baseline",
        "ar_relay": "AR, RELAY-enhanced",
        "ar_self_truth": "AR + self chains, kept by the truth",
    }
    rows = [
        [name, _span([chains[model][n] for n in range(1, 11)]),
         *(_percent(chains[model][n]) for n in (11, 12, 13))]
        for model, name in names.items()
    ]  # fmt: skip
    return _lines(["model", "1 to 10", "11", "12", "13"], rows)


def steps() -> list[str]:
    """Training steps on two cores."""
    rows = []
    for r in _csv("loop_throughput.csv"):
        saved, peak = (f"{int(r[key]) / 1e6:,.0f}" for key in ("saved_bytes", "peak_bytes"))
        rows.append([r["provider"], r["policy"], f"{float(r['samples_per_s']):.1f}", saved, peak])
    return _lines(["provider", "policy", "samples/s", "saved, MB", "peak, MB"], rows)


def filtered() -> list[str]:
    """The label-free filter on addition from a file."""
    table = _csv("addition_records/filter.csv")
    share = lambda r: 100 * int(r["correct"]) / int(r["written"])
    rows = {
        "chains right": [share(r) for r in table],
        "right, of those that the filter keeps": [100 * float(r["precision"]) for r in table],
        "kept, of the right ones": [100 * float(r["recall"]) for r in table],
    }
    header = ["digits, trained on 1 to 10", *(r["length"] for r in table)]
    return _lines(header, [[name, *map(_percent, values)] for name, values in rows.items()])


def records() -> list[str]:
    """Records read and encoded, a second and core."""
    names = {
        "read, encoded: whitespace": "whitespace",
        "read, encoded: tokenizers file": "a file of the tokenizers library",
        "both of these, one after the other": "reading and that library, without relay_fast",
    }
    rows = []
    for r in _csv("records.csv"):
        if r["what"] in names:
            number = f"{int(r['records']):,}" if r["records"] else ""
            grown = f"{float(r['grown_mb']):.0f}" if r["grown_mb"] else ""
            rows.append([names[r["what"]], number, f"{float(r['rate']):,.0f}", grown])
    return _lines(["tokeniser", "records in the file", "records/s", "RAM, MB more"], rows)


TABLES: dict[str, Callable[[], list[str]]] = {
    table.__name__: table
    for table in (results, demo, tasks, longer, latent, filtered, records, steps)
}


def written(text: str) -> str:
    """Returns README's text with today's tables. Raises KeyError for a table of another name."""

    def table(found: re.Match) -> str:
        lines = TABLES[found[1]]()
        return f"<!-- table: {found[1]} -->\n" + "".join(f"{line}\n" for line in lines)

    return MARK.sub(table, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrites README's tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", type=Path, default=ROOT / "README.md")
    path: Any = parser.parse_args(arguments).file
    text = path.read_text(encoding="utf-8")
    path.write_text(written(text), encoding="utf-8")
    print(f"{path}: {len(MARK.findall(text))} tables")
    return 0


if __name__ == "__main__":
    sys.exit(main())
