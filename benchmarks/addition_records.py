"""Addition learned from files of records alone, without a generator or a solver.

    python benchmarks/addition_records.py --out runs/sums [--stages …] [--minutes …]

Writes `sums.jsonl` (solved sums of 1 to 10 digits, and problems alone of 11 and 12),
`sums-test.jsonl` (500 solved sums of each length) and `sums.toml` into the folder, then trains on
them; the same command continues. The looped model writes chains for the problems alone, and the
label-free filter is measured on the solved ones of the same lengths (`trust` in results.json).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from relay_fast.relay.pipeline import OutOfTime  # noqa: E402
from relay_fast.relay.presets.own import read_config  # noqa: E402
from relay_fast.train import train  # noqa: E402
from relay_fast.utils.files import replacing  # noqa: E402

TRAINED, BEYOND = range(1, 11), range(11, 13)
CONFIG = """\
base = "cpu-addition"

[tasks.addition]
data = "sums.jsonl"
train = [1, 10]
test = [10, 12]
self_lengths = [11, 12]
self_counts = [64, 64]
merge_beyond = [1000, 1000]

[tasks.addition.parameters]
test_data = "sums-test.jsonl"
answer_is = "round"
shows = "round"
title = "Addition from a file"
unit = "number of digits"
"""


def digit_by_digit(first: str, second: str) -> list[str]:
    """What is left to add, `=` or with a carry `=1`, and the digits so far; at last the sum."""
    rounds, carry, total = [], 0, ""
    for left in reversed(range(len(first))):
        carry, digit = divmod(int(first[left]) + int(second[left]) + carry, 10)
        total = f"{digit} {total}".strip()
        if left:
            upper, lower = " ".join(first[:left]), " ".join(second[:left])
            rounds.append(f"{upper} + {lower} {'=1' if carry else '='} {total}")
    return [*rounds, f"1 {total}" if carry else total]


def records(lengths: range, number: int, seed: int, solved: bool = True) -> Iterator[dict]:
    rng = random.Random(seed)
    for length in lengths:
        for _ in range(number):
            first, second = ("".join(rng.choices("0123456789", k=length)) for _ in range(2))
            record = {"problem": f"{' '.join(first)} + {' '.join(second)}"}
            if solved:
                rounds = digit_by_digit(first, second)
                yield record | {"rounds": rounds, "answer": rounds[-1]}
            else:
                yield record | {"length": length}


def write(path: Path, *parts: Iterator[dict]) -> None:
    if path.exists():  # a run is bound to its files
        return
    with replacing(path) as partial, open(partial, "w") as file:
        for part in parts:
            file.writelines(json.dumps(record) + "\n" for record in part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="runs/sums", type=Path)
    parser.add_argument("--stages", help="comma-separated, default all")
    parser.add_argument("--minutes", type=float)
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    write(
        a.out / "sums.jsonl",
        records(TRAINED, 4000, seed=0),
        records(BEYOND, 1500, seed=1, solved=False),
    )
    write(a.out / "sums-test.jsonl", records(range(1, 13), 500, seed=2))
    (a.out / "sums.toml").write_text(CONFIG)
    stages = None if a.stages is None else a.stages.split(",")
    config = read_config(a.out / "sums.toml")
    try:
        train(config, a.out / "run", stages=stages, minutes=a.minutes)
    except OutOfTime:
        print(f"{a.minutes:g} minutes are over; the same command continues")


if __name__ == "__main__":
    main()
