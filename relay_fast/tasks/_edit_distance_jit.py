"""Compiled sampler and solver of `edit_distance.py`."""

from __future__ import annotations

import numpy as np

from relay_fast.tasks._jit import compiled
from relay_fast.tasks._random import below, start_stream
from relay_fast.tasks.vocabulary import BAR, COMMA, EDIT_DISTANCE, LETTER0, NUMBER0, SEP


@compiled
def _edit(state, text, size, letters, n_letters):
    """Applies one random edit to text[:size] in place; returns the new size."""
    kind = below(state, 3)
    if kind == 0 and size > 2:
        at = below(state, size)
        for k in range(at, size - 1):
            text[k] = text[k + 1]
        return size - 1
    if kind == 1:
        text[below(state, size)] = letters[below(state, n_letters)]
        return size
    at = below(state, size + 1)
    for k in range(size, at, -1):
        text[k] = text[k - 1]
    text[at] = letters[below(state, n_letters)]
    return size + 1


@compiled
def _draw(state, n, alphabet, letters, first, second):
    """Draws the two strings; returns the length of the second (the first has n letters)."""
    edits = 1 + below(state, n)
    while True:
        for k in range(len(letters)):
            letters[k] = LETTER0 + k
        n_letters = alphabet[0] + below(state, alphabet[1] - alphabet[0] + 1)
        for k in range(n_letters):
            j = k + below(state, len(letters) - k)
            letters[k], letters[j] = letters[j], letters[k]
        for k in range(n):
            first[k] = letters[below(state, n_letters)]
        if below(state, 10) < 4:
            size = n - 3 + below(state, 6)
            for k in range(size):
                second[k] = letters[below(state, n_letters)]
        else:
            size = n
            second[:n] = first[:n]
            for _ in range(edits):
                size = _edit(state, second, size, letters, n_letters)
        if size < n or size > n + 2:
            continue
        if size > n or np.any(first[:n] != second[:n]):
            return size


@compiled
def solve(first, second, insert, delete, replace, border, rounds, round_offsets, r):
    """Appends the rows of the table to `rounds`; returns the index of the round after the last.

    Args:
        first, second: Letters of the strings.
        insert, delete, replace, border: Costs.
        rounds: Receives the tokens of the rounds.
        round_offsets: round_offsets[r] is the number of tokens used so far; the next are written.
        r: Index of the first round.
    """
    row = np.arange(len(second) + 1) * border
    cursor = round_offsets[r]
    for i in range(len(first)):
        diagonal = row[0]
        row[0] += border
        for j in range(1, len(second) + 1):
            if first[i] != second[j - 1]:
                diagonal += replace
            cell = min(diagonal, min(row[j] + delete, row[j - 1] + insert))
            diagonal = row[j]
            row[j] = cell
            rounds[cursor] = NUMBER0 + cell
            cursor += 1
        rounds[cursor] = COMMA
        cursor += 1
        r += 1
        round_offsets[r] = cursor
    return r


@compiled
def sample(
    lengths,
    seed,
    start,
    alphabet,
    n_letters,
    insert,
    delete,
    replace,
    border,
    problem,
    problem_offsets,
    rounds,
    round_offsets,
    answer,
):
    """Fills the arrays of `Samples`; `problem` and `rounds` must be large enough for any draw."""
    longest = lengths.max() if len(lengths) else 0
    state = np.empty(1, np.uint64)
    letters = np.empty(n_letters, np.int32)
    first = np.empty(longest, np.int32)
    second = np.empty(2 * longest + 2, np.int32)
    cursor = 0
    r = 0
    for i in range(len(lengths)):
        start_stream(state, seed, np.uint64(EDIT_DISTANCE), start + np.uint64(i))
        n = lengths[i]
        m = _draw(state, n, alphabet, letters, first, second)
        problem[cursor] = EDIT_DISTANCE
        problem[cursor + 1 : cursor + 1 + n] = first[:n]
        problem[cursor + 1 + n] = BAR
        problem[cursor + 2 + n : cursor + 2 + n + m] = second[:m]
        problem[cursor + 2 + n + m] = SEP
        cursor += 3 + n + m
        problem_offsets[i + 1] = cursor
        r = solve(first[:n], second[:m], insert, delete, replace, border, rounds, round_offsets, r)
        answer[i] = rounds[round_offsets[r] - 2]
