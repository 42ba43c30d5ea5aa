"""Files that are either the old one or the whole new one, and what differs between two configs."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_ABSENT = object()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what was written there replaces `path` at the end.

    A crash at any moment leaves the old file or the whole new one. It gets the mode of any new
    file, whatever the writer would give it. Raises what the body raises, with the temporary file
    removed, and OSError if the folder cannot be written.
    """
    # The suffix stays last: some writers go by it.
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        partial.touch()
        mode = stat.S_IMODE(partial.stat().st_mode)
        yield partial
        partial.chmod(mode)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, value: Any) -> None:
    """Atomically; raises TypeError for what JSON cannot hold."""
    text = json.dumps(value, indent=1)
    with replacing(path) as partial:
        partial.write_text(text + "\n")


def cannot_write(path: Path, error: OSError) -> str:
    """The sentence about it."""
    return (
        f"{path} cannot be written ({error.strerror}); check that its folder is writable and that "
        f"the disk is not full."
    )


def differences(
    ours: Any, theirs: Any, here: str = "here", there: str = "in the file"
) -> list[str]:
    """One text for each leaf that differs: `model.d_model (64 here, 128 in the file)`."""
    return [
        f"{key} ({_text(a)} {here}, {_text(b)} {there})"
        for key, a, b in _differing_leaves(_plain(ours), _plain(theirs), "")
    ]


def first_differences(found: list[str], most: int = 3) -> str:
    """The first of `differences` in one line."""
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more


def _plain(value: Any) -> Any:
    """What `value` reads as after a trip through JSON (tuples as lists, keys as strings)."""
    return json.loads(json.dumps(value))


def _differing_leaves(a: Any, b: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for name in [*a, *(name for name in b if name not in a)]:
            inner = f"{key}.{name}" if key else name
            yield from _differing_leaves(a.get(name, _ABSENT), b.get(name, _ABSENT), inner)
    elif a != b:
        yield key or "the config", a, b


def _text(value: Any) -> str:
    if value is _ABSENT:
        return "absent"
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
