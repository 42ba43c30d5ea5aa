"""Atomic writing of files, JSON, and differences between two configs."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from relay_fast.utils.deprecation import current_config

_ABSENT = object()
_PARTIAL = re.compile(
    r"\.(?P<stem>.+)\.(?P<pid>\d+)\.partial(\.\w+)?"
)  # names given by `replacing`


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path, which replaces `path` at the end of the body.

    A crash at any moment leaves the old file or the whole new one, with the mode of a new file. The
    temporary path lies in a folder of its own beside `path`, because some writers (safetensors)
    make a temporary file of their own; the folder goes whole, here or in `clear_partials`. Raises
    OSError if the folder of `path` is not writable.
    """
    folder = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    partial = folder / path.name  # the suffix stays because some writers depend on it
    try:
        folder.mkdir(exist_ok=True)
        partial.touch()
        mode = stat.S_IMODE(partial.stat().st_mode)
        yield partial
        partial.chmod(mode)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if os.name == "nt":  # cannot open folders
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def clear_partials(
    folder: Path, ours: Callable[[str], bool] = lambda stem: True, *, workers: bool = True
) -> None:
    """Deletes what `replacing` left in `folder` when a process was killed.

    Args:
        folder: The folder, without its sub-folders.
        ours: Selects files by the stem of the path that they replace, by default all.
        workers: Keep the files of worker processes that still run.
    """
    for file in folder.glob(".*.partial*"):
        match = _PARTIAL.fullmatch(file.name)
        if match and ours(match["stem"]) and not (workers and _worker_lives(int(match["pid"]))):
            if file.is_dir():
                shutil.rmtree(file, ignore_errors=True)  # Windows: a process may have it open
            else:  # of a version that wrote a file
                file.unlink(missing_ok=True)


def _worker_lives(pid: int) -> bool:
    """Tells whether `pid` is a running process that multiprocessing started, as far as known."""
    if pid == os.getpid() or os.name == "nt":  # on Windows, os.kill(pid, 0) would end it
        return False
    try:
        if Path("/proc/self/cmdline").exists():
            return b"multiprocessing" in Path(f"/proc/{pid}/cmdline").read_bytes()
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def json_text(value: Any, **options: Any) -> str:
    """Converts `value` to standard JSON; `options` are those of `json.dumps`.

    Raises ValueError for a number that is not finite, TypeError for other unsupported values.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError as error:
        found = next(_not_finite(value, ""), None)
        if found is None:
            raise
        raise ValueError(f"{found[0]} = {found[1]}: JSON holds finite numbers only") from error


def finite(value: Any) -> Any:
    """Returns a copy of `value` with None in place of numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _not_finite(value: Any, key: str) -> Iterator[tuple[str, float]]:
    """Yields (key, number) of the numbers that are not finite."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _not_finite(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from _not_finite(inner, f"{key}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield key or "the value", value


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically; raises ValueError and TypeError as `json_text` does."""
    write_text(path, json_text(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8 atomically."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def cannot_write(path: Path, error: OSError) -> str:
    """Returns the message for a file that cannot be written."""
    return (
        f"{path} cannot be written ({error.strerror}); check that its folder is writable and that "
        f"the disk is not full."
    )


def differences(
    ours: Any, theirs: Any, here: str = "here", there: str = "in the file"
) -> list[str]:
    """Lists the leaves that differ, as in `model.d_model (64 here, 128 in the file)`.

    Args:
        ours, theirs: JSON-able values, usually configs.
        here, there: Names of the two in the texts.
    """
    return [
        f"{key} ({_text(a)} {here}, {_text(b)} {there})"
        for key, a, b in _differing_leaves(_plain(ours), _plain(theirs), "")
    ]


def first_differences(found: list[str], most: int = 3) -> str:
    """Joins the first `most` of `differences` in one line."""
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more


def _plain(value: Any) -> Any:
    """Returns `value` as read back from JSON, its settings under their current names."""
    return current_config(json.loads(json_text(value)))


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
