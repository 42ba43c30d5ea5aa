"""Inverse frequencies of RoPE, plain and scaled for longer contexts.

    plain: f_j = base^(−2j / r), j = 0..r/2 − 1, for r rotated columns of a head
    linear: f_j / factor (position interpolation, Chen et al. 2023, arXiv 2306.15595)
    llama3: f_j where the wavelength 2π / f_j is below L / high, f_j / factor where it is above
        L / low, and a blend by L · f_j / 2π between them (Llama 3.1, arXiv 2407.21783)
    yarn: f_j for the dimensions that turn more than beta_fast times in L positions, f_j / factor
        for those that turn less than beta_slow times, a linear ramp between them; cos and sin are
        multiplied by 0.1 · ln(factor) + 1 (Peng et al. 2023, arXiv 2309.00071)

L is `original_max_position_embeddings`. The keys are those of transformers' `rope_parameters`.
Kinds whose frequencies depend on the length of the input (dynamic, longrope) are refused: a
block's frequencies are fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from relay_fast.utils.numbers import as_bool, as_float

Frequencies = tuple[float, ...]


def plain_frequencies(columns: int, base: float) -> Frequencies:
    """Returns base^(−2j / columns) for j = 0..columns / 2 − 1."""
    return tuple(base ** (-2 * j / columns) for j in range(columns // 2))


def scaled_frequencies(
    scaling: Mapping[str, Any], columns: int, base: float
) -> tuple[Frequencies, float]:
    """Computes the frequencies that a `rope_parameters` dict of transformers describes.

    Args:
        scaling: rope_type ("default", "linear", "llama3" or "yarn"), its options, and optionally
            rope_theta in place of `base`.
        columns: rotated columns of a head.
        base: base of the plain frequencies.

    Returns:
        The frequencies, columns / 2 of them, and the factor of cos and sin.

    Raises:
        ValueError: for an unknown kind or option, one that is missing, or one that is no number.
    """
    options = dict(scaling)
    kind = options.pop("rope_type", options.pop("type", "default"))
    base = as_float("rope_theta", options.pop("rope_theta", base))
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(
            f"rope_type = {kind!r} is not supported: a block's frequencies are fixed, so use one "
            f"of {tuple(_KINDS)}, or give rope_frequencies as a list of numbers"
        )
    needed, optional, scale = _KINDS[kind]
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in needed + optional:
            known = ", ".join(needed + optional) or "no options"
            raise ValueError(f"option {name!r} of rope_type {kind!r} is unknown: it takes {known}")
    for name in needed:
        if name not in given:
            raise ValueError(f"rope_type {kind!r} needs {name}: add it to rope_frequencies")
    check = {name: as_bool if name == "truncate" else as_float for name in given}
    values = {name: check[name](name, value) for name, value in given.items()}
    return scale(plain_frequencies(columns, base), base, **values)


def _plain(frequencies: Frequencies, base: float) -> tuple[Frequencies, float]:
    return frequencies, 1.0


def _linear(frequencies: Frequencies, base: float, factor: float) -> tuple[Frequencies, float]:
    return tuple(f / factor for f in frequencies), 1.0


def _llama3(
    frequencies: Frequencies,
    base: float,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: float,
) -> tuple[Frequencies, float]:
    def scaled(f: float) -> float:
        turns = original_max_position_embeddings * f / (2 * math.pi)
        if turns > high_freq_factor:
            return f
        if turns < low_freq_factor:
            return f / factor
        smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
        return (1 - smooth) * f / factor + smooth * f

    return tuple(map(scaled, frequencies)), 1.0


def _yarn(
    frequencies: Frequencies,
    base: float,
    factor: float,
    original_max_position_embeddings: float,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    attention_factor: float | None = None,
    mscale: float = 0.0,
    mscale_all_dim: float = 0.0,
    truncate: bool = True,
) -> tuple[Frequencies, float]:
    columns = 2 * len(frequencies)

    def pair_that_turns(times: float) -> float:
        wavelength = original_max_position_embeddings / times
        return columns * math.log(wavelength / (2 * math.pi)) / (2 * math.log(base))

    low, high = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, columns - 1)
    width = high - low or 0.001  # a step
    slowed = [min(1.0, max(0.0, (j - low) / width)) for j in range(len(frequencies))]
    blended = (f * (1 - s + s / factor) for f, s in zip(frequencies, slowed, strict=True))

    def temperature(scale: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if attention_factor is None and mscale and mscale_all_dim:
        attention_factor = temperature(mscale) / temperature(mscale_all_dim)
    elif attention_factor is None:
        attention_factor = temperature()
    return tuple(blended), attention_factor


_CONTEXT = ("factor", "original_max_position_embeddings")
_YARN = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")
# Of each kind: the options that it needs, those that it may have, and its function.
_KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...], Callable[..., Any]]] = {
    "default": ((), (), _plain),
    "linear": (("factor",), (), _linear),
    "llama3": ((*_CONTEXT, "low_freq_factor", "high_freq_factor"), (), _llama3),
    "yarn": (_CONTEXT, _YARN, _yarn),
}
