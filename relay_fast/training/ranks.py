"""Data parallelism: the processes of a run (*ranks*), their shares of a batch, and what they sum.

Every rank draws the whole batch, computes its share, and adds up gradients with the others in one
all-reduce after the backward pass: the gradients of shared weights are complete only then. Weights,
optimizer and random numbers are thus the same on all ranks, and rank 0 alone writes files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist

from relay_fast.batch.packed import PackedBatch
from relay_fast.batch.shares import deal, take_sequences
from relay_fast.reporting.terminal import error_text
from relay_fast.utils.errors import RefusedTogether, WorkerDied
from relay_fast.utils.files import differences, first_differences

JOIN = 120.0  # seconds until all ranks must have started
SILENT = 1800.0  # seconds that a rank may let the others wait, such as while one evaluates

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


class Stopped(KeyboardInterrupt):
    """Raised on all ranks after the same step, when one of them was asked to stop."""


class Ranks:
    """The ranks of a run, seen from one of them; without torch.distributed there is a single one.

    Attributes:
        rank, size: this rank, 0 ≤ rank < size.
    """

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def writes(self) -> bool:
        """Whether this rank writes the files."""
        return self.rank == 0

    def share(self, batch: PackedBatch) -> tuple[PackedBatch, np.ndarray]:
        """Returns this rank's share of a batch, and the token-iterations (size,) of all shares."""
        costs = batch.plan.lengths * batch.plan.loops
        shares = deal(costs, self.size)
        rows = np.array([costs[share].sum() for share in shares], np.int64)
        return take_sequences(batch, shares[self.rank]), rows

    def same(self, value: Any) -> Any:
        """Returns rank 0's value on every rank; waits for it."""
        if self.alone:
            return value
        box = [value]
        with lost_ranks():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all ranks, by rank; waits for them."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.size
        with lost_ranks():
            dist.all_gather_object(values, value)
        return values

    def add_up(self, values: torch.Tensor) -> None:
        """Replaces a tensor by its sum over all ranks."""
        if not self.alone:
            with lost_ranks():
                dist.all_reduce(values)

    def first_reason(self, reason: str | None) -> str | None:
        """Returns the reason of the first rank that gives one, on every rank; waits for them."""
        reasons = self.gather(reason)
        if all(told == reason for told in reasons):
            return reason
        return next(f"rank {k}: {told}" for k, told in enumerate(reasons) if told is not None)


@contextmanager
def lost_ranks() -> Iterator[None]:
    """Turns the error of a broken connection into WorkerDied."""
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise WorkerDied(
            "another process of this run died or hangs; the same command continues the run, with "
            "any number of processes."
        ) from error


def ranks_wanted(environment: Mapping[str, str] = os.environ) -> dict[str, str] | None:
    """Returns the variables of torchrun, or what Slurm says instead; None for a single process.

    Raises ValueError if some of them are missing or wrong.
    """
    found = {name: environment[name] for name in _TORCHRUN if name in environment}
    if "RANK" not in found and "WORLD_SIZE" not in found:
        if environment.get("SLURM_STEP_ID") is None or int(environment.get("SLURM_NTASKS", 1)) < 2:
            return None
        found |= {name: environment.get(slurm, "") for name, slurm in _SLURM.items()}
        found.setdefault("MASTER_ADDR", environment.get("SLURM_LAUNCH_NODE_IPADDR", ""))
        job = environment.get("SLURM_JOB_ID", "0")
        found.setdefault("MASTER_PORT", str(20000 + int(job) % 20000))
    if found.get("WORLD_SIZE") == "1" and found.get("RANK", "0") == "0":
        return None  # some schedulers say so, and no more, to a process alone
    missing = [name for name in _TORCHRUN if not found.get(name)]
    if missing:
        raise ValueError(
            f"{' and '.join(sorted(set(found) - {'MASTER_ADDR', 'MASTER_PORT'}))} of torchrun is "
            f"set but {missing[0]} is not: start with torchrun --nproc-per-node=N -m "
            f"relay_fast.train, or unset them"
        )
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        if not found[name].isdigit():
            raise ValueError(f"{name} = {found[name]!r} is no number: start with torchrun")
    if not int(found["RANK"]) < int(found["WORLD_SIZE"]):
        raise ValueError(
            f"RANK = {found['RANK']} is not below WORLD_SIZE = {found['WORLD_SIZE']}: start with "
            f"torchrun"
        )
    return found


@contextmanager
def joined_ranks(device: str) -> Iterator[tuple[Ranks, str]]:
    """Joins the processes that torchrun or Slurm started; yields the `Ranks` and this one's device.

    Args:
        device: "cpu", or "cuda" for the GPU of this process's number on its machine.

    Raises:
        ValueError: the variables are incomplete, or this process does not reach rank 0.
        RefusedTogether: not all came together in JOIN seconds, or they share a device.
    """
    found = ranks_wanted()
    if found is None or int(found["WORLD_SIZE"]) == 1:
        yield Ranks(), device
        return
    rank, size = int(found["RANK"]), int(found["WORLD_SIZE"])
    device = own_device(device, found)
    where = f"{found['MASTER_ADDR']}:{found['MASTER_PORT']}"
    # Without CUDA they meet all the same, to be refused together for the device.
    on_gpus = device.startswith("cuda") and torch.cuda.is_available()
    backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
    try:
        store = _met(found, where)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=SILENT)
        )
    except (dist.DistError, RuntimeError) as error:
        raise RefusedTogether(
            f"the processes of this run met at {where}, but could not speak to each other: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    try:
        yield Ranks(rank, size), device
    finally:
        dist.destroy_process_group()


def own_device(device: str, found: Mapping[str, str]) -> str:
    """Returns the device of one of several processes.

    Args:
        device: as in `joined_ranks`.
        found: what `ranks_wanted` returns.

    Raises:
        RefusedTogether: `device` is not one for each process.
    """
    size = int(found["WORLD_SIZE"])
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's
    if "," in device:
        raise RefusedTogether(
            f"device {device!r} names several, but each of the {size} processes has one: use cuda "
            f"for the GPU of its number"
        )
    if device.startswith("cuda:") and here > 1:
        raise RefusedTogether(
            f"device {device!r} is a single one, but {here} processes share this machine: use "
            f"cuda for the GPU of each one's number"
        )
    return f"cuda:{found['LOCAL_RANK']}" if device == "cuda" else device


def _met(found: Mapping[str, str], where: str) -> dist.Store:
    """Returns a store that all processes have reached, at the address `where`."""
    rank, size = int(found["RANK"]), int(found["WORLD_SIZE"])
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(
            found["MASTER_ADDR"],
            int(found["MASTER_PORT"]),
            None if agent else size,
            is_master=rank == 0 and not agent,
            timeout=timedelta(seconds=JOIN),
            wait_for_workers=False,
        )
    except (dist.DistError, RuntimeError) as error:
        text = " ".join(str(error).split())
        if "EADDRINUSE" in text or "address already in use" in text.lower():
            raise RefusedTogether(
                f"the processes of this run cannot meet at {where}: the port is in use; give "
                f"another with torchrun --master-port"
            ) from error
        raise ValueError(
            f"rank {rank} of {size} did not reach rank 0 at {where} within {JOIN:.0f} s: start all "
            f"with torchrun --nproc-per-node=N, or unset RANK and WORLD_SIZE for a process alone"
        ) from error
    # A restarted group must not read the keys of the one before it.
    prefix = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"relay_fast.{prefix}", store)
    store.set(f"came.{rank}", "")
    for other in range(size):
        try:
            store.wait([f"came.{other}"], timedelta(seconds=JOIN))
        except (dist.DistError, RuntimeError) as error:
            raise RefusedTogether(
                f"rank {other} of {size} did not come to {where} within {JOIN:.0f} s: start all "
                f"with the same address, port and number of processes"
            ) from error
    return store


def agree(ranks: Ranks, prove: Callable[[], None], identity: Mapping[str, Any]) -> None:
    """Checks that all ranks can run the same thing; every rank raises the same error.

    Args:
        ranks: of the run.
        prove: raises ValueError if this rank cannot run.
        identity: JSON-able; must be equal on all ranks.

    Raises:
        RefusedTogether: the first rank that cannot run, or differs from rank 0, and why. Of a
            single process, its own error.
    """
    reason = None
    try:
        prove()
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        if ranks.alone:
            raise
        reason = error_text(error)
    told = ranks.gather((reason, dict(identity)))
    for rank, (reason, theirs) in enumerate(told):
        if reason is not None:
            where = "" if all(other == reason for other, _ in told) else f"rank {rank}: "
            raise RefusedTogether(where + reason)
        for key, value in told[0][1].items():
            if (other := theirs.get(key)) == value:
                continue
            how = f"{other!r}, not {value!r}"
            if isinstance(value, Mapping) and isinstance(other, Mapping):
                found = differences(value, other, "on rank 0", f"on rank {rank}")
                how = first_differences(found)
            raise RefusedTogether(
                f"rank {rank} has another {key} than rank 0 ({how}): start all with the same "
                f"command and the same version"
            )


def refuse(ranks: Ranks, error: Exception) -> NoReturn:
    """Raises an error of this rank on all ranks, which must be about to `agree`."""

    def prove() -> None:
        raise error

    agree(ranks, prove, {})
    raise error


def refuse_together(error: Exception, device: str) -> NoReturn:
    """Joins the processes, if there are several, to raise an error of this one on all of them."""
    with joined_ranks(device) as (ranks, _):
        refuse(ranks, error)


def first_rank(ranks: Ranks, body: Callable[[], Any]) -> Any:
    """Returns what `body` returns on rank 0, and None on the others.

    If it raises ValueError, RuntimeError or OSError, the other ranks raise RefusedTogether.
    """
    value = error = None
    if ranks.writes:
        try:
            value = body()
        except (ValueError, RuntimeError, OSError) as caught:
            error = caught
    told = ranks.same(None if error is None else str(error))
    if error is not None:
        raise error
    if told is not None:
        raise RefusedTogether(told)
    return value


def speaks(environment: Mapping[str, str] = os.environ) -> bool:
    """Tells whether this process is rank 0, which prints what all have to say, or alone."""
    rank = environment.get("RANK", environment.get("SLURM_PROCID", "0"))
    return not (rank.isdigit() and int(rank) > 0)


def silent(error: Exception) -> bool:
    """Tells whether another process says an error."""
    return isinstance(error, RefusedTogether) and not speaks()
