"""The presets that come with the package, and what `override` and `scale` do to them."""

import math

import pytest

from relay_fast.relay.presets import load_preset, override, preset_names, recipe
from relay_fast.relay.stages import Context
from relay_fast.tasks import TASK_NAMES


def test_presets_are_data_and_whole() -> None:
    assert preset_names() == [
        "cpu",
        "cpu-addition",
        "cpu-arithmetic",
        "cpu-arithmetic-long",
        "cpu-edit-distance",
        "cpu-latent",
        "cpu-lis",
        "cpu-multitask",
        "paper",
        "paper-fast",
    ]
    for name in preset_names():
        config = load_preset(name)
        assert config["name"] == name
        config["tasks"].clear()
        assert load_preset(name)["tasks"]  # fresh each time
        context = Context("nowhere", load_preset(name), "cpu", "auto")
        for task, entry in context.config["tasks"].items():
            context.tasks[task].check_length(context.max_length(task))
            assert entry["train"][1] < context.max_length(task)
            assert len(entry["self_counts"]) == len(entry["self_lengths"]) == 5
            assert min(entry["self_lengths"]) > entry["train"][1]
        for stage in ("looped_aligned", "looped_vanilla", "ar_baseline", "ar_relay", "ar_self"):
            settings = recipe(context.config, stage)
            assert {"lr", "batch_size", "warmup", "decay"} <= set(settings), stage
            assert sum(key in settings for key in ("steps", "epochs", "token_iterations")) == 1


def test_the_paper_preset_says_what_the_paper_does() -> None:
    config = load_preset("paper")
    assert tuple(config["tasks"]) == TASK_NAMES
    ranges = {name: (e["train"], e["test"]) for name, e in config["tasks"].items()}
    assert ranges == {
        "arithmetic": ([1, 15], [15, 25]),
        "edit_distance": ([1, 30], [30, 40]),
        "lis": ([1, 100], [100, 120]),
    }
    model = {"d_model": 256, "n_heads": 4, "n_layers": 3, "dropout": 0.1}
    assert config["model"] == model
    for entry in config["tasks"].values():  # a merged set of 100 k a task, but for rounding
        merged = entry["merge_inside"] + sum(entry["merge_beyond"])
        assert abs(merged - 100_000) <= 100
        assert len(entry["merge_beyond"]) == entry["test"][1] - entry["train"][1]
    stages = ("looped_aligned", "looped_vanilla", "ar_baseline", "ar_relay", "ar_self")
    recipes = {name: recipe(config, name) for name in stages}
    assert [recipes[n]["lr"] for n in stages] == [5e-4, 1e-3, 5e-4, 1e-4, 5e-5]
    assert [recipes[n]["epochs"] for n in stages] == [500, 500, 500, 500, 100]
    assert all(r["batch_size"] == 512 and r["weight_decay"] == 0.01 for r in recipes.values())
    weights = {"arithmetic": 1.0, "edit_distance": 10.0, "lis": 5.0}
    for name in ("looped_vanilla", "ar_baseline", "ar_relay"):
        assert recipes[name]["task_weights"] == weights
    assert "task_weights" not in recipes["looped_aligned"] | recipes["ar_self"]


def test_paper_fast_changes_the_recipe_only() -> None:
    paper, fast = load_preset("paper"), load_preset("paper-fast")
    for task in paper["tasks"].values():  # the controls write a fifth of the chains
        task["self_counts"] = [n // 5 for n in task["self_counts"]]
    for task in fast["tasks"].values():  # what training draws; the problems are the paper's
        task.pop("feedback")
    for part in ("tasks", "vocabulary", "evaluation"):
        assert fast[part] == paper[part]
    assert fast["model"].pop("looped") == {"feedback": "tokens", "loop_norm": "post"}
    assert {**paper["model"], "dropout": 0.0} == fast["model"]  # data that never repeats
    for stage in fast["stages"]:
        settings = recipe(fast, stage)
        # Batches of iterations side by side have no fixed shape that a graph could have.
        assert settings["graph"] == (stage != "looped_aligned") and settings["autocast"] == "bf16"
        assert "dataset_size" not in settings
    context = Context("nowhere", load_preset("paper-fast"), "cpu", "auto")
    longest = context.tasks["arithmetic"].max_problem_tokens(25)
    assert context.model_config("looped").trained_tokens >= longest  # no position is unseen


def test_overrides() -> None:
    config = override(
        load_preset("paper"),
        tasks=["lis", "arithmetic"],
        steps=3,
        batch_size=4,
        eval_problems=5,
        seed=6,
    )
    assert list(config["tasks"]) == ["arithmetic", "lis"]  # in the preset's order
    assert (config["seed"], config["evaluation"]["problems"]) == (6, 5)
    for stage in config["stages"]:
        settings = recipe(config, stage)
        assert (settings["steps"], settings["batch_size"]) == (3, 4)
        assert not {"epochs", "token_iterations"} & set(settings)
    for entry in config["tasks"].values():
        assert entry["merge_inside"] == 12 and set(entry["merge_beyond"]) == {1}
    assert override(load_preset("paper")) == load_preset("paper")
    with pytest.raises(ValueError, match="task '' is not in preset"):
        override(load_preset("paper"), tasks=[])


def test_a_scale_takes_that_share_of_everything_long() -> None:
    whole, part = load_preset("paper-fast"), override(load_preset("paper-fast"), scale=0.01)
    for stage, settings in part["stages"].items():
        assert settings["steps"] == math.ceil(whole["stages"][stage]["steps"] / 100)
    for name, task in part["tasks"].items():
        for key in ("merge_beyond", "self_counts"):
            assert task[key] == [math.ceil(n / 100) for n in whole["tasks"][name][key]]
        assert task["train"] == whole["tasks"][name]["train"]  # the problems stay what they are
    assert part["evaluation"]["problems"] == 10
    assert part["model"] == whole["model"] and part["training"] == whole["training"]
    assert override(load_preset("paper"), scale=0.01)["stages"]["ar_self"]["epochs"] == 1.0
    work = override(load_preset("cpu"), scale=0.01)["stages"]["looped_aligned"]["token_iterations"]
    assert work == pytest.approx(3e4)
    assert override(load_preset("cpu"), scale=1e-9)["stages"]["ar_baseline"]["steps"] == 1


def test_values_of_the_preset_can_be_set() -> None:
    values = ["model.d_model=32", "training.autocast=fp32", "training.graph=false",
              "model.dropout=0", "stages.ar_baseline.lr=2e-3",
              "tasks.lis.test=[100, 101]"]  # fmt: skip
    config = override(load_preset("paper-fast"), values=values)
    assert config["model"]["d_model"] == 32 and config["model"]["dropout"] == 0
    settings = recipe(config, "ar_baseline")
    assert (settings["autocast"], settings["graph"], settings["lr"]) == ("fp32", False, 2e-3)
    assert config["tasks"]["lis"]["test"] == [100, 101]
