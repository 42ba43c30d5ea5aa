"""Compiled sampler and solver of `lis.py`."""

from __future__ import annotations

import numpy as np

from relay_fast.tasks._jit import compiled
from relay_fast.tasks._random import below, start_stream
from relay_fast.tasks.vocabulary import LIS, NUMBER0, SEP


@compiled
def _choose(state, low, high, count, out):
    """Draws `count` distinct integers of low..high, ascending (Knuth 3.4.2, algorithm S)."""
    chosen = 0
    value = low
    while chosen < count:
        if below(state, high - value + 1) < count - chosen:
            out[chosen] = value
            chosen += 1
        value += 1


@compiled
def _draw(state, low, high, max_runs, places, planted, values):
    """Fills `values` with uniform integers of low..high and planted increasing runs."""
    n = len(values)
    runs = 1 + below(state, max_runs)
    least = min(3, n)
    total = least + below(state, n - least + 1)
    used = 0
    for left in range(runs, 0, -1):
        rest = total - used
        size = rest if left == 1 else min(rest, 1 + below(state, rest // left + 1))
        _choose(state, low, high, size, planted[used:])
        used += size
    for k in range(n):
        values[k] = low + below(state, high - low + 1)
    _choose(state, 0, n - 1, total, places)
    for k in range(total):
        values[places[k]] = planted[k]


@compiled
def solve(values, group, rounds, round_offsets, r):
    """Appends the rounds to `rounds`; returns (index of the round after the last, longest length).

    Args:
        values: The sequence.
        group: Values in a round.
        rounds: Receives the tokens of the rounds.
        round_offsets: round_offsets[r] is the number of tokens used so far; the next are written.
        r: Index of the first round.
    """
    n = len(values)
    smallest_end = np.empty(n, np.int64)  # of the increasing subsequences of length k + 1
    longest = 0
    last = 0
    cursor = round_offsets[r]
    for i in range(-(-n // group) * group):
        if i < n:
            k = np.searchsorted(smallest_end[:longest], values[i])
            smallest_end[k] = values[i]
            last = k + 1
            longest = max(longest, last)
        rounds[cursor] = NUMBER0 + last
        cursor += 1
        if (i + 1) % group == 0:
            rounds[cursor] = SEP
            cursor += 1
            r += 1
            round_offsets[r] = cursor
    return r, longest


@compiled
def shifted_rounds(
    problem, problem_offsets, rounds, round_offsets, first_round, owner, before, shift, group, out
):
    """Fill `out`, group + 1 tokens for each iteration, with what follows from shifted lengths."""
    longest = 0
    for i in owner:
        longest = max(longest, problem_offsets[i + 1] - problem_offsets[i])
    lengths = np.zeros(longest + group, np.int64)
    cursor = 0
    for r in range(len(owner)):
        i = owner[r]
        values = problem[problem_offsets[i] + 1 : problem_offsets[i + 1] - 1]
        known = before[r] * group
        for k in range(known):
            token = rounds[round_offsets[first_round[i] + k // group] + k % group]
            lengths[k] = token - NUMBER0 + shift[r]
        best = 0
        for k in range(known, known + group):
            if k < len(values):
                best = 0
                for j in range(k):
                    if values[j] < values[k]:
                        best = max(best, lengths[j])
                best += 1
                lengths[k] = best
            out[cursor] = NUMBER0 + best
            cursor += 1
        out[cursor] = SEP
        cursor += 1


@compiled
def sample(
    lengths,
    seed,
    start,
    group,
    low,
    high,
    max_runs,
    problem,
    problem_offsets,
    rounds,
    round_offsets,
    answer,
):
    """Fills the arrays of `Samples`; low < 0 stands for n + 1."""
    longest = lengths.max() if len(lengths) else 0
    state = np.empty(1, np.uint64)
    places = np.empty(longest, np.int64)
    planted = np.empty(longest, np.int64)
    values = np.empty(longest, np.int64)
    cursor = 0
    r = 0
    for i in range(len(lengths)):
        start_stream(state, seed, np.uint64(LIS), start + np.uint64(i))
        n = lengths[i]
        _draw(state, n + 1 if low < 0 else low, high, max_runs, places, planted, values[:n])
        problem[cursor] = LIS
        problem[cursor + 1 : cursor + 1 + n] = NUMBER0 + values[:n]
        problem[cursor + 1 + n] = SEP
        cursor += n + 2
        problem_offsets[i + 1] = cursor
        r, best = solve(values[:n], group, rounds, round_offsets, r)
        answer[i] = NUMBER0 + best
