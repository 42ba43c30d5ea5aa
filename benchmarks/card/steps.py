"""Whole training steps: relay_fast eager and as one graph, beside eager PyTorch at its best.

A workload is a batch and a model. Every baseline is timed in turns with relay_fast's graph, so that
their ratio holds whatever the clocks do; which baseline was the best is worked out from the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from benchmarks import common, measuring
from benchmarks.baselines import EagerTransformer, PaddedBatch, buckets
from benchmarks.card.device import Timer
from benchmarks.card.kernels import compiled
from benchmarks.card.session import Row, Skip, Unit
from relay_fast.batch.capacity import Capacity, CapacityBatch
from relay_fast.batch.packed import PackedBatch
from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.models.transformers import LoopedTransformer
from relay_fast.training.cuda_graph import GraphedStep

POLICIES = ("state", "none", "sqrt")
COMPILED_BUCKETS = 2  # length buckets a task under torch.compile: every shape is compiled anew
EAGER_BUCKETS = 8
MODES = {"max-autotune-no-cudagraphs": 150.0, "reduce-overhead": 90.0}  # seconds, with compiling


@dataclass(frozen=True)
class Workload:
    """make: the batch of a seed, and which sequences eager buckets keep apart. bytes: what the
    hungriest of its baselines needs. homogeneous: every sequence alike."""

    name: str
    config: ModelConfig
    make: Callable[[int, str], tuple[PackedBatch, np.ndarray]]
    bytes: int
    homogeneous: bool = False


def _mix(size: int) -> Callable[[int, str], tuple[PackedBatch, np.ndarray]]:
    return lambda seed, device: common.task_batch("multitask", size, seed, device)


def _alike(sequences: int, length: int, loops: int, targets: int | None, vocabulary: int):
    def make(seed: int, device: str) -> tuple[PackedBatch, np.ndarray]:
        lengths, counts = np.full(sequences, length), np.full(sequences, loops)
        batch = common.synthetic_batch(lengths, counts, targets, vocabulary, device, seed)
        return batch, batch.plan.loops

    return make


def _tiny(seed: int, device: str) -> tuple[PackedBatch, np.ndarray]:
    batch = common.synthetic_batch(np.array([5, 3]), np.array([2, 1]), 2, 40, device, seed)
    return batch, batch.plan.loops


def workloads(tiny: bool) -> list[Workload]:
    """The paper's mix at 512 and 4,096 samples, as many token-iterations of one shape, and a wide
    causal model."""
    if tiny:
        config = ModelConfig(BlockConfig(16, 1, 1), 40)
        return [
            Workload("tiny mix", config, _tiny, 0),
            Workload("tiny alike", config, _alike(2, 4, 2, 1, 40), 0, True),
        ]
    relay = common.CONFIGS["relay"]
    wide = ModelConfig(BlockConfig(1024, 16, 3, causal=True), 8192)
    # 47 tokens and 13 loops are the mix's means, so a batch costs what one of the mix does.
    return [
        Workload("mix 512", relay, _mix(512), 60 << 30),
        Workload("mix 4096", relay, _mix(4096), 100 << 30),
        Workload("wide 1024", wide, _alike(16, 1024, 8, None, 8192), 100 << 30, True),
        Workload("alike 512", relay, _alike(512, 47, 13, 3, 320), 40 << 30, True),
    ]


class GraphProvider(common.Provider):
    """relay_fast's whole step as one CUDA graph; where that cannot be had, as it falls back."""

    graphed: GraphedStep

    def step(self) -> None:
        self.graphed(self.batch)


def relay(
    workload: Workload, batch: PackedBatch, policy: str, graph: bool, dtype, device: str
) -> common.Provider:
    torch.manual_seed(0)
    impl = "triton" if device == "cpu" else "auto"  # rehearsed in the interpreter
    model = LoopedTransformer(workload.config, recompute=policy, impl=impl).to(device)
    loss = lambda piece: model.loss(piece).loss
    kind = GraphProvider if graph else common.Provider
    name = "relay_fast graph" if graph else "relay_fast"
    provider = kind(name, policy, model, loss, [batch], dtype, device)
    if graph:
        # Room for other batches of the same kind, as in training.
        others = [batch, *(workload.make(seed, "cpu")[0] for seed in (1, 2))]
        lowered = None if dtype == torch.float32 else dtype
        capacity = Capacity.of(others, 0.05)
        static = CapacityBatch(capacity, device)
        static.load(batch)
        provider.batch, provider.pieces = batch, [static.batch]  # what is held to the truth
        provider.graphed = GraphedStep(model, provider.optimizer, capacity, autocast=lowered)
    return provider


def eager(
    workload: Workload,
    pieces: list,
    name: str,
    dtype,
    device: str,
    *,
    mode: str | None = None,
    dense: bool = False,
    checkpoint: bool = False,
) -> common.Provider:
    model = EagerTransformer(workload.config)
    torch.manual_seed(0)
    model.load_state_dict(LoopedTransformer(workload.config).state_dict())
    model = model.to(device)
    if mode is not None:
        model.block.iteration = compiled(model.block.iteration, device, mode=mode)

    def loss(piece: PaddedBatch) -> torch.Tensor:
        if mode == "reduce-overhead" and device == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        return model.loss(piece, dense=dense, per_iteration_checkpoint=checkpoint)

    return common.Provider(name, "", model, loss, pieces, dtype, device)


def cut(
    workload: Workload, batch: PackedBatch, groups: Sequence[np.ndarray], memory: int
) -> list[PaddedBatch]:
    """The groups padded, each in as many equal pieces as the memory makes necessary (eager keeps
    about 63 · d values a token-iteration)."""
    most = 0.7 * (memory or 16 << 30) / (63 * workload.config.block.d_model * 3)
    pieces = []
    for group in groups:
        lengths, loops = batch.plan.lengths[group], batch.plan.loops[group]
        cost = len(group) * int(lengths.max()) * int(loops.max())
        pieces += [
            PaddedBatch.of(batch, part)
            for part in np.array_split(group, max(1, -(-cost // max(1, int(most)))))
            if len(part)
        ]
    return pieces


@contextmanager
def others_may_fail(name: str):
    """A baseline that PyTorch itself cannot run (a mode of torch.compile, say) is skipped."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if name.startswith("relay_fast"):
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())[:250]
        raise Skip(f"{name} does not run here: {text}") from error


def measure(
    workload: Workload,
    batch: PackedBatch,
    providers: list[common.Provider],
    timer: Timer,
    rates: dict[str, float],
    budget: float,
) -> list[Row]:
    """Equality and memory first, then times in turns; a row a provider."""
    bound = 1e-3 if providers[0].dtype == torch.float32 else 0.1
    truth, memories = None, []
    for p in providers:
        with others_may_fail(p.name):
            loss, grads, memory = measuring.measured_step(p)
        truth = truth or (loss, grads)
        measuring.check_equal(f"{p.name} {p.policy}".strip(), loss, grads, truth, bound)
        memories.append(memory)
        with others_may_fail(p.name):
            for _ in range(5 if timer.device == "cuda" else 1):  # warm up, capture, compile
                p.step()
    seconds = timer.seconds({f"{i}": p.step for i, p in enumerate(providers)}, budget)
    useful, plan = common.useful_flops(workload.config, batch), batch.plan
    own = next(seconds[str(i)] for i, p in enumerate(providers) if isinstance(p, GraphProvider))
    rows: list[Row] = []
    for i, (p, memory) in enumerate(zip(providers, memories, strict=True)):
        taken = seconds[str(i)]
        again = p.policy not in ("", "none") or "checkpoint" in p.name
        reason = p.graphed.reason if isinstance(p, GraphProvider) else None
        rows.append({
            "workload": workload.name, "provider": p.name, "policy": p.policy,
            "samples": len(batch), "token_iterations": plan.token_iterations,
            "seconds": f"{taken:.5g}", "samples_per_s": f"{len(batch) / taken:.5g}",
            "token_iterations_per_s": f"{plan.token_iterations / taken:.5g}",
            "useful_share_of_peak": f"{useful / taken / rates['matmul']:.4f}",
            "share_of_peak": f"{(4 / 3 if again else 1) * useful / taken / rates['matmul']:.4f}",
            "times_relay_fast": f"{taken / own:.3g}",
            "saved_bytes": memory.saved, "peak_bytes": memory.peak,
            "pieces": len(p.pieces), "note": reason or "",
        })  # fmt: skip
    return rows


def units(
    tiny: bool,
    timer: Timer,
    rates: Callable[[], dict[str, float]],
    memory: int,
    needs: tuple[str, ...],
) -> list[Unit]:
    """The units of work of all workloads, most wanted first."""
    torch._dynamo.config.recompile_limit = 256  # a shape a bucket
    device = timer.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    budget = 0.0 if tiny else 4.0

    def policies(workload: Workload) -> list[Row]:
        batch, _ = workload.make(0, device)
        wanted = POLICIES[:1] if tiny else POLICIES
        chosen = [relay(workload, batch, p, False, dtype, device) for p in wanted]
        chosen.append(relay(workload, batch, "state", True, dtype, device))
        return measure(workload, batch, chosen, timer, rates(), budget)

    def against(workload: Workload, name: str, at_most: int, **options) -> list[Row]:
        """One baseline, with so many length buckets a task (0: all in one), in turns with
        relay_fast's graph."""
        batch, group = workload.make(0, device)
        groups = buckets(batch, group, at_most) if at_most else [np.arange(len(batch))]
        pieces = cut(workload, batch, groups, memory)
        ours = relay(workload, batch, "state", True, dtype, device)
        theirs = eager(workload, pieces, name, dtype, device, **options)
        try:
            return measure(workload, batch, [ours, theirs], timer, rates(), budget)
        finally:
            torch._dynamo.reset()

    kinds: dict[str, tuple[float, Callable[[Workload], list[Row]]]] = {
        "policies": (60, policies),
        "eager padded": (25, lambda w: against(w, "eager padded", 0, dense=True)),
    }
    for checkpoint in (False, True):
        tail, options = " checkpoint" if checkpoint else "", {"checkpoint": checkpoint}
        name = f"eager bucketed{tail}"
        kinds[name] = (25, partial(against, name=name, at_most=EAGER_BUCKETS, **options))
        for mode, seconds in MODES.items():
            name = f"compile {mode}{tail}"
            work = partial(against, name=name, at_most=COMPILED_BUCKETS, mode=mode, **options)
            kinds[name] = (seconds, work)
    chosen = {w.name: w for w in workloads(tiny)}
    return [
        Unit(
            f"steps/{w}/{kind}",
            "steps",
            10 if tiny else kinds[kind][0],
            partial(kinds[kind][1], chosen[w]),
            needs=needs,
            memory=chosen[w].bytes,
        )
        for w, kind in in_order(list(chosen), list(kinds))
    ]


def in_order(names: list[str], kinds: list[str]) -> list[tuple[str, str]]:
    """Every (workload, kind), the ones that the targets are about first."""
    autotuned = "compile max-autotune-no-cudagraphs"
    first = [
        ("mix 512", "policies"), ("mix 512", "eager padded"), ("mix 512", "eager bucketed"),
        ("mix 512", "eager bucketed checkpoint"), ("mix 4096", "policies"),
        ("wide 1024", "policies"), ("mix 512", autotuned), ("alike 512", autotuned),
        ("wide 1024", f"{autotuned} checkpoint"), ("mix 4096", "eager bucketed"),
        ("mix 4096", "eager padded"), ("mix 512", "compile reduce-overhead"),
    ]  # fmt: skip
    every = [(name, kind) for name in names for kind in kinds]
    return [pair for pair in first if pair in every] + [p for p in every if p not in first]
