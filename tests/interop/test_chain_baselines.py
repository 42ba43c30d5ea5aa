"""transformers' generation, one of the benchmark's baselines, writes what ours writes."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import chain_generation
from benchmarks.chain_generation import TASKS, Case
from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.tasks import Samples

pytest.importorskip("transformers")


def test_huggingface_writes_what_ours_writes() -> None:
    lengths = np.arange(6) % 4 + 1
    parts = [TASKS["arithmetic"].sample(lengths, 0), TASKS["lis"].sample(lengths * 5, 0)]
    problems = Samples.concat(parts)
    case = Case("mixed", "mixed", problems.take(np.random.default_rng(0).permutation(12)))
    names = ["ar_eager", "ar_hf", "ar_relay_fast"]
    chain_generation.check_equal(names, ModelConfig(BlockConfig(16, 2, 2), 320), case, "cpu")
