"""Autoregressive decoding with a static key/value cache.

Prompts of different lengths are prefilled packed, without padding; their keys and values go right
after each other into the cache row of their sequence, so that every sequence has a position of its
own. Rows at similar positions lie together, in parts: attention reads each part's own length.
Sequences that end are compacted out of their part, and waiting prompts take their place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from relay_fast.decoding._inference import free_bytes, inference
from relay_fast.decoding.kv_cache import CacheSlice
from relay_fast.decoding.step import Stepper
from relay_fast.models.transformers import AutoregressiveTransformer
from relay_fast.tasks.vocabulary import EOS
from relay_fast.utils.numbers import as_int
from relay_fast.utils.ragged import concat_ranges, lengths_to_offsets

CACHE_BYTES = {"cpu": 1 << 30, "cuda": 1 << 40}  # at most half of what is free, and at most this
MAX_BATCH = {"cpu": 512, "cuda": 4096}  # more gains nothing on a CPU, where this was measured
REFILL_SHARE = 2  # wait until half of the batch is free: neighbours then have similar lengths
PART_WASTE = 256  # cache positions that a part's rows may read in vain: what another part costs
BAND = 2  # sequences decoded together: the longest is at most this many times the shortest


class Decoded(NamedTuple):
    """What was written after each prompt, in the caller's order.

    tokens: flat int32, `<eos>` included; offsets (S + 1,) int64; ended (S,) bool: False where the
    limit stopped the sequence before its `<eos>`. log_probability: fp32, of each token, at
    temperature 1; None where it was not asked for.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    ended: np.ndarray
    log_probability: np.ndarray | None = None


# Long: half of it checks the arguments.
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
) -> Decoded:
    """Continues every prompt until `eos`, `max_new` tokens or the model's limit.

    prompts: flat token ids; offsets (S + 1,): prompt i is prompts[offsets[i] : offsets[i + 1]].
    max_new: an int, or one (S,) per sequence; the expected order of lengths is taken from it.
    temperature 0 is greedy: in fp32 and fp64 exactly the tokens that decoding without a cache
    gives; in bf16 and fp16 rounding depends on how many rows are decoded together, and near ties
    may fall the other way. Above 0, tokens are drawn with `seed`; the draws depend on `batch`.
    batch: sequences at a time, by default as many as free memory holds; it is halved where memory
    runs out all the same. sync_every: steps between two looks at which sequences ended. loops:
    iterations of the block. scored: also give log-probabilities. eos: the token that ends a
    sequence. progress is called with (sequences done, S).

    Raises ValueError for a model that is not causal, empty prompts, tokens outside the vocabulary,
    prompts longer than the model takes, and numbers out of range; TypeError for tokens that are no
    integers; torch.OutOfMemoryError where not even one sequence fits.
    """
    prompts, offsets = np.asarray(prompts), np.asarray(offsets, np.int64)
    lengths = np.diff(offsets)
    check_prompts(model, prompts, offsets)
    if not model.config.block.causal:
        raise ValueError(
            "the model is not causal, so it cannot continue a text: a looped model writes chains "
            "with relay_fast.decoding.chains.generate_looped_chains"
        )
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature = {temperature}: it must be 0 (greedy) or more, and finite")
    batch = None if batch is None else _count("batch", batch)
    sync_every, loops = _count("sync_every", sync_every), _count("loops", loops)
    seed, temperature = as_int("seed", seed), float(temperature)
    limits = np.asarray(max_new)
    if not np.issubdtype(limits.dtype, np.integer) and limits.size:
        raise ValueError(f"max_new = {max_new}: it must be a whole number, or one for each prompt")
    limits = limits.astype(np.int64)
    if limits.ndim and limits.shape != lengths.shape:
        raise ValueError(
            f"max_new has shape {limits.shape} but there are {len(lengths)} prompts: give an int "
            f"or one for each"
        )
    limits = np.broadcast_to(limits, lengths.shape)
    if np.any(limits < 0):
        raise ValueError(f"max_new = {limits.min()}: it must be 0 or more")
    # The last token is written but never read.
    limits = np.minimum(limits, model.config.max_tokens + 1 - lengths)
    texts = _DecodedTexts(prompts, offsets, limits, eos)
    options = {"loops": loops, "temperature": temperature, "seed": seed, "scored": scored}
    with inference(model), torch.autocast(model.device.type, enabled=False):
        totals = lengths + limits
        fit = lambda length: batch or _rows_that_fit(model, length + sync_every, loops)
        for waiting in _length_buckets(totals, limits > 0, fit):
            longest = int(totals[waiting[0]])
            rows = min(fit(longest), len(waiting))
            while len(waiting):
                try:
                    stepper = Stepper(model, rows, longest + sync_every, **options)
                    scheduler = _Scheduler(stepper, texts, waiting, sync_every)
                    while scheduler.advance():
                        if progress is not None:
                            progress(texts.done, len(lengths))
                    waiting = waiting[:0]
                except torch.OutOfMemoryError:
                    if rows == 1:
                        raise
                    waiting, rows = texts.forget_unfinished(waiting), rows // 2
                    stepper = scheduler = None
                    if model.device.type == "cuda":
                        torch.cuda.empty_cache()
    return texts.result(scored)


def _count(name: str, value: int) -> int:
    value = as_int(name, value)
    if value < 1:
        raise ValueError(f"{name} = {value}: it must be 1 or more")
    return value


def check_prompts(
    model: torch.nn.Module, prompts: np.ndarray, offsets: np.ndarray, extra: int | np.ndarray = 0
) -> None:
    """Raises ValueError, naming the prompt, where a model cannot take prompts; TypeError for tokens
    that are no integers.

    extra: tokens that the model puts into each of them.
    """
    if prompts.size and not np.issubdtype(prompts.dtype, np.integer):
        raise TypeError(f"prompts are {prompts.dtype}: give token ids, which are integers")
    if not len(offsets) or (offsets[0], offsets[-1]) != (0, len(prompts)):
        ends = offsets[[0, -1]].tolist() if len(offsets) else "nowhere"
        raise ValueError(
            f"offsets go from and to {ends}, there are {len(prompts)} tokens: give where each "
            f"prompt begins, and last their number"
        )
    lengths = np.diff(offsets)
    if np.any(lengths < 0):
        fall = int((lengths < 0).argmax())
        raise ValueError(
            f"offsets fall from {offsets[fall]} to {offsets[fall + 1]} in prompt {fall}: give "
            f"where each prompt begins, in order"
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
    """The wanted sequences, longest first; apart where a cache whose rows hold the longest would
    hold fewer of the shorter ones than their own."""
    order = np.argsort(-totals, kind="stable")
    order = order[wanted[order]]
    bands = []
    while len(order):
        longest, rows = totals[order[0]], fit(int(totals[order[0]]))
        short = np.flatnonzero(totals[order] * BAND <= longest)
        cut = short[0] if len(short) else len(order)
        if len(order) <= rows or cut == len(order) or fit(int(totals[order[cut]])) <= rows:
            cut = len(order)
        bands.append(order[:cut])
        order = order[cut:]
    return bands


def _rows_that_fit(model: AutoregressiveTransformer, length: int, loops: int) -> int:
    """Sequences of `length` tokens whose cache memory holds."""
    c, kind = model.config.block, model.device.type
    numbers = 2 * loops * c.n_layers * c.kv_heads * c.head_dim * length
    allowed = min(CACHE_BYTES[kind], free_bytes(model.device) // 2)
    fit = allowed // (numbers * model.chain_head.weight.element_size())
    return max(1, min(MAX_BATCH[kind], fit))


class _DecodedTexts:
    """Prompts and limits of S sequences, and what was written after each so far."""

    def __init__(self, prompts: np.ndarray, offsets: np.ndarray, limits: np.ndarray, eos: int):
        self.prompts, self.offsets, self.limits, self.eos = prompts, offsets, limits, eos
        self.ended = np.zeros(len(limits), bool)
        self.finished = limits == 0
        self._records: list[tuple[np.ndarray, ...]] = []

    @property
    def done(self) -> int:
        return int(self.finished.sum())

    def prompts_of(self, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Their tokens, flat, and lengths."""
        lengths = np.diff(self.offsets)[sequences]
        return self.prompts[concat_ranges(self.offsets[sequences], lengths)], lengths

    def add(
        self,
        sequence: np.ndarray,
        written: np.ndarray,
        tokens: np.ndarray,
        scores: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Takes in tokens and scores (steps, n) of n sequences that had `written` (n,) tokens.

        Returns how many of the steps count (n,), and which of the sequences go on (n,).
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
        """Those of the sequences that are not finished; what they wrote is forgotten."""
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
    """Neighbouring cache rows, first …, at similar positions.

    sequence (n,): which sequence each row holds; position (n,): where its next token goes; written
    (n,): tokens so far.
    """

    first: int
    sequence: np.ndarray
    position: np.ndarray
    written: np.ndarray

    def __len__(self) -> int:
        return len(self.sequence)

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + len(self))

    def group(self, steps: int) -> CacheSlice:
        """The rows during the next `steps` steps."""
        return CacheSlice(self.first, self.first + len(self), int(self.position.max()) + steps)


def _parts(
    first: int, sequence: np.ndarray, position: np.ndarray, written: np.ndarray
) -> list[_RowGroup]:
    """The cache rows first … in as few parts as PART_WASTE allows."""
    cuts, begin, longest = [], 0, 0
    total = np.concatenate([[0], np.cumsum(position)])
    for i, own in enumerate(position.tolist()):
        longest = max(longest, own)
        if longest * (i + 1 - begin) - (total[i + 1] - total[begin]) > PART_WASTE:
            cuts.append(i)
            begin, longest = i, own
    rows = np.split(np.arange(len(sequence)), cuts)
    return [_RowGroup(first + int(r[0]), sequence[r], position[r], written[r]) for r in rows]


class _Scheduler:
    """Which sequence has which cache row, and who is next."""

    def __init__(
        self, stepper: Stepper, texts: _DecodedTexts, waiting: np.ndarray, sync_every: int
    ):
        self._stepper, self._texts, self._waiting = stepper, texts, waiting
        self._sync_every = sync_every
        self._parts: list[_RowGroup] = []

    def advance(self) -> bool:
        """Refills if worth it, runs a few steps, compacts; False when nothing is left."""
        free = self._stepper.batch - sum(map(len, self._parts))
        if len(self._waiting) and free * REFILL_SHARE >= self._stepper.batch:
            self._close_gaps()
            self._refill(free)
        if not self._parts:
            return len(self._waiting) > 0
        remaining = max(
            int((self._texts.limits[part.sequence] - part.written).max()) for part in self._parts
        )
        number = min(self._sync_every, remaining)
        groups = [part.group(number) for part in self._parts]
        written = [self._written() for _ in self._stepper.steps(groups, number)]
        for part in self._parts:
            part.position = part.position + number
        self._settle(self._parts, written)
        return True

    def _written(self) -> list[torch.Tensor]:
        """What all cache rows wrote last: tokens, and scores if they are asked for."""
        last = (self._stepper.tokens, self._stepper.scores)
        return [state.clone() for state in last if state is not None]

    def _refill(self, free: int) -> None:
        new, self._waiting = self._waiting[:free], self._waiting[free:]
        _, lengths = self._texts.prompts_of(new)
        new = new[np.argsort(-lengths, kind="stable")]
        prompts, lengths = self._texts.prompts_of(new)
        first = sum(map(len, self._parts))
        self._stepper.prefill(prompts, lengths, first)
        added = _parts(first, new, lengths, np.zeros_like(new))
        self._parts += added
        self._settle(added, [self._written()])

    def _settle(self, parts: list[_RowGroup], written: list[list[torch.Tensor]]) -> None:
        """Takes in what all cache rows wrote in some steps, and compacts out what has ended."""
        columns = [torch.stack(steps).cpu().numpy() for steps in zip(*written, strict=True)]
        for part in parts:
            own = [column[:, part.rows] for column in columns]
            counts, goes_on = self._texts.add(part.sequence, part.written, *own)
            part.written = part.written + counts
            self._compact(part, goes_on)
        self._parts = [part for part in self._parts if len(part)]

    def _compact(self, part: _RowGroup, keep: np.ndarray) -> None:
        """Moves the part's last rows that go on into its holes."""
        left = int(keep.sum())
        if left == len(keep):
            return
        index = np.arange(left)
        holes = np.flatnonzero(~keep[:left])
        index[holes] = left + np.flatnonzero(keep[left:])
        if len(holes):
            length = int(part.position[index[holes]].max())
            self._stepper.move(part.first + index[holes], part.first + holes, length)
        part.sequence, part.position = part.sequence[index], part.position[index]
        part.written = part.written[index]

    def _close_gaps(self) -> None:
        """Moves the parts together, so that all free rows are the last ones, and cuts them anew."""
        end = 0
        for part in self._parts:
            gap = part.first - end
            length = int(part.position.max())
            for begin in range(0, len(part), max(1, gap)):
                rows = np.arange(begin, min(begin + gap, len(part)))  # none is source and target
                if len(rows):
                    self._stepper.move(part.first + rows, end + rows, length)
            end += len(part)
        if self._parts:
            columns = ((p.sequence, p.position, p.written) for p in self._parts)
            self._parts = _parts(0, *map(np.concatenate, zip(*columns, strict=True)))
