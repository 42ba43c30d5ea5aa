"""The block applied to one new token per sequence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from relay_fast.batch.plan import RowRange
from relay_fast.config import BlockConfig
from relay_fast.engine.block_iteration import BlockIteration
from relay_fast.kernels.cross_entropy_ref import CHUNK_LOGITS, argmax_ref
from relay_fast.kernels.linear_residual_ref import linear_residual_fwd_ref
from relay_fast.kernels.mlp_ref import activation_fwd_ref
from relay_fast.kernels.norm_ref import norm_fwd_ref, upcast
from relay_fast.ops.dispatch import Ops

COLUMNS_AFTER = 8  # steps


@dataclass(frozen=True)
class _StepPlan:
    """The part of a plan that BlockIteration reads, for one token per sequence."""

    positions: Tensor  # (length,) int32: all positions of the cache
    fixed_capacity = False

    def layout_of(self, row_range: RowRange) -> None:
        return None


class CachedBlock(BlockIteration):
    """A BlockIteration whose tokens, positions and ops are set for each decoding step.

    RoPE's tables of positions 0..length − 1 are computed once. The layout of its row ranges is
    None: the attention in its ops gets the layout from the cache.

    Args:
        config: of the block.
        parameters: the block's parameters by name.
        length: positions of the cache.
        ops: the ops of the block.
        dtype: in which the block computes.
        device: where the parameters are.
    """

    def __init__(
        self,
        config: BlockConfig,
        parameters: Mapping[str, Tensor],
        length: int,
        ops: Ops,
        dtype: torch.dtype,
        device: torch.device,
    ):
        plan = _StepPlan(torch.arange(length, dtype=torch.int32, device=device))
        super().__init__(config, parameters, plan, torch.empty(0, device=device), ops, dtype)

    def set_step(self, x: Tensor, positions: Tensor, ops: Ops) -> None:
        """Sets what the next step computes.

        Args:
            x: (A, d) the embeddings of the new tokens.
            positions: (A,) where they go.
            ops: with the step's attention over the cache.
        """
        self.x, self.ops = x, ops
        if self.cos is not None:
            self._tables = [t.index_select(0, positions) for t in (self.cos, self.sin)]

    def _rope(self, row_range: RowRange) -> tuple[Tensor | None, Tensor | None, int]:
        return (None, None, 0) if self.cos is None else (*self._tables, self.rotary)


class TorchCachedBlock(CachedBlock):
    """CachedBlock in plain torch, with half the kernel launches per layer of the reference ops.

    With few rows the time is the number of launches; the reference ops make more of them to save
    tensors for a backward pass. On a CPU, the weights become column-major at the COLUMNS_AFTER-th
    step: with few rows that is up to twice as fast, and costs about two steps.
    """

    def __init__(self, config: BlockConfig, *args):
        super().__init__(config, *args)
        self._layers: list[dict[str, Tensor]] = [{} for _ in range(config.n_layers)]
        for name, value in self.cast.items():
            if name.startswith("layers."):
                _, i, own = name.split(".", 2)
                self._layers[int(i)][own] = value
        self._steps = 0
        if self.cos is not None:  # rotated head = head · cos + (halves swapped) · sin
            tables = torch.cat((self.cos, self.cos), -1), torch.cat((-self.sin, self.sin), -1)
            self.cos, self.sin = (t.unsqueeze(1).to(self._layers[0]["qkv.weight"]) for t in tables)

    def set_step(self, x: Tensor, positions: Tensor, ops: Ops) -> None:
        super().set_step(x, positions, ops)
        self._steps += 1
        if self._steps == COLUMNS_AFTER and x.is_cpu:
            for w in self._layers:
                w |= {name: column_major(value) for name, value in w.items() if value.ndim == 2}

    def _layer(
        self, u: Tensor, i: int, row_range: RowRange, out: Tensor | None, keep: bool
    ) -> tuple[Tensor, tuple]:
        c, w = self.config, self._layers[i]
        qkv = self._linear("qkv", self._normed("norm1", u, w), w)
        if c.qk_norm:
            self._norm_heads(qkv, w)
        if self.cos is not None:
            self._apply_rope(qkv)
        o, _ = self.ops.attention_fwd(qkv, None, c.n_heads, c.kv_heads, c.causal)
        if c.sandwich_norm:
            mid = u + self._normed("post_norm1", self._linear("out", o, w), w, u.dtype)
        else:
            mid = linear_residual_fwd_ref(o, w["out.weight"], w.get("out.bias"), u)
        y = self._normed("norm2", mid, w)
        up = self._linear("up", y, w)
        gate = self._linear("gate", y, w) if c.activation == "swiglu" else None
        hidden = activation_fwd_ref(c.activation, up, gate)
        if c.sandwich_norm:
            branch = self._normed("post_norm2", self._linear("down", hidden, w), w, mid.dtype)
            return torch.add(mid, branch, out=out), ()
        down = w["down.weight"], w.get("down.bias")
        return linear_residual_fwd_ref(hidden, *down, mid, None, out), ()

    def _linear(self, name: str, y: Tensor, w: Mapping[str, Tensor]) -> Tensor:
        return F.linear(y, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def _normed(
        self, name: str, x: Tensor, w: Mapping[str, Tensor], dtype: torch.dtype | None = None
    ) -> Tensor:
        """Returns the norm `name` of x, in `dtype`, by default that of the GEMMs."""
        c, weight, bias = self.config, w[f"{name}.weight"], w.get(f"{name}.bias")
        return lean_norm(x, weight, bias, c.eps, c.norm, dtype or w["qkv.weight"].dtype)

    def _norm_heads(self, qkv: Tensor, w: Mapping[str, Tensor]) -> None:
        """Normalises the query and key heads, in place."""
        c = self.config
        parts = qkv.unflatten(1, (-1, c.head_dim)).split((c.n_heads, c.kv_heads, c.kv_heads), 1)
        for part, name in zip(parts, ("q_norm", "k_norm"), strict=False):
            part.copy_(lean_norm(part, w[f"{name}.weight"], None, c.eps, "rms", qkv.dtype))

    def _apply_rope(self, qkv: Tensor) -> None:
        """Applies RoPE to the queries and keys, in place."""
        cos, sin = self._tables
        heads = qkv[:, : self.rotary].unflatten(1, (-1, cos.shape[-1]))
        swapped = torch.roll(heads, cos.shape[-1] // 2, -1)
        heads.mul_(cos).addcmul_(swapped, sin)


def column_major(weight: Tensor) -> Tensor:
    """Returns the matrix with column-major strides."""
    return weight.t().contiguous().t()


@cache
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=device)


def lean_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str, dtype: torch.dtype
) -> Tensor:
    """Computes `norm_fwd_ref` with fewer kernel launches.

    Args:
        x: (rows, d).
        weight: (d,).
        bias: (d,) or None.
        eps: Added to the mean square.
        kind: "rms" or "layer".
        dtype: The dtype of the result.
    """
    if kind != "rms":
        return norm_fwd_ref(x, weight, bias, eps, kind, dtype)
    x = upcast(x)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    eps = _constant(eps, x.dtype, x.device)
    rstd = torch.addcmul(eps, length, length, value=1 / x.shape[-1]).rsqrt_()
    return (x * rstd).mul_(upcast(weight)).to(dtype)


def lean_argmax(
    h: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, head: Tensor, eps: float, kind: str
) -> Tensor:
    """Computes `argmax_ref` with fewer kernel launches; of equal logits the first counts.

    Args:
        h: States (rows, d).
        norm_weight: (d,).
        norm_bias: (d,) or None.
        head: (V, d).
        eps: Added to the mean square in the norm.
        kind: "rms" or "layer".

    Returns:
        Token ids (rows,).
    """
    if len(h) * len(head) > CHUNK_LOGITS:
        return argmax_ref(h, norm_weight, norm_bias, head, eps, kind)
    y = lean_norm(h, norm_weight, norm_bias, eps, kind, head.dtype)
    return (y @ head.t()).max(-1).indices
