"""Run folders: one folder per run, continued by the same command.

| file | content |
|---|---|
| `config.json` | the config; a folder with another config is refused |
| `stages.json` | the finished stages, with the time and duration of each |
| `results.json` | every number of the run; null where one is not finite (a loss that diverged) |
| `checkpoints/*.safetensors` | models and training states |

Every write is atomic: an interrupted run leaves no incomplete file. One process at a time runs in a
folder; the settings of the machine (`MACHINE`) may differ from call to call.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from relay_fast.utils.deprecation import current_config
from relay_fast.utils.files import (
    cannot_write,
    clear_partials,
    differences,
    finite,
    first_differences,
    json_text,
    write_json,
)
from relay_fast.utils.locks import LOCK, FolderInUse, lock_folder

MACHINE = ("workers", "data_workers")  # keys of the config that change no number of a run
_EVALUATION = "evaluation"  # file that may be written while the run goes on


class RunFolderError(RuntimeError):
    """Raised for a run folder that cannot be used; the message says what to do."""


class RunFolder:
    """The folder of one run.

    Attributes:
        path: Path of the folder.
        config: The run's config, as read back from JSON.
    """

    def __init__(self, path: str | os.PathLike, config: Mapping[str, Any]) -> None:
        """Makes the folder, or continues one with the same config.

        Args:
            path: Path of the folder.
            config: The run's config, JSON-able.

        Raises:
            RunFolderError: The path is a file; or the folder is not empty and no run folder, has
                another config, is not writable, or is in use by another process.
            ValueError: JSON cannot hold the config.
        """
        self._use(path, config, LOCK)

    def _use(self, path: str | os.PathLike, config: Mapping[str, Any], lock: str) -> None:
        self.path = Path(path)
        self.config: dict[str, Any] = json.loads(json_text(config))
        with _refusals(self.path):
            self._make_or_continue(lock)

    @classmethod
    def open(cls, path: str | os.PathLike, write: bool = False) -> RunFolder:
        """Opens the run folder at `path` with its own config.

        Args:
            path: Path of the folder.
            write: Lock it for writing an evaluation and check that it is writable.

        Raises:
            RunFolderError: There is no such folder, or it cannot be read or written.
        """
        path = Path(path)
        try:
            if not (path / "config.json").is_file():
                raise RunFolderError(
                    f"{path} is not a run folder (no config.json); make one with "
                    f"python -m relay_fast.train --out {path}."
                )
            config = current_config(_read_json(path / "config.json"))
        except PermissionError as error:
            raise RunFolderError(
                f"no permission to read the run folder {path}; change its permissions."
            ) from error
        run = cls.__new__(cls)
        if write:
            run._use(path, config, f"{LOCK}.{_EVALUATION}")
        else:
            run.path, run.config = path, config
        return run

    def _make_or_continue(self, lock: str) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        config_file = self.path / "config.json"
        self._refuse_foreign(config_file)
        self._lock = lock_folder(self.path, lock, again=True)
        evaluates = lock != LOCK
        clear_partials(self.path, lambda stem: (stem == _EVALUATION) == evaluates)
        if config_file.is_file():
            theirs = _read_json(config_file)
            theirs |= {name: self.config[name] for name in MACHINE if name in self.config}
            self._refuse_changed_data(theirs)
            found = differences(self.config, theirs, there="in the folder")
            if found:
                raise RunFolderError(
                    f"the run folder {self.path} belongs to another config: "
                    f"{first_differences(found)}; give another --out, or the same config to "
                    f"continue it."
                )
            self.check_writable()
        else:
            write_json(config_file, self.config)
        (self.path / "checkpoints").mkdir(exist_ok=True)
        if not evaluates:
            clear_partials(self.path / "checkpoints")

    def _refuse_changed_data(self, theirs: Mapping[str, Any]) -> None:
        """Raises RunFolderError for a task whose files are called as before and hold other data."""
        for name, task in self.config.get("tasks", {}).items():
            ours = dict(task.get("parameters", {}))
            if "content" not in ours:
                continue
            old = theirs.get("tasks", {}).get(name, {})
            kept = dict(old.get("parameters", {}))
            content = ours.pop("content"), kept.pop("content", None)
            same = ours == kept and task.get("data") == old.get("data")
            if same and content[1] not in (None, content[0]):
                files = task.get("data"), ours.get("test_data"), ours.get("tokeniser")
                raise RunFolderError(
                    f"{' or '.join(map(str, filter(None, files)))} has changed since the run "
                    f"{self.path} began: restore the file, or give another --out"
                )

    def check_writable(self) -> None:
        """Raises RunFolderError if no file can be made in the folder; leaves it as it is."""
        # os.access checks the real user and misses read-only file systems.
        with _refusals(self.path), tempfile.TemporaryFile(dir=self.path):
            pass

    def _refuse_foreign(self, config_file: Path) -> None:
        """Raises RunFolderError for a folder that is neither empty nor a run folder."""
        others = (entry for entry in self.path.iterdir() if not entry.name.startswith("."))
        if not config_file.is_file() and any(others):
            raise RunFolderError(
                f"{self.path} is not empty and is not a run folder (no config.json); give "
                f"another --out."
            )

    def checkpoint(self, name: str) -> Path:
        """Returns the path of the checkpoint called `name`."""
        return self.path / "checkpoints" / f"{name}.safetensors"

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        """Writes a JSON file called `name`, with null for numbers that are not finite.

        Raises RunFolderError if it cannot be written.
        """
        try:
            write_json(self.path / name, finite(value))
        except OSError as error:
            raise RunFolderError(cannot_write(self.path / name, error)) from error

    def results(self) -> dict[str, Any]:
        """Returns the content of results.json, empty if there is none yet."""
        file = self.path / "results.json"
        return _read_json(file) if file.is_file() else {}

    def update_results(self, part: Mapping[str, Any]) -> dict[str, Any]:
        """Merges `part` into results.json and returns the whole.

        Dictionaries are merged key by key; any other value replaces the old one.
        """
        whole = _merged(self.results(), json.loads(json_text(finite(part))))
        self.write("results.json", whole)
        return whole

    def stage_done(self, name: str) -> bool:
        """Tells whether a stage is finished."""
        return name in self._stages()

    def mark_done(self, name: str, info: Mapping[str, Any] | None = None) -> None:
        """Records that a stage is finished, with `info`; call it once its files are on disk."""
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        stages = {**self._stages(), name: {"finished": finished, **(info or {})}}
        self.write("stages.json", stages)

    def _stages(self) -> dict[str, dict[str, Any]]:
        file = self.path / "stages.json"
        return _read_json(file) if file.is_file() else {}


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Turns the errors of a body that makes or locks the folder `path` into RunFolderError."""
    try:
        yield
    except FolderInUse as error:
        raise RunFolderError(
            f"another process runs in the folder {path} ({error}); wait for it, or give another "
            f"--out."
        ) from error
    except PermissionError as error:
        raise RunFolderError(
            f"no permission to write the run folder {path}; give another one with --out or change "
            f"its permissions."
        ) from error
    except (NotADirectoryError, FileExistsError) as error:
        raise RunFolderError(
            f"{path} is a file, or lies below one, where a run folder should be; give another "
            f"--out."
        ) from error
    except OSError as error:
        raise RunFolderError(
            f"the run folder {path} cannot be used ({error.strerror}); give another --out."
        ) from error


def versions(device: str = "cpu") -> dict[str, Any]:
    """Collects what the numbers of a run depend on beside its config: versions and hardware.

    Args:
        device: "cpu" or a CUDA device; looking up the name of the latter initialises CUDA.

    Returns:
        JSON-able values.
    """
    import numpy
    import torch

    from relay_fast import __version__

    processor = processor_name()
    name = torch.cuda.get_device_name(device) if str(device).startswith("cuda") else processor
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _installed_version("triton"),
        "numpy": numpy.__version__,
        "relay_fast": __version__,
        "commit": checkout_commit(),
        "machine": platform.platform(),
        "processor": processor,
        "cpu_count": os.cpu_count(),
        "device": str(device),
        "device_name": name,
    }


def code_versions() -> dict[str, Any]:
    """Returns the versions that must be the same in all processes of a run."""
    found = versions()
    return {key: found[key] for key in ("torch", "numpy", "relay_fast", "commit")}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise RunFolderError(
            f"{path} is damaged ({error}); restore it, or start again with another --out."
        ) from error
    if not isinstance(value, dict):
        raise RunFolderError(f"{path} holds no JSON object; start again with another --out.")
    return value


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    result = dict(old)
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else value
    return result


def _installed_version(name: str) -> str | None:
    # Importing triton would look for drivers.
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def checkout_commit() -> str | None:
    """Returns the checkout's commit, with `+` if tracked files have changed.

    Outside a checkout it is the environment variable RELAY_FAST_COMMIT, or None.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # an installed package may lie inside another repository
        return os.environ.get("RELAY_FAST_COMMIT")
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changed else "")


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
