"""The whole loop for inference, plain torch: iterations of the block, each followed by an argmax.

    for t = 1..T: for each layer: u = u + attention(norm1(u)); u = u + mlp(norm2(u));
    ids_t = argmax(norm(u) · headᵀ)

Rows are sorted by loops, largest first, so the rows that still loop are a prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .attention_ref import Group, PaddedLayout, attention_fwd_ref
from .cross_entropy_ref import argmax_ref
from .linear_residual_ref import linear_residual_fwd_ref
from .mlp_ref import mlp_fwd_ref
from .norm_linear_ref import norm_linear_fwd_ref
from .norm_ref import norm_fwd_ref


class LoopWeights(NamedTuple):
    """The weights of the block, stacked over layers, and of the readout; no biases."""

    norm1: Tensor  # (layers, d)
    qkv: Tensor  # (layers, (heads + 2 kv_heads) · head_dim, d), in the compute dtype
    out: Tensor  # (layers, d, heads · head_dim)
    norm2: Tensor  # (layers, d)
    up: Tensor  # (layers, hidden, d)
    gate: Tensor | None  # (layers, hidden, d), SwiGLU only
    down: Tensor  # (layers, d, hidden)
    loop_norm: Tensor | None  # (d,), applied to the state after each iteration
    norm: Tensor  # (d,)
    head: Tensor  # (V, d)


@dataclass(frozen=True)
class LoopLayout:
    """Sequences sorted by loops, largest first.

    Args:
        lengths: rows of each sequence.
        loops: iterations of each sequence.
        device: where the index tensors are.
    """

    lengths: np.ndarray
    loops: np.ndarray
    device: torch.device | str = "cpu"

    @cached_property
    def offsets(self) -> np.ndarray:
        """(sequences + 1,) first row of each sequence."""
        return np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])

    @cached_property
    def active(self) -> np.ndarray:
        """(T,) number of sequences that still loop at each iteration."""
        steps = np.arange(1, int(self.loops.max(initial=0)) + 1)
        return np.searchsorted(-self.loops, -steps, side="right")

    @cached_property
    def state_offsets(self) -> np.ndarray:
        """(T + 1,) where the token ids of each iteration start."""
        return np.concatenate([[0], np.cumsum(self.offsets[self.active], dtype=np.int64)])

    def bins(self, size: int) -> Tensor:
        """Returns (bins + 1,) int32 row offsets of bins of consecutive whole sequences, at most
        `size` rows each."""
        bounds, start = [0], 0
        while start < len(self.lengths):
            end = int(np.searchsorted(self.offsets, self.offsets[start] + size, "right")) - 1
            if end <= start:
                raise ValueError(f"sequence {start} has more than {size} rows: use larger bins")
            start = end
            bounds.append(int(self.offsets[end]))
        return self.tensor(np.array(bounds), torch.int32)

    def per_row(self, values: np.ndarray) -> Tensor:
        """Returns (rows,) int32, given one value per sequence."""
        return self.tensor(np.repeat(values, self.lengths), torch.int32)

    def tensor(self, values: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device, dtype)


def loop_fwd_ref(
    x: Tensor,
    layout: LoopLayout,
    weights: LoopWeights,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    kv_heads: int,
    causal: bool = False,
    activation: str = "gelu_tanh",
    eps: float = 1e-6,
    kind: str = "rms",
) -> tuple[Tensor, Tensor]:
    """Runs the loop and its argmax readout.

    Args:
        x: (rows, d), the initial state.
        layout: the sequences and their loops.
        weights: the weights.
        cos: (rows, head_dim / 2), or None.
        sin: like cos.
        heads: number of query heads.
        kv_heads: number of key/value heads.
        causal: whether a token attends to itself and earlier tokens only.
        activation: activation of the MLP.
        eps: epsilon of the norm.
        kind: "rms" or "layer".

    Returns:
        final (rows, d), each sequence's state after its last iteration; and the token ids int64 of
        all iterations end to end, for the rows that loop in each.
    """
    w, final, ids = weights, x.clone(), []
    head_dim = w.qkv.shape[1] // (heads + 2 * kv_heads)
    rotary = 0 if cos is None else (heads + kv_heads) * head_dim
    for sequences in layout.active.tolist():
        rows = int(layout.offsets[sequences])
        lengths = layout.lengths[:sequences]
        padded = PaddedLayout(
            layout.tensor(layout.offsets[: sequences + 1], torch.int32),
            int(lengths.max(initial=0)),
            lambda lengths=lengths: _padding(layout, lengths),
            rows,
        )
        u = final[:rows]
        rope = (None, None, 0) if cos is None else (cos[:rows], sin[:rows], rotary)
        for i in range(w.qkv.shape[0]):
            qkv = norm_linear_fwd_ref(u, w.norm1[i], None, w.qkv[i], None, *rope, eps, kind)
            o, _ = attention_fwd_ref(qkv, padded, heads, kv_heads, causal)
            u = linear_residual_fwd_ref(o, w.out[i], None, u)
            gate = None if w.gate is None else w.gate[i]
            u = mlp_fwd_ref(
                u, w.norm2[i], None, w.up[i], None, gate, None, w.down[i], None,
                activation, eps, kind,
            )[0]  # fmt: skip
        if w.loop_norm is not None:
            u = norm_fwd_ref(u, w.loop_norm, None, eps, kind)
        final[:rows] = u
        ids.append(argmax_ref(u, w.norm, None, w.head, eps, kind))
    return final, torch.cat(ids) if ids else torch.empty(0, dtype=torch.int64, device=x.device)


def _padding(layout: LoopLayout, lengths: np.ndarray) -> tuple[int, Tensor, tuple[Group, ...]]:
    """Returns the padding of one group: every sequence is padded to the longest."""
    width = int(lengths.max(initial=0))
    at = np.arange(width)[None, :]
    mask = layout.tensor(at >= lengths[:, None], torch.bool).unsqueeze(1)
    slots = (np.arange(len(lengths))[:, None] * width + at)[at < lengths[:, None]]
    group = Group(0, len(lengths), width, mask)
    return len(lengths) * width, layout.tensor(slots, torch.int64), (group,)
