"""Runs whose looped model is fed its rounds as tokens: presets, draws, budgets."""

import warnings

import numpy as np
import pytest

from relay_fast.batch.plan import Plan
from relay_fast.data.streams import BatchFormat, TruthStream, mean_cost
from relay_fast.decoding.chains import generate_looped_chains
from relay_fast.relay.presets import load_preset, override, recipe
from relay_fast.relay.presets.own import resolved
from relay_fast.relay.stages import Context, run_stage
from relay_fast.tasks import FeedbackDraws, TextTask
from relay_fast.training.schedule import Schedule


@pytest.mark.parametrize("preset", ["cpu-arithmetic", "cpu-edit-distance", "cpu-lis"])
def test_a_run_with_feedback(preset: str, tmp_path) -> None:
    """The stages take it from the preset: the aligned looped model has it, the others do not."""
    values = ["model.looped.feedback_noise=0.05"]
    config = override(load_preset(preset), steps=2, batch_size=8, eval_problems=2, values=values)
    context = Context(tmp_path, config, "cpu", "auto")
    (tmp_path / "checkpoints").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # training shows all positions of the longest test problem
        for stage in ("looped_aligned", "evaluate.looped_aligned", "ar_baseline", "chains"):
            result = run_stage(context, stage, lambda progress: None)
        run_stage(context, "ar_relay", lambda progress: None)
    aligned = context.load("looped_aligned").config
    assert (aligned.feedback, aligned.feedback_noise) == ("tokens", 0.05)
    span = {"cpu-arithmetic": 50 + 31, "cpu-edit-distance": 2 * 8 + 5 + 31, "cpu-lis": 0}
    assert aligned.trained_tokens == span[preset]
    assert context.new_model("looped", "answer").config.feedback == "none"
    assert context.load("ar_baseline").config.feedback == "none"
    assert result["trust"]
    paper = Context(tmp_path, load_preset("paper"), "cpu", "auto").new_model("looped")
    assert paper.config.feedback == "none", "the paper's own is untouched"


def test_the_draws_are_the_stage_s_and_the_task_s(tmp_path) -> None:
    config = load_preset("cpu-edit-distance")
    values = ["training.pad_probability=0.2", "training.pad_to=30",
              "tasks.edit_distance.feedback.pad_to=25"]  # fmt: skip
    context = Context(tmp_path, override(config, values=values), "cpu", "auto")
    wanted = FeedbackDraws(0.2, 25, cut=31, cut_probability=0.97, shift=16)
    assert context.draws("looped_aligned") == {"edit_distance": wanted}
    wrong = override(load_preset("cpu-arithmetic"), values=["tasks.arithmetic.feedback.shift=3"])
    with pytest.raises(ValueError, match="'arithmetic' has no rule for shifted numbers"):
        Context(tmp_path, wrong, "cpu", "auto").prove()
    large = override(config, values=["tasks.edit_distance.feedback.shift=50"])
    text = "feedback.shift = 50 can need numbers up to 76, the vocabulary ends at 63: use a smaller"
    with pytest.raises(ValueError, match=text):
        Context(tmp_path, large, "cpu", "auto").prove()


def test_the_latent_loop_is_cut_by_its_stage(tmp_path) -> None:
    values = ["stages.looped_aligned.cut=9", "stages.looped_aligned.cut_probability=1.0"]
    config = override(load_preset("cpu-latent"), steps=1, batch_size=8, values=values)
    context = Context(tmp_path, config, "cpu", "auto")
    (tmp_path / "checkpoints").mkdir()
    seen = []
    original = Plan.__init__

    def recorded(self, lengths, loops, device, positions=None, **more):
        original(self, lengths, loops, device, positions, **more)
        seen.append(None if positions is None else int(np.diff(positions).max()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plan, "__init__", recorded)
        for stage in ("looped_aligned", "looped_vanilla"):
            run_stage(context, stage, lambda progress: None)
    assert max(s for s in seen if s is not None) in range(2, 11) and None in seen
    # With feedback it is what tasks have that say nothing else; LIS shows no distances.
    values = ["stages.looped_aligned.cut=9", "tasks.arithmetic.feedback.cut=5"]
    draws = Context(tmp_path, override(load_preset("cpu-multitask"), values=values), "cpu", "auto")
    found = {name: own.cut for name, own in draws.draws("looped_aligned").items()}
    assert found == {"arithmetic": 5, "edit_distance": 31, "lis": 0}


def test_three_tasks_in_one_model(tmp_path) -> None:
    """Each task has the draws of its own preset, and all are in every batch."""
    config = override(load_preset("cpu-multitask"), steps=2, batch_size=6)
    context = Context(tmp_path, config, "cpu", "auto")
    (tmp_path / "checkpoints").mkdir()
    for task, preset in (
        ("arithmetic", "cpu-arithmetic"),
        ("edit_distance", "cpu-edit-distance"),
        ("lis", "cpu-lis"),
    ):
        own = Context(tmp_path, load_preset(preset), "cpu", "auto")
        assert context.draws("looped_aligned")[task] == own.draws("looped_aligned")[task]
        for key in ("train", "test", "parameters", "hit_matrix"):
            assert context.task_config(task)[key] == own.task_config(task)[key], (task, key)
        assert context.tasks[task].to_dict() == own.tasks[task].to_dict()
    result = run_stage(context, "looped_aligned", lambda progress: None)
    assert set(result["longest_true_problem"]) == {"arithmetic", "edit_distance", "lis"}
    assert context.load("looped_aligned").config.trained_tokens == 50 + 31


def test_token_iterations_are_counted_as_they_come(tmp_path) -> None:
    config = override(load_preset("cpu-arithmetic"), scale=0.02)
    settings, draws = recipe(config, "looped_aligned"), {"arithmetic": FeedbackDraws(0.3, 42)}
    task = Context(tmp_path, config, "cpu", "auto").tasks
    cost = mean_cost(task, {"arithmetic": (1, 8)}, "looped", 22, "uniform", 0.0, draws)
    schedule = Schedule.by_work(settings["token_iterations"], cost)
    form = BatchFormat("looped", feedback=True, draws=draws)
    stream = TruthStream(
        task, {"arithmetic": (1, 8)}, form, schedule, batch_size=22, seed=0, lengths="uniform"
    )
    seen = sum(stream[step].batch.plan.token_iterations for step in range(len(stream)))
    assert abs(seen / settings["token_iterations"] - 1) < 0.1


def test_a_run_that_carries_the_state(tmp_path) -> None:
    values = ["model.feedback=tokens", "model.carry_state=true", "training.truth=0.2"]
    config = override(
        load_preset("cpu-latent"), steps=3, batch_size=8, eval_problems=2, values=values
    )
    context = Context(tmp_path, config, "cpu", "auto")
    (tmp_path / "checkpoints").mkdir()
    for stage in ("looped_aligned", "looped_vanilla", "ar_baseline"):
        run_stage(context, stage, lambda progress: None)
    assert context.load("looped_aligned").config.carry_state
    assert not context.load("looped_vanilla").config.carry_state
    run_stage(context, "evaluate.looped_aligned", lambda progress: None)


def test_a_carried_state_is_trained_with_the_draws_of_its_stage(tmp_path) -> None:
    """Those of the tasks are for iterations that train side by side, and the run says so."""
    values = ["model.looped.carry_state=true", "stages.looped_aligned.pad_probability=0.5",
              "stages.looped_aligned.pad_to=40", "stages.looped_aligned.cut=7"]  # fmt: skip
    config = override(load_preset("cpu-multitask"), values=values)
    context = Context(tmp_path, config, "cpu", "auto")
    assert context.model_config("looped").trained_tokens == 40 + 7
    notes = [note for note in context.notes if "is not used" in note]
    assert [note.split(" is ")[0] for note in notes] == [
        f"note: tasks.{name}.feedback" for name in ("arithmetic", "edit_distance", "lis")
    ]
    assert "with carry_state = true is trained with the padding and the cut of stages.l" in notes[0]
    plain = Context(tmp_path, load_preset("cpu-multitask"), "cpu", "auto")
    assert not any("is not used" in note for note in plain.notes)


def test_settings_that_do_nothing_are_named(tmp_path) -> None:
    def notes(preset: str, *values: str) -> list[str]:
        config = override(load_preset(preset), values=values)
        return Context(tmp_path, config, "cpu", "auto").notes

    noise = "model.looped.feedback_noise=0.1"
    assert notes("cpu-multitask") == [] and notes("cpu-lis", noise) == []
    (note,) = notes("cpu-multitask", noise)
    assert note.startswith("note: feedback_noise does nothing for arithmetic, whose inputs have no")
    # The shortest, `[ARI] 6 + 2 =`, has 5 tokens.
    (note,) = notes("cpu-arithmetic", "tasks.arithmetic.feedback.pad_to=5")
    assert note.startswith("note: no input of arithmetic is padded: pad_to = 5, and the shortest h")
    assert notes("cpu-arithmetic", "tasks.arithmetic.feedback.pad_to=6") == []
    (note,) = notes("cpu", "model.autoregressive.feedback=tokens")
    assert note.startswith(
        "note: model.autoregressive.feedback = 'tokens' does nothing: it is of l"
    )
    (note,) = notes("cpu-latent", "training.truth=0.5")
    assert note.startswith(
        "note: truth = 0.5 of stages.looped_aligned does nothing: it is for a mo"
    )


def test_true_rounds_for_a_model_that_sees_no_others(tmp_path) -> None:
    config = override(load_preset("cpu"), values=["training.truth=0.0"])
    with pytest.raises(
        ValueError, match="truth = 0.0 of stages.looped_aligned is for a model that"
    ):
        Context(tmp_path, config, "cpu", "auto").prove()


def test_numbers_that_a_test_length_is_fed_are_checked_before_training(tmp_path) -> None:
    """The cells of the table stay below 63, its border does not."""
    values = ["tasks.edit_distance.parameters.border=6", "tasks.edit_distance.parameters.insert=1",
              "tasks.edit_distance.feedback.shift=0"]  # fmt: skip
    config = override(load_preset("cpu-edit-distance"), values=values)
    said = "tasks.edit_distance: with rounds fed back, length 13 can need numbers up to 90, the voc"
    with pytest.raises(ValueError, match=said):
        Context(tmp_path, config, "cpu", "auto").prove()
    latent = override(config, values=["model.looped.feedback=none"])
    Context(tmp_path, latent, "cpu", "auto").prove()


class LongRounds(TextTask):
    """Rounds that are longer than the problem, and grow."""

    name = "long"
    shows = "round"

    def sample(self, length, rng):
        bit = str(rng.integers(0, 2))
        return bit, [" ".join([bit] * (30 + k)) for k in range(length)], bit


class AllShown(LongRounds):
    shows = "both"

    def shown(self, problem, rounds):
        return " ".join([problem, *rounds]), ""


@pytest.mark.parametrize(("kind", "trained", "limit"), [(LongRounds, 34, 35), (AllShown, 64, 96)])
def test_a_model_holds_all_that_its_task_shows(kind, trained: int, limit: int, tmp_path) -> None:
    """In problems of 3 rounds when it is trained, of 4 when it is tested. Rounds have 30 to 33
    tokens, an end and a boundary; shown are problem and 2 or 3 of them, between a task token and an
    end."""
    config = load_preset("cpu-lis") | {"tasks": {"long": {"train": [1, 3], "test": [3, 4]}}}
    values = ["vocabulary.max_number=0", "model.d_model=16", "model.n_heads=2", "model.n_layers=1"]
    config = override(config, steps=1, batch_size=4, eval_problems=2, values=values)
    config["tasks"]["long"] |= {"self_lengths": [4], "self_counts": [1], "merge_beyond": [2]}
    context = Context(tmp_path, resolved(config, [kind()]), "cpu", "auto")
    model = context.model_config("looped")
    assert (model.trained_tokens, model.max_tokens) == (trained, limit)
    (tmp_path / "checkpoints").mkdir()
    said = f"longest input has {limit} tokens, the model was trained on up to {trained} "
    with pytest.warns(UserWarning, match=said):
        for stage in ("looped_aligned", "evaluate.looped_aligned", "chains"):
            run_stage(context, stage, lambda progress: None)
    inside = context.tasks["long"].sample([3, 1], 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate_looped_chains(context.load("looped_aligned"), inside, context.tasks)


@pytest.mark.parametrize("value", ["model.feedback=state", "model.feedback_noise=1.0"])
def test_presets_refuse_values_out_of_range(value: str) -> None:
    with pytest.raises(ValueError, match=value.split("=")[0]):
        override(load_preset("cpu"), values=[value])
