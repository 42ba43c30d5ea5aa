"""Scaled frequencies of RoPE against values worked out by hand from the papers' formulas."""

from __future__ import annotations

import math

import pytest

from relay_fast.utils.rope import plain_frequencies, scaled_frequencies

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 628,
}  # fmt: skip


def test_plain_and_linear() -> None:
    assert plain_frequencies(6, 1000.0) == pytest.approx([1, 0.1, 0.01])
    assert scaled_frequencies({}, 6, 1000.0) == (plain_frequencies(6, 1000.0), 1.0)
    assert scaled_frequencies({"type": "default", "rope_theta": 64.0}, 4, 9.0)[0] == (1.0, 0.125)
    scaled, factor = scaled_frequencies({"rope_type": "linear", "factor": 4.0}, 6, 1000.0)
    assert (scaled, factor) == (pytest.approx([0.25, 0.025, 0.0025]), 1.0)


def test_llama3() -> None:
    """628 positions: 100 turns of frequency 1, 10 of 0.1, 1 and 0.1 of the others; the third lies
    on the edge where it is fully slowed."""
    scaled, factor = scaled_frequencies(LLAMA, 8, 10_000.0)
    assert factor == 1.0
    assert scaled == pytest.approx([1, 0.1, 0.01 / 8, 0.001 / 8], rel=1e-3)
    between = LLAMA | {"high_freq_factor": 628 / (2 * math.pi) * 0.19}  # 0.1 makes 10 of 19 turns
    share = (628 * 0.1 / (2 * math.pi) - 1) / (between["high_freq_factor"] - 1)
    expected = 0.1 * (share + (1 - share) / 8)
    assert scaled_frequencies(between, 8, 10_000.0)[0][1] == pytest.approx(expected)


def test_yarn() -> None:
    """Pair j of 8 turns 64 · 100^(−j / 8) / 2π times in 64 positions: none 32 times or more, so the
    ramp starts at 0; ⌈8 · ln(64 / 2π) / ln(100)⌉ = 5 turns once: from there all are slowed."""
    scaled, factor = scaled_frequencies(YARN, 16, 100.0)
    assert factor == pytest.approx(0.1 * math.log(4) + 1)
    plain = plain_frequencies(16, 100.0)
    for j, (f, s) in enumerate(zip(plain, scaled, strict=True)):
        ramp = min(1.0, j / 5)
        assert s == pytest.approx(f * (1 - ramp) + f / 4 * ramp), j
    exact, _ = scaled_frequencies(YARN | {"truncate": False}, 16, 100.0)
    end = 8 * math.log(64 / (2 * math.pi)) / math.log(100)
    assert exact[2] == pytest.approx(plain[2] * (1 - 2 / end * 0.75))
    scale = lambda **options: scaled_frequencies(YARN | options, 16, 100.0)[1]
    assert scale(attention_factor=1.5) == 1.5
    assert scale(factor=0.5) == 1.0
    assert scale(mscale=2.0, mscale_all_dim=1.0) == pytest.approx(
        (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1)
    )


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "longrope"}, "rope_type = 'longrope' is not supported: .*fixed"),
        ({"rope_type": "linear"}, "rope_type 'linear' needs factor"),
        ({"rope_type": "linear", "factor": "4"}, "factor = '4': it must be a number"),
        (YARN | {"beta": 3.0}, "option 'beta' of rope_type 'yarn' is unknown: it takes factor"),
        ({"factor": 2.0}, "option 'factor' of rope_type 'default' is unknown: it takes no options"),
    ],
)
def test_bad_input(scaling: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scaled_frequencies(scaling, 16, 100.0)
