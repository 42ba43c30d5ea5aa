"""Decoding with the cache writes exactly what decoding without it writes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from relay_fast.batch.plan import Plan
from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.decoding import autoregressive as decode_module
from relay_fast.decoding import step
from relay_fast.decoding.autoregressive import decode
from relay_fast.decoding.step import Stepper
from relay_fast.kernels.cross_entropy_ref import readout_ref
from relay_fast.models.transformers import AutoregressiveTransformer, LoopedTransformer
from relay_fast.tasks.vocabulary import EOS
from relay_fast.utils.ragged import lengths_to_offsets
from tests.support.memory import peak_bytes

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
    return rng.integers(2, VOCABULARY, sum(lengths)), lengths_to_offsets(np.array(lengths))


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


def test_any_token_may_end_a_sequence():
    """Tokens of the vocabulary in RELAY's numbering, or in a model's own."""
    model = make_model()
    prompts, offsets = make_prompts([5, 9, 3])
    free = decode(model, prompts, offsets, max_new=12, eos=-1)
    assert np.diff(free.offsets).tolist() == [12, 12, 12] and not free.ended.any()
    own = int(free.tokens[5])  # met in the first text
    stopped = decode(model, prompts, offsets, max_new=12, eos=own)
    for text, whole, ended in zip(texts(stopped), texts(free), stopped.ended, strict=True):
        assert ended == (own in whole)
        assert text == (whole[: whole.index(own) + 1] if ended else whole)


BLOCKS = [
    {"n_kv_heads": 2},
    {"norm": "layer", "bias": True, "activation": "swiglu"},
    {"rope_base": None},
    {"injection": "add", "loop_norm": "pre", "max_loops": 2},
    {"injection": "concat", "loop_norm": "post"},
    {
        "head_dim": 12,
        "n_kv_heads": 2,
        "qk_norm": True,
        "rotary_share": 0.5,
        "rope_scale": 1.2,
        "sandwich_norm": True,
        "bias": ("qkv", "down"),
        "activation": "swiglu",
    },
    {"qk_norm": True, "rope_base": None, "sandwich_norm": True, "norm": "layer", "bias": True},
]


@pytest.mark.parametrize("options", BLOCKS)
def test_every_block_and_two_iterations(options):
    model = make_model(**options)
    prompts, offsets = make_prompts([4, 7, 1, 12])
    decoded = decode(model, prompts, offsets, max_new=12, batch=3, loops=2)
    expected = [uncached(model, p, 12, loops=2) for p in np.split(prompts, offsets[1:-1])]
    assert texts(decoded) == expected


@pytest.mark.parametrize("options", BLOCKS)
def test_a_step_computes_what_a_pass_over_the_whole_text_does(options):
    """In fp64, before and after the weights are laid out anew: any slip would show."""
    model = make_model(**options).double().eval()
    prompts, offsets = make_prompts([4, 7, 1])
    settings = {"max_new": 12, "batch": 3, "loops": 2, "temperature": 1.0, "scored": True}
    decoded = decode(model, prompts, offsets, **settings)
    for i, text in enumerate(texts(decoded)):
        prompt = prompts[offsets[i] : offsets[i + 1]].tolist()
        tokens = torch.tensor(prompt + text[:-1])
        with torch.no_grad():
            h = model.block(model.embedding(tokens), 2, cu_seqlens=[0, len(tokens)])
            c, norm = model.config.block, model.norm
            logits = readout_ref(h, norm.weight, norm.bias, model.chain_head.weight, c.eps, c.norm)[
                len(prompt) - 1 :
            ]
        own = logits.log_softmax(-1)[torch.arange(len(text)), text]
        given = decoded.log_probability[decoded.offsets[i] : decoded.offsets[i + 1]]
        np.testing.assert_allclose(given, own.numpy(), rtol=1e-6, atol=1e-6)  # given as fp32


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


MIXED = [5, 1, 9, 9, 2, 17, 3, 30, 5, 5, 8, 25, 1, 40, 12, 7]


def expect_uncached(model, decoded, prompts, offsets, limit) -> None:
    expected = [uncached(model, p, limit) for p in np.split(prompts, offsets[1:-1])]
    assert texts(decoded) == expected


@pytest.mark.parametrize("waste", [0, 6, 40])
def test_groups_buckets_and_prefill_in_pieces(monkeypatch, waste):
    model = make_model()
    monkeypatch.setattr(decode_module, "GROUP_WASTE", waste)
    monkeypatch.setitem(step.PREFILL_TOKENS, "cpu", 16)
    monkeypatch.setattr(
        decode_module, "_rows_that_fit", lambda model, length, loops: 160 // length + 2
    )
    batches = []

    def spy(*args, **options):
        batches.append(args[1:3])
        return Stepper(*args, **options)

    monkeypatch.setattr(decode_module, "Stepper", spy)
    prompts, offsets = make_prompts(MIXED)
    decoded = decode(model, prompts, offsets, max_new=15)
    expect_uncached(model, decoded, prompts, offsets, 15)
    assert len(batches) > 1, "short sequences get more and shorter cache rows"
    assert batches[0][0] < batches[-1][0] and batches[0][1] > batches[-1][1]


def test_a_captured_step_does_the_same(monkeypatch):
    """What a GPU captures and replays, run as it is: static shapes, idle rows running along."""
    model = make_model()
    shapes = []

    def capture(self, group):
        shapes.append(group)
        return lambda: next(self._steps([group], 1))

    def captures(*args, **options):
        stepper = Stepper(*args, **options)
        stepper.captures = True
        return stepper

    monkeypatch.setattr(Stepper, "_capture", capture)
    monkeypatch.setattr(decode_module, "Stepper", captures)
    monkeypatch.setattr(step, "LENGTH_STEP", 16)
    prompts, offsets = make_prompts(MIXED)
    decoded = decode(model, prompts, offsets, max_new=20, batch=7)
    expect_uncached(model, decoded, prompts, offsets, 20)
    assert len(shapes) == len(set(shapes)) < 12, "one capture for each shape"
    assert {group.last for group in shapes} <= {1, 2, 4, 7}


def test_a_step_that_cannot_be_captured_is_taken_op_by_op(monkeypatch):
    model = make_model()

    def captures(*args, **options):
        stepper = Stepper(*args, **options)
        stepper.captures = True
        return stepper

    def fails(*_, **options):
        raise RuntimeError("not permitted")

    monkeypatch.setattr(decode_module, "Stepper", captures)
    monkeypatch.setattr(step, "on_side_stream", lambda body: body())
    monkeypatch.setattr(step, "captured", fails)
    prompts, offsets = make_prompts(MIXED)
    said = "a decoding step could not be captured: not permitted .*; decoding goes on without CUDA"
    with pytest.warns(UserWarning, match=said) as told:
        decoded = decode(model, prompts, offsets, max_new=20, batch=7)
    assert len(told) == 1, "a stepper tells it once"
    expect_uncached(model, decoded, prompts, offsets, 20)


@pytest.mark.parametrize("fails", ["allocating", "writing"])
def test_out_of_memory_halves_the_batch(monkeypatch, fails):
    model = make_model()
    rows, steps = [], []

    class Small(Stepper):
        def __init__(self, model, batch, *args, **options):
            rows.append(batch)
            if fails == "allocating" and batch > 4:
                raise torch.OutOfMemoryError("no room")
            super().__init__(model, batch, *args, **options)

        def steps(self, groups, number):
            for _ in super().steps(groups, number):
                steps.append(len(groups))
                if fails == "writing" and self.batch > 4 and len(steps) % 6 == 0:
                    raise torch.OutOfMemoryError("no room")
                yield

    monkeypatch.setattr(decode_module, "Stepper", Small)
    prompts, offsets = make_prompts(MIXED)
    decoded = decode(model, prompts, offsets, max_new=20, batch=16, scored=True)
    expect_uncached(model, decoded, prompts, offsets, 20)
    assert rows == [16, 8, 4]
    assert np.isfinite(decoded.log_probability).all()

    class Never(Stepper):
        def __init__(self, *args, **options):
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(decode_module, "Stepper", Never)
    with pytest.raises(torch.OutOfMemoryError):
        decode(model, prompts, offsets, max_new=2, batch=4)


def test_memory_is_flat_in_the_number_of_sequences():
    """Of equal lengths: the first batch is then as large as any."""
    model = make_model()

    def peak(number: int) -> int:
        prompts, offsets = make_prompts([20] * number)
        return peak_bytes(lambda: decode(model, prompts, offsets, max_new=12, batch=16))

    base = peak(16)
    cache = 2 * 2 * 16 * 4 * (20 + 12) * 8  # layers, keys and values, rows, heads, length, width
    assert base > 4 * cache, "the cache should be seen"
    assert peak(8 * 16) < 1.1 * base


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_log_probabilities_are_those_of_the_whole_text(temperature):
    model = make_model()
    prompts, offsets = make_prompts([5, 1, 9, 12])
    plain = decode(model, prompts, offsets, max_new=9, batch=3, temperature=temperature)
    decoded = decode(
        model, prompts, offsets, max_new=9, batch=3, temperature=temperature, scored=True
    )
    assert plain.log_probability is None
    assert np.array_equal(decoded.tokens, plain.tokens)
    for i, text in enumerate(texts(decoded)):
        prompt = prompts[offsets[i] : offsets[i + 1]].tolist()
        read = torch.tensor(prompt + text[:-1])
        with torch.no_grad():
            h = model.block(model.embedding(read), cu_seqlens=[0, len(read)])
            y = torch.nn.functional.rms_norm(h, h.shape[1:], model.norm.weight, 1e-6)
            logits = model.chain_head(y)[len(prompt) - 1 :]
        own = logits.log_softmax(-1)[torch.arange(len(text)), text]
        given = decoded.log_probability[decoded.offsets[i] : decoded.offsets[i + 1]]
        np.testing.assert_allclose(given, own.numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("lengths", "change", "options", "message"),
    [
        ([3, 0], {}, {}, "prompt 1 is empty"),
        ([3, 65], {}, {}, "prompt 1 of 65 tokens is longer than the model's limit of 64"),
        ([3], {0: VOCABULARY}, {}, "token 24 of prompt 0 is outside the model's vocabulary of 24"),
        ([3], {1: -2}, {}, "token -2 of prompt 0 is outside"),
        ([3], {}, {"temperature": -1.0}, "temperature = -1.0"),
        ([3], {}, {"temperature": float("nan")}, "temperature = nan: it must be 0"),
        ([3], {}, {"temperature": float("inf")}, "temperature = inf: it must be .* and finite"),
        ([3], {}, {"max_new": 2.7}, "max_new = 2.7: it must be a whole number, or one for each"),
        ([3], {}, {"max_new": [2.7]}, r"max_new = \[2.7\]: it must be a whole number"),
        ([3], {}, {"batch": 2.5}, "batch = 2.5: it must be a whole number"),
        ([3], {}, {"sync_every": 1.5}, "sync_every = 1.5: it must be a whole number"),
        ([3], {}, {"loops": 1.5}, "loops = 1.5: it must be a whole number"),
        ([3], {}, {"max_new": -4}, "max_new = -4"),
        ([3], {}, {"max_new": [1, 2]}, r"max_new has shape \(2,\) but there are 1 prompts"),
        ([3], {}, {"batch": 0}, "batch = 0: it must be 1 or more"),
        ([3], {}, {"sync_every": 0}, "sync_every = 0: it must be 1 or more"),
        ([3], {}, {"loops": 0}, "loops = 0: it must be 1 or more"),
    ],
)
def test_bad_input_gets_one_sentence(lengths, change, options, message):
    prompts, offsets = make_prompts(lengths)
    for position, token in change.items():
        prompts[position] = token
    with pytest.raises(ValueError, match=message):
        decode(make_model(), prompts, offsets, **{"max_new": 3, **options})


def test_what_is_no_prompt_and_no_causal_model():
    model, (prompts, offsets) = make_model(), make_prompts([3])
    for wrong in ([0, 5], [0, 2], [1, 3], []):
        with pytest.raises(ValueError, match="offsets begin and end at .*, there are 3 tokens"):
            decode(model, prompts, wrong, max_new=2)
    with pytest.raises(ValueError, match="offsets fall from 5 to 3 in prompt 1: give the starts"):
        decode(model, prompts, [0, 5, 3], max_new=2)
    with pytest.raises(TypeError, match="prompts are float64: give token ids"):
        decode(model, prompts + 0.5, offsets, max_new=2)
    block = BlockConfig(32, 4, 2)
    looped = LoopedTransformer(ModelConfig(block, VOCABULARY, max_tokens=64))
    with pytest.raises(
        ValueError, match="the model is not causal.* chains with .*generate_looped_chains"
    ):
        decode(looped, prompts, offsets, max_new=2)
