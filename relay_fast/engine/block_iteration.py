"""One iteration of the block as explicit ops, forward and backward, as the engine runs it.

A layer: qkv = norm_linear(u) → o = attention(qkv) → mid = linear_residual(o, u) → u' = mlp(mid).
With `qk_norm`, RoPE moves from norm_linear into an op of its own, behind the norms of the heads.
With `sandwich_norm`, the outputs of attention and MLP are not added to u at once, but by a
norm_residual op each.
Before the first layer the state may be normalised (`loop_norm="pre"`), combined with the input
(injection) and added to the iteration's embedding; after the last layer it may be normalised
(`loop_norm="post"`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from relay_fast.batch.plan import Plan, RowRange
from relay_fast.config import BlockConfig
from relay_fast.engine.parameter_names import is_linear
from relay_fast.engine.rope import block_rope_table
from relay_fast.kernels.dropout_ref import Dropout, noise_table, state_noise_ref
from relay_fast.kernels.norm_ref import upcast_dtype
from relay_fast.ops.dispatch import TORCH, Ops
from relay_fast.ops.gradients import GradientBuffers

NOISE_SITE = 0xFFFF
NO_ROPE = None, None, 0
_noise_table = functools.cache(torch.inference_mode(False)(noise_table))


class LayerSaved(NamedTuple):
    """The tensors that the backward of one layer needs."""

    u: Tensor  # (rows, d) the layer's input
    qkv: Tensor  # (rows, (heads + 2 kv_heads) · head_dim), after RoPE
    o: Tensor  # (rows, heads · head_dim)
    lse: Tensor  # (rows, heads)
    mid: Tensor  # (rows, d) the residual stream between attention and MLP
    up: Tensor  # (rows, hidden)
    gate: Tensor | None
    hidden: Tensor  # (rows, hidden)
    z: Tensor | None  # like qkv, before qk_norm and RoPE
    attended: Tensor | None  # (rows, d) the output of attention, before its sandwich norm
    expanded: Tensor | None  # (rows, d) the output of the MLP, before its sandwich norm


class BlockIteration:
    """The loop body of a block, bound to its parameters, a plan and a batch's input.

    The modules that own the weights are not called (`relay_fast.engine.called_parts` calls those
    that are more than their weights). Nothing here depends on the recompute policy.

    Args:
        config: the block.
        parameters: tensors by state-dict key (`parameter_names`).
        plan: order and active prefix of the batch.
        x: (rows, d), the input that injection adds in each iteration.
        ops: the implementation of the ops.
        compute_dtype: dtype of the GEMMs.
        dropout_seed: () int64 seed of the dropout masks and the state noise; None: neither.
    """

    aux: Tensor | None = None
    may_leave_unused = False
    start = 0  # iterations before this pass
    inject_index: int | None = None  # of the parameter that injection adds, if it is not the input

    def __init__(
        self,
        config: BlockConfig,
        parameters: Mapping[str, Tensor],
        plan: Plan,
        x: Tensor,
        ops: Ops,
        compute_dtype: torch.dtype,
        dropout_seed: Tensor | None = None,
    ):
        self.config, self.plan, self.x, self.ops = config, plan, x, ops
        self.index = {name: i for i, name in enumerate(parameters)}
        self.cast = {
            name: p.to(compute_dtype) if is_linear(name) else p for name, p in parameters.items()
        }
        self.seed = dropout_seed
        self.kernels = ops.loop_fwd is not None
        self.skips_dead_rows = plan.fixed_capacity and ops is not TORCH
        # In fp32 an operand may be the gradient of the state, which is written over.
        self.keeps_operands = self.kernels and compute_dtype in (torch.bfloat16, torch.float16)
        self.saved_width = config.n_layers * len(LayerSaved._fields) + (config.loop_norm == "post")
        self.dx: Tensor | None = None
        self.rotary = 0
        self.cos = self.sin = None
        if config.rope_base is not None:
            self.rotary = (config.n_heads + config.kv_heads) * config.head_dim
            dtype = upcast_dtype(*parameters.values())
            self.cos, self.sin = block_rope_table(config, plan.positions, dtype)

    def _weight(self, name: str) -> Tensor | None:
        return self.cast.get(name)

    def _dropout(self, site: int, row_range: RowRange) -> Dropout | None:
        if self.seed is None or not self.config.dropout:
            return None
        return self._dropout_key(self.config.dropout, site, row_range)

    def _dropout_key(self, p: float, site: int, row_range: RowRange) -> Dropout:
        tokens = self.plan.tokens[row_range.rows]
        return Dropout(p, self.seed, site, self.start + row_range.iteration, tokens)

    def _row_count_kwargs(self, row_range: RowRange) -> dict[str, Tensor]:
        """Passes the number of live rows to the kernels under a fixed-capacity plan; the reference
        computes all rows."""
        return (
            {"row_count": self.plan.row_count(row_range.iteration)} if self.skips_dead_rows else {}
        )

    def _rope(self, row_range: RowRange) -> tuple[Tensor | None, Tensor | None, int]:
        if self.cos is None:
            return NO_ROPE
        return self.cos[row_range.rows], self.sin[row_range.rows], self.rotary

    # Forward

    def forward(
        self, h: Tensor, row_range: RowRange, out: Tensor, keep: bool = True
    ) -> list[Tensor | None]:
        """Writes state t of the row range's rows into `out`.

        Args:
            h: (rows, d), state t − 1.
            row_range: the rows, and the iteration.
            out: (rows, d), the buffer of state t.
            keep: whether a backward follows.

        Returns:
            The tensors that the backward needs, flat; some may be missing unless `keep`.
        """
        c = self.config
        u = self._prepare_state(h, row_range)
        saved: list[Tensor | None] = []
        for i in range(c.n_layers):
            last = i == c.n_layers - 1 and c.loop_norm != "post"
            u, layer = self._layer(u, i, row_range, out if last else None, keep)
            saved.extend(layer)
        if c.loop_norm == "post":
            saved.append(u)
            self._norm(u, "loop_norm", row_range, out)
        return saved

    def _norm(self, x: Tensor, name: str, row_range: RowRange, out: Tensor | None = None) -> Tensor:
        c, count = self.config, self._row_count_kwargs(row_range)
        weight, bias = self._weight(f"{name}.weight"), self._weight(f"{name}.bias")
        return self.ops.norm_fwd(x, weight, bias, c.eps, c.norm, out=out, **count)

    def _prepare_state(self, h: Tensor, row_range: RowRange) -> Tensor:
        c = self.config
        h = self._add_state_noise(h, row_range)
        if c.loop_norm == "pre":
            h = self._norm(h, "loop_norm", row_range)
        added = self.x[row_range.rows] if c.injection == "add" else None
        if c.injection == "concat":
            joined = torch.cat((h, self.x[row_range.rows].to(h.dtype)), dim=-1)
            h = self._inject(joined).to(h.dtype)
        line = self._loop_embedding(self.start + row_range.iteration) if c.max_loops else None
        return self.ops.state_input_fwd(h, added, line, **self._row_count_kwargs(row_range))

    def _inject(self, joined: Tensor) -> Tensor:
        weight = self._weight("injection.weight")
        return torch.nn.functional.linear(joined.to(weight.dtype), weight)

    def _loop_embedding(self, iteration: int) -> Tensor:
        return self._weight("loop_embedding.weight")[iteration - 1]

    def _layer(
        self, u: Tensor, i: int, row_range: RowRange, out: Tensor | None, keep: bool
    ) -> tuple[Tensor, LayerSaved]:
        c, ops, w = self.config, self.ops, self._weight
        p, count = f"layers.{i}.", self._row_count_kwargs(row_range)
        rope = self._rope(row_range)
        qkv = ops.norm_linear_fwd(
            u, w(p + "norm1.weight"), w(p + "norm1.bias"), w(p + "qkv.weight"), w(p + "qkv.bias"),
            *(NO_ROPE if c.qk_norm else rope), c.eps, c.norm, **count,
        )  # fmt: skip
        z = attended = expanded = None
        if c.qk_norm:
            z = qkv
            qkv = ops.qk_norm_fwd(
                z, w(p + "q_norm.weight"), w(p + "k_norm.weight"), c.n_heads, c.kv_heads,
                *rope[:2], c.eps, **count,
            )  # fmt: skip
        layout = self.plan.layout_of(row_range)
        o, lse = ops.attention_fwd(qkv, layout, c.n_heads, c.kv_heads, c.causal, **count)
        drops = [self._dropout(1 + 2 * i, row_range), self._dropout(2 + 2 * i, row_range)]
        projection = o, w(p + "out.weight"), w(p + "out.bias")
        if c.sandwich_norm:
            attended = ops.linear_residual_fwd(*projection, None, **count)
            mid = self._add_normed(attended, p + "post_norm1", u, drops[0], None, count)
            ending, alone = (None, None), {"residual": False}
        else:
            mid = ops.linear_residual_fwd(*projection, u, drops[0], **count)
            ending, alone = (drops[1], out), {}
        new, up, gate, hidden = ops.mlp_fwd(
            mid, w(p + "norm2.weight"), w(p + "norm2.bias"),
            w(p + "up.weight"), w(p + "up.bias"), w(p + "gate.weight"), w(p + "gate.bias"),
            w(p + "down.weight"), w(p + "down.bias"),
            c.activation, c.eps, c.norm, *ending, keep, **alone, **count,
        )  # fmt: skip
        if c.sandwich_norm:
            expanded = new
            new = self._add_normed(expanded, p + "post_norm2", mid, drops[1], out, count)
        return new, LayerSaved(u, qkv, o, lse, mid, up, gate, hidden, z, attended, expanded)

    def _add_normed(
        self,
        branch: Tensor,
        name: str,
        residual: Tensor,
        dropout: Dropout | None,
        out: Tensor | None,
        count: Mapping[str, Tensor],
    ) -> Tensor:
        """Returns residual + drop(norm(branch)), in `out` if given; `name`: the norm."""
        weight, bias = self._weight(f"{name}.weight"), self._weight(f"{name}.bias")
        c = self.config
        return self.ops.norm_residual_fwd(
            branch, weight, bias, residual, c.eps, c.norm, dropout, out, **count
        )

    # Backward

    def backward(
        self,
        g: Tensor,
        h: Tensor,
        saved: Sequence[Tensor | None],
        row_range: RowRange,
        grads: GradientBuffers,
    ) -> Tensor:
        """Returns the gradient of state t − 1, and adds those of the parameters to `grads`.

        Args:
            g: (rows, d), the gradient of state t; the kernels write the result over it.
            h: (rows, d), state t − 1.
            saved: the result of `forward`.
            row_range: the rows, and the iteration.
            grads: accumulators of the parameters' gradients.
        """
        c, out = self.config, {"out": g} if self.kernels else {}
        if c.loop_norm == "post":
            g = self._norm_backward(g, saved[-1], "loop_norm", row_range, grads)
        width = len(LayerSaved._fields)
        for i in reversed(range(c.n_layers)):
            layer = LayerSaved(*saved[i * width : (i + 1) * width])
            last = i == 0 and c.loop_norm != "pre" and c.injection != "concat"
            g = self._layer_backward(g, layer, i, row_range, grads, out if last else {})
        return self._prepare_state_backward(g, h, row_range, grads, out)

    def _norm_backward(
        self,
        g: Tensor,
        x: Tensor,
        name: str,
        row_range: RowRange,
        grads: GradientBuffers,
        out: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        c = self.config
        dx, dweight, dbias = self.ops.norm_bwd(
            g, x, self._weight(f"{name}.weight"), c.eps, c.norm,
            self._weight(f"{name}.bias") is not None, **self._row_count_kwargs(row_range),
            **self._partials(name, grads), **(out or {}),
        )  # fmt: skip
        self._add_norm_grads(name, dweight, dbias, grads)
        return dx

    def _partials(self, name: str, grads: GradientBuffers) -> dict[str, tuple | None]:
        """Lets the kernels add up a norm's gradients over the iterations."""
        if not self.kernels:
            return {}
        weight, bias = self.index.get(f"{name}.weight"), self.index.get(f"{name}.bias")
        return {"partials": grads.partials(weight, bias, self.plan.rows_at(1))}

    def _add_norm_grads(
        self, name: str, dweight: Tensor | None, dbias: Tensor | None, grads: GradientBuffers
    ) -> None:
        for kind, value in (("weight", dweight), ("bias", dbias)):
            if value is not None:
                grads.vector(self.index.get(f"{name}.{kind}"), value)

    def _layer_backward(
        self,
        g: Tensor,
        s: LayerSaved,
        i: int,
        row_range: RowRange,
        grads: GradientBuffers,
        out: Mapping[str, Tensor],
    ) -> Tensor:
        c, ops, w = self.config, self.ops, self._weight
        p, count = f"layers.{i}.", self._row_count_kwargs(row_range)

        def linear(name: str, dy: Tensor | None, x: Tensor) -> None:
            if dy is not None:
                self._add_linear_grads(f"{p}{name}", dy, x, grads, count)

        def norm(name: str, dweight: Tensor, dbias: Tensor | None) -> None:
            self._add_norm_grads(f"{p}{name}", dweight, dbias, grads)

        inner, dropout = self._enter_branch(
            g, s.expanded, p + "post_norm2", 2 + 2 * i, row_range, grads
        )
        g, dweight, dbias, y, dup, dgate, dbranch = ops.mlp_bwd(
            inner, s.mid, s.up, s.gate, w(p + "norm2.weight"), w(p + "norm2.bias"),
            w(p + "up.weight"), w(p + "gate.weight"), w(p + "down.weight"),
            c.activation, c.eps, c.norm, dropout, residual=g, **count,
            **self._partials(p + "norm2", grads),
        )  # fmt: skip
        linear("down", dbranch, s.hidden)
        linear("up", dup, y)
        linear("gate", dgate, y)
        norm("norm2", dweight, dbias)

        inner, dropout = self._enter_branch(
            g, s.attended, p + "post_norm1", 1 + 2 * i, row_range, grads
        )
        do, dbranch = ops.linear_residual_bwd(inner, w(p + "out.weight"), dropout, **count)
        linear("out", dbranch, s.o)
        layout = self.plan.layout_of(row_range)
        dqkv = ops.attention_bwd(
            do, s.qkv, s.o, s.lse, layout, c.n_heads, c.kv_heads, c.causal, **count
        )
        rope = self._rope(row_range)
        if c.qk_norm:
            dqkv, dq_weight, dk_weight = ops.qk_norm_bwd(
                dqkv, s.z, w(p + "q_norm.weight"), w(p + "k_norm.weight"), c.n_heads, c.kv_heads,
                *rope[:2], c.eps, **count,
            )  # fmt: skip
            norm("q_norm", dq_weight, None)
            norm("k_norm", dk_weight, None)
        g, dweight, dbias, dz, y = ops.norm_linear_bwd(
            dqkv, s.u, w(p + "norm1.weight"), w(p + "norm1.bias"), w(p + "qkv.weight"),
            *(NO_ROPE if c.qk_norm else rope), c.eps, c.norm, residual=g, **count,
            **self._partials(p + "norm1", grads), **out,
        )  # fmt: skip
        linear("qkv", dz, y)
        norm("norm1", dweight, dbias)
        return g

    def _add_linear_grads(
        self,
        name: str,
        dy: Tensor,
        x: Tensor,
        grads: GradientBuffers,
        count: Mapping[str, Tensor],
    ) -> None:
        """Adds the gradients of a linear layer's weight and bias; the kernels sum both at once."""
        weight, bias = self.index.get(f"{name}.weight"), self.index.get(f"{name}.bias")
        if self.kernels:
            grads.weight(weight, dy, x, bias=bias, **count)
        else:
            grads.weight(weight, dy, x, **count)
            grads.bias(bias, dy)

    def _enter_branch(
        self,
        g: Tensor,
        branch: Tensor | None,
        name: str,
        site: int,
        row_range: RowRange,
        grads: GradientBuffers,
    ) -> tuple[Tensor, Dropout | None]:
        """Returns the gradient of a branch's output, and the dropout that is still to be applied.

        Args:
            g: (rows, d), the gradient of the residual stream behind the branch.
            branch: (rows, d), its output before the sandwich norm; None: it has no such norm.
            name: the sandwich norm.
            site: site of the dropout.
            row_range: the rows, and the iteration.
            grads: accumulators of the parameters' gradients.
        """
        c, dropout = self.config, self._dropout(site, row_range)
        if branch is None:
            return g, dropout
        weight, bias = self._weight(f"{name}.weight"), self._weight(f"{name}.bias")
        dbranch, dweight, dbias = self.ops.norm_residual_bwd(
            g, branch, weight, bias, c.eps, c.norm, dropout, **self._row_count_kwargs(row_range)
        )
        grads.vector(self.index.get(f"{name}.weight"), dweight)
        grads.vector(self.index.get(f"{name}.bias"), dbias)
        return dbranch, None

    def _add_state_noise(self, h: Tensor, row_range: RowRange) -> Tensor:
        """Adds the training noise to h. Its scale counts as a constant, so the gradient of h passes
        unchanged."""
        p = self.config.state_noise
        if self.seed is None or not p:
            return h
        table = _noise_table(h.shape[1], h.dtype, h.device)
        return state_noise_ref(self._dropout_key(p, NOISE_SITE, row_range), h, table)

    def _prepare_state_backward(
        self,
        g: Tensor,
        h: Tensor,
        row_range: RowRange,
        grads: GradientBuffers,
        out: Mapping[str, Tensor],
    ) -> Tensor:
        c = self.config
        if c.loop_norm == "pre":
            h = self._add_state_noise(h, row_range)
        line = None
        if c.max_loops and grads.needs(index := self.index["loop_embedding.weight"]):
            line = grads.buffer(index)[self.start + row_range.iteration - 1]
        if c.injection == "add":
            self._add_dx(g, row_range, grads, line)
        elif line is not None:
            self.ops.state_input_bwd(g, None, line, **self._row_count_kwargs(row_range))
        if c.injection == "concat":
            entered = self._norm(h, "loop_norm", row_range) if c.loop_norm == "pre" else h
            weight = self._weight("injection.weight")
            joined = torch.cat((entered, self.x[row_range.rows].to(h.dtype)), -1).to(weight.dtype)
            dy = g.to(weight.dtype)
            count = self._row_count_kwargs(row_range)
            grads.weight(self.index["injection.weight"], dy, joined, **count)
            g, dx = (dy @ weight).to(g.dtype).chunk(2, dim=-1)
            self._add_dx(dx, row_range, grads)
        if c.loop_norm == "pre":
            g = self._norm_backward(g, h, "loop_norm", row_range, grads, out)
        return g

    def _add_dx(
        self, g: Tensor, row_range: RowRange, grads: GradientBuffers, line: Tensor | None = None
    ) -> None:
        """Adds g to the gradient of what is injected, and its sum over the rows to `line`."""
        dx = self.dx if self.inject_index is None else grads.buffer(self.inject_index)
        if self.inject_index is None and dx is None:
            self.dx = dx = torch.zeros(self.x.shape, dtype=g.dtype, device=g.device)
        rows, count = row_range.rows, self._row_count_kwargs(row_range)
        if dx is None or isinstance(rows, slice):
            self.ops.state_input_bwd(g, None if dx is None else dx[rows], line, **count)
            return
        self.ops.state_input_bwd(g, None, line)
        dx[rows] += g
