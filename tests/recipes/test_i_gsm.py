"""Symbolic i-GSM: problems read as text and solved by recursion, what the recipe leaves."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from relay_fast.recipes import i_gsm
from relay_fast.recipes.i_gsm import PRESETS, SYMBOLS, Settings, draw_problems
from relay_fast.relay.run_folder import RunFolder
from relay_fast.reporting.progress import Display

NAME = r"[A-Z]#[A-Z]|v\d+"


def sampler(variables: int, width: int, **options) -> Settings:
    """The paper's format: letters, and one question a problem."""
    return replace(PRESETS["paper"], variables=(variables,), width=width, **options)


def texts(count: int, variables: int, width: int) -> list[tuple[str, int]]:
    p = draw_problems(np.random.default_rng(0), sampler(variables, width), count, variables)
    cu = p.cu_seqlens
    assert cu[0] == 0 and cu[-1] == len(p.tokens) and len(cu) == count + 1
    assert p.rows.tolist() == [last - 1 for last in cu[1:]]
    return [
        ("".join(SYMBOLS[t] for t in p.tokens[first:last]), int(answer))
        for first, last, answer in zip(cu[:-1], cu[1:], p.answers, strict=True)
    ]


def formulas(text: str) -> tuple[dict[str, str], str]:
    *statements, question = re.split(r"\.", text)
    assert re.fullmatch(r"[A-Z]#[A-Z]\?", question)
    parts = [re.fullmatch(r"([A-Z]#[A-Z]):=(.+)", s).groups() for s in statements]
    assert len(dict(parts)) == len(parts)
    return dict(parts), question[:-1]


def solve(known: dict[str, str], name: str) -> tuple[int, int]:
    """Value and depth. Raises RecursionError on a cycle, KeyError for a variable without a
    statement."""
    total = depth = 0
    for term in known[name].split("+"):
        found = re.fullmatch(rf"(?:([2-6])\*)?({NAME})|([0-6])", term)
        factor, parent, constant = found.groups()
        value, below = (int(constant), -1) if constant else solve(known, parent)
        total, depth = total + int(factor or 1) * value, max(depth, below + 1)
    return total % 7, depth


@pytest.mark.parametrize(("variables", "width"), [(2, 1), (3, 1), (5, 3), (12, 2), (16, 4)])
def test_problems_have_their_answer(variables, width) -> None:
    for text, answer in texts(60, variables, width):
        known, asked = formulas(text)
        assert len(known) == variables and solve(known, asked)[0] == answer
        for formula in known.values():
            parents = re.findall(r"[A-Z]#[A-Z]", formula)
            assert len(set(parents)) == len(parents) <= 3
            assert not re.search(r"\+[2-6]\*", formula)  # the first parent only has a factor
        assert "#" in known[asked]


def test_every_variable_is_asked_for_by_its_whole_name() -> None:
    settings = sampler(7, 3, asked="every", names="whole", parents=2)
    p = draw_problems(np.random.default_rng(0), settings, 40, 7)
    symbol = lambda t: SYMBOLS[t] if t < i_gsm.LETTERS else f"v{t - i_gsm.LETTERS}"
    answered = iter(zip(p.rows.tolist(), p.answers, p.depths, strict=True))
    orders = set()
    for first, last in zip(p.cu_seqlens[:-1], p.cu_seqlens[1:], strict=True):
        *statements, questions = "".join(map(symbol, p.tokens[first:last])).split(".")
        known = dict(statement.split(":=") for statement in statements)
        assert questions[0] == "?"
        asked = re.findall(r"v\d+", questions)
        assert sorted(asked) == sorted(known) and len(known) == 7
        orders.add(tuple(list(known).index(name) for name in asked))
        for k, name in enumerate(asked):
            row, answer, depth = next(answered)
            assert row == last - 7 + k and (answer, depth) == solve(known, name)
    assert next(answered, None) is None and len(orders) > 35 and p.depths.max() > 2
    assert max(p.tokens) < settings.vocabulary_size == i_gsm.LETTERS + 27


def test_accuracy_is_by_depth() -> None:
    """A model that knows constants only is right on depth 0, and on the others by chance."""

    class Oracle(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(1, 1)

        def predict(self, tokens, rows, cu_seqlens):
            tokens, answers = tokens.tolist(), []
            for row in rows.tolist():
                i = row  # back to the statement of the variable that is asked for
                while tokens[i : i + 2] != [tokens[row], i_gsm.IS]:
                    i -= 1
                answers.append(tokens[i + 2] if tokens[i + 3] == i_gsm.STOP else -1)
            return torch.tensor(answers)

    settings = replace(PRESETS["cpu"], problems=100)
    found = i_gsm.accuracy(Oracle(), settings, seed=0)
    assert found.pop("0") == 1.0 and len(found) > 1 and set(found.values()) == {0.0}


@pytest.mark.parametrize("names", i_gsm.NAMES)
def test_fewer_formulas_and_smaller_factors(names) -> None:
    draw = lambda **options: draw_problems(
        np.random.default_rng(0), sampler(6, 2, asked="every", names=names, **options), 500, 6, 0.5
    )
    half = draw(factor=1)
    assert 0.55 < (half.depths == 0).mean() < 0.75 and not (half.tokens == i_gsm.TIMES).any()
    p = draw(factor=3)
    (at,) = np.nonzero(p.tokens == i_gsm.TIMES)
    assert set(p.tokens[at - 1]) == {2, 3} and len(p.rows) == 3000 == len(p.answers)
    none = draw_problems(np.random.default_rng(0), sampler(6, 2, asked="every"), 50, 6, 0.0)
    assert none.depths.max() == 0


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
    answers = draw_problems(np.random.default_rng(0), sampler(8, 3), 20_000, 8).answers
    shares = np.bincount(answers, minlength=7) / 20_000
    assert 0.12 < shares.min() and shares.max() < 0.2  # chance is 1/7; zero is a little likelier


@pytest.mark.parametrize("preset", ["cpu", "paper"])
def test_a_short_run(preset, tmp_path) -> None:
    whole = PRESETS[preset]
    settings = replace(
        whole,
        training=replace(whole.training, steps=20, batch_size=1),
        models=("1x1", "2x4"),
        problems=2,
    )
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
        ({"variables": (1,)}, "variables = [1]: give at least 2"),
        ({"variables": ()}, "variables = []: give at least 1 of them"),
        ({"factor": 7}, "factor = 7: give 1 to 6"),
        ({"curriculum": 2.0}, "curriculum = 2.0: give 0 to 1"),
        ({"parents": 0}, "parents = 0: give at least 1"),
        ({"asked": "first"}, "asked = 'first' is unknown: use one of last, every"),
        ({"names": "long"}, "names = 'long' is unknown: use one of letters, whole"),
        ({"width": 7}, "width = 7: give 1 to 6, there are 26 letters"),
        ({"width": 1}, "5 variables do not fit into 4 levels of 1 entities, which have 3 edges"),
        ({"problems": 0}, "problems = 0: give at least 1"),
        ({"models": ("0x1",)}, "model '0x1' is unknown: write layers x loops like 1x4"),
    ],
)
def test_bad_settings(options, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Settings(PRESETS["cpu"].training, **options)
