"""Counts the usable cores and memory, and limits torch's threads to the cores."""

from __future__ import annotations

import math
import os
from pathlib import Path

import psutil
import torch

_GROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_LIMITS = ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def usable_cores() -> int:
    """Returns the number of cores that this process may use.

    It respects CPU affinity (taskset) and a container's CPU quota.
    """
    if hasattr(os, "sched_getaffinity"):  # Linux
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, int(min(cores, _quota())))


def usable_threads(processes: int = 1) -> int:
    """Returns the threads for each of several processes.

    It is their share of the usable cores, limited by OMP_NUM_THREADS, MKL_NUM_THREADS, ….
    """
    threads = max(1, usable_cores() // processes)
    for name in _LIMITS:
        first = os.environ.get(name, "").split(",")[0].strip()  # OpenMP's may list nested levels
        if first.isdecimal() and int(first) > 0:
            threads = min(threads, int(first))
    return threads


def limit_threads(most: int | None = None) -> None:
    """Limits torch to `usable_threads` and to `most`, if it is given."""
    threads = usable_threads() if most is None else min(most, usable_threads())
    if threads < torch.get_num_threads() or most is not None:
        torch.set_num_threads(threads)


def machine_memory() -> int:
    """Bytes of memory that the machine has."""
    return psutil.virtual_memory().total


def _quota() -> float:
    """Returns the least CPU quota, in cores, of this process's control groups (v1 and v2)."""
    quotas = [math.inf]
    try:
        lines = _MEMBERSHIP.read_text().splitlines()
    except (OSError, ValueError):  # no Linux, or a path that is no text
        return math.inf
    for line in lines:
        if line.count(":") < 2:  # no group of a version that we know
            continue
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "cpu") or "cpu" in controllers.split(","):
            root = _GROUPS / controllers
            own = root / path.lstrip("/")
            # In a container the path may be the host's: use the part that exists.
            for group in (own, *own.parents):
                if group.is_relative_to(root):
                    quotas.append(_group_quota(group))
    return min(quotas)


def _group_quota(group: Path) -> float:
    """Returns one control group's quota in cores, infinity without one."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{of}_us").read_text() for of in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):  # none, "max", or nonsense
        return math.inf
