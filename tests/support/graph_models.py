"""Models and batches whose chains are read as graphs."""

from __future__ import annotations

import numpy as np
import torch

from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.decoding.chains import stream_order
from relay_fast.models.transformers import LoopedTransformer
from relay_fast.tasks import Samples
from relay_fast.tasks.vocabulary import PAD
from tests.support import fed_models
from tests.support.fed_models import TASKS

FED = {"feedback": "tokens"}
KINDS = {
    "latent": {"loop_norm": "post"},
    "injected": {"injection": "concat", "max_loops": 9, "norm": "layer", "bias": True},
    "carried": {"carry_state": True, **FED},
    "fed": {"loop_norm": "post", **FED},
    "fed, no positions": {"rope_base": None, "loop_norm": "pre", **FED},
}


def model_of(kind: str, impl: str = "torch", n_layers: int = 2) -> LoopedTransformer:
    options = dict(KINDS[kind])
    own = {name: options.pop(name) for name in ("feedback", "carry_state") if name in options}
    torch.manual_seed(1)
    block = BlockConfig(16, 2, n_layers, **options)
    model = LoopedTransformer(ModelConfig(block, fed_models.VOCABULARY.size, **own), impl=impl)
    with torch.no_grad():  # `<pad>` now and then, so that rounds begin anywhere
        model.chain_head.weight[PAD] *= 2.5
    return model


def problems(number: int = 8, names: tuple[str, ...] = tuple(TASKS), seed: int = 0) -> Samples:
    rng = np.random.default_rng(seed)
    parts = [TASKS[name].sample(rng.integers(1, 7, number), seed) for name in names]
    return Samples.concat(parts)


def batches(*sizes: int, **options) -> list[Samples]:
    """The first holds the others; lengths and loops of all are drawn."""
    drawn = [problems(n, seed=seed, **options) for seed, n in enumerate(sizes)]
    return [own.take(stream_order(own)) for own in drawn]


def assert_same(one: tuple, two: tuple) -> None:
    (samples, scores), (others, other_scores) = one, two
    for name in Samples.__dataclass_fields__:
        own, other = getattr(samples, name), getattr(others, name)
        assert np.array_equal(own, other) and own.dtype == other.dtype, name
    assert (scores is None) == (other_scores is None)
    for own, other in zip(scores or (), other_scores or (), strict=True):
        assert own.dtype == other.dtype == np.float32
        np.testing.assert_allclose(own, other, atol=2e-5)
