"""Locks that allow one writer for each folder and end with their process."""

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
    """Raised if another process writes the folder; the message names it, if known."""


class FolderLock:
    """A lock file, held until `release`, the end of this object or of the process (even kill -9).

    Raises FolderInUse if another process holds it, OSError if the file cannot be made.
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
            self._lock.release()  # its last holder has just deleted the file
        # The owner has its own file: Windows lets no other process read a locked one.
        try:
            self._owner.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        except OSError:
            self._lock.release()
            raise

    def release(self) -> None:
        """Releases the lock and deletes its files."""
        if self._lock.is_locked:
            for file in (self._owner, self.path):
                with suppress(OSError):  # Windows cannot delete an open file: it stays, unlocked
                    file.unlink(missing_ok=True)
            self._lock.release()

    def __del__(self) -> None:
        try:
            self.release()
        except Exception:  # at the end of the interpreter
            pass


def lock_folder(folder: Path, name: str = LOCK, *, again: bool = False) -> FolderLock:
    """Locks an existing folder.

    Args:
        folder: The folder.
        name: Name of the lock file.
        again: Return this process's own lock if it holds one already.

    Raises:
        FolderInUse: The lock is held.
        OSError: The file cannot be made.
    """
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
    except (OSError, ValueError, KeyError, TypeError):  # just being written
        return "another process"
