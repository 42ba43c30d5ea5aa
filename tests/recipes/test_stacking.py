"""Stacking as a recipe: both tasks, the table, what it says to bad input."""

from dataclasses import replace

import pytest

from relay_fast.recipes import stacking
from relay_fast.relay.run_folder import RunFolder
from relay_fast.reporting.progress import Display

CPU = stacking.PRESETS["cpu"]
TINY = replace(
    CPU,
    length=8,
    hops=(1, 2),
    d_model=16,
    n_heads=2,
    problems=20,
    depth=2,
    training=replace(CPU.training, steps=6, batch_size=4),
    arithmetic=replace(CPU.arithmetic, steps=3, batch_size=4),
)


def test_the_recipe(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(stacking, "TIMED_STEPS", 2)
    with Display() as display:
        results = stacking.run(TINY, RunFolder(tmp_path, {}), seed=0, device="cpu", display=display)
    hops, arithmetic = results["tasks"]["p_hop"], results["tasks"]["arithmetic"]
    assert hops["stage_steps"] == [2, 4] and arithmetic["stage_steps"] == [1, 2]
    assert hops["ideal_work"] == pytest.approx(10 / 12)
    for found in (hops, arithmetic):
        assert list(found["models"]) == ["full", "middle", "last"]
        (one, two), steps = found["step_seconds"], found["stage_steps"]
        work = (steps[0] * one + steps[1] * two) / (sum(steps) * two)
        assert found["measured_work"] == pytest.approx(work, rel=1e-3)
        for name, model in found["models"].items():
            (_, similarity), _ = model["similarity"]  # a grown layer looks like its source
            assert similarity > 0.9 if name != "full" else abs(similarity) < 0.2
    assert list(hops["models"]["full"]["accuracy"]) == ["1", "2"]
    assert list(arithmetic["models"]["full"]["accuracy"]) == [str(n) for n in range(1, 11)]
    header, lines = stacking.rows(results)
    assert [line[:2] for line in lines[:2]] == [["p_hop", "full"], ["p_hop", "middle"]]
    assert lines[1][4] == pytest.approx(1.2) and {len(line) for line in lines} == {len(header)}
    assert stacking.plot(results, tmp_path / "p.png").stat().st_size > 10_000


def test_the_paper_preset(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(stacking, "TIMED_STEPS", 1)
    paper = stacking.PRESETS["paper"]
    short = replace(paper.training, steps=20, batch_size=1)
    task = replace(paper, training=short, problems=1, methods=("middle",))
    with Display() as display:
        results = stacking.run(task, RunFolder(tmp_path, {}), seed=0, device="cpu", display=display)
    found = results["tasks"]["p_hop"]
    assert len(found["step_seconds"]) == 6 == len(found["models"]["middle"]["similarity"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"stages": 3}, "3 stages of 1 more layers each end at 3 layers, not at the 4 of the mod"),
        ({"layers": 3}, "layers = 3 does not divide depth = 4"),
        ({"methods": ("first",)}, r"methods = \['first'\] is unknown: use some of full, middle"),
        ({"tasks": ()}, r"tasks = \[\]: give at least 1 of them"),
    ],
)
def test_bad_input(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CPU, **change)
