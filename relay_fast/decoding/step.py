"""Prefill and single-token decoding steps of the autoregressive model over a key/value cache.

A step reads and writes tensors at fixed addresses, in shapes given by its cache slices: on a GPU
each shape is captured once as a CUDA graph and replayed; on a CPU the same function runs eagerly.
The CUDA graph path is not tested on a GPU yet.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from relay_fast.batch.plan import Plan, RowRange
from relay_fast.decoding.cached_block import CachedBlock, TorchCachedBlock, lean_argmax
from relay_fast.decoding.kv_cache import CacheSlice, KVCache, gather_rows
from relay_fast.decoding.sampling import sample_tokens
from relay_fast.engine.block_iteration import BlockIteration
from relay_fast.engine.plain_modules import check_not_overridden, check_parts
from relay_fast.kernels.cross_entropy_ref import readout_ref
from relay_fast.kernels.norm_ref import upcast
from relay_fast.models.looped_block import LoopedBlock
from relay_fast.models.transformers import AutoregressiveTransformer
from relay_fast.ops.dispatch import TORCH
from relay_fast.utils.cuda_graph import captured, not_captured, on_side_stream
from relay_fast.utils.ragged import pieces

PREFILL_TOKENS = {"cpu": 2048, "cuda": 1 << 16}  # prompt tokens per pass
LENGTH_STEP = 256  # captured steps read the cache up to multiples of this


class Stepper:
    """Runs a model over a key/value cache.

    Attributes:
        tokens: (batch,) int64 on the device, the last token of each cache row.
        positions: (batch,) int64 on the device, where that token goes when it is fed.
        scores: (batch,) fp32 on the device, its log-probability; None unless `scored`.

    Args:
        model: the model to decode with.
        batch: rows of the cache.
        length: positions of each row.
        loops: iterations of the block.
        temperature: 0 is greedy.
        seed: of the draws at a temperature above 0.
        scored: whether to compute log-probabilities.
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
        check_parts(model, block=LoopedBlock)
        c = self.config = model.config.block
        self.model, self.batch, self.loops = model, batch, loops
        self.temperature, self.scored = temperature, scored
        self.device = model.device
        self.captures = self.device.type == "cuda"
        weights = model.block.weights().refuse_called("decoding with a cache")
        run = model.block.run(Plan([], [], self.device), weights)
        self._ops, self._dtype = run.ops, run.compute_dtype
        self._parameters = weights.named
        readout = model.readout().weights_only("decoding with a cache")
        self._readout = (readout.norm, readout.bias, readout.head.to(self._dtype), c.eps, c.norm)
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
        self._generator = torch.Generator(self.device).manual_seed(seed) if temperature else None
        self._captured: dict[CacheSlice, Callable[[], None]] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.captures else None

    def prefill(self, prompts: np.ndarray, lengths: np.ndarray, first_row: int) -> None:
        """Feeds prompts and chooses the token after each.

        Args:
            prompts: packed token ids.
            lengths: (n,) tokens of each prompt.
            first_row: cache row of the first prompt; the others follow.
        """
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

    def steps(self, slices: Sequence[CacheSlice], number: int) -> Iterator[None]:
        """Takes `number` steps, which feed each row's last token and choose its next; yields after
        each."""
        if not self.captures:
            yield from self._steps(slices, number)
            return
        covering = self._covering_slice(slices)
        if covering not in self._captured:
            try:
                self._captured[covering] = self._capture(covering)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                said = not_captured("a decoding step", error)
                warnings.warn(f"{said}; decoding goes on without CUDA graphs", stacklevel=2)
                self.captures = False
                yield from self._steps(slices, number)
                return
        for _ in range(number):
            yield self._captured[covering]()

    def move(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copies cache rows with their tokens and positions.

        Args:
            sources: the rows to copy.
            targets: the rows to overwrite; none of them is among the sources.
            length: cache positions to copy.
        """
        from_, to = (torch.as_tensor(rows, device=self.device) for rows in (sources, targets))
        self.cache.move(from_, to, length)
        for state in self._states:
            state[to] = state[from_]

    def _steps(self, slices: Sequence[CacheSlice], number: int) -> Iterator[None]:
        places = (
            gather_rows(self.positions, slices) + torch.arange(number, device=self.device)[:, None]
        )
        for positions, ops in zip(places, self.cache.steps(self._ops, slices, places), strict=True):
            x = self._embed(gather_rows(self.tokens, slices))
            self._body.set_step(x, positions, ops)
            self._sample_next(self._loop(self._body, x, len(x)), slices)
            for cache_slice in slices:
                self.positions[cache_slice.rows].add_(1)
            if self.captures:  # rows without a sequence are stepped too: keep them inside the cache
                self.positions.clamp_(max=self.cache.length - 1)
            yield

    def _covering_slice(self, slices: Sequence[CacheSlice]) -> CacheSlice:
        """Returns one slice that covers all, rounded up so that few shapes are captured."""
        last = max(cache_slice.last for cache_slice in slices)
        length = max(cache_slice.length for cache_slice in slices)
        rows = min(self.batch, 1 << (last - 1).bit_length())
        return CacheSlice(0, rows, min(self.cache.length, -(-length // LENGTH_STEP) * LENGTH_STEP))

    def _capture(self, cache_slice: CacheSlice) -> Callable[[], None]:
        """Captures the step over this slice as a CUDA graph; returns its replay."""
        before = [state.clone() for state in self._states]

        def step() -> None:
            next(self._steps([cache_slice], 1))

        on_side_stream(step)  # the set-up of a first call must not be captured
        for state, value in zip(self._states, before, strict=True):
            state.copy_(value)
        # A shared pool: no graph's memory outlives a replay.
        return captured(step, pool=self._pool, generator=self._generator)

    def _embed(self, tokens: Tensor) -> Tensor:
        return self.model.embedding(tokens)

    def _loop(self, body: BlockIteration, x: Tensor, sequences: int) -> Tensor:
        """Returns the states (rows, d) after the last iteration."""
        h = x
        for t in range(1, self.loops + 1):
            out = torch.empty_like(x)
            body.forward(h, RowRange(t, 0, sequences, 0, len(x)), out, keep=False)
            h = out
        return h

    def _sample_next(self, state: Tensor, slices: Sequence[CacheSlice]) -> None:
        """Chooses the next token of every row from its last state, (rows, d)."""
        readout = (state, *self._readout)
        sizes = [cache_slice.last - cache_slice.first for cache_slice in slices]
        scores = None
        if self.temperature or self.scored:
            logits = upcast(readout_ref(*readout))
            chosen = sample_tokens(logits, self.temperature, self._generator)
            if self.scored:
                own = logits.gather(1, chosen.unsqueeze(1)).squeeze(1)
                scores = (own - logits.logsumexp(-1)).float()
        else:
            chosen = self._argmax(*readout)
        for cache_slice, own in zip(slices, chosen.split(sizes), strict=True):
            self.tokens[cache_slice.rows] = own
        if scores is not None:
            for cache_slice, own in zip(slices, scores.split(sizes), strict=True):
                self.scores[cache_slice.rows] = own
