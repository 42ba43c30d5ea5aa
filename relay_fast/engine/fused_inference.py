"""Reading chains off in one launch: the whole-loop kernel, where it serves.

It knows the plain block only and holds whole sequences in a program (`loop_reason`); everything
else is read iteration by iteration.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.engine.block_iteration import rope_table
from relay_fast.engine.spec import LoopSpec
from relay_fast.kernels.loop_ref import LoopLayout, LoopWeights
from relay_fast.kernels.supports import loop_reason


def block_reason(config: BlockConfig, training: bool = False) -> str | None:
    """Why the whole-loop kernel does not compute this block; None if it does."""
    if config.bias:
        return "the whole-loop kernel has no biases"
    if config.injection != "none" or config.max_loops:
        return "the whole-loop kernel has neither input injection nor a loop-index embedding"
    if config.loop_norm == "pre":
        return "the whole-loop kernel norms the state after an iteration, not before it"
    if training and (config.dropout or config.state_noise):
        return "the whole-loop kernel is for inference: no dropout, no state noise"
    return None


def feedback_reason(config: ModelConfig) -> str | None:
    """Why the whole-loop kernel does not serve a model's feedback; None if there is none."""
    if config.feedback == "none":
        return None
    return (
        f"the whole-loop kernel carries the state from one iteration to the next, feedback = "
        f"{config.feedback!r} reads tokens in between"
    )


def stack_weights(
    config: BlockConfig,
    block: Mapping[str, Tensor],
    norm: Tensor,
    head: Tensor,
    dtype: torch.dtype,
) -> LoopWeights:
    """The block's parameters by name, the final norm and the head, as the kernel takes them."""

    def stack(name: str, dtype: torch.dtype | None = None) -> Tensor:
        layers = [block[f"layers.{i}.{name}.weight"] for i in range(config.n_layers)]
        return torch.stack(layers).to(dtype)

    gate = stack("gate", dtype) if config.activation == "swiglu" else None
    return LoopWeights(
        stack("norm1"), stack("qkv", dtype), stack("out", dtype), stack("norm2"),
        stack("up", dtype), gate, stack("down", dtype), block.get("loop_norm.weight"),
        norm, head.to(dtype),
    )  # fmt: skip


def read_whole_loop(
    config: BlockConfig,
    run: LoopSpec,
    x: Tensor,  # (N, d), in the plan's order
    block: Mapping[str, Tensor],
    norm: Tensor,
    head: Tensor,
    training: bool = False,
) -> tuple[Tensor, list[Tensor]] | str:
    """final (N, d) and the token ids (N_t,) of each iteration; or the reason why not."""
    plan = run.plan
    if run.ops.loop_fwd is None:
        return "plain torch runs the loop iteration by iteration"
    if plan.fixed_capacity:
        return "the whole-loop kernel takes its layout from the host, which a static plan has not"
    reason = block_reason(config, training)
    if reason:
        return reason
    cos = sin = None
    if config.rope_base is not None:
        cos, sin = rope_table(plan.positions, config.head_dim, config.rope_base)
    layout = LoopLayout(plan.lengths, plan.loops, x.device)
    weights = stack_weights(config, block, norm, head, run.compute_dtype)
    heads = (config.n_heads, config.kv_heads)
    reason = loop_reason(x, layout, weights, cos, sin, *heads, config.activation, config.norm)
    if reason:
        return reason
    final, ids = run.ops.loop_fwd(
        x, layout, weights, cos, sin, *heads, config.causal, config.activation, config.eps,
        config.norm,
    )  # fmt: skip
    return final, list(ids.split(list(plan.active_rows)))
