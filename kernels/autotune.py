"""Autotuning with RELAY_FAST_AUTOTUNE=1: times candidates for rules of `tuning.TABLE`, and uses the
fastest.

Runs on a GPU only. The search copies an op's arguments first, because it calls the op many times
and some ops accumulate into their arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime
from functools import wraps

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from . import tuning
from ._runtime import Config, device_props, facts
from .tuning import Rule

GAIN = 0.97  # a new configuration may take at most this share of the old one's time


def search(
    call: Callable[[], object], seconds: Callable[[Callable[[], object]], float]
) -> dict[Rule, dict[Config, float]]:
    """Times a call under every candidate of each rule that it uses.

    Args:
        call: the call.
        seconds: measures a call.

    Returns:
        Seconds by rule and candidate; inf if a candidate does not fit the device.
    """
    with tuning.watching() as picked:
        call()
    found: dict[Rule, dict[Config, float]] = {}
    for rule in picked:
        times = found[rule] = {}
        for config in tuning.candidates(rule):
            with tuning.trying(rule.op, config):
                try:
                    call()
                    times[config] = seconds(call)
                except Exception as error:  # too much shared memory, a shape the compiler refuses
                    if isinstance(error, torch.OutOfMemoryError):
                        raise
                    times[config] = math.inf
    return found


def better(rule: Rule, times: dict[Config, float], arch: int, script: str) -> Rule | None:
    """Returns the rule with the fastest configuration, or None if it is not GAIN times faster.

    Args:
        rule: the current rule.
        times: seconds by configuration.
        arch: compute capability of the device.
        script: name of the measurement, recorded in the rule.
    """
    best = min(times, key=times.__getitem__)
    if best == rule.config or times[best] > GAIN * times[rule.config]:
        return None
    today = datetime.now(UTC).strftime("%Y-%m-%d")
    # All that is known of the shared memory: it was enough on this device.
    shared = facts(arch).shared_bytes >> 10
    return rule._replace(config=best, shared=shared, arch=arch, measured=f"{today} {script}")


def _median(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return do_bench(call, warmup=5, rep=20, return_mode="median") / 1e3


def autotuned(op: Callable, kind: str = "cuda") -> Callable:
    """Wraps an op: when it first uses a rule on a device of this kind, it searches, prints the new
    lines of the table, and uses them from then on."""
    known: set[Rule] = set()

    @wraps(op)
    def tuned(*args, **kwargs):
        with tuning.watching() as picked:
            result = op(*args, **kwargs)
        device = next(a for a in args if isinstance(a, Tensor)).device
        if device.type != kind or (kind == "cuda" and torch.cuda.is_current_stream_capturing()):
            return result
        if not known.issuperset(picked):
            known.update(picked)
            copy = lambda t: t.clone() if isinstance(t, Tensor) else t
            args, kwargs = tree_map(copy, (args, kwargs))
            for rule, times in search(lambda: op(*args, **kwargs), _median).items():
                new = better(rule, times, device_props(device).arch, "RELAY_FAST_AUTOTUNE")
                if new is not None:
                    print(tuning.line(new), flush=True)
                    tuning.learn(new)
                    known.add(new)
        return result

    return tuned
