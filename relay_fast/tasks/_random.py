"""Random numbers from splitmix64 (Steele, Lea, Flood 2014), keyed by (seed, stream, index).

Every sample has its own generator, so that workers can divide the samples in any way. `state` is a
(1,) uint64 array.
"""

from __future__ import annotations

import numpy as np

from relay_fast.tasks._jit import compiled

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31, _S32 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(32)


@compiled
def _next(state):
    state[0] += _GOLDEN
    z = state[0]
    z = (z ^ (z >> _S30)) * _MIX1
    z = (z ^ (z >> _S27)) * _MIX2
    return z ^ (z >> _S31)


@compiled
def start_stream(state, seed, stream, index):
    """Sets `state` to the start of a sample's random numbers.

    Args:
        state: (1,) uint64, overwritten.
        seed, stream, index: uint64 keys.
    """
    state[0] = seed
    state[0] = _next(state) ^ stream
    state[0] = _next(state) ^ index
    state[0] = _next(state)


@compiled
def below(state, n):
    """Draws a uniform int64 in 0..n-1, with a bias below n / 2**32."""
    return np.int64(((_next(state) >> _S32) * np.uint64(n)) >> _S32)
