"""One iteration of a block of which some parts are called: they have a forward or hooks of their
own, such as fake quantisation, an adapter with dropout, or a hook that reads activations.

Everything around these parts is torch ops, and autograd computes the gradients of one iteration, as
`relay_fast.loop` does it for a whole module. Parts and hooks run again in a recomputation, with the
same random numbers, and see packed rows (rows, columns).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from relay_fast.batch.plan import Plan, RowRange
from relay_fast.config import BlockConfig
from relay_fast.engine.block_iteration import BlockIteration
from relay_fast.engine.block_weights import BlockWeights
from relay_fast.engine.module_checks import refuse_unregistered_tensors
from relay_fast.engine.module_iteration import RngState, has_saved_tensor_hooks
from relay_fast.engine.plain_modules import Holder
from relay_fast.engine.recompute import RecomputePolicy
from relay_fast.engine.wrappers import kept_gathered, shards
from relay_fast.kernels.dropout_ref import Dropout, dropout_mask_ref
from relay_fast.kernels.mlp_ref import activation_fwd_ref
from relay_fast.kernels.norm_linear_ref import rotate_ref
from relay_fast.kernels.norm_ref import upcast
from relay_fast.kernels.supports import require
from relay_fast.ops.dispatch import REFERENCE, TORCH, Ops
from relay_fast.ops.gradients import GradientBuffers


def iterations_with_calls(
    config: BlockConfig,
    weights: BlockWeights,
    plan: Plan,
    policy: RecomputePolicy,
    ops: Ops,
    dtype: torch.dtype,
    seed: Tensor | None,
) -> tuple[RecomputePolicy, Callable[[Tensor, Sequence[Tensor | None]], CalledIteration]]:
    """Returns the policy to use and the `make_iteration` of a LoopSpec.

    Args:
        config, plan, ops, dtype, seed: as for BlockIteration.
        weights: the block's, with the parts to call.
        policy: the policy asked for; "none" becomes "state" where hooks on saved tensors are
            active, since these cannot save graphs.

    Raises:
        Unsupported: for a fixed-capacity plan.
    """
    require(
        "fixed-capacity batches do not support parts with a forward or hooks of their own"
        if plan.fixed_capacity
        else None
    )
    if policy.kind == "none" and has_saved_tensor_hooks():
        policy = RecomputePolicy("state")
    parts = CalledParts(weights, recomputes=policy.kind != "none")
    return policy, lambda x, parameters: CalledIteration(
        config, parameters, plan, x, ops, dtype, seed, parts
    )


class CalledParts:
    """State that all iterations of one pass over called parts share, forward and backward.

    Args:
        weights: the block's weights, with the parts to call.
        recomputes: whether the backward runs iterations again.
    """

    def __init__(self, weights: BlockWeights, recomputes: bool):
        self.parts = {path: part for path, (part, _) in weights.called.items()}
        self.names = weights.names
        self.recomputes = recomputes
        trains = torch.is_grad_enabled()
        self.replays_rng = trains and recomputes
        self.checked = not (trains and any(t.requires_grad for t in weights.tensors))
        self.rng_states: dict[tuple[int, int], RngState] = {}
        self.leaves: tuple[dict[str, Tensor], Tensor] | None = None
        self.shards = shards(m for part in self.parts.values() for m in part.modules())
        kind = weights.tensors[0].device.type
        known = torch.amp.is_autocast_available(kind)
        self.autocast = (
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            if known
            else None
        )

    def call(self, path: str, leaves: Mapping[str, Tensor], *arguments) -> Tensor:
        """Calls a part with its parameters replaced by leaves.

        Raises:
            RuntimeError: if the part changes its buffers.
        """
        part = self.parts[path]
        before = [(name, b, b._version) for name, b in part.named_buffers()]
        context = nullcontext()
        if self.autocast is not None:
            kind, dtype, enabled = self.autocast
            context = torch.autocast(kind, dtype, enabled=enabled)
        with context, kept_gathered(self.shards):
            result = torch.func.functional_call(part, dict(leaves), arguments)
        now = dict(part.named_buffers())
        for name, buffer, version in before:
            if now.get(name) is not buffer or buffer._version != version:
                raise RuntimeError(
                    f"{path} ({type(part).__name__}) changed its buffer {name!r} in forward, which "
                    "recomputation would do twice: disable its observers or running statistics"
                )
        if not isinstance(result, Tensor):
            raise TypeError(
                f"{path} ({type(part).__name__}) returned a {type(result).__name__}: it must "
                "return one tensor"
            )
        return result


class _Called:
    """Stands in the place of a weight: is applied to the rows instead of multiplied with them."""

    def __init__(self, parts: CalledParts, path: str, leaves: Mapping[str, Tensor], dtype):
        self._parts, self._path, self._leaves, self.dtype = parts, path, leaves, dtype

    def __call__(self, x: Tensor) -> Tensor:
        return self._parts.call(self._path, self._leaves, x)

    def norm(self, x: Tensor, eps: float, kind: str) -> Tensor:
        if not isinstance(self._parts.parts[self._path], Holder):
            return self(x)
        w = self._leaves
        compute = lambda x: _norm(x, w["weight"], w.get("bias"), eps, kind)
        return self._parts.call(self._path, {}, x, compute)


class CalledIteration(BlockIteration):
    """A BlockIteration whose gradients autograd computes.

    Args:
        config, plan, x, ops, compute_dtype, dropout_seed: as for BlockIteration.
        parameters: tensors in the order of the block's weights, and possibly more.
        parts: the parts to call.
    """

    def __init__(
        self,
        config: BlockConfig,
        parameters: Sequence[Tensor | None],
        plan: Plan,
        x: Tensor,
        ops: Ops,
        compute_dtype: torch.dtype,
        dropout_seed: Tensor | None,
        parts: CalledParts,
    ):
        named = dict(zip(parts.names, parameters, strict=False))
        super().__init__(config, named, plan, x, TORCH, compute_dtype, dropout_seed)
        self.parts = parts
        self.ops = _differentiable(ops)
        self.saved_width = 2
        own = lambda path: {n[len(path) + 1 :]: n for n in named if n.startswith(f"{path}.")}
        called = {path for path in parts.parts if path.rpartition(".")[0] != "layers"}
        if parts.leaves is None:
            self._make_leaves(named, called)
            if not parts.recomputes:  # the backward of a kept graph asks for the same leaves
                parts.leaves = self.cast, self.x
        else:
            self.cast, self.x = parts.leaves
        self._called = {
            path: _Called(
                parts, path, {kind: self.cast[n] for kind, n in own(path).items()}, compute_dtype
            )
            for path in called
        }

    def _make_leaves(self, named: Mapping[str, Tensor], called: set[str]) -> None:
        """Replaces tensors by leaves: the graphs of iterations must not reach the caller's."""
        for name, tensor in named.items():
            inside = any(name.startswith(f"{path}.") for path in called)
            value = tensor if inside else self.cast[name]
            self.cast[name] = value.detach().requires_grad_(tensor.requires_grad)
        if self.config.injection != "none":
            self.x = self.x.detach().requires_grad_(self.x.requires_grad)
        else:
            self.x = self.x.detach()

    def _weight(self, name: str) -> Tensor | _Called | None:
        path, _, kind = name.rpartition(".")
        if path in self._called:
            return self._called[path] if kind == "weight" else None
        return self.cast.get(name)

    def _norm(self, x: Tensor, name: str, row_range: RowRange, out: Tensor | None = None) -> Tensor:
        c, weight, bias = self.config, self._weight(f"{name}.weight"), self._weight(f"{name}.bias")
        y = _norm(x, weight, bias, c.eps, c.norm).to(x.dtype)
        return y if out is None else out.copy_(y)

    def _inject(self, joined: Tensor) -> Tensor:
        return _linear(joined, self._weight("injection.weight"), None)

    def _loop_embedding(self, iteration: int) -> Tensor:
        weight = self._weight("loop_embedding.weight")
        if not isinstance(weight, _Called):
            return weight[iteration - 1]
        return weight(torch.tensor(iteration - 1, device=self.x.device))

    def _add_state_noise(self, h: Tensor, row_range: RowRange) -> Tensor:
        noisy = super()._add_state_noise(h.detach(), row_range)
        return noisy + (h - h.detach())  # the scale counts as a constant

    def _layer(self, u: Tensor, i: int, row_range: RowRange, out: Tensor | None, keep: bool):
        path = f"layers.{i}"
        if path not in self.parts.parts:
            return super()._layer(u, i, row_range, out, keep)
        layer = super()._layer
        new = self.parts.call(path, {}, u, lambda u: layer(u, i, row_range, None, keep)[0])
        return (new if out is None else out.copy_(new)), ()

    # Forward and backward

    def forward(
        self, h: Tensor, row_range: RowRange, out: Tensor, keep: bool = True
    ) -> list[Tensor | None]:
        """Does what `BlockIteration.forward` does, by calling the parts.

        Args:
            h: State t − 1.
            row_range: The rows of iteration t.
            out: Receives state t.
            keep: Whether a backward follows.

        Returns:
            With `keep` the inputs and outputs of the iteration's graph, otherwise an empty list.
        """
        parts, key = self.parts, (row_range.iteration, row_range.part)
        context = nullcontext()
        if key in parts.rng_states:
            context = parts.rng_states[key].restored()
        elif parts.replays_rng:
            parts.rng_states[key] = RngState(h.device)
        recorded = keep or not parts.checked
        with context, torch.set_grad_enabled(recorded):
            state = h.data.requires_grad_(recorded)
            new = torch.empty_like(out)
            super().forward(state, row_range, new, keep=False)
        if not parts.checked:
            refuse_unregistered_tensors([new], [state, self.x, *self.cast.values()])
            parts.checked = True
        out.copy_(new.detach())
        return [state, new] if keep else []

    def backward(
        self,
        g: Tensor,
        h: Tensor,
        saved: Sequence[Tensor | None],
        row_range: RowRange,
        grads: GradientBuffers,
    ) -> Tensor:
        state, new = saved
        if not new.requires_grad:
            return g.new_zeros(g.shape)
        needed = [name for name, i in self.index.items() if grads.needs(i)]
        inputs = [state, *(self.cast[name] for name in needed)]
        if self.x.requires_grad:
            inputs.append(self.x)
        # A recomputed graph is used once, a kept one as often as the caller's graph.
        retain = (
            not self.parts.recomputes and torch._C._autograd._get_current_graph_task_keep_graph()
        )
        dh, *values = torch.autograd.grad(
            new, inputs, g.to(new.dtype), allow_unused=True, retain_graph=retain
        )
        if self.x.requires_grad and (dx := values.pop()) is not None:
            self._add_dx(upcast(dx)[row_range.rows], row_range, grads)
        for name, value in zip(needed, values, strict=True):
            if value is not None:
                grads.vector(self.index[name], value)
        return g.new_zeros(g.shape) if dh is None else upcast(dh)


# The ops of a layer, differentiable by autograd


def _norm(x: Tensor, weight, bias: Tensor | None, eps: float, kind: str) -> Tensor:
    if isinstance(weight, _Called):
        return weight.norm(x, eps, kind)
    x, weight = upcast(x), upcast(weight)
    if kind == "layer":
        bias = None if bias is None else upcast(bias)
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _linear(x: Tensor, weight, bias: Tensor | None) -> Tensor:
    x = x.to(weight.dtype)
    return weight(x) if isinstance(weight, _Called) else F.linear(x, weight, bias)


def _norm_linear(
    x, norm_weight, norm_bias, weight, bias, cos=None, sin=None, rotary=0, eps=1e-6, kind="rms"
) -> Tensor:
    out = _linear(_norm(x, norm_weight, norm_bias, eps, kind), weight, bias)
    return rotate_ref(out.clone(), cos, sin, rotary) if rotary else out


def _qk_norm(z, q_weight, k_weight, heads, kv_heads, cos=None, sin=None, eps=1e-6) -> Tensor:
    width = z.shape[1] // (heads + 2 * kv_heads)
    q, k, v = z.split((heads * width, kv_heads * width, kv_heads * width), dim=1)
    normed = lambda part, weight: _norm(part.reshape(-1, width), weight, None, eps, "rms")
    q, k = normed(q, q_weight).view(q.shape), normed(k, k_weight).view(k.shape)
    turned = torch.cat((q, k), dim=1)
    if cos is not None:
        turned = rotate_ref(turned, cos, sin, turned.shape[1])
    return torch.cat((turned.to(z.dtype), v), dim=1)


def _add(residual: Tensor, branch: Tensor, dropout: Dropout | None, out: Tensor | None) -> Tensor:
    if dropout is not None:
        branch = branch * dropout_mask_ref(dropout, branch.shape[1], branch.dtype)
    new = residual + branch.to(residual.dtype)
    return new if out is None else out.copy_(new)


def _linear_residual(
    a, weight, bias, residual, dropout: Dropout | None = None, out: Tensor | None = None
) -> Tensor:
    branch = _linear(a, weight, bias)
    return branch if residual is None else _add(residual, branch, dropout, out)


def _norm_residual(
    branch, norm_weight, norm_bias, residual, eps, kind="rms", dropout=None, out=None
) -> Tensor:
    return _add(residual, _norm(branch, norm_weight, norm_bias, eps, kind), dropout, out)


def _mlp(
    x,
    norm_weight,
    norm_bias,
    up_weight,
    up_bias,
    gate_weight,
    gate_bias,
    down_weight,
    down_bias,
    activation="gelu_tanh",
    eps=1e-6,
    kind="rms",
    dropout=None,
    out=None,
    keep=True,
    residual=True,
) -> tuple[Tensor, None, None, None]:
    y = _norm(x, norm_weight, norm_bias, eps, kind)
    up = _linear(y, up_weight, up_bias)
    gate = None if gate_weight is None else _linear(y, gate_weight, gate_bias)
    hidden = activation_fwd_ref(activation, up, gate)
    residue = x if residual else None
    new = _linear_residual(hidden, down_weight, down_bias, residue, dropout, out)
    return new, None, None, None


class _Attention(torch.autograd.Function):
    """The fused attention of `ops`."""

    @staticmethod
    def forward(ctx, qkv: Tensor, ops: Ops, *arguments):
        o, lse = ops.attention_fwd(qkv, *arguments)
        ctx.ops, ctx.arguments = ops, arguments
        ctx.save_for_backward(qkv, o, lse)
        return o

    @staticmethod
    def backward(ctx, g: Tensor):
        dqkv = ctx.ops.attention_bwd(g.contiguous(), *ctx.saved_tensors, *ctx.arguments)
        return dqkv, None, *(None for _ in ctx.arguments)


def _differentiable(ops: Ops) -> Ops:
    return REFERENCE._replace(
        norm_linear_fwd=_norm_linear,
        qk_norm_fwd=_qk_norm,
        attention_fwd=lambda qkv, *arguments: (_Attention.apply(qkv, ops, *arguments), None),
        linear_residual_fwd=_linear_residual,
        norm_residual_fwd=_norm_residual,
        mlp_fwd=_mlp,
    )
