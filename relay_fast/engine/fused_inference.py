"""Inference with the whole-loop kernel, which runs all iterations in one launch.

The kernel supports plain blocks and short sequences only (`loop_reason`); everything else runs
iteration by iteration.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.engine.rope import block_rope_table
from relay_fast.engine.spec import LoopSpec
from relay_fast.kernels.loop_ref import LoopLayout, LoopWeights
from relay_fast.kernels.supports import loop_feedback_reason, loop_reason


def block_reason(config: BlockConfig, training: bool = False) -> str | None:
    """Returns why the whole-loop kernel does not support this block, or None if it does."""
    if config.bias:
        return "the whole-loop kernel does not support biases"
    if config.injection != "none" or config.max_loops:
        return "the whole-loop kernel supports neither input injection nor a loop-index embedding"
    if config.qk_norm or config.sandwich_norm:
        return "the whole-loop kernel supports neither qk_norm nor sandwich_norm"
    if config.loop_norm == "pre":
        return "the whole-loop kernel does not support loop_norm='pre'"
    if training and (config.dropout or config.state_noise):
        return "the whole-loop kernel supports neither dropout nor state noise"
    return None


def feedback_reason(config: ModelConfig) -> str | None:
    """Returns why the whole-loop kernel does not support the model's feedback, or None if it
    does."""
    return loop_feedback_reason(config.feedback)


def stack_weights(
    config: BlockConfig,
    block: Mapping[str, Tensor],
    norm: Tensor,
    head: Tensor,
    dtype: torch.dtype,
) -> LoopWeights:
    """Stacks the weights of the layers as the whole-loop kernel takes them.

    Args:
        config: the block.
        block: its parameters by state-dict key.
        norm: (d,), weight of the final norm.
        head: (V, d).
        dtype: dtype of the GEMM operands.
    """

    def stack(name: str, dtype: torch.dtype | None = None) -> Tensor:
        layers = [block[f"layers.{i}.{name}.weight"] for i in range(config.n_layers)]
        return torch.stack(layers).to(dtype)

    gate = stack("gate", dtype) if config.activation == "swiglu" else None
    return LoopWeights(
        stack("norm1"),
        stack("qkv", dtype),
        stack("out", dtype),
        stack("norm2"),
        stack("up", dtype),
        gate,
        stack("down", dtype),
        block.get("loop_norm.weight"),
        norm,
        head.to(dtype),
    )


def run_fused_loop(
    config: BlockConfig,
    spec: LoopSpec,
    x: Tensor,
    block: Mapping[str, Tensor],
    norm: Tensor,
    head: Tensor,
    training: bool = False,
) -> tuple[Tensor, list[Tensor]] | str:
    """Runs the loop and its argmax readout in one launch.

    Args:
        config: the block.
        spec: the pass.
        x: (N, d), the initial state, in the plan's order.
        block: the block's parameters by state-dict key.
        norm: (d,), weight of the final norm.
        head: (V, d).
        training: whether dropout and state noise are active.

    Returns:
        final (N, d) and a list of the token ids (N_t,) of each iteration; or, as a string, the
        reason why the kernel does not support the call.
    """
    call = fused_call(config, spec, x, block, norm, head, training)
    if isinstance(call, str):
        return call
    final, ids = spec.ops.loop_fwd(*call)
    return final, list(ids.split(list(spec.plan.active_rows)))


def fused_call(
    config: BlockConfig,
    spec: LoopSpec,
    x: Tensor,
    block: Mapping[str, Tensor],
    norm: Tensor,
    head: Tensor,
    training: bool = False,
) -> tuple | str:
    """Returns the arguments of the whole-loop kernel, or why it does not support the call.

    Args: as `run_fused_loop`.
    """
    plan = spec.plan
    if spec.ops.loop_fwd is None:
        return "plain torch has no whole-loop kernel"
    if plan.fixed_capacity:
        return "the whole-loop kernel does not support fixed-capacity batches"
    reason = block_reason(config, training)
    if reason:
        return reason
    cos = sin = None
    if config.rope_base is not None:
        cos, sin = block_rope_table(config, plan.positions)
    layout = LoopLayout(plan.lengths, plan.loops, x.device)
    weights = stack_weights(config, block, norm, head, spec.compute_dtype)
    heads = (config.n_heads, config.kv_heads)
    reason = loop_reason(x, layout, weights, cos, sin, *heads, config.activation, config.norm)
    if reason:
        return reason
    options = (config.causal, config.activation, config.eps, config.norm)
    return x, layout, weights, cos, sin, *heads, *options
