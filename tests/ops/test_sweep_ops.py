"""Every public op, however its tensors lie in memory, inside autocast and outside, checkpointed and
not, with any of its inputs frozen: the output and the gradients of plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from inspect import signature
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks import interpreter
from benchmarks.numerics import assert_as_good_as_eager, describe, rms_ratio
from relay_fast import functional
from relay_fast.functional import (
    SMALL_VOCABULARY,
    attention,
    iteration_cross_entropy,
    linear_residual,
    mlp,
    norm_linear,
    row_cross_entropy,
)
from relay_fast.ops import dispatch

interpreter.mend()
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
ROWS, D, HEAD_DIM, HIDDEN = 8, 16, 8, 12
OFFSETS = [0, 3, 3, 8]
AUTOCAST = torch.bfloat16
Tensors = dict[str, Tensor]


class Case(NamedTuple):
    op: Callable[..., Tensor]  # takes the tensors by name, and impl
    plain: Callable[..., Tensor]
    shapes: dict[str, tuple[int, ...]]  # what may need a gradient
    lists: Callable[[], Tensors] = dict  # what goes along and never needs one


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x.to(weight.dtype), (D,), weight, bias, 1e-6)


def plain_norm_linear(x, norm_weight, norm_bias, weight, bias, cos, sin) -> Tensor:
    z = F.linear(norm(x, norm_weight, norm_bias), weight, bias)
    a, b = z[:, : 2 * HEAD_DIM].unflatten(1, (2, HEAD_DIM)).chunk(2, -1)
    cos, sin = cos[:, None].to(z.dtype), sin[:, None].to(z.dtype)
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((turned.flatten(1), z[:, 2 * HEAD_DIM :]), 1)


def plain_attention(qkv, kv_heads: int, causal: bool) -> Tensor:
    parts = []
    for first, last in zip(OFFSETS, OFFSETS[1:], strict=False):
        heads = qkv[first:last].unflatten(1, (-1, HEAD_DIM)).transpose(0, 1)
        q, k, v = heads.split((2, kv_heads, kv_heads))
        k, v = (t.repeat_interleave(2 // kv_heads, 0) for t in (k, v))
        scores = q @ k.mT * HEAD_DIM**-0.5
        if causal:
            future = torch.ones(last - first, last - first, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        parts.append((scores.softmax(-1).to(v.dtype) @ v).transpose(0, 1).flatten(1))
    return torch.cat(parts)


def plain_mlp(x, norm_weight, norm_bias, up_weight, up_bias, down_weight, down_bias) -> Tensor:
    up = F.linear(norm(x, norm_weight, norm_bias), up_weight, up_bias)
    return x + F.linear(F.gelu(up, approximate="tanh"), down_weight, down_bias).to(x.dtype)


def plain_swiglu(x, norm_weight, up_weight, gate_weight, down_weight) -> Tensor:
    y = F.rms_norm(x, (D,), norm_weight, 1e-6)
    return x + F.linear(F.silu(F.linear(y, gate_weight)) * F.linear(y, up_weight), down_weight).to(
        x.dtype
    )


def plain_row_losses(states, rows, targets, norm_weight, norm_bias, head) -> Tensor:
    logits = F.linear(norm(states[rows], norm_weight, norm_bias), head)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, targets, ignore_index=-1, reduction="none")


def plain_loss(weights, **inputs) -> Tensor:
    return (plain_row_losses(**inputs) * weights).sum()


def rope() -> Tensors:
    angle = torch.randn(ROWS, HEAD_DIM // 2, generator=torch.Generator().manual_seed(1))
    return {"cos": angle.cos(), "sin": angle.sin()}


def targets(vocabulary: int) -> Tensors:
    """5 of the states, one of which is ignored."""
    generator = torch.Generator().manual_seed(2)
    drawn = torch.randint(vocabulary, (5,), generator=generator)
    drawn[1] = -1
    return {"rows": torch.randperm(ROWS, generator=generator)[:5], "targets": drawn}


def attention_case(kv_heads: int, causal: bool) -> Case:
    cu_seqlens = torch.tensor(OFFSETS)

    def op(qkv, impl):
        return attention(qkv, cu_seqlens, 2, kv_heads, causal=causal, impl=impl)

    columns = (2 + 2 * kv_heads) * HEAD_DIM
    return Case(
        op, partial(plain_attention, kv_heads=kv_heads, causal=causal), {"qkv": (ROWS, columns)}
    )


def loss_case(vocabulary: int, rows_alone: bool = False) -> Case:
    shapes = {"states": (ROWS, D), "norm_weight": (D,), "norm_bias": (D,), "head": (vocabulary, D)}
    lists = partial(targets, vocabulary)
    if rows_alone:
        return Case(
            lambda **i: row_cross_entropy(norm="layer", **i)[0], plain_row_losses, shapes, lists
        )
    op = partial(iteration_cross_entropy, norm="layer")
    return Case(op, plain_loss, shapes | {"weights": (5,)}, lists)


NORM = {"norm_weight": (D,), "norm_bias": (D,)}
CASES = {
    "norm_linear": Case(
        partial(norm_linear, rotary=2 * HEAD_DIM, norm="layer"), plain_norm_linear,
        {"x": (ROWS, D), **NORM, "weight": (3 * HEAD_DIM, D), "bias": (3 * HEAD_DIM,)}, rope,
    ),
    "attention": attention_case(2, False),
    "attention, causal": attention_case(2, True),
    "attention, shared keys": attention_case(1, True),
    "linear_residual": Case(
        linear_residual, lambda a, weight, residual, bias: residual + F.linear(a, weight, bias),
        {"a": (ROWS, HIDDEN), "weight": (D, HIDDEN), "residual": (ROWS, D), "bias": (D,)},
    ),
    "mlp": Case(
        partial(mlp, norm="layer"), plain_mlp,
        {"x": (ROWS, D), **NORM, "up_weight": (HIDDEN, D), "up_bias": (HIDDEN,),
         "down_weight": (D, HIDDEN), "down_bias": (D,)},
    ),
    "mlp, swiglu": Case(
        partial(mlp, activation="swiglu"), plain_swiglu,
        {"x": (ROWS, D), "norm_weight": (D,), "up_weight": (HIDDEN, D),
         "gate_weight": (HIDDEN, D), "down_weight": (D, HIDDEN)},
    ),
    "row_cross_entropy": loss_case(11, rows_alone=True),
    "iteration_cross_entropy": loss_case(11),
    "iteration_cross_entropy, large": loss_case(SMALL_VOCABULARY + 6),
}  # fmt: skip

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "column-major": lambda t: t.t().contiguous().t() if t.ndim == 2 else t,
    "strided": lambda t: t.repeat_interleave(2, -1)[..., ::2] if t.ndim else t,
    "row-step": lambda t: t.repeat_interleave(2, 0)[::2] if t.ndim else t,
    "expanded gradient": lambda t: t,
}
CHECKPOINTS = {"plain": None, "reentrant": True, "not reentrant": False}


@cache
def drawn(name: str) -> tuple[Tensors, Tensors, Tensor]:
    """Inputs, lists and the output's gradient."""
    case, generator = CASES[name], torch.Generator().manual_seed(0)
    new = lambda shape: torch.randn(shape, generator=generator)
    inputs = {n: new(shape) for n, shape in case.shapes.items()}
    lists = case.lists()
    return inputs, lists, new(case.plain(**inputs, **lists).shape)


def results(
    function: Callable[..., Tensor],
    name: str,
    layout: str,
    frozen: frozenset[str] = frozenset(),
    dtype: torch.dtype = torch.float32,
    autocast: str = "",  # around "forward", or "forward and backward"
    reentrant: bool | None = None,
) -> Tensors:
    """The output, and the gradients of what is not frozen."""
    inputs, lists, g = drawn(name)
    lay = LAYOUTS[layout]
    new = lambda t: lay(t.to(dtype) if t.is_floating_point() else t).detach()
    inputs = {n: new(t).requires_grad_(n not in frozen) for n, t in inputs.items()}
    lists = {n: t if n in ("cos", "sin") else new(t) for n, t in lists.items()}

    def run(*values: Tensor) -> Tensor:
        return function(**dict(zip(inputs, values, strict=True)), **lists)

    def backward(out: Tensor) -> None:
        if layout == "expanded gradient":
            out.sum().backward()
        else:
            out.backward(new(g).to(out.dtype))

    with torch.autocast("cpu", AUTOCAST, enabled=bool(autocast)):
        if reentrant is None:
            out = run(*inputs.values())
        else:
            out = checkpoint(run, *inputs.values(), use_reentrant=reentrant)
        if autocast == "forward and backward":
            backward(out)
    if autocast != "forward and backward":
        backward(out)
    return {"out": out.detach()} | {n: t.grad for n, t in inputs.items() if t.grad is not None}


def kernel(name: str, impl: str = "torch") -> Callable[..., Tensor]:
    return partial(CASES[name].op, impl=impl)


@cache
def truth(name: str, expanded: bool) -> Tensors:
    layout = "expanded gradient" if expanded else "contiguous"
    return results(CASES[name].plain, name, layout, dtype=torch.float64)


@cache
def eager(name: str, expanded: bool) -> Tensors:
    layout = "expanded gradient" if expanded else "contiguous"
    return results(CASES[name].plain, name, layout, autocast="forward")


def frozen_subsets(name: str) -> list[frozenset[str]]:
    """None, each alone, and all but each."""
    names = frozenset(CASES[name].shapes)
    alone = [frozenset({n}) for n in names]
    subsets = {frozenset(), *alone, *(names - a for a in alone)} - {names}
    return sorted(subsets, key=sorted)


def assert_equal(value: Tensors, expected: Tensors, frozen: frozenset[str], ratio: float) -> None:
    assert set(value) == set(expected) - frozen
    for n, v in value.items():
        assert v.shape == expected[n].shape, n
        assert rms_ratio(v, expected[n]) <= ratio, f"frozen: {sorted(frozen)}, " + describe(
            n, v, expected[n]
        )


def test_every_public_op_is_here() -> None:
    """Whatever takes `impl`, but for the choice of an implementation itself."""
    functions = (getattr(functional, n) for n in functional.__all__)
    ops = {
        f.__name__
        for f in functions
        if callable(f) and not isinstance(f, type) and "impl" in signature(f).parameters
    } - {"select"}
    assert ops == {name.split(",")[0] for name in CASES}


@pytest.mark.parametrize("how", CHECKPOINTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_outside_autocast(name: str, layout: str, how: str) -> None:
    expected = truth(name, layout == "expanded gradient")
    for frozen in frozen_subsets(name):
        value = results(kernel(name), name, layout, frozen, reentrant=CHECKPOINTS[how])
        assert_equal(value, expected, frozen, 1e-5)


@pytest.mark.parametrize("how", CHECKPOINTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_inside_autocast(name: str, layout: str, how: str) -> None:
    """As good as eager's, and the same whether backward is called inside or outside."""
    expanded = layout == "expanded gradient"
    expected = results(kernel(name), name, layout, autocast="forward")
    for n, v in expected.items():
        assert_as_good_as_eager(n, v, eager(name, expanded)[n], truth(name, expanded)[n], AUTOCAST)
    for frozen in frozen_subsets(name):
        value = results(
            kernel(name),
            name,
            layout,
            frozen,
            autocast="forward and backward",
            reentrant=CHECKPOINTS[how],
        )
        assert_equal(value, expected, frozen, 1e-6)


@pytest.mark.parametrize("layout", ["column-major", "strided", "row-step"])
@pytest.mark.parametrize("name", CASES)
def test_kernels(name: str, layout: str) -> None:
    """Weights have to lie by rows there (they are refused otherwise): x and gradients need not."""
    by_rows = lambda t: t.contiguous()

    def op(**tensors: Tensor) -> Tensor:
        free = ("x", "a", "residual", "qkv", "states")
        return kernel(name, "triton")(
            **{n: t if n in free else by_rows(t) for n, t in tensors.items()}
        )

    assert_equal(results(op, name, layout), truth(name, False), frozenset(), 1e-5)


@pytest.fixture
def ran(monkeypatch) -> dict[str, set[str]]:
    """The names of the ops that ran, by implementation."""
    found: dict[str, set[str]] = {"torch": set(), "triton": set()}

    def spied(impl: str, ops: dispatch.Ops) -> dispatch.Ops:
        def spy(name: str, op: Callable) -> Callable:
            return lambda *args, **options: (found[impl].add(name), op(*args, **options))[1]

        pairs = zip(ops._fields, ops, strict=True)
        return dispatch.Ops(*(op and spy(name, op) for name, op in pairs))

    both = spied("torch", dispatch.TORCH), spied("triton", dispatch._triton_ops())
    monkeypatch.setattr(dispatch, "TORCH", both[0])
    monkeypatch.setattr(dispatch, "_triton_ops", lambda: both[1])
    return found


def flipped(call: Callable[..., Tensor], name: str, first: str, monkeypatch) -> Tensors:
    """Results where RELAY_FAST_IMPL is `first` in the forward and the other in the backward."""

    def op(**tensors: Tensor) -> Tensor:
        monkeypatch.setenv("RELAY_FAST_IMPL", first)
        out = call(**tensors)
        monkeypatch.setenv("RELAY_FAST_IMPL", "torch" if first == "triton" else "triton")
        return out

    return results(op, name, "contiguous")


@pytest.mark.parametrize("first", ["triton", "torch", "auto"])
@pytest.mark.parametrize("name", CASES)
def test_backward_keeps_the_implementation(name: str, first: str, ran, monkeypatch) -> None:
    """Whatever RELAY_FAST_IMPL says by then: it reads what its own forward saved."""
    value = flipped(kernel(name, "auto"), name, first, monkeypatch)
    chosen, other = ("triton", "torch") if first == "triton" else ("torch", "triton")
    assert {n.rpartition("_")[2] for n in ran[chosen]} & {"bwd", "grad"} and not ran[other]
    assert_equal(value, truth(name, False), frozenset(), 1e-5)
    for n, own in results(kernel(name, chosen), name, "contiguous").items():
        assert torch.equal(own, value[n]), n


@pytest.mark.parametrize("first", ["triton", "torch"])
@pytest.mark.parametrize("name", ["mlp", "row_cross_entropy"])  # a layer's op, and the readout's
def test_compiled_backward_keeps_the_implementation(name, first, ran, monkeypatch) -> None:
    torch.compiler.reset()
    call = torch.compile(kernel(name, "auto"), backend="aot_eager", fullgraph=True)
    value = flipped(call, name, first, monkeypatch)
    other = "torch" if first == "triton" else "triton"
    assert ran[first] and not ran[other]
    for n, own in results(kernel(name, first), name, "contiguous").items():
        assert torch.equal(own, value[n]), n
