"""The loop without the engine: as the engine in results, gradients and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import relay_fast
from benchmarks.numerics import assert_bitwise, assert_close
from relay_fast.engine import module_loop

D = 6


class Shifts(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.dropout = nn.Linear(D, D), nn.Dropout(0.3)

    def forward(self, h: Tensor, x0: Tensor, shift: Tensor, iteration: int) -> Tensor:
        return h + self.dropout(torch.tanh(self.inner(h) + x0)) * iteration + shift


class Uses:
    """Records which way the calls took."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.taken: list[str] = []
        for name in ("plain_loop", "_run"):
            function = getattr(module_loop, name)
            spy = lambda *a, f=function, n=name: (self.taken.append(n), f(*a))[1]
            monkeypatch.setattr(module_loop, name, spy)

    def last(self) -> str:
        return self.taken[-1]


@pytest.fixture
def uses(monkeypatch: pytest.MonkeyPatch) -> Uses:
    return Uses(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("want_states", [False, True, [2, 4]], ids=str)
def test_bits_are_those_of_the_engine(uses: Uses, dtype, packed: bool, want_states) -> None:
    torch.manual_seed(0)
    module = Shifts().to(dtype)
    x, x0 = (torch.randn(3, D, dtype=dtype, requires_grad=True) for _ in range(2))
    shift = torch.randn(D, dtype=dtype, requires_grad=True)
    results = []
    for policy, way in (("none", "plain_loop"), ("state", "_run")):
        torch.manual_seed(1)
        got = relay_fast.loop(
            module,
            x,
            4,
            per_row={"x0": x0},
            shared={"shift": shift},
            recompute=policy,
            start=2,
            return_states=want_states,
            cu_seqlens=[0, 1, 3] if packed else None,
        )
        assert uses.last() == way
        states = got if isinstance(got, list) else [got]
        loss = sum((s * (i + 1)).sum() for i, s in enumerate(states))
        grads = torch.autograd.grad(loss, [x, x0, shift, *module.parameters()])
        results.append([*states, torch.rand(1), *grads])
    for value, expected in zip(*results, strict=True):
        if want_states is False:
            assert_bitwise("result", value, expected)
        else:  # a state's gradient is a sum of three, in another order
            assert_close("result", value, expected, 4 * torch.finfo(value.dtype).eps)


def test_which_way_is_taken(uses: Uses) -> None:
    module, x = nn.Linear(D, D), torch.randn(2, D)
    plain = [
        lambda: relay_fast.loop(module, x, 3, recompute="none"),
        lambda: relay_fast.loop(module, x, [3, 3], recompute="none"),
        lambda: torch.no_grad()(relay_fast.loop)(module, x, 3),
        lambda: torch.no_grad()(relay_fast.loop)(module, x, 3, truncate=1),
        lambda: torch.inference_mode()(relay_fast.loop)(module, x, 3),
    ]
    engine = [
        lambda: relay_fast.loop(module, x, 3),
        lambda: relay_fast.loop(module, x, [3, 2], recompute="none"),
        lambda: relay_fast.loop(module, x, 0, recompute="none"),
        lambda: relay_fast.loop(module, x, 3, recompute="none", truncate=1),
        lambda: relay_fast.loop(module, x, 3, recompute="none", until=lambda t, a, b: a[:, 0] > 9),
        # Sums of 16-bit gradients are kept in fp32.
        lambda: relay_fast.loop(module.bfloat16(), x.bfloat16(), 3, recompute="none"),
        lambda: torch.autocast("cpu")(relay_fast.loop)(module.float(), x, 3, recompute="none"),
    ]
    for calls, way in ((plain, "plain_loop"), (engine, "_run")):
        for i, call in enumerate(calls):
            call()
            assert uses.last() == way, i


def test_the_result_is_not_the_input() -> None:
    x = torch.randn(2, D)
    for state in (x, {"a": x}):
        out = relay_fast.loop(nn.Identity(), state, 2, recompute="none")
        out = out if isinstance(out, Tensor) else out["a"]
        assert_bitwise("output", out, x)
        assert out.data_ptr() != x.data_ptr()


class Casts(nn.Module):
    def forward(self, h: object) -> object:
        return h.double() if isinstance(h, Tensor) else [t.double() for t in h]


def test_results_have_the_dtype_of_the_state() -> None:
    x = torch.randn(2, D)
    assert relay_fast.loop(Casts(), x, 2, recompute="none").dtype == torch.float32
    assert relay_fast.loop(Casts(), [x], 2, recompute="none")[0].dtype == torch.float32


class Counts(nn.Module):
    def __init__(self, late: bool):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.late, self.times = late, 0

    def forward(self, h: Tensor) -> Tensor:
        self.times += 1
        if not self.late or self.times > 1:
            self.calls += 1
        return h * 1


class InPlace(nn.Module):
    def forward(self, h: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        return h.add_(1) if isinstance(h, Tensor) else [t.add_(1) for t in h]


def test_refusals_without_gradients() -> None:
    x = torch.randn(2, D)
    for late in (False, True):
        with pytest.raises(RuntimeError, match="changed its buffer 'calls'"):
            relay_fast.loop(Counts(late), x, 3)
    for state in (x, [x]):
        with pytest.raises(RuntimeError, match="changed its input in place"):
            relay_fast.loop(InPlace(), state, 3)
    with pytest.raises(ValueError, match=r"from \(2, 6\) to \(2, 3\): a looped module must keep"):
        relay_fast.loop(nn.Linear(D, 3), x, 3, recompute="none")
