"""Writes records of addition, and a config that learns from them without a generator or a solver.

    python benchmarks/addition_records.py --out runs/sums

`sums.jsonl` has solved sums of 1 to 10 digits, and problems alone of 11 and 12; `sums-test.jsonl`
has 500 solved sums of each length. What is printed is the command that trains on them: the looped
model writes chains for the problems alone, and the label-free filter is measured on the solved ones
of the same lengths (`trust` in results.json). Nothing here needs relay_fast.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

TRAINED, BEYOND = range(1, 11), range(11, 13)


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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="runs/sums", type=Path, help="the folder of the files")
    parser.add_argument("--each", default=4000, type=int, help="solved sums of each length (4000)")
    a = parser.parse_args(arguments)
    out, each = a.out, a.each
    out.mkdir(parents=True, exist_ok=True)
    write(
        out / "sums.jsonl",
        records(TRAINED, each, seed=0),
        records(BEYOND, each * 3 // 8, seed=1, solved=False),
    )
    write(out / "sums-test.jsonl", records(range(1, 13), each // 8, seed=2))
    config = Path(__file__).with_suffix(".toml")
    shutil.copy(config, out)
    print(f"python -m relay_fast.train --config {out / config.name} --out {out / 'run'}")


if __name__ == "__main__":
    main()
