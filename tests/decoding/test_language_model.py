"""Looped language models: the cache and early exit against passes without either."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from relay_fast.config import BlockConfig
from relay_fast.decoding.language_model import _Reader, generate, sample_loops, score
from relay_fast.engine.rope import rope_table
from relay_fast.models.classifier import LoopedClassifier
from relay_fast.models.looped_block import LoopedBlock

V = 11
CONFIG = BlockConfig(
    16, 4, 2, n_kv_heads=2, causal=True, activation="relu2", injection="add", loop_norm="post"
)


def make_model(loops: int = 4, prelude: int = 1, coda: int = 1, **options) -> LoopedClassifier:
    model = LoopedClassifier(CONFIG, V, loops=loops, prelude=prelude, coda=coda, **options)
    return model.double().eval()


def logits(model: LoopedClassifier, tokens: Tensor, loops: int | None = None) -> Tensor:
    with torch.no_grad():
        return model.head(F.rms_norm(model(tokens, loops=loops), (16,), model.norm.weight, 1e-6))


def exits(model: LoopedClassifier, tokens: Tensor, loops: int, below: float, least: int):
    """(logits (n, V), loops (n,)) of one text, without a cache: all tokens at once, iteration by
    iteration, those that have left keep state, keys and values."""
    layers, c = list(model.block.layers), CONFIG
    cos, sin = rope_table(torch.arange(len(tokens)), c.head_dim, c.rope_base, torch.float64)

    def rotate(x):  # (n, heads, head_dim)
        a, b = x.chunk(2, -1)
        cs, sn = cos[:, None], sin[:, None]
        return torch.cat((a * cs - b * sn, b * cs + a * sn), -1)

    norm = lambda x, w: F.rms_norm(x, (16,), w.weight, c.eps)
    x = h = model.prelude(model.embedding(tokens)[None])[0]
    running, used = torch.ones(len(tokens), dtype=torch.bool), torch.full((len(tokens),), loops)
    held = [None] * len(layers)
    future = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)
    for t in range(1, loops + 1):
        u = h + x
        for i, layer in enumerate(layers):
            q, k, v = layer.qkv(norm(u, layer.norm1)).view(-1, 8, 4).split((4, 2, 2), 1)
            q, k = rotate(q), rotate(k)
            if held[i] is not None:
                k, v = (
                    torch.where(running[:, None, None], a, b)
                    for a, b in zip((k, v), held[i], strict=True)
                )
            held[i] = k, v
            k, v = (y.repeat_interleave(2, 1) for y in (k, v))
            s = torch.einsum("ihd,jhd->hij", q, k) / 2
            p = s.masked_fill(future, float("-inf")).softmax(-1)
            mid = u + layer.out(torch.einsum("hij,jhd->ihd", p, v).flatten(1))
            u = mid + layer.down(layer.up(norm(mid, layer.norm2)).relu().square())
        new = torch.where(running[:, None], norm(u, model.block.loop_norm), h)
        small = (new - h).norm(dim=1) < below * new.norm(dim=1)
        leaving = running & small & (t >= least)
        used[leaving] = t
        running, h = running & ~leaving, new
    h = model.coda(h[None])[0]
    return model.head(norm(h, model.norm)), used


def test_scores_are_those_of_the_whole_text() -> None:
    model, tokens = make_model(), torch.randint(V, (3, 9))
    found = score(model, tokens, loops=3)
    expected = F.cross_entropy(
        logits(model, tokens, 3)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    assert np.allclose(found.losses, expected.view(3, 8)) and np.all(found.loops == 3)


@pytest.mark.parametrize("prelude, coda", [(1, 1), (0, 0)])
def test_writing_is_that_of_passes_without_a_cache(prelude, coda) -> None:
    model = make_model(prelude=prelude, coda=coda)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    written = generate(model, prompts, 6)
    assert written.tokens.shape == (3, 6) and np.all(written.loops == 4)
    for prompt, tokens in zip(prompts, written.tokens.tolist(), strict=True):
        text = list(prompt)
        for token in tokens:
            assert token == int(logits(model, torch.tensor([text]))[0, -1].argmax())
            text.append(token)


def test_writing_with_the_options_of_a_block() -> None:
    config = BlockConfig(
        16, 2, 1, causal=True, head_dim=12, qk_norm=True, sandwich_norm=True, rotary_share=0.5
    )
    model = LoopedClassifier(config, V, loops=2, prelude=1, coda=0).double().eval()
    written = generate(model, [[1, 2, 3], [4]], 5)
    for text, tokens in zip(([1, 2, 3], [4]), written.tokens.tolist(), strict=True):
        for token in tokens:
            assert token == int(logits(model, torch.tensor([text]))[0, -1].argmax())
            text.append(token)


@pytest.mark.parametrize("least", [1, 4])
def test_early_exit_is_that_of_a_pass_without_a_cache(least) -> None:
    model, tokens = make_model(), torch.randint(V, (5, 12))
    with torch.no_grad():
        below = 0.03  # tokens leave after 3, 4 and 5 of the 6 iterations
        found = score(model, tokens, loops=6, exit_threshold=below, min_loops=least)
        for row, text in enumerate(tokens):
            expected, used = exits(model, text, 6, below, least)
            losses = F.cross_entropy(expected[:-1], text[1:], reduction="none")
            assert found.loops[row].tolist() == used[:-1].tolist()
            assert np.allclose(found.losses[row], losses)
    counts = np.bincount(found.loops.ravel(), minlength=7)
    assert np.count_nonzero(counts) >= (3 if least == 1 else 2) and counts[:least].sum() == 0


def test_finished_rows_are_not_computed() -> None:
    model, rows = make_model(), []
    tokens = torch.randint(V, (6, 8))
    reader = _Reader(model, 6, 8, 6)
    norm_linear = reader._block._ops.norm_linear_fwd

    def counted(x, *rest):
        rows.append(len(x))
        return norm_linear(x, *rest)

    reader._block._ops = reader._block._ops._replace(norm_linear_fwd=counted)
    with torch.no_grad():
        used = [reader.step(tokens[:, k], np.full(6, k), 0.03, 1)[1] for k in range(8)]
    assert len({int(t) for row in used for t in row}) > 1
    assert sum(rows) == CONFIG.n_layers * sum(int(row.sum()) for row in used)


def test_thresholds_at_the_ends() -> None:
    model, tokens = make_model(), torch.randint(V, (2, 6))
    all_leave = score(model, tokens, exit_threshold=1e9, min_loops=2)
    assert np.all(all_leave.loops == 2)
    assert np.allclose(all_leave.losses, score(model, tokens, loops=2).losses)
    none_leave = score(model, tokens, exit_threshold=1e-12)
    assert np.allclose(none_leave.losses, score(model, tokens).losses)


def test_texts_do_not_see_each_other() -> None:
    model, prompts = make_model(), [[1, 2], [3, 4, 5, 6]]
    together = generate(model, prompts, 5, exit_threshold=0.05)
    for i, prompt in enumerate(prompts):
        alone = generate(model, [prompt], 5, exit_threshold=0.05)
        assert alone.tokens[0].tolist() == together.tokens[i].tolist()
        assert alone.loops[0].tolist() == together.loops[i].tolist()


def test_drawn_text_depends_on_the_seed() -> None:
    model = make_model()
    draw = lambda seed: generate(model, [[1]] * 4, 8, temperature=1.0, seed=seed).tokens
    assert np.array_equal(draw(1), draw(1)) and not np.array_equal(draw(1), draw(2))
    assert len({tuple(row) for row in draw(1).tolist()}) > 1 and not model.training


def test_truncation_stops_the_gradient() -> None:
    model = make_model()
    tokens, rows, targets = torch.randint(V, (2, 5)), torch.arange(10), torch.randint(V, (10,))
    gradients = []
    for truncate in (None, 1):
        model.zero_grad()
        model.loss(tokens, rows, targets, loops=3, truncate=truncate)[0].backward()
        gradients.append(model.block.layers[0].up.weight.grad.clone())
    assert not torch.allclose(*gradients)


def test_the_ends_know_nothing_of_iterations() -> None:
    model = make_model()
    assert model.block.config.injection == "add" and model.block.config.loop_norm == "post"
    for end in (model.prelude, model.coda):
        assert (end.config.injection, end.config.loop_norm, end.config.n_layers) == (
            "none", "none", 1,
        )  # fmt: skip


def test_loop_counts() -> None:
    rng = np.random.default_rng(0)
    drawn = [sample_loops(rng, 4.0, 12) for _ in range(4000)]
    assert (min(drawn), max(drawn)) == (1, 12) and abs(np.mean(drawn) - 4) < 0.15
    assert {sample_loops(rng, 1.0, 12) for _ in range(50)} == {1}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: generate(m, [[1], []], 3), "a prompt is empty"),
        (lambda m: generate(m, [[1]], 0), "new = 0, temperature = 0.0: give at least 1, and 0"),
        (lambda m: generate(m, [[1]], 1, temperature=-1), "temperature = -1"),
        (lambda m: generate(m, [[1]], 1, loops=0), "loops = 0: give at least 1"),
        (lambda m: score(m, torch.ones(1, 2), exit_threshold=-1), "exit_threshold = -1"),
        (lambda m: score(m, torch.ones(1, 2), min_loops=0), "min_loops = 0"),
    ],
)
def test_bad_input(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(make_model())


def test_a_model_that_sees_the_future_is_refused() -> None:
    model = make_model()
    model.coda = LoopedBlock(16, 4, 1)
    with pytest.raises(ValueError, match=r"needs BlockConfig\(causal=True\)"):
        generate(model, [[1]], 1)
