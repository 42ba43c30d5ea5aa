"""Samples of all tasks and a small model that is fed its rounds."""

import numpy as np
import torch

from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.models.transformers import LoopedTransformer
from relay_fast.tasks import TASK_NAMES, Samples, Vocabulary, build_tasks
from relay_fast.tasks.vocabulary import PAD

VOCABULARY = Vocabulary(49, 1)
TASKS = build_tasks(
    TASK_NAMES,
    VOCABULARY,
    arithmetic={"prime": 11},
    edit_distance={"letters": 4, "alphabet": [2, 4]},
    lis={"group": 3, "low": 0, "high": 49},
)
D = 16


def mixed(each: int = 4) -> Samples:
    rng = np.random.default_rng(0)
    return Samples.concat(
        [
            TASKS[name].sample(rng.integers(1, most, each), seed=1)
            for name, most in (("arithmetic", 6), ("edit_distance", 6), ("lis", 14))
        ]
    )


def new_model(**options) -> LoopedTransformer:
    """A model that writes `<pad>` now and then, so that its rounds begin anywhere."""
    torch.manual_seed(1)
    model = LoopedTransformer(
        ModelConfig(BlockConfig(D, 2, 2), VOCABULARY.size, feedback="tokens", **options)
    )
    with torch.no_grad():
        model.chain_head.weight[PAD] *= 2.5
    return model
