"""Adapters of peft that are switched while chains are read as CUDA graphs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

peft = pytest.importorskip("peft")

from relay_fast.decoding._inference import inference  # noqa: E402
from relay_fast.decoding.chain_reader import ChainReader  # noqa: E402
from relay_fast.decoding.reading import read_batch  # noqa: E402
from tests.support.fed_models import TASKS  # noqa: E402
from tests.support.graph_models import assert_same, batches, model_of  # noqa: E402
from tests.support.played_graphs import Played, played  # noqa: E402, F401


def test_switched_adapters_are_read(played: Played) -> None:  # noqa: F811
    model, (own,) = model_of("fed"), batches(6)
    wanted = peft.LoraConfig(target_modules=["qkv", "up"], r=4, init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.inject_adapter_in_model(wanted, model, "a")
    reader, seen = ChainReader(model, TASKS, False), []
    lora = [m for m in adapted.modules() if hasattr(m, "lora_A")]
    assert len(lora) == 4

    def switched(change) -> None:
        for part in lora:
            change(part)
        with inference(model):
            truth = read_batch(model, own, TASKS, False)
            for _ in range(3):
                assert_same(reader.read(own), truth)
        assert reader.reason is None
        seen.append(truth[0].rounds)

    switched(lambda part: None)
    switched(lambda part: part.enable_adapters(False))
    switched(lambda part: part.enable_adapters(True))
    switched(lambda part: part.set_scale("a", 3.0))
    switched(lambda part: part.merge())
    assert len(played.captures) == 5
    assert not np.array_equal(seen[0], seen[1]) and np.array_equal(seen[0], seen[2])
    assert not np.array_equal(seen[2], seen[3])
