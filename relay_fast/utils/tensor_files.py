"""Checkpoint files: safetensors with a JSON text (config, versions, step) in their header.

Nothing is ever pickled. Every error is a CheckpointError whose text is one sentence that names the
file and what to do.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from relay_fast.utils.files import differences, first_differences, json_text, replacing

# The one header entry that is ours; a file without it was written by something else.
_HEADER_KEY = "relay_fast"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or does not belong to what it is loaded into."""


def save_checkpoint(
    path: str | os.PathLike,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    part_bytes: int | None = None,
) -> None:
    """Write `tensors` (any device, dtype and layout) and the JSON-able `metadata` to `path`.

    part_bytes: at most so much in a file (a larger tensor has one of its own), for places that take
    small files only; the file at `path` then names those beside it. Atomic: at any moment `path` is
    the old checkpoint or the whole new one. `metadata["config"]` is what
    `load_checkpoint(expect=...)` compares. Raises CheckpointError if a file cannot be written,
    TypeError and ValueError for metadata that JSON cannot hold (such as NaN).
    """
    path = Path(path)
    first, *others = _parts(tensors, part_bytes)
    mark = hashlib.sha256(json_text(metadata).encode()).hexdigest()[:8]
    names = [f"{path.stem}.{mark}-{k}{path.suffix}" for k in range(1, len(others) + 1)]
    for name, part in zip(names, others, strict=True):
        _write(path.with_name(name), part, {"part_of": path.name})
    _write(path, first, {**metadata, "parts": names} if names else metadata)
    for old in path.parent.glob(f"{glob.escape(path.stem)}.????????-*{path.suffix}"):
        if old.name not in names:
            old.unlink()


def _parts(tensors: Mapping[str, Tensor], part_bytes: int | None) -> list[dict[str, Tensor]]:
    """The tensors in groups of at most `part_bytes`, in their order; one group at least."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in tensors.items():
        if part_bytes is not None and parts[-1] and size + value.nbytes > part_bytes:
            parts.append({})
            size = 0
        parts[-1][name] = value
        size += value.nbytes
    return parts


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    header = {_HEADER_KEY: json_text(metadata)}
    try:
        with replacing(path) as partial:
            save_file(_own_storage(tensors), partial, metadata=header)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the checkpoint {path} cannot be written ({_reason(error)}); check that its folder "
            f"exists and is writable and that the disk is not full."
        ) from error


def load_checkpoint(
    path: str | os.PathLike, expect: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors on the CPU, metadata) of the checkpoint at `path`.

    `expect`: the config that it must have been written with; None accepts any.
    Raises CheckpointError if the file is missing, unreadable, truncated, not ours, or of another
    config.
    """
    tensors, metadata = _read(Path(path))
    if expect is not None:
        found = differences(expect, metadata.get("config", {}))
        if found:
            raise CheckpointError(
                f"{path} belongs to another config: {first_differences(found)}; use the config it "
                f"was written with, or another checkpoint."
            )
    for name in metadata.pop("parts", ()):
        tensors |= _read(Path(path).with_name(name))[0]
    return tensors, metadata


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with open(path, "rb"):  # names the cause, where safe_open says "No such file" to any
            pass
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise CheckpointError(
            f"there is no checkpoint {path}; check the path, or train first to make it."
        ) from error
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file ({_reason(error)}); delete it and run "
            f"the same command again, or restore it from a copy."
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint {path} cannot be read ({_reason(error)}); check its permissions."
        ) from error
    metadata = _parse_header(header)
    if metadata is None:
        raise CheckpointError(
            f"{path} was not written by relay_fast (its header has no relay_fast metadata); give a "
            f"checkpoint made by relay_fast.utils.tensor_files.save_checkpoint."
        )
    return tensors, metadata


def _own_storage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory (safetensors refuses tied weights)."""
    result, seen = {}, set()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        if storage in seen or value.untyped_storage().nbytes() != value.nbytes:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        result[name] = value
    return result


def _parse_header(header: Mapping[str, str]) -> dict[str, Any] | None:
    try:
        metadata = json.loads(header[_HEADER_KEY])
    except (KeyError, ValueError):
        return None
    return metadata if isinstance(metadata, dict) else None


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).rstrip(".")


def _part(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {name.removeprefix(start): v for name, v in tensors.items() if name.startswith(start)}
