"""The device that is measured: timing by events, ceilings, and the identity of what is measured."""

from __future__ import annotations

import hashlib
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
FLUSH_BYTES = 512 << 20  # several times any L2; also keeps the GPU busy while a call is launched


class Timer:
    """Medians of interleaved rounds; on CUDA by events, with the L2 flushed before each call."""

    def __init__(self, device: str, least: int = 3):
        self.device, self.least = device, least
        self._flush = None

    def _events(self, call: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        if self._flush is None:
            self._flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.float32, device="cuda")
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        begin.record()
        call()
        end.record()
        return begin, end

    def _round(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        if self.device != "cuda":
            times = {}
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                times[name] = time.perf_counter() - start
            return times
        events = {name: self._events(call) for name, call in calls.items()}
        torch.cuda.synchronize()
        return {name: begin.elapsed_time(end) / 1e3 for name, (begin, end) in events.items()}

    def seconds(self, calls: Mapping[str, Callable[[], object]], budget: float) -> dict[str, float]:
        """Median seconds of each call: at least `least` rounds of one call each, until `budget`
        seconds are up. Every call has been made once before."""
        rounds = []
        start = time.monotonic()
        while len(rounds) < self.least or (
            time.monotonic() - start < budget and len(rounds) < 200  # medians settle long before
        ):
            rounds.append(self._round(calls))
        return {name: statistics.median(r[name] for r in rounds) for name in calls}


def graphed(call: Callable[[], object], device: str) -> tuple[Callable[[], object], bool]:
    """The call as a CUDA graph's replay, so that launches cost nothing; itself where that fails."""
    if device != "cuda":
        return call, False
    try:
        stream = torch.cuda.current_stream()  # not the default one: `run_all` sees to that
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            call()
        return graph.replay, True
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        torch.cuda.synchronize()
        return call, False


@contextmanager
def poisoned():
    """Every buffer that is allocated starts as NaN (integers: their largest value)."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():  # of ops without a deterministic form: not what is asked
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def ceilings(timer: Timer, tiny: bool) -> list[dict[str, object]]:
    """The two rates that no kernel beats: copy (bytes read and written) and bf16 matmul."""
    device = timer.device
    elements = 1 << (16 if tiny else 30)
    source = torch.randn(elements // 4 or 1, device=device).repeat(4).to(torch.bfloat16)
    target = torch.empty_like(source)
    n = 128 if tiny else 8192
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty(n, n, dtype=torch.bfloat16, device=device)
    calls = {"copy": lambda: target.copy_(source), "matmul": lambda: torch.mm(a, b, out=out)}
    for call in calls.values():
        for _ in range(3):
            call()
    seconds = timer.seconds(calls, 2.0)
    moved = 2 * source.nbytes
    return [
        {"what": "copy", "size": f"{source.nbytes} B", "rate": moved / seconds["copy"],
         "unit_of_rate": "B/s"},
        {"what": "matmul", "size": f"{n} x {n} x {n} bf16", "rate": 2 * n**3 / seconds["matmul"],
         "unit_of_rate": "FLOP/s"},
    ]  # fmt: skip


def source_hash() -> str:
    """Eight hex digits of every Python file that is measured or measures."""
    digest = hashlib.sha256()
    for folder in ("relay_fast", "kernels", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:8]


def identity() -> str:
    """What names a results folder: the commit, with the sources' hash where they differ from it, or
    the hash alone where there is no git."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "--short", "HEAD")
    if not commit:
        return f"tree-{source_hash()}"
    changed = git(
        "status", "--porcelain", "--", "relay_fast", "kernels", "benchmarks/*.py", "benchmarks/card"
    )
    return f"{commit}-{source_hash()}" if changed else commit


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes of these tensors, each counted once."""
    seen = {t.data_ptr(): t.nbytes for t in tensors if t is not None and t.numel()}
    return sum(seen.values())
