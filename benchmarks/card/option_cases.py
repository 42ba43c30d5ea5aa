"""Cases, as in `benchmarks.card.cases`, of the ops behind QK-norm and sandwich norms."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.baselines import rotate
from benchmarks.card.cases import EPS, Case, Draw, Named, rms
from relay_fast.functional import Ops


def qk_norm(rows: int, heads: int, kv_heads: int, head_dim: int) -> Case:
    """Norm of each query and key head, and RoPE."""
    columns = (heads + 2 * kv_heads) * head_dim

    def make(draw: Draw) -> SimpleNamespace:
        angle = draw(rows, head_dim // 2, wide=True)
        return SimpleNamespace(
            z=draw(rows, columns),
            q_weight=draw.norm(head_dim),
            k_weight=draw.norm(head_dim),
            cos=angle.cos(),
            sin=angle.sin(),
            g=draw(rows, columns),
        )

    def shared(i) -> tuple:
        return i.z, i.q_weight, i.k_weight, heads, kv_heads, i.cos, i.sin, EPS

    def forward(ops: Ops, i) -> Named:
        return {"qkv": ops.qk_norm_fwd(*shared(i))}

    def backward(ops: Ops, i, out: Named) -> Named:
        dz, dq_weight, dk_weight = ops.qk_norm_bwd(i.g, *shared(i))
        return {"dz": dz, "dq_weight": dq_weight, "dk_weight": dk_weight}

    def eager(i) -> Tensor:
        q, k, v = i.z.unflatten(1, (-1, head_dim)).split((heads, kv_heads, kv_heads), dim=1)
        tables = [t.to(i.z.dtype).unsqueeze(1) for t in (i.cos, i.sin)]
        q, k = rms(q, i.q_weight, i.z.dtype), rms(k, i.k_weight, i.z.dtype)
        return torch.cat((rotate(q, *tables), rotate(k, *tables), v), dim=1).flatten(1)

    work = 8.0 * rows * columns
    return Case("qk_norm", f"{rows}x{columns}", make, forward, eager, (work, 2 * work), backward,
                ("z", "q_weight", "k_weight"))  # fmt: skip


def norm_residual(rows: int, d: int) -> Case:
    """Norm of a branch, added to the residual stream."""

    def make(draw: Draw) -> SimpleNamespace:
        return SimpleNamespace(
            branch=draw(rows, d),
            norm=draw.norm(d),
            residual=draw(rows, d, wide=True),
            g=draw(rows, d, wide=True),
        )

    def forward(ops: Ops, i) -> Named:
        return {"out": ops.norm_residual_fwd(i.branch, i.norm, None, i.residual, EPS)}

    def backward(ops: Ops, i, out: Named) -> Named:
        dbranch, dnorm, _ = ops.norm_residual_bwd(i.g, i.branch, i.norm, None, EPS)
        return {"dbranch": dbranch, "dnorm": dnorm}

    def eager(i) -> Tensor:
        wide = i.branch.to(i.residual.dtype)
        return i.residual + F.rms_norm(wide, (d,), i.norm, EPS)

    work = 7.0 * rows * d
    return Case("norm_residual", f"{rows}x{d}", make, forward, eager, (work, 2 * work), backward,
                ("branch", "norm", "residual"))  # fmt: skip


def option_cases(tiny: bool) -> list[Case]:
    """Odd shapes, which must be right in every dtype."""
    if tiny:
        return [qk_norm(33, 2, 1, 16), norm_residual(33, 32)]
    return [qk_norm(199, 4, 2, 64), qk_norm(63, 2, 2, 24), norm_residual(199, 256)]
