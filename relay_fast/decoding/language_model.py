"""Generation and scoring with a looped language model: key/value cache and early exit.

A model is a `relay_fast.models.classifier.LoopedClassifier`, or a module with the same parts and
no forward of its own: `embedding`, `prelude`, `block`, `coda` (LoopedBlocks; prelude and coda may
be None), `norm`, `head` and `loops`. Other models are refused. Each (iteration, layer) has its own
slot in the cache.

Early exit: a token leaves the loop after the first iteration, from `min_loops` on, that changes
its state by less than `exit_threshold` times the state's norm. Later iterations skip the token;
for later tokens that loop longer, the keys and values of its last iteration are repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from relay_fast.batch.plan import Plan, RowRange
from relay_fast.decoding._inference import inference
from relay_fast.decoding.kv_cache import CacheSlice, KVCache
from relay_fast.decoding.sampling import sample_tokens
from relay_fast.engine.block_iteration import BlockIteration
from relay_fast.engine.plain_modules import check_not_overridden, check_parts
from relay_fast.kernels.cross_entropy_ref import readout_ref
from relay_fast.kernels.norm_ref import upcast
from relay_fast.models.classifier import LoopedClassifier
from relay_fast.models.layer import Norm
from relay_fast.models.looped_block import LoopedBlock
from relay_fast.utils.deprecation import renamed_keywords
from relay_fast.utils.numbers import as_int


class Written(NamedTuple):
    """The continuations of B prompts, both (B, new) int64 on the host."""

    tokens: np.ndarray
    loops: np.ndarray  # iterations of the block before each token was chosen


class TokenLosses(NamedTuple):
    """Losses of tokens 1..n − 1 given the tokens before them, both (B, n − 1) on the host."""

    losses: np.ndarray  # negative log-probability in nats
    loops: np.ndarray


def sample_loops(rng: np.random.Generator, mean: float, most: int, sigma: float = 0.5) -> int:
    """Draws a loop count between 1 and `most` whose mean is about `mean`.

    The distribution is a log-normal Poisson plus one (Geiping et al. 2025, arXiv 2502.05171).

    Args:
        rng: the generator of the draw.
        mean: the mean before the limit is applied.
        most: the largest count.
        sigma: standard deviation of the log-rate.
    """
    rate = np.exp(rng.normal(np.log(max(mean - 1, 1e-9)) - sigma**2 / 2, sigma))
    return min(most, 1 + int(rng.poisson(rate)))


@renamed_keywords(exit_below="exit_threshold", least_loops="min_loops")
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    new: int,
    *,
    loops: int | None = None,
    exit_threshold: float = 0.0,
    min_loops: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
) -> Written:
    """Continues every prompt by `new` tokens.

    Args:
        model: as the module's docstring describes.
        prompts: token ids, at least one for each prompt.
        new: how many tokens to append.
        loops: iterations of the block, default the model's; prompts always take all of them.
        exit_threshold: relative change of the state below which a token leaves the loop; 0 for no
            early exit.
        min_loops: iterations before which no token leaves.
        temperature: 0 is greedy.
        seed: of the draws at a temperature above 0.

    Raises:
        ValueError: if a prompt is empty or a number is out of range.
        TypeError: if the model has a forward of its own.
        RuntimeError: if a part of the model has a forward of its own.
    """
    loops, min_loops = _check(model, loops, exit_threshold, min_loops)
    new, seed = as_int("new", new), as_int("seed", seed)
    if not prompts or min(map(len, prompts)) < 1:
        raise ValueError(
            "a prompt is empty: give at least one prompt, with at least one token each"
        )
    if new < 1 or temperature < 0:
        raise ValueError(f"new = {new}, temperature = {temperature}: give at least 1, and 0")
    lengths = np.array([len(prompt) for prompt in prompts])
    generator = torch.Generator(model.embedding.weight.device).manual_seed(seed)
    with inference(model):
        reader = _Reader(model, len(prompts), int(lengths.max()) + new, loops)
        state, used = reader.prefill(np.concatenate(prompts), lengths), reader.loops
        tokens, taken = [], [np.full(len(prompts), used)]
        for k in range(new):
            tokens.append(sample_tokens(reader.logits(state), temperature, generator))
            if k < new - 1:
                state, used = reader.step(tokens[-1], lengths + k, exit_threshold, min_loops)
                taken.append(used)
        return Written(torch.stack(tokens, 1).cpu().numpy(), np.stack(taken, 1))


@renamed_keywords(exit_below="exit_threshold", least_loops="min_loops")
def score(
    model: nn.Module,
    tokens: Tensor,
    *,
    loops: int | None = None,
    exit_threshold: float = 0.0,
    min_loops: int = 1,
) -> TokenLosses:
    """Computes the losses of given texts, token by token with early exit.

    Without early exit the losses equal those of one pass over the whole texts, which is faster.

    Args:
        model: as the module's docstring describes.
        tokens: (B, n) token ids.
        loops, exit_threshold, min_loops: as in `generate`, which raises the same errors.
    """
    loops, min_loops = _check(model, loops, exit_threshold, min_loops)
    batch, n = tokens.shape
    losses, taken = [], []
    with inference(model):
        reader = _Reader(model, batch, n, loops)
        for k in range(n - 1):
            places = np.full(batch, k)
            state, used = reader.step(tokens[:, k], places, exit_threshold, min_loops)
            logits = reader.logits(state)
            losses.append(nn.functional.cross_entropy(logits, tokens[:, k + 1], reduction="none"))
            taken.append(used)
        return TokenLosses(torch.stack(losses, 1).cpu().numpy(), np.stack(taken, 1))


def _check(
    model: nn.Module, loops: int | None, exit_threshold: float, min_loops: int
) -> tuple[int | None, int]:
    """Checks model and options; returns loops and min_loops as ints."""
    check_not_overridden(
        model, LoopedClassifier, "forward", "loss", "row_losses", "predict", "_states"
    )
    if model._forward_hooks or model._forward_pre_hooks:
        raise RuntimeError(
            f"{type(model).__name__} has a forward hook, which would be ignored here: remove it"
        )
    parts = {"prelude": LoopedBlock, "block": LoopedBlock, "coda": LoopedBlock, "head": nn.Linear}
    check_parts(model, norm=Norm, **parts)
    loops = None if loops is None else as_int("loops", loops)
    min_loops = as_int("min_loops", min_loops)
    if loops is not None and loops < 1:
        raise ValueError(f"loops = {loops}: give at least 1")
    if exit_threshold < 0 or min_loops < 1:
        raise ValueError(
            f"exit_threshold = {exit_threshold}, min_loops = {min_loops}: give at least 0, and 1"
        )
    for part in (model.prelude, model.block, model.coda):
        if part is not None and not part.config.causal:
            raise ValueError("a language model needs BlockConfig(causal=True)")
    return loops, min_loops


class _Reader:
    """Runs the model over key/value caches for `batch` texts of up to `length` tokens."""

    def __init__(self, model: nn.Module, batch: int, length: int, loops: int | None):
        self.model, self.loops = model, loops or model.loops
        self._ends = [
            None if part is None else _CachedBlock(part, 1, batch, length)
            for part in (model.prelude, model.coda)
        ]
        self._block = _CachedBlock(model.block, self.loops, batch, length)

    def prefill(self, tokens: np.ndarray, lengths: np.ndarray) -> Tensor:
        """Returns the last states (B, d) of packed prompts."""
        prelude, coda = self._ends
        h = self.model.embedding(self._tensor(tokens))
        for part in (prelude, self._block, coda):
            if part is not None:
                h = part.prefill(h, lengths)
        return h[self._tensor(np.cumsum(lengths) - 1)]

    def step(
        self, tokens: Tensor, positions: np.ndarray, exit_threshold: float, min_loops: int
    ) -> tuple[Tensor, np.ndarray]:
        """Feeds one token (B,) per text; returns the last states (B, d) and their loops (B,)."""
        prelude, coda = self._ends
        h = self.model.embedding(tokens)
        if prelude is not None:
            h, _ = prelude.step(h, positions)
        h, used = self._block.step(h, positions, exit_threshold, min_loops)
        if coda is not None:
            h, _ = coda.step(h, positions)
        return h, used

    def logits(self, state: Tensor) -> Tensor:
        """Returns logits (B, V) in fp32, or fp64 for a model in fp64."""
        c, norm = self.model.block.config, self.model.norm
        head = self.model.head.weight.to(state.dtype)
        return upcast(readout_ref(state, norm.weight, norm.bias, head, c.eps, c.norm))

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self.model.embedding.weight.device)


@dataclass(frozen=True)
class _TokenPlan:
    """The part of a plan that BlockIteration reads, for one token per text."""

    positions: Tensor  # (A,) int32
    fixed_capacity = False

    def layout_of(self, row_range: RowRange) -> None:
        return None


class _CachedBlock:
    """A block that is applied `loops` times over its own cache."""

    def __init__(self, block: LoopedBlock, loops: int, batch: int, length: int):
        c = self._config = block.config
        weights = block.weights().refuse_called("decoding with a cache")
        self._device, self._loops = weights.of_gemms.device, loops
        run = block.run(Plan([], [], self._device), weights)
        self._ops, self._dtype = run.ops, run.compute_dtype
        self._parameters = weights.named
        shape = (loops * c.n_layers, batch, c.kv_heads, length, c.head_dim)
        self._cache = KVCache(shape, self._dtype, self._device)

    def prefill(self, x: Tensor, lengths: np.ndarray) -> Tensor:
        """Returns the states (N, d) of packed texts that start at position 0."""
        plan = Plan(lengths, np.full(len(lengths), self._loops), self._device)
        rows = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(self._device)
        ops = self._cache.prefill(self._ops, rows, plan.positions.long())
        body = BlockIteration(self._config, self._parameters, plan, x, ops, self._dtype)
        h = x
        for t in range(1, self._loops + 1):
            h = self._iterate(body, h, t, len(lengths))
        return h

    def step(
        self, x: Tensor, positions: np.ndarray, exit_threshold: float = 0.0, min_loops: int = 1
    ) -> tuple[Tensor, np.ndarray]:
        """Feeds one token per text at `positions` (B,); returns states (B, d) and loops (B,)."""
        final, used = x.clone(), np.full(len(x), self._loops)
        active, h, layers = np.arange(len(x)), x, self._config.n_layers
        for t in range(1, self._loops + 1):
            index = torch.from_numpy(active).to(self._device)
            places = torch.from_numpy(positions[active]).to(self._device)
            slices = _slices(active, positions)
            ops = self._cache.step(self._ops, slices, places, (t - 1) * layers)
            plan = _TokenPlan(places.int())
            body = BlockIteration(self._config, self._parameters, plan, x[index], ops, self._dtype)
            new = self._iterate(body, h, t, len(active))
            if t == self._loops or not exit_threshold or t < min_loops:
                h = new
                continue
            change = torch.linalg.vector_norm(new - h, dim=1)
            done = (change < exit_threshold * torch.linalg.vector_norm(new, dim=1)).cpu().numpy()
            if done.any():
                left = torch.from_numpy(done).to(self._device)
                final[index[left]] = new[left]
                used[active[done]] = t
                self._cache.repeat(index[left], places[left], (t - 1) * layers, t * layers)
                active, new = active[~done], new[~left]
            h = new
            if not len(active):
                return final, used
        final[torch.from_numpy(active).to(self._device)] = h
        return final, used

    def _iterate(self, body: BlockIteration, h: Tensor, t: int, sequences: int) -> Tensor:
        out = torch.empty_like(h)
        body.forward(h, RowRange(t, 0, sequences, 0, len(h)), out, keep=False)
        return out


def _slices(active: np.ndarray, positions: np.ndarray) -> list[CacheSlice]:
    """Cuts the active rows (A,), ascending, into slices of adjacent rows."""
    return [
        CacheSlice(int(run[0]), int(run[-1]) + 1, int(positions[run].max()) + 1)
        for run in np.split(active, np.flatnonzero(np.diff(active) > 1) + 1)
    ]
