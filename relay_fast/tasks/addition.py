"""Addition of two numbers, a digit a round, as a `TextTask`.

`3 7 5 + 1 2 8` → `3 7 + 1 2 =1 3` → `3 + 1 = 0 3` → `5 0 3`. A round holds the digits of both
numbers that are left, `=` or with a carry `=1`, and the digits of the sum so far; the last round is
the sum. The length of a problem is its number of digits, which is also its number of rounds.
"""

from __future__ import annotations

import numpy as np

from relay_fast.tasks.text import TextTask

_CARRY = ("=", "=1")


class Addition(TextTask):
    """Numbers with the same number of digits, each digit uniform; both may begin with zeros."""

    name = "addition"
    title = "Addition"
    unit = "number of digits"
    tokens = ("+", *_CARRY, *"0123456789")
    answer_is = "round"
    shows = "round"

    def sample(self, length: int, rng: np.random.Generator) -> tuple[str, list[str], str]:
        digits = "".join(map(str, rng.integers(0, 10, 2 * length).tolist()))
        first, second = digits[:length], digits[length:]
        return f"{' '.join(first)} + {' '.join(second)}", *_solved(first, second)

    def solve(self, problem: str) -> tuple[list[str], str]:
        return _solved(*self._numbers(problem))

    def length_of(self, problem: str) -> int:
        return len(self._numbers(problem)[0])

    @staticmethod
    def _numbers(problem: str) -> tuple[str, str]:
        first, plus, second = "".join(problem.split()).partition("+")
        if not plus or len(first) != len(second) or not (first + second).isdigit():
            raise ValueError(
                f"addition problem {problem!r} is malformed; write two numbers of as many digits, "
                f"for example 3 7 + 0 5."
            )
        return first, second


def _solved(first: str, second: str) -> tuple[list[str], str]:
    """Returns the rounds and the sum of two numbers."""
    upper, lower = " ".join(first), " ".join(second)
    rounds, carry, total = [], 0, ""
    for left in reversed(range(len(first))):
        carry, digit = divmod(int(first[left]) + int(second[left]) + carry, 10)
        total = f"{digit} {total}" if total else str(digit)
        if left:
            end = 2 * left - 1
            rounds.append(f"{upper[:end]} + {lower[:end]} {_CARRY[carry]} {total}")
    rounds.append(f"1 {total}" if carry else total)
    return rounds, rounds[-1]
