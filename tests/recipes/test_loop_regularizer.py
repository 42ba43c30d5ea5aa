"""The looping regulariser as a recipe: what λ does, the table, what it says to bad input."""

from dataclasses import replace

import pytest

from relay_fast.recipes import loop_regularizer
from relay_fast.relay.run_folder import RunFolder
from relay_fast.reporting.progress import Display

CPU = loop_regularizer.PRESETS["cpu"]
TINY = replace(
    CPU,
    models=("2x1",),
    length=8,
    hops=(1, 2),
    d_model=16,
    n_heads=2,
    problems=20,
    weights=(0.0, 10.0),
    tied_steps=2,
    training=replace(CPU.training, steps=40, batch_size=4, warmup=0.0),
)


def test_the_recipe(tmp_path) -> None:
    with Display() as display:
        results = loop_regularizer.run(
            TINY, RunFolder(tmp_path, {}), seed=0, device="cpu", display=display
        )
    free, tied = results["models"]
    assert list(free["cosines"]) == ["q", "k", "v", "out", "up", "down"]
    assert max(free["cosines"].values()) < 0.5 < 0.7 < min(tied["cosines"].values())
    block = 12 * 16 * 16 + 2 * 16
    assert free["parameters"] - free["tied_parameters"] == block
    for model in (free, tied):
        assert list(model["tied"]) == ["mean", "first", "trained"]
        for accuracy in (model["accuracy"], *model["tied"].values()):
            assert list(accuracy) == ["1", "2"] and all(0 <= a <= 1 for a in accuracy.values())
    header, lines = loop_regularizer.rows(results)
    assert [line[0] for line in lines] == ["0", "10"] and lines[1][4] == "≥ 0.98"
    assert {len(line) for line in lines} == {len(header)}
    assert loop_regularizer.plot(results, tmp_path / "p.png").stat().st_size > 10_000


def test_the_paper_preset(tmp_path) -> None:
    paper = loop_regularizer.PRESETS["paper"]
    short = replace(paper.training, steps=20, batch_size=1)
    task = replace(paper, training=short, problems=1, weights=(10.0,), tied_steps=1)
    with Display() as display:
        results = loop_regularizer.run(
            task, RunFolder(tmp_path, {}), seed=0, device="cpu", display=display
        )
    assert results["shape"] == "6x1" and list(results["models"][0]["accuracy"]) == ["16"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"models": ("1x4",)}, r"models = \['1x4'\]: give one stack without loops"),
        ({"models": ("4x1", "2x1")}, "give one stack"),
        ({"weights": (-1.0,)}, r"weights = \[-1.0\]: give a number of at least 0"),
        ({"period": 3}, "period = 3 does not divide a stack of 4 layers"),
        ({"hops": (60,)}, "p = 60 hops do not fit"),
    ],
)
def test_bad_input(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CPU, **change)
