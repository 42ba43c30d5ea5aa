"""Built on meta, given memory by to_empty, drawn by reset_parameters: as the constructor draws."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from relay_fast import (
    AutoregressiveTransformer,
    IterationCrossEntropy,
    LoopedBlock,
    LoopedClassifier,
    LoopedTransformer,
)
from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.models.layer import Layer, Norm
from relay_fast.recipes._linear_attention import LinearAttention

# Many layers: what scales with their number differs from torch's own draw by far.
BLOCK = BlockConfig(
    64,
    2,
    6,
    causal=True,
    norm="layer",
    bias=True,
    activation="swiglu",
    max_loops=3,
    loop_norm="post",
    injection="concat",
)
MODEL = ModelConfig(BLOCK, 97)
MAKERS = {
    "LoopedBlock": lambda: LoopedBlock(config=BLOCK),
    "Layer": lambda: Layer(BLOCK),
    "Norm": lambda: Norm(64, True),
    "LinearAttention": lambda: LinearAttention(65),
    "LoopedTransformer": lambda: LoopedTransformer(MODEL),
    "AutoregressiveTransformer": lambda: AutoregressiveTransformer(MODEL),
    "LoopedClassifier": lambda: LoopedClassifier(BLOCK, 97, loops=2, prelude=1, coda=1),
    "IterationCrossEntropy": lambda: IterationCrossEntropy(64, 97, norm="layer", bias=True),
}


def of_every_module(module: nn.Module, order) -> None:
    for part in order(list(module.modules())):
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()


WAYS = {
    "parents first": lambda m: of_every_module(m, list),
    "children first": lambda m: of_every_module(m, reversed),
    "the outer alone": lambda m: m.reset_parameters(),
    "who holds parameters": lambda m: [
        part.reset_parameters() for part in m.modules() if list(part.parameters(recurse=False))
    ],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MAKERS)
def test_meta_then_reset(name, way) -> None:
    with torch.device("meta"):
        module = MAKERS[name]()
    assert all(p.is_meta for p in module.parameters())
    module.to_empty(device="cpu")
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(torch.nan)
    torch.manual_seed(1)
    WAYS[way](module)
    torch.manual_seed(0)
    made = MAKERS[name]()
    for (key, p), q in zip(module.named_parameters(), made.parameters(), strict=True):
        assert torch.isfinite(p).all(), key
        if (
            p.ndim == 1
            and not key.endswith(("qkv.bias", "out.bias", "up.bias", "gate.bias", "down.bias"))
            or "loop_embedding" in key
        ):
            assert torch.equal(p, q), key  # no draw: ones, zeros
        elif p.ndim == 2:
            a, b = p.std().item(), q.std().item()
            assert abs(a / b - 1) < 0.06, (key, a, b)  # 4096 numbers or more: 3 σ is 3.3 % each
            # Normal and uniform differ in their largest number.
            assert abs(p.abs().max().item() / a - q.abs().max().item() / b) < 1.6, key
            assert not torch.equal(p, q), key


def test_seeds_give_the_models_they_gave() -> None:
    torch.manual_seed(0)
    model = LoopedTransformer(ModelConfig(BlockConfig(16, 2, 2, max_loops=3), 11))
    torch.manual_seed(0)
    embedding = nn.Embedding(11, 16)
    nn.init.normal_(embedding.weight)
    for layer in model.block.layers:
        linears = [
            nn.Linear(*shape, bias=False) for shape in ((16, 48), (16, 16), (16, 64), (64, 16))
        ]
        for linear in (linears[1], linears[3]):
            nn.init.normal_(linear.weight, std=(4 * linear.in_features) ** -0.5)
        parts = (layer.qkv, layer.out, layer.up, layer.down)
        for part, linear in zip(parts, linears, strict=True):
            assert torch.equal(part.weight, linear.weight)
    nn.Embedding(3, 16)
    assert torch.equal(model.embedding.weight, embedding.weight)
    assert torch.equal(model.chain_head.weight, nn.Linear(16, 11, bias=False).weight)
