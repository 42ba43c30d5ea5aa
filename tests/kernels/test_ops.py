"""Every Triton kernel against the reference beside it: in the interpreter, or on a GPU if there is
one. `kernel_checks` has the rules."""

from __future__ import annotations

import warnings

import pytest
import torch

from benchmarks import interpreter
from benchmarks.numerics import assert_bitwise, describe, rms_ratio
from relay_fast.batch.plan import Plan
from relay_fast.functional import REFERENCE, Ops, row_cross_entropy, select
from relay_fast.kernels import mlp
from relay_fast.kernels.dropout_ref import dropout_mask_ref
from tests.support.kernel_checks import DEVICE, Make, Outputs, check, dropout_of, named

interpreter.mend()
# The interpreter computes lanes that masks throw away (0 / 0 in absent rows).
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize(
    ("rows", "d", "kind", "bias", "rope", "dtype"),
    [
        (65, 48, "rms", False, True, torch.float32),  # one row more than a block
        (65, 48, "rms", False, True, torch.float16),
        (65, 48, "rms", False, True, torch.bfloat16),
        (63, 33, "layer", True, True, torch.float32),  # one less; an odd width
        (1, 64, "layer", True, False, torch.float16),  # no RoPE: columns in plain halves
        (0, 16, "rms", False, True, torch.float32),
        (9, 520, "layer", True, True, torch.float32),  # over 512: row kernels and torch.mm
    ],
)
def test_norm_linear(rows, d, kind, bias, rope, dtype) -> None:
    head_dim, heads, kv_heads = 16, 3, 1

    def case(ops: Ops, make: Make) -> Outputs:
        columns = (heads + 2 * kv_heads) * head_dim + (0 if rope else 5)
        x, norm_weight = make(rows, d, state=True), make.positive(d)
        norm_bias = make(d, scale=0.1, state=True) if bias else None
        weight = make(columns, d, scale=d**-0.5)
        b = make(columns) if bias else None
        angle = make(rows, head_dim // 2, state=True)
        cos, sin = (angle.cos(), angle.sin()) if rope else (None, None)
        rotary = (heads + kv_heads) * head_dim if rope else 0
        shared = (cos, sin, rotary, 1e-6, kind)
        out = ops.norm_linear_fwd(x, norm_weight, norm_bias, weight, b, *shared)
        dx, dnw, dnb, dz, y = ops.norm_linear_bwd(
            make(rows, columns), x, norm_weight, norm_bias, weight, *shared
        )
        dnb = dnb if bias else None
        return named("out dx dnorm_weight dnorm_bias dz y", (out, dx, dnw, dnb, dz, y))

    check(case, dtype)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "head_dim", "dtype"),
    [
        ((5, 0, 31, 1), 2, 2, 16, torch.float32),  # mixed, with an empty sequence
        ((63, 65), 2, 1, 16, torch.float16),  # a block and one row: 128 slots; shared keys
        ((127,), 1, 1, 24, torch.bfloat16),  # no power of two
        ((40, 33), 4, 2, 16, torch.float32),  # long in fp32: over one block of 32
        ((130, 64, 1), 2, 1, 32, torch.float16),  # long: over 128 rows
        ((), 2, 2, 16, torch.float32),
    ],
)
def test_attention(lengths, heads, kv_heads, head_dim, causal, dtype) -> None:
    rows = sum(lengths)
    plan = Plan(lengths, [1] * len(lengths), DEVICE)
    layout = plan.layout(0, len(lengths))

    def case(ops: Ops, make: Make) -> Outputs:
        qkv = make(rows, (heads + 2 * kv_heads) * head_dim)
        forward = {} if make.mode == "kernel" else {"with_lse": True}
        o, lse = ops.attention_fwd(qkv, layout, heads, kv_heads, causal, **forward)
        do = make(rows, heads * head_dim)
        dqkv = ops.attention_bwd(do, qkv, o, lse, layout, heads, kv_heads, causal)
        return {"o": o, "lse": lse, "dqkv": dqkv}

    check(case, dtype)


@pytest.mark.parametrize(
    ("rows", "columns", "d", "bias", "p", "dtype"),
    [
        (65, 48, 40, False, 0.0, torch.float32),
        (63, 65, 33, True, 0.3, torch.float32),
        (65, 65, 65, True, 0.3, torch.float16),
        (1, 16, 16, False, 0.0, torch.bfloat16),
        (0, 16, 16, False, 0.0, torch.float32),
    ],
)
def test_linear_residual(rows, columns, d, bias, p, dtype) -> None:
    def case(ops: Ops, make: Make) -> Outputs:
        a, weight = make(rows, columns), make(d, columns, scale=columns**-0.5)
        b, residual = make(d) if bias else None, make(rows, d, state=True)
        dropout = dropout_of(rows, p)
        out = ops.linear_residual_fwd(a, weight, b, residual, dropout)
        da, dbranch = ops.linear_residual_bwd(make(rows, d, state=True), weight, dropout)
        return {"out": out, "da": da, "dbranch": dbranch}

    check(case, dtype)


@pytest.mark.parametrize(
    ("rows", "d", "hidden", "activation", "kind", "bias", "p", "dtype"),
    [
        (65, 48, 72, "gelu_tanh", "rms", False, 0.0, torch.float32),
        (65, 48, 72, "gelu_tanh", "rms", False, 0.0, torch.float16),
        (65, 48, 72, "gelu_tanh", "rms", False, 0.0, torch.bfloat16),
        (19, 33, 65, "gelu", "layer", True, 0.3, torch.float32),
        (63, 64, 65, "swiglu", "layer", True, 0.3, torch.float16),
        (1, 16, 127, "relu2", "rms", True, 0.0, torch.float32),
        (0, 16, 16, "gelu_tanh", "rms", False, 0.0, torch.float32),
        (17, 136, 64, "gelu_tanh", "rms", True, 0.0, torch.float32),  # the hidden layer in memory
        (17, 136, 64, "swiglu", "layer", True, 0.3, torch.float32),
        (17, 264, 33, "swiglu", "layer", True, 0.3, torch.float16),
        (17, 264, 33, "gelu", "rms", False, 0.0, torch.bfloat16),
        (17, 136, 33, "gelu_tanh", "rms", True, 0.3, torch.float16),  # few rows
    ],
)
def test_mlp(rows, d, hidden, activation, kind, bias, p, dtype) -> None:
    def case(ops: Ops, make: Make) -> Outputs:
        x, norm_weight = make(rows, d, state=True), make.positive(d)
        norm_bias, up_bias = (make(d, scale=0.1, state=True), make(hidden)) if bias else (None,) * 2
        gated = activation == "swiglu"
        up_weight, down_weight = make(hidden, d, scale=d**-0.5), make(d, hidden, scale=hidden**-0.5)
        gate_weight = make(hidden, d, scale=d**-0.5) if gated else None
        gate_bias = make(hidden) if gated and bias else None
        down_bias = make(d) if bias else None
        dropout = dropout_of(rows, p)
        out, up, gate, a = ops.mlp_fwd(
            x, norm_weight, norm_bias, up_weight, up_bias, gate_weight, gate_bias, down_weight,
            down_bias, activation, 1e-6, kind, dropout,
        )  # fmt: skip
        dx, dnw, dnb, y, dup, dgate, dbranch = ops.mlp_bwd(
            make(rows, d, state=True), x, up, gate, norm_weight, norm_bias, up_weight,
            gate_weight, down_weight, activation, 1e-6, kind, dropout,
        )  # fmt: skip
        return named(
            "out up gate a dx dnorm_weight dnorm_bias y dup dgate dbranch",
            (out, up, gate, a, dx, dnw, dnb if bias else None, y, dup, dgate, dbranch),
        )

    check(case, dtype)


@pytest.mark.parametrize("d", [16, 136, 264])  # one kernel; two; torch's GEMMs
@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_mlp_that_keeps_nothing_computes_the_same(activation: str, d: int) -> None:
    make = Make("kernel", torch.float32)
    x, norm_weight, up, down = make(9, d), make.positive(d), make(24, d), make(d, 24)
    gate = make(24, d) if activation == "swiglu" else None
    args = (x, norm_weight, None, up, None, gate, None, down, None, activation)
    ops = select("triton", DEVICE)
    kept, dropped = ops.mlp_fwd(*args), ops.mlp_fwd(*args, keep=False)
    assert_bitwise("out", dropped[0], kept[0])
    assert dropped[1:] == (None, None, None)


def test_few_rows_leave_the_hidden_layer_in_memory(monkeypatch) -> None:
    few = lambda rows, d, dtype: mlp._has_few_rows(rows, d, dtype, torch.device("cpu"))
    # 132 processors, blocks of 64 rows
    assert few(64 * 66, 256, torch.bfloat16) and not few(64 * 66 + 1, 256, torch.bfloat16)
    assert not few(64, 256, torch.float32) and not few(64, 128, torch.bfloat16)
    make, ops = Make("eager", torch.float16), select("triton", DEVICE)
    args = (make(9, 136, state=True), make.positive(136), None, make(24, 136, scale=0.1), None,
            None, None, make(136, 24, scale=0.2), None)  # fmt: skip
    apart, alone = ops.mlp_fwd(*args), ops.mlp_fwd(*args, keep=False)
    monkeypatch.setattr(mlp, "_has_few_rows", lambda *_: False)
    for name, a, b in zip(("out", "up", "gate", "hidden"), apart, ops.mlp_fwd(*args), strict=True):
        assert (a is None and b is None) or rms_ratio(a, b) < 1e-3, name
    assert_bitwise("out", alone[0], apart[0])


@pytest.mark.parametrize(
    ("rows", "states", "d", "vocabulary", "kind", "smoothing", "z_loss", "dtype"),
    [
        (65, 80, 48, 130, "rms", 0.0, 0.0, torch.float32),
        (65, 80, 48, 130, "rms", 0.0, 0.0, torch.float16),
        (65, 80, 48, 130, "rms", 0.0, 0.0, torch.bfloat16),
        (63, 63, 33, 1, "layer", 0.1, 0.01, torch.float32),  # a vocabulary of one: loss 0
        (1, 1, 16, 17, "layer", 0.1, 0.01, torch.float16),
        (0, 4, 16, 17, "rms", 0.0, 0.0, torch.float32),
        (5, 9, 16, 1040, "rms", 0.1, 0.01, torch.float16),  # split over programs
    ],
)
def test_cross_entropy(rows, states, d, vocabulary, kind, smoothing, z_loss, dtype) -> None:
    def case(ops: Ops, make: Make) -> Outputs:
        h, norm_weight, norm_bias = make(states, d, state=True), make.positive(d), make(d)
        norm_bias = norm_bias.to(norm_weight.dtype) * 0.1 if kind == "layer" else None
        head = make(vocabulary, d, scale=d**-0.5)
        targets = make.ints(-1, vocabulary, rows)
        options = (make.order(states, rows), 1e-6, kind, smoothing, z_loss)
        loss, lse, correct = ops.cross_entropy_fwd(
            h, targets, norm_weight, norm_bias, head, *options
        )
        sums = [
            make.zeros(vocabulary, d),
            make.zeros(d),
            make.zeros(d) if kind == "layer" else None,
        ]
        dh = ops.cross_entropy_bwd(
            make(rows, state=True), h, targets, lse, norm_weight, norm_bias, head, *sums, *options
        )
        outputs = {"loss": loss, "lse": lse, "dh": dh}
        if dtype == torch.float32:  # elsewhere two logits may round to the same
            outputs["correct"] = correct
            outputs["argmax"] = ops.argmax(h, norm_weight, norm_bias, head, 1e-6, kind)
        names = ("dhead", "dnorm_weight", "dnorm_bias")
        return outputs | {n: s for n, s in zip(names, sums, strict=True) if s is not None}

    if vocabulary == 1:  # one token: everything is 0 but the z-loss
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = case(select("triton", DEVICE), Make("kernel", dtype))
            truth = case(REFERENCE, Make("truth", dtype))
        for name in ("loss", "dh", "dhead"):
            assert (value[name] - truth[name]).abs().max() < 1e-5, name
        return
    check(case, dtype)


@pytest.mark.parametrize(
    ("rows", "d", "vocabulary", "kind", "smoothing", "z_loss", "dtype"),
    [
        (7, 24, 130, "rms", 0.0, 0.0, torch.float32),
        (7, 24, 130, "layer", 0.1, 0.01, torch.float16),
        (5, 16, 5000, "rms", 0.1, 0.01, torch.bfloat16),  # over one block of the vocabulary
        (0, 16, 17, "rms", 0.0, 0.0, torch.float32),
    ],
)
@pytest.mark.parametrize("frozen", ["", "head", "norm"])
def test_cross_entropy_grad(
    monkeypatch, rows, d, vocabulary, kind, smoothing, z_loss, frozen, dtype
) -> None:
    """Chunks of 3 rows; a row in three is ignored."""
    monkeypatch.setattr("relay_fast.kernels.cross_entropy_grad.CHUNK_LOGITS", 3 * vocabulary)

    def case(ops: Ops, make: Make) -> Outputs:
        h, norm_weight = make(rows + 4, d, state=True), make.positive(d)
        norm_bias = make(d, scale=0.1, state=True) if kind == "layer" else None
        head, grad = make(vocabulary, d, scale=d**-0.5), make(rows, state=True)
        targets = make.ints(0, vocabulary, rows)
        targets[::3] = -1
        sums = [
            None if frozen == "head" else make.zeros(vocabulary, d),
            None if frozen == "norm" else make.zeros(d),
            None if frozen == "norm" or kind == "rms" else make.zeros(d),
        ]
        options = (make.order(rows + 4, rows), 1e-6, kind, smoothing, z_loss)
        loss, dh = ops.cross_entropy_grad(
            grad, h, targets, norm_weight, norm_bias, head, *sums, *options
        )
        return named("loss dh dhead dnorm_weight dnorm_bias", (loss, dh, *sums))

    check(case, dtype)


def test_cross_entropy_of_extreme_logits() -> None:
    """Logits of ±1e4: the loss stays finite, its gradient in [−1, 1]."""
    ops, rows, d, vocabulary = select("triton", DEVICE), 7, 16, 33
    h = torch.randn(rows, d, device=DEVICE)
    weight, head = torch.ones(d, device=DEVICE), torch.randn(vocabulary, d, device=DEVICE) * 3e3
    targets = torch.arange(rows, device=DEVICE)
    args = (weight, None, head)
    loss, lse, correct = ops.cross_entropy_fwd(h, targets, *args)
    truth = REFERENCE.cross_entropy_fwd(h.double(), targets, weight.double(), None, head.double())
    torch.testing.assert_close(loss, truth[0].float(), rtol=1e-5, atol=1e-2)
    assert torch.equal(correct, truth[2])
    dh = ops.cross_entropy_bwd(torch.ones_like(loss), h, targets, lse, *args, None, None, None)
    assert dh.isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", [20, 40])  # fp32: one tile, several
def test_attention_of_extreme_scores(rows: int, causal: bool) -> None:
    """Scores of ±1e5: p is 0 or 1, nothing overflows."""
    ops, layout = select("triton", DEVICE), Plan([rows], [1], DEVICE).layout(0, 1)
    qkv = torch.randn(rows, 48, device=DEVICE) * 150
    do = torch.randn(rows, 16, device=DEVICE)
    o, lse = ops.attention_fwd(qkv, layout, 1, 1, causal)
    dqkv = ops.attention_bwd(do, qkv, o, lse, layout, 1, 1, causal)
    wide = qkv.double()
    truth, _ = REFERENCE.attention_fwd(wide, layout, 1, 1, causal)
    torch.testing.assert_close(o, truth.float(), rtol=1e-3, atol=1e-3)
    assert lse.isfinite().all() and dqkv.isfinite().all()


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "relu2", "swiglu"])
def test_mlp_of_extreme_values(activation: str) -> None:
    """Pre-activations of ±1e6 in fp32: a saturated activation, its slope 0 or 1."""
    ops, rows, d = select("triton", DEVICE), 5, 16
    x, norm = torch.randn(rows, d, device=DEVICE), torch.ones(d, device=DEVICE)
    up, down = (torch.randn(d, d, device=DEVICE) * s for s in (1e6, 1e-6))
    gate = up.flip(0) * 1e-3 if activation == "swiglu" else None
    out, pre, opened, _ = ops.mlp_fwd(x, norm, None, up, None, gate, None, down, None, activation)
    truth = REFERENCE.mlp_fwd(x, norm, None, up, None, gate, None, down, None, activation)[0]
    torch.testing.assert_close(out, truth, rtol=1e-4, atol=1e-4)
    grads = ops.mlp_bwd(x, x, pre, opened, norm, None, up, gate, down, activation)
    assert all(g is None or g.isfinite().all() for g in grads)


@pytest.mark.parametrize("frozen", range(2**4 - 1))
def test_cross_entropy_with_every_combination_of_frozen_inputs(frozen: int) -> None:
    """The gradients of what is left, through the public op; grad of a sum has stride zero."""

    def gradients(impl: str, dtype: torch.dtype) -> Outputs:
        make = Make("eager", torch.float32)
        named = {"states": make(9, 16), "norm": make(16), "bias": make(16), "head": make(20, 16)}
        targets, rows = make.ints(-1, 20, 5), make.order(9, 5)
        named = {n: t.to(dtype) for n, t in named.items()}
        for bit, t in enumerate(named.values()):
            t.requires_grad_(not frozen >> bit & 1)
        loss, _ = row_cross_entropy(
            named["states"],
            rows,
            targets,
            named["norm"],
            named["head"],
            named["bias"],
            norm="layer",
            impl=impl,
        )
        loss.sum().backward()
        return {n: t.grad for n, t in named.items() if t.grad is not None}

    value, truth = gradients("triton", torch.float32), gradients("torch", torch.float64)
    assert set(value) == set(truth) and len(value) == 4 - frozen.bit_count()
    for name, t in truth.items():
        assert rms_ratio(value[name], t) <= 1e-5, describe(name, value[name], t)


def test_ignored_rows_alone() -> None:
    ops = select("triton", DEVICE)
    h, weight, head = torch.randn(5, 16), torch.ones(16), torch.randn(20, 16)
    h, weight, head = (t.to(DEVICE) for t in (h, weight, head))
    targets = torch.full((5,), -1, device=DEVICE)
    loss, lse, correct = ops.cross_entropy_fwd(h, targets, weight, None, head)
    sums = (torch.zeros_like(head), torch.zeros_like(weight), None)
    dh = ops.cross_entropy_bwd(torch.ones_like(loss), h, targets, lse, weight, None, head, *sums)
    assert not loss.any() and not correct.any() and not dh.any() and not sums[0].any()


@pytest.mark.parametrize(
    ("rows", "columns", "d", "dtype"),
    [
        (300, 40, 33, torch.float32),  # rows split over programs
        (65, 33, 64, torch.float16),
        (300, 130, 65, torch.bfloat16),
        (1, 16, 16, torch.float32),
        (0, 16, 16, torch.float32),
    ],
)
def test_weight_grad(rows, columns, d, dtype) -> None:
    def case(ops: Ops, make: Make) -> Outputs:
        acc = make(columns, d, state=True).clone()
        ops.weight_grad(acc, make(rows, columns), make(rows, d))
        return {"acc": acc}

    check(case, dtype)


def test_strided_gradients() -> None:
    """Zero-stride (expanded) and non-contiguous gradients give what contiguous ones give."""
    ops, rows, d, columns = select("triton", DEVICE), 20, 16, 48
    make = Make("eager", torch.float32)
    x, norm_weight, weight = make(rows, d), make.positive(d), make(columns, d)
    angle = make(rows, 8)
    rope = (angle.cos(), angle.sin(), 32)
    expanded = make(1, columns).expand(rows, columns)
    turned = make(columns, rows).t()
    for grad in (expanded, turned):
        before = grad.clone()
        given = ops.norm_linear_bwd(grad, x, norm_weight, None, weight, *rope)
        dense = ops.norm_linear_bwd(before.clone(), x, norm_weight, None, weight, *rope)
        for a, b in zip(given, dense, strict=True):
            assert a is None or torch.equal(a, b)
        assert torch.equal(grad, before)
        acc, acc_dense = torch.zeros_like(weight), torch.zeros_like(weight)
        ops.weight_grad(acc, grad, x)
        ops.weight_grad(acc_dense, before, x)
        assert torch.equal(acc, acc_dense)
    layout = Plan([rows], [1], DEVICE).layout(0, 1)
    qkv = make(rows, columns)
    o, lse = ops.attention_fwd(qkv, layout, 1, 1, False)
    do = make(1, d).expand(rows, d)
    a = ops.attention_bwd(do, qkv, o, lse, layout, 1, 1, False)
    assert torch.equal(a, ops.attention_bwd(do.contiguous(), qkv, o, lse, layout, 1, 1, False))
    up, down, targets = make(24, d), make(d, 24), make.ints(0, columns, rows)
    _, pre, gate, _ = ops.mlp_fwd(x, norm_weight, None, up, None, None, None, down, None)
    _, lse, _ = ops.cross_entropy_fwd(x, targets, norm_weight, None, weight)
    readout = (norm_weight, None, weight)
    for grad in (make(1, d).expand(rows, d), make(d, rows).t(), make(rows, 2 * d)[:, ::2]):
        calls = [
            lambda g: ops.linear_residual_bwd(g, down),
            lambda g: ops.mlp_bwd(g, x, pre, gate, norm_weight, None, up, None, down),
            lambda g: ops.linear_residual_fwd(x, up[:d, :], None, g),
            lambda g: ops.cross_entropy_bwd(
                g[:, 0], x, targets, lse, *readout, None, None, None
            ),
            lambda g: ops.cross_entropy_grad(g[:, 0], x, targets, *readout, None, None, None),
        ]  # fmt: skip
        for call in calls:
            given, dense = call(grad), call(grad.contiguous())
            pairs = zip(given, dense, strict=True) if isinstance(given, tuple) else [(given, dense)]
            assert all(a is None or torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("p", [0.01, 0.5, 0.9])
def test_dropout_draws_the_same_integers(p: float) -> None:
    rows, columns = 37, 29
    dropout = dropout_of(rows, p)
    a = torch.zeros(rows, 16, device=DEVICE)
    weight, bias = torch.zeros(columns, 16, device=DEVICE), torch.ones(columns, device=DEVICE)
    residual = torch.zeros(rows, columns, device=DEVICE)
    out = select("triton", DEVICE).linear_residual_fwd(a, weight, bias, residual, dropout)
    torch.testing.assert_close(out, dropout_mask_ref(dropout, columns, torch.float32))
