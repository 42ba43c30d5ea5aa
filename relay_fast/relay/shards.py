"""Shards of work that independent processes do: `--shard I/N`, or one for each of torchrun's.

The processes of torchrun begin together, or not at all if one of them is refused. After that none
talks to another; whoever finishes last merges what all have written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from relay_fast.batch.shares import deal
from relay_fast.relay.run_folder import RunFolder, RunFolderError, code_versions
from relay_fast.tasks import Task
from relay_fast.training.ranks import agree, joined_ranks, refuse
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


class Start(NamedTuple):
    """A process's start: its share of the work, its device, and `ready`, to be called when all
    is checked; it raises RefusedTogether if another process is not ready."""

    share: Share
    device: str
    ready: Callable[[], None]


@contextmanager
def shared_start(
    text: str | None, device: str, identity: Callable[[], dict[str, Any]]
) -> Iterator[Start]:
    """Yields this process's `Start`; the work is the body.

    Until `ready`, an error of the body is raised as RefusedTogether in all processes that torchrun
    or Slurm started.

    Args:
        text: "I/N", or None for the share of its rank under torchrun or Slurm, else everything.
        device: "cpu", or "cuda" for the GPU of this process's number on its machine.
        identity: returns what must be equal in all processes, JSON-able.

    Raises:
        ValueError: `text` is wrong, or the variables of torchrun are.
        RefusedTogether: the processes do not come together, or one of them is refused.
    """
    if text is not None:
        yield Start(parse_shard(text), device, lambda: None)
        return
    with ExitStack() as group:
        ranks, device = group.enter_context(joined_ranks(device))

        def ready() -> None:
            nonlocal waiting
            waiting = False
            with group:  # nothing is said after it
                agree(ranks, lambda: None, {} if ranks.alone else identity() | code_versions())

        waiting = True
        try:
            yield Start((ranks.rank, ranks.size), device, ready)
        except (ValueError, RuntimeError, OSError, MemoryError) as error:
            if waiting:
                refuse(ranks, error)
            raise


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
