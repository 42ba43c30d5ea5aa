"""Checkpoint files: safetensors with JSON metadata (config, versions, step) in their header.

Nothing is pickled. Every error is a CheckpointError that names the file and what to do.
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

# Header entry of the metadata; a file without it was not written by relay_fast.
_HEADER_KEY = "relay_fast"


class CheckpointError(RuntimeError):
    """Raised for a checkpoint that cannot be read or written, or does not fit its target."""


def save_checkpoint(
    path: str | os.PathLike,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    part_bytes: int | None = None,
) -> None:
    """Writes a checkpoint atomically: at any moment `path` is the old one or the whole new one.

    Args:
        path: The file.
        tensors: Tensors of any device, dtype and layout.
        metadata: JSON-able; `load_checkpoint(expect=...)` compares `metadata["config"]`.
        part_bytes: Split files at this size (a larger tensor gets a file of its own); the file at
            `path` then names the others beside it.

    Raises:
        CheckpointError: A file cannot be written.
        TypeError, ValueError: JSON cannot hold the metadata (such as NaN).
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
    """Splits the tensors, in order, into groups of at most `part_bytes`; at least one group."""
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
    """Reads a checkpoint.

    Args:
        path: The file.
        expect: The config that it must have been written with; None accepts any.

    Returns:
        (tensors on the CPU, metadata).

    Raises:
        CheckpointError: The file is missing, unreadable, truncated, not written by relay_fast, or
            of another config.
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


def load_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """Returns the metadata of a checkpoint, without reading its tensors. Raises CheckpointError."""
    return _read(Path(path), tensors=False)[1]


def _read(path: Path, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with open(path, "rb"):  # names the cause; safe_open reports every error as "No such file"
            pass
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            read = {name: file.get_tensor(name) for name in file.keys() if tensors}
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
    return read, metadata


def _own_storage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns contiguous CPU tensors that share no memory (safetensors refuses tied weights)."""
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
    """Returns the tensors whose names begin with `prefix` and a dot, without both."""
    start = f"{prefix}."
    return {name.removeprefix(start): v for name, v in tensors.items() if name.startswith(start)}
