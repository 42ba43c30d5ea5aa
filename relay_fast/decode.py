"""Autoregressive decoding with a static key/value cache.

Prompts of different lengths are prefilled packed, without padding; their keys and values go right
after each other into the cache row of their sequence, so that every sequence has a position of its
own. Sequences that end are compacted out (the active rows stay a prefix) and waiting prompts take
their place. The block is the model's own (`relay_fast.block.BlockBody`): only its attention is
exchanged for one over the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from relay_fast._inference import inference
from relay_fast.block import BlockBody
from relay_fast.functional import Ops
from relay_fast.kernels.cross_entropy_ref import readout_ref
from relay_fast.kernels.norm_ref import wide
from relay_fast.modules import AutoregressiveTransformer
from relay_fast.plan import Plan, Segment
from relay_fast.ragged import offsets_of, ragged_index
from relay_fast.tasks.vocabulary import EOS

CACHE_BYTES = 1 << 30  # what the cache may take when the batch is not given
MAX_BATCH = 512  # more gains nothing on a CPU, where this was measured
REFILL_SHARE = 2  # wait until half of the batch is free: neighbours then have similar lengths


class Decoded(NamedTuple):
    """What was written after each prompt, in the caller's order.

    tokens: flat int32, `<eos>` included; offsets (S + 1,) int64; ended (S,) bool: False where the
    limit stopped the sequence before its `<eos>`.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    ended: np.ndarray


def decode(
    model: AutoregressiveTransformer,
    prompts: np.ndarray,
    offsets: np.ndarray,
    *,
    max_new: int | np.ndarray,
    temperature: float = 0.0,
    seed: int = 0,
    batch: int | None = None,
    sync_every: int = 4,
    loops: int = 1,
    progress: Callable[[int, int], Any] | None = None,
) -> Decoded:
    """Continues every prompt until `<eos>`, `max_new` tokens or the model's limit.

    prompts: flat token ids; offsets (S + 1,): prompt i is prompts[offsets[i] : offsets[i + 1]].
    max_new: an int, or one (S,) per sequence; the expected order of lengths is taken from it.
    temperature 0 is greedy: exactly the tokens that decoding without a cache gives. Above 0, tokens
    are drawn with `seed`. batch: sequences at a time, by default as many as CACHE_BYTES hold.
    sync_every: steps between two looks at which sequences ended. loops: iterations of the block.
    progress is called with (sequences done, S).

    Raises ValueError for empty prompts, tokens outside the vocabulary, prompts longer than the
    model takes, and a negative temperature or limit.
    """
    prompts, offsets = np.asarray(prompts), np.asarray(offsets, np.int64)
    lengths = np.diff(offsets)
    _check_prompts(model, prompts, lengths)
    if temperature < 0:
        raise ValueError(f"temperature = {temperature}: it must be 0 (greedy) or more")
    limits = np.broadcast_to(np.asarray(max_new, np.int64), lengths.shape)
    if np.any(limits < 0):
        raise ValueError(f"max_new = {limits.min()}: it must be 0 or more")
    # The last token is written but never read.
    limits = np.minimum(limits, model.config.max_tokens + 1 - lengths)
    order = np.argsort(-(lengths + limits), kind="stable")
    order = order[limits[order] > 0]
    longest = int((lengths + limits).max(initial=0)) + sync_every
    if batch is None:
        batch = max(1, min(MAX_BATCH, CACHE_BYTES // _cache_bytes(model, longest, loops)))
    with inference(model), torch.autocast(model.device.type, enabled=False):
        stepper = _Stepper(model, min(batch, len(order)), longest, loops, temperature, seed)
        scheduler = _Scheduler(stepper, prompts, offsets, limits, order, sync_every)
        while scheduler.advance():
            if progress is not None:
                progress(scheduler.done, len(lengths))
    return scheduler.result(len(lengths))


def _check_prompts(
    model: AutoregressiveTransformer, prompts: np.ndarray, lengths: np.ndarray
) -> None:
    if np.any(lengths < 1):
        raise ValueError(f"prompt {int(lengths.argmin())} is empty: give at least one token")
    limit, size = model.config.max_tokens, model.config.vocabulary_size
    if lengths.max(initial=0) > limit:
        raise ValueError(
            f"prompt {int(lengths.argmax())} of {lengths.max()} tokens is longer than the model's "
            f"limit of {limit}: shorten it or build the model with larger max_tokens"
        )
    if prompts.size and not 0 <= prompts.min() <= prompts.max() < size:
        worst = prompts.max() if prompts.min() >= 0 else prompts.min()
        raise ValueError(
            f"token {worst} is outside the model's vocabulary of {size}: encode with the "
            f"vocabulary the model was made with"
        )


def _cache_bytes(model: AutoregressiveTransformer, length: int, loops: int) -> int:
    """Bytes that the cache takes for one sequence."""
    c = model.config.block
    element = model.chain_head.weight.element_size()
    return 2 * loops * c.n_layers * c.kv_heads * c.head_dim * length * element


class _Cache:
    """Keys and values: one slot for each (iteration, layer), one row for each sequence.

    keys, values: (slots, batch, kv_heads, length, head_dim). It stands in for the attention op, and
    counts the calls of a pass to know which slot is meant.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        # Zeros, not empty: what is masked gets weight 0, and 0 · NaN would be NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self._rows = torch.arange(shape[1], device=device)
        self._heads = torch.arange(shape[2], device=device)
        self._columns = torch.arange(shape[3], device=device)
        self._slot = 0

    def move(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Copies the first `length` positions of cache rows."""
        for part in (self.keys, self.values):
            part[:, targets, :, :length] = part[:, sources, :, :length]

    def prefill(self, ops: Ops, rows: Tensor, positions: Tensor) -> Ops:
        """`ops`, whose attention also stores keys and values of the packed tokens.

        rows, positions (N,): where each token goes.
        """
        self._slot = 0
        targets = self._targets(rows, positions)

        def attention(qkv, layout, heads, kv_heads, causal):
            _, k, v = _split(qkv, heads, kv_heads)
            self._store(k, v, targets)
            self._slot += 1
            return ops.attention_fwd(qkv, layout, heads, kv_heads, causal)

        return ops._replace(attention_fwd=attention)

    def step(self, ops: Ops, positions: Tensor, length: int) -> Ops:
        """`ops`, whose attention is that of one new token a sequence over the cache.

        positions (A,): where the new token goes; length: above the largest of them.
        """
        self._slot = 0
        active = len(positions)
        targets = self._targets(self._rows[:active], positions)
        future = self._columns[:length] > positions.unsqueeze(1)
        mask = torch.zeros(active, 1, 1, length, device=positions.device)
        mask.masked_fill_(future[:, None, None], float("-inf"))

        def attention(qkv, layout, heads, kv_heads, causal):
            q, k, v = _split(qkv, heads, kv_heads)
            self._store(k, v, targets)
            keys = self.keys[self._slot, :active, :, :length]
            values = self.values[self._slot, :active, :, :length]
            self._slot += 1
            q = (q * q.shape[-1] ** -0.5).unflatten(1, (kv_heads, -1))
            scores = wide(torch.matmul(q, keys.transpose(-1, -2))).add_(mask)
            o = torch.matmul(scores.softmax(-1).to(qkv.dtype), values)
            return o.reshape(active, -1), None

        return ops._replace(attention_fwd=attention)

    def _targets(self, rows: Tensor, positions: Tensor) -> Tensor:
        """(N · kv_heads,): where the head vectors of the tokens go in a slot of head vectors."""
        first = (rows.unsqueeze(1) * self._heads.shape[0] + self._heads) * self._columns.shape[0]
        return (first + positions.unsqueeze(1)).view(-1)

    def _store(self, k: Tensor, v: Tensor, targets: Tensor) -> None:
        for part, new in ((self.keys, k), (self.values, v)):
            vectors = part[self._slot].view(-1, part.shape[-1])
            vectors.index_copy_(0, targets, new.reshape(-1, part.shape[-1]))


def _split(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q (rows, heads, head_dim), k and v (rows, kv_heads, head_dim)."""
    return qkv.unflatten(1, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), dim=1)


@dataclass(frozen=True)
class _StepPlan:
    """What BlockBody asks of a plan, for one token a sequence."""

    positions: Tensor  # (A,) int32

    def layout(self, first: int, last: int) -> None:
        return None


class _Stepper:
    """The model over the cache: prefills prompts, and writes one token a sequence and step."""

    def __init__(
        self,
        model: AutoregressiveTransformer,
        batch: int,
        length: int,
        loops: int,
        temperature: float,
        seed: int,
    ):
        c = self.config = model.config.block
        self.model, self.batch, self.loops, self.temperature = model, batch, loops, temperature
        self.device = model.device
        run = model.block.run(Plan([], [], self.device))
        self._ops, self._dtype = run.ops, run.compute_dtype
        self._parameters = dict(model.block.named_parameters())
        self._head = model.chain_head.weight.to(self._dtype)
        shape = (loops * c.n_layers, batch, c.kv_heads, length, c.head_dim)
        self.cache = _Cache(shape, self._dtype, self.device)
        self._generator = torch.Generator(self.device).manual_seed(seed)

    def prefill(self, prompts: np.ndarray, lengths: np.ndarray, first_row: int) -> Tensor:
        """Next tokens (S,) of packed prompts, which take the cache rows first_row …"""
        plan = Plan(lengths, np.full(len(lengths), self.loops), self.device)
        rows = torch.from_numpy(np.repeat(np.arange(len(lengths)) + first_row, lengths))
        positions = plan.positions.long()
        ops = self.cache.prefill(self._ops, rows.to(self.device), positions)
        tokens = torch.from_numpy(prompts.astype(np.int64)).to(self.device)
        state = self._block(tokens, plan, ops)
        return self._choose(state[plan.last_rows])

    def step(self, tokens: Tensor, positions: Tensor, length: int) -> Tensor:
        """Next tokens (A,) given the last ones (A,) and their positions (A,) int64."""
        ops = self.cache.step(self._ops, positions, length)
        return self._choose(self._block(tokens, _StepPlan(positions.int()), ops))

    def _block(self, tokens: Tensor, plan: Any, ops: Ops) -> Tensor:
        x = h = torch.nn.functional.embedding(tokens, self.model.embedding.weight)
        body = BlockBody(self.config, self._parameters, plan, x, ops, self._dtype)
        rows = len(tokens)
        sequences = rows if isinstance(plan, _StepPlan) else plan.sequences
        for t in range(1, self.loops + 1):
            out = torch.empty_like(x)
            body.forward(h, Segment(t, 0, sequences, 0, rows), out)
            h = out
        return h

    def _choose(self, state: Tensor) -> Tensor:
        c, norm = self.config, self.model.norm
        readout = (state, norm.weight, norm.bias, self._head, c.eps, c.norm)
        if not self.temperature:
            return self._ops.argmax(*readout)
        logits = wide(readout_ref(*readout)) / self.temperature
        # The largest of logits plus Gumbel noise is a draw from their softmax.
        noise = torch.empty_like(logits).exponential_(generator=self._generator)
        return logits.sub_(noise.log_()).argmax(-1)


class _Scheduler:
    """Which sequence has which cache row, what each has written, and who is next.

    Host arrays over the active rows (a prefix of the cache's): sequence, position (of the next
    token to feed), written (tokens so far).
    """

    def __init__(
        self,
        stepper: _Stepper,
        prompts: np.ndarray,
        offsets: np.ndarray,
        limits: np.ndarray,
        order: np.ndarray,
        sync_every: int,
    ):
        self._stepper, self._sync_every = stepper, sync_every
        self._prompts, self._offsets, self._limits = prompts, offsets, limits
        self._waiting = order
        self._sequence = self._position = self._written = np.zeros(0, np.int64)
        self._tokens = torch.zeros(0, dtype=torch.int64, device=stepper.device)
        self._records: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
        self._ended = np.zeros(len(limits), bool)
        self.done = 0

    def advance(self) -> bool:
        """Refills if worth it, runs a few steps, compacts; False when nothing is left."""
        free = self._stepper.batch - len(self._sequence)
        if len(self._waiting) and free * REFILL_SHARE >= self._stepper.batch:
            self._refill(free)
        if not len(self._sequence):
            return len(self._waiting) > 0
        remaining = self._limits[self._sequence] - self._written
        positions = torch.from_numpy(self._position).to(self._stepper.device)
        written = []
        for k in range(min(self._sync_every, int(remaining.max()))):
            length = int(self._position.max()) + k + 1
            self._tokens = self._stepper.step(self._tokens, positions + k, length)
            written.append(self._tokens)
        self._position = self._position + len(written)
        self._settle(torch.stack(written).cpu().numpy())
        return True

    def _refill(self, free: int) -> None:
        new, self._waiting = self._waiting[:free], self._waiting[free:]
        lengths = np.diff(self._offsets)[new]
        prompts = self._prompts[ragged_index(self._offsets[new], lengths)]
        tokens = self._stepper.prefill(prompts, lengths, len(self._sequence))
        self._sequence = np.concatenate([self._sequence, new])
        self._position = np.concatenate([self._position, lengths])
        self._written = np.concatenate([self._written, np.zeros_like(new)])
        self._tokens = torch.cat([self._tokens, tokens])
        old = len(self._sequence) - len(new)
        self._settle(tokens.cpu().numpy()[None], old)

    def _settle(self, tokens: np.ndarray, first_row: int = 0) -> None:
        """Takes in what rows first_row … wrote, (steps, rows), and compacts out those that end."""
        steps = len(tokens)
        sequence, written = self._sequence[first_row:], self._written[first_row:]
        is_end = tokens == EOS
        first_end = np.where(is_end.any(0), is_end.argmax(0), steps)
        counts = np.minimum(np.minimum(first_end + 1, steps), self._limits[sequence] - written)
        self._records.append((sequence, written, counts, tokens.astype(np.int32)))
        ended = first_end < counts
        self._ended[sequence[ended]] = True
        self._written = np.concatenate([self._written[:first_row], written + counts])
        keep = np.ones(len(self._sequence), bool)
        keep[first_row:] = ~ended & (written + counts < self._limits[sequence])
        self._compact(keep)

    def _compact(self, keep: np.ndarray) -> None:
        """Moves the last rows that go on into the holes, so that the active rows are a prefix."""
        left = int(keep.sum())
        self.done += len(keep) - left
        if left == len(keep):
            return
        index = np.arange(left)
        holes = np.flatnonzero(~keep[:left])
        index[holes] = left + np.flatnonzero(keep[left:])
        if len(holes):
            moved = torch.from_numpy(index[holes]).to(self._stepper.device)
            length = int(self._position[index[holes]].max())
            self._stepper.cache.move(moved, torch.from_numpy(holes).to(moved.device), length)
        self._tokens = self._tokens[torch.from_numpy(index).to(self._tokens.device)]
        self._sequence = self._sequence[index]
        self._position, self._written = self._position[index], self._written[index]

    def result(self, sequences: int) -> Decoded:
        sizes = np.zeros(sequences, np.int64)
        for sequence, _, counts, _ in self._records:
            sizes[sequence] += counts
        offsets = offsets_of(sizes)
        flat = np.empty(offsets[-1], np.int32)
        for sequence, written, counts, tokens in self._records:
            step = np.arange(len(tokens))[:, None]
            inside = step < counts
            flat[(offsets[sequence] + written + step)[inside]] = tokens[inside]
        return Decoded(flat, offsets, self._ended)
