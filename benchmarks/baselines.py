"""The looped transformer as a careful user writes it in eager PyTorch: baseline and test truth.

State-dict keys are those of `relay_fast.models.transformers.LoopedTransformer`. Batches are padded
on the right; a sequence that has finished its loops is carried along unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from relay_fast.batch.packed import PackedBatch
from relay_fast.config import BlockConfig, ModelConfig

OVERHEAD = 16  # what another bucket costs in each iteration, in tokens


def make_norm(c: BlockConfig) -> nn.Module:
    if c.norm == "rms":
        return nn.RMSNorm(c.d_model, eps=c.eps)
    return nn.LayerNorm(c.d_model, eps=c.eps, bias=c.has_bias("norm"))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split RoPE: x (B, heads, n, head_dim), cos and sin (n, head_dim / 2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class EagerLayer(nn.Module):
    def __init__(self, c: BlockConfig):
        super().__init__()
        self.config = c
        self.norm1 = make_norm(c)
        columns = (c.n_heads + 2 * c.kv_heads) * c.head_dim
        self.qkv = nn.Linear(c.d_model, columns, bias=c.has_bias("qkv"))
        if c.qk_norm:
            self.q_norm = nn.RMSNorm(c.head_dim, eps=c.eps)
            self.k_norm = nn.RMSNorm(c.head_dim, eps=c.eps)
        self.out = nn.Linear(c.n_heads * c.head_dim, c.d_model, bias=c.has_bias("out"))
        self.norm2 = make_norm(c)
        self.up = nn.Linear(c.d_model, c.hidden, bias=c.has_bias("up"))
        if c.activation == "swiglu":
            self.gate = nn.Linear(c.d_model, c.hidden, bias=c.has_bias("gate"))
        self.down = nn.Linear(c.hidden, c.d_model, bias=c.has_bias("down"))
        if c.sandwich_norm:
            self.post_norm1, self.post_norm2 = make_norm(c), make_norm(c)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, mask: Tensor | None) -> Tensor:
        c = self.config
        heads = self.qkv(self.norm1(x)).unflatten(-1, (-1, c.head_dim)).transpose(1, 2)
        q, k, v = heads.split((c.n_heads, c.kv_heads, c.kv_heads), dim=1)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        # Behind a causal mask no token sees the padding, which lies on the right.
        o = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if c.causal else mask,
            is_causal=c.causal,
            enable_gqa=c.kv_heads != c.n_heads,
        )
        o = self.out(o.transpose(1, 2).flatten(2))
        o = self.post_norm1(o) if c.sandwich_norm else o
        x = x + F.dropout(o, c.dropout, self.training)
        y = self.norm2(x)
        if c.activation == "swiglu":
            hidden = F.silu(self.gate(y)) * self.up(y)
        elif c.activation == "relu2":
            hidden = F.relu(self.up(y)).square()
        else:
            hidden = F.gelu(
                self.up(y), approximate="tanh" if c.activation == "gelu_tanh" else "none"
            )
        o = self.down(hidden)
        o = self.post_norm2(o) if c.sandwich_norm else o
        return x + F.dropout(o, c.dropout, self.training)


class EagerBlock(nn.Module):
    """The looped block on padded batches."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        c = self.config = config
        self.layers = nn.ModuleList(EagerLayer(c) for _ in range(c.n_layers))
        if c.loop_norm != "none":
            self.loop_norm = make_norm(c)
        if c.injection == "concat":
            self.injection = nn.Linear(2 * c.d_model, c.d_model, bias=False)
        if c.max_loops:
            self.loop_embedding = nn.Embedding(c.max_loops, c.d_model)

    def rope(self, n: int, device: torch.device, dtype: torch.dtype):
        """cos and sin (n, head_dim / 2), fp64 angles; None without RoPE."""
        c = self.config
        if c.rope_base is None:
            return None
        pairs = c.rotary_dim // 2
        half = torch.arange(pairs, device=device, dtype=torch.float64)
        frequency = c.rope_base ** (-half / pairs)
        if c.rope_frequencies is not None:
            frequency = torch.tensor(c.rope_frequencies, device=device, dtype=torch.float64)
        positions = torch.arange(n, device=device, dtype=torch.float64)
        cos = torch.ones(n, c.head_dim // 2, device=device, dtype=torch.float64)
        sin = torch.zeros_like(cos)  # of the pairs that are not rotated
        cos[:, :pairs] = (positions[:, None] * frequency).cos() * c.rope_scale
        sin[:, :pairs] = (positions[:, None] * frequency).sin() * c.rope_scale
        return cos.to(dtype), sin.to(dtype)

    def iteration(self, h: Tensor, x: Tensor, t: int, rope, mask: Tensor | None) -> Tensor:
        c = self.config
        if c.loop_norm == "pre":
            h = self.loop_norm(h)
        if c.injection == "add":
            h = h + x
        elif c.injection == "concat":
            h = self.injection(torch.cat((h, x), dim=-1))
        if c.max_loops:
            h = h + self.loop_embedding.weight[t - 1]
        for layer in self.layers:
            h = layer(h, rope, mask)
        return self.loop_norm(h) if c.loop_norm == "post" else h

    def states(
        self,
        x: Tensor,  # (B, n, d)
        max_loops: int,
        loops: Tensor | None = None,  # (B,), None: all alike
        mask: Tensor | None = None,  # (B, n) True where a token is, None: no padding
        truncate: int | None = None,
        per_iteration_checkpoint: bool = False,
    ) -> Iterable[Tensor]:
        """Yields the state (B, n, d) after each iteration."""
        rope = self.rope(x.shape[1], x.device, x.dtype)
        keys = None if mask is None else mask[:, None, None, :]
        h = x
        for t in range(1, max_loops + 1):
            if per_iteration_checkpoint:
                new = checkpoint(self.iteration, h, x, t, rope, keys, use_reentrant=False)
            else:
                new = self.iteration(h, x, t, rope, keys)
            if truncate is not None:
                own = max_loops if loops is None else loops[:, None, None]
                free = torch.as_tensor(t <= own - truncate, device=x.device)
                new = torch.where(free, new.detach(), new)
            h = new if loops is None else torch.where((t <= loops)[:, None, None], new, h)
            yield h

    def forward(self, x: Tensor, max_loops: int, *args, **options) -> Tensor:
        for x in self.states(x, max_loops, *args, **options):  # noqa: B007, B020
            pass
        return x


@dataclass
class PaddedBatch:
    """Some sequences of a `PackedBatch`, padded to the longest of them.

    Supervised rows are given twice: dense (T, B, n), and as flat indices per iteration.
    """

    tokens: Tensor  # (B, n)
    mask: Tensor | None  # (B, n) bool, None: no padding
    loops: Tensor | None  # (B,), None: all alike
    max_loops: int
    targets: Tensor  # (T, B, n), −100 where unsupervised
    weights: Tensor  # (T, B, n), 0 where unsupervised
    chosen: list[Tensor]  # per iteration, flat indices into (B, n)
    last: Tensor  # (B,) flat index of the last token
    answers: Tensor
    answer_weights: Tensor

    @staticmethod
    def of(batch: PackedBatch, sequences: np.ndarray) -> PaddedBatch:
        plan, device = batch.plan, batch.tokens.device
        lengths, loops = plan.lengths[sequences], plan.loops[sequences]
        size, n, top = len(sequences), int(lengths.max()), int(loops.max())
        slot = np.full(plan.rows, -1)
        for b, s in enumerate(sequences):
            slot[plan.offsets[s] : plan.offsets[s + 1]] = b * n + np.arange(plan.lengths[s])
        flat = torch.zeros(size * n, dtype=torch.int64)
        flat[slot[slot >= 0]] = batch.tokens.cpu()[slot >= 0]
        targets = torch.full((top, size * n), -100)
        weights = torch.zeros(top, size * n)
        chosen = []
        all_rows, all_targets, all_weights = (
            t.cpu() for t in (batch.rows, batch.targets, batch.weights)
        )
        for t in range(top):
            part = slice(batch.row_offsets[t], batch.row_offsets[t + 1])
            where = torch.from_numpy(slot[all_rows[part].numpy()])
            inside = where >= 0
            where = where[inside]
            targets[t, where] = all_targets[part][inside]
            weights[t, where] = all_weights[part][inside]
            chosen.append(where.sort().values.to(device))
        index = torch.from_numpy(np.asarray(sequences)).to(device)
        return PaddedBatch(
            flat.view(size, n).to(device),
            (torch.arange(n) < torch.from_numpy(lengths)[:, None]).to(device)
            if lengths.min() < n
            else None,
            torch.from_numpy(loops).to(device) if loops.min() < top else None,
            top,
            targets.view(top, size, n).to(device),
            weights.view(top, size, n).to(device),
            chosen,
            torch.from_numpy(np.arange(size) * n + lengths - 1).to(device),
            batch.answers[index],
            batch.answer_weights[index],
        )


class EagerTransformer(nn.Module):
    """The looped model: embedding, block, chain head on every state, answer head on the last."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = config.block
        self.embedding = nn.Embedding(config.vocabulary_size, c.d_model)
        self.block = EagerBlock(c)
        self.norm = make_norm(c)
        self.chain_head = nn.Linear(c.d_model, config.vocabulary_size, bias=False)
        self.answer_head = nn.Linear(c.d_model, config.vocabulary_size, bias=False)

    def loss(
        self, batch: PaddedBatch, dense: bool = False, per_iteration_checkpoint: bool = False
    ) -> Tensor:
        """The weighted sum of all rounds' and answers' cross-entropies.

        dense: read every row out and weigh by the mask; else only the supervised rows.
        """
        x = self.embedding(batch.tokens)
        total, state = x.new_zeros(()), x
        states = self.block.states(
            x,
            batch.max_loops,
            batch.loops,
            batch.mask,
            per_iteration_checkpoint=per_iteration_checkpoint,
        )
        for t, state in enumerate(states):
            rows, targets = state.flatten(0, 1), batch.targets[t].view(-1)
            weights = batch.weights[t].view(-1)
            if not dense:
                index = batch.chosen[t]
                rows, targets, weights = rows[index], targets[index], weights[index]
            logits = self.chain_head(self.norm(rows))
            total = total + (weights * F.cross_entropy(logits, targets, reduction="none")).sum()
        logits = self.answer_head(self.norm(state.flatten(0, 1)[batch.last]))
        answers = F.cross_entropy(logits, batch.answers, reduction="none")
        return total + (batch.answer_weights * answers).sum()


def buckets(batch: PackedBatch, group: np.ndarray, at_most: int) -> list[np.ndarray]:
    """Sequences by group (task) and length, at most `at_most` length buckets a group.

    The cuts waste least: they minimise the sum of (sequences · longest + OVERHEAD) · most loops.
    """
    plan, result = batch.plan, []
    for g in np.unique(group):
        member = np.flatnonzero(group == g)
        member = member[np.lexsort((plan.loops[member], plan.lengths[member]))]
        lengths, loops = plan.lengths[member], plan.loops[member]
        size = len(member)
        cost = np.full((size + 1, size + 1), np.inf)
        for start in range(size):
            top = np.maximum.accumulate(loops[start:])
            rows = np.arange(1, size - start + 1) * lengths[start:]
            cost[start, start + 1 :] = (rows + OVERHEAD) * top
        best, cuts, finals = np.where(np.arange(size + 1) == 0, 0.0, np.inf), [], []
        for _ in range(min(at_most, size)):
            table = best[:, None] + cost
            cuts.append(table.argmin(0))
            best = table.min(0)
            finals.append(best[size])
        end, bounds = size, []
        for cut in reversed(cuts[: int(np.argmin(finals)) + 1]):
            bounds.append((int(cut[end]), end))
            end = int(cut[end])
        result += [member[a:b] for a, b in reversed(bounds) if b > a]
    return result
