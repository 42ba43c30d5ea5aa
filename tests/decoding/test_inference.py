"""How much is taken at a time: free memory, a token's share of it, pieces."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from relay_fast.batch.packed import PackedBatch
from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.decoding import _inference
from relay_fast.decoding._inference import bytes_a_token, free_bytes, halve_on_oom, inference
from relay_fast.decoding.sampling import sample_tokens
from relay_fast.models.transformers import LoopedTransformer
from relay_fast.tasks import LIS, Vocabulary
from relay_fast.utils import memory
from relay_fast.utils.ragged import pieces


def test_free_memory(monkeypatch):
    assert 1 << 20 < free_bytes(torch.device("cpu")) < 1 << 50
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=12345))
    assert free_bytes(torch.device("cpu")) == 12345
    assert free_bytes(torch.device("meta")) == _inference.UNKNOWN_BYTES  # it does not say


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


def test_a_failed_attempt_frees_its_memory_before_the_next():
    held, sizes = [], []

    def attempt(size: int) -> str:
        assert all(reference() is None for reference in held)
        sizes.append(size)
        memory = torch.zeros(size)
        held.append(weakref.ref(memory))
        if size > 2:
            raise torch.OutOfMemoryError("no room")
        return "done"

    assert halve_on_oom(attempt, 9, torch.device("cpu")) == ("done", 2)
    assert sizes == [9, 4, 2]
    with pytest.raises(LookupError):  # other errors are not tried again
        halve_on_oom({}.__getitem__, 4, torch.device("cpu"))


def test_sampled_tokens_follow_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -1e9]).expand(20_000, 4)
    generator = torch.Generator().manual_seed(0)
    for temperature in (1.0, 2.0):
        drawn = sample_tokens(logits, temperature, generator).bincount(minlength=4) / len(logits)
        expected = (logits[0] / temperature).softmax(0)
        # Four standard deviations of a share.
        bound = 4 * (expected * (1 - expected) / len(logits)).sqrt() + 1e-12
        assert ((drawn - expected).abs() <= bound).all()
    state = generator.get_state()
    assert sample_tokens(logits[:3], 0.0, generator).tolist() == [2, 2, 2]
    assert torch.equal(generator.get_state(), state)
