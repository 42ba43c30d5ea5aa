"""What the tests of Triton kernels share: inputs between rows of NaN, outputs whose neighbours must
not change and that are NaN until they are written, and the rules that a kernel is held to.

Truth is the reference in fp64 on the same (rounded) inputs. fp32 must agree to an RMS ratio of
1e-5; 16-bit errors are judged against the reference's own in that dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.numerics import assert_as_good_as_eager, assert_bitwise, describe, rms_ratio
from relay_fast.functional import REFERENCE, Ops, select
from relay_fast.kernels.dropout_ref import Dropout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GUARD = 3  # rows around every buffer
Outputs = dict[str, Tensor]


class Make:
    """Draws the same numbers for kernel, eager and truth, each in its own dtype."""

    def __init__(self, mode: str, dtype: torch.dtype):
        self.mode, self.dtype = mode, dtype
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0, state: bool = False) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        stored = drawn.to(torch.float32 if state else self.dtype).to(DEVICE)
        if self.mode == "truth":
            return stored.double()
        return guarded(stored) if self.mode == "kernel" else stored

    def positive(self, *shape: int) -> Tensor:
        return self(*shape, scale=0.1, state=True).add_(1)

    def ints(self, low: int, high: int, count: int) -> Tensor:
        return self._list(torch.randint(low, high, (count,), generator=self.generator))

    def order(self, size: int, count: int) -> Tensor:
        """`count` of 0..size − 1, each at most once."""
        return self._list(torch.randperm(size, generator=self.generator)[:count])

    def _list(self, drawn: Tensor) -> Tensor:
        drawn = drawn.to(DEVICE)
        return guarded(drawn) if self.mode == "kernel" else drawn

    def zeros(self, *shape: int) -> Tensor:
        wide = torch.float64 if self.mode == "truth" else torch.float32
        return torch.zeros(shape, dtype=wide, device=DEVICE)


def guarded(t: Tensor | None) -> Tensor | None:
    """A copy of t whose neighbours in memory are NaN (of indices: far outside of every buffer)."""
    if t is None:
        return None
    around = float("nan") if t.is_floating_point() else 1 << 40
    shape = (t.shape[0] + 2 * GUARD, *t.shape[1:])
    buffer = torch.full(shape, around, dtype=t.dtype, device=t.device)
    buffer[GUARD:-GUARD] = t
    return buffer[GUARD:-GUARD]


@contextmanager
def guarded_outputs() -> Iterator[None]:
    """Every buffer that is allocated inside starts as NaN (integers: 85), and what lies around it
    must stay so."""
    buffers: list[tuple[Tensor, Tensor]] = []
    empty, pad = torch.empty, 64

    def allocate(*size, dtype=None, device=None, **_) -> Tensor:
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        dtype = dtype or torch.float32
        stored = torch.int8 if dtype == torch.bool else dtype
        fill = float("nan") if stored.is_floating_point else 85
        flat = empty(shape.numel() + 2 * pad, dtype=stored, device=device).fill_(fill)
        around = torch.cat((flat[:pad], flat[-pad:]))
        buffers.append((flat, around))
        return flat[pad : pad + shape.numel()].view(shape).view(dtype)

    like = lambda t: allocate(t.shape, dtype=t.dtype, device=t.device)
    zeros = lambda *size, **options: allocate(*size, **options).zero_()
    with patch.multiple(torch, empty=allocate, zeros=zeros, empty_like=like):
        yield
    for flat, around in buffers:
        now = torch.cat((flat[:pad], flat[-pad:]))
        assert torch.equal(now.view(torch.uint8), around.view(torch.uint8)), "out of bounds"


def check(case: Callable[[Ops, Make], Outputs], dtype: torch.dtype) -> None:
    """Holds the kernels' outputs to the rules, and two runs to the same bits."""
    kernels = select("triton", DEVICE)
    with guarded_outputs():
        value = case(kernels, Make("kernel", dtype))
    again = case(kernels, Make("kernel", dtype))
    truth = case(REFERENCE, Make("truth", dtype))
    eager = case(REFERENCE, Make("eager", dtype))
    assert set(value) == set(truth)
    for name, t in truth.items():
        assert value[name].shape == t.shape, name
        if not t.numel():
            continue
        assert_bitwise(name, value[name], again[name])
        if t.dtype in (torch.bool, torch.int64):
            assert_bitwise(name, value[name], t)
        elif dtype == torch.float32:
            assert rms_ratio(value[name], t) <= 1e-5, describe(name, value[name], t)
        else:
            assert_as_good_as_eager(name, value[name], eager[name], t, dtype)


def named(names: str, values) -> Outputs:
    """Outputs by name, without those that are absent."""
    pairs = zip(names.split(), values, strict=True)
    return {name: value for name, value in pairs if value is not None and name != "_"}


def dropout_of(rows: int, p: float) -> Dropout | None:
    """Tokens of any order, as the plan's sorting leaves them."""
    if not p:
        return None
    tokens = torch.arange(rows, device=DEVICE).flip(0) * 7
    return Dropout(p, torch.tensor(2**31 + 5, device=DEVICE), 3, 11, tokens)
