"""Padded batches with an attention mask: packed inside, each sequence as if it were alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.numerics import assert_bitwise, assert_close
from relay_fast.config import BlockConfig
from relay_fast.engine.criteria import StateChange
from relay_fast.models.classifier import LoopedClassifier
from relay_fast.models.looped_block import LoopedBlock
from tests.support.block_alone import alone, twins

D, N = 16, 5
LEFT = [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]
RIGHT = [row[::-1] for row in LEFT]
BOTH = [[0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 0], [1, 0, 0, 0, 0]]
MASKS = {"left": LEFT, "right": RIGHT, "both": BOTH}


def spread(rows: list[Tensor], mask: Tensor) -> Tensor:
    """(B, n, d) of the rows of each sequence, with zeros elsewhere."""
    padded = [torch.zeros(N, D, dtype=rows[0].dtype) for _ in rows]
    return torch.stack(
        [p.index_put((m,), r) for p, m, r in zip(padded, mask.bool(), rows, strict=True)]
    )


@pytest.mark.parametrize("loops", [3, [2, 4, 0, 3]], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("side", MASKS)
def test_equals_each_sequence_alone(side: str, causal: bool, loops) -> None:
    block, eager = twins(causal=causal, injection="add", max_loops=6)
    mask = torch.tensor(MASKS[side])
    x, e = (torch.randn(4, N, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    counts = loops if isinstance(loops, list) else [loops] * 4
    for policy in ("none", "state", "every:2"):
        block.recompute = policy
        out = block(x, loops, attention_mask=mask, inject=e, start=2)
        states = [
            alone(eager, x[i][m], counts[i], e[i][m], 2)[-1] for i, m in enumerate(mask.bool())
        ]
        truth = spread(states, mask)
        assert_close("output", out, truth)
        assert not out[~mask.bool()].any()
        g = torch.randn_like(out)
        ours = torch.autograd.grad((out * g).sum(), [x, e, *block.parameters()])
        theirs = torch.autograd.grad((truth * g).sum(), [x, e, *eager.parameters()])
        for value, expected in zip(ours, theirs, strict=True):
            assert_close("gradient", value, expected)
        assert not ours[0][~mask.bool()].any()


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32, list], ids=str)
def test_kinds_of_masks_states_and_stops(kind) -> None:
    block, eager = twins()
    x, mask = torch.randn(4, N, D, dtype=torch.float64), torch.tensor(BOTH)
    given = BOTH if kind is list else mask.to(kind)
    until = StateChange(0.4)
    states, loops = block(
        x, 6, attention_mask=given, until=until, return_states=True, return_loops=True
    )
    truth = [alone(eager, x[i][m], 6, until=until) for i, m in enumerate(mask.bool())]
    assert loops.tolist() == [len(t) - 1 for t in truth] and len(set(loops.tolist())) > 1
    for t, (state, who) in enumerate(zip(states, states.sequences, strict=True), start=1):
        assert who.tolist() == [i for i, states in enumerate(truth) if len(states) > t]
        assert_close("state", state, spread([truth[i][t] for i in who], mask[who]))


def test_positions_and_a_full_mask() -> None:
    block, _ = twins()
    x, mask = torch.randn(4, N, D, dtype=torch.float64), torch.tensor(LEFT)
    own = (mask.cumsum(1) - 1).clamp(min=0)
    out = block(x, 2, attention_mask=mask)
    for dtype in (torch.bfloat16, torch.float16, torch.bool, torch.uint8):
        assert_bitwise(f"{dtype}", block(x, 2, attention_mask=mask.to(dtype)), out)
    assert_bitwise("positions", block(x, 2, attention_mask=mask, positions=own), out)
    shifted = block(x, 2, attention_mask=mask, positions=torch.arange(N))
    assert_close("RoPE is relative", shifted, out)
    scaled = block(x, 2, attention_mask=mask, positions=2 * own)
    assert (scaled - out).abs().max() > 1e-3
    full = torch.ones(4, N)
    assert_bitwise("full", block(x, [1, 2, 3, 0], attention_mask=full), block(x, [1, 2, 3, 0]))


def test_classifier_takes_the_mask() -> None:
    torch.manual_seed(0)
    model = LoopedClassifier(BlockConfig(D, 2, 1), 11, loops=3, prelude=1, coda=1).double()
    tokens, mask = torch.randint(11, (4, N)), torch.tensor(LEFT)
    out = model(tokens, attention_mask=mask)
    for i, m in enumerate(mask.bool()):
        assert_close("sequence", out[i][m], model(tokens[i : i + 1, m])[0])
    rows = torch.arange(4) * N + N - 1
    loss, _ = model.loss(tokens, rows, tokens[:, 0], attention_mask=mask)
    packed, lengths = tokens[mask.bool()], mask.sum(1)
    offsets = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    same, _ = model.loss(packed, offsets[1:] - 1, tokens[:, 0], cu_seqlens=offsets)
    assert_close("loss", loss, same)
    assert (
        model.predict(tokens, rows, attention_mask=mask).tolist()
        == model.predict(packed, offsets[1:] - 1, cu_seqlens=offsets).tolist()
    )


def test_bad_masks() -> None:
    block, x = LoopedBlock(D, 2, 1), torch.randn(2, 3, D)
    cases = [
        ([[1, 1, 1]], r"attention_mask has shape \(1, 3\) but x has \(2, 3, 16\): pass \(2, 3\)"),
        ([[1, 1, 0], [1, 2, 1]], r"attention_mask\[1, 1\] = 2: give 1 for tokens and 0"),
        ([[0.0, 0.0, -1e9], [0, 0, 0]], r"attention_mask\[0, 2\] = -1000000000.0: give 1"),
        ([[0, 0, 1], [0, 0, 0]], r"attention_mask\[1\] leaves no token of sequence 1"),
        ([[1, 1, 1], [1, 0, 1]], r"attention_mask\[1\] has padding between tokens of sequence 1"),
    ]
    for mask, message in cases:
        with pytest.raises(ValueError, match=message):
            block(x, 2, attention_mask=torch.tensor(mask))
    mask = torch.ones(2, 3)
    others = [
        (lambda: block(x[0], 2, attention_mask=mask, cu_seqlens=[0, 3]), "are both given"),
        (lambda: block(x[0], 2, attention_mask=mask), r"an attention_mask needs \(B, n, d\)"),
        (lambda: block(x, 2, attention_mask=mask, positions=torch.arange(4)), r"pass \(2, 3\) or"),
        (lambda: block(x, 2, attention_mask=mask, inject=x[:1]), r"inject has shape \(1, 3, 16\)"),
    ]
    for call, message in others:
        with pytest.raises(ValueError, match=message):
            call()
