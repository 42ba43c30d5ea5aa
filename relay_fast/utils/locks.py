"""One writer a folder: a lock that ends with its process, however that ends."""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from pathlib import Path
from weakref import WeakValueDictionary

from filelock import FileLock, Timeout

LOCK = ".lock"
_held: WeakValueDictionary[str, FolderLock] = WeakValueDictionary()  # by path, of this process


class FolderInUse(RuntimeError):
    """Somebody else writes the folder; the text says who, as far as that is known."""


class FolderLock:
    """Held until `release`, the end of this object, or of the process (kill -9 too).

    Raises FolderInUse where it is held, OSError where the file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._owner = path, path.with_name(f"{path.name}.owner")
        self._lock = FileLock(path, thread_local=False)
        while True:
            path.touch()
            before = path.stat().st_ino
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise FolderInUse(_owner_text(self._owner)) from None
            if _inode(path) == before:
                break
            self._lock.release()  # of a file that its last holder has just deleted
        # Not in the locked file: there others may neither read (Windows) nor keep what they open.
        try:
            self._owner.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        except OSError:
            self._lock.release()
            raise

    def release(self) -> None:
        if self._lock.is_locked:
            for file in (self._owner, self.path):
                with suppress(OSError):  # Windows deletes no open file: it stays, unlocked
                    file.unlink(missing_ok=True)
            self._lock.release()

    def __del__(self) -> None:
        try:
            self.release()
        except Exception:  # of an interpreter that is being taken down
            pass


def lock_folder(folder: Path, name: str = LOCK, *, again: bool = False) -> FolderLock:
    """The lock of a folder that is there. again: also where this process holds it already, then
    that very lock. Raises FolderInUse and OSError as `FolderLock` does."""
    path = folder.resolve() / name
    lock = _held.get(str(path))
    if lock is not None and lock._lock.is_locked:
        if not again:
            raise FolderInUse(_owner_text(lock._owner))
        return lock
    lock = _held[str(path)] = FolderLock(path)
    return lock


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _owner_text(file: Path) -> str:
    try:
        owner = json.loads(file.read_text())
        return f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):  # being written just now
        return "another process"
