"""The references of QK-norm and of norms on branches against autograd in fp64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from benchmarks.numerics import assert_close
from relay_fast.kernels.dropout_ref import Dropout, dropout_mask_ref
from relay_fast.kernels.linear_residual_ref import linear_residual_fwd_ref
from relay_fast.kernels.mlp_ref import mlp_fwd_ref
from relay_fast.kernels.norm_ref import NORMS
from relay_fast.kernels.norm_residual_ref import norm_residual_bwd_ref, norm_residual_fwd_ref
from relay_fast.kernels.qk_norm_ref import qk_norm_bwd_ref, qk_norm_fwd_ref

EPS = 1e-6


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("rows", [0, 1, 13])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(3, 1, 6), (2, 2, 5)])
def test_qk_norm(heads: int, kv_heads: int, width: int, rows: int) -> None:
    """With RoPE where heads have an even width."""
    z, q_weight, k_weight = randn(rows, (heads + 2 * kv_heads) * width), randn(width), randn(width)
    q, k, v = z.unflatten(1, (-1, width)).split((heads, kv_heads, kv_heads), dim=1)
    q, k = F.rms_norm(q, (width,), q_weight, EPS), F.rms_norm(k, (width,), k_weight, EPS)
    tables = (None, None)
    if width % 2 == 0:
        angle = torch.randn(rows, width // 2, dtype=torch.float64)
        tables = angle.cos() * 1.3, angle.sin() * 1.3
        cos, sin = (t[:, None] for t in tables)
        turn = lambda x: torch.cat(
            (
                x[..., : width // 2] * cos - x[..., width // 2 :] * sin,
                x[..., width // 2 :] * cos + x[..., : width // 2] * sin,
            ),
            dim=-1,
        )
        q, k = turn(q), turn(k)
    out = torch.cat((q, k, v), dim=1).flatten(1)
    g = torch.randn_like(out)
    truth = torch.autograd.grad((out * g).sum(), (z, q_weight, k_weight))
    with torch.no_grad():
        shared = (z, q_weight, k_weight, heads, kv_heads, *tables, EPS)
        before = g.clone()
        assert_close("out", qk_norm_fwd_ref(*shared), out)
        for name, got, t in zip("zqk", qk_norm_bwd_ref(g, *shared), truth, strict=True):
            assert_close(f"d{name}", got, t)
        assert torch.equal(g, before)


@pytest.mark.parametrize("rows", [0, 1, 13])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", NORMS)
def test_norm_residual(kind: str, bias: bool, p: float, rows: int) -> None:
    branch, residual, weight, b = randn(rows, 12), randn(rows, 12), randn(12), randn(12)
    dropout = Dropout(p, torch.tensor(5), 1, 2, torch.arange(rows)) if p else None
    normed = (
        F.layer_norm(branch, (12,), weight, None, EPS)
        if kind == "layer"
        else F.rms_norm(branch, (12,), weight, EPS)
    )
    y = normed + b if bias else normed
    y = y * dropout_mask_ref(dropout, 12, y.dtype) if p else y
    out, g = residual + y, torch.randn(rows, 12, dtype=torch.float64)
    truth = torch.autograd.grad((out * g).sum(), (branch, weight, b), allow_unused=True)
    with torch.no_grad():
        options = (EPS, kind, dropout)
        own = b if bias else None
        assert_close("out", norm_residual_fwd_ref(branch, weight, own, residual, *options), out)
        got = norm_residual_bwd_ref(g, branch, weight, own, *options)
    assert_close("dbranch", got[0], truth[0])
    assert_close("dweight", got[1], truth[1])
    if bias:
        assert_close("dbias", got[2], truth[2])


def test_what_is_not_added_to_the_residual_stream() -> None:
    x, weight, a = torch.randn(5, 8), torch.ones(8), torch.randn(5, 6)
    up, down, bias = torch.randn(6, 8), torch.randn(8, 6), torch.randn(8)
    branch = linear_residual_fwd_ref(a, down, bias, None)
    assert torch.equal(branch, F.linear(a, down, bias))
    shared = (x, weight, None, up, None, None, None, down, bias)
    added, *kept = mlp_fwd_ref(*shared)
    branch, *again = mlp_fwd_ref(*shared, residual=False)
    torch.testing.assert_close(x + branch, added)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(kept, again, strict=True))
