"""Reads chains off a looped model over buffers of a fixed capacity, as a CUDA graph needs it.

`load` brings a batch, in one copy from the host; `run` launches every iteration, the readout and,
for a model with feedback, what the next one is fed; `fetch` brings the tokens back, in one copy,
and `result` waits for them; the next batch may be loaded and run before. Nothing in `run` depends
on what a batch holds, and it never waits for the host. Iterations beyond a batch's last, and rows
beyond the live ones, are launches that leave at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from relay_fast.batch.arranged import ArrangedInputs
from relay_fast.batch.capacity import ALIGN, Capacity, CapacityBatch
from relay_fast.batch.feeder import Feeder
from relay_fast.batch.packed import PackedBatch
from relay_fast.batch.plan import Plan
from relay_fast.batch.transfer import BufferLayout
from relay_fast.config import ModelConfig
from relay_fast.data.collate import collate_looped
from relay_fast.data.feedback import arranged_inputs
from relay_fast.decoding.reading import Chains, Prefixes, answered_chains, implied_chains
from relay_fast.engine.block_iteration import BlockIteration
from relay_fast.engine.loop import iterate
from relay_fast.engine.rope import block_rope_table
from relay_fast.engine.spec import LoopSpec
from relay_fast.models.transformers import LoopedTransformer
from relay_fast.ops.dispatch import TORCH
from relay_fast.tasks import Samples, Task
from relay_fast.tasks.vocabulary import PAD
from relay_fast.utils.ragged import concat_ranges

ROOM = 0.125  # relative margin of the rows of inputs whose sizes follow from the rounds
LONGEST = 128  # lengths up to here are rounded up to powers of 2, those of attention's tiles
COLUMN, CELL = torch.int32, torch.float32  # of what comes back


class Loaded(NamedTuple):
    """A batch on the host, as a static reading takes it.

    moves: whether the sizes of inputs follow from the rounds.
    """

    batch: PackedBatch
    beside: list[Tensor]
    moves: bool


class Fetched(NamedTuple):
    """Tokens on their way back to the host.

    views: of the buffer that they come to; plan: of the batch; there: the event after which they
    are there, None if they are.
    """

    views: list[Tensor]
    plan: Plan
    there: torch.cuda.Event | None


def prepare(config: ModelConfig, problems: Samples, tasks: Mapping[str, Task]) -> Loaded | str:
    """Makes the batch that a static reading loads, or says why there is none.

    Args:
        config: of the model.
        problems: the batch, sorted by most loops first.
        tasks: the problems' tasks by name.
    """
    if config.feedback == "none" or config.carry_state:
        batch = collate_looped(problems, tasks, carry_state=config.carry_state)
        beside = [batch.feeder.last] if config.carry_state else []
        return Loaded(_without_targets(batch), beside, False)
    first = arranged_inputs(problems, tasks)
    if isinstance(first, str):
        return first
    inputs, widths, arrangement = first
    most = arrangement.fed[2] + arrangement.growth * int(problems.loops.max(initial=0))
    largest = int(max(arrangement.fed.max(initial=0), most.max(initial=0)))
    batch = PackedBatch(
        torch.from_numpy(inputs.tokens),
        Plan(widths, problems.loops, "cpu", inputs.positions),
        *_no_targets(len(problems), int(problems.loops.max(initial=0))),
        order=np.arange(len(problems)),
        max_token=max(int(inputs.tokens.max(initial=0)), largest),
    )
    if batch.max_token >= config.vocabulary_size:
        return f"token {batch.max_token} is outside of the vocabulary"
    moves = bool((arrangement.follows & (problems.loops > 1)).any())
    return Loaded(batch, [torch.from_numpy(values) for values in arrangement], moves)


def _without_targets(batch: PackedBatch) -> PackedBatch:
    names = ("rows", "row_offsets", "targets", "weights", "answers", "answer_weights")
    none = _no_targets(len(batch), batch.plan.max_loops)
    return replace(batch, **dict(zip(names, none, strict=True)))


def _no_targets(sequences: int, loops: int) -> tuple:
    none = torch.zeros(0, dtype=torch.int64)
    answers = torch.zeros(sequences, dtype=torch.int64)
    return none, (0,) * (loops + 1), none, none.float(), answers, answers.float()


def capacity_of(loaded: Loaded, config: ModelConfig) -> Capacity:
    """Returns the capacity of a batch: its sizes rounded up, four steps an octave, so that batches
    of similar sizes share one."""
    plan, loops = loaded.batch.plan, _up(loaded.batch.plan.max_loops)
    if config.block.max_loops:
        loops = min(loops, max(config.block.max_loops, plan.max_loops))
    rows, longest = plan.rows, int(plan.lengths.max(initial=1))
    if loaded.moves:  # a round without a boundary makes the next input longer by one
        rows, longest = int(rows * (1 + ROOM)), longest + plan.max_loops - 1
    tile = 1 << (longest - 1).bit_length()
    longest = max(16, tile) if longest <= LONGEST else -(-longest // LONGEST) * LONGEST
    rows, sequences = -(-_up(rows) // ALIGN) * ALIGN, _up(plan.sequences)
    longest = min(longest, max(config.max_tokens, int(plan.lengths.max(initial=1))))
    return Capacity((rows,) * loops, (sequences,) * loops, (0,) * loops, sequences, longest)


def _up(size: int) -> int:
    step = 1 << max(0, (size - 1).bit_length() - 3)
    return -(-size // step) * step


class StaticReading:
    """Reads batches of one capacity.

    Args:
        model: in inference mode, of plain parts.
        capacity: from `capacity_of`.
        moves: as in `Loaded`.
        scored: whether to compute log-probabilities.

    Attributes:
        arranged: whether inputs are laid of the rounds, as the tasks' arrangements say.
    """

    def __init__(self, model: LoopedTransformer, capacity: Capacity, moves: bool, scored: bool):
        self.model, self.moves, self.scored = model, moves, scored
        c, rows, loops = model.config, capacity.rows[0], len(capacity.rows)
        self.arranged = c.feedback != "none" and not c.carry_state
        beside = [((rows,), torch.int64)] if c.carry_state else []
        if self.arranged:
            beside = ArrangedInputs.beside_sizes(capacity)
        self._static = CapacityBatch(capacity, model.device, beside)
        cells, columns = (loops, rows), (capacity.sequences,)
        sizes = [(cells, COLUMN), (columns, COLUMN)]
        sizes += [(cells, CELL), (columns, CELL)] * scored
        sizes += [((loops, capacity.sequences), COLUMN)] * moves
        self._layout = BufferLayout(sizes)
        self._out = self._layout.empty(model.device).zero_()
        self._views = self._layout.views(self._out)

    def load(self, loaded: Loaded) -> None:
        """Brings a batch that fits the capacity; raises ValueError as the model for its tokens."""
        self.model._check(loaded.batch)
        self._static.load(loaded.batch, loaded.beside)
        self._loaded = loaded

    def run(self) -> None:
        """Launches the whole reading of the batch."""
        self._heads: dict[str, tuple] = {}  # cast once
        if self.arranged:
            self._run_arranged()
        else:
            self._run_loop()

    def fetch(self) -> Fetched:
        """Launches the copy of what `run` wrote to the host."""
        host = self._layout.empty("cpu", pinned=self._out.is_cuda)
        host.copy_(self._out, non_blocking=True)
        there = torch.cuda.current_stream().record_event() if self._out.is_cuda else None
        return Fetched(self._layout.views(host), self._loaded.batch.plan, there)

    def result(
        self, fetched: Fetched, problems: Samples, tasks: Mapping[str, Task]
    ) -> Chains | None:
        """Returns the chains of a batch; None if an input grew out of the capacity.

        Args:
            fetched: what `fetch` brings back of it.
            problems: its problems.
            tasks: their tasks by name.
        """
        if fetched.there is not None:
            fetched.there.synchronize()
        ids, answers, *more = (view.numpy() for view in fetched.views)
        prefixes = Prefixes.of(fetched.plan)
        if self.moves:
            widths, capacity = more.pop(), self._static.capacity
            if widths.max() > capacity.longest or widths.sum(1).max() > ids.shape[1]:
                return None
            own = [widths[t, :n] for t, n in enumerate(prefixes.active)]
            prefixes = prefixes._replace(widths=np.concatenate(own).astype(np.int64))
        live = self._live(prefixes, ids.shape[1])
        scores = None
        if self.scored:
            scores = more[0].reshape(-1)[live], more[1][: len(problems)].copy()
        if not self.model.has_answer_head:
            rounds = scores[0] if self.scored else None
            return implied_chains(problems, tasks, prefixes, ids.reshape(-1)[live], rounds)
        return answered_chains(
            problems, prefixes, (ids.reshape(-1)[live], answers[: len(problems)]), scores
        )

    @staticmethod
    def _live(prefixes: Prefixes, rows: int) -> np.ndarray:
        """Returns where the prefixes' tokens are in what came back, end to end."""
        iteration = np.repeat(np.arange(len(prefixes.active)), prefixes.active)
        counts = np.bincount(iteration, prefixes.widths, len(prefixes.active)).astype(np.int64)
        return concat_ranges(rows * np.arange(len(counts)), counts)

    # What a graph captures

    def _spec(self) -> tuple[LoopSpec, list[Tensor]]:
        weights = self.model.block.weights()
        return self.model.block.run(self._static.plan, weights), weights.tensors

    def _run_loop(self) -> None:
        model, batch, plan = self.model, self._static.batch, self._static.plan
        run, parameters = self._spec()
        x = model.embed(batch)
        last, fed, enter = x[plan.last_rows], None, None
        if model.config.carry_state:
            feeder = Feeder(self._static.beside[0], PAD)
            fed = feeder.start()
            enter = lambda state, t: state + model.fed_embedding(fed)
        going = torch.arange(plan.sequences, device=x.device)
        for t, state in iterate(run, x, parameters, enter):
            ids = self._read_out(run, state, "chain_head", t - 1, plan.row_count(t))
            reached = (going < plan.active_counts[t - 1, 0]).unsqueeze(1)
            last = torch.where(reached, state[plan.last_rows], last)
            if fed is not None:
                fed = feeder.after(ids, plan.rows)
        self._read_out(run, last, "answer_head", None, None)

    def _run_arranged(self) -> None:
        largest = self.model.config.vocabulary_size - 1
        inputs = ArrangedInputs(self._static, self.moves, PAD, largest)
        run, parameters = self._spec()
        body = ids = None
        for t in range(len(self._static.capacity.rows)):
            batch = inputs.start() if ids is None else inputs.after(ids, t)
            x = self.model.embed(batch)
            body = run.make_iteration(x, parameters) if body is None else body
            once = replace(run, plan=batch.plan, make_iteration=partial(_rebound, body, batch.plan))
            ((_, state),) = iterate(once, x, parameters)
            ids = self._read_out(run, state, "chain_head", t, batch.plan.row_count(1))
            if self.moves:
                self._views[-1][t].copy_(inputs.widths)

    def _read_out(
        self, run: LoopSpec, state: Tensor, head: str, t: int | None, row_count: Tensor | None
    ) -> Tensor:
        """Writes the tokens of an iteration, or for None the answers, where they come back from;
        returns them."""
        c = self.model.config.block
        if head not in self._heads:
            read = self.model.readout(head).weights_only("reading as a graph")
            self._heads[head] = (read.norm, read.bias, read.head.to(run.compute_dtype))
        readout = self._heads[head]
        count = {} if row_count is None or run.ops is TORCH else {"row_count": row_count}
        ids = run.ops.argmax(state, *readout, c.eps, c.norm, **count)
        place = (lambda i: self._views[i]) if t is None else (lambda i: self._views[i][t])
        place(int(t is None)).copy_(ids)
        if self.scored:
            loss, _, _ = run.ops.cross_entropy_fwd(
                state, ids, *readout, eps=c.eps, kind=c.norm, **count
            )
            place(2 + int(t is None)).copy_(-loss)
        return ids


def _rebound(
    body: BlockIteration, plan: Plan, x: Tensor, _: Sequence[Tensor | None]
) -> BlockIteration:
    """Binds an iteration of the block to another plan and input; its weights stay as they are."""
    if body.cos is not None and plan.positions is not body.plan.positions:
        body.cos, body.sin = block_rope_table(body.config, plan.positions, body.cos.dtype)
    body.plan, body.x = plan, x
    return body
