"""Files that are either the old one or the whole new one, and what differs between two configs."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from relay_fast.utils.deprecation import current_config

_ABSENT = object()
_PARTIAL = re.compile(r"\.(?P<stem>.+)\.(?P<pid>\d+)\.partial(\.\w+)?")  # as `replacing` names it


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
    if os.name == "nt":  # has no descriptors of folders
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def clear_partials(
    folder: Path, ours: Callable[[str], bool] = lambda stem: True, *, workers: bool = True
) -> None:
    """Deletes what `replacing` had begun in `folder` when its process was killed.

    ours: of which files, by their name without ending. workers: whether a worker process may have
    outlived the one that started it; what such a one is writing stays.
    """
    for file in folder.glob(".*.partial*"):
        match = _PARTIAL.fullmatch(file.name)
        if match and ours(match["stem"]) and not (workers and _worker_lives(int(match["pid"]))):
            try:
                file.unlink(missing_ok=True)
            except PermissionError:  # on Windows: somebody has it open
                continue


def _worker_lives(pid: int) -> bool:
    """Whether this is, as far as the system tells, a process that another one of Python started."""
    if pid == os.getpid() or os.name == "nt":  # there kill() would end it
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
    """`value` as JSON that any reader takes.

    Raises ValueError for a number that is not finite, TypeError for what else JSON cannot hold.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError as error:
        found = next(_not_finite(value, ""), None)
        if found is None:
            raise
        raise ValueError(f"{found[0]} = {found[1]}: JSON holds finite numbers only") from error


def finite(value: Any) -> Any:
    """`value` with null in the place of every number that is not finite."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _not_finite(value: Any, key: str) -> Iterator[tuple[str, float]]:
    """(place, number) of what is not finite."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _not_finite(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from _not_finite(inner, f"{key}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield key or "the value", value


def write_json(path: Path, value: Any) -> None:
    """Atomically; raises ValueError and TypeError as `json_text` does."""
    text = json_text(value, indent=1)
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
    """Returns `value` after a round trip through JSON, its settings under their current names."""
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
