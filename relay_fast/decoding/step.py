"""The autoregressive model over its cache: reads prompts, and writes one token a sequence and step.

What a step reads and writes lies in tensors that stay where they are, and its shapes are those of
its groups: on a GPU each shape is captured once as a CUDA graph and replayed, a CPU runs the same
function as it is. No CUDA graph of it has run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from relay_fast.batch.plan import Plan, RowRange
from relay_fast.decoding.cached_block import CachedBlock, TorchCachedBlock, lean_argmax
from relay_fast.decoding.kv_cache import CacheSlice, KVCache, gather_rows
from relay_fast.engine.block_iteration import BlockIteration
from relay_fast.engine.plain_modules import check_not_overridden
from relay_fast.kernels.cross_entropy_ref import readout_ref
from relay_fast.kernels.norm_ref import upcast
from relay_fast.models.transformers import AutoregressiveTransformer
from relay_fast.ops.dispatch import TORCH
from relay_fast.utils.ragged import pieces

PREFILL_TOKENS = {"cpu": 2048, "cuda": 1 << 16}  # prompt tokens in one pass
LENGTH_STEP = 256  # captured steps see the cache in multiples of this


class Stepper:
    """The model over a cache of `batch` rows of `length` positions.

    On the device, by cache row: tokens (batch,) int64, the last token written; positions (batch,)
    int64, where it goes when it is fed; scores (batch,) fp32, its log-probability (None unless
    `scored`).
    """

    def __init__(
        self,
        model: AutoregressiveTransformer,
        batch: int,
        length: int,
        *,
        loops: int = 1,
        temperature: float = 0.0,
        seed: int = 0,
        scored: bool = False,
    ):
        check_not_overridden(model, AutoregressiveTransformer, "forward", "loss", "_pass", "embed")
        model.check_parts()
        c = self.config = model.config.block
        self.model, self.batch, self.loops = model, batch, loops
        self.temperature, self.scored = temperature, scored
        self.device = model.device
        self.captures = self.device.type == "cuda"
        run = model.block.run(Plan([], [], self.device))
        self._ops, self._dtype = run.ops, run.compute_dtype
        self._parameters = dict(model.block.named_parameters())
        self._head = model.chain_head.weight.to(self._dtype)
        of_step = (c, self._parameters, length, self._ops, self._dtype, self.device)
        if self._ops is TORCH:
            self._body, self._argmax = TorchCachedBlock(*of_step), lean_argmax
        else:
            self._body, self._argmax = CachedBlock(*of_step), self._ops.argmax
        shape = (loops * c.n_layers, batch, c.kv_heads, length, c.head_dim)
        self.cache = KVCache(shape, self._dtype, self.device)
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.positions = torch.zeros_like(self.tokens)
        self.scores = torch.zeros(batch, device=self.device) if scored else None
        self._states = [self.tokens, self.positions] + ([self.scores] if scored else [])
        self._generator = torch.Generator(self.device).manual_seed(seed)
        self._captured: dict[CacheSlice, Callable[[], None]] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.captures else None

    def prefill(self, prompts: np.ndarray, lengths: np.ndarray, first_row: int) -> None:
        """Reads packed prompts into the rows first_row … and writes the token after each."""
        ends = np.cumsum(lengths)
        for chosen in pieces(lengths, PREFILL_TOKENS[self.device.type]):
            begin, end = ends[chosen[0]] - lengths[chosen[0]], ends[chosen[-1]]
            rows = slice(first_row + int(chosen[0]), first_row + int(chosen[-1]) + 1)
            self._prefill(prompts[begin:end], lengths[chosen], rows)

    def _prefill(self, prompts: np.ndarray, lengths: np.ndarray, rows: slice) -> None:
        plan = Plan(lengths, np.full(len(lengths), self.loops), self.device)
        owner = torch.from_numpy(np.repeat(np.arange(rows.start, rows.stop), lengths))
        ops = self.cache.prefill(self._ops, owner.to(self.device), plan.positions.long())
        x = self._embed(torch.from_numpy(prompts.astype(np.int64)).to(self.device))
        body = BlockIteration(self.config, self._parameters, plan, x, ops, self._dtype)
        state = self._loop(body, x, len(lengths))[plan.last_rows]
        self._sample_next(state, [CacheSlice(rows.start, rows.stop, 0)])
        self.positions[rows] = torch.from_numpy(lengths.astype(np.int64)).to(self.device)

    def steps(self, groups: Sequence[CacheSlice], number: int) -> Iterator[None]:
        """Feeds the groups' rows their last token and writes the next, so many times."""
        if not self.captures:
            yield from self._steps(groups, number)
            return
        group = self._fixed_slice(groups)
        if group not in self._captured:
            self._captured[group] = self._capture(group)
        for _ in range(number):
            yield self._captured[group]()

    def move(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copies rows with the first `length` positions of their cache; none may be both."""
        from_, to = (torch.as_tensor(rows, device=self.device) for rows in (sources, targets))
        self.cache.move(from_, to, length)
        for state in self._states:
            state[to] = state[from_]

    def _steps(self, groups: Sequence[CacheSlice], number: int) -> Iterator[None]:
        places = (
            gather_rows(self.positions, groups) + torch.arange(number, device=self.device)[:, None]
        )
        for positions, ops in zip(places, self.cache.steps(self._ops, groups, places), strict=True):
            x = self._embed(gather_rows(self.tokens, groups))
            self._body.set_step(x, positions, ops)
            self._sample_next(self._loop(self._body, x, len(x)), groups)
            for group in groups:
                self.positions[group.rows].add_(1)
            if self.captures:  # rows without a sequence run along: they stay inside the cache
                self.positions.clamp_(max=self.cache.length - 1)
            yield

    def _fixed_slice(self, groups: Sequence[CacheSlice]) -> CacheSlice:
        """One group that holds all, of few different shapes."""
        last = max(group.last for group in groups)
        length = max(group.length for group in groups)
        rows = min(self.batch, 1 << (last - 1).bit_length())
        return CacheSlice(0, rows, min(self.cache.length, -(-length // LENGTH_STEP) * LENGTH_STEP))

    def _capture(self, group: CacheSlice) -> Callable[[], None]:
        """The step of this shape as a CUDA graph."""
        before = [state.clone() for state in self._states]
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):  # what is set up at the first call must not be captured
            next(self._steps([group], 1))
        here.wait_stream(aside)
        for state, value in zip(self._states, before, strict=True):
            state.copy_(value)
        graph = torch.cuda.CUDAGraph()
        if self.temperature:
            graph.register_generator_state(self._generator)
        with torch.cuda.graph(graph, pool=self._pool):  # nothing of one graph outlives its replay
            next(self._steps([group], 1))
        return graph.replay

    def _embed(self, tokens: Tensor) -> Tensor:
        return self.model.embedding(tokens)

    def _loop(self, body: BlockIteration, x: Tensor, sequences: int) -> Tensor:
        """States (rows, d) after the last iteration."""
        h = x
        for t in range(1, self.loops + 1):
            out = torch.empty_like(x)
            body.forward(h, RowRange(t, 0, sequences, 0, len(x)), out, keep=False)
            h = out
        return h

    def _sample_next(self, state: Tensor, groups: Sequence[CacheSlice]) -> None:
        """Writes the groups' next tokens, given their last states."""
        c, norm = self.config, self.model.norm
        readout = (state, norm.weight, norm.bias, self._head, c.eps, c.norm)
        sizes = [group.last - group.first for group in groups]
        scores = None
        if self.temperature or self.scored:
            logits = upcast(readout_ref(*readout))
            chosen = self._draw(logits)
            if self.scored:
                own = logits.gather(1, chosen.unsqueeze(1)).squeeze(1)
                scores = (own - logits.logsumexp(-1)).float()
        else:
            chosen = self._argmax(*readout)
        for group, own in zip(groups, chosen.split(sizes), strict=True):
            self.tokens[group.rows] = own
        if scores is not None:
            for group, own in zip(groups, scores.split(sizes), strict=True):
                self.scores[group.rows] = own

    def _draw(self, logits: Tensor) -> Tensor:
        if not self.temperature:
            return logits.argmax(-1)
        # The largest of logits plus Gumbel noise is a draw from their softmax.
        noise = torch.empty_like(logits).exponential_(generator=self._generator)
        return (logits / self.temperature).sub_(noise.log_()).argmax(-1)
