"""The loop engine under impl="triton": every iteration's state and every gradient against torch."""

from __future__ import annotations

import csv

import pytest
import torch
from torch import Tensor

from benchmarks import error_growth, interpreter
from benchmarks.numerics import assert_as_good_as_eager, assert_bitwise, describe, rms_ratio
from relay_fast.models.looped_block import LoopedBlock

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreter.mend()
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def run(
    impl: str,
    dtype: torch.dtype,
    lengths: tuple[int, ...],
    loops: list[int],
    frozen: tuple[str, ...] = (),
    **options,
) -> dict[str, Tensor]:
    """States of all iterations, final states and gradients; fp64 parameters for dtype fp64,
    else fp32 ones with autocast to `dtype`."""
    torch.manual_seed(0)
    options = {"d_model": 32, "n_heads": 2, "n_layers": 1, "recompute": "state"} | options
    block = LoopedBlock(impl=impl, **options)
    x = torch.randn(sum(lengths), 32)
    weights = torch.randn(sum(lengths), 32)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    block, x, weights = (t.to(DEVICE, wide) for t in (block, x, weights))
    x.requires_grad_("x" not in frozen)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name not in frozen)
    cu = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)
    lowered = dtype in (torch.float16, torch.bfloat16)
    with torch.autocast(DEVICE, dtype if lowered else None, enabled=lowered):
        final = block(x, loops=loops, cu_seqlens=cu)
        with torch.no_grad():
            states = block(x, loops=loops, cu_seqlens=cu, return_states=True)
    (final * weights).sum().backward()
    found = {f"state {t}": s for t, s in enumerate(states, 1)}
    named = {"x": x, **dict(block.named_parameters())}
    return found | {"final": final} | {n: p.grad for n, p in named.items() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_loop_equals_torch(dtype: torch.dtype) -> None:
    """Active prefix: sequences of 9, 1, 12 rows end after 2, 3, 1 iterations."""
    case = ((9, 1, 12), [2, 3, 1])
    value, again = run("triton", dtype, *case), run("triton", dtype, *case)
    truth, eager = run("torch", torch.float64, *case), run("torch", dtype, *case)
    assert set(value) == set(truth)
    for name, t in truth.items():
        assert_bitwise(name, value[name], again[name])
        if dtype == torch.float32:
            assert rms_ratio(value[name], t) <= 1e-5, describe(name, value[name], t)
        else:
            assert_as_good_as_eager(name, value[name], eager[name], t, dtype)


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "layer", "bias": True, "activation": "swiglu", "n_kv_heads": 1, "causal": True},
        {"activation": "relu2", "loop_norm": "post", "injection": "concat", "rope_base": None},
        {"dropout": 0.3, "recompute": "every:2"},
        {"activation": "gelu", "recompute": "none", "frozen": ("x", "layers.0.qkv.weight")},
        {
            "head_dim": 24,
            "n_kv_heads": 1,
            "qk_norm": True,
            "rotary_share": 0.5,
            "dropout": 0.2,
            "sandwich_norm": True,
            "activation": "swiglu",
            "bias": ("qkv",),
            "rope_scale": 1.3,
            "rope_frequencies": (1.0, 0.5, 0.2, 0.1, 0.01, 0.001),
        },
    ],
)
def test_options_equal_torch(options: dict) -> None:
    case = (torch.float32, (5, 8), [1, 2])
    value = run("triton", *case, **options)
    truth = run("torch", torch.float64, *case[1:], **options)
    assert set(value) == set(truth)
    for name, t in truth.items():
        assert rms_ratio(value[name], t) <= 1e-5, describe(name, value[name], t)


@pytest.mark.parametrize("dtype", error_growth.DTYPES)
def test_the_error_of_thirty_iterations(dtype: str, tmp_path) -> None:
    """Every state and the input's gradient: at most 2 (bf16 interpreted: 4) times torch's error."""
    path = tmp_path / "growth.csv"
    assert error_growth.main(["--dtype", dtype, "--csv", str(path)]) == 0
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [r["iteration"] for r in rows] == [*map(str, range(1, 31)), "30"]
    for r in rows:
        assert 0 < float(r["triton"]) <= float(r["bound"]), r
    bound = {"fp16": 2, "bf16": error_growth.TIMES_EAGER["bf16"]}
    if dtype in bound:
        assert all(float(r["times_torch"]) <= bound[dtype] for r in rows)


def test_an_error_over_its_bound_is_named(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(error_growth, "FP32_RATIO", 1e-12)
    argv = ["--dtype", "fp32", "--iterations", "1", "--csv", str(tmp_path / "growth.csv")]
    assert error_growth.main(argv) == 1
    assert "OVER 1.000e-12" in capsys.readouterr().out
