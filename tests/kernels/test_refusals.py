"""What the Triton kernels do not take is refused before anything is launched, with the reason and
what is taken; `auto` falls back and `explain` says why."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from triton.runtime.errors import OutOfResources
from triton.runtime.interpreter import GridExecutor
from triton.runtime.jit import JITFunction

from relay_fast.batch.plan import Plan
from relay_fast.kernels import supports as supports_module
from relay_fast.kernels.attention_ref import PaddedLayout
from relay_fast.kernels.loop_ref import LoopLayout, LoopWeights
from relay_fast.kernels.supports import Unsupported, layout_reason, loop_reason
from relay_fast.ops import dispatch
from relay_fast.ops.dispatch import TORCH, _auto_ops, explain, select, supports
from tests.support.fresh_python import run_fresh
from tests.support.kernel_checks import DEVICE


@pytest.fixture
def no_launch() -> Iterator[None]:
    """Fails where a kernel is launched."""
    launched = AssertionError("a kernel was launched")
    with patch.object(GridExecutor, "__call__", side_effect=launched):
        with patch.object(JITFunction, "run", side_effect=launched):
            yield


def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device=DEVICE)


def strided(*shape: int) -> torch.Tensor:
    """Every other column of a wider tensor."""
    return new(*shape[:-1], 2 * shape[-1])[..., ::2]


def integers(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


X, W, DOWN, QKV = new(4, 16), new(48, 16), new(16, 48), new(4, 48)
LAYOUT = Plan([4], [1], DEVICE).layout(0, 1)
TARGETS = torch.zeros(4, dtype=torch.int64, device=DEVICE)
HUGE = torch.empty(1, device="meta").as_strided((1, 16), (2**25, 1))


def norm_linear(x=X, norm=X[0], weight=W, bias=None, **options):
    return "norm_linear_fwd", (x, norm, None, weight, bias), options


def attention(qkv=QKV, layout=LAYOUT, heads=1, kv_heads=1):
    return "attention_fwd", (qkv, layout, heads, kv_heads, False), {}


def mlp(x=X, norm=X[0], up=W, gate=None, down=DOWN, activation="gelu_tanh", bias=None):
    return "mlp_fwd", (x, norm, None, up, bias, gate, None, down, None, activation), {}


def cross_entropy(h=X, targets=TARGETS, head=W, index=None):
    return "cross_entropy_fwd", (h, targets, X[0], None, head, index), {}


REFUSED = [
    (norm_linear(X.double(), X[0].double(), W.double()), "float64 is not one of bfloat16, float16"),
    (norm_linear(X[0]), "rows has 1 dimensions instead of 2"),
    (norm_linear(HUGE, HUGE[0], HUGE), "128 rows of stride 33554432 overflow 32-bit offsets"),
    (norm_linear(X.to("meta")), "tensors are on meta and"),
    (norm_linear(weight=strided(48, 16)), "column stride 2 instead of 1"),
    (norm_linear(weight=new(48, 17)), r"weight is \(48, 17\) instead of \(48, 16\)"),
    (norm_linear(norm=strided(16)), "the norm's weight has stride 2 instead of 1"),
    (norm_linear(bias=strided(48)), "bias has stride 2 instead of 1"),
    (norm_linear(kind="batch"), "norm 'batch' is not one of"),
    (norm_linear(new(1, 9000), new(9000), new(3, 9000)), "width 9000 is not in 1..8192"),
    (norm_linear(cos=X[:, :8], sin=X[:, :8], rotary=40), "rotary 40 are not whole heads of 16"),
    (norm_linear(cos=X[:2, :8], sin=X[:2, :8], rotary=32), "entries for 4 rows"),
    (attention(new(4, 3 * 136)), "head_dim 136 is not in 8..128"),
    (attention(heads=3, kv_heads=2), "3 heads are not divisible by 2 key/value heads"),
    (attention(new(5, 48)), "cu_seqlens ends at 4 but there are 5 rows"),
    (mlp(activation="tanh"), "activation 'tanh' is not one of .*gelu_tanh"),
    (mlp(activation="swiglu"), "needs a gate weight"),
    (mlp(gate=W), "does not support a gate weight"),
    (mlp(down=new(16, 47)), r"down_weight is \(16, 47\) instead of \(16, 48\)"),
    (mlp(up=W.half()), "weights are torch.float16 and torch.float32"),
    (cross_entropy(head=new(2**18 + 1, 16)), "vocabulary 262145 is not in 1..262144"),
    (
        cross_entropy(targets=TARGETS[:3]),
        r"targets is \(3,\) int64 instead of \(4,\) int32 or int64",
    ),
    (cross_entropy(targets=TARGETS.float()), "targets is .* float32 instead of"),
    (cross_entropy(index=TARGETS[:2]), r"targets is \(4,\) int64 instead of \(2,\)"),
    (("weight_grad", (new(48, 16).half(), W[:4].T.contiguous().T, X), {}), "acc"),
    (("weight_grad", (W.half(), new(4, 48), X), {}), "accumulator must be fp32"),
    (
        ("linear_residual_fwd", (X, DOWN, None, X), {}),
        r"weight is \(16, 48\) instead of \(16, 16\)",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refused_before_any_launch(no_launch, call, message: str) -> None:
    name, arguments, options = call
    with pytest.raises(
        Unsupported, match=f'impl="triton" cannot be used: .*{message}.*; use impl='
    ):
        getattr(select("triton", DEVICE), name)(*arguments, **options)


def test_what_is_taken_would_launch(no_launch) -> None:
    for name, arguments, _ in (norm_linear(), attention(), mlp(), cross_entropy()):
        with pytest.raises(AssertionError, match="a kernel was launched"):
            getattr(select("triton", DEVICE), name)(*arguments)


@pytest.mark.parametrize(
    ("offsets", "longest", "message"),
    [
        (integers(0, 3, 2, 4), 3, "cu_seqlens decreases from 3 to 2 at sequence 1"),
        (integers(0, 3), 3, "cu_seqlens ends at 3 but there are 4 rows"),
        (integers(0, 3, 9), 6, "cu_seqlens ends at 9 but there are 4 rows"),
        (integers(1, 4), 3, "cu_seqlens starts at 1 instead of 0"),
        (integers(0, 4), 3, "a sequence of 4 rows is longer than max_length 3"),
        (integers(), 0, r"cu_seqlens is \(0,\) int32 instead of \(sequences \+ 1,\) int32"),
        (integers(0, 4, dtype=torch.int64), 4, r"cu_seqlens is \(2,\) int64 instead of"),
        (integers(0, 9, 4, 9)[::2], 4, "contiguous"),
        (torch.zeros(2, dtype=torch.int32, device="meta"), 4, "cu_seqlens is on meta"),
        (integers(0, 4), 2**31, "max_length 2147483648 is not in 0..1048560"),
    ],
)
def test_offsets_are_checked_before_any_launch(no_launch, offsets, longest, message) -> None:
    layout = PaddedLayout(offsets, longest, lambda: (0, None, ()))
    name, arguments, _ = attention(layout=layout)
    with pytest.raises(Unsupported, match=message):
        getattr(select("triton", DEVICE), name)(*arguments)


def test_long_sequences_of_wide_rows_overflow() -> None:
    wide = torch.empty(1, device="meta").as_strided((4, 48), (2**16, 1))
    offsets = torch.zeros(2, dtype=torch.int32, device="meta")
    layout = PaddedLayout(offsets, 40_000, lambda: (0, None, ()), rows=4)
    reason = layout_reason(layout, wide, None)
    assert reason == "40000 rows of stride 65536 overflow 32-bit offsets"


def test_offsets_made_on_the_host_are_not_read_back() -> None:
    layout = Plan([3, 1], [1, 1], "meta").layout(0, 2)
    assert layout_reason(layout, torch.empty(4, 48, device="meta"), None) is None


def test_auto_falls_back_where_triton_raises() -> None:
    x, norm, weight = X.double(), X[0].double(), W.double()
    out = _auto_ops().norm_linear_fwd(x, norm, None, weight, None)
    assert torch.equal(out, TORCH.norm_linear_fwd(x, norm, None, weight, None))
    assert "float64 is not one of" in explain("meta", dtype=torch.float64)


def test_auto_takes_one_implementation_forward_and_backward(monkeypatch) -> None:
    """Whatever only the forward can know of: here a bias with strides, which it has copied."""
    taken: list[str] = []

    def watched(name: str, kernel):
        def op(*args, **kwargs):
            out = kernel(*args, **kwargs)
            taken.append(name)
            return out

        return op

    kernels = dispatch.Ops(*map(watched, dispatch.Ops._fields, dispatch._triton_ops()))
    monkeypatch.setattr(dispatch, "_triton_ops", lambda: kernels)
    ops = _auto_ops.__wrapped__()
    torch.manual_seed(0)
    for dtype, used in ((torch.float32, ["fwd", "bwd"]), (torch.float64, [])):
        a, weight, g = (torch.randn(n, 16, dtype=dtype, device=DEVICE) for n in (4, 16, 4))
        bias = torch.randn(16, 2, dtype=dtype, device=DEVICE)[:, 0]
        outs = [o.linear_residual_fwd(a, weight, bias, g) for o in (ops, TORCH)]
        torch.testing.assert_close(*outs)
        grads = [o.linear_residual_bwd(g, weight)[0] for o in (ops, TORCH)]
        torch.testing.assert_close(*grads)
        assert taken == [f"linear_residual_{name}" for name in used]
        taken.clear()


def test_only_what_an_op_reads_is_copied() -> None:
    args = (strided(4, 16), None, W, strided(16))
    forward = dispatch._dense("mlp_fwd", args)
    assert all(a is None or a.is_contiguous() for a in forward) and forward[2] is W
    assert torch.equal(forward[0], args[0])
    backward = dispatch._dense("mlp_bwd", args)
    assert backward[0].is_contiguous() and backward[2] is W and backward[3] is args[3]
    assert dispatch._dense("weight_grad", args) is dispatch._dense("mlp_fwd", (X, W)) is None


def test_supports_names_what_is_missing() -> None:
    sizes = {"d_model": 256, "head_dim": 64, "vocabulary": 320, "activation": "swiglu"}
    assert supports("meta", **sizes) is None
    assert "bfloat16, float16, float32" in supports("meta", dtype=torch.float64)
    assert supports("meta", head_dim=256) == "head_dim 256 is not in 8..128"
    assert supports("meta", d_model=9000) == "width 9000 is not in 1..8192"
    assert supports("meta", vocabulary=2**19) == "vocabulary 524288 is not in 1..262144"
    assert "is not one of" in supports("meta", activation="tanh")
    assert supports("mps") == "Triton kernels run on CUDA devices, not on 'mps'"


def test_explain_says_what_auto_takes(monkeypatch) -> None:
    monkeypatch.delenv("RELAY_FAST_IMPL", raising=False)
    assert explain("cpu").startswith("torch: Triton's interpreter is for tests")
    assert explain("cuda", head_dim=256).startswith("torch: ")
    monkeypatch.setenv("RELAY_FAST_IMPL", "torch")
    assert explain("cpu") == "torch: RELAY_FAST_IMPL=torch is set in the environment"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a card")
def test_a_missing_card_is_named() -> None:
    missing = "torch finds no CUDA device on this machine"
    assert explain() == explain("cuda:1") == f"torch: {missing}"
    assert select("auto", "cuda") is TORCH
    with pytest.raises(Unsupported, match=missing):
        select("triton", "cuda")


def test_without_interpreter_a_cpu_is_refused_and_triton_not_imported() -> None:
    """`select` says why before it imports triton."""
    code = (
        "import sys, relay_fast.functional as f\n"
        "assert f.select('auto', 'cpu') is f.TORCH\n"
        "try: f.select('triton', 'cpu')\n"
        "except RuntimeError as e: assert 'CUDA' in str(e), e\n"
        "else: raise SystemExit('not refused')\n"
        "assert 'triton' not in sys.modules"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = run_fresh(code, environment=environment)
    assert done.returncode == 0, done.stderr


def test_a_launch_that_lacks_resources_names_kernel_card_and_remedy() -> None:
    """And is no Unsupported, so `auto` does not go on in torch in the middle of a pass."""

    def norm_linear_fwd(x):
        raise OutOfResources(106_496, 101_376, "shared memory")

    op = dispatch._with_device_guard(norm_linear_fwd)
    message = (
        "the kernel norm_linear_fwd needs 106496 of shared memory, and the device .* has 101376: "
        'use impl="torch", or set RELAY_FAST_IMPL=torch'
    )
    with pytest.raises(RuntimeError, match=message) as raised:
        op(X)
    assert not isinstance(raised.value, Unsupported)


def test_older_and_other_gpus_are_named(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    reason = supports_module._card_reason.__wrapped__
    assert reason(0) == "the GPU Tesla T4 is sm_75, older than sm_80"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6))
    assert reason(0) is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert reason(0) == "this is a GPU for ROCm, and the kernels are for NVIDIA's from sm_80 on"
    assert explain("mps") == "torch: Triton kernels run on CUDA devices, not on 'mps'"


def whole_loop_reason(device: str, d: int = 16, heads: int = 2, longest: int = 3) -> str | None:
    """Why the whole-loop kernel does not take a model of width d, of which nothing is allocated."""
    layout = LoopLayout(np.array([longest, 2]), np.array([2, 1]), "cpu")
    with FakeTensorMode():
        new = lambda *shape, of=torch.float32: torch.empty(shape, dtype=of, device=device)
        half = partial(new, of=torch.bfloat16)
        weights = LoopWeights(
            new(1, d),
            half(1, 3 * d, d),
            half(1, d, d),
            new(1, d),
            half(1, 32, d),
            None,
            half(1, d, 32),
            None,
            new(d),
            half(9, d),
        )
        x = new(longest + 2, d)
        return loop_reason(x, layout, weights, None, None, heads, heads, "gelu", "rms")


def test_the_whole_loop_kernel_waits_for_a_card(monkeypatch) -> None:
    """Refused on GPUs, until one environment variable lets it in."""
    monkeypatch.delenv("RELAY_FAST_WHOLE_LOOP", raising=False)
    monkeypatch.setattr(supports_module, "_card_reason", lambda index: None)
    assert whole_loop_reason("cpu") is None
    refused = "the whole-loop kernel has not been right on a GPU yet"
    refused += " (RELAY_FAST_WHOLE_LOOP=1 tries it)"
    assert whole_loop_reason("cuda") == refused
    monkeypatch.setenv("RELAY_FAST_WHOLE_LOOP", "0")
    assert whole_loop_reason("cuda") == refused
    monkeypatch.setenv("RELAY_FAST_WHOLE_LOOP", "1")
    assert whole_loop_reason("cuda") is None


def test_the_whole_loop_kernel_keeps_wide_heads_off_its_registers() -> None:
    reason = whole_loop_reason("meta", d=128, heads=2, longest=65)
    assert reason.endswith("head_dim up to 32 for widths and sequences of over 64, not 64")
    for sizes in ({"heads": 4}, {"longest": 64}, {"d": 64, "heads": 1}):
        assert whole_loop_reason("meta", **{"d": 128, "heads": 2, "longest": 65} | sizes) is None
