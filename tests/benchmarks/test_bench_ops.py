"""The ops at RELAY's size, against the reference; timed by: pytest tests/ --benchmark-only."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.numerics import assert_close
from relay_fast.batch.plan import Plan
from relay_fast.functional import REFERENCE, Ops, select

D, HEADS, EPS = 256, 4, 1e-6
SEQUENCES, LENGTH = 16, 64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAN = Plan([LENGTH] * SEQUENCES, [1] * SEQUENCES, DEVICE)
Call = Callable[[], tuple[Tensor | None, ...] | Tensor]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def norm_linear(ops: Ops) -> tuple[Call, Call]:
    x, w, norm = randn(PLAN.rows, D), randn(3 * D, D) / 16, randn(D)
    rest = (None, None, 0, EPS, "rms")
    dy = randn(PLAN.rows, 3 * D)
    return (
        lambda: ops.norm_linear_fwd(x, norm, None, w, None, *rest),
        lambda: ops.norm_linear_bwd(dy, x, norm, None, w, *rest),
    )


def attention(ops: Ops) -> tuple[Call, Call]:
    qkv, do, layout = randn(PLAN.rows, 3 * D), randn(PLAN.rows, D), PLAN.layout(0, SEQUENCES)
    forward = lambda: ops.attention_fwd(qkv, layout, HEADS, HEADS, False)
    o, lse = forward()
    return (
        lambda: forward()[0],
        lambda: ops.attention_bwd(do, qkv, o, lse, layout, HEADS, HEADS, False),
    )


def linear_residual(ops: Ops) -> tuple[Call, Call]:
    a, w, u = randn(PLAN.rows, D), randn(D, D) / 16, randn(PLAN.rows, D)
    return (
        lambda: ops.linear_residual_fwd(a, w, None, u, None),
        lambda: ops.linear_residual_bwd(u, w, None),
    )


def mlp(ops: Ops) -> tuple[Call, Call]:
    x, norm, up, down = randn(PLAN.rows, D), randn(D), randn(4 * D, D) / 16, randn(D, 4 * D) / 32
    rest = ("gelu_tanh", EPS, "rms", None)
    forward = lambda: ops.mlp_fwd(
        x, norm, None, up, None, None, None, down, None, *rest, None, True
    )
    _, u, gate, _ = forward()
    dy = randn(PLAN.rows, D)
    return forward, lambda: ops.mlp_bwd(dy, x, u, gate, norm, None, up, None, down, *rest)


def weight_grad(ops: Ops) -> tuple[Call]:
    dy, x, acc = randn(PLAN.rows, 4 * D), randn(PLAN.rows, D), torch.zeros(4 * D, D, device=DEVICE)

    def add() -> Tensor:
        ops.weight_grad(acc.zero_(), dy, x)
        return acc

    return (add,)


CALLS = [
    (op, direction)
    for op in (norm_linear, attention, linear_residual, mlp, weight_grad)
    for direction in ("forward", "backward")
    if (op, direction) != (weight_grad, "backward")
]


@pytest.mark.benchmark(group="ops")
@pytest.mark.parametrize(("op", "direction"), CALLS)
def test_op(op: Callable[[Ops], tuple[Call, ...]], direction: str, benchmark, seed: int) -> None:
    def call_of(ops: Ops) -> Call:
        torch.manual_seed(seed)  # the same inputs
        return op(ops)[direction == "backward"]

    def timed() -> tuple[Tensor | None, ...] | Tensor:
        out = call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return out

    call = call_of(select("auto", DEVICE))
    outputs = benchmark.pedantic(timed, rounds=20, warmup_rounds=2)
    truth = call_of(REFERENCE)()
    pairs = [(outputs, truth)] if isinstance(truth, Tensor) else zip(outputs, truth, strict=True)
    checked = 0
    for i, (value, expected) in enumerate(pairs):
        assert (value is None) == (expected is None)
        if value is not None:
            assert_close(f"output {i}", value, expected, 1e-4)
            checked += 1
    assert checked
