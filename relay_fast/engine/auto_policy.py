"""Chooses the recompute policy of a pass by the memory that is free: `recompute="auto"`.

The policies are tried in the order of ORDER, by the forward FLOPs that they add, and the first one
that fits SHARE of the free memory is taken; if none fits, the one that needs least. What a policy
needs is counted from the batch's plan: the states that it keeps, the inside of every iteration
(`none`) or of the largest one, the same again for its backward, and the gradients of the
parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from relay_fast.batch.plan import Plan
from relay_fast.config import BlockConfig
from relay_fast.engine.recompute import RecomputePolicy
from relay_fast.engine.spec import LoopSpec
from relay_fast.kernels.norm_ref import upcast_dtype
from relay_fast.utils.memory import free_bytes

ORDER = ("none", "state", "every:2", "every:3", "sqrt")
SHARE = 0.9
# A plan keeps its policies: a CUDA graph is captured as it was warmed up. By whether it is known
# what an iteration keeps.
_chosen: WeakKeyDictionary[Plan, dict[bool, RecomputePolicy]] = WeakKeyDictionary()


def choose_policy(spec: LoopSpec, x: Tensor, parameters: Sequence[Tensor | None]) -> LoopSpec:
    """Returns the spec with a policy that fits, if its own is "auto".

    Args:
        spec: the pass.
        x: its input.
        parameters: its parameters.
    """
    if spec.policy.kind != "auto":
        return spec
    known, chosen = spec.inside_bytes is not None, _chosen.setdefault(spec.plan, {})
    if known not in chosen:
        chosen[known] = _choose(spec, x, parameters)
    return replace(spec, policy=chosen[known])


def _choose(spec: LoopSpec, x: Tensor, parameters: Sequence[Tensor | None]) -> RecomputePolicy:
    free = free_bytes(x.device)
    if free is None:
        return RecomputePolicy("state")
    inside = None if spec.inside_bytes is None else spec.inside_bytes(x)
    trained = [p for p in parameters if p is not None and p.requires_grad]
    gradients = sum(p.numel() * upcast_dtype(p).itemsize for p in trained)
    needed = {}
    for text in ORDER if inside is not None else ORDER[1:]:
        policy = RecomputePolicy.parse(text)
        needed[policy] = gradients + policy_bytes(policy, spec.plan, x[:1].nbytes, inside or 0)
    fitting = (policy for policy, size in needed.items() if size <= SHARE * free)
    return next(fitting, min(needed, key=needed.__getitem__))


def policy_bytes(policy: RecomputePolicy, plan: Plan, state: int, inside: int) -> int:
    """Returns the bytes that a pass under a policy needs beside parameters and their gradients.

    Args:
        policy: any but "auto".
        plan: the batch.
        state: bytes of a row of the state.
        inside: bytes of a row that the backward of one iteration needs beside the state.
    """
    rows = plan.most_rows
    largest = max(rows, default=0)
    kept = policy.kept(plan.limit, [n * state for n in rows])
    size = sum(rows[t - 1] for t in kept) * state
    size += (sum(rows) if policy.kind == "none" else largest) * inside
    if policy.kind not in ("none", "state") and kept:  # states between two kept ones, in backward
        size += largest * state * (min(kept) - 1)
    # The backward of an iteration; the final state, the gradient of the state, and two states that
    # pass through.
    return size + largest * inside + (plan.rows * 2 + largest * 2) * state


def inside_row_bytes(config: BlockConfig, state: torch.dtype, compute: torch.dtype) -> int:
    """Returns the bytes of a row that the backward of one iteration of a block needs beside the
    state, as `BlockIteration.forward` returns them.

    Args:
        config: the block.
        state: dtype of the state.
        compute: dtype of the GEMMs.
    """
    c = config
    narrow = (c.n_heads + 2 * c.kv_heads) * c.head_dim + c.n_heads * c.head_dim  # qkv, o
    narrow += c.hidden * (3 if c.activation == "swiglu" else 2)  # up, gate, hidden
    if c.qk_norm:
        narrow += (c.n_heads + 2 * c.kv_heads) * c.head_dim  # z
    if c.sandwich_norm:
        narrow += 2 * c.d_model  # attended, expanded
    wide = 2 * c.d_model  # the layer's input, the state between attention and MLP
    layer = narrow * compute.itemsize + wide * state.itemsize + 4 * c.n_heads  # lse
    own = c.loop_norm == "pre" or c.injection != "none" or c.max_loops or c.state_noise
    more = (c.loop_norm == "post") - (not own)  # the first layer's input may be the state itself
    return c.n_layers * layer + more * c.d_model * state.itemsize
