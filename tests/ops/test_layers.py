"""The ops of a layer one by one: gradients, both implementations, torch.compile, bad input."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import interpreter
from benchmarks.numerics import assert_close, describe, rms_ratio
from relay_fast.functional import attention, linear_residual, mlp, norm_linear
from tests.support.fresh_python import run_fresh

COUNTER = "torch.utils.flop_counter"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreter.mend()
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
CU = torch.tensor([0, 3, 3, 7], device=DEVICE)
D, ROWS, HIDDEN = 8, 7, 12
Inputs = dict[str, Tensor]


def new(dtype: torch.dtype, **shapes: tuple[int, ...]) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    draw = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    return {n: draw(s).to(DEVICE, dtype).requires_grad_() for n, s in shapes.items()}


def norm_linear_case(dtype: torch.dtype) -> tuple[Inputs, Callable[..., Tensor]]:
    angle = new(torch.float32, angle=(ROWS, 4))["angle"].detach()
    inputs = new(dtype, x=(ROWS, D), norm_weight=(D,), weight=(24, D), norm_bias=(D,), bias=(24,))
    rope = {"cos": angle.cos(), "sin": angle.sin(), "rotary": 16}
    return inputs, lambda impl, **i: norm_linear(**i, **rope, norm="layer", impl=impl)


def attention_case(dtype: torch.dtype) -> tuple[Inputs, Callable[..., Tensor]]:
    inputs = new(dtype, qkv=(ROWS, 4 * 8))
    return inputs, lambda impl, **i: attention(
        cu_seqlens=CU, heads=2, kv_heads=1, causal=True, impl=impl, **i
    )


def linear_residual_case(dtype: torch.dtype) -> tuple[Inputs, Callable[..., Tensor]]:
    inputs = new(dtype, a=(ROWS, 5), weight=(D, 5), residual=(ROWS, D), bias=(D,))
    return inputs, lambda impl, **i: linear_residual(**i, impl=impl)


def mlp_case(dtype: torch.dtype) -> tuple[Inputs, Callable[..., Tensor]]:
    inputs = new(
        dtype,
        x=(ROWS, D),
        norm_weight=(D,),
        up_weight=(HIDDEN, D),
        down_weight=(D, HIDDEN),
        norm_bias=(D,),
        up_bias=(HIDDEN,),
        down_bias=(D,),
    )
    return inputs, lambda impl, **i: mlp(**i, norm="layer", impl=impl)


def swiglu_case(dtype: torch.dtype) -> tuple[Inputs, Callable[..., Tensor]]:
    inputs = new(
        dtype,
        x=(ROWS, D),
        norm_weight=(D,),
        up_weight=(HIDDEN, D),
        down_weight=(D, HIDDEN),
        gate_weight=(HIDDEN, D),
        gate_bias=(HIDDEN,),
    )
    return inputs, lambda impl, **i: mlp(**i, activation="swiglu", impl=impl)


CASES = [norm_linear_case, attention_case, linear_residual_case, mlp_case, swiglu_case]
cases = pytest.mark.parametrize("case", CASES)


def results(case, impl: str, dtype: torch.dtype, frozen: int = -1, compiled=False) -> Inputs:
    """The op's output and the gradients of what is not frozen."""
    inputs, op = case(dtype)
    if frozen >= 0:
        list(inputs.values())[frozen].requires_grad_(False)
    if compiled:
        op = torch.compile(op, fullgraph=True, backend="aot_eager")
    out = op(impl, **inputs)
    weights = new(dtype, g=tuple(out.shape))["g"].detach()
    if any(t.requires_grad for t in inputs.values()):
        (out * weights).sum().backward()
    return {"out": out.detach()} | {n: t.grad for n, t in inputs.items() if t.grad is not None}


@cases
def test_gradients(case) -> None:
    inputs, op = case(torch.float64)
    function = lambda *values: op("torch", **dict(zip(inputs, values, strict=True)))
    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


@cases
def test_triton_equals_torch(case) -> None:
    value, truth = results(case, "triton", torch.float32), results(case, "torch", torch.float64)
    assert set(value) == set(truth)
    for name, t in truth.items():
        assert rms_ratio(value[name], t) <= 1e-5, describe(name, value[name], t)


@cases
def test_each_frozen_input_alone(case) -> None:
    whole = results(case, "torch", torch.float64)
    for frozen, name in enumerate(case(torch.float64)[0]):
        part = results(case, "torch", torch.float64, frozen)
        assert set(whole) - set(part) == {name}
        for n, t in part.items():
            assert_close(n, t, whole[n])


@cases
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_fullgraph_equals_eager(case, impl: str) -> None:
    torch.compiler.reset()
    eager = results(case, impl, torch.float32)
    compiled = results(case, impl, torch.float32, compiled=True)
    assert set(eager) == set(compiled)
    assert all(torch.equal(t, compiled[n]) for n, t in eager.items())


class Recorded(TorchDispatchMode):
    """Lists the package's ops that run, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "relay_fast":
            self.calls.append((op, args))
        return op(*args, **(kwargs or {}))


@cases
def test_the_rules_of_custom_ops(case) -> None:
    inputs, op = case(torch.float32)
    with Recorded() as recorded:
        op("torch", **inputs)
    ((called, arguments),) = recorded.calls
    assert {str(a.type) for a in called._schema.arguments[2:]} <= {"int", "float", "bool", "str"}
    torch.library.opcheck(called, arguments)


PAIRS = 3**2 + 4**2  # of the rows of each sequence
FLOPS = {  # forward, backward
    norm_linear_case: (2 * ROWS * D * 24, 4 * ROWS * D * 24),
    attention_case: (4 * PAIRS * 2 * 8, 10 * PAIRS * 2 * 8),
    linear_residual_case: (2 * ROWS * D * 5, 4 * ROWS * D * 5),
    mlp_case: (4 * ROWS * D * HIDDEN, 8 * ROWS * D * HIDDEN),
    swiglu_case: (6 * ROWS * D * HIDDEN, 12 * ROWS * D * HIDDEN),
}


@cases
def test_flops(case) -> None:
    inputs, op = case(torch.float32)
    with FlopCounterMode(display=False) as counter:
        out = op("torch", **inputs)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert (counter.get_total_flops(), backward.get_total_flops()) == FLOPS[case]


def test_flops_are_registered_whatever_is_imported_first() -> None:
    """And nothing imports the counter, which imports triton, on its own."""
    for first, second in itertools.permutations(("relay_fast.ops.layers", COUNTER)):
        code = (
            f"import sys, {first}; early = 'triton' in sys.modules; import {second}\n"
            f"from {COUNTER} import flop_registry\n"
            "names = {str(op) for op in flop_registry if 'relay_fast' in str(op)}\n"
            "print(early, len(names))"
        )
        said = run_fresh(code)
        assert said.stdout.split() == [str(first == COUNTER), "8"], said.stderr


def test_autocast() -> None:
    inputs, op = mlp_case(torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = op("torch", **inputs)
        projected = norm_linear(inputs["x"], inputs["norm_weight"], inputs["up_weight"])
    assert (out.dtype, projected.dtype) == (torch.float32, torch.bfloat16)
    out.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in inputs.values())
    truth = op("torch", **{n: t.double() for n, t in inputs.items()})
    assert rms_ratio(out, truth) < 0.02


QKV = torch.ones(7, 32, device=DEVICE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attention(QKV, CU[1:], 2, 1), r"cu_seqlens must .* start at 0, not at \[3\]"),
        (lambda: attention(QKV, CU[:0], 2, 1), r"start at 0, not at \[\]"),
        (
            lambda: attention(QKV, CU[[0, 2, 3, 1]], 2, 1),
            "decreases from 7 to 3 at sequence 2: give",
        ),
        (lambda: attention(QKV, CU[:3], 2, 1), "cu_seqlens ends at 3 but qkv has 7 rows"),
        (
            lambda: attention(QKV, CU, 3, 2),
            "32 columns, which do not fit heads = 3 and kv_heads = 2",
        ),
        (
            lambda: attention(QKV[None], CU, 2, 1),
            r"qkv has shape \(1, 7, 32\): give \(rows, columns\)",
        ),
        (lambda: norm_linear(QKV, QKV[0], QKV[:, :5]), r"x has shape \(7, 32\): give \(rows, 5\)"),
        (lambda: linear_residual(QKV, QKV, QKV), r"residual has shape \(7, 32\): give \(7, 7\)"),
        (lambda: mlp(QKV, QKV[0], QKV, QKV.T, activation="swiglu"), "'swiglu' needs a gate_weight"),
        (lambda: mlp(QKV, QKV[0], QKV, QKV.T, QKV), "'gelu_tanh' does not support a gate_weight"),
        (lambda: mlp(QKV, QKV[0], QKV, QKV.T, impl="cuda"), "impl = 'cuda' is unknown"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
