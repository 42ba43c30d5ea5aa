"""Attention on a CPU, whose fused kernels are called past PyTorch's dispatcher: what the dispatcher
would have seen to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.numerics import assert_close
from relay_fast.batch.plan import Plan
from relay_fast.functional import attention
from relay_fast.kernels.attention_cpu import attention_bwd_cpu, attention_fwd_cpu
from relay_fast.kernels.attention_ref import attention_bwd_ref, attention_fwd_ref

ROWS, HEADS, HEAD_DIM = 8, 2, 5
LAYOUTS = {
    "column-major": lambda t: t.t().contiguous().t(),
    "strided": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "row-step": lambda t: t.repeat_interleave(2, 0)[::2],
    "slice": lambda t: torch.cat((t, t), 1)[:, : t.shape[1]],
    "column-major slice": lambda t: torch.cat((t, t), 1).t().contiguous().t()[:, : t.shape[1]],
}


def layout_of(lengths: list[int]):
    return Plan(lengths, [1] * len(lengths)).layout(0, len(lengths))


@pytest.mark.parametrize("lay", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("lengths", [[8], [4, 4], [3, 5], [0, 7, 1]], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_layout_of_every_operand(lay, lengths: list[int], causal: bool, dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    new = lambda heads: torch.randn(ROWS, heads * HEAD_DIM, generator=generator).to(dtype)
    qkv, do, layout = new(3 * HEADS), new(HEADS), layout_of(lengths)
    o, lse = attention_fwd_cpu(qkv, layout, HEADS, HEADS, causal)
    dqkv = attention_bwd_cpu(do, qkv, o, lse, layout, HEADS, HEADS, causal)
    bound = 1e-12 if dtype == torch.float64 else 0.02
    truth, _ = attention_fwd_ref(qkv.double(), layout, HEADS, HEADS, causal)
    assert_close("o", o, truth, bound)
    truth = attention_bwd_ref(do.double(), qkv.double(), o, lse, layout, HEADS, HEADS, causal)
    assert_close("dqkv", dqkv, truth, bound)
    again, sums = attention_fwd_cpu(lay(qkv), layout, HEADS, HEADS, causal)
    assert torch.equal(again, o) and torch.equal(sums, lse)
    found = attention_bwd_cpu(lay(do), lay(qkv), lay(o), lay(lse), layout, HEADS, HEADS, causal)
    assert torch.equal(found, dqkv) and found.is_contiguous()


def test_rows_that_are_one_in_memory() -> None:
    row = torch.randn(1, 3 * HEADS * HEAD_DIM, dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.tensor([0, 3, ROWS])

    def gradient(qkv: Tensor) -> tuple[Tensor, Tensor]:
        out = attention(qkv, cu_seqlens, HEADS, causal=True)
        return out, torch.autograd.grad(out.square().sum(), row)[0]

    out, grad = gradient(row.expand(ROWS, -1))
    expected, truth = gradient(row.repeat(ROWS, 1))
    assert_close("out", out, expected, 1e-12)
    assert_close("gradient", grad, truth, 1e-12)


@pytest.mark.parametrize("offsets", [[0], [0, 0]], ids=str)
def test_no_rows(offsets: list[int]) -> None:
    qkv = torch.empty(0, 3 * HEADS * HEAD_DIM).t().contiguous().t().requires_grad_()
    out = attention(qkv, torch.tensor(offsets), HEADS)
    out.sum().backward()
    assert out.shape == (0, HEADS * HEAD_DIM) and qkv.grad.shape == qkv.shape


def test_a_layout_of_another_device_is_refused() -> None:
    """Its mask would be read as if it lay in this device's memory."""
    layout = Plan([3, 5], [1, 1], "meta").layout(0, 2)
    qkv = torch.randn(ROWS, 3 * HEADS * HEAD_DIM)
    with pytest.raises(ValueError, match="the layout is on meta and qkv on cpu"):
        attention_fwd_cpu(qkv, layout, HEADS, HEADS, False)


def test_the_mask_does_not_go_to_the_default_device() -> None:
    qkv, layout = torch.randn(ROWS, 3 * HEADS * HEAD_DIM), layout_of([3, 5])
    expected, _ = attention_fwd_cpu(qkv, layout, HEADS, HEADS, False)
    with torch.device("meta"):
        found, _ = attention_fwd_cpu(qkv, layout, HEADS, HEADS, False)
    assert torch.equal(found, expected)
