"""The looping regulariser, and stacks that are made loops."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import relay_fast
from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.models.classifier import LoopedClassifier
from relay_fast.models.layer_stack import (
    block_cosines,
    layer_similarity,
    loop_regularizer,
    stack_of,
    tie,
)
from relay_fast.models.looped_block import LoopedBlock
from relay_fast.models.transformers import AutoregressiveTransformer

GROUPS = ["q", "k", "v", "out", "up", "down"]


def block(layers: int = 4, **options) -> LoopedBlock:
    return LoopedBlock(12, 2, layers, causal=True, **options)


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum() / (a.norm() * b.norm())


@pytest.mark.parametrize("period", [1, 2])
def test_the_formula(period) -> None:
    layers = block().layers
    found = block_cosines(layers, period)
    assert list(found) == GROUPS
    pairs = range(4 - period)
    for name in ("up", "down", "out"):
        weights = [getattr(layer, name).weight for layer in layers]
        expected = sum(cosine(weights[l], weights[l + period]) for l in pairs) / len(pairs)
        assert torch.isclose(found[name], expected, atol=1e-6)
    weights = [layer.qkv.weight[12:24] for layer in layers]
    expected = sum(cosine(weights[l], weights[l + period]) for l in pairs) / len(pairs)
    assert torch.isclose(found["k"], expected, atol=1e-6)
    mean = sum(found.values()) / len(found)
    assert torch.isclose(loop_regularizer(layers, period), 1 - mean)
    similarity = layer_similarity(layers)
    assert torch.allclose(similarity.diagonal(), torch.ones(4))
    assert torch.isclose(similarity.diagonal(period).mean(), mean, atol=1e-6)


def test_grouped_query_heads_and_gates_are_groups_of_their_own() -> None:
    layers = block(2, n_kv_heads=1, activation="swiglu", bias=True).layers
    weights = [layer.qkv.weight[12:18] for layer in layers]
    found = block_cosines(layers)
    assert list(found) == ["q", "k", "v", "out", "up", "gate", "down"]
    assert torch.isclose(found["k"], cosine(*weights), atol=1e-6)


def test_any_modules_have_cosines() -> None:
    layers = [nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)) for _ in range(2)]
    layers[1][0].weight.data = -2 * layers[0][0].weight.data
    found = block_cosines(layers)
    assert list(found) == ["0", "1"] and torch.isclose(found["0"], torch.tensor(-1.0))


def test_descending_on_it_draws_the_layers_together() -> None:
    stack = block()
    optimizer = torch.optim.Adam(stack.parameters(), 0.03)
    first = loop_regularizer(stack.layers).item()
    for _ in range(30):
        optimizer.zero_grad()
        loop_regularizer(stack.layers).backward()
        optimizer.step()
    assert first > 0.9 and loop_regularizer(stack.layers).item() < 0.2


@pytest.mark.parametrize("period", [1, 2])
@pytest.mark.parametrize("how", ["mean", "first"])
def test_a_stack_of_equal_blocks_is_its_loop(period, how) -> None:
    stack = block()
    for i in range(period, 4):
        stack.layers[i].load_state_dict(stack.layers[i - period].state_dict())
    looped = tie(stack, period, how)
    x = torch.randn(2, 5, 12)
    assert (looped.config.n_layers, len(looped.layers)) == (period, period)
    assert torch.allclose(looped(x, 4 // period), stack(x, 1), atol=1e-6)
    assert len(stack.layers) == 4 and loop_regularizer(stack.layers, period).item() < 1e-5


def test_the_mean_and_the_first_block() -> None:
    stack = block()
    means = tie(stack, 2).layers[1].up.weight
    expected = (stack.layers[1].up.weight + stack.layers[3].up.weight) / 2
    assert torch.allclose(means, expected)
    assert torch.equal(tie(stack, 2, "first").layers[1].up.weight, stack.layers[1].up.weight)


def test_whole_models() -> None:
    config = BlockConfig(12, 2, 4, causal=True)
    model = LoopedClassifier(config, 7, loops=1, prelude=1, coda=1)
    looped = relay_fast.tie(model, 2)
    assert (looped.loops, looped.block.config.n_layers, len(looped.prelude.layers)) == (2, 2, 1)
    assert looped(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, 12)
    loss, _ = looped.loss(
        torch.zeros(1, 3, dtype=torch.int64), torch.tensor([2]), torch.tensor([1])
    )
    loss.backward()  # the copy has its own parameters
    assert model.block.layers[0].up.weight.grad is None
    model = AutoregressiveTransformer(ModelConfig(config, 7))
    assert relay_fast.tie(model).config.block.n_layers == 1 and model.config.block.n_layers == 4
    holder = nn.Sequential(nn.Linear(2, 2), block())
    assert stack_of(holder) is holder[1]


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: tie(block(), 3),
            "period = 3 does not divide a stack of 4 layers into at least two",
        ),
        (lambda: loop_regularizer(block().layers, 4), "period = 4 does not divide a stack of 4"),
        (lambda: loop_regularizer(block(1).layers), "period = 1 does not divide a stack of 1"),
        (lambda: tie(block(), how="median"), "how = 'median' is unknown"),
        (lambda: tie(nn.Linear(2, 2)), "Linear holds 0 LoopedBlocks: pass one of them"),
        (lambda: tie(nn.Sequential(block(), block())), "Sequential holds 2 LoopedBlocks"),
    ],
)
def test_bad_input(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_computed_weights_are_what_counts() -> None:
    """A parametrization that negates one layer's matrix turns its cosines around."""

    class Negated(nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return -w

    layers = block(2, bias=True).layers
    before = block_cosines(layers)
    parametrize.register_parametrization(layers[1].up, "weight", Negated())
    after = block_cosines(layers)
    assert list(after) == GROUPS and torch.equal(after["up"], -before["up"])
    assert all(torch.equal(after[name], before[name]) for name in GROUPS if name != "up")
    loop_regularizer(layers).backward()
    assert layers[1].up.parametrizations.weight.original.grad.abs().sum() > 0
    layers[0].down.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"down \(ResidualLinear\) has a forward hook"):
        block_cosines(layers)
