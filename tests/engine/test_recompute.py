"""Recompute policies: what parses, what is kept, what a budget allows."""

import pytest

from relay_fast.engine.recompute import RecomputePolicy

SIZES = [100, 90, 80, 70, 60, 50, 40, 30, 20]  # bytes of h_1 … h_9


@pytest.mark.parametrize(
    "text, kept",
    [
        ("none", range(1, 9)),
        ("state", range(1, 9)),
        ("every:1", range(1, 9)),
        ("every:3", [3, 6]),
        ("every:9", []),
        ("every:100", []),
        ("sqrt", [3, 6]),
        ("last:1", [8]),
        ("last:3", [6, 7, 8]),
        ("last:100", range(1, 9)),
        ("budget:520", range(1, 9)),  # h_9 is the output and costs nothing
        ("budget:519", [2, 4, 6, 8]),
        ("budget:239", [3, 6]),
        ("budget:30", [8]),
    ],
)
def test_kept(text: str, kept) -> None:
    assert RecomputePolicy.parse(text).kept(9, SIZES) == frozenset(kept)


@pytest.mark.parametrize("text", ["none", "state", "sqrt", "every:2", "last:1", "budget:1"])
@pytest.mark.parametrize("loops", [0, 1])
def test_nothing_lies_between_the_input_and_the_first_state(text: str, loops: int) -> None:
    assert RecomputePolicy.parse(text).kept(loops, SIZES[:loops]) == frozenset()


def test_budget_names_the_least_that_works() -> None:
    with pytest.raises(
        ValueError, match=r"recompute='budget:29' is too small .* at least 'budget:30'"
    ):
        RecomputePolicy.parse("budget:29").kept(9, SIZES)


@pytest.mark.parametrize(
    "text",
    ["", "all", "every", "every:", "every:0", "every:-1", "every:two", "every:1.5", "last:",
     "state:2", "sqrt:3", "budget", "budget:1e9", "NONE", " state", "every:²", None, 3],
)  # fmt: skip
def test_what_does_not_parse(text) -> None:
    with pytest.raises(ValueError, match="recompute policy .* is unknown: use 'none', 'state'"):
        RecomputePolicy.parse(text)


def test_parse_takes_a_policy() -> None:
    policy = RecomputePolicy("every", 2)
    assert RecomputePolicy.parse(policy) is policy
