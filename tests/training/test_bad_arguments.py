"""What `warmup` and `memory_estimate` say of arguments that they cannot take."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from relay_fast.batch.capacity import Capacity
from relay_fast.batch.packed import PackedBatch
from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.models.classifier import LoopedClassifier
from relay_fast.models.looped_block import LoopedBlock
from relay_fast.models.transformers import LoopedTransformer
from relay_fast.training.memory import memory_estimate
from relay_fast.training.warmup import warmup
from tests.support.chain_models import TASKS, VOCABULARY, mixed_problems

CONFIG = ModelConfig(BlockConfig(16, 2, 1), VOCABULARY.size, 64)


def batch() -> PackedBatch:
    return PackedBatch.looped(mixed_problems(2), TASKS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, r"^model is None: give the model of the run, or a block$"),
        ({"model": LoopedBlock}, "model is the class LoopedBlock: give the model"),
        ({"model": nn.ReLU()}, "the model has no parameters: give the model of the run"),
        ({"batches": []}, "batches is empty: give at least one batch of the run"),
        ({"batches": batch()}, "batches is an object of type PackedBatch: give a list of batches"),
        ({"batches": 3}, "batches is an object of type int: give a list of batches"),
        ({"batches": [None]}, "LoopedTransformer cannot compute one of them .batch is None: give"),
        ({"model": nn.Linear(2, 2)}, "batches: Linear cannot compute one of them"),
        ({"model": LoopedBlock(16, 2, 1)}, "batches: LoopedBlock cannot compute one of them"),
        ({"autocast": "bf16"}, "autocast = 'bf16': give torch.float32, torch.bfloat16 or torch.f"),
        ({"autocast": torch.int8}, "autocast = torch.int8: give torch.float32"),
        ({"on_call": 3}, "on_call is an object of type int: give a function, or None"),
    ],
)
def test_warmup(change: dict, message: str) -> None:
    given = {"model": LoopedTransformer(CONFIG), "batches": [batch()], "show": False}
    with pytest.raises((TypeError, ValueError), match=message):
        warmup(**{**given, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": None}, "config is None: give a ModelConfig, or its to_dict"),
        ({"config": {}}, "the model's config has no 'block': add it"),
        ({"config": {"block": {}, "vocabulary_size": 9}}, "the block's config has no 'd_model'"),
        ({"batch": None}, r"^batch is None: give a PackedBatch or a Capacity$"),
        ({"batch": [batch()]}, "batch is an object of type list: give a PackedBatch or a Capacity"),
        ({"recompute": "stat"}, "recompute policy 'stat' is unknown: use"),
        ({"recompute": None}, "recompute policy None is unknown: use"),
        ({"model": LoopedClassifier}, "model is the class LoopedClassifier: give the class Looped"),
        ({"model": "looped"}, "model is an object of type str: give the class LoopedTransformer"),
        ({"dtype": "bf16"}, "dtype = 'bf16': give torch.float32, torch.bfloat16 or torch.float16"),
        ({"dtype": torch.int64}, "dtype = torch.int64: give torch.float32"),
        ({"device": "gpu"}, "device = 'gpu' is no device of torch: give .cpu., .cuda. or .cuda:0"),
    ],
)
def test_memory_estimate(change: dict, message: str) -> None:
    given = {"config": CONFIG, "batch": batch(), "recompute": "state", "device": "cpu"}
    with pytest.raises((TypeError, ValueError), match=message):
        memory_estimate(**{**given, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": (-4,)}, "capacity rows = -4: it must be 0 or more"),
        ({"targets": (1.5,)}, "capacity targets = 1.5: it must be a whole number"),
        ({"sequences": -1}, "capacity sequences = -1: it must be 0 or more"),
        ({"longest": None}, "capacity longest = None: it must be a whole number"),
        ({"active": 3}, "capacity active is an object of type int: give a tuple of ints"),
    ],
)
def test_capacities(change: dict, message: str) -> None:
    given = {"rows": (4,), "active": (1,), "targets": (1,), "sequences": 1, "longest": 4}
    with pytest.raises((TypeError, ValueError), match=message):
        Capacity(**{**given, **change})
