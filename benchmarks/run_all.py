"""Everything that a CUDA card is asked, in one command that fits into its time.

    python benchmarks/run_all.py --minutes 10 --out DIR
    python benchmarks/run_all.py --minutes 8 --out DIR --dry-run    # on a CPU, interpreted

First every kernel is checked against its reference, then the card's ceilings, whole training steps,
kernels and configurations are measured. What is done is saved after every unit of work in
DIR/COMMIT; the same command goes on with what it did not reach. The last line says `ok` or what
failed; the exit status is 1 if anything did, 2 if nothing could be run.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="the time it may take")
    parser.add_argument("--out", type=Path, default=Path("runs/card"), help="results folder")
    parser.add_argument("--dry-run", action="store_true", help="the same on a CPU, interpreted")
    parser.add_argument("--quick", action="store_true", help="with --dry-run: one of each, for CI")
    parser.add_argument("--only", default="", help="measure only units with this in their name")
    parser.add_argument("--skip", default="", help="leave out units with this in their name")
    parser.add_argument("--sanitize", choices=("usual", "apart"), help=argparse.SUPPRESS)
    parser.add_argument("--check", metavar="INDEX/SEED", help=argparse.SUPPRESS)
    parser.add_argument("--share", metavar="I/N", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.minutes <= 0:
        parser.error(f"--minutes {options.minutes:g} leaves no time: give it at least 1")
    if options.quick and not options.dry_run:
        parser.error("--quick is the short form of --dry-run: give both")
    return options


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.path.insert(0, str(ROOT))
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        print(
            "there is no CUDA device here: --dry-run walks the same path on the CPU, through "
            "Triton's interpreter and at tiny sizes, and leaves the same files, marked as such"
        )
        return 2
    from benchmarks.card import agenda

    if options.sanitize:
        return agenda.sanitized_cases(options.sanitize)
    if options.check:
        return agenda.check_one(options.check)
    if options.share:
        return agenda.share(options.share)
    # A stream of its own: a graph can be captured on it, backward passes included.
    stream = nullcontext() if options.dry_run else torch.cuda.stream(torch.cuda.Stream())
    with stream:
        return agenda.run(
            options.out,
            60 * options.minutes,
            dry=options.dry_run,
            quick=options.quick,
            only=options.only,
            skip=options.skip,
            seed=random.SystemRandom().randrange(2**31),
            script=Path(__file__).resolve(),
        )


if __name__ == "__main__":
    sys.exit(main())
