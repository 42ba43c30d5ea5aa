"""Symbolic i-GSM: problems read as text and solved by recursion, what the recipe leaves."""

import re
from dataclasses import replace

import numpy as np
import pytest

from relay_fast.display import Display
from relay_fast.recipes import i_gsm
from relay_fast.recipes.i_gsm import PRESETS, SYMBOLS, Settings, draw_problems
from relay_fast.runs import RunFolder


def texts(count: int, variables: int, width: int, seed: int = 0) -> list[tuple[str, int]]:
    tokens, answers, cu = draw_problems(np.random.default_rng(seed), count, variables, width)
    assert cu[0] == 0 and cu[-1] == len(tokens) and len(cu) == count + 1
    return [
        ("".join(SYMBOLS[t] for t in tokens[first:last]), int(answer))
        for first, last, answer in zip(cu[:-1], cu[1:], answers, strict=True)
    ]


def formulas(text: str) -> tuple[dict[str, str], str]:
    *statements, question = re.split(r"\.", text)
    assert re.fullmatch(r"[A-Z]#[A-Z]\?", question)
    parts = [re.fullmatch(r"([A-Z]#[A-Z]):=(.+)", s).groups() for s in statements]
    assert len(dict(parts)) == len(parts)
    return dict(parts), question[:-1]


def solve(known: dict[str, str], name: str) -> int:
    """Raises RecursionError on a cycle, KeyError for a variable without a statement."""
    total = 0
    for term in known[name].split("+"):
        found = re.fullmatch(r"(?:([2-6])\*)?([A-Z]#[A-Z])|([0-6])", term)
        factor, parent, constant = found.groups()
        total += int(constant) if constant else int(factor or 1) * solve(known, parent)
    return total % 7


@pytest.mark.parametrize(("variables", "width"), [(2, 1), (3, 1), (5, 3), (12, 2), (16, 4)])
def test_problems_have_their_answer(variables, width) -> None:
    for text, answer in texts(60, variables, width):
        known, asked = formulas(text)
        assert len(known) == variables and solve(known, asked) == answer
        for formula in known.values():
            parents = re.findall(r"[A-Z]#[A-Z]", formula)
            assert len(set(parents)) == len(parents) <= 3
            assert not re.search(r"\+[2-6]\*", formula)  # the first parent only has a factor
        assert "#" in known[asked]


def test_variables_are_edges_between_neighbouring_levels() -> None:
    for text, _ in texts(50, 9, 2):
        known, _ = formulas(text)
        level: dict[str, set[int]] = {}
        for _ in range(3):  # every entity must find a level that suits all its edges
            for upper, lower in (name.split("#") for name in known):
                level[upper] = level.get(upper, {0, 1, 2, 3}) & {0, 1, 2}
                level[lower] = level.get(lower, {0, 1, 2, 3}) & {n + 1 for n in level[upper]}
                level[upper] &= {n - 1 for n in level[lower]}
        assert all(level.values())
        assert len(level) <= 4 * 2


def test_statements_come_shuffled_and_names_differ() -> None:
    found = texts(300, 5, 3)
    first = [formulas(text) for text, _ in found]
    places = [list(known).index(asked) for known, asked in first]
    assert np.bincount(places, minlength=5).min() > 30
    assert len({asked for _, asked in first}) > 150


def test_answers_are_spread() -> None:
    _, answers, _ = draw_problems(np.random.default_rng(0), 20_000, 8, 3)
    shares = np.bincount(answers, minlength=7) / 20_000
    assert 0.12 < shares.min() and shares.max() < 0.2  # chance is 1/7; zero is a little likelier


@pytest.mark.parametrize("preset", ["cpu", "paper"])
def test_a_short_run(preset, tmp_path) -> None:
    whole = PRESETS[preset]
    settings = replace(
        whole, training=replace(whole.training, steps=20, batch_size=1), models=("1x1", "2x4"),
        problems=2,
    )  # fmt: skip
    with Display() as display:
        results = i_gsm.run(
            settings, RunFolder(tmp_path, {}), seed=0, device="cpu", display=display
        )
    header, lines = i_gsm.rows(results)
    assert [line[0] for line in lines] == ["1⊗1", "2⊗4"]
    assert [line[-1] for line in lines] == [24.5, 73.6]
    assert all(len(line) == len(header) for line in lines)
    assert i_gsm.plot(results, tmp_path / "plot.png").stat().st_size > 10_000


def test_the_papers_sizes() -> None:
    s = PRESETS["paper"]
    assert (s.d_model, s.n_heads, s.training.batch_size, s.problems) == (128, 8, 256, 50_000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variables": (1,)}, "variables = (1,): give some numbers of at least 2"),
        ({"test_variables": ()}, "test_variables = (): give some numbers of at least 2"),
        ({"width": 7}, "width = 7: give 1 to 6, there are 26 letters"),
        ({"width": 1}, "4 variables do not fit into 4 levels of 1 entities, which have 3 edges"),
        ({"problems": 0}, "problems = 0: give at least 1"),
        ({"models": ("0x1",)}, "model '0x1' is unknown: write layers x loops like 1x4"),
    ],
)
def test_bad_settings(options, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Settings(PRESETS["cpu"].training, **options)
