"""Compiled sampler and solver of `arithmetic.py`. Numbers are token ids, NUMBER0 + value."""

from __future__ import annotations

import numpy as np

from relay_fast.tasks._jit import compiled
from relay_fast.tasks._random import below, start_stream
from relay_fast.tasks.vocabulary import (
    ARITHMETIC,
    DIVIDE,
    EQUALS,
    LEFT,
    MINUS,
    NUMBER0,
    PAD,
    PLUS,
    RIGHT,
    TIMES,
)


@compiled
def _operands(state, value, prime, operators, inverse):
    """Draws (a, operator, b) with a operator b = value; never divides by zero."""
    while True:
        a = below(state, prime)
        operator = operators[below(state, len(operators))]
        if operator == PLUS:
            return a, operator, (value - a) % prime
        if operator == MINUS:
            return a, operator, (a - value) % prime
        if operator == TIMES:
            if a != 0:
                return a, operator, value * inverse[a] % prime
            if value == 0:
                return a, operator, below(state, prime)
        else:
            if a != 0 and value != 0:
                return a, operator, a * inverse[value] % prime
            if a == 0 and value == 0:
                return a, operator, 1 + below(state, prime - 1)


@compiled
def _draw(state, n, prime, operators, inverse, work):
    """Draws an expression of n operators into `work`; returns its number of tokens.

    It grows backwards: n times, a random number is replaced by `a operator b` of the same value.
    """
    work[0] = NUMBER0 + below(state, prime)
    size = 1
    for count in range(n):
        skip = below(state, count + 1)
        at = 0
        while work[at] < NUMBER0 or skip > 0:
            if work[at] >= NUMBER0:
                skip -= 1
            at += 1
        a, operator, b = _operands(state, work[at] - NUMBER0, prime, operators, inverse)
        left = work[at - 1] if at > 0 else PAD
        right = work[at + 1] if at + 1 < size else PAD
        additive = operator == PLUS or operator == MINUS
        binds = left == TIMES or left == MINUS or right == TIMES or right == DIVIDE
        brackets = left == DIVIDE or (additive and binds)
        grow = 4 if brackets else 2
        for k in range(size - 1, at, -1):
            work[k + grow] = work[k]
        size += grow
        if brackets:
            work[at] = LEFT
            work[at + 4] = RIGHT
            at += 1
        work[at] = NUMBER0 + a
        work[at + 1] = operator
        work[at + 2] = NUMBER0 + b
    return size


@compiled
def _leftmost(work, size):
    """Returns the position of the leftmost operator that can be collapsed, -1 if there is none.

    Both neighbours must be numbers, and + and − wait for a × or ÷ on their right. The left side
    needs no check: a binding operator there would itself be collapsed first.
    """
    for k in range(1, size - 1):
        operator = work[k]
        if not PLUS <= operator <= DIVIDE or work[k - 1] < NUMBER0 or work[k + 1] < NUMBER0:
            continue
        if operator == TIMES or operator == DIVIDE:
            return k
        if k + 2 == size or not (work[k + 2] == TIMES or work[k + 2] == DIVIDE):
            return k
    return -1


@compiled
def solve(work, size, prime, inverse, rounds, round_offsets, r):
    """Collapses the expression work[:size] in place and appends every round to `rounds`.

    Args:
        work: Tokens, overwritten.
        size: Tokens of the expression.
        prime: The modulus.
        inverse: (prime,) inverses modulo `prime`.
        rounds: Receives the tokens of the rounds.
        round_offsets: round_offsets[r] is the number of tokens used so far; the next are written.
        r: Index of the first round.

    Returns the index of the round after the last, or -1 if a divisor is zero (round_offsets is then
    valid up to the last complete round).
    """
    cursor = round_offsets[r]
    while size > 1:
        k = _leftmost(work, size)
        a, b = np.int64(work[k - 1] - NUMBER0), np.int64(work[k + 1] - NUMBER0)
        if work[k] == PLUS:
            value = (a + b) % prime
        elif work[k] == MINUS:
            value = (a - b) % prime
        elif work[k] == TIMES:
            value = a * b % prime
        elif b != 0:
            value = a * inverse[b] % prime
        else:
            return -1
        begin, end = k - 1, k + 2
        while begin > 0 and end < size and work[begin - 1] == LEFT and work[end] == RIGHT:
            begin -= 1
            end += 1
        work[begin] = NUMBER0 + value
        for j in range(end, size):
            work[begin + 1 + j - end] = work[j]
        size -= end - begin - 1
        rounds[cursor : cursor + size] = work[:size]
        cursor += size
        if size > 1:
            rounds[cursor] = EQUALS
            cursor += 1
        r += 1
        round_offsets[r] = cursor
    return r


@compiled
def sample(
    lengths,
    seed,
    start,
    prime,
    operators,
    inverse,
    problem,
    problem_offsets,
    rounds,
    round_offsets,
    answer,
):
    """Fills the arrays of `Samples`; `problem` and `rounds` must be large enough for any draw."""
    state = np.empty(1, np.uint64)
    cursor = 0
    r = 0
    for i in range(len(lengths)):
        start_stream(state, seed, np.uint64(ARITHMETIC), start + np.uint64(i))
        work = problem[cursor + 1 :]
        problem[cursor] = ARITHMETIC
        size = _draw(state, lengths[i], prime, operators, inverse, work)
        work[size] = EQUALS
        cursor += size + 2
        problem_offsets[i + 1] = cursor
        r = solve(work[:size].copy(), size, prime, inverse, rounds, round_offsets, r)
        answer[i] = rounds[round_offsets[r] - 1]
