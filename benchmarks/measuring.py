"""Equality, memory and time of training steps, and the rows of results that they make."""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from benchmarks.common import Provider, useful_flops
from relay_fast.batch.packed import PackedBatch
from relay_fast.config import ModelConfig


@dataclass
class Memory:
    saved: int  # alive after forward beyond what was before
    peak: int  # most alive at any moment of forward and backward beyond what was before


def measured_step(provider: Provider) -> tuple[float, dict[str, Tensor], Memory]:
    """Loss, gradients and memory of one step without the optimizer; the largest of its pieces."""
    provider.optimizer.zero_grad(set_to_none=False)
    total, memory = 0.0, Memory(0, 0)
    for piece in provider.pieces:
        gc.collect()
        measure = _cuda_memory if provider.device == "cuda" else _cpu_memory
        loss, m = measure(provider, piece)
        total += float(loss)
        memory = Memory(max(memory.saved, m.saved), max(memory.peak, m.peak))
    return total, {n: p.grad.clone() for n, p in provider.model.named_parameters()}, memory


def _cuda_memory(provider: Provider, piece: object) -> tuple[Tensor, Memory]:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = provider.forward(piece)
    saved = torch.cuda.memory_allocated() - before
    loss.backward()
    return loss.detach(), Memory(saved, torch.cuda.max_memory_allocated() - before)


@contextmanager
def quiet():
    """Silences the lines that the profiler writes to the error stream past Python."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def _cpu_memory(provider: Provider, piece: object) -> tuple[Tensor, Memory]:
    """From the profiler's record of every allocation and release."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    profile = torch.profiler.profile(activities=activities, profile_memory=True)
    with quiet():
        profile.start()
    loss = provider.forward(piece)
    with torch.profiler.record_function("forward ended"):
        pass
    loss.backward()
    with quiet():
        profile.stop()
    events = profile.profiler.kineto_results.events()
    (ended,) = (e.start_ns() for e in events if e.name() == "forward ended")
    record = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = saved = peak = 0
    for at, size in record:
        now += size
        peak = max(peak, now)
        if at <= ended:
            saved = now
    return loss.detach(), Memory(saved, peak)


def check_equal(
    name: str, loss: float, grads: dict[str, Tensor], truth: tuple[float, dict], bound: float
) -> None:
    """Raises RuntimeError unless loss and every gradient agree with the first provider's."""
    error = abs(loss - truth[0]) / max(1e-9, abs(truth[0]))
    worst = "the loss"
    for key, grad in grads.items():
        scale = float(truth[1][key].abs().max()) or 1.0
        off = float((grad - truth[1][key]).abs().max()) / scale
        if off > error:
            error, worst = off, key
    if not error <= bound:
        raise RuntimeError(
            f"{name} computes something else: {worst} is off by {error:.2g}; nothing was timed"
        )


def seconds_of(call: Callable[[], None], device: str) -> float:
    """Seconds of one call."""
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    sync()
    start = time.perf_counter()
    call()
    sync()
    return time.perf_counter() - start


def interleave(providers: list[Provider], seconds: float, least: int = 1) -> list[list[float]]:
    """Seconds of each provider's steps: rounds of one step each, in turn, until the time is up, but
    `least` at least. One that takes a third of a round is timed in the first round only. Every
    provider has already taken a step (the equality check)."""
    times: list[list[float]] = [[] for _ in providers]
    start = time.perf_counter()
    rounds, last = 0, 0.0
    while rounds < least or time.perf_counter() - start + last < seconds:
        began = time.perf_counter()
        whole = sum(seen[0] for seen in times if seen)
        for provider, seen in zip(providers, times, strict=True):
            if not seen or seen[0] <= whole / 3 or len(providers) < 4:
                seen.append(seconds_of(provider.step, provider.device))
        rounds, last = rounds + 1, time.perf_counter() - began
    return times


@cache
def matmul_peak(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of the best square matmul that this machine does."""
    best = 0.0
    for n in (1024, 2048) if device == "cpu" else (4096, 8192):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        out = a @ b
        for _ in range(5):
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            if device == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def measure(
    providers: list[Provider],
    label: dict[str, object],
    config: ModelConfig,
    batch: PackedBatch,
    seconds: float,
    peak: float,
    least: int = 1,
) -> list[dict[str, object]]:
    """One row per provider: first equality and memory, then time (see `interleave`).

    rounds: how many steps were timed; spread: the slowest of them over the quickest, minus 1; the
    rates are those of the median.
    """
    bound = 1e-3 if providers[0].dtype == torch.float32 else 0.1
    truth, memories = None, []
    for p in providers:
        loss, grads, memory = measured_step(p)
        truth = truth or (loss, grads)
        check_equal(f"{p.name} {p.policy}", loss, grads, truth, bound)
        memories.append(memory)
    flops, plan = useful_flops(config, batch), batch.plan
    rows = []
    times = interleave(providers, seconds, least)
    for p, memory, seen in zip(providers, memories, times, strict=True):
        second = statistics.median(seen)
        rows.append(
            {
                **label,
                "provider": p.name,
                "policy": p.policy,
                "loops": plan.max_loops,
                "samples_per_s": round(len(batch) / second, 3),
                "token_iterations_per_s": round(plan.token_iterations / second),
                "useful_flops_per_s": f"{flops / second:.4g}",
                "peak_share": round(flops / second / peak, 4),
                "saved_bytes": memory.saved,
                "peak_bytes": memory.peak,
                "rounds": len(seen),
                "spread": round(max(seen) / min(seen) - 1, 3),
            }
        )
    return rows
