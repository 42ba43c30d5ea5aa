"""`python -m relay_fast.recipes`: settings, resuming, what it leaves, what it says to bad input."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import Field
from torch import nn

import relay_fast.recipes.__main__ as command
from relay_fast import recipes
from relay_fast.recipes._common import Panel, Training, draw_panels, train
from relay_fast.relay.run_folder import RunFolder
from relay_fast.reporting.progress import Display
from relay_fast.reporting.text_table import text_table
from relay_fast.training.optim import OPTIMIZERS, make_optimizer, set_lr_scale
from relay_fast.utils.settings import described, settings, with_changes
from relay_fast.utils.tensor_files import CheckpointError

TRAINING = Training(steps=8, batch_size=4, lr=0.1)


@settings
class Settings:
    training: Training = TRAINING
    width: int = Field(3, description="of the model")
    scale: float = 1.0
    sizes: tuple[int, ...] = (1, 2)


def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor, sizes: list):
    assert sizes == [0, 4] and len(x) == 4
    x = x * (torch.rand(3) < 0.9)  # noise from the trainer's generator
    return (model(x)[:, 0] - y).square().mean(), None


def draw(rng: np.random.Generator, step: int):
    x = rng.standard_normal((4, 3), dtype=np.float32)
    return x, x.sum(1), [0, 4]


def fit(folder: RunFolder, training: Training = TRAINING, draw=draw, seed: int = 0) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    with Display() as display:
        model.trained = train(model, loss, draw, training, folder, "linear", display, seed=seed)
    return model


def run(settings, folder, *, seed, device, display):
    torch.manual_seed(seed)
    model = nn.Linear(settings.width, 1)
    trained = train(model, loss, draw, settings.training, folder, "linear", display, seed=seed)
    return {"loss": trained.history[-1]["loss"], "weight": model.weight[0].tolist()}


TOY = SimpleNamespace(
    PRESETS={"cpu": Settings(), "paper": replace(Settings(), width=5)},
    PUBLISHED={"loss": 0.5},
    run=run,
    rows=lambda results: (["what", "measured", "paper"], [["loss", results["loss"], 0.5]]),
    plot=lambda results, path: draw_panels(
        path, [Panel("t", "x", "y", {"w": ([1, 2, 3], results["weight"])}, {"w": ([1, 3], [1, 1])})]
    ),
)


@pytest.fixture
def toy(monkeypatch):
    """A registry of one recipe."""
    monkeypatch.setitem(sys.modules, "relay_fast.recipes.toy", TOY)
    monkeypatch.setattr(recipes, "RECIPES", {"toy": "a line"})
    monkeypatch.setattr(command, "RECIPES", {"toy": "a line"})


def test_a_recipe_that_diverges_says_so_and_leaves_json(tmp_path, toy, capsys, monkeypatch) -> None:
    arguments = ["toy", "--set", "training.lr=1e30", "--out", str(tmp_path)]
    assert command.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the training of linear diverged: the loss is ")
    assert "at step 8" in error and "give a smaller lr" in error and error.count("\n") == 1
    refuse = lambda word: pytest.fail(f"{word} is no JSON")
    results = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert results["history"][-1]["loss"] is None and "results" not in results


def test_lost_results_of_a_recipe_are_made_again(tmp_path, toy, capsys) -> None:
    assert command.main(["toy", "--out", str(tmp_path)]) == 0
    first = json.loads((tmp_path / "results.json").read_text())["results"]
    (tmp_path / "results.json").unlink()
    assert command.main(["toy", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "results.json").read_text())["results"] == first


# Training


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_is_exact_after_an_interruption(tmp_path, optimizer) -> None:
    training = replace(TRAINING, optimizer=optimizer)
    whole = fit(RunFolder(tmp_path / "whole", {}), training)
    folder = RunFolder(tmp_path / "broken", {})

    def interrupted(rng, step):
        if step == 5:
            raise KeyboardInterrupt
        return draw(rng, step)

    with pytest.raises(KeyboardInterrupt):
        fit(folder, training, interrupted)
    steps = []
    resumed = fit(folder, training, lambda rng, step: (steps.append(step), draw(rng, step))[1])
    assert steps == [5, 6, 7]
    assert torch.equal(resumed.weight, whole.weight) and torch.equal(resumed.bias, whole.bias)
    other = fit(RunFolder(tmp_path / "seed", {}), training, seed=1)
    assert not torch.equal(whole.weight, other.weight)


def test_finished_training_is_read_back(tmp_path) -> None:
    folder = RunFolder(tmp_path, {})
    first = fit(folder)
    again = fit(folder, draw=None)
    assert torch.equal(first.weight, again.weight) and not again.training
    assert again.trained.history == first.trained.history
    assert [entry["step"] for entry in first.trained.history] == [1, 8]
    with pytest.raises(CheckpointError, match="belongs to another config"):
        fit(folder, replace(TRAINING, lr=0.2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps = 0: give at least 1"),
        ({"batch_size": 0}, "batch_size = 0: give at least 1"),
        ({"lr": -0.1}, "lr = -0.1: give a positive number"),
        ({"lr": float("nan")}, "lr = nan: give a positive number"),
        ({"muon_lr": 0.0}, "muon_lr = 0.0: give a positive number"),
        ({"clip": -1.0}, "clip = -1.0: give a positive number"),
        ({"weight_decay": -1.0}, "weight_decay = -1.0: give a number of at least 0"),
        ({"warmup": 7.0}, "warmup = 7.0: give 0 to 1"),
        ({"betas": (0.9,)}, r"betas = \[0.9\]: give two numbers, like"),
        ({"betas": (0.9, 1.0)}, r"betas = \[0.9, 1.0\]: give at least 0 and less than 1"),
        ({"ema": 2.0}, "ema = 2.0: give at least 0 and less than 1"),
        ({"decay": "cosin"}, "decay = 'cosin' is unknown: use one of linear, cosine"),
        ({"decay": "cosin"}, "use one of linear, cosine, wsd, constant"),
        ({"optimizer": "adam"}, "optimizer = 'adam' is unknown: use one of adamw, adafactor"),
        ({"optimizer": "adafactor", "muon_lr": 0.1}, "muon_lr = 0.1 goes with optimizer = 'adamw'"),
    ],
)
def test_bad_training(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TRAINING, **change)


def test_adafactor_takes_shares_of_a_parameter() -> None:
    """A step is lr times the parameter's RMS (at least 1e-3), however small the gradient."""
    model = nn.Linear(64, 64)
    optimizer = make_optimizer(model, lr=0.01, optimizer="adafactor", weight_decay=0.0)
    set_lr_scale(optimizer, 0.5)
    nn.init.zeros_(model.bias)
    before = model.weight.clone()
    model.weight.grad, model.bias.grad = 1e-5 * torch.randn(64, 64), torch.zeros(64)
    optimizer.step()
    rms = lambda x: x.detach().square().mean().sqrt().item()
    assert rms(model.weight - before) / rms(before) == pytest.approx(0.005, rel=0.1)
    model.bias.grad = torch.ones(64)
    optimizer.step()
    assert rms(model.bias) == pytest.approx(0.005 * 1e-3, rel=0.01)


# The command


def test_the_command_leaves_results_plot_and_table(toy, tmp_path, capsys) -> None:
    arguments = ["toy", "--out", str(tmp_path / "run"), "--steps", "3", "--seed", "2"]
    assert command.main(arguments) == 0
    text = (tmp_path / "run" / "results.json").read_text()
    results = json.loads(text)
    assert results["config"]["recipe"] == "toy" and results["config"]["preset"] == "cpu"
    assert results["config"]["seed"] == 2
    assert results["config"]["settings"]["training"]["steps"] == 3
    assert results["versions"]["torch"] == torch.__version__ and results["seconds"] > 0
    assert (tmp_path / "run" / "plot.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "what  measured  paper" in out and f"{results['results']['loss']:.4g}" in out
    assert command.main(arguments) == 0  # shows it again, runs nothing
    assert "started" not in capsys.readouterr().out
    assert (tmp_path / "run" / "results.json").read_text() == text
    assert command.main([*arguments[:-1], "3"]) == 2
    error = capsys.readouterr().err
    assert "belongs to another config: seed (3 here, 2 in the folder)" in error


def test_an_interruption_is_continued(toy, tmp_path, monkeypatch, capsys) -> None:
    arguments = ["toy", "--out", str(tmp_path)]

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TOY, "run", stop)
        assert command.main(arguments) == 130
    assert "the same command continues this run" in capsys.readouterr().err
    assert command.main(arguments) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["p_hops"], "recipe 'p_hops' is unknown: use one of toy"),
        (["p_hops", "--help"], "recipe 'p_hops' is unknown: use one of toy"),
        (
            ["toy", "--preset", "gpu"],
            "preset 'gpu' of recipe toy is unknown: use one of cpu, paper",
        ),
        (["toy", "--seed", "-1"], "seed = -1: give at least 0 and less than 2^63"),
        (["toy", "--steps", "0"], "steps = 0: give at least 1"),
        (["toy", "--device", "abacus"], "device 'abacus' is unknown: use cpu or cuda"),
        (["toy", "--set", "widht=3"], "setting widht is unknown: the nearest is width"),
        (["toy", "--set", "width"], "'width' sets nothing: write KEY=VALUE, like training"),
        (["toy", "--set", "width=wide"], "width = 'wide': give a whole number"),
        (["toy", "--set", "sizes=1"], "sizes = 1: give a list"),
        (["toy", "--set", 'sizes=[1, "a"]'], "sizes = [1, 'a']: give a whole number"),
        (["toy", "--set", "training.steps=null"], "training.steps = None: give a whole number"),
        (["toy", "--set", "training.lr=null"], "training.lr = None: give a positive number"),
        (["toy", "--set", "training.lr=NaN"], "training.lr = nan: give a positive number"),
        (["toy", "--set", "training.clip=hard"], "training.clip = 'hard': give a positive number"),
        (["toy", "--set", "training.betas=[0.9]"], "training.betas = [0.9]: give two numbers"),
        (
            ["toy", "--set", "training.betas=[0, null]"],
            "training.betas = [0, None]: give a number, at least 0 and less than",
        ),
        (["toy", "--set", "training.clip=-1"], "training.clip = -1: give a positive number"),
        (["toy", "--set", "training=1"], "training is a table: set one of its keys, like trai"),
        (["toy", "--set", "width.x=1"], "'width.x=1': width has no parts: write it without a dot"),
    ],
)
def test_bad_input_is_one_sentence(toy, tmp_path, capsys, arguments, message) -> None:
    assert command.main([*arguments, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_changes_keep_the_kind_of_a_setting() -> None:
    s = with_changes(Settings(), ["scale=2"])
    assert s.scale == 2.0 and type(s.scale) is float
    assert with_changes(s, ["sizes=[4,5]"]).sizes == (4, 5)
    assert with_changes(s, ["sizes=[]"]).sizes == ()


@pytest.mark.parametrize("name", ["p_hop", "addition", "i_gsm"])
def test_recipes_need_a_model(name) -> None:
    with pytest.raises(ValueError, match=r"models = \[\]: give at least one, like 1x4"):
        with_changes(recipes.load_recipe(name).PRESETS["cpu"], ["models=[]"])
    assert recipes.load_recipe("stacking").PRESETS["cpu"].models == ()  # it builds on p_hop


def test_changes_are_checked_together() -> None:
    muon = replace(Settings(), training=replace(TRAINING, muon_lr=0.1))
    changes = ["training.optimizer=adafactor", "width=4", "training.muon_lr=null"]
    t = with_changes(muon, changes).training
    assert (t.optimizer, t.muon_lr) == ("adafactor", None)
    with pytest.raises(ValueError, match="muon_lr = 0.1 goes with optimizer = 'adamw'"):
        with_changes(muon, changes[:2])


def test_a_recipe_without_training_takes_no_steps(toy, tmp_path, monkeypatch, capsys) -> None:
    @settings
    class Draws:
        draws: int = 1

    monkeypatch.setattr(TOY, "PRESETS", {"cpu": Draws()})
    assert command.main(["toy", "--steps", "2", "--out", str(tmp_path)]) == 2
    assert "setting training is unknown: the nearest is draws" in capsys.readouterr().err


def test_no_matplotlib_is_no_failure(toy, tmp_path, monkeypatch, capsys) -> None:
    def missing(*_):
        raise ImportError("plots need matplotlib")

    monkeypatch.setattr(TOY, "plot", missing)
    assert command.main(["toy", "--out", str(tmp_path)]) == 0
    assert "no plot: plots need matplotlib" in capsys.readouterr().err


def test_table_cells() -> None:
    text = text_table(["model", "n", "error"], [["a", 10, 0.123456], ["longer", 2, None]])
    assert text.splitlines() == [
        "model    n   error",
        "──────────────────",
        "a       10  0.1235",
        "longer   2       –",
    ]


# The registry


def test_help_shows_what_a_recipe_is(capsys) -> None:
    assert command.main(["p_hop", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--preset" in shown and recipes.load_recipe("p_hop").__doc__ in shown
    assert re.search(r"training\.steps +700 +200000\n", shown)
    assert re.search(r"target +\"every\" +\"last\"\n", shown)
    assert re.search(r"  hops +list +the p that occur\n", shown)
    for name in recipes.RECIPES:
        rows = list(described(type(recipes.load_recipe(name).PRESETS["cpu"])))
        assert rows and all(row.meaning for row in rows), name
    assert command.main(["--help"]) == 0 and "p-hop" not in capsys.readouterr().out
    assert command.main([]) == 2


def test_every_module_is_listed_and_whole() -> None:
    folder = Path(recipes.__file__).parent
    modules = {file.stem for file in folder.glob("*.py") if not file.stem.startswith("_")}
    assert modules == set(recipes.RECIPES)
    for name in recipes.RECIPES:
        recipe = recipes.load_recipe(name)
        sizes = {"cpu"} if name in recipes.EXAMPLES else {"cpu", "paper"}
        assert set(recipe.PRESETS) == sizes
        assert all(hasattr(recipe, part) for part in ("PUBLISHED", "run", "rows", "plot"))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("linear_loop", ["training.steps=20", "training.batch_size=8", "prompts=50"]),
        ("cot_gd", ["training.steps=20", "training.batch_size=8", "prompts=20"]),
        ("gd_conditioning", ["draws=5"]),
    ],
)
def test_paper_presets_of_linear_attention(name, changes, tmp_path) -> None:
    """Those of the other recipes run beside their cpu presets, 20 steps too."""
    found = command.run_recipe(name, tmp_path, preset="paper", changes=changes)["results"]
    header, lines = recipes.load_recipe(name).rows(found)
    assert lines and {len(line) for line in lines} == {len(header)}


def test_the_papers_optimiser() -> None:
    """Saunshi et al. 2025 train with Adafactor, Fan et al. 2024 and Ahn et al. 2023 with AdamW."""
    trained_by = {"p_hop": "adafactor", "addition": "adafactor", "i_gsm": "adafactor",
                  "length_generalization": "adamw", "linear_loop": "adamw"}  # fmt: skip
    for name, optimizer in trained_by.items():
        training = recipes.load_recipe(name).PRESETS["paper"].training
        assert training.optimizer == optimizer and training.muon_lr is None, name


def test_list_imports_no_torch(capsys) -> None:
    code = """
import sys
from relay_fast.recipes.__main__ import main
assert main(["list"]) == 0 and "torch" not in sys.modules
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = out.stdout.strip().splitlines()
    assert [line.split()[0] for line in lines] == list(recipes.RECIPES)


def test_heads_that_do_not_divide_the_width_are_refused_before_a_folder_is_made() -> None:
    checked = []
    for name in recipes.RECIPES:
        own = command.load_recipe(name).PRESETS["cpu"]
        if not hasattr(own, "n_heads"):
            continue
        with pytest.raises(ValueError, match="is not divisible by n_heads = 7"):
            with_changes(own, ["n_heads=7"])
        checked.append(name)
    assert {"drop_in", "fabric", "sft", "looped_lm"} <= {*checked}
