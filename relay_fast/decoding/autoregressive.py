"""Autoregressive decoding with a preallocated key/value cache.

Prompts of different lengths are prefilled packed, without padding, and written to the start of
their sequence's cache row, so that every sequence has its own position. Rows at similar positions
form a row group; attention reads each group up to its own length. Finished sequences are compacted
out of their group, and waiting prompts take the free rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from relay_fast.decoding._inference import free_bytes, halve_on_oom, inference
from relay_fast.decoding.kv_cache import CacheSlice
from relay_fast.decoding.step import Stepper
from relay_fast.models.transformers import AutoregressiveTransformer
from relay_fast.ops.dispatch import compute_dtype
from relay_fast.tasks.vocabulary import EOS
from relay_fast.utils.numbers import as_int
from relay_fast.utils.precision import autocasting
from relay_fast.utils.ragged import concat_ranges, lengths_to_offsets

CACHE_BYTES = {"cpu": 1 << 30, "cuda": 1 << 40}  # limit beside half of the free memory
MAX_BATCH = {"cpu": 512, "cuda": 4096}  # measured on a CPU: more rows are not faster
REFILL_SHARE = 2  # refill when half of the batch is free: neighbours get similar lengths
GROUP_WASTE = 256  # padding positions that a group may read: about the cost of another group
BUCKET_RATIO = 2  # longest to shortest sequence of a bucket


class Decoded(NamedTuple):
    """The continuations of S prompts, in the caller's order."""

    tokens: np.ndarray  # flat int32, `<eos>` included
    offsets: np.ndarray  # (S + 1,) int64: continuation i is tokens[offsets[i] : offsets[i + 1]]
    ended: np.ndarray  # (S,) bool: False where the limit came before `<eos>`
    log_probability: np.ndarray | None = None  # fp32 at temperature 1; None unless `scored`


# Long: most of it is the description of the arguments.
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
    scored: bool = False,
    eos: int = EOS,
    progress: Callable[[int, int], Any] | None = None,
    autocast: str = "fp32",
) -> Decoded:
    """Continues every prompt until `eos`, `max_new` tokens or the model's limit.

    Args:
        model: a causal model.
        prompts: flat token ids.
        offsets: (S + 1,); prompt i is prompts[offsets[i] : offsets[i + 1]].
        max_new: the largest number of new tokens, an int or (S,) ints. Sequences are batched by
            prompt length plus `max_new`.
        temperature: 0 is greedy. Greedy decoding in fp32 and fp64 gives exactly the tokens of
            decoding without a cache; in bf16 and fp16, rounding depends on the batch size, and
            near ties may differ.
        seed: of the draws at a temperature above 0; the draws also depend on `batch`.
        batch: sequences at a time, by default as many as fit into free memory. It is halved
            where memory runs out.
        sync_every: steps between two checks for finished sequences.
        loops: iterations of the block.
        scored: whether to return log-probabilities.
        eos: the token that ends a sequence.
        progress: called with (sequences done, S).
        autocast: precision of the GEMMs and the cache, "fp32" (the parameters' own dtype) or
            "bf16", whatever autocast is around the call.

    Raises:
        ValueError: if the model is not causal, a prompt is empty, too long or has tokens outside
            the vocabulary, or a number is out of range.
        TypeError: if the tokens are not integers.
        torch.OutOfMemoryError: if a single sequence does not fit.
    """
    prompts, offsets = np.asarray(prompts), np.asarray(offsets, np.int64)
    lengths = np.diff(offsets)
    check_prompts(model, prompts, offsets)
    if not model.config.block.causal:
        raise ValueError(
            "the model is not causal, so it cannot continue a text: generate a looped model's "
            "chains with relay_fast.decoding.chains.generate_looped_chains"
        )
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature = {temperature}: it must be 0 (greedy) or more, and finite")
    batch = None if batch is None else _count("batch", batch)
    sync_every, loops = _count("sync_every", sync_every), _count("loops", loops)
    seed, temperature = as_int("seed", seed), float(temperature)
    limits = _check_limits(max_new, lengths)
    # The last token is never fed back, so it needs no position.
    limits = np.minimum(limits, model.config.max_tokens + 1 - lengths)
    texts = _DecodedTexts(prompts, offsets, limits, eos)
    options = {"loops": loops, "temperature": temperature, "seed": seed, "scored": scored}

    def new_stepper(rows: int, length: int) -> Stepper:
        with autocasting(model.device, autocast):  # asked once: a step casts by itself
            return Stepper(model, rows, length, **options)

    def rows_that_fit(length: int) -> int:
        with autocasting(model.device, autocast):
            return _rows_that_fit(model, length, loops)

    with inference(model, "fp32"):
        totals = lengths + limits
        fit = lambda length: batch or rows_that_fit(length + sync_every)
        for bucket in _length_buckets(totals, limits > 0, fit):
            length = int(totals[bucket[0]])
            attempt = partial(
                _decode_bucket,
                new_stepper,
                texts,
                bucket,
                length + sync_every,
                sync_every,
                progress,
            )
            halve_on_oom(attempt, min(fit(length), len(bucket)), model.device)
    return texts.result(scored)


def _decode_bucket(
    new_stepper: Callable[[int, int], Stepper],
    texts: _DecodedTexts,
    bucket: np.ndarray,
    length: int,
    sync_every: int,
    progress: Callable[[int, int], Any] | None,
    rows: int,
) -> None:
    """Decodes the unfinished sequences of a bucket in a cache of `rows` rows."""
    stepper = new_stepper(rows, length)
    scheduler = _Scheduler(stepper, texts, texts.forget_unfinished(bucket), sync_every)
    while scheduler.advance():
        if progress is not None:
            progress(texts.done, len(texts.limits))


def _check_limits(max_new: int | np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns `max_new` as (S,) int64, for prompts of these lengths (S,)."""
    limits = np.asarray(max_new)
    if not np.issubdtype(limits.dtype, np.integer) and limits.size:
        raise ValueError(f"max_new = {max_new}: it must be a whole number, or one for each prompt")
    limits = limits.astype(np.int64)
    if limits.ndim and limits.shape != lengths.shape:
        raise ValueError(
            f"max_new has shape {limits.shape} but there are {len(lengths)} prompts: give an int "
            f"or one for each"
        )
    if np.any(limits < 0):
        raise ValueError(f"max_new = {limits.min()}: it must be 0 or more")
    return np.broadcast_to(limits, lengths.shape)


def _count(name: str, value: int) -> int:
    value = as_int(name, value)
    if value < 1:
        raise ValueError(f"{name} = {value}: it must be 1 or more")
    return value


def check_prompts(
    model: torch.nn.Module, prompts: np.ndarray, offsets: np.ndarray, extra: int | np.ndarray = 0
) -> None:
    """Checks that a model can take the prompts.

    Args:
        model: has a `config` with `max_tokens` and `vocabulary_size`.
        prompts: flat token ids.
        offsets: (S + 1,) where each prompt begins.
        extra: padding tokens that are added to each prompt, an int or (S,) ints.

    Raises:
        ValueError: names the first prompt that is empty, too long or has unknown tokens.
        TypeError: if the tokens are not integers.
    """
    if prompts.size and not np.issubdtype(prompts.dtype, np.integer):
        raise TypeError(f"prompts are {prompts.dtype}: give token ids, which are integers")
    if not len(offsets) or (offsets[0], offsets[-1]) != (0, len(prompts)):
        ends = offsets[[0, -1]].tolist() if len(offsets) else "nowhere"
        raise ValueError(
            f"offsets begin and end at {ends}, there are {len(prompts)} tokens: give the start of "
            f"each prompt, then the number of tokens"
        )
    lengths = np.diff(offsets)
    if np.any(lengths < 0):
        fall = int((lengths < 0).argmax())
        raise ValueError(
            f"offsets fall from {offsets[fall]} to {offsets[fall + 1]} in prompt {fall}: give the "
            f"starts of the prompts in ascending order"
        )
    if np.any(lengths < 1):
        raise ValueError(f"prompt {int(lengths.argmin())} is empty: give at least one token")
    limit, size = model.config.max_tokens, model.config.vocabulary_size
    padded = lengths + extra
    if padded.max(initial=0) > limit:
        raise ValueError(
            f"prompt {int(padded.argmax())} of {padded.max()} tokens is longer than the model's "
            f"limit of {limit}: shorten it or build the model with larger max_tokens"
        )
    if prompts.size and not 0 <= prompts.min() <= prompts.max() < size:
        worst = int(np.flatnonzero((prompts < 0) | (prompts >= size))[0])
        prompt = int(np.searchsorted(offsets, worst, side="right")) - 1
        raise ValueError(
            f"token {prompts[worst]} of prompt {prompt} is outside the model's vocabulary of "
            f"{size}: encode with the vocabulary the model was made with"
        )


def _length_buckets(
    totals: np.ndarray, wanted: np.ndarray, fit: Callable[[int], int]
) -> list[np.ndarray]:
    """Sorts the wanted sequences by length, longest first, into buckets that share a cache.

    A new bucket begins where shorter sequences would fit more rows into a cache of their own.
    """
    order = np.argsort(-totals, kind="stable")
    order = order[wanted[order]]
    buckets = []
    while len(order):
        longest, rows = totals[order[0]], fit(int(totals[order[0]]))
        short = np.flatnonzero(totals[order] * BUCKET_RATIO <= longest)
        cut = short[0] if len(short) else len(order)
        if len(order) <= rows or cut == len(order) or fit(int(totals[order[cut]])) <= rows:
            cut = len(order)
        buckets.append(order[:cut])
        order = order[cut:]
    return buckets


def _rows_that_fit(model: AutoregressiveTransformer, length: int, loops: int) -> int:
    """Returns how many cache rows of `length` tokens fit into memory, in the dtype of GEMMs."""
    c, kind = model.config.block, model.device.type
    numbers = 2 * loops * c.n_layers * c.kv_heads * c.head_dim * length
    allowed = min(CACHE_BYTES[kind], free_bytes(model.device) // 2)
    fit = allowed // (numbers * compute_dtype(model.chain_head.weight).itemsize)
    return max(1, min(MAX_BATCH[kind], fit))


class _DecodedTexts:
    """The prompts and limits of S sequences, and the tokens decoded so far."""

    def __init__(self, prompts: np.ndarray, offsets: np.ndarray, limits: np.ndarray, eos: int):
        self.prompts, self.offsets, self.limits, self.eos = prompts, offsets, limits, eos
        self.ended = np.zeros(len(limits), bool)
        self.finished = limits == 0
        self._records: list[tuple[np.ndarray, ...]] = []

    @property
    def done(self) -> int:
        return int(self.finished.sum())

    def prompts_of(self, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the prompts' flat tokens and their lengths."""
        lengths = np.diff(self.offsets)[sequences]
        return self.prompts[concat_ranges(self.offsets[sequences], lengths)], lengths

    def add(
        self,
        sequence: np.ndarray,
        written: np.ndarray,
        tokens: np.ndarray,
        scores: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Records tokens and scores (steps, n) of n sequences that had `written` (n,) tokens.

        Returns:
            (n,) how many of the steps count, and (n,) bool, which sequences continue.
        """
        is_end = tokens == self.eos
        first_end = np.where(is_end.any(0), is_end.argmax(0), len(tokens))
        counts = np.minimum(np.minimum(first_end + 1, len(tokens)), self.limits[sequence] - written)
        self._records.append((sequence, written, counts, tokens.astype(np.int32), scores))
        ended = first_end < counts
        self.ended[sequence] = ended
        goes_on = ~ended & (written + counts < self.limits[sequence])
        self.finished[sequence] = ~goes_on
        return counts, goes_on

    def forget_unfinished(self, sequences: np.ndarray) -> np.ndarray:
        """Returns the sequences that are not finished, and drops the tokens they have."""
        self._records = [
            (sequence, written, np.where(self.finished[sequence], counts, 0), tokens, scores)
            for sequence, written, counts, tokens, scores in self._records
        ]
        return sequences[~self.finished[sequences]]

    def result(self, scored: bool) -> Decoded:
        sizes = np.zeros(len(self.limits), np.int64)
        for sequence, _, counts, _, _ in self._records:
            sizes[sequence] += counts
        offsets = lengths_to_offsets(sizes)
        flat = np.empty(offsets[-1], np.int32)
        flat_scores = np.empty(offsets[-1] if scored else 0, np.float32)
        for sequence, written, counts, tokens, scores in self._records:
            step = np.arange(len(tokens))[:, None]
            inside = step < counts
            places = (offsets[sequence] + written + step)[inside]
            flat[places] = tokens[inside]
            if scored:
                flat_scores[places] = scores[inside]
        return Decoded(flat, offsets, self.ended, flat_scores if scored else None)


@dataclass
class _RowGroup:
    """Adjacent cache rows at similar positions, from row `first` on."""

    first: int
    sequence: np.ndarray  # (n,) the sequence in each row
    position: np.ndarray  # (n,) where its next token goes
    written: np.ndarray  # (n,) how many tokens it has so far

    def __len__(self) -> int:
        return len(self.sequence)

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + len(self))

    def cache_slice(self, steps: int) -> CacheSlice:
        """Returns the part of the cache that the next `steps` steps read."""
        return CacheSlice(self.first, self.first + len(self), int(self.position.max()) + steps)


def _row_groups(
    first: int, sequence: np.ndarray, position: np.ndarray, written: np.ndarray
) -> list[_RowGroup]:
    """Cuts the rows from `first` on into the fewest groups that GROUP_WASTE allows."""
    cuts, begin, longest = [], 0, 0
    total = np.concatenate([[0], np.cumsum(position)])
    for i, own in enumerate(position.tolist()):
        longest = max(longest, own)
        if longest * (i + 1 - begin) - (total[i + 1] - total[begin]) > GROUP_WASTE:
            cuts.append(i)
            begin, longest = i, own
    rows = np.split(np.arange(len(sequence)), cuts)
    return [_RowGroup(first + int(r[0]), sequence[r], position[r], written[r]) for r in rows]


class _Scheduler:
    """Assigns sequences to cache rows, and waiting sequences to free rows."""

    def __init__(
        self, stepper: Stepper, texts: _DecodedTexts, waiting: np.ndarray, sync_every: int
    ):
        self._stepper, self._texts, self._waiting = stepper, texts, waiting
        self._sync_every = sync_every
        self._groups: list[_RowGroup] = []

    def advance(self) -> bool:
        """Refills free rows, runs a few steps and compacts; returns False when all is done."""
        free = self._stepper.batch - sum(map(len, self._groups))
        if len(self._waiting) and free * REFILL_SHARE >= self._stepper.batch:
            self._close_gaps()
            self._refill(free)
        if not self._groups:
            return len(self._waiting) > 0
        remaining = max(
            int((self._texts.limits[group.sequence] - group.written).max())
            for group in self._groups
        )
        number = min(self._sync_every, remaining)
        slices = [group.cache_slice(number) for group in self._groups]
        written = [self._written() for _ in self._stepper.steps(slices, number)]
        for group in self._groups:
            group.position = group.position + number
        self._settle(self._groups, written)
        return True

    def _written(self) -> list[torch.Tensor]:
        """Returns the last tokens of all cache rows, and their scores if `scored`."""
        last = (self._stepper.tokens, self._stepper.scores)
        return [state.clone() for state in last if state is not None]

    def _refill(self, free: int) -> None:
        new, self._waiting = self._waiting[:free], self._waiting[free:]
        _, lengths = self._texts.prompts_of(new)
        new = new[np.argsort(-lengths, kind="stable")]
        prompts, lengths = self._texts.prompts_of(new)
        first = sum(map(len, self._groups))
        self._stepper.prefill(prompts, lengths, first)
        added = _row_groups(first, new, lengths, np.zeros_like(new))
        self._groups += added
        self._settle(added, [self._written()])

    def _settle(self, groups: list[_RowGroup], written: list[list[torch.Tensor]]) -> None:
        """Records the tokens of some steps and compacts finished sequences out of the groups."""
        columns = [torch.stack(steps).cpu().numpy() for steps in zip(*written, strict=True)]
        for group in groups:
            own = [column[:, group.rows] for column in columns]
            counts, goes_on = self._texts.add(group.sequence, group.written, *own)
            group.written = group.written + counts
            self._compact(group, goes_on)
        self._groups = [group for group in self._groups if len(group)]

    def _compact(self, group: _RowGroup, keep: np.ndarray) -> None:
        """Moves the group's last continuing rows into the rows of finished sequences."""
        left = int(keep.sum())
        if left == len(keep):
            return
        index = np.arange(left)
        holes = np.flatnonzero(~keep[:left])
        index[holes] = left + np.flatnonzero(keep[left:])
        if len(holes):
            length = int(group.position[index[holes]].max())
            self._stepper.move(group.first + index[holes], group.first + holes, length)
        group.sequence, group.position = group.sequence[index], group.position[index]
        group.written = group.written[index]

    def _close_gaps(self) -> None:
        """Moves the groups together, so that the free rows come last, and regroups them."""
        end = 0
        for group in self._groups:
            gap = group.first - end
            length = int(group.position.max())
            for begin in range(0, len(group), max(1, gap)):
                # At most `gap` rows at a time: no row is both source and target.
                rows = np.arange(begin, min(begin + gap, len(group)))
                if len(rows):
                    self._stepper.move(group.first + rows, end + rows, length)
            end += len(group)
        if self._groups:
            columns = ((g.sequence, g.position, g.written) for g in self._groups)
            self._groups = _row_groups(0, *map(np.concatenate, zip(*columns, strict=True)))
