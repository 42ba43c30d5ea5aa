"""The search of the recipes with feedback: variants, rows, seeds, plots."""

import csv
import json

import pytest
import torch

from benchmarks import recipe_ablation, recipe_search
from benchmarks.one_iteration import last_rounds_alone
from benchmarks.truncated_loop import TruncatedContext
from relay_fast.relay.presets import load_preset, override, recipe
from relay_fast.relay.stages import Context

LOOPED = "looped_aligned"


@pytest.mark.parametrize("task", recipe_search.PRESETS)
def test_each_variant_is_a_valid_change_of_the_preset(task: str) -> None:
    preset = load_preset(recipe_search.PRESETS[task])
    seen = []
    for name, values in recipe_search.variants(task).items():
        config = override(preset, values=values)
        Context("nowhere", config, "cpu", "auto").prove()
        assert (config in seen) == (name == recipe_search.TRUNCATED), name
        assert (config == preset) == (name == "base"), name
        seen.append(config)
        assert "token_iterations" in config["stages"][LOOPED], name
        # The problems stay what they are: no variant wins by an easier task.
        for key in ("train", "test", "parameters"):
            assert config["tasks"][task][key] == preset["tasks"][task][key], name


def test_lengths_beyond() -> None:
    assert [recipe_search.beyond(n) for n in (8, 15, 20)] == [(10, 11), (18, 20), (24, 27)]
    for task, name in recipe_search.PRESETS.items():
        entry = load_preset(name)["tasks"][task]
        assert recipe_search.beyond(entry["train"][1])[1] <= entry["test"][1]


def test_rows_are_held_and_drawn(tmp_path) -> None:
    path = tmp_path / "rows.csv"
    arguments = [
        "--task",
        "edit_distance",
        "--scale",
        "2e-4",
        "--problems",
        "2",
        "--csv",
        str(path),
    ]
    rows = recipe_ablation.main([*arguments, "--variants", "base,latent", "--seeds", "0,3"])
    assert [(r["variant"], r["seed"]) for r in rows] == [
        ("base", 0), ("latent", 0), ("base", 3), ("latent", 3),
    ]  # fmt: skip
    again = recipe_ablation.main([*arguments, "--variants", "base,no_shift", "--seeds", "3"])
    assert [(r["variant"], r["seed"]) for r in again] == [("no_shift", 3)]
    with path.open(newline="") as file:
        held = list(csv.DictReader(file))
    assert len(held) == 5 and {row["token_iterations"] for row in held} == {"1000"}
    for row in held:
        chains = {int(n): value for n, value in json.loads(row["chains"]).items()}
        assert list(chains) == list(range(1, 12)) and int(row["longest_true_problem"]) <= 8
        inside = [chains[n] for n in range(1, 9)]
        assert float(row["mean_inside"]) == pytest.approx(sum(inside) / 8, abs=0.01)
        assert float(row["least_inside"]) == min(inside)
        assert float(row["longest"]) == chains[8] and float(row["fifth_beyond"]) == chains[10]
        assert float(row["third_beyond"]) == chains[11] and float(row["cpu_seconds"]) >= 0
    assert (tmp_path / "rows_edit_distance.png").stat().st_size > 1000


def test_one_iteration_is_a_control_that_answers(tmp_path) -> None:
    path = tmp_path / "rows.csv"
    arguments = ["--task", "lis", "--scale", "2e-4", "--problems", "4", "--csv", str(path)]
    (row,) = recipe_ablation.main([*arguments, "--variants", "one_iteration"])
    assert row["chains"] == row["mean_inside"] == "" and row["longest_true_problem"] <= 20
    answers = {int(n): value for n, value in json.loads(row["answers"]).items()}
    assert row["answer_longest"] == answers[20] and row["answer_fifth_beyond"] == answers[24]
    assert not path.with_name("rows_lis.png").exists()  # it writes no chains to draw


def test_one_iteration_sees_the_problem_and_the_last_round_alone() -> None:
    task = Context("nowhere", load_preset("cpu-lis"), "cpu", "auto").tasks["lis"]
    samples = task.sample([3, 9, 20], 0)
    once = last_rounds_alone(samples)
    assert once.loops.tolist() == [1, 1, 1] and once.answer.tolist() == samples.answer.tolist()
    for i in range(3):
        assert [r.tolist() for r in once.rounds_of(i)] == [samples.rounds_of(i)[-1].tolist()]
        assert once.problem_of(i).tolist() == samples.problem_of(i).tolist()


def test_a_truncated_loop_has_the_losses_of_the_whole_one_and_gradients_of_one_iteration() -> None:
    preset = load_preset("cpu-lis")
    config = override(preset, values=recipe_search.variants("lis")[recipe_search.TRUNCATED])
    contexts = [kind("nowhere", config, "cpu", "torch") for kind in (Context, TruncatedContext)]
    whole, cut = (context.new_model("looped").double() for context in contexts)
    tasks = contexts[0].tasks
    one, long = (tasks["lis"].sample(lengths, 0) for lengths in ([3, 4, 2], [9, 3, 20, 12]))
    form = contexts[0].form(recipe(config, LOOPED), "looped")
    for samples, same in ((one, True), (long, False)):  # groups of four: one iteration, several
        assert (samples.loops.max() == 1) == same
        batch = form.collate(samples, tasks, None)
        losses = [model.loss(batch) for model in (whole, cut)]
        torch.testing.assert_close(losses[1].loss, losses[0].loss, rtol=1e-12, atol=0)
        gradients = []
        for model, loss in zip((whole, cut), losses, strict=True):
            model.zero_grad()
            loss.loss.backward()
            gradients.append(model.embedding.weight.grad.clone())
        assert torch.allclose(*gradients, rtol=1e-9, atol=1e-12) == same


def test_the_settings_of_a_variant_are_shown(capsys) -> None:
    assert recipe_ablation.main(["--task", "lis", "--variants", "base,adamw", "--show"]) == []
    assert capsys.readouterr().out.splitlines() == [
        "base: --preset cpu-lis",
        "adamw: --preset cpu-lis --set 'stages.looped_aligned.muon_lr=null'",
    ]


def test_an_unknown_variant_is_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        recipe_ablation.main(["--task", "lis", "--variants", "no_cut"])
    assert "variant 'no_cut' is unknown: use some of base" in capsys.readouterr().err
