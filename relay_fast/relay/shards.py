"""Shards of work that independent processes do: `--shard I/N`, or one for each of torchrun's.

The processes never talk to each other; whoever finishes last merges what all have written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from relay_fast.batch.shares import deal
from relay_fast.relay.run_folder import RunFolder, RunFolderError
from relay_fast.tasks import Task
from relay_fast.training.ranks import ranks_wanted
from relay_fast.utils.files import differences, first_differences

Share = tuple[int, int]  # (i, n): the i-th of n, 0 ≤ i < n


def parse_shard(text: str) -> Share:
    """Reads "I/N". Raises ValueError."""
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if match is None:
        raise ValueError(f"--shard {text!r} is not understood: give I/N, for example 0/4")
    i, n = int(match[1]), int(match[2])
    if i >= n:
        most = f"0/{n} to {n - 1}/{n}" if n else "0/1 or more"
        raise ValueError(f"--shard {text} is not there: shards count from 0, give {most}")
    return i, n


def share_wanted(text: str | None, device: str) -> tuple[Share, str]:
    """Returns this process's share of the work, and its device.

    Args:
        text: "I/N", or None for the share of its rank under torchrun or Slurm, else everything.
        device: "cpu", or "cuda" for the GPU of this process's number on its machine.

    Raises:
        ValueError: `text` is wrong, or the variables of torchrun are.
    """
    if text is not None:
        return parse_shard(text), device
    found = ranks_wanted()
    if found is None:
        return (0, 1), device
    if device == "cuda":
        device = f"cuda:{found['LOCAL_RANK']}"
    return (int(found["RANK"]), int(found["WORLD_SIZE"])), device


def share_lengths(
    tasks: Mapping[str, Task], lengths: Mapping[str, Sequence[int]], share: Share
) -> dict[str, list[int]]:
    """Returns the lengths of each task that a process evaluates; the shares cost about the same.

    Args:
        tasks: The tasks by name.
        lengths: All lengths of each task.
        share: Which share of how many.
    """
    pairs = [(name, length) for name, own in lengths.items() for length in own]
    costs = [tasks[name].max_problem_tokens(n) * int(tasks[name].loops(n)) for name, n in pairs]
    chosen = [pairs[k] for k in deal(np.array(costs, np.int64), share[1])[share[0]]]
    return {name: own for name in lengths if (own := [n for task, n in chosen if task == name])}


class EvaluationShards:
    """The files in which the shards of an evaluation wait in the run's folder for each other.

    Args:
        folder: The run's folder.
        share: This process's share.
        identity: JSON-able; must be equal in all shards.

    Raises:
        RunFolderError: A shard in the folder is of another evaluation.
    """

    def __init__(self, folder: RunFolder, share: Share, identity: Mapping[str, Any]):
        self.folder, self.share, self.identity = folder, share, dict(identity)
        for k in range(share[1]):
            if k != share[0]:
                self._read(k)

    def name(self, k: int) -> str:
        """Returns the file's name of the k-th shard."""
        return f"evaluation-{k}-of-{self.share[1]}.json"

    def write(self, results: Mapping[str, Any]) -> dict[str, Any] | None:
        """Writes this shard; returns the merged evaluation.json, None while a shard is missing."""
        own = {"identity": self.identity, "results": dict(results)}
        self.folder.write(self.name(self.share[0]), own)
        parts = [self._read(k) for k in range(self.share[1])]
        if parts[self.share[0]] is None:  # whoever finished with us has merged them
            return json.loads((self.folder.path / "evaluation.json").read_text())
        if None in parts:
            return None
        merged = {**results, "accuracy": {}}
        for model in results["accuracy"]:
            merged["accuracy"][model] = table = {}
            for task, lengths in self.identity["lengths"].items():
                found: dict[str, Any] = {}
                for part in parts:
                    found |= part["accuracy"][model].get(task, {})
                table[task] = {str(length): found[str(length)] for length in lengths}
        self.folder.write("evaluation.json", merged)
        for k in range(self.share[1]):
            (self.folder.path / self.name(k)).unlink(missing_ok=True)
        return merged

    def missing(self) -> list[str]:
        """Returns the shards that are not there, as "I/N"."""
        n = self.share[1]
        there = (self.folder.path / self.name(k) for k in range(n))
        return [f"{k}/{n}" for k, path in enumerate(there) if not path.exists()]

    def _read(self, k: int) -> dict[str, Any] | None:
        """Returns the results of a shard, None if it is not there."""
        path: Path = self.folder.path / self.name(k)
        content = None
        with suppress(FileNotFoundError):
            text = path.read_text()
            with suppress(ValueError):
                content = json.loads(text)
            if not isinstance(content, dict) or {"identity", "results"} - set(content):
                raise RunFolderError(f"{path} is damaged: delete it and evaluate its shard again.")
            found = differences(self.identity, content["identity"], there="there")
            if found:
                raise RunFolderError(
                    f"{path} is of another evaluation: {first_differences(found)}; delete it, or "
                    f"give the same arguments and models."
                )
        return None if content is None else content["results"]
