"""The same ops in other libraries, where they are installed: timed beside ours, never required.

Each peer gives a differentiable function of a case's inputs; what it takes differently (a layout, a
reduction) is made ready in `prepare`, outside the timing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.card.cases import Case, rms

Function = Callable[[SimpleNamespace], Tensor]


def _varlen_layout(i: SimpleNamespace) -> tuple[Tensor, ...]:
    """q, k, v (rows, heads, head_dim) views of the packed qkv."""
    heads, head_dim = i.padded.shape[2], i.padded.shape[4]
    return i.qkv.unflatten(1, (3, heads, head_dim)).unbind(1)


def flash_attn(case: Case) -> Function:
    from flash_attn import flash_attn_varlen_func

    def run(i: SimpleNamespace) -> Tensor:
        cu, n = i.layout.cu_seqlens, i.layout.max_length
        return flash_attn_varlen_func(
            *_varlen_layout(i), cu, cu, n, n, causal="causal" in case.shape
        )

    return run


def torch_varlen(case: Case) -> Function:
    from torch.nn.attention.varlen import varlen_attn

    causal = {}
    if "causal" in case.shape:  # said in two ways, by version
        known = inspect.signature(varlen_attn).parameters
        causal = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}

    def run(i: SimpleNamespace) -> Tensor:
        cu, n = i.layout.cu_seqlens, i.layout.max_length
        return varlen_attn(*_varlen_layout(i), cu, cu, n, n, **causal)

    return run


def liger(case: Case) -> Function:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda i: loss(i.head, rms(i.h, i.norm, i.head.dtype), i.targets)


def cut_cross_entropy(case: Case) -> Function:
    from cut_cross_entropy import linear_cross_entropy

    return lambda i: linear_cross_entropy(rms(i.h, i.norm, i.head.dtype), i.head, i.targets)


# op → name of the provider, its maker, the leaves it takes gradients of (None: the case's own)
PEERS: dict[str, tuple[tuple[str, Callable[[Case], Function], tuple[str, ...] | None], ...]] = {
    "attention": (("flash-attn", flash_attn, ("qkv",)), ("torch varlen", torch_varlen, ("qkv",))),
    "cross_entropy": (
        ("liger-kernel", liger, None), ("cut-cross-entropy", cut_cross_entropy, None),
    ),
}  # fmt: skip


def installed(case: Case) -> tuple[dict[str, tuple[Function, tuple[str, ...]]], list[str]]:
    """The peers of a case's op by name, with their leaves; and the names of those not installed."""
    found, absent = {}, []
    for name, make, leaves in PEERS.get(case.op, ()):
        try:
            found[name] = (make(case), leaves or case.leaves)
        except (ImportError, OSError):  # OSError: a wheel built for another CUDA
            absent.append(name)
    return found, absent if torch.cuda.is_available() else []
