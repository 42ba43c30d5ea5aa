"""p-hop: problems against a slow evaluator, the recipe's table, and what it says to bad input."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay_fast.recipes import p_hop
from relay_fast.relay.run_folder import RunFolder
from relay_fast.reporting.progress import Display

TINY = replace(
    p_hop.PRESETS["cpu"], models=("1x2", "1+1x2+1"), length=12, d_model=16, n_heads=2, problems=40
)
TINY = replace(TINY, training=replace(TINY.training, steps=2, batch_size=4))


def hop_slowly(v: list[int], p: int, absent: int) -> list[int]:
    """The definition, word for word, at every position."""

    def find(i: int, p: int) -> int:
        if p == 0 or i == 0:
            return i
        return (
            max([0] + [j for j in range(2, i + 1) if v[j - 2] == v[i - 1]])
            if p == 1
            else find(find(i, 1), p - 1)
        )

    found = [find(i, p) for i in range(1, len(v) + 1)]
    return [v[i - 1] if i else absent for i in found]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(v=st.lists(st.integers(0, 3), min_size=1, max_size=25), p=st.integers(0, 6))
def test_hop_is_the_definition(v, p) -> None:
    assert p_hop.hop(np.array([v]), p, absent=9)[0].tolist() == hop_slowly(v, p, 9)


def test_hop_takes_one_p_a_sequence(seed) -> None:
    v = np.random.default_rng(seed).integers(0, 3, (5, 20))
    found = p_hop.hop(v, np.arange(5), absent=3)
    for p in range(5):
        assert found[p].tolist() == hop_slowly(v[p].tolist(), p, 3)


@pytest.mark.parametrize("p, n", [(1, 3), (4, 9), (4, 40), (9, 30)])  # no room to spare, and some
def test_the_hops_of_a_chained_sequence_exist(p, n, seed) -> None:
    v, answers = p_hop.draw_chained(np.random.default_rng(seed), 300, n, p, 4)
    assert v.shape == (300, n) and v.min() == 0 and v.max() == 3
    for row, answer in zip(v.tolist(), answers, strict=True):
        assert hop_slowly(row, p, 9)[-1] == answer  # never 9: nothing is missing
    assert np.bincount(answers, minlength=4).min() > 45  # no character can be guessed


def test_every_position_has_a_target(seed) -> None:
    rng = np.random.default_rng(seed)
    p = np.array([1, 3, 4])
    tokens, rows, targets = p_hop.draw_problems(rng, TINY, p, 3)
    assert tokens[:, 0].tolist() == [5, 7, 8]  # p in front, behind 4 characters and ⊥
    assert np.all(np.diff(tokens[:, 1:]) != 0)
    assert rows.tolist() == [i for i in range(3 * 13) if i % 13]
    expected = [
        x for v, k in zip(tokens[:, 1:].tolist(), p, strict=True) for x in hop_slowly(v, k, 4)
    ]
    assert targets.tolist() == expected


def test_the_last_position_has_the_target(seed) -> None:
    task = replace(TINY, target="last")
    tokens, rows, targets = p_hop.draw_problems(np.random.default_rng(seed), task, 2, 4)
    assert rows.tolist() == [12, 25, 38, 51] and set(tokens[:, 0]) == {6}
    assert [hop_slowly(v, 2, 9)[-1] for v in tokens[:, 1:].tolist()] == targets.tolist()


@pytest.mark.parametrize("task", [TINY, replace(TINY, target="last", hops=(2, 3))])
def test_the_recipe(task, tmp_path) -> None:
    with Display() as display:
        results = p_hop.run(task, RunFolder(tmp_path, {}), seed=0, device="cpu", display=display)
    for name, layers in (("1x2", 1), ("1+1x2+1", 3)):
        model = results["models"][name]
        block = 12 * 16 * 16 + 2 * 16  # matrices and norms of a layer
        assert model["parameters"] == layers * block + 16 + 2 * task.vocabulary_size * 16
        assert all(0 <= a <= 1 for a in model["accuracy"].values())
        assert list(model["accuracy"]) == [str(p) for p in task.hops]
    header, lines = p_hop.rows(results)
    assert [line[0] for line in lines] == ["1⊗2", "1+1⊗2+1"]
    assert {len(line) for line in lines} == {len(header)}
    assert p_hop.plot(results, tmp_path / "p.png").stat().st_size > 10_000


def test_the_paper_preset_shows_the_papers_numbers(tmp_path) -> None:
    preset = p_hop.PRESETS["paper"]
    model = {"accuracy": {"16": 0.5, "32": 0.25}, "parameters": 1, "seconds": 1.0}
    header, lines = p_hop.rows({"models": {"2x3": model}, "published": True})
    assert header == ["model", "parameters", "p = 16", "p = 32", "paper 16", "paper 32", "seconds"]
    assert lines == [["2⊗3", 1, 50.0, 25.0, 99.9, 99.8, 1.0]]
    short = replace(preset.training, steps=20, batch_size=1)
    task = replace(preset, models=("2x3",), hops=(16,), problems=2, training=short)
    with Display() as display:
        results = p_hop.run(task, RunFolder(tmp_path, {}), seed=0, device="cpu", display=display)
    header, lines = p_hop.rows(results)
    assert lines[0][-2] == 99.9 and 2 * 12 * 128**2 < results["models"]["2x3"]["parameters"] < 5e5
    assert preset.models == tuple(p_hop.PUBLISHED) and (preset.length, preset.d_model) == (256, 128)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hops": (47,)}, "p = 47 hops do not fit into a sequence of 48 .* at most 46: choose"),
        ({"hops": (24,), "target": "last"}, "p = 24 hops do not fit .* at most 23: choose"),
        ({"hops": (0, 1)}, r"hops = \[0, 1\]: give at least 1"),
        ({"hops": ()}, r"hops = \[\]: give at least one number"),
        ({"problems": 0}, "problems = 0: give at least 1"),
        ({"target": "first"}, "'first' is unknown"),
        ({"characters": 2}, "characters = 2: give at least 3"),
        ({"models": ("4",)}, "model '4' is unknown: write layers x loops like 1x4"),
        ({"models": ("1x0",)}, "model '1x0' is unknown"),
    ],
)
def test_bad_input(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        replace(p_hop.PRESETS["cpu"], **change)
