"""Chains in bf16: those of a pass under autocast, whatever autocast is around the call."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from relay_fast.batch.plan import Plan
from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.decoding import autoregressive, chains
from relay_fast.decoding._inference import inference
from relay_fast.decoding.autoregressive import Decoded, decode
from relay_fast.kernels.cross_entropy_ref import readout_ref
from relay_fast.models.transformers import AutoregressiveTransformer, LoopedTransformer
from relay_fast.tasks import Samples
from tests.support import chain_models, fed_models

AROUND = torch.bfloat16
PROMPTS, OFFSETS = np.arange(12) % 7 + 2, np.array([0, 3, 4, 12])


def looped(kind: str) -> tuple[LoopedTransformer, Samples, dict]:
    if kind == "fed":
        return fed_models.new_model(), fed_models.mixed(), fed_models.TASKS
    torch.manual_seed(0)
    return chain_models.looped_model(), chain_models.mixed_problems(), chain_models.TASKS


def read(kind: str, **options) -> list[np.ndarray]:
    """Indices, rounds, answers and log-probabilities of the only batch."""
    model, problems, tasks = looped(kind)
    ((chosen, written, scores),) = chains.stream_scored(model, problems, tasks, **options)
    return [chosen, written.rounds, written.answer, scores.rounds, scores.answer]


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(map(np.array_equal, a, b))


@pytest.mark.parametrize("kind", ["fed", "answer head"])
def test_looped_chains(kind: str) -> None:
    model, problems, tasks = looped(kind)
    order = chains.stream_order(problems)
    with inference(model), torch.autocast("cpu", torch.bfloat16):
        written, scores = chains.read_batch(model, problems.take(order), tasks, True)
    truth = [order, written.rounds, written.answer, scores.rounds, scores.answer]
    assert same(read(kind, autocast="bf16"), truth)
    plain = read(kind)
    assert not np.array_equal(plain[3], truth[3])
    with torch.autocast("cpu", AROUND):
        assert same(read(kind), plain)
        assert same(read(kind, autocast="bf16"), truth)


def ar_model() -> AutoregressiveTransformer:
    torch.manual_seed(0)
    block = BlockConfig(32, 4, 2, causal=True)
    return AutoregressiveTransformer(ModelConfig(block, 24, max_tokens=64))


def written_with(**options) -> Decoded:
    return decode(ar_model(), PROMPTS, OFFSETS, max_new=9, eos=-1, scored=True, **options)


def log_probs(model: AutoregressiveTransformer, written: Decoded) -> Tensor:
    """Of what was written, by a pass over each whole text, without a cache."""
    found = []
    for i in range(len(OFFSETS) - 1):
        own = written.tokens[written.offsets[i] : written.offsets[i + 1]].astype(np.int64)
        prompt = PROMPTS[OFFSETS[i] : OFFSETS[i + 1]]
        tokens = torch.from_numpy(np.concatenate([prompt, own]))
        states = model.block(model.embedding(tokens), 1, cu_seqlens=[0, len(tokens)])
        dtype = model.block.run(Plan([len(tokens)], [1])).compute_dtype
        c = model.config.block
        head = model.chain_head.weight.to(dtype)
        logits = readout_ref(states, model.norm.weight, model.norm.bias, head, c.eps, c.norm)
        scores = logits.double().log_softmax(-1)[len(prompt) - 1 : -1]
        found.append(scores.gather(1, torch.from_numpy(own)[:, None])[:, 0])
    return torch.cat(found)


@torch.no_grad()
def test_decoding_with_a_cache(monkeypatch) -> None:
    """As far from fp64 as a pass without the cache is, times two; the cache is of that dtype."""
    caches = []
    original = autoregressive.Stepper

    def stepper(*args, **options):
        made = original(*args, **options)
        caches.append(made.cache._both.dtype)
        return made

    monkeypatch.setattr(autoregressive, "Stepper", stepper)
    written, model = written_with(autocast="bf16"), ar_model()
    truth = log_probs(ar_model().double(), written)
    with torch.autocast("cpu", torch.bfloat16):
        eager = log_probs(model, written)
    error = (torch.from_numpy(written.log_probability).double() - truth).abs().max()
    assert 1e-4 < error <= 2 * (eager - truth).abs().max()

    plain = written_with()
    with torch.autocast("cpu", AROUND):
        for options, expected in (({}, plain), ({"autocast": "bf16"}, written)):
            again = written_with(**options)
            assert np.array_equal(again.tokens, expected.tokens)
            assert np.array_equal(again.log_probability, expected.log_probability)
    low, full = torch.bfloat16, torch.float32
    assert caches == [low, full, full, low]


def test_unknown_precisions() -> None:
    message = "autocast = 'tf32x3' is unknown: use one of fp32, bf16"
    model, problems, tasks = looped("fed")
    with pytest.raises(ValueError, match=message):
        chains.generate_looped_chains(model, problems, tasks, autocast="tf32x3")
    with pytest.raises(ValueError, match=message):
        written_with(autocast="tf32x3")
    with pytest.raises(ValueError, match=r"autocast = torch.bfloat16 is unknown"):
        written_with(autocast=torch.bfloat16)


def test_rows_of_a_cache_are_counted_in_the_dtype_of_its_gemms(monkeypatch) -> None:
    """By hand: 2 layers of 2 heads of 8 columns, keys and values, 11 + 3 tokens; half of the free
    memory holds 5 rows in fp32, and 10 of two bytes a number."""
    a_row = 2 * 2 * 2 * 8 * 14 * 4
    monkeypatch.setattr(autoregressive, "free_bytes", lambda _: 2 * 5 * a_row)
    shapes = []

    def stepper(model, rows, length, **options):
        shapes.append((rows, length))
        return made(model, rows, length, **options)

    made = autoregressive.Stepper
    monkeypatch.setattr(autoregressive, "Stepper", stepper)
    model = AutoregressiveTransformer(ModelConfig(BlockConfig(16, 2, 2, causal=True), 40))
    prompts, offsets = np.full(12 * 6, 3), np.arange(13) * 6
    for autocast in ("fp32", "bf16"):
        decode(model, prompts, offsets, max_new=5, sync_every=3, autocast=autocast)
    assert shapes == [(5, 14), (10, 14)]
