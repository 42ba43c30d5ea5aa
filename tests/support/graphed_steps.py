"""Batches of different shapes, and training steps over them that may be graphs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.common import synthetic_batch
from relay_fast.batch.packed import PackedBatch
from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.models.transformers import LoopedTransformer
from relay_fast.training import cuda_graph
from relay_fast.training.optim import set_lr_scale

VOCABULARY = 40
SHAPES = (  # lengths and loops; the last ones are over before the capacity is
    ([3, 7, 1, 5], [1, 4, 3, 2]),
    ([6, 2], [3, 3]),
    ([4, 4, 4], [1, 1, 1]),
    ([1, 3], [4, 0]),
)


def batch_of(lengths, loops, seed: int = 0, targets: int | None = 2) -> PackedBatch:
    return synthetic_batch(np.array(lengths), np.array(loops), targets, VOCABULARY, seed=seed)


def batches() -> list[PackedBatch]:
    return [batch_of(*shape, seed=seed) for seed, shape in enumerate(SHAPES)]


def make_model(impl: str = "torch", recompute: str = "state", **options) -> LoopedTransformer:
    torch.manual_seed(0)
    block = BlockConfig(**({"d_model": 16, "n_heads": 2, "n_layers": 2} | options))
    model = LoopedTransformer(ModelConfig(block, VOCABULARY), recompute=recompute, impl=impl)
    return model.to(torch.float64 if impl == "torch" else torch.float32)


def train(step, model, optimizer) -> list[float]:
    taken = []
    for i, batch in enumerate([*batches(), batch_of([9, 3], [2, 1]), *batches()]):
        set_lr_scale(optimizer, 1 / (1 + i))
        losses = step(batch)
        taken += [
            float(losses.loss.detach()),
            float(losses.chain_correct),
            float(losses.answer_correct),
        ]
    return taken + [float(p.detach().double().sum()) for p in model.parameters()]


def plain_step(model, optimizer):
    def step(batch):
        losses = model.loss(batch)
        optimizer.zero_grad()
        losses.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        return losses

    return step


def sgd(model) -> torch.optim.Optimizer:
    """Takes tensor learning rates on a CPU, which a capturable AdamW does not."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    optimizer.param_groups[0]["base_lr"] = 1e-2
    return optimizer


def play_graphs(patch: pytest.MonkeyPatch) -> None:
    """A graph is played by taking again, over the static buffers, what it would capture."""
    patch.setattr(cuda_graph, "graph_reason", lambda *_: None)
    patch.setattr(cuda_graph, "on_side_stream", lambda body: body())
    patch.setattr(cuda_graph, "captured", lambda body, *_: body)
