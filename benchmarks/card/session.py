"""A measuring session: units of work inside a deadline, saved one by one, taken up again later."""

from __future__ import annotations

import csv
import gc
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from relay_fast.kernels.supports import Unsupported
from relay_fast.utils.files import replacing

Row = dict[str, object]
LOST = "CUDA error"  # in the note of a unit that took the card from its process
FINISHED = ("ok", "skipped")  # what the next call does not take up again


class Deadline:
    """The time that a session may take."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self._clock, self._end = clock, clock() + seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - self._clock()

    def allows(self, seconds: float) -> bool:
        """Whether work of so many seconds may still begin."""
        return seconds <= self.left


@dataclass(frozen=True)
class Unit:
    """Work that is done whole or not at all, and adds rows to one table.

    name: what resuming goes by. seconds: an estimate, generous. run: returns the rows, each of
    which may carry `status` ("failed") and `note`. checks: names of the ops that this unit vouches
    for; needs: ops that must not have failed theirs. memory: bytes that it needs on the device.
    """

    name: str
    table: str
    seconds: float
    run: Callable[[], list[Row]]
    checks: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    memory: int = 0


class Later(Exception):
    """Raised by a unit that needs what is not measured yet."""


class Skip(Exception):
    """Raised by a unit that cannot be had here; its text is the reason."""


@dataclass
class Session:
    """The rows of one results folder, and what became of its units."""

    folder: Path
    deadline: Deadline
    label: Row  # goes into every row: machine, versions, commit, mode
    memory: int = 0  # bytes of the device, 0: not known
    say: Callable[[str], None] = lambda line: print(line, flush=True)
    tables: dict[str, list[Row]] = field(default_factory=dict)
    left: list[Unit] = field(default_factory=list)
    ran: int = 0
    dead: str = ""  # why the card cannot be used any more

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.folder.glob("*.csv")):
            with path.open(newline="") as file:
                self.tables[path.stem] = list(csv.DictReader(file))

    def rows(self, table: str | None = None) -> list[Row]:
        """The rows of a table, or of all."""
        chosen = self.tables.values() if table is None else [self.tables.get(table, [])]
        return [row for rows in chosen for row in rows]

    def run(self, units: Iterable[Unit]) -> None:
        """Runs what is not finished and fits into the time."""
        finished = {row["unit"] for row in self.rows() if row["status"] in FINISHED}
        finished -= {row["unit"] for row in self.rows() if row["status"] not in FINISHED}
        # Last, those that took the card from an earlier call: they may end this one too.
        lost = {row["unit"] for row in self.rows() if LOST in str(row["note"])}
        for unit in sorted(units, key=lambda unit: unit.name in lost):
            if unit.name in finished:
                continue
            if self.dead or not self.deadline.allows(unit.seconds):
                self.left.append(unit)
                continue
            try:
                rows = self._attempt(unit)
            except Later:
                self.left.append(unit)
                continue
            self._save(unit, rows)

    def _failed(self) -> set[str]:
        """Returns the ops that have failed a check of theirs."""
        rows = (row for row in self.rows("checks") if row["status"] == "failed")
        return {op for row in rows for op in str(row["op"]).split()}

    def _attempt(self, unit: Unit) -> list[Row]:
        bad = sorted(self._failed().intersection(unit.needs))
        if bad:
            reason = f"{', '.join(bad)} failed its correctness check"
            return [self._verdict(unit, "withheld", reason)]
        if self.memory and unit.memory > self.memory:
            have, want = (f"{b / 2**30:.0f} GiB" for b in (self.memory, unit.memory))
            return [self._verdict(unit, "skipped", f"needs {want}, the card has {have}")]
        began = time.monotonic()
        self.ran += 1
        try:
            rows = [{"status": "ok", "note": ""} | row for row in unit.run()]
        except Later:
            raise
        except (Skip, Unsupported) as reason:
            return [self._verdict(unit, "skipped", str(reason))]
        except torch.OutOfMemoryError:
            return [self._verdict(unit, "skipped", "the card ran out of memory")]
        except Exception as error:
            traceback.print_exc()
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            return [self._verdict(unit, "failed", text)]
        finally:
            self._release()
        self.say(f"{unit.name}: {len(rows)} rows, {time.monotonic() - began:.1f} s")
        return rows

    def _release(self) -> None:
        """Gives a unit's memory back. A CUDA error (a kernel that wrote where it must not) ends the
        process's use of the card: what is left must wait for the next call."""
        gc.collect()
        if torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as error:
                self.dead = " ".join(str(error).split())[:200]

    def _verdict(self, unit: Unit, status: str, note: str) -> Row:
        self.say(f"{unit.name}: {status}: {note}")
        return {"status": status, "note": note, "op": " ".join(unit.checks or unit.needs)}

    def _save(self, unit: Unit, rows: list[Row]) -> None:
        """Replaces the unit's rows in its table, atomically."""
        kept = [row for row in self.rows(unit.table) if row["unit"] != unit.name]
        kept += [{"unit": unit.name} | row | self.label for row in rows]
        self.tables[unit.table] = kept
        columns = list(dict.fromkeys(key for row in kept for key in row))
        with replacing(self.folder / f"{unit.table}.csv") as partial:
            with partial.open("w", newline="") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(kept)

    def summary(self) -> tuple[str, bool]:
        """The last line, and whether everything that ran was right."""
        bad = [row for row in self.rows() if row["status"] in ("failed", "withheld")]
        if self.dead:
            return f"failed: the card is lost to this process: {self.dead}", False
        checks = sum(row["status"] == "ok" for row in self.rows("checks"))
        total = f"{checks} checks, {len(self.rows())} rows"
        if not bad:
            return f"ok {total}", True
        names = list(dict.fromkeys(f"{row['unit']} {row['status']}" for row in bad))
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        return f"failed: {', '.join(names[:5])}{more}; {total}", False


def by_key(rows: Sequence[Row], *keys: str) -> dict[tuple, list[Row]]:
    """The rows that are ok, grouped by these columns."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row["status"] == "ok":
            groups.setdefault(tuple(row.get(k, "") for k in keys), []).append(row)
    return groups
