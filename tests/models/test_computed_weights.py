"""Weights that something computes: each is read once a call, and gradients flow into its origin."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from relay_fast import LoopedBlock

pytestmark = pytest.mark.filterwarnings("ignore")

D = 16
X = torch.randn(2, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
CHANGES: dict[str, Callable[[nn.Linear], object]] = {
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "pruned weight": lambda part: prune.l1_unstructured(part, "weight", amount=0.5),
    "pruned bias": lambda part: prune.l1_unstructured(part, "bias", amount=0.5),
    "parametrized weight_norm": parametrizations.weight_norm,
    "parametrized spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "relu": lambda part: parametrize.register_parametrization(part, "weight", nn.ReLU()),
}


def make_block(**options) -> LoopedBlock:
    torch.manual_seed(0)
    options = {"activation": "swiglu", "norm": "layer", "bias": True} | options
    block = LoopedBlock(D, 2, 2, **options).double()
    for p in block.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return block


def outcome(call: Callable[[], Tensor], block: nn.Module) -> list[Tensor]:
    block.zero_grad()
    out = call()
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in block.parameters())]


def assert_same(got: list[Tensor], truth: list[Tensor]) -> None:
    for value, expected in zip(got, truth, strict=True):
        assert (value - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("part", ["qkv", "down"])
@pytest.mark.parametrize("change", CHANGES)
def test_computed_weights(change, part) -> None:
    """Against functional_call of a plain block with the weight that the part itself applies."""
    block, plain = make_block(), make_block()
    changed = getattr(block.layers[0], part)
    CHANGES[change](changed)
    assert not block.weights().called
    buffers = copy.deepcopy(dict(changed.named_buffers()))  # power iterations advance in training
    got = outcome(lambda: block(X, [3, 2]), block)
    for name, buffer in changed.named_buffers():
        buffer.data.copy_(buffers[name])

    def by_hand() -> Tensor:
        width = changed.in_features
        zero, *columns = changed(torch.eye(width + 1, width, dtype=X.dtype).flip(0))
        weight = (torch.stack(columns[::-1]) - zero).t()
        prefix = f"layers.0.{part}."
        named = {n: p for n, p in block.named_parameters() if not n.startswith(prefix)}
        named |= {f"{prefix}weight": weight, f"{prefix}bias": zero}
        return torch.func.functional_call(plain, named, (X, [3, 2]))

    assert_same(got, outcome(by_hand, block))


def test_tied_layers() -> None:
    """The same layer twice is one layer, looped twice as often; tied weights share one gradient."""
    block, one = make_block(), make_block()
    block.layers[1] = block.layers[0]
    one.set_layers([one.layers[0]])
    assert_same(outcome(lambda: block(X, 2), block), outcome(lambda: one(X, 4), one))
    tied, apart = make_block(), make_block()
    tied.layers[1].qkv.weight = tied.layers[0].qkv.weight
    apart.layers[1].qkv.weight.data.copy_(apart.layers[0].qkv.weight)
    outcome(lambda: tied(X, 3), tied), outcome(lambda: apart(X, 3), apart)
    total = apart.layers[0].qkv.weight.grad + apart.layers[1].qkv.weight.grad
    assert_same([tied.layers[0].qkv.weight.grad], [total])


def test_functional_call() -> None:
    block, other = make_block(), make_block()
    named = {n: (2 * p).detach().requires_grad_() for n, p in block.named_parameters()}
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    truth = outcome(lambda: other(X, [1, 3]), other)
    out = torch.func.functional_call(block, named, (X, [1, 3]))
    assert_same([out, *torch.autograd.grad(out.square().sum(), list(named.values()))], truth)
    assert all(p.grad is None for p in block.parameters())


def replica(module: nn.Module) -> nn.Module:
    """What torch.nn.DataParallel makes on each card."""
    made = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        if parameter is not None:
            setattr(made, name, parameter * 1)
    made._modules = {name: replica(part) for name, part in module._modules.items()}
    return made


def test_replicas_of_data_parallel() -> None:
    block = make_block()
    truth = outcome(lambda: block(X, [3, 2]), block)
    assert_same(outcome(lambda: replica(block)(X, [3, 2]), block), truth)
    block.layers[0].up.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"DataParallel.*use torch.*DistributedDataParallel"):
        replica(block)(X, 2)


def test_a_weight_is_computed_once_a_call() -> None:
    calls = []

    class Counted(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            calls.append(1)
            return 2 * w

    block = make_block(recompute="state")
    parametrize.register_parametrization(block.layers[0].up, "weight", Counted(), unsafe=True)
    calls.clear()
    block(X, 4).sum().backward()
    assert len(calls) == 1


def test_weights_of_a_class_of_their_own_are_used_by_calling_the_part() -> None:
    """As quantised tensors are: the product is the tensor's own."""
    seen = []

    class Scaled(Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is nn.functional.linear:
                seen.append(1)
                x, w, *bias = (a.as_subclass(Tensor) if isinstance(a, cls) else a for a in args)
                return nn.functional.linear(x, 2 * w, *bias)
            return super().__torch_function__(function, types, args, kwargs)

    block, plain = make_block(), make_block()
    with torch.no_grad():
        plain.layers[0].up.weight.mul_(2)
    up = block.layers[0].up
    up.weight = nn.Parameter(up.weight.detach().as_subclass(Scaled))
    assert set(block.weights().called) == {"layers.0.up"}
    with torch.no_grad():
        assert torch.allclose(block(X, 3), plain(X, 3), rtol=0, atol=1e-12) and len(seen) == 3
