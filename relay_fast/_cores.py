"""How many cores there are to use."""

import os


def usable_cores() -> int:
    """The cores that this process may run on: taskset or a container can leave it fewer than the
    machine has."""
    if hasattr(os, "sched_getaffinity"):  # not everywhere
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
