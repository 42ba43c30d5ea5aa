"""How much is taken at a time: free memory, a token's share of it, pieces."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from relay_fast.batch.packed import PackedBatch
from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.decoding import _inference
from relay_fast.decoding._inference import bytes_a_token, free_bytes, inference
from relay_fast.models.transformers import LoopedTransformer
from relay_fast.tasks import LIS, Vocabulary
from relay_fast.utils.ragged import pieces


def test_free_memory(monkeypatch, tmp_path):
    assert 1 << 20 < free_bytes(torch.device("cpu")) < 1 << 50
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:       100 kB\nMemFree:    7 kB\nMemAvailable:    50 kB\n")
    monkeypatch.setattr(_inference, "MEMINFO", file)
    assert free_bytes(torch.device("cpu")) == 50 * 1024
    monkeypatch.setattr(_inference, "MEMINFO", tmp_path / "none")
    assert free_bytes(torch.device("cpu")) == _inference.UNKNOWN_BYTES


@pytest.mark.parametrize("options", [{}, {"activation": "swiglu"}, {"n_kv_heads": 1}])
def test_a_tokens_memory_is_what_a_pass_takes(options):
    task = LIS(Vocabulary())
    config = BlockConfig(64, 4, 2, **options)
    model = LoopedTransformer(ModelConfig(config, 320))
    batch = PackedBatch.looped(task.sample([100] * 12, 0), {"lis": task})
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        with inference(model):
            model.predict_rounds(batch)
    events = profile.profiler.kineto_results.events()
    sizes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peak = np.cumsum([size for _, size in sizes]).max() - 8 * batch.plan.token_iterations
    # Half of the free memory is used, so the estimate may be off by less than that.
    assert 0.4 < peak / (batch.plan.rows * bytes_a_token(config, 102, 4)) < 1.5


@pytest.mark.parametrize("most", [1, 5, 100])
def test_pieces(most):
    sizes = np.array([3, 1, 4, 1, 5, 9, 2, 6])
    cut = pieces(sizes, most)
    assert np.concatenate(cut).tolist() == list(range(8))
    assert all(len(piece) == 1 or sizes[piece].sum() < most + sizes.max() for piece in cut)
    assert len(cut) == {1: 8, 5: 5, 100: 1}[most]


def test_each_module_gets_its_mode_back():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(), torch.nn.Dropout())
    model[1].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyError), inference(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == before == [True, True, False, True]
