"""Every hand-written forward and backward of kernels/*_ref.py against autograd in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.numerics import assert_bitwise, assert_close
from relay_fast.batch.plan import Plan
from relay_fast.functional import iteration_cross_entropy, row_cross_entropy
from relay_fast.kernels.attention_cpu import attention_bwd_cpu, attention_fwd_cpu
from relay_fast.kernels.attention_ref import attention_bwd_ref, attention_fwd_ref
from relay_fast.kernels.cross_entropy_ref import (
    argmax_ref,
    cross_entropy_bwd_ref,
    cross_entropy_fwd_ref,
)
from relay_fast.kernels.dropout_ref import Dropout, dropout_mask_ref
from relay_fast.kernels.linear_residual_ref import linear_residual_bwd_ref, linear_residual_fwd_ref
from relay_fast.kernels.mlp_ref import ACTIVATIONS, mlp_bwd_ref, mlp_fwd_ref
from relay_fast.kernels.norm_linear_ref import norm_linear_bwd_ref, norm_linear_fwd_ref
from relay_fast.kernels.norm_ref import NORMS, norm_bwd_ref, norm_fwd_ref
from relay_fast.kernels.weight_grad_ref import weight_grad_ref

EPS = 1e-6
ROWS = (0, 1, 63)  # none, one, and no multiple of anything


def randn(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_(grad)


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """The norm as everybody writes it."""
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)
    y = F.rms_norm(x, x.shape[-1:], weight, EPS)
    return y if bias is None else y + bias


def gradients(loss: Tensor, *inputs: Tensor | None) -> list[Tensor | None]:
    """Autograd's gradients, zeros for what is not used, None for what is absent."""
    present = [t for t in inputs if t is not None]
    grads = iter(torch.autograd.grad(loss, present, allow_unused=True, materialize_grads=True))
    return [None if t is None else next(grads) for t in inputs]


def weight_grad(dy: Tensor, x: Tensor) -> Tensor:
    acc = torch.zeros(dy.shape[1], x.shape[1], dtype=torch.float64)
    weight_grad_ref(acc, dy, x)
    return acc


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", NORMS)
def test_norm(kind: str, bias: bool, rows: int) -> None:
    x, weight, b = randn(rows, 12), randn(12), randn(12) if bias else None
    y, g = norm(x, weight, b, kind), randn(rows, 12, grad=False)
    dx, dweight, dbias = gradients((y * g).sum(), x, weight, b)
    with torch.no_grad():
        assert_close("y", norm_fwd_ref(x, weight, b, EPS, kind), y)
        got = norm_bwd_ref(g, x, weight, b, EPS, kind)
    assert_close("dx", got[0], dx)
    assert_close("dweight", got[1], dweight)
    if bias:
        assert_close("dbias", got[2], dbias)
    assert_close("y again", got[3], y)


def rope(z: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Half-split rotary embedding of the first `heads` heads of z (rows, ·)."""
    width = 2 * cos.shape[1]
    turned = z[:, : heads * width].unflatten(1, (heads, width))
    a, b = turned.chunk(2, dim=-1)
    c, s = cos[:, None], sin[:, None]
    turned = torch.cat((a * c - b * s, b * c + a * s), dim=-1)
    return torch.cat((turned.flatten(1), z[:, heads * width :]), dim=1)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("heads", [0, 3])  # of 5 heads' width; 0: no RoPE
@pytest.mark.parametrize("kind", NORMS)
def test_norm_linear(kind: str, heads: int, bias: bool, rows: int) -> None:
    d, width = 12, 4
    x, weight, w = randn(rows, d), randn(d), randn(5 * width, d)
    nb, b = (randn(d), randn(5 * width)) if bias else (None, None)
    angle = torch.randn(rows, width // 2, dtype=torch.float64)
    cos, sin = angle.cos(), angle.sin()
    z = F.linear(norm(x, weight, nb, kind), w, b)
    out = rope(z, cos, sin, heads)
    g = randn(rows, 5 * width, grad=False)
    dx, dweight, dnb, dw, db = gradients((out * g).sum(), x, weight, nb, w, b)
    tables = (cos, sin, heads * width) if heads else (None, None, 0)
    with torch.no_grad():
        got = norm_linear_fwd_ref(x, weight, nb, w, b, *tables, EPS, kind)
        assert_close("out", got, out)
        got = norm_linear_bwd_ref(g, x, weight, nb, w, *tables, EPS, kind)
    assert_close("dx", got[0], dx)
    assert_close("dnorm", got[1], dweight)
    assert_close("dW", weight_grad(got[3], got[4]), dw)
    if bias:
        assert_close("dnorm bias", got[2], dnb)
        assert_close("db", got[3].sum(0), db)


LENGTHS = {
    "equal": [5, 5, 5],
    "ragged": [7, 1, 6, 2, 2, 13, 0, 3],  # length 1, and a sequence without tokens
    "groups": [90, 1, 80, 2, 40, 3, 88, 1],  # far apart: more than one attention group
    "one": [1],
    "empty": [],
    "nothing": [0, 0],
}


def attention(qkv: Tensor, lengths: list[int], heads: int, kv_heads: int, causal: bool) -> Tensor:
    """Sequence by sequence, head by head."""
    q, k, v = qkv.unflatten(1, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), 1)
    parts = [q[:0].flatten(1)]  # for a batch without sequences
    for qs, ks, vs in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        out = F.scaled_dot_product_attention(
            qs.transpose(0, 1),
            ks.repeat_interleave(heads // kv_heads, 1).transpose(0, 1),
            vs.repeat_interleave(heads // kv_heads, 1).transpose(0, 1),
            is_causal=causal,
        )
        parts.append(out.transpose(0, 1).flatten(1))
    return torch.cat(parts)


ATTENTION = {
    "reference": (attention_fwd_ref, attention_bwd_ref),
    "cpu": (attention_fwd_cpu, attention_bwd_cpu),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads, kv_heads", [(3, 3), (4, 2), (3, 1)])
@pytest.mark.parametrize("which", LENGTHS)
@pytest.mark.parametrize("implementation", ATTENTION)
def test_attention(
    implementation: str, which: str, heads: int, kv_heads: int, causal: bool
) -> None:
    forward, backward = ATTENTION[implementation]
    lengths, width = LENGTHS[which], 4
    qkv = randn(sum(lengths), (heads + 2 * kv_heads) * width)
    layout = Plan(lengths, [1] * len(lengths)).layout(0, len(lengths))
    assert which != "groups" or len(layout.groups) > 1
    out = attention(qkv, lengths, heads, kv_heads, causal)
    g = torch.randn_like(out)
    (dqkv,) = gradients((out * g).sum(), qkv)
    with torch.no_grad():
        o, lse = forward(qkv, layout, heads, kv_heads, causal)
        got = backward(g, qkv, o, lse, layout, heads, kv_heads, causal)
    assert_close("o", o, out)
    assert_close("dqkv", got, dqkv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_fused_attention_is_as_precise_as_the_reference(causal: bool, dtype) -> None:
    lengths, heads = LENGTHS["groups"], 3
    exact = randn(sum(lengths), 3 * heads * 8, grad=False).to(dtype).double()
    layout = Plan(lengths, [1] * len(lengths)).layout(0, len(lengths))
    g = randn(sum(lengths), heads * 8, grad=False).to(dtype)

    def both(pair, qkv: Tensor) -> tuple[Tensor, Tensor]:
        o, lse = pair[0](qkv, layout, heads, heads, causal)
        return o, pair[1](g.to(qkv), qkv, o, lse, layout, heads, heads, causal)

    true = both(ATTENTION["reference"], exact)
    plain, fused = (both(ATTENTION[name], exact.to(dtype)) for name in ATTENTION)
    for name, want, a, b in zip(("o", "dqkv"), true, plain, fused, strict=True):
        assert b.dtype == dtype
        error, other = ((part - want).abs().max() for part in (b, a))
        assert error <= 2 * other + 1e-7, (name, error, other)


@pytest.mark.parametrize("implementation", ATTENTION)
def test_attention_log_sum_exp(implementation: str) -> None:
    lengths, heads = [4, 7], 2
    qkv = randn(11, 3 * heads * 4, grad=False)
    layout = Plan(lengths, [1, 1]).layout(0, 2)
    options = {"with_lse": True} if implementation == "reference" else {}
    _, lse = ATTENTION[implementation][0](qkv, layout, heads, heads, False, **options)
    q, k, _ = qkv.unflatten(1, (3, heads, 4)).unbind(1)
    for rows in (slice(0, 4), slice(4, 11)):
        scores = torch.einsum("qhd,khd->qhk", q[rows], k[rows]) / 2
        assert_close("lse", lse[rows], scores.logsumexp(-1))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("into", [False, True])
def test_linear_residual(into: bool, dropped: bool, bias: bool, rows: int) -> None:
    a, w, residual = randn(rows, 10), randn(6, 10), randn(rows, 6)
    b = randn(6) if bias else None
    dropout = drop(rows) if dropped else None
    branch = F.linear(a, w, b)
    if dropped:
        branch = branch * dropout_mask_ref(dropout, 6, torch.float64)
    out, g = residual + branch, randn(rows, 6, grad=False)
    da, dw, db = gradients((out * g).sum(), a, w, b)
    with torch.no_grad():
        target = torch.empty(rows, 6, dtype=torch.float64) if into else None
        got = linear_residual_fwd_ref(a, w, b, residual, dropout, target)
        assert not into or got.data_ptr() == target.data_ptr()
        assert_close("out", got, out)
        got_da, dbranch = linear_residual_bwd_ref(g, w, dropout)
    assert_close("da", got_da, da)
    assert_close("dW", weight_grad(dbranch, a.detach()), dw)
    if bias:
        assert_close("db", dbranch.sum(0), db)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp(activation: str, kind: str, dropped: bool, bias: bool, rows: int) -> None:
    d, hidden = 6, 10
    x, weight, wu, wd = randn(rows, d), randn(d), randn(hidden, d), randn(d, hidden)
    nb, bu, bd = (randn(d), randn(hidden), randn(d)) if bias else (None, None, None)
    gated = activation == "swiglu"
    wg, bg = (randn(hidden, d) if gated else None), (randn(hidden) if gated and bias else None)
    dropout = drop(rows) if dropped else None
    y = norm(x, weight, nb, kind)
    up = F.linear(y, wu, bu)
    hidden_layer = {
        "gelu_tanh": lambda: F.gelu(up, approximate="tanh"),
        "gelu": lambda: F.gelu(up),
        "relu2": lambda: F.relu(up) ** 2,
        "swiglu": lambda: F.silu(F.linear(y, wg, bg)) * up,
    }[activation]()
    branch = F.linear(hidden_layer, wd, bd)
    if dropped:
        branch = branch * dropout_mask_ref(dropout, d, torch.float64)
    out, g = x + branch, randn(rows, d, grad=False)
    truth = gradients((out * g).sum(), x, weight, nb, wu, bu, wg, bg, wd, bd)
    with torch.no_grad():
        got, u, gate, a = mlp_fwd_ref(
            x, weight, nb, wu, bu, wg, bg, wd, bd, activation, EPS, kind, dropout
        )
        assert_close("out", got, out)
        dx, dweight, dnb, y, dup, dgate, dbranch = mlp_bwd_ref(
            g, x, u, gate, weight, nb, wu, wg, wd, activation, EPS, kind, dropout
        )
        computed = {
            "dx": (dx + g, truth[0]),
            "dnorm": (dweight, truth[1]),
            "dup": (weight_grad(dup, y), truth[3]),
            "ddown": (weight_grad(dbranch, a), truth[7]),
        }
        if gated:
            computed["dgate"] = (weight_grad(dgate, y), truth[5])
        if bias:
            computed |= {"dnorm bias": (dnb, truth[2]), "dup bias": (dup.sum(0), truth[4])}
            computed["ddown bias"] = (dbranch.sum(0), truth[8])
            if gated:
                computed["dgate bias"] = (dgate.sum(0), truth[6])
    for name, (value, expected) in computed.items():
        assert_close(name, value, expected)


def readout_inputs(rows: int, vocabulary: int = 11, d: int = 6) -> dict[str, Tensor]:
    states = randn(2 * rows + 1, d)
    return {
        "states": states,
        "rows": torch.randperm(len(states))[:rows],
        "targets": torch.randint(-1, vocabulary, (rows,)),
        "norm_weight": randn(d),
        "norm_bias": randn(d),
        "head": randn(vocabulary, d),
    }


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("smoothing, z_loss", [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.2, 1e-2)])
@pytest.mark.parametrize("kind, bias", [("rms", False), ("layer", True)])
@pytest.mark.parametrize("chunk", [1 << 22, 22])  # one chunk, and chunks of two rows
def test_cross_entropy(monkeypatch, chunk, kind, bias, smoothing, z_loss, rows) -> None:
    monkeypatch.setattr("relay_fast.kernels.cross_entropy_ref.CHUNK_LOGITS", chunk)
    i = readout_inputs(rows)
    nb = i["norm_bias"] if bias else None
    h = i["states"][i["rows"]]
    logits = norm(h, i["norm_weight"], nb, kind) @ i["head"].t()
    loss = F.cross_entropy(
        logits, i["targets"], ignore_index=-1, reduction="none", label_smoothing=smoothing
    )
    loss = loss + z_loss * logits.logsumexp(-1).square() * (i["targets"] >= 0)
    g = randn(rows, grad=False)
    dh, dweight, dnb, dhead = gradients((loss * g).sum(), h, i["norm_weight"], nb, i["head"])
    options = {"eps": EPS, "kind": kind, "label_smoothing": smoothing, "z_loss": z_loss}
    parameters = (i["norm_weight"], nb, i["head"])
    ignored = i["targets"] < 0
    with torch.no_grad():
        i["states"][i["rows"][ignored]] = float("nan")  # none of it may come through
        got, lse, correct = cross_entropy_fwd_ref(
            i["states"], i["targets"], *parameters, i["rows"], **options
        )
        assert_close("loss", got, loss)
        of_zeros = norm(h.masked_fill(ignored[:, None], 0), i["norm_weight"], nb, kind)
        assert_close("lse", lse, (of_zeros @ i["head"].t()).logsumexp(-1))
        assert_bitwise("correct", correct, logits.argmax(-1) == i["targets"])
        assert_bitwise("ids", argmax_ref(h, *parameters, EPS, kind), logits.argmax(-1))
        buffers = [torch.zeros_like(i["head"]), torch.zeros_like(i["norm_weight"])]
        buffers.append(torch.zeros_like(nb) if bias else None)
        got_dh = cross_entropy_bwd_ref(
            g, i["states"], i["targets"], lse, *parameters, *buffers, i["rows"], **options
        )
        frozen = cross_entropy_bwd_ref(
            g, i["states"], i["targets"], lse, *parameters, None, None, None, i["rows"], **options
        )
    assert_close("dh", got_dh, dh)
    assert_bitwise("dh, all frozen", frozen, got_dh)
    assert_close("dhead", buffers[0], dhead)
    assert_close("dnorm", buffers[1], dweight)
    if bias:
        assert_close("dnorm bias", buffers[2], dnb)


@pytest.mark.parametrize("frozen", ["", "states", "norm_weight", "head"])
def test_iteration_cross_entropy(frozen: str) -> None:
    i = readout_inputs(9)
    if frozen:
        i[frozen].requires_grad_(False)
    weights = torch.rand(9, dtype=torch.float64)
    loss = iteration_cross_entropy(
        i["states"], i["rows"], i["targets"], weights, i["norm_weight"], i["head"]
    )
    logits = norm(i["states"][i["rows"]], i["norm_weight"], None, "rms") @ i["head"].t()
    eager = F.cross_entropy(logits, i["targets"], ignore_index=-1, reduction="none") @ weights
    names = [n for n in ("states", "norm_weight", "head") if n != frozen]
    truth = gradients(eager, *(i[n] for n in names))
    got = gradients(loss, *(i[n] for n in names))
    assert_close("loss", loss, eager)
    for name, value, expected in zip(names, got, truth, strict=True):
        assert_close(name, value, expected)


def test_row_cross_entropy_says_what_does_not_fit() -> None:
    i = readout_inputs(4)
    with pytest.raises(ValueError, match=r"rows \(3,\) and targets \(4,\) must both be"):
        row_cross_entropy(i["states"], i["rows"][:3], i["targets"], i["norm_weight"], i["head"])
    with pytest.raises(ValueError, match="with one d"):
        row_cross_entropy(i["states"], i["rows"], i["targets"], i["norm_weight"], i["head"][:, :3])


@pytest.mark.parametrize("rows", ROWS)
def test_weight_grad_accumulates(rows: int) -> None:
    dy, x, acc = torch.randn(rows, 5), torch.randn(rows, 3), torch.randn(5, 3)
    expected = acc.double() + dy.double().t() @ x.double()
    weight_grad_ref(acc, dy, x)
    assert_close("dW", acc, expected, 1e-6)


def test_weight_grad_sums_low_precision_in_fp32() -> None:
    # In bf16 the sum would stop growing at 256.
    acc, one = torch.zeros(1, 1), torch.ones(1000, 1, dtype=torch.bfloat16)
    weight_grad_ref(acc, one, one)
    assert acc.item() == 1000


def drop(rows: int, p: float = 0.3, seed: int = 1, site: int = 1, iteration: int = 1) -> Dropout:
    return Dropout(p, torch.tensor(seed), site, iteration, torch.arange(rows))


def test_dropout_keeps_its_share_and_scales() -> None:
    mask = dropout_mask_ref(drop(1000), 256, torch.float64)
    kept = mask > 0
    assert set(mask.unique().tolist()) == {0.0, 1 / 0.7}
    sigma = (0.3 * 0.7) ** 0.5
    assert abs(float(kept.double().mean()) - 0.7) < 5 * sigma / 256_000**0.5
    for axis, n in ((0, 1000), (1, 256)):  # no row and no column is odd
        assert float((kept.double().mean(axis) - 0.7).abs().max()) < 5 * sigma / n**0.5
    # Neighbours are independent, along rows and along columns.
    centred = kept.double() - 0.7
    for product in (centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1]):
        assert abs(float(product.mean())) < 5 * sigma**2 / product.numel() ** 0.5


def test_dropout_is_a_function_of_its_counters() -> None:
    draw = lambda **other: dropout_mask_ref(drop(64, **other), 64, torch.float64)
    first = draw()
    assert_bitwise("same", draw(), first)
    for other in ({"seed": 2}, {"site": 2}, {"iteration": 2}):
        agree = float((draw(**other) == first).double().mean())
        assert abs(agree - (0.7**2 + 0.3**2)) < 0.05, other
    # A row's mask belongs to its token, wherever the row lies.
    one = Dropout(0.3, torch.tensor(1), 1, 1, torch.tensor([17]))
    assert_bitwise("row 17", dropout_mask_ref(one, 64, torch.float64), first[17:18])
