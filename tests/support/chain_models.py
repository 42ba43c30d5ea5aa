"""Small models that write chains, untrained, and problems of all tasks."""

from __future__ import annotations

import numpy as np

from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.models.transformers import AutoregressiveTransformer, LoopedTransformer
from relay_fast.tasks import Samples, Vocabulary, build_tasks

VOCABULARY = Vocabulary(max_number=60, multiple=1)
TASKS = build_tasks(
    ["arithmetic", "edit_distance", "lis"],
    VOCABULARY,
    arithmetic={"prime": 5},
    lis={"group": 4, "high": 60},
)


def looped_model(supervise: str = "chain", max_tokens: int = 64) -> LoopedTransformer:
    config = ModelConfig(BlockConfig(16, 2, 1), VOCABULARY.size, max_tokens)
    return LoopedTransformer(config, supervise=supervise)


def looped_copy(model: LoopedTransformer) -> LoopedTransformer:
    copy = looped_model()
    copy.load_state_dict(model.state_dict())
    return copy


def ar_model(max_tokens: int = 200) -> AutoregressiveTransformer:
    config = ModelConfig(BlockConfig(16, 2, 1, causal=True), VOCABULARY.size, max_tokens)
    return AutoregressiveTransformer(config)


def mixed_problems(number: int = 12) -> Samples:
    """All tasks, mixed lengths, in an order that no batch keeps."""
    rng = np.random.default_rng(0)
    parts = [task.sample(rng.integers(1, 7, number), 1) for task in TASKS.values()]
    problems = Samples.concat(parts)
    return problems.take(rng.permutation(len(problems)))
