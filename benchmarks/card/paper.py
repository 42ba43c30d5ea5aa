"""The paper's experiment in leases: one call's share of it, on a machine that keeps nothing.

    python -m benchmarks.card.paper --minutes 9 --carried runs/lease --back $OUT

Unpacks what the last call sent back, goes on with `relay_fast.train --preset paper-fast` for so
many minutes, and packs what the next call needs and what is newly finished. Further flags are those
of `relay_fast.train`: `--device cpu --scale 0.01` rehearses it. The looped model comes first, then
its chains and the models that they need, each evaluated as soon as it is trained, so that finished
models need not travel again; last the looped model from another seed, in the run's folder `seed1`.
"""

from __future__ import annotations

import argparse
import io
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from relay_fast import train
from relay_fast.relay.pipeline import with_needs
from relay_fast.relay.run_folder import RunFolder
from relay_fast.relay.stages import MODELS, STAGE_DEPENDENCIES, scratch_files, stage_files
from relay_fast.training.model_files import load_model, model_path, save_model

PART_BYTES = 15 << 20  # of a file that travels
TRAVEL_BYTES = 56 << 20  # of all of them
LEAST_MINUTES = 0.5  # that training is begun for
CACHE = ".triton"  # compiled kernels, where TRITON_CACHE_DIR says so
SECOND = "seed1"


class Share(NamedTuple):
    """Stages that a call takes up together, in a folder below the run's, with their own flags."""

    folder: str
    stages: tuple[str, ...]
    flags: tuple[str, ...] = ()


PLAN = (
    Share("", ("evaluate.looped_aligned", "chains")),
    *(Share("", (f"evaluate.{name}",)) for name in ("ar_baseline", "ar_relay", "looped_vanilla")),
    *(Share("", (f"evaluate.{name}",)) for name in ("ar_self_truth", "ar_self_loop")),
    Share(SECOND, ("evaluate.looped_aligned",), ("--seed", "1")),
)


def go_on(run: Path, deadline: float, flags: list[str]) -> int:
    """Takes up the shares in turn until the time is over; the exit status."""
    for share in PLAN:
        minutes = (deadline - time.monotonic()) / 60
        if minutes < LEAST_MINUTES:
            break
        out = run / share.folder
        if not unfinished(out, share.stages):
            continue
        status = train.main(
            ["--preset", "paper-fast", *flags, *share.flags, "--stages", ",".join(share.stages),
             "--minutes", f"{minutes:.3f}", "--out", str(out), "--no-report"]
        )  # fmt: skip
        if status or unfinished(out, share.stages):
            return status
    return 0


def unfinished(folder: Path, stages: Iterable[str]) -> list[str]:
    """The stages, and those they need, that a run folder has not finished."""
    names = with_needs(stages)
    if not (folder / "config.json").exists():
        return names
    run = RunFolder.open(folder)
    return [name for name in names if not run.stage_done(name)]


# What travels


def what_travels(run: Path, since: float) -> Iterator[list[Path]]:
    """Files that belong together, the most important first.

    since: what was finished after this time has not been sent back yet.
    """
    wanted: dict[Path, set[str]] = {}
    for share in PLAN:
        wanted.setdefault(run / share.folder, set()).update(share.stages)
    left = {folder: unfinished(folder, stages) for folder, stages in wanted.items()}
    yield [file for folder in wanted for file in sorted(folder.glob("*.json"))]
    for folder, names in left.items():
        needed = {need for name in names for need in STAGE_DEPENDENCIES[name]}
        if "chains" in needed:  # which may have to be written again
            needed.update(STAGE_DEPENDENCIES["chains"])
        for name in MODELS:
            for file in stage_files(folder, name):
                if file.exists() and (name in needed or file.stat().st_mtime >= since):
                    yield [file]
    scratch = [
        file
        for folder, names in left.items()
        for name in names
        for file in sorted(scratch_files(folder, name))
    ]
    states: dict[str, list[Path]] = {}
    for file in scratch:
        stage, found, _ = str(file).partition(".state.")
        if found:
            states.setdefault(stage, []).append(file)
    yield from states.values()
    yield [file for folder in wanted for file in sorted(folder.glob("*.png"))]
    yield [file for file in (run / CACHE).rglob("*") if file.is_file()]
    for folder, names in left.items():
        if any("chains" in STAGE_DEPENDENCIES[name] for name in names):
            yield [file for file in stage_files(folder, "chains") if file.exists()]
    yield from ([file] for file in scratch if ".state." not in file.name)  # parts of chains


def pack(run: Path, back: Path, since: float) -> None:
    """Writes `back`/run.tar.0 …, as much of what travels as may."""
    buffer, room, out = io.BytesIO(), TRAVEL_BYTES, []
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as tar:
        for files in what_travels(run, since):
            size = sum(file.stat().st_size for file in files)
            if size > room:
                out += files
                continue
            room -= size
            for file in files:
                tar.add(file, file.relative_to(run))
    packed = buffer.getvalue()
    back.mkdir(parents=True, exist_ok=True)
    for old in back.glob("run.tar.*"):
        old.unlink()
    for k in range(0, len(packed), PART_BYTES):
        (back / f"run.tar.{k // PART_BYTES}").write_bytes(packed[k : k + PART_BYTES])
    print(f"packed: {len(packed) / 2**20:.1f} MiB in {-(-len(packed) // PART_BYTES)} files")
    for file in out:
        print(f"too large to travel, made again where it is needed: {file.relative_to(run)}")


def unpack(carried: Path, run: Path) -> None:
    """Puts what `pack` wrote into the run's folder; nothing where there is none."""
    parts = sorted(carried.glob("run.tar.*"), key=lambda part: int(part.suffix[1:]))
    if parts:
        packed = io.BytesIO(b"".join(part.read_bytes() for part in parts))
        with tarfile.open(fileobj=packed, mode="r:gz") as tar:
            tar.extractall(run, filter="data")


def release(run: Path, to: Path) -> None:
    """A run folder of two models alone, in bf16: for `relay_fast.generate` and `evaluate`."""
    folder = RunFolder(to, RunFolder.open(run).config)
    for name in ("looped_aligned", "ar_relay"):
        model, info = load_model(model_path(run, name))
        save_model(model_path(folder.path, name), model, info, torch.bfloat16)
        print(f"released: {model_path(folder.path, name)}")


def main(argv: list[str] | None = None) -> int:
    """The exit status of `relay_fast.train`; what was reached is packed whatever it is."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="the time it may take (9)")
    parser.add_argument("--run", type=Path, default=Path("runs/paper-fast"))
    parser.add_argument("--carried", type=Path, help="folder of what the last call sent back")
    parser.add_argument("--back", type=Path, help="folder for what is to be sent back")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--release",
        type=Path,
        metavar="DIR",
        help="do nothing but write the "
        "looped and the RELAY-enhanced model to DIR, in half the size",
    )
    options, flags = parser.parse_known_args(argv)
    if options.release is not None:
        release(options.run, options.release)
        return 0
    began, since = time.monotonic(), time.time()
    if options.carried is not None:
        unpack(options.carried, options.run)
    deadline = began + 60 * options.minutes
    status = go_on(options.run, deadline, ["--device", options.device, *flags])
    if options.back is not None and (options.run / "config.json").exists():
        pack(options.run, options.back, since)
    names = [
        f"{share.folder}/{name}".strip("/")
        for share in PLAN
        for name in unfinished(options.run / share.folder, share.stages)
    ]
    print(f"left: {', '.join(dict.fromkeys(names))}" if names else "everything is done")
    return status


if __name__ == "__main__":
    sys.exit(main())
