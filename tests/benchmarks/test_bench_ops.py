"""The block's ops and one iteration of it at RELAY's size: pytest
tests/benchmarks/test_bench_ops.py."""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from benchmarks.baselines import EagerBlock
from relay_fast.batch.plan import Plan
from relay_fast.config import BlockConfig
from relay_fast.functional import select
from relay_fast.models.looped_block import LoopedBlock

D, HEADS, VOCABULARY, EPS = 256, 4, 320, 1e-6
SEQUENCES, LENGTH = 16, 64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = select("auto", DEVICE)
PLAN = Plan([LENGTH] * SEQUENCES, [1] * SEQUENCES, DEVICE)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE)


def norm_linear() -> tuple:
    x, w, norm = randn(PLAN.rows, D), randn(3 * D, D), randn(D)
    rest = (None, None, 0, EPS, "rms")
    forward = lambda: OPS.norm_linear_fwd(x, norm, None, w, None, *rest)
    dy = forward()
    return forward, lambda: OPS.norm_linear_bwd(dy, x, norm, None, w, *rest)


def attention() -> tuple:
    qkv, layout = randn(PLAN.rows, 3 * D), PLAN.layout(0, SEQUENCES)
    forward = lambda: OPS.attention_fwd(qkv, layout, HEADS, HEADS, False)
    o, lse = forward()
    return forward, lambda: OPS.attention_bwd(o, qkv, o, lse, layout, HEADS, HEADS, False)


def linear_residual() -> tuple:
    a, w, u = randn(PLAN.rows, D), randn(D, D), randn(PLAN.rows, D)
    return (
        lambda: OPS.linear_residual_fwd(a, w, None, u, None),
        lambda: OPS.linear_residual_bwd(u, w, None),
    )


def mlp() -> tuple:
    x, norm, up, down = randn(PLAN.rows, D), randn(D), randn(4 * D, D), randn(D, 4 * D)
    rest = ("gelu_tanh", EPS, "rms", None)
    forward = lambda: OPS.mlp_fwd(
        x, norm, None, up, None, None, None, down, None, *rest, None, True
    )
    y, u, gate, _ = forward()
    return forward, lambda: OPS.mlp_bwd(y, x, u, gate, norm, None, up, None, down, *rest)


def weight_grad() -> tuple:
    dy, x, acc = randn(PLAN.rows, 4 * D), randn(PLAN.rows, D), randn(4 * D, D)
    return (lambda: OPS.weight_grad(acc, dy, x),)


@pytest.mark.benchmark(group="ops")
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("op", [norm_linear, attention, linear_residual, mlp, weight_grad])
def test_op(op, direction: str, benchmark) -> None:
    calls = op()
    if direction == "backward" and len(calls) == 1:
        pytest.skip("has no backward of its own")
    call = calls[direction == "backward"]

    def timed() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(timed, rounds=20, warmup_rounds=2)


@pytest.mark.skipif(DEVICE == "cuda", reason="the overhead on a CPU is what is asked for")
@pytest.mark.benchmark(group="one loop")
def test_one_loop_against_eager(benchmark, capsys) -> None:
    """Forward and backward of one iteration, in turn with the same block in eager PyTorch."""
    config = BlockConfig(D, HEADS, 3)
    eager, ours = EagerBlock(config), LoopedBlock(config=config, recompute="none")
    ours.load_state_dict(eager.state_dict())
    x = torch.randn(SEQUENCES // 2, LENGTH, D)
    calls = (lambda: list(eager.states(x, 1))[-1], lambda: ours(x, 1))
    torch.testing.assert_close(calls[0](), calls[1](), rtol=1e-4, atol=1e-4)
    ratios = []

    def both() -> None:
        seconds = []
        for call, model in zip(calls, (eager, ours), strict=True):
            model.zero_grad()
            start = time.perf_counter()
            call().sum().backward()
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[1] / seconds[0])

    benchmark.pedantic(both, rounds=40, warmup_rounds=3)
    if benchmark.stats is None:  # under xdist nothing is timed
        return
    ratio = statistics.median(ratios)
    benchmark.extra_info["relay_fast over eager"] = round(ratio, 3)
    with capsys.disabled():
        print(f"\none loop, relay_fast / eager: {ratio:.3f}", end="")
    assert ratio < 1.05
