"""Decoding with the cache writes exactly what decoding without it writes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.decode import decode
from relay_fast.modules import AutoregressiveTransformer
from relay_fast.plan import Plan
from relay_fast.ragged import offsets_of
from relay_fast.tasks.vocabulary import EOS

VOCABULARY = 24


def make_model(**options) -> AutoregressiveTransformer:
    """A random model whose greedy text is neither constant nor endless."""
    block = BlockConfig(32, 4, 2, causal=True, **options)
    model = AutoregressiveTransformer(ModelConfig(block, VOCABULARY, max_tokens=64))
    with torch.no_grad():
        for parameter in model.block.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
        model.chain_head.weight[EOS] *= 1.7
    return model


def make_prompts(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(2, VOCABULARY, sum(lengths)), offsets_of(np.array(lengths))


@torch.no_grad()
def uncached(model, prompt, limit: int, loops: int = 1) -> list[int]:
    """Greedy decoding of one prompt, everything computed anew for each token."""
    tokens = list(map(int, prompt))
    model.eval()
    while len(tokens) - len(prompt) < limit:
        x = model.embedding(torch.tensor(tokens))
        h = model.block(x, loops, cu_seqlens=[0, len(tokens)])[-1:]
        run = model.block.run(Plan([1], [1]))
        c = model.config.block
        args = (model.norm.weight, model.norm.bias, model.chain_head.weight, c.eps, c.norm)
        tokens.append(int(run.ops.argmax(h, *args)))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


def texts(decoded) -> list[list[int]]:
    bounds = zip(decoded.offsets[:-1], decoded.offsets[1:], strict=True)
    return [decoded.tokens[a:b].tolist() for a, b in bounds]


# Lengths: equal, one, and mixed; a batch of 3 needs refills and compaction, 64 neither.
@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.parametrize("sync_every", [1, 4])
def test_tokens_are_those_of_uncached_decoding(batch, sync_every):
    model = make_model()
    lengths = [5, 1, 9, 9, 2, 17, 3, 30, 5, 5, 8]
    prompts, offsets = make_prompts(lengths)
    decoded = decode(model, prompts, offsets, max_new=20, batch=batch, sync_every=sync_every)
    expected = [uncached(model, p, 20) for p in np.split(prompts, offsets[1:-1])]
    assert texts(decoded) == expected
    assert decoded.ended.tolist() == [text[-1] == EOS for text in expected]
    assert 0 < decoded.ended.sum() < len(lengths), "the case should hold both kinds of end"


@pytest.mark.parametrize(
    "options",
    [
        {"n_kv_heads": 2},
        {"norm": "layer", "bias": True, "activation": "swiglu"},
        {"rope_base": None},
        {"injection": "add", "loop_norm": "pre", "max_loops": 2},
        {"injection": "concat", "loop_norm": "post"},
    ],
)
def test_every_block_and_two_iterations(options):
    model = make_model(**options)
    prompts, offsets = make_prompts([4, 7, 1, 12])
    decoded = decode(model, prompts, offsets, max_new=12, batch=3, loops=2)
    expected = [uncached(model, p, 12, loops=2) for p in np.split(prompts, offsets[1:-1])]
    assert texts(decoded) == expected


def test_limits_of_each_sequence_and_of_the_model():
    model = make_model()
    with torch.no_grad():
        model.chain_head.weight[EOS] = 0
        model.chain_head.weight[EOS, 0] = -1e4  # hardly ever the largest
    prompts, offsets = make_prompts([5, 5, 60, 64])
    decoded = decode(model, prompts, offsets, max_new=np.array([0, 1, 20, 20]), batch=2)
    free = decode(model, prompts, offsets, max_new=1000)
    sizes = np.diff(decoded.offsets)
    assert sizes[:2].tolist() == [0, 1]
    # The model reads 64 tokens at most; the last one written needs no reading.
    assert sizes[2] <= 5 and sizes[3] == 1
    assert np.all(np.diff(free.offsets) <= 65 - np.diff(offsets))


def test_temperature_draws_from_the_softmax():
    model = make_model()
    prompts, offsets = make_prompts([3])
    copies = 2000
    many = np.tile(prompts, copies), np.arange(copies + 1) * 3
    first = decode(model, *many, max_new=1, temperature=1.5, seed=1)
    again = decode(model, *many, max_new=1, temperature=1.5, seed=1)
    other = decode(model, *many, max_new=1, temperature=1.5, seed=2)
    assert np.array_equal(first.tokens, again.tokens)
    assert not np.array_equal(first.tokens, other.tokens)
    with torch.no_grad():
        h = model.block(model.embedding(torch.from_numpy(prompts)), cu_seqlens=[0, 3])[-1]
        y = torch.nn.functional.rms_norm(h, h.shape, model.norm.weight, model.config.block.eps)
        p = (y @ model.chain_head.weight.T / 1.5).softmax(-1).numpy()
    share = np.bincount(first.tokens, minlength=VOCABULARY) / copies
    assert np.abs(share - p).max() < 4 * np.sqrt(0.25 / copies)


def test_nothing_to_decode_and_training_mode_is_kept():
    model = make_model(dropout=0.5).train()
    decoded = decode(model, np.zeros(0, np.int64), np.zeros(1, np.int64), max_new=5)
    assert len(decoded.tokens) == 0 and decoded.offsets.tolist() == [0]
    prompts, offsets = make_prompts([4])
    assert texts(decode(model, prompts, offsets, max_new=9)) == [uncached(model.eval(), prompts, 9)]
    model.train()
    decode(model, prompts, offsets, max_new=1)
    assert model.training


def test_progress_counts_sequences():
    model = make_model()
    prompts, offsets = make_prompts([4] * 7)
    seen = []
    decode(model, prompts, offsets, max_new=6, batch=2, progress=lambda *a: seen.append(a))
    assert seen[-1] == (7, 7) and seen == sorted(seen)


@pytest.mark.parametrize(
    ("lengths", "change", "options", "message"),
    [
        ([3, 0], {}, {}, "prompt 1 is empty"),
        ([3, 65], {}, {}, "prompt 1 of 65 tokens is longer than the model's limit of 64"),
        ([3], {0: VOCABULARY}, {}, "token 24 is outside the model's vocabulary of 24"),
        ([3], {1: -2}, {}, "token -2 is outside"),
        ([3], {}, {"temperature": -1.0}, "temperature = -1.0"),
        ([3], {}, {"max_new": -4}, "max_new = -4"),
    ],
)
def test_bad_input_gets_one_sentence(lengths, change, options, message):
    prompts, offsets = make_prompts(lengths)
    for position, token in change.items():
        prompts[position] = token
    with pytest.raises(ValueError, match=message):
        decode(make_model(), prompts, offsets, **{"max_new": 3, **options})
