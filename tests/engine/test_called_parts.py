"""Parts of a block with a forward or hooks of their own are called where they stand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from relay_fast import LoopedBlock


def outcome(block: nn.Module, x: Tensor, *args, **options) -> list[Tensor]:
    """Outputs and gradients; the same dropout every time."""
    x = x.detach().requires_grad_()
    block.zero_grad()
    torch.manual_seed(1)
    out = block(x, *args, **options)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in block.parameters())]


def assert_same(got: list[Tensor], truth: list[Tensor], bound: float = 1e-12) -> None:
    for value, expected in zip(got, truth, strict=True):
        scale = expected.abs().max().clamp(min=1)
        assert (value - expected).abs().max() <= bound * scale


OPTIONS = {
    "activation": "swiglu", "loop_norm": "pre", "injection": "concat", "max_loops": 4,
    "dropout": 0.3, "state_noise": 0.2,
}  # fmt: skip


def noisy_block(**options) -> LoopedBlock:
    torch.manual_seed(0)
    block = LoopedBlock(16, 2, 2, **OPTIONS | options).double()
    for p in block.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return block


class Own(nn.Linear):
    """As nn.Linear, but not known to be."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("policy", ["none", "state", "sqrt"])
@pytest.mark.parametrize(
    "parts",
    [["layers.0.qkv"], ["layers.0.out", "layers.1.down"], ["layers.1.up", "layers.0.gate"],
     ["injection"]],
)  # fmt: skip
def test_called_parts_give_what_their_weights_do(parts, policy) -> None:
    block, x = noisy_block(recompute=policy), torch.randn(3, 4, 16, dtype=torch.float64)
    block.layers[0].norm1.weight.requires_grad_(False)
    truth = [g for g in outcome(block, x, [3, 1, 4], truncate=2) if g is not None]
    for part in parts:
        block.get_submodule(part).__class__ = Own
    assert set(block.weights().called) == set(parts)
    got = [g for g in outcome(block, x, [3, 1, 4], truncate=2) if g is not None]
    assert_same(got, truth)


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("bias", [False, True])
def test_all_kinds_of_blocks(norm, bias) -> None:
    options = {"norm": norm, "bias": bias, "activation": "gelu", "loop_norm": "post",
               "injection": "add", "n_kv_heads": 1, "causal": True, "max_loops": 0}  # fmt: skip
    block, x = noisy_block(**options), torch.randn(7, 16, dtype=torch.float64)
    packed = {"loops": [2, 3], "cu_seqlens": [0, 3, 7]}
    truth = outcome(block, x, **packed)
    block.layers[1].out.__class__ = Own
    assert_same(outcome(block, x, **packed), truth)


NAMES = ["layers.0", "layers.0.norm1", "layers.1.norm2", "layers.0.qkv", "layers.1.gate",
         "layers.1.down", "loop_norm", "injection", "loop_embedding"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_hooks_run_where_the_part_stands(name) -> None:
    """In forward and again in the recomputation; what they return counts."""
    block, x = noisy_block(), torch.randn(2, 3, 16, dtype=torch.float64)
    truth, seen = outcome(block, x, 2), []
    part = block.get_submodule(name)
    handles = [
        part.register_forward_hook(lambda _m, _a, out: seen.append(out.shape)),
        part.register_forward_pre_hook(lambda *_: None),
        part.register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    assert_same(outcome(block, x, 2), truth)
    forwards = [s for s in seen if s != "backward"]
    assert len(forwards) == 4 and seen.count("backward") == 2
    if name != "loop_embedding":
        assert {len(shape) for shape in forwards} == {2}
    for handle in handles:
        handle.remove()
    assert_same(outcome(block, x, 2), truth, 0)
    part.register_forward_hook(lambda _m, _a, out: 0 * out)
    assert not torch.allclose(block(x, 2), truth[0])


def test_a_changed_output_and_a_changed_gradient_are_honoured() -> None:
    """Doubling what `down` returns is doubling its weight."""
    block, x = noisy_block(dropout=0.0), torch.randn(2, 3, 16, dtype=torch.float64)
    with torch.no_grad():
        doubled = copy.deepcopy(block)
        doubled.layers[1].down.weight.mul_(2)
    truth = outcome(doubled, x, 3)
    block.layers[1].down.register_forward_hook(lambda _m, _a, out: 2 * out)
    got = outcome(block, x, 3)
    names = ["out", "x", *(name for name, _ in block.named_parameters())]
    at = names.index("layers.1.down.weight")
    got[at] = got[at] / 2
    assert_same(got, truth)
    block.layers[0].up.register_full_backward_hook(lambda _m, g, _: (0 * g[0],))
    assert not torch.allclose(outcome(block, x, 3)[1], truth[1])


def test_quantised_weights_as_training_sees_them() -> None:
    """A straight-through rounding: the same as a block whose weights are rounded outside."""

    class Rounding(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            return w.round(decimals=1)

        @staticmethod
        def backward(ctx, g):
            return g

    class Fake(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, Rounding.apply(self.weight), self.bias)

    block, x = noisy_block(), torch.randn(2, 3, 16, dtype=torch.float64)
    plain = copy.deepcopy(block)
    with torch.no_grad():
        for layer in plain.layers:
            layer.qkv.weight.copy_(layer.qkv.weight.round(decimals=1))
    for layer in block.layers:
        layer.qkv.__class__ = Fake
    assert_same(outcome(block, x, [2, 3]), outcome(plain, x, [2, 3]))


def test_parts_with_buffers_and_no_parameters() -> None:
    """int8 weights, as quantised models hold them for inference."""

    class Int8(nn.Module):
        def __init__(self, old: nn.Linear):
            super().__init__()
            self.register_buffer("scale", old.weight.detach().abs().amax() / 127)
            self.register_buffer("weight_q", (old.weight.detach() / self.scale).round().char())

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.weight_q.to(x.dtype) * self.scale).t()

    block, x = noisy_block(injection="none").eval(), torch.randn(2, 3, 16, dtype=torch.float64)
    plain = copy.deepcopy(block)
    for layer, other in zip(block.layers, plain.layers, strict=True):
        for name in ("qkv", "up", "gate", "down", "out"):
            part = Int8(getattr(layer, name))
            setattr(layer, name, part)
            getattr(other, name).weight.data = part.weight_q.double() * part.scale
    with torch.no_grad():
        assert_same([block(x, 3)], [plain(x, 3)])


def test_random_parts_draw_the_same_again() -> None:
    class Dropped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.dropout(x, 0.5))

    outcomes = []
    for policy in ("none", "state", "sqrt"):
        block = noisy_block(recompute=policy, dropout=0.0, state_noise=0.0)
        block.layers[0].up.__class__ = Dropped
        torch.manual_seed(0)
        x = torch.randn(2, 3, 16, dtype=torch.float64)
        outcomes.append(outcome(block, x, [4, 2]))
    assert_same(outcomes[1], outcomes[0])
    assert_same(outcomes[2], outcomes[0])


def test_what_a_called_part_must_not_do() -> None:
    class Observed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            return super().forward(x)

    block, x = noisy_block(), torch.randn(2, 3, 16, dtype=torch.float64)
    block.layers[0].up.register_buffer("seen", torch.zeros(()))
    block.layers[0].up.__class__ = Observed
    with pytest.raises(RuntimeError, match=r"layers.0.up \(Observed\) changed its buffer 'seen'"):
        block(x, 2)
    block = noisy_block()
    outside = torch.ones(16, dtype=torch.float64, requires_grad=True)
    block.layers[0].down.register_forward_hook(lambda _m, _a, out: out * outside)
    with pytest.raises(RuntimeError, match="needs a gradient but is not registered"):
        block(x, 2)
    block = noisy_block()
    block.layers[0].down.register_forward_hook(lambda _m, _a, out: (out, out))
    with pytest.raises(TypeError, match=r"layers.0.down .* returned a tuple"):
        block(x, 2)


def test_a_wrapper_around_a_norm_is_told_what_to_wrap() -> None:
    block = LoopedBlock(16, 2, 1)
    block.layers[0].norm1 = nn.Sequential(block.layers[0].norm1)
    with pytest.raises(TypeError, match=r"Norm holds weights only.*torch.nn.RMSNorm"):
        block(torch.randn(2, 3, 16), 2)


def test_autocast_reaches_called_parts() -> None:
    block, x = LoopedBlock(16, 2, 1), torch.randn(2, 3, 16)
    seen = []
    block.layers[0].up.register_forward_hook(lambda _m, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x, 2)
    out.sum().backward()
    assert out.dtype == torch.float32 and set(seen) == {torch.bfloat16} and len(seen) == 4


def test_what_never_runs_is_refused() -> None:
    block, x = LoopedBlock(16, 2, 1), torch.randn(2, 3, 16)
    block.layers.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"layers \(ModuleList\) has a forward hook"):
        block(x, 2)

    class Wrapped(nn.Module):
        def __init__(self, layer: nn.Module):
            super().__init__()
            for name, part in layer.named_children():
                setattr(self, name, part)

        def forward(self, x: Tensor) -> Tensor:
            return x

    block = LoopedBlock(16, 2, 1)
    block.layers[0] = Wrapped(block.layers[0])
    with pytest.raises(RuntimeError, match=r"layers.0 \(Wrapped\) has a custom forward"):
        block(x, 2)


def test_norms_of_another_kind_are_called() -> None:
    block, x = noisy_block(), torch.randn(2, 3, 16, dtype=torch.float64)
    truth = outcome(block, x, 2)
    norm = nn.RMSNorm(16, eps=1e-6).double()
    norm.load_state_dict(block.layers[0].norm1.state_dict())
    block.layers[0].norm1 = norm
    assert_same(outcome(block, x, 2), truth)


def test_under_compile_a_call_is_a_graph_break() -> None:
    block, x = LoopedBlock(16, 2, 1), torch.randn(2, 3, 16)
    truth = block(x, 2)
    block.layers[0].qkv.__class__ = Own
    torch.compiler.reset()
    assert torch.allclose(torch.compile(block, backend="eager")(x, 2), truth, atol=1e-6)
    torch.compiler.reset()
    with pytest.raises(Exception, match="(?i)graph break|unsupported|disable"):
        torch.compile(block, backend="eager", fullgraph=True)(x, 2)


class CallsTwice(nn.Linear):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


def test_a_call_of_its_own_is_honoured() -> None:
    block, doubled = (LoopedBlock(16, 2, 1).double() for _ in range(2))
    doubled.load_state_dict(block.state_dict())
    up = CallsTwice(16, 64, bias=False).double()
    up.weight = nn.Parameter(block.layers[0].up.weight.detach() / 2)
    doubled.layers[0].up = up
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    got, truth = outcome(doubled, x, 3), outcome(block, x, 3)
    names = [name for name, _ in block.named_parameters()]
    got[2 + names.index("layers.0.up.weight")] /= 2
    assert_same(got, truth)
