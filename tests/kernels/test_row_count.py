"""Row counts on the device: with `row_count` a launch of many rows gives what one of fewer rows
gives, reads nothing of the rows beyond (they are NaN) and writes nothing there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import interpreter
from benchmarks.numerics import describe, rms_ratio
from relay_fast.kernels.attention_ref import PaddedLayout
from relay_fast.kernels.supports import Unsupported
from relay_fast.ops.dispatch import TORCH, Ops, _auto_ops, select
from tests.support.kernel_checks import DEVICE, dropout_of, guarded_outputs

interpreter.mend()
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CAPACITY = 150  # over two blocks of 64 rows
Case = Callable[[Ops, "Rows", dict], dict[str, Tensor]]


class Rows:
    """Draws the same rows for both launches: all of the capacity, NaN beyond the count, or just the
    counted ones."""

    def __init__(self, count: int, cut: bool):
        self.count, self.cut = count, cut
        self.generator = torch.Generator().manual_seed(0)

    def shared(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(DEVICE)

    def __call__(self, *columns: int) -> Tensor:
        drawn = self.shared(CAPACITY, *columns)
        drawn[self.count :] = float("nan")
        return drawn[: self.count] if self.cut else drawn

    def ints(self, high: int) -> Tensor:
        """Beyond the count: indices that no buffer has."""
        drawn = torch.randint(-1, high, (CAPACITY,), generator=self.generator).to(DEVICE)
        drawn[self.count :] = 1 << 40
        return drawn[: self.count] if self.cut else drawn


def compare(case: Case, count: int, beyond_is_zero: bool = False) -> None:
    """By-row outputs agree in the counted rows and are untouched beyond; sums agree."""
    ops = select("triton", DEVICE)
    expected = case(ops, Rows(count, cut=True), {})
    row_count = torch.tensor([count], dtype=torch.int32, device=DEVICE)
    with guarded_outputs():
        value = case(ops, Rows(count, cut=False), {"row_count": row_count})
    for name, t in expected.items():
        v = value[name]
        if not name.startswith("sum "):
            assert v.shape[0] == CAPACITY, name
            beyond = v[count:]
            assert (beyond == 0).all() if beyond_is_zero else beyond.isnan().all(), name
            v = v[:count]
        assert v.shape == t.shape, name
        if t.is_floating_point():
            assert rms_ratio(v, t) <= 1e-5 if t.any() else not v.any(), describe(name, v, t)
        else:
            assert torch.equal(v, t), name


counts = pytest.mark.parametrize("count", [0, 65, CAPACITY])


@counts
def test_norm_linear(count: int) -> None:
    def case(ops: Ops, rows: Rows, options: dict) -> dict[str, Tensor]:
        x, weight, norm = rows(16), rows.shared(48, 16), rows.shared(16)
        cos, sin = rows(8), rows(8)
        shared = (cos, sin, 32, 1e-6, "layer")
        out = ops.norm_linear_fwd(x, norm, norm, weight, None, *shared, **options)
        dx, dnw, dnb, dz, y = ops.norm_linear_bwd(
            rows(48), x, norm, norm, weight, *shared, **options
        )
        return {"out": out, "dx": dx, "sum w": dnw, "sum b": dnb, "dz": dz, "y": y}

    compare(case, count)


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
@pytest.mark.parametrize(("count", "d"), [(0, 16), (65, 16), (33, 136), (9, 264), (CAPACITY, 16)])
def test_mlp_and_linear_residual(count: int, d: int, activation: str) -> None:
    """In fp32 the hidden layer lies in memory from d = 129 on, torch multiplies from 257 on."""

    def case(ops: Ops, rows: Rows, options: dict) -> dict[str, Tensor]:
        x, norm, g = rows(d), rows.shared(d), rows(d)
        up_weight, down_weight = rows.shared(24, d), rows.shared(d, 24)
        gate_weight = rows.shared(24, d) if activation == "swiglu" else None
        dropout = dropout_of(x.shape[0], 0.3)
        if dropout is not None:  # the same tokens in both launches
            dropout = dropout._replace(tokens=torch.arange(x.shape[0], device=DEVICE))
        out, up, gate, a = ops.mlp_fwd(
            x, norm, None, up_weight, None, gate_weight, None, down_weight, None, activation,
            dropout=dropout, **options,
        )  # fmt: skip
        dx, dnw, _, y, _, _, dbranch = ops.mlp_bwd(
            g, x, up, gate, norm, None, up_weight, gate_weight, down_weight, activation,
            dropout=dropout, **options,
        )  # fmt: skip
        projected = ops.linear_residual_fwd(a, down_weight, None, x, dropout, **options)
        da, _ = ops.linear_residual_bwd(g, down_weight, dropout, **options)
        return {
            "out": out, "dx": dx, "sum w": dnw, "y": y, "dbranch": dbranch,
            "projected": projected, "da": da,
        }  # fmt: skip

    compare(case, count)


@pytest.mark.parametrize("longest", [30, 70])  # fp32: short up to 32 rows, long above
@pytest.mark.parametrize("sequences", [0, 2, 3])
def test_attention(longest: int, sequences: int) -> None:
    """Sequences beyond the count are left out, as are the empty ones that fill the capacity."""
    lengths = [9, longest, 20]
    ends = torch.tensor([0, *lengths, 0, 0]).cumsum(0).to(DEVICE, torch.int32)
    count = int(ends[sequences])

    def case(ops: Ops, rows: Rows, options: dict) -> dict[str, Tensor]:
        cu = ends[: sequences + 1] if rows.cut else ends
        layout = PaddedLayout(cu, longest, lambda: (0, None, ()))
        qkv = rows(4 * 16)
        o, lse = ops.attention_fwd(qkv, layout, 2, 1, True, **options)
        dqkv = ops.attention_bwd(rows(32), qkv, o, lse, layout, 2, 1, True, **options)
        return {"o": o, "lse": lse, "dqkv": dqkv}

    compare(case, count)


@pytest.mark.parametrize(("count", "vocabulary"), [(0, 20), (65, 20), (17, 1040), (CAPACITY, 20)])
def test_cross_entropy(count: int, vocabulary: int, monkeypatch) -> None:
    """Outputs are 0 beyond the count, so that they may be summed; rows come in two chunks."""
    monkeypatch.setattr("relay_fast.kernels.cross_entropy_bwd.CHUNK_LOGITS", 0)
    monkeypatch.setattr("relay_fast.kernels.cross_entropy_bwd.CHUNK_ROWS", 40)

    def case(ops: Ops, rows: Rows, options: dict) -> dict[str, Tensor]:
        h, norm, head = rows.shared(30, 16), rows.shared(16), rows.shared(vocabulary, 16)
        index, targets = rows.ints(30).clamp(min=0), rows.ints(vocabulary)
        loss, lse, correct = ops.cross_entropy_fwd(h, targets, norm, None, head, index, **options)
        sums = torch.zeros_like(head), torch.zeros_like(norm)
        dh = ops.cross_entropy_bwd(
            rows(), h, targets, lse, norm, None, head, *sums, None, index, **options
        )
        outputs = {"loss": loss, "correct": correct, "dh": dh}
        return outputs | {"sum head": sums[0], "sum norm": sums[1]}

    compare(case, count, beyond_is_zero=True)


@counts
def test_argmax(count: int) -> None:
    def case(ops: Ops, rows: Rows, options: dict) -> dict[str, Tensor]:
        h = rows(16)
        return {"ids": ops.argmax(h, rows.shared(16), None, rows.shared(20, 16), **options)}

    compare(case, count, beyond_is_zero=True)


@counts
def test_weight_grad(count: int) -> None:
    """The rows are split over two programs; `offset` counts rows that came before."""

    def case(ops: Ops, rows: Rows, options: dict) -> dict[str, Tensor]:
        acc, dy, x = rows.shared(24, 16), rows(24), rows(16)
        ops.weight_grad(acc, dy, x, **options)
        ops.weight_grad(acc, dy[40:], x[40:], **options, **({"offset": 40} if options else {}))
        return {"sum acc": acc}

    compare(case, count)


@counts
@pytest.mark.parametrize("parts", ["x", "line", "x line"])
def test_state_input(count: int, parts: str) -> None:
    def case(ops: Ops, rows: Rows, options: dict) -> dict[str, Tensor]:
        h, g, x, line = rows(20), rows(20), rows(20), rows.shared(20)
        dline = rows.shared(20)
        given = [x if "x" in parts else None, line if "line" in parts else None]
        out = ops.state_input_fwd(h, *given, **options)
        dx = rows(20)
        into = [dx if "x" in parts else None, dline if "line" in parts else None]
        ops.state_input_bwd(g, *into, **options)
        return {"out": out, "dx": dx, "sum line": dline}

    compare(case, count)


def test_refusals() -> None:
    ops = select("triton", DEVICE)
    x, weight = torch.randn(4, 16, device=DEVICE), torch.randn(48, 16, device=DEVICE)
    call = lambda row_count: ops.norm_linear_fwd(x, x[0], None, weight, None, row_count=row_count)
    with pytest.raises(Unsupported, match=r"row_count is \(2,\) int32 instead of one int32"):
        call(torch.zeros(2, dtype=torch.int32, device=DEVICE))
    with pytest.raises(Unsupported, match=r"row_count is \(1,\) int64 instead of one int32"):
        call(torch.zeros(1, dtype=torch.int64, device=DEVICE))
    with pytest.raises(Unsupported, match="row_count is on meta"):
        call(torch.zeros(1, dtype=torch.int32, device="meta"))
    one = torch.ones(1, dtype=torch.int32, device=DEVICE)
    wide = torch.randn(4, 520, device=DEVICE)
    with pytest.raises(Unsupported, match="width 520 does not support row_count"):
        ops.argmax(wide, wide[0], None, wide, row_count=one)


def test_auto_does_not_hand_a_row_count_to_the_reference() -> None:
    """The reference would take all rows of the capacity."""
    ops, x = _auto_ops(), torch.randn(4, 16, dtype=torch.float64, device=DEVICE)
    weight = torch.randn(48, 16, dtype=torch.float64, device=DEVICE)
    one = torch.ones(1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(Unsupported, match="float64"):
        ops.norm_linear_fwd(x, x[0], None, weight, None, row_count=one)
    out = ops.norm_linear_fwd(x, x[0], None, weight, None, row_count=None)
    assert torch.equal(out, TORCH.norm_linear_fwd(x, x[0], None, weight, None))


def test_a_counted_target_out_of_range_is_refused() -> None:
    """On the host, where it can be seen; what lies beyond the count is not read."""
    h, norm, head = torch.randn(4, 16), torch.ones(16), torch.randn(20, 16)
    if DEVICE != "cpu":
        pytest.skip("lists on a card are not read")
    ops = select("triton", DEVICE)
    targets = torch.tensor([3, 19, 20, 1 << 40])
    two, three = (torch.tensor([n], dtype=torch.int32) for n in (2, 3))
    loss, _, _ = ops.cross_entropy_fwd(h, targets, norm, None, head, row_count=two)
    assert (loss[:2] > 0).all() and (loss[2:] == 0).all()
    with pytest.raises(ValueError, match="target 20 is outside of the vocabulary of 20"):
        ops.cross_entropy_fwd(h, targets, norm, None, head, row_count=three)
