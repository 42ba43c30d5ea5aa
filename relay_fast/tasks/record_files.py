"""Files of records: JSON lines with `problem`, `rounds`, `answer`, read one by one when asked for.

A Parquet file, and records in memory, are copied once into such a file in the cache folder
(RELAY_FAST_CACHE, by default ~/.cache/relay_fast), so that nothing but the lines asked for is ever
in memory.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

from relay_fast.utils.errors import RunStopped
from relay_fast.utils.files import replacing
from relay_fast.utils.numbers import plain_numbers

HEAD = 1 << 16  # bytes at the beginning of a file that tell it from others
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}  # by how such a file begins
_BEGIN = 8
FIELDS = ("problem", "rounds", "answer", "length", "loops")


class RecordsChanged(RunStopped, ValueError):
    """Raised for a file of records that is not the one that was read before."""


class Record(NamedTuple):
    """A problem as text, its rounds and its answer (None if unknown).

    length: None for the number of rounds; loops: rounds that a model has to write, None likewise.
    """

    problem: str
    rounds: list[str] | None
    answer: str | None
    length: int | None
    loops: int | None


class Stamp(NamedTuple):
    """Identifies a version of a file without reading all of it."""

    size: int
    modified: int
    head: str

    @staticmethod
    def of(path: str | os.PathLike) -> Stamp:
        with open(path, "rb") as file:
            head = hashlib.blake2b(file.read(HEAD), digest_size=16).hexdigest()
            found = os.fstat(file.fileno())
        return Stamp(found.st_size, found.st_mtime_ns, head)

    def fits(self, path: str | os.PathLike) -> bool:
        """Tells whether the file's size and time are these, without opening it."""
        try:
            found = os.stat(path)
        except OSError:
            return False
        return (found.st_size, found.st_mtime_ns) == (self.size, self.modified)


@dataclass(frozen=True)
class Source:
    """A JSONL file, and how messages call it and its lines (a Parquet file has rows)."""

    path: str
    shown: str
    unit: str = "line"

    def place(self, index: int) -> str:
        return f"{self.shown}, {self.unit} {index + 1}"


class RecordReader:
    """Reads lines of a JSONL file by their offsets, and checks that it is still the same file.

    Args:
        source: The file.
        stamp: Of the file when its offsets were found.
    """

    def __init__(self, source: Source, stamp: Stamp) -> None:
        self.source, self.stamp = source, stamp
        self._file: Any = None

    def read(self, offsets: Sequence[int], sizes: Sequence[int]) -> list[Record]:
        """Returns the records of `sizes` bytes from `offsets` on; raises RecordsChanged."""
        if not self.stamp.fits(self.source.path):
            raise changed(self.source.shown)
        if self._file is None:
            self._file = open(self.source.path, "rb", buffering=0)  # noqa: SIM115
        file, records = self._file, []
        for offset, size in zip(offsets, sizes, strict=True):
            file.seek(offset)
            try:
                records.append(parse(file.read(size)))
            except ValueError:  # it was valid when its offset was found
                raise changed(self.source.shown) from None
        return records

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "stamp": self.stamp, "_file": None}


def changed(shown: str) -> RecordsChanged:
    return RecordsChanged(
        f"{shown} has changed since this run read it first: restore the file, or begin a new run "
        f"in another folder"
    )


def parse(line: bytes) -> Record:
    """Reads one record.

    Raises:
        ValueError: It is none; the message says why, as the end of a sentence.
    """
    if not line.strip():
        raise ValueError("is blank: remove the line")
    if line.startswith(codecs.BOM_UTF8):
        raise ValueError("begins with a byte order mark: save the file as UTF-8 without it")
    try:
        value = _decode(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(
            f"is not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1}): convert "
            f"the file to UTF-8"
        ) from None
    except RecursionError:
        raise ValueError("is nested too deeply to be a record") from None
    except ValueError as error:
        why = getattr(error, "msg", error)
        raise ValueError(f"is not JSON ({why}): write one object a line") from None
    if not isinstance(value, dict):
        raise ValueError(f"holds {_kind(value)}: write one object a line")
    if type(value) is _Twice:
        raise ValueError(f'has "{value.key}" twice: write it once')
    if b"\\ud" in line or b"\\uD" in line:
        _refuse_surrogates(value)
    return record_of(value)


class _Twice(dict):
    """An object in which a key occurs twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.key = next(name for name in names if names.count(name) > 1)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    return value if len(value) == len(pairs) else _Twice(pairs)


_decode = json.JSONDecoder(object_pairs_hook=_object).decode  # made once, it is as fast as loads


def record_of(value: Mapping[str, Any]) -> Record:
    """Checks the fields of a record; raises ValueError as `parse` does."""
    find = value.get
    problem, rounds, answer = find("problem"), find("rounds"), find("answer")
    length, loops = find("length"), find("loops")
    if type(problem) is not str:
        if problem is None:
            raise ValueError('has no field "problem": write the problem as a text')
        raise ValueError(f'has {_kind(problem)} as "problem": write a text')
    if rounds is not None:
        if type(rounds) is not list:
            raise ValueError(f'has {_kind(rounds)} as "rounds": write a list of texts')
        if not rounds:
            raise ValueError('has no round: write at least one, or leave "rounds" out')
        for k, text in enumerate(rounds):
            if type(text) is not str:
                raise ValueError(f"has {_kind(text)} as round {k + 1}: write a text")
    if answer is not None and type(answer) is not str:
        raise ValueError(f'has {_kind(answer)} as "answer": write a text')
    for name, number in (("length", length), ("loops", loops)):
        if number is not None and (type(number) is not int or not 1 <= number < 1 << 31):
            raise ValueError(f'has {number!r} as "{name}": write a whole number of at least 1')
    if rounds is None and length is None and loops is None:
        raise ValueError('has neither "rounds" nor "length": write how many rounds it needs')
    if rounds is not None and loops is not None and loops != len(rounds):
        raise ValueError(f'has {len(rounds)} rounds and "loops" {loops}: leave "loops" out')
    return Record(problem, rounds, answer, length, loops)


def _kind(value: Any) -> str:
    for kind, word in (
        (bool, "true or false"),
        (str, "a text"),
        (list, "a list"),
        (dict, "an object"),
        (int | float, f"the number {value}"),
        (NoneType, "null"),
    ):
        if isinstance(value, kind):
            return word
    return f"a {type(value).__name__}"


def _refuse_surrogates(value: Mapping[str, Any]) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("has half of a surrogate pair (\\ud…): write whole characters") from None


# Where records come from


def open_source(data: Any, what: str = "data") -> Source:
    """Returns the JSONL file of some data, made in the cache folder where it is none yet.

    Args:
        data: A path of a JSONL or Parquet file, or an iterable of mappings with the fields of a
            record, such as a list or a dataset of the `datasets` library.
        what: Names it in messages.

    Raises:
        ValueError: The file is missing or of another kind, or a record is none.
    """
    if not isinstance(data, str | os.PathLike):
        return _kept(data)
    path = Path(data)
    if not path.is_file():
        kind = "folder" if path.is_dir() else "device" if path.exists() else None
        why = "does not exist" if kind is None else f"is a {kind}"
        raise ValueError(f"{what} = {str(path)!r} {why}: give a file of records, JSONL or Parquet")
    with open(path, "rb") as file:
        begin = file.read(_BEGIN)
    for packed, kind in _PACKED.items():
        if begin.startswith(packed):
            raise ValueError(f"{path} is packed by {kind}: unpack it")
    if path.suffix.lower() in (".parquet", ".pq") or begin.startswith(b"PAR1"):
        return _from_parquet(path)
    return Source(str(path.resolve()), str(path))


def cache_folder() -> Path:
    """Returns the folder of files that can be made again, which exists."""
    own = os.environ.get("RELAY_FAST_CACHE")
    base = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "relay_fast"
    folder = base.expanduser() / "records"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    folder = Path(tempfile.gettempdir()) / f"relay_fast-{os.getuid() if os.name != 'nt' else 0}"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def _kept(data: Any) -> Source:
    """Copies records in memory into a file called by its content."""
    if isinstance(data, bytes | Mapping) or not isinstance(data, Iterable):
        raise ValueError(
            f"data is {type(data).__name__}: give a path, or an iterable of records such as "
            f'{{"problem": …, "rounds": […], "answer": …}}'
        )
    return _copied(data, "data", "record", lambda content: f"{content}.jsonl")


def _from_parquet(path: Path) -> Source:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"{path} is a Parquet file, which needs pyarrow: pip install relay_fast[data]"
        ) from None
    stamp = Stamp.of(path)
    key = hashlib.blake2b(repr((str(path.resolve()), stamp)).encode(), digest_size=16).hexdigest()
    there = cache_folder() / f"{key}.jsonl"
    if there.exists():
        return Source(str(there), str(path), "row")
    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = [name for name in FIELDS if name in file.schema_arrow.names]
        rows = (
            row
            for batch in file.iter_batches(batch_size=1024, columns=columns)
            for row in batch.to_pylist()
        )
        return _copied(rows, str(path), "row", lambda _: there.name)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet ({error})") from None


def _copied(
    records: Iterable[Mapping[str, Any]], shown: str, unit: str, name: Callable[[str], str]
) -> Source:
    """Writes records into the cache folder, as a file that `name` calls by its content's hash."""
    folder = cache_folder()
    digest = hashlib.blake2b(digest_size=16)
    whole = folder / f"copy-{os.getpid()}.jsonl"
    with replacing(whole) as partial, open(partial, "wb") as file:
        for line in _lines(records, shown, unit):
            digest.update(line)
            file.write(line)
    there = folder / name(digest.hexdigest())
    if there.exists():  # leaves its time as it was, on which indices depend
        whole.unlink()
    else:
        os.replace(whole, there)
    return Source(str(there), shown, unit)


def _lines(records: Iterable[Mapping[str, Any]], shown: str, unit: str) -> Iterator[bytes]:
    for i, value in enumerate(records):
        try:
            if not isinstance(value, Mapping):
                raise ValueError(f"is {_kind(value)}, not a mapping")
            kept = plain_numbers({k: value[k] for k in FIELDS if value.get(k) is not None})
            record_of(kept)
            line = json.dumps(kept, ensure_ascii=False).encode() + b"\n"
        except UnicodeEncodeError:
            raise ValueError(f"{shown}, {unit} {i + 1} has half of a surrogate pair") from None
        except ValueError as error:
            raise ValueError(f"{shown}, {unit} {i + 1} {error}") from None
        yield line
