"""Attention over long sequences through other libraries, by stand-ins with their signatures."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from relay_fast.batch.plan import Plan
from relay_fast.kernels import attention_varlen as varlen
from relay_fast.kernels.attention_ref import attention_bwd_ref, attention_fwd_ref
from relay_fast.kernels.attention_varlen import FLASH_ATTN, TORCH_VARLEN, choose_library
from relay_fast.ops import dispatch
from relay_fast.ops.dispatch import _auto_ops, explain

LENGTHS = [140, 7, 0, 33]


def attend(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, causal: bool) -> Tensor:
    """Sequence by sequence with torch's own attention, (rows, heads, head_dim)."""
    group, parts = q.shape[1] // k.shape[1], []
    for first, last in zip(offsets.tolist(), offsets.tolist()[1:], strict=False):
        own = [t[first:last].transpose(0, 1).double() for t in (q, k, v)]
        own[1:] = [t.repeat_interleave(group, 0) for t in own[1:]]
        o = torch.nn.functional.scaled_dot_product_attention(*own, is_causal=causal)
        parts.append(o.transpose(0, 1).to(q.dtype))
    return torch.cat(parts)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    assert cu_seqlens_q is cu_seqlens_k and cu_seqlens_q.dtype == torch.int32
    assert max_seqlen_q == max_seqlen_k >= int(cu_seqlens_q.diff().max())
    return attend(q, k, v, cu_seqlens_q, causal)


def varlen_attn(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
):
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return attend(query, key, value, cu_seq_q, window_size == (-1, 0))


def clear() -> None:
    for cached in (varlen._load, varlen.library_reason, varlen._shares_heads):
        cached.cache_clear()


@pytest.fixture
def libraries(monkeypatch):
    """Installs stand-ins, on the CPU and in fp64 too; returns the two modules."""
    flash, own = ModuleType("flash_attn"), ModuleType("torch.nn.attention.varlen")
    flash.flash_attn_varlen_func, own.varlen_attn = flash_attn_varlen_func, varlen_attn
    for module in (flash, own):
        module.__spec__ = object()
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.nn.attention, "varlen", own, raising=False)
    monkeypatch.setattr(varlen, "DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(varlen, "DTYPES", (*varlen.DTYPES, torch.float64))
    clear()
    yield flash, own
    clear()


def inputs(heads: int, kv_heads: int, head_dim: int = 16, dtype: torch.dtype = torch.float64):
    layout = Plan(LENGTHS, [1] * len(LENGTHS)).layout(0, len(LENGTHS))
    rows = sum(LENGTHS)
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    return qkv, layout, torch.randn(rows, heads * head_dim, dtype=dtype)


@pytest.mark.parametrize("library", [FLASH_ATTN, TORCH_VARLEN], ids=lambda x: x.module)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
def test_forward_and_backward_agree_with_the_reference(
    libraries, library, causal: bool, heads: int, kv_heads: int
) -> None:
    qkv, layout, do = inputs(heads, kv_heads)
    call = (layout, heads, kv_heads, causal)
    assert varlen.varlen_reason(library, qkv, *call[:3]) is None
    o, lse = varlen.attention_fwd_varlen(library, qkv, *call)
    expected, _ = attention_fwd_ref(qkv, *call)
    torch.testing.assert_close(o, expected, rtol=1e-12, atol=1e-12)
    assert lse is None and not o.requires_grad
    dqkv = varlen.attention_bwd_varlen(library, do, qkv, *call)
    truth = attention_bwd_ref(do, qkv, expected, None, *call)
    torch.testing.assert_close(dqkv, truth, rtol=1e-12, atol=1e-12)
    assert dqkv.shape == qkv.shape and not dqkv.requires_grad


def test_auto_takes_the_first_that_serves_in_both_directions(libraries, monkeypatch) -> None:
    taken = []
    for library in (FLASH_ATTN, TORCH_VARLEN):
        module = sys.modules[library.module]
        real = getattr(module, library.function)
        note = lambda *a, real=real, name=library.name, **k: (taken.append(name), real(*a, **k))[1]
        monkeypatch.setattr(module, library.function, note)
    clear()
    ops, (qkv, layout, do) = _auto_ops(), inputs(2, 2)
    o, lse = ops.attention_fwd(qkv, layout, 2, 2, True)
    dqkv = ops.attention_bwd(do, qkv, o, lse, layout, 2, 2, True)
    assert taken.pop(0) == FLASH_ATTN.name  # it is tried once
    assert taken == [FLASH_ATTN.name] * 2
    truth = attention_bwd_ref(do, qkv, o, None, layout, 2, 2, True)
    torch.testing.assert_close(dqkv, truth, rtol=1e-12, atol=1e-12)


def test_what_is_left_to_the_kernels(libraries) -> None:
    long, layout, _ = inputs(2, 2)

    def reason(qkv=long, layout=layout, heads=2, kv_heads=2, row_count=None) -> str | None:
        return varlen.varlen_reason(FLASH_ATTN, qkv, layout, heads, kv_heads, row_count)

    assert reason() is None
    assert "computes in bfloat16 and float16, not in float32" in reason(long.float())
    assert "row count" in reason(row_count=torch.tensor([5], dtype=torch.int32))
    assert "head_dim 12 is not a multiple of 8" in reason(long[:, :72])
    assert "3 heads are not divisible by 2" in reason(heads=3)
    short = Plan([128, 52], [1, 1]).layout(0, 2)
    assert reason(layout=short) == "sequences of at most 128 rows fit one tile"
    wide = torch.zeros(180, 6 * 256, dtype=torch.float16)
    assert reason(wide, layout=short) is None  # a head too wide for the kernels' own tile
    assert "head_dim 264" in reason(torch.zeros(180, 6 * 264, dtype=torch.float16))
    assert "cu_seqlens ends at 180" in reason(long[:150])


def test_torchs_own_is_left_out_where_it_is_not_deterministic_or_older(
    libraries, monkeypatch
) -> None:
    del libraries[0].flash_attn_varlen_func
    clear()
    qkv, layout, _ = inputs(4, 2)
    assert choose_library(qkv, layout, 4, 2) is TORCH_VARLEN
    with monkeypatch.context() as inside:
        inside.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert choose_library(qkv, layout, 4, 2) is None

    def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)):
        return attend(query, key, value, cu_seq_q, window_size == (-1, 0))

    libraries[1].varlen_attn = older
    clear()
    reason = varlen.varlen_reason(TORCH_VARLEN, qkv, layout, 4, 2)
    assert reason.endswith("of this torch does not share key/value heads")
    alike, layout, _ = inputs(2, 2)
    assert choose_library(alike, layout, 2, 2) is TORCH_VARLEN


def broken(*_, **__):
    raise RuntimeError("CUDA error: no kernel image is available\nfor execution on the device")


def test_explain_says_which_is_taken_and_why_flash_attn_is_not(libraries, monkeypatch) -> None:
    monkeypatch.delenv("RELAY_FAST_IMPL", raising=False)
    monkeypatch.setattr(dispatch, "supports", lambda device, **sizes: None)
    said = lambda: dispatch._explain_attention(torch.device("cpu"))
    assert said() == ", and flash-attn for sequences of over 128 tokens"
    libraries[0].flash_attn_varlen_func = broken
    clear()
    assert said() == (
        ", and torch's variable-length attention for sequences of over 128 tokens (flash-attn is "
        "installed but does not run on cpu: RuntimeError: CUDA error: no kernel image is available)"
    )
    del libraries[0].flash_attn_varlen_func
    clear()
    assert "flash-attn is installed but cannot be imported: AttributeError" in said()
    qkv, layout, _ = inputs(2, 2)
    assert choose_library(qkv, layout, 2, 2) is TORCH_VARLEN
    monkeypatch.delitem(sys.modules, "flash_attn")
    clear()
    assert said() == ", and torch's variable-length attention for sequences of over 128 tokens"


def test_without_a_card_nothing_is_asked_of_the_libraries(monkeypatch) -> None:
    monkeypatch.setattr(varlen, "library_reason", lambda *_: pytest.fail("was tried"))
    qkv, layout, _ = inputs(2, 2, dtype=torch.float16)
    assert choose_library(qkv, layout, 2, 2) is None
    assert explain("cuda").startswith("torch: ") or torch.cuda.is_available()
