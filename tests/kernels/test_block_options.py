"""The kernels behind a block's options (QK-norm, sandwich norms) against the reference, with a
row count, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from benchmarks import interpreter
from benchmarks.numerics import describe, rms_ratio
from relay_fast.functional import Ops, select
from relay_fast.kernels.supports import Unsupported
from tests.support.kernel_checks import (
    DEVICE,
    Make,
    Outputs,
    check,
    dropout_of,
    guarded_outputs,
    named,
)

interpreter.mend()
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "head_dim", "rope", "dtype"),
    [
        (65, 3, 1, 32, True, torch.float32),  # one row more than a block of 64
        (63, 2, 2, 24, True, torch.float32),  # one less; a head that is no power of two
        (9, 2, 1, 32, True, torch.float16),
        (9, 2, 1, 32, True, torch.bfloat16),
        (5, 2, 1, 9, False, torch.float32),  # an odd head, in unequal halves
        (0, 2, 1, 16, True, torch.float32),
    ],
)
def test_qk_norm(rows, heads, kv_heads, head_dim, rope, dtype) -> None:
    def case(ops: Ops, make: Make) -> Outputs:
        columns = (heads + 2 * kv_heads) * head_dim
        z, weights = make(rows, columns), (make.positive(head_dim), make.positive(head_dim))
        angle = make(rows, head_dim // 2, state=True)
        tables = (angle.cos(), angle.sin()) if rope else (None, None)
        shared = (z, *weights, heads, kv_heads, *tables, 1e-6)
        out = ops.qk_norm_fwd(*shared)
        return named("out dz dq dk", (out, *ops.qk_norm_bwd(make(rows, columns), *shared)))

    check(case, dtype)


@pytest.mark.parametrize(
    ("rows", "d", "kind", "bias", "p", "dtype"),
    [
        (65, 64, "rms", False, 0.0, torch.float32),
        (63, 33, "layer", True, 0.3, torch.float32),
        (5, 48, "rms", True, 0.3, torch.float16),
        (5, 48, "layer", False, 0.0, torch.bfloat16),
        (0, 16, "rms", False, 0.0, torch.float32),
        (3, 600, "rms", False, 0.3, torch.float32),
    ],
)
def test_norm_residual(rows, d, kind, bias, p, dtype) -> None:
    def case(ops: Ops, make: Make) -> Outputs:
        branch, residual, weight = make(rows, d), make(rows, d, state=True), make.positive(d)
        b = make(d, scale=0.1, state=True) if bias else None
        dropout = dropout_of(rows, p)
        out = ops.norm_residual_fwd(branch, weight, b, residual, 1e-6, kind, dropout)
        g = make(rows, d, state=True)
        dbranch, dw, db = ops.norm_residual_bwd(g, branch, weight, b, 1e-6, kind, dropout)
        return named("out dbranch dw db", (out, dbranch, dw, db if bias else None))

    check(case, dtype)


@pytest.mark.parametrize(
    ("rows", "d", "dtype"),
    [(65, 64, torch.float32), (63, 33, torch.float16), (5, 600, torch.float32),
     (0, 16, torch.float32)],
)  # fmt: skip
def test_state_input(rows: int, d: int, dtype: torch.dtype) -> None:
    def case(ops: Ops, make: Make) -> Outputs:
        h, x, line = make(rows, d), make(rows, d), make(d, state=True)
        g, dx, dline = make(rows, d, state=True), make(rows, d, state=True), make(d, state=True)
        ops.state_input_bwd(g, dx, dline)
        values = ops.state_input_fwd(h, x, line), ops.state_input_fwd(h, None, line), dx, dline
        return named("out line dx dline", values)

    check(case, dtype)


@pytest.mark.parametrize(
    ("d", "dtype"),
    [(16, torch.float32), (33, torch.float16), (136, torch.float32), (520, torch.float16)],
)
def test_branches_without_a_residual(d: int, dtype: torch.dtype) -> None:
    """The residual stream is in fp32; what is not added to it stays in the weights' dtype."""

    def case(ops: Ops, make: Make) -> Outputs:
        x, norm_weight, a = make(9, d, state=True), make.positive(d), make(9, 24)
        up, down = make(24, d, scale=d**-0.5), make(d, 24, scale=0.2)
        projected = ops.linear_residual_fwd(a, down, make(d), None)
        expanded, *_ = ops.mlp_fwd(x, norm_weight, None, up, None, None, None, down, None,
                                   residual=False)  # fmt: skip
        assert make.mode == "truth" or projected.dtype == expanded.dtype == dtype
        return {"projected": projected, "expanded": expanded}

    check(case, dtype)


@pytest.mark.parametrize("count", [0, 65, 150])
def test_row_counts(count: int) -> None:
    """Rows beyond the count are neither read nor written, and do not enter the sums."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(DEVICE)
    z, g, angle = draw(150, 64), draw(150, 64), draw(150, 8)
    branch, x, dout = draw(150, 16), draw(150, 16), draw(150, 16)
    head, weight = draw(16), draw(16)
    ops = select("triton", DEVICE)

    def run(rows: int, **options) -> dict[str, torch.Tensor]:
        tables = angle[:rows].cos(), angle[:rows].sin()
        shared = (z[:rows], head, head + 1, 2, 1, *tables)
        out = ops.qk_norm_fwd(*shared, **options)
        dz, dq, dk = ops.qk_norm_bwd(g[:rows], *shared, **options)
        norm = (branch[:rows], weight, weight)
        dropped = dropout_of(150, 0.3)
        dropped = dropped._replace(tokens=dropped.tokens[:rows])
        added = ops.norm_residual_fwd(*norm, x[:rows], 1e-6, "layer", dropped, **options)
        db, dw, dbias = ops.norm_residual_bwd(dout[:rows], *norm, 1e-6, "layer", dropped, **options)
        return named("out dz added db sum-q sum-k sum-w sum-b",
                       (out, dz, added, db, dq, dk, dw, dbias))  # fmt: skip

    truth = run(count)
    for t in (z, g, branch, x, dout, angle):
        t[count:] = float("nan")
    with guarded_outputs():
        got = run(150, row_count=torch.tensor([count], dtype=torch.int32, device=DEVICE))
    for name, t in truth.items():
        value = got[name]
        if not name.startswith("sum"):
            assert value[count:].isnan().all(), name
            value = value[:count]
        assert value.shape == t.shape
        assert not t.any() and not value.any() or rms_ratio(value, t) <= 1e-5, describe(
            name, value, t
        )


def test_refusals() -> None:
    new = lambda *shape: torch.randn(shape, device=DEVICE)
    ops, z, w, x = select("triton", DEVICE), new(4, 64), new(16), new(4, 16)
    refused = lambda match: pytest.raises(Unsupported, match=match)
    with refused(r"q_weight is \(8,\) instead of \(16,\)"):
        ops.qk_norm_fwd(z, new(8), w, 2, 1)
    with refused("64 columns are not 2"):
        ops.qk_norm_fwd(z, w, w, 2, 2)
    with refused("entries for 4 rows"):
        ops.qk_norm_fwd(z, w, w, 2, 1, new(3, 8), new(3, 8))
    with refused(r"dqkv is \(3, 64\) instead of \(4, 64\)"):
        ops.qk_norm_bwd(z[:3], z, w, w, 2, 1)
    with refused(r"residual is \(3, 16\) instead of \(4, 16\)"):
        ops.norm_residual_fwd(x, w, None, x[:3], 1e-6)
    with refused("float64 is not one of"):
        ops.norm_residual_bwd(x.double(), x, w, None, 1e-6)
