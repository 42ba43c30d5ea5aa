"""The index of a file of records: where each stands, and what all of them together need.

It is made by one pass over the file (`record_survey`) and kept in the cache folder for the next
time. Rows are mapped into memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from relay_fast.tasks.record_files import Record, RecordReader, Source, Stamp, cache_folder, changed
from relay_fast.tasks.record_rules import Facts, Rules
from relay_fast.tasks.record_survey import ROW, Survey
from relay_fast.tasks.tokenisers import Tokeniser
from relay_fast.utils.ragged import lengths_to_offsets

VERSION = 3  # of the files; others are ignored


class RecordIndex:
    """The records of a file, by position and by length.

    Args:
        source: The file.
        stamp: What it is recognised by.
        folder: Files of the index.
        rules: What its records are like.
    """

    def __init__(self, source: Source, stamp: Stamp, folder: Path, rules: Rules) -> None:
        self.source, self._folder, self._rules = source, folder, rules
        self.reader = RecordReader(source, stamp)
        self.facts = Facts.from_json(json.loads((folder / "facts.json").read_text()))

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def rows(self) -> np.ndarray:
        """(N,) ROW, one for each record."""
        return np.memmap(self._folder / "rows.bin", ROW, "r")

    @cached_property
    def _by_length(self) -> np.ndarray:
        """(N,) positions of all records, by length."""
        return np.load(self._folder / "order.npy", mmap_mode="r")

    @cached_property
    def _starts(self) -> dict[int, tuple[int, int]]:
        """Start of the records of each length in `_by_length`."""
        bounds = lengths_to_offsets(np.array([s.records for s in self.facts.lengths.values()]))
        pairs = zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
        return dict(zip(self.facts.lengths, pairs, strict=True))

    def of_length(self, length: int) -> np.ndarray:
        """Returns the positions of the records of a length, in the order of the file."""
        first, last = self._starts.get(length, (0, 0))
        return self._by_length[first:last]

    def read(self, positions: np.ndarray) -> list[Record]:
        """Reads records, as the rules have them; raises RecordsChanged for a changed file."""
        rows = self.rows[positions]
        records = self.reader.read(rows["offset"].tolist(), rows["size"].tolist())
        return [*map(self._rules.applied, records)]

    def place(self, position: int) -> str:
        """Says where a record stands, for messages."""
        return self.source.place(int(position))

    def __getstate__(self) -> dict[str, Any]:
        mapped = ("rows", "_by_length", "_starts")
        return {name: value for name, value in self.__dict__.items() if name not in mapped}


def open_index(source: Source, tokeniser: Tokeniser, rules: Rules) -> RecordIndex:
    """Returns the index of a file, made if it is not in the cache folder yet.

    Args:
        source: The file.
        tokeniser: Makes tokens of its texts.
        rules: What its records have to be like.

    Raises:
        ValueError: A record breaks a rule; names its file and line.
    """
    stamp = Stamp.of(source.path)
    key = repr((VERSION, source.path, stamp, tokeniser.identity, rules))
    folder = cache_folder() / hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    if not (folder / "facts.json").exists():
        _make(source, stamp, tokeniser, rules, folder)
    return RecordIndex(source, stamp, folder, rules)


def _make(source: Source, stamp: Stamp, tokeniser: Tokeniser, rules: Rules, folder: Path) -> None:
    """Writes the files of an index; the folder appears when all are there."""
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        survey = Survey(source, tokeniser, rules)
        with open(partial / "rows.bin", "wb") as file:
            for rows in survey.blocks():
                rows.tofile(file)
        if not stamp.fits(source.path):
            raise changed(source.shown)
        (partial / "facts.json").write_text(json.dumps(survey.finish().to_json()))
        lengths = np.memmap(partial / "rows.bin", ROW, "r")["length"]
        np.save(partial / "order.npy", np.argsort(lengths, kind="stable"))
        try:
            os.replace(partial, folder)
        except OSError:  # another process was faster
            if not (folder / "facts.json").exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
