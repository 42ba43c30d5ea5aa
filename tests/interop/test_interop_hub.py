"""Subclasses with the Hub's mixin come back from their folder as they were saved."""

import pytest
import torch
from torch import nn

from relay_fast import (
    AutoregressiveTransformer,
    IterationCrossEntropy,
    LoopedBlock,
    LoopedClassifier,
    LoopedTransformer,
    grow,
    tie,
)
from relay_fast.config import BlockConfig, ModelConfig

huggingface_hub = pytest.importorskip("huggingface_hub")
Mixin = huggingface_hub.PyTorchModelHubMixin

BLOCK = BlockConfig(16, 2, 2, causal=True, norm="layer", bias=True, max_loops=3)
MODEL = ModelConfig(BLOCK, 11, max_tokens=9)


class Block(LoopedBlock, Mixin):
    pass


class OwnInit(LoopedBlock, Mixin):
    def __init__(self, config: BlockConfig):
        super().__init__(config=config)


class Options(LoopedBlock, Mixin):
    def __init__(self, config: BlockConfig, **options):
        super().__init__(config=config, **options)


class Width(LoopedBlock, Mixin):
    def __init__(self, width: int):
        super().__init__(width, 2, 1)


class Looped(LoopedTransformer, Mixin):
    pass


class Autoregressive(AutoregressiveTransformer, Mixin):
    def __init__(self, config: "ModelConfig"):  # as under `from __future__ import annotations`
        super().__init__(config)


class Classifier(LoopedClassifier, Mixin):
    pass


class Loss(IterationCrossEntropy, Mixin):
    pass


class Around(nn.Module, Mixin):
    def __init__(self, config: BlockConfig):
        super().__init__()
        self.block = LoopedBlock(config=config)


MAKERS = {
    "config": lambda: Block(config=BLOCK, recompute="none"),
    "sizes": lambda: Block(16, 2, 2, causal=True, recompute="none"),
    "own init": lambda: OwnInit(BLOCK),
    "options": lambda: Options(BLOCK, recompute="none"),
    "another signature": lambda: Width(16),
    "looped": lambda: Looped(MODEL, supervise="answer"),
    "autoregressive": lambda: Autoregressive(MODEL),
    "classifier": lambda: Classifier(BLOCK, 11, loops=2, coda=1),
    "loss": lambda: Loss(16, 11, z_loss=0.5),
    "around": lambda: Around(BLOCK),
}


def reloaded(module, folder):
    module.save_pretrained(folder)
    other = type(module).from_pretrained(folder, strict=True)
    wanted = module.state_dict()
    assert wanted.keys() == other.state_dict().keys()
    for name, value in other.state_dict().items():
        assert torch.equal(value, wanted[name]), name
    for name in ("config", "recompute", "supervise", "loops", "options"):
        assert getattr(other, name, None) == getattr(module, name, None), name
    return other


@pytest.mark.parametrize("name", MAKERS)
def test_round_trip(name, tmp_path) -> None:
    reloaded(reloaded(MAKERS[name](), tmp_path / "first"), tmp_path / "second")


@pytest.mark.parametrize("name", ["config", "looped", "classifier"])
def test_round_trip_of_grown_and_tied_models(name, tmp_path) -> None:
    module = MAKERS[name]()
    grow(module)
    reloaded(module, tmp_path / "grown")
    reloaded(tie(module), tmp_path / "tied")
