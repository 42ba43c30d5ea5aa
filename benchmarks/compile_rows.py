"""The rows of the compile report, and the file that keeps them."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from relay_fast.utils.files import replacing


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    kernel: str
    arch: int
    dtype: str
    config: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    mma: str
    bound: str
    ok: bool
    flops: int
    bytes: int
    flops_per_byte: float
    floor_us: float
    floor: str


def write_rows(
    path: Path,
    rows: Sequence[Row],
    wanted: Callable[[str], bool],
    archs: Sequence[int],
    dtypes: Sequence[str],
) -> None:
    """Writes the rows of a report; of those that stand in the file, it replaces what was asked for.

    Args:
        path: the file.
        rows: what was compiled.
        wanted: whether a kernel of this name was to be compiled.
        archs: for these architectures.
        dtypes: with operands of these dtypes.
    """
    kept = []
    if path.exists():
        with path.open(newline="") as file:
            kept = list(csv.DictReader(file))
    asked = lambda row: (
        wanted(row["kernel"]) and int(row["arch"]) in archs and row["dtype"] in dtypes
    )
    lines = [row for row in kept if not asked(row)]
    lines += [{name: str(value) for name, value in asdict(row).items()} for row in rows]
    order = lambda row: (row["kernel"], int(row["arch"]), row["dtype"], *row.values())
    with replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        writer.writerows(sorted(lines, key=order))
