"""What a graphed training step should take: a range from the floor to what is expected.

    python -m benchmarks.card.step_prediction --samples 512

A whole step (loss, backward, clipping, Muon and AdamW) at a fixed capacity is launched on meta
tensors through Triton's own binding and compiler (`benchmarks/stub_driver.py`), so that registers,
shared memory and grid of every launch are known. PyTorch's own kernels are taken from the ops that
reach its dispatcher. Nothing runs, so no GPU is needed.

Floor: each launch at the ceiling that binds it, every buffer moved once; NODE a node.
Expected: weights that programs read again come from L2, in whole waves of as many programs as a
processor holds, over the share of the ceiling that so few programs reach (`REACHED`).
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels have no launches to record

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad
from triton.runtime.jit import JITFunction

from benchmarks import common
from benchmarks.card.table import markdown
from benchmarks.card.torch_ops import TorchOps
from benchmarks.kernel_costs import CARDS, launch_cost, rows_together
from benchmarks.stub_driver import installed
from relay_fast.batch.capacity import Capacity, CapacityBatch
from relay_fast.kernels._runtime import DEVICE_PROPS, cdiv
from relay_fast.models.transformers import LoopedTransformer
from relay_fast.ops.dispatch import compute_dtype
from relay_fast.training.optim import make_optimizer
from relay_fast.utils.files import write_text

ARCH = 90
L2_BANDWIDTH = 5.5e12  # bytes a second, H200
# Assumed, until a card has measured them. (floor, expected) seconds:
NODE = (1.0e-6, 1.5e-6)  # of a graph's node beside its work
LAUNCH = (25e-6, 35e-6)  # of a launch from Python, eagerly
# Share of the ceiling that is reached with so many programs a processor: with one, nothing hides
# its loads before and its stores after the main loop (1.5 to 2 times the floor).
REACHED = {1: 0.57, 2: 0.75}
REACHED_BY_MORE = 0.85
_REGISTERS, _THREADS, _PROGRAMS = 65_536, 2048, 32  # of a processor
_RESERVED = 1 << 10  # bytes of shared memory that a program takes beside its own
ADAMW_BYTES = 28  # a parameter: p, m, v read and written, its gradient read, all fp32
ADAMW_TENSORS = 36  # that one launch of the fused step takes


@dataclass
class Group:
    """Launches of one kind; floor and expected in seconds, without the nodes' own time."""

    nodes: int = 0
    floor: float = 0.0
    expected: float = 0.0

    def __add__(self, other: Group) -> Group:
        return Group(
            self.nodes + other.nodes, self.floor + other.floor, self.expected + other.expected
        )


@dataclass
class Step:
    """A predicted step, by kernel."""

    groups: dict[str, Group] = field(default_factory=lambda: defaultdict(Group))

    @property
    def whole(self) -> Group:
        return sum(self.groups.values(), Group())

    @property
    def graphed(self) -> tuple[float, float]:
        """Seconds of the step as one graph, floor and expected."""
        w = self.whole
        return w.floor + w.nodes * NODE[0], w.expected + w.nodes * NODE[1]

    @property
    def eager(self) -> tuple[float, float]:
        """Seconds of the step launched one by one: the work or the launches, what takes longer."""
        w = self.whole
        return max(w.floor, w.nodes * LAUNCH[0]), max(w.expected, w.nodes * LAUNCH[1])


def resident(registers: int, shared: int, warps: int) -> int:
    """Returns how many programs of these resources a processor holds at once."""
    threads = 32 * warps
    granted = max(8, -(-registers // 8) * 8)
    room = DEVICE_PROPS[ARCH].shared_bytes + _RESERVED
    fits = (_REGISTERS // (granted * threads), room // (shared + _RESERVED), _THREADS // threads)
    return max(1, min(*fits, _PROGRAMS))


def again_from_l2(name: str, arguments: Mapping[str, Any]) -> float:
    """Returns the bytes that a launch's programs read beside the first time, from L2.

    Every block of rows reads all weights; a tile of a weight's gradient its rows and columns.
    """
    a = SimpleNamespace(**arguments)
    if name == "_weight_grad_kernel":
        rows, size = rows_together(a), a.x_ptr.itemsize
        tiles = (cdiv(a.D, a.BLOCK_D) - 1) * a.N + (cdiv(a.N, a.BLOCK_N) - 1) * a.D
        return float(rows * size * tiles)
    if not hasattr(a, "BLOCK_M") or not hasattr(a, "M"):
        return 0.0
    weights = [
        v
        for k, v in arguments.items()
        if isinstance(v, Tensor)
        and v.ndim == 2
        and (k == "head_ptr" or k.endswith("weight_ptr") and not k.startswith(("dnorm", "dw")))
    ]
    read = (cdiv(a.M, a.BLOCK_M) - 1) * sum(w.nbytes for w in weights)
    if name.startswith("_linear_residual"):
        rows = a.a_ptr if hasattr(a, "a_ptr") else a.dout_ptr
        read += (a.column_blocks - 1) * rows.nbytes
    return float(read)


def expected_seconds(work: float, l2: float, programs: int, held: int) -> float:
    """Returns the seconds of a launch.

    Args:
        work: seconds at the ceiling of arithmetic or memory.
        l2: seconds that its reads take from L2.
        programs: of the launch, all equal.
        held: programs that a processor holds.
    """
    processors = DEVICE_PROPS[ARCH].processors
    each = min(held, cdiv(programs, processors))
    waves = cdiv(programs, each * processors) * each * processors / programs
    return waves * max(work / REACHED.get(each, REACHED_BY_MORE), l2)


class _TorchOps(TorchOps):
    """Adds PyTorch's own kernels."""

    def __init__(self, step: Step, part: list[str]):
        super().__init__()
        self._step, self._part = step, part

    def launched(self, name: str, given: list[Tensor], made: list[Tensor]) -> None:
        card, flops = CARDS[ARCH], 0.0
        peak = card.flops_16_bit
        if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm"):
            a, b = given[-2:]
            flops = 2.0 * a.numel() * b.shape[-1]
            peak = card.flops_fp32 if a.dtype == torch.float32 else peak
        moved = sum(t.nbytes for t in (*given, *made))
        work = max(flops / peak, moved / card.bandwidth)
        # Small products keep few processors busy: a tile of 128 × 128 each.
        share = 1.0
        if flops:
            tiles = sum(t.numel() for t in made) / 128**2
            share = min(1.0, tiles / DEVICE_PROPS[ARCH].processors) or 1.0
        group = self._step.groups[self._part[-1]]
        group.nodes += 1
        group.floor += work
        group.expected += max(flops / peak / share, moved / card.bandwidth) / REACHED_BY_MORE


@contextmanager
def predicted(peak: float | None = None) -> Iterator[tuple[Step, list[str]]]:
    """Yields a step that collects what is launched inside, and the stack of names under which
    PyTorch's own ops are counted.

    Args:
        peak: FLOPs a second of the kernels; default: the card's in 16 bits.
    """
    step, part = Step(), ["PyTorch's own"]
    original = JITFunction.run

    def run(self: JITFunction, *args, grid, warmup, **kwargs):
        kernel = original(self, *args, grid=grid, warmup=warmup, **kwargs)
        own = {k: v for k, v in kwargs.items() if k not in ("num_warps", "num_stages")}
        arguments = self.signature.bind(*args, **own).arguments
        name, card = self.__name__, CARDS[ARCH]
        cost = launch_cost(name, arguments)
        compute = cost.flops / (peak or card.flops_16_bit)
        memory = cost.bytes / card.bandwidth
        l2 = (cost.bytes + again_from_l2(name, arguments)) / L2_BANDWIDTH
        held = resident(kernel.n_regs, kernel.metadata.shared, kernel.metadata.num_warps)
        group = step.groups[name.strip("_").removesuffix("_kernel")]
        group.nodes += 1
        group.floor += max(compute, memory)
        group.expected += expected_seconds(max(compute, memory), l2, math.prod(grid), held)
        return kernel

    with installed(ARCH), mock.patch.object(JITFunction, "run", run), _TorchOps(step, part):
        yield step, part


@contextmanager
def under_autocast() -> Iterator[None]:
    """Makes GEMMs compute in bf16, as autocast does, which does not know the meta device."""
    users = [m for n, m in sys.modules.items() if n.startswith("relay_fast")]
    with ExitStack() as stack:
        for module in users:
            if getattr(module, "compute_dtype", None) is compute_dtype:
                half = lambda parameter: torch.bfloat16
                stack.enter_context(mock.patch.object(module, "compute_dtype", half))
        yield


def predict(samples: int, policy: str = "none", muon: bool = True, **options: Any) -> Step:
    """Predicts a training step over the paper's mix as `paper-fast` takes it, as one graph.

    Args:
        samples: of a batch.
        policy: recompute policy.
        muon: whether Muon takes the block's matrices.
        **options: fields of the block; loop_norm is "post" by default.
    """
    config = common.CONFIGS["relay"]
    block = replace(config.block, **{"loop_norm": "post", **options})
    drawn = [common.task_batch("multitask", samples, seed, "cpu")[0] for seed in range(3)]
    batch = CapacityBatch(Capacity.of(drawn, 0.05), "meta").batch
    model = LoopedTransformer(replace(config, block=block), impl="triton", recompute=policy)
    model = model.to("meta")
    optimizer = make_optimizer(model, lr=1e-3, muon_lr=1e-2 if muon else None)
    plain = [p for g in optimizer.param_groups if not g.get("muon") for p in g["params"]]
    for group in optimizer.param_groups:
        group["capturable"], group["lr"] = True, torch.empty((), device="meta")
        for p in group["params"] if group.get("muon") else ():
            p.grad = torch.empty_like(p)
    optimizer.step()  # makes Muon's state, before the capture
    model.zero_grad()
    with under_autocast(), predicted() as (step, part):
        model.loss(batch).loss.backward()
        part.append("clipping")
        with _many_tensors_at_once():
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        part.append("Muon")
        for p in plain:
            p.grad = None
        optimizer.step()
    step.groups["AdamW"] = adamw(plain)
    return step


@contextmanager
def _many_tensors_at_once() -> Iterator[None]:
    """Makes torch clip tensors without data as those on a card: all gradients in one launch."""
    with mock.patch.object(clip_grad, "_has_foreach_support", lambda *_: True):
        yield


def adamw(parameters: Sequence[Tensor]) -> Group:
    """Returns what torch's fused AdamW takes."""
    work = ADAMW_BYTES * sum(p.numel() for p in parameters) / CARDS[ARCH].bandwidth
    return Group(cdiv(len(parameters), ADAMW_TENSORS), work, work / REACHED_BY_MORE)


def page(step: Step, samples: int, policy: str) -> str:
    """Formats a prediction as Markdown."""
    ms = lambda seconds: f"{1e3 * seconds:.3g}"
    rows = [
        (name, f"{g.nodes:,}", ms(g.floor), ms(g.expected), ms(g.nodes * NODE[1]))
        for name, g in sorted(step.groups.items(), key=lambda item: -item[1].expected)
    ]
    w = step.whole
    rows.append(("all", f"{w.nodes:,}", ms(w.floor), ms(w.expected), ms(w.nodes * NODE[1])))
    columns = ("kernel", "nodes", "floor, ms", "expected, ms", "its nodes, ms")
    low, high = step.graphed
    slow = step.eager
    return (
        f"## {samples:,} samples, policy `{policy}`, loop_norm post, Muon and AdamW, bf16\n\n"
        f"**A prediction**, for {CARDS[ARCH].name}; nothing was run on a card.\n\n"
        f"{markdown(columns, rows)}\n"
        f"As one CUDA graph: {w.nodes:,} nodes, {ms(low)} ms (floor) to {ms(high)} ms (expected). "
        f"Launched one by one: {ms(slow[0])} to {ms(slow[1])} ms.\n"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--policy", default="none")
    parser.add_argument("--out", type=Path, help="file of the page; default: the terminal")
    options = parser.parse_args(argv)
    text = page(predict(options.samples, options.policy), options.samples, options.policy)
    if options.out:
        write_text(options.out, text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
