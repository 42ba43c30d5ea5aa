"""Datasets of chains on disk: a folder of shards, each written atomically, and a manifest.

| file | content |
|---|---|
| `manifest.json` | `identity` (tasks, vocabulary, counts by length, seed, check, model, `autocast` if it is not fp32), the number of shards, `complete`, and in a complete dataset the counts of `relay_fast.relay.filter_metrics` |
| `shard-00000.safetensors`, … | the columns of `Samples`, and `passed` (S,) bool; the header holds the dataset's fingerprint, the shard's index, a digest and the counts |

A shard depends on the identity and its index alone. An interrupted writer leaves complete shards
only, and the same call writes the missing ones: the finished folder is the same, bit for bit.
Several writers, each with a share of the shards, finish it together.
"""  # noqa: E501

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.data._utils.collate import default_collate_fn_map

from relay_fast.relay import filter_metrics
from relay_fast.relay.chain_parts import (
    Counts,
    WrittenChains,
    chains_identity,
    check_request,
    draw_problems,
    part_sizes,
    write_chains,
)
from relay_fast.relay.label_free import Bounds
from relay_fast.tasks import Samples, Task, Vocabulary, make_task
from relay_fast.training.model_files import Model
from relay_fast.utils.files import (
    cannot_write,
    clear_partials,
    differences,
    first_differences,
    json_text,
    write_json,
)
from relay_fast.utils.locks import LOCK, FolderInUse, lock_folder
from relay_fast.utils.ragged import lengths_to_offsets
from relay_fast.utils.tensor_files import load_checkpoint, load_metadata, save_checkpoint

KIND = "relay_fast chains"
_MANIFEST = ("identity", "shards", "complete")
_IDENTITY = ("model", "tasks", "vocabulary", "counts", "seed", "verify", "shard_chains")
SHARD_CHAINS = 2048


class DatasetError(RuntimeError):
    """Raised for a dataset folder that cannot be used; the message says what to do."""


# Long: most of it is the description of the arguments.
def write_dataset(
    folder: str | os.PathLike,
    model: Model,
    tasks: Mapping[str, Task],
    counts: Counts,
    *,
    seed: int = 0,
    verify: str | None = "self",
    shard_chains: int = SHARD_CHAINS,
    share: tuple[int, int] = (0, 1),
    ready: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], Any] | None = None,
    bounds: Bounds | None = None,
    autocast: str = "fp32",
) -> dict[str, Any]:
    """Generates chains with a model and writes them into a folder, or continues such a folder.

    Each shard has its share of every task and length. All chains are kept, passed or not.

    Args:
        folder: The dataset's folder, made if it is missing.
        model: Writes the chains.
        tasks: The tasks by name, at least those in `counts`.
        counts: {task: {length: number of chains}}.
        seed: Selects the problems.
        verify: The check, see `relay_fast.tasks.verify.verify_chains`.
        shard_chains: The most chains in a shard.
        share: (i, n): write every n-th shard from shard i on; n writers may work side by side.
        ready: Called when all is checked, before the work.
        progress: Called with (chains done, chains in all), those of the share.
        bounds: Of the label-free filter, see `relay_fast.relay.label_free.confidence_bounds`; a
            folder that is continued keeps its own.
        autocast: Precision of the GEMMs, "fp32" (the parameters' own dtype) or "bf16".

    Returns:
        The content of manifest.json, not complete while other writers have to write shards.

    Raises:
        ValueError: The model or a task does not support the arguments.
        DatasetError: The folder holds other chains, or a damaged shard.
        CheckpointError: A file cannot be read or written.
    """
    folder = Path(folder)
    check_request(model, tasks, counts, seed, verify, shard_chains)
    bounds = kept_bounds(folder, bounds)
    identity = chains_identity(model, tasks, counts, seed, verify, shard_chains, bounds, autocast)
    sizes = part_sizes(counts, shard_chains)
    manifest = {"kind": KIND, "identity": identity, "shards": len(sizes), "complete": False}
    with _locked(folder, share):
        _open(folder, manifest, alone=share[1] == 1)
        ready()
        own, done, tables = range(share[0], len(sizes), share[1]), 0, {}
        chains = sum(sizes[index] for index in own)
        for index in own:
            advance = progress and (lambda k, _, n=done: progress(n + k, chains))
            options = {"verify": verify, "bounds": bounds, "autocast": autocast}
            options["progress"] = advance
            draw = partial(draw_problems, tasks, counts, seed, index, len(sizes))
            tables[index] = _shard_counts(folder, index, identity, model, draw, tasks, options)
            done += sizes[index]
        if not missing_shards(folder, manifest):
            _complete(folder, _fingerprint(identity), manifest, tables)
    return manifest


def _shard_counts(
    folder: Path,
    index: int,
    identity: Mapping[str, Any],
    model: Model,
    draw: Callable[[], Samples],
    tasks: Mapping[str, Task],
    options: Mapping[str, Any],
) -> filter_metrics.Table:
    """Returns the counts of a shard, which is written if it is not there."""
    path, fingerprint = shard_path(folder, index), _fingerprint(identity)
    if path.exists():
        _, metadata = _read_shard(path, fingerprint, index)
    else:
        metadata = {"dataset": fingerprint, "index": index}
        _write_shard(path, model, draw(), tasks, metadata, options)
    return filter_metrics.from_json(metadata["counts"])


def _complete(
    folder: Path, fingerprint: str, manifest: dict[str, Any], tables: dict[int, Any]
) -> None:
    """Completes and writes the manifest; reads the counts of shards that are not in `tables`."""
    for index in sorted(set(range(manifest["shards"])) - set(tables)):
        _, metadata = _read_shard(shard_path(folder, index), fingerprint, index)
        tables[index] = filter_metrics.from_json(metadata["counts"])
    counted = filter_metrics.add([tables[index] for index in range(manifest["shards"])])
    manifest |= {"complete": True, "counts": filter_metrics.to_json(counted)}
    _write_manifest(folder, manifest)


def kept_bounds(folder: str | os.PathLike, bounds: Bounds | None = None) -> Bounds | None:
    """Returns the bounds of the label-free filter in a dataset folder, `bounds` if there is none
    yet."""
    if not (Path(folder) / "manifest.json").is_file():
        return bounds
    return read_manifest(folder)["identity"].get("bounds")


def missing_shards(folder: str | os.PathLike, manifest: Mapping[str, Any]) -> list[int]:
    """Returns the shards of a dataset that are not there."""
    return [i for i in range(manifest["shards"]) if not shard_path(folder, i).exists()]


def read_manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """Reads the manifest of a dataset folder. Raises DatasetError if there is none."""
    path = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        manifest = None
    except ValueError as error:
        raise DatasetError(
            f"{path} is damaged ({error}); delete the folder and write the chains again."
        ) from error
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise DatasetError(
            f"{folder} is no folder of chains (no valid manifest.json); make one with "
            f"python -m relay_fast.generate --out RUN --dataset {folder}."
        )
    identity = manifest.get("identity")
    missing = [key for key in _MANIFEST if key not in manifest]
    missing += [key for key in _IDENTITY if not isinstance(identity, dict) or key not in identity]
    if missing:
        raise DatasetError(
            f"the chains in {folder} were written by another version of relay_fast: their "
            f"manifest.json has no {missing[0]!r}; use that version, or write the chains again."
        )
    return manifest


def dataset_tasks(manifest: Mapping[str, Any]) -> dict[str, Task]:
    """Builds the tasks of a dataset, by name."""
    identity = manifest["identity"]
    vocabulary = Vocabulary.from_dict(identity["vocabulary"])
    return {
        name: make_task(vocabulary=vocabulary, **parameters)
        for name, parameters in identity["tasks"].items()
    }


def shard_path(folder: str | os.PathLike, index: int) -> Path:
    """Returns the path of a shard."""
    return Path(folder) / f"shard-{index:05d}.safetensors"


class ChainDataset(Dataset):
    """A dataset of the chains in one or more folders, checked once and mapped into memory.

    An item is a `Samples` of one chain; a slice, or a batch of a `DataLoader`, is a `Samples` of
    several. It also serves as the samples of a stream that shuffles them anew each epoch:
    `relay_fast.data.streams.SampleStream(ChainDataset("DIR"), tasks, form, schedule, …)`.

    Args:
        folders: One dataset folder or several.
        only_passed: Leave out chains that did not pass the dataset's check.
        unfinished: Accept a folder that is still being written, with the shards that it has.

    Raises:
        DatasetError: A folder is no complete dataset, or a shard does not belong to it.
        CheckpointError: A shard cannot be read.
    """

    def __init__(
        self,
        folders: str | os.PathLike | Sequence[str | os.PathLike],
        *,
        only_passed: bool = True,
        unfinished: bool = False,
    ):
        single = isinstance(folders, (str, os.PathLike))
        self.folders = [Path(folders)] if single else [Path(folder) for folder in folders]
        self._places: list[tuple[Path, str, int]] = []
        for folder in self.folders:
            manifest = read_manifest(folder)
            fingerprint = _fingerprint(manifest["identity"])
            missing = missing_shards(folder, manifest)
            there = sorted(set(range(manifest["shards"])) - set(missing))
            if missing and manifest["complete"]:
                raise DatasetError(
                    f"{shard_path(folder, missing[0])} is missing; run the command that writes the "
                    f"chains again."
                )
            if missing and not unfinished:
                raise DatasetError(
                    f"the chains in {folder} are not finished; run the command that writes them "
                    f"again, with --shard too if it had one ({shard_path(folder, missing[0]).name} "
                    f"is missing), or ask for unfinished=True."
                )
            self._places += [(shard_path(folder, i), fingerprint, i) for i in there]
        passed = [shard["passed"].numpy() for shard in self._shards]
        chosen = [np.flatnonzero(p) if only_passed else np.arange(len(p)) for p in passed]
        self._rows = np.concatenate([np.zeros(0, np.int64), *chosen])
        self._offsets = lengths_to_offsets(np.array([len(own) for own in chosen], np.int64))

    @cached_property
    def _shards(self) -> list[dict[str, Tensor]]:
        return [_read_shard(*place)[0] for place in self._places]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_shards"}

    def __len__(self) -> int:
        return len(self._rows)

    def parts(self) -> Iterator[WrittenChains]:
        """Yields all chains of each shard, those that did not pass included."""
        for shard in self._shards:
            yield WrittenChains(_samples(shard), shard["passed"].numpy(), None)

    def __getitem__(self, index: int | slice) -> Samples:
        """Returns the chain at an index, which may be negative, or the chains of a slice."""
        places = range(len(self))[index]
        return self.take(np.array(places if isinstance(index, slice) else [places], np.int64))

    def take(self, index: Any) -> Samples:
        """Returns the chains that numpy indexing with `index` selects, in order."""
        chosen = np.atleast_1d(np.arange(len(self))[index])
        shard = np.searchsorted(self._offsets, chosen, side="right") - 1
        order = np.argsort(shard, kind="stable")
        parts = []
        for k in np.unique(shard):
            own = chosen[order[shard[order] == k]]
            parts.append(_samples(self._shards[k]).take(self._rows[own]))
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return Samples.concat(parts).take(back)


def _collate(chains: list[Samples], *, collate_fn_map: Any = None) -> Samples:
    """Concatenates a `DataLoader`'s batch; chains have no common length to stack."""
    return Samples.concat(chains)


default_collate_fn_map[Samples] = _collate


def _fingerprint(identity: Mapping[str, Any]) -> str:
    text = json_text(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def _locked(folder: Path, share: tuple[int, int]) -> Iterator[None]:
    """Makes the folder and locks it, or a share of it, against other writers; a killed process
    holds no lock.

    Raises DatasetError for a folder that is locked, holds other files or cannot be used.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = any(
            not file.name.startswith((LOCK, ".manifest.")) for file in folder.iterdir()
        )  # a manifest may just be being written
        if others and not (folder / "manifest.json").exists():
            raise DatasetError(
                f"{folder} is not empty and holds no chains (no manifest.json); give another "
                f"--dataset."
            )
        name = LOCK if share[1] == 1 else f"{LOCK}-{share[0]}-of-{share[1]}"
        lock = lock_folder(folder, name)
    except FolderInUse as error:
        raise DatasetError(
            f"another process is writing {folder} ({error}); wait for it, or give another "
            f"--dataset."
        ) from error
    except OSError as error:
        raise DatasetError(
            f"the folder {folder} cannot be used ({error.strerror}); give another --dataset."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _open(folder: Path, manifest: Mapping[str, Any], alone: bool) -> None:
    """Writes the manifest of a new folder; raises DatasetError for one with other chains or files.

    What a killed writer left is deleted if this one is alone.
    """
    if alone:
        clear_partials(folder, workers=False)
    if not (folder / "manifest.json").exists():
        _write_manifest(folder, manifest)
        return
    pair = (manifest["identity"], read_manifest(folder)["identity"])
    found = differences(*({"autocast": "fp32", **identity} for identity in pair), there="there")
    if found:
        raise DatasetError(
            f"the folder {folder} holds other chains: {first_differences(found)}; give another "
            f"--dataset, or the same command and model to continue it."
        )
    for index in range(manifest["shards"]):
        path = shard_path(folder, index)
        if path.exists():
            _check_place(path, load_metadata(path), _fingerprint(manifest["identity"]), index)


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    path = folder / "manifest.json"
    try:
        write_json(path, manifest)
    except OSError as error:
        raise DatasetError(cannot_write(path, error)) from error


def _write_shard(
    path: Path,
    model: Model,
    problems: Samples,
    tasks: Mapping[str, Task],
    metadata: dict[str, Any],
    options: Mapping[str, Any],
) -> None:
    """Generates and writes a shard, with options of `write_chains`; adds the counts and the digest
    to `metadata`."""
    written, passed, ended, kept = write_chains(model, problems, tasks, **options)
    tensors = {f.name: torch.from_numpy(getattr(written, f.name)) for f in fields(written)}
    tensors["passed"] = torch.from_numpy(passed)
    counts = filter_metrics.count(written, problems, tasks, passed, ended, kept)
    metadata |= {"counts": filter_metrics.to_json(counts), "digest": _digest(tensors)}
    save_checkpoint(path, tensors, metadata)


def _read_shard(
    path: Path, fingerprint: str, index: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, metadata = load_checkpoint(path)
    _check_place(path, metadata, fingerprint, index)
    if missing := {"passed", *(f.name for f in fields(Samples))} - set(tensors):
        raise DatasetError(
            f"{path} was written by another version of relay_fast, without {min(missing)!r}; use "
            f"that version, or write the chains again."
        )
    if metadata.get("digest") != _digest(tensors):
        raise DatasetError(
            f"{path} is damaged (its content does not match its digest); delete it and run the "
            f"command that writes the chains again."
        )
    return tensors, metadata


def _check_place(path: Path, metadata: Mapping[str, Any], fingerprint: str, index: int) -> None:
    """Raises DatasetError for a shard of another dataset, or of another place in this one."""
    if (metadata.get("dataset"), metadata.get("index")) != (fingerprint, index):
        raise DatasetError(
            f"{path} belongs to another dataset or index; move it out of the folder and run the "
            f"command that writes the chains again."
        )


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensors[name].numpy()))
    return digest.hexdigest()


def _samples(tensors: Mapping[str, Tensor]) -> Samples:
    return Samples(**{f.name: tensors[f.name].numpy() for f in fields(Samples)})
