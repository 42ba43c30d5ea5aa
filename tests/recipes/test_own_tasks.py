"""Recipes on tasks of one's own, from a config file and from a run's folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import relay_fast.recipes.__main__ as command
from relay_fast.recipes import RECIPES, stacking
from relay_fast.recipes._models import make_classifier
from relay_fast.recipes._own_tasks import OwnTasks
from relay_fast.relay.presets.own import read_config, resolved
from relay_fast.relay.run_folder import RunFolder

TASK = """
from relay_fast.tasks import TextTask


class Ones(TextTask):
    name = "ones"
    title = "Ones so far"
    unit = "number of bits"

    def sample(self, length, rng):
        bits = rng.integers(0, 2, length).tolist()
        rounds = [str(sum(bits[: k + 1])) for k in range(length)]
        return " ".join(map(str, bits)), rounds, rounds[-1]
"""
CONFIG = """
base = "cpu"
[tasks.ones]
class = "own:Ones"
train = [1, 3]
test = [3, 4]
"""
SIZES = ["d_model=16", "n_heads=2", "problems=6", "training.batch_size=4", "training.steps=3"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("own")
    (place / "own.py").write_text(TASK)
    (place / "mine.toml").write_text(CONFIG)
    return place


def changes(*more: str) -> list[str]:
    return [part for change in (*SIZES, *more) for part in ("--set", change)]


def test_shapes_are_compared_on_chains_from_another_folder(place, monkeypatch, capsys) -> None:
    monkeypatch.chdir("/")
    out = place / "shapes"
    arguments = ["p_hop", "--config", str(place / "mine.toml"), "--out", str(out)]
    arguments += changes('models=["1x2", "2x1"]')
    assert command.main(arguments) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["config"]["tasks"]["ones"]["class"] == f"{place / 'own.py'}:Ones"
    assert results["config"]["vocabulary"]["tokens"] == ["[ones]", "<sep>", *"01234"]
    for name in ("1x2", "2x1"):
        model = results["results"]["models"][name]
        assert list(model["accuracy"]) == ["1", "2", "3", "4"]
        assert [entry["step"] for entry in model["history"]] == [1, 3]
    printed = capsys.readouterr().out
    assert "number of bits = 4" in printed and "1⊗2" in printed
    assert (out / "plot.png").stat().st_size > 10_000
    # A run's folder gives the same tasks, so that the same recipe goes on.
    run = place / "run"
    RunFolder(run, resolved(read_config(place / "mine.toml")))
    assert command.main(["p_hop", "--config", str(run), *arguments[3:]]) == 0
    assert command.main(["p_hop", "--config", str(out), *arguments[3:]]) == 2
    assert "holds a run of the recipe 'p_hop' where a run of RELAY was" in capsys.readouterr().err


def test_the_other_recipes_take_them_too(place, monkeypatch, capsys) -> None:
    monkeypatch.setattr(stacking, "TIMED_STEPS", 1)
    config = ["--config", str(place / "mine.toml")]
    short = ["depth=2", "arithmetic.steps=3", "arithmetic.batch_size=4", 'methods=["middle"]']
    assert command.main(["stacking", *config, "--out", str(place / "st"), *changes(*short)]) == 0
    found = json.loads((place / "st" / "results.json").read_text())["results"]["tasks"]
    assert list(found["Ones so far"]["models"]["middle"]["accuracy"]) == ["1", "2", "3"]
    short = ['models=["2x1"]', "weights=[1.0]", "tied_steps=2"]
    arguments = ["loop_regularizer", *config, "--out", str(place / "re"), *changes(*short)]
    assert command.main(arguments) == 0
    found = json.loads((place / "re" / "results.json").read_text())["results"]
    assert list(found["models"][0]["tied"]["trained"]) == ["1", "2", "3", "4"]
    assert "correct, number of bits = 4 (%)" in capsys.readouterr().out


def test_batches_ask_for_every_token_of_the_chain(place) -> None:
    tasks = OwnTasks.read(place / "mine.toml")
    assert tasks.label == {"title": "Ones so far", "unit": "number of bits"}
    tokens, rows, targets, cu_seqlens = tasks.draw(3, seed=5)(np.random.default_rng(0), 2)
    lengths = np.random.default_rng(0).choice([1, 2, 3], 3)
    samples = tasks.tasks["ones"].sample(lengths, 5001, 2 * 3)
    whole, asked, wanted = [], [], []
    for i in range(3):
        chain = [t for r in samples.rounds_of(i) for t in r.tolist()]
        problem = samples.problem_of(i).tolist()
        asked += range(len(whole) + len(problem) - 1, len(whole) + len(problem) + len(chain))
        wanted += [*chain, 1]  # <eos>
        whole += problem + chain
        assert cu_seqlens[i + 1] == len(whole)
    assert tokens.tolist() == whole and rows.tolist() == asked and targets.tolist() == wanted

    model = make_classifier("1x1", tasks.vocabulary.size, d_model=16, n_heads=2, seed=0)
    right = tasks._right(model, samples)
    with torch.no_grad():
        for i, (a, b) in enumerate(zip(cu_seqlens, cu_seqlens[1:], strict=False)):
            own = (rows >= a) & (rows < b)
            alone = torch.from_numpy(tokens[a:b])[None]
            chosen = model.predict(alone, torch.from_numpy(rows[own] - a))
            assert right[i] == (chosen.numpy() == targets[own]).all()


def test_bad_input(place, tmp_path, capsys) -> None:
    out = ["--out", str(tmp_path / "run")]
    assert command.main(["cot_gd", "--config", str(place / "mine.toml"), *out]) == 2
    error = capsys.readouterr().err
    assert "recipe cot_gd is about data of its own and takes no other tasks: use one of" in error
    assert all(name in error for name in ("p_hop", "loop_regularizer", "stacking", "addition"))
    assert set(RECIPES) > {"looped_lm"} and "looped_lm" not in error
    (tmp_path / "gone.toml").write_text(CONFIG.replace("own:Ones", "lost:Ones"))
    assert command.main(["p_hop", "--config", str(tmp_path / "gone.toml"), *out]) == 2
    error = capsys.readouterr().err
    assert "tasks.ones.class = 'lost:Ones' cannot be imported" in error and error.count("\n") == 1
    assert command.main(["p_hop", "--config", str(tmp_path / "no.toml"), *out]) == 2
    assert "no.toml cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
