"""Reads one batch of chains after the other; as a CUDA graph where one pays.

Sizes are rounded up, so that most batches of a call are of a few capacities. The first batch of a
capacity is read as ever; the second is read over the static buffers, which compiles their kernels;
then the reading is captured, and replayed for all later ones, until weights are replaced (not
merely changed) between two batches: the graphs are made anew. A batch whose work outlasts its
launches is read as ever (`batch_reason`), but by a model that is fed its rounds, whose inputs the
host would lay between the iterations. So is one for whose graph there is no memory.

Over static buffers, reading is started and then waited for: the host reads out the chains of one
batch, and makes the batch after next, while the device reads the next.
"""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from relay_fast.batch.capacity import Capacity
from relay_fast.decoding.own_arrangements import check_own_arrangements
from relay_fast.decoding.reading import Chains, read_batch
from relay_fast.decoding.static_reading import (
    Fetched,
    Loaded,
    StaticReading,
    capacity_of,
    prepare,
)
from relay_fast.engine.adapters import weights_read
from relay_fast.engine.fused_inference import feedback_reason, fused_call
from relay_fast.engine.plain_modules import call_reason, unwrapped
from relay_fast.engine.wrappers import shards
from relay_fast.kernels.supports import Unsupported
from relay_fast.models.looped_block import LoopedBlock
from relay_fast.models.transformers import LoopedTransformer
from relay_fast.ops.dispatch import compute_dtype
from relay_fast.tasks import Samples, Task
from relay_fast.utils.cuda_graph import (
    captured,
    device_graph_reason,
    not_captured,
    on_side_stream,
)

WASTE = 2  # rows and iterations of a graph over those of a batch; the rest leaves at once
# Of a large card, as benchmarks/results/READING_PREDICTION.md has them: on a smaller one, work
# outlasts the launches sooner.
LAUNCH = 25e-6  # seconds, from Python
RATE_32, RATE_16 = 60e12, 400e12  # FLOPs a second that GEMMs reach, in 32 and in 16 bits
LAUNCHES_A_LAYER = 5
TOO_MANY = "the buffers of a graph of so many tokens do not fit"
MOST_GRAPHS = 4  # of one reader; the one that was used longest ago is dropped for a new one


class _Graph:
    """The reading of a capacity's batches, made step by step."""

    def __init__(self, capacity: Capacity, moves: bool) -> None:
        self.capacity, self.moves = capacity, moves
        self.reading: StaticReading | None = None
        self.replay: Callable[[], Any] | None = None


class Started(NamedTuple):
    """A batch that a reader has started to read.

    chains: waits for the chains and returns them; to be called once, in inference mode.
    running: whether the device may be at work on them, and the host can do something else.
    """

    chains: Callable[[], Chains]
    running: bool


class ChainReader:
    """Reads the chains of batches off a model.

    Args:
        model: a looped model.
        tasks: the problems' tasks by name.
        scored: whether to compute log-probabilities.

    Attributes:
        reason: why the last batch is not read by a replay; None if it is.
    """

    def __init__(self, model: LoopedTransformer, tasks: Mapping[str, Task], scored: bool):
        self.model, self.tasks, self.scored = model, tasks, scored
        self.reason: str | None = None
        self._never: str | None = None
        self._too_many = math.inf  # tokens of a batch whose graph found no memory
        self._checked: set[str] = set()  # tasks whose arrangement is right
        self._drop_graphs()

    def read(self, problems: Samples) -> Chains:
        """Returns the chains of a batch, sorted by most loops first, as `read_batch` does."""
        return self.start(problems).chains()

    def start(self, problems: Samples) -> Started:
        """Starts to read a batch, sorted by most loops first; another may be started at once."""
        device = self.model.device
        self.reason = self._never or device_graph_reason(device) or model_reason(self.model)
        started, full = None, False
        if self.reason is None:
            try:
                started = self._start_static(problems)
            except torch.OutOfMemoryError:
                full = True
        if full:  # after the except clause: its traceback holds the buffers that were made
            self._drop_graphs()
            self._too_many = int(problems.problem_offsets[-1])
            self.reason = TOO_MANY
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if started is None:
            chains = read_batch(self.model, problems, self.tasks, self.scored)
            started = Started(lambda: chains, False)
        return started

    def _start_static(self, problems: Samples) -> Started | None:
        """Starts to read a batch over static buffers; None where it cannot, for `reason`."""
        fits = problems.problem_offsets[-1] < self._too_many
        self.reason = batch_reason(self.model, problems) if fits else TOO_MANY
        if self.reason is not None:
            return None
        loaded = prepare(self.model.config, problems, self.tasks)
        if isinstance(loaded, str):
            self.reason = loaded
            return None
        if (weights := weights_read(self.model)) != self._weights:
            self._drop_graphs()  # they read memory that is no longer the model's
            self._weights = weights
        graph = self._graph_of(loaded)
        if graph is None:
            return None
        if graph.reading is None:
            reading = StaticReading(self.model, graph.capacity, graph.moves, self.scored)
            reading.load(loaded)
            self.reason = "warming up"
            try:
                on_side_stream(reading.run)
            except Unsupported as error:
                return self._give_up(str(error))
            graph.reading = reading
        else:
            graph.reading.load(loaded)
            if graph.replay is None:
                try:
                    graph.replay = self._captured(graph.reading.run)
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:
                    said = not_captured("the reading of a batch", error)
                    warnings.warn(f"{said}; chains are read without CUDA graphs", stacklevel=2)
                    return self._give_up(said)
            graph.replay()
        finish = partial(self._finish, graph.reading, graph.reading.fetch(), problems)
        return Started(finish, True)

    def _finish(self, reading: StaticReading, fetched: Fetched, problems: Samples) -> Chains:
        result = reading.result(fetched, problems, self.tasks)
        if result is None:
            self.reason = "the model's rounds outgrew the inputs that they are fed to"
            return read_batch(self.model, problems, self.tasks, self.scored)
        if reading.arranged:
            check_own_arrangements(self.model.config, result[0], self.tasks, self._checked)
        return result

    def _graph_of(self, loaded: Loaded) -> _Graph | None:
        """Returns the graph that reads a batch, None for the first batch of a capacity.

        One that was made for larger batches serves if it computes at most WASTE as much.
        """
        own = capacity_of(loaded, self.model.config)
        for key in reversed(self._graphs):
            capacity, moves = key
            if moves == loaded.moves and _serves(capacity, own):
                self._graphs.move_to_end(key)
                return self._graphs[key]
        self.reason = self._one_launch(loaded) or "the first batch of its size"
        self._graphs[own, loaded.moves] = _Graph(own, loaded.moves)
        if len(self._graphs) > MOST_GRAPHS:
            self._graphs.popitem(last=False)
        return None

    def _one_launch(self, loaded: Loaded) -> str | None:
        """Returns that the whole-loop kernel reads such batches, which no graph makes faster."""
        model = self.model
        if self.scored or feedback_reason(model.config) is not None:
            return None
        batch = loaded.batch.to(model.device)
        weights, head = model.block.weights(), model.readout().weights_only("reading")
        run = model.block.run(batch.plan, weights)
        of_head = (head.norm, head.head)
        call = fused_call(model.config.block, run, model.embed(batch), weights.named, *of_head)
        if isinstance(call, str):
            return None
        return self._give_up("the whole-loop kernel reads a batch in one launch")

    def _give_up(self, reason: str) -> None:
        self.reason = self._never = reason
        self._drop_graphs()

    def _drop_graphs(self) -> None:
        self._graphs: OrderedDict[tuple[Capacity, bool], _Graph] = OrderedDict()
        self._pool: Any = None  # of the graphs' memory, of which one runs at a time
        self._weights: tuple | None = None

    def _captured(self, body: Callable[[], Any]) -> Callable[[], Any]:
        if self._pool is None and torch.cuda.is_available():
            self._pool = torch.cuda.graph_pool_handle()
        return captured(body, self._pool)


def _serves(capacity: Capacity, own: Capacity) -> bool:
    """Tells whether the graph of a capacity reads the batches of another one."""
    sizes = lambda c: (c.rows[0], len(c.rows), c.sequences, c.longest)
    holds = all(a >= b for a, b in zip(sizes(capacity), sizes(own), strict=True))
    return holds and capacity.token_iterations <= WASTE * own.token_iterations


def batch_reason(model: LoopedTransformer, problems: Samples) -> str | None:
    """Returns why a batch is better read op by op, or None.

    Of a model that is fed no rounds, a graph saves launches and nothing else: where the work of an
    average launch takes longer than the launch, it saves nothing and needs its own buffers. That
    the host works beside a graph is not counted: no card has measured it yet.
    """
    loops = int(problems.loops.max(initial=0))
    if not loops:
        return "no problem of the batch has a round"
    if not model.has_answer_head or model.config.carry_state:
        return None
    weights = model.block.weights()
    matrices = sum(t.numel() for t in weights.tensors if t is not None and t.ndim == 2)
    rows = float(np.diff(problems.problem_offsets) @ problems.loops) / loops
    work = 2 * rows * matrices / (LAUNCHES_A_LAYER * model.config.block.n_layers)
    full = compute_dtype(weights.of_gemms).itemsize >= 4
    if work > LAUNCH * (RATE_32 if full else RATE_16):
        return "the work of its launches takes longer than to launch them"
    return None


def model_reason(model: nn.Module) -> str | None:
    """Returns why the reading of chains off a model cannot be captured, or None: a replay repeats
    what the kernels did, and calls no Python."""
    if type(model) is not LoopedTransformer:
        return f"{type(model).__name__} may read in a way of its own: use a LoopedTransformer"
    for name in ("predict_rounds", "embed", "iterations"):
        if name in vars(model):
            return f"the model has a method {name} of its own"
    if shards(model.modules()):
        return "fully_shard gathers the model's weights in hooks, which a replay would not call"
    kinds = {"block": LoopedBlock, "embedding": nn.Embedding}
    if model.config.feedback != "none":
        kinds["fed_embedding"] = nn.Embedding
    for name, kind in kinds.items():
        reason = call_reason(unwrapped(getattr(model, name)), kind)
        if reason is not None:
            return f"{name} {reason}, which a replay would not call"
    for path, (part, reason) in model.block.weights().called.items():
        return f"{path} ({type(part).__name__}) {reason}, which a replay would not call"
    for head in ["chain_head"] + ["answer_head"] * model.has_answer_head:
        weights = model.readout(head).weights()
        if isinstance(weights, str):
            return f"{weights}, which a replay would not call"
    return None
