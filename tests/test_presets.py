"""`relay_fast.presets.override`: values are checked before a run begins."""

import pytest

from relay_fast.presets import load_preset, override, preset_names, recipe


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("training.batch_size=0", "training.batch_size = 0: give at least 1"),
        ("training.clip=-1", "training.clip = -1: give a positive number"),
        ("training.lr=nan", "training.lr = nan: give a positive number"),
        ("training.lr=0", "training.lr = 0: give a positive number"),
        ("stages.ar_relay.muon_lr=-0.1", "stages.ar_relay.muon_lr = -0.1: give a positive"),
        ("stages.looped_aligned.token_iterations=inf", "token_iterations = inf: give a positive"),
        ("stages.ar_self.steps=0", "stages.ar_self.steps = 0: give at least 1"),
        ("training.warmup=7", "training.warmup = 7: give 0 to 1"),
        ("training.betas=[0.9, 1]", "training.betas = [0.9, 1]: give at least 0 and less than 1"),
        ("training.betas=[0.9]", "training.betas = [0.9]: give two numbers, like [0.9, 0.95]"),
        ("training.ema=2", "training.ema = 2: give at least 0 and less than 1"),
        ("training.autocast=fp8", "training.autocast = 'fp8' is unknown: use one of fp32, bf16"),
        ("stages.ar_self.decay=cosin", "decay = 'cosin' is unknown: use one of linear, cosine"),
        ("training.recompute=half", "recompute policy 'half' is unknown: use 'none', 'state'"),
        ("workers=0", "workers = 0: give at least 1"),
        ("data_workers=-1", "data_workers = -1: give at least 0"),
        ("seed=-1", "seed = -1: give at least 0"),
        ("evaluation.problems=0", "evaluation.problems = 0: give at least 1"),
        ("tasks.arithmetic.train=[1]", "train = [1]: give the shortest and the longest length"),
        ('tasks.arithmetic.train=["a", "b"]', "train is [1, 10], give a list of int"),
        ("tasks.arithmetic.train=[1.5, 2]", "train is [1, 10], give a list of int"),
        ("tasks.arithmetic.train=[0, 5]", "tasks.arithmetic.train = [0, 5]: give at least 1"),
        ("tasks.arithmetic.test=[5, 2]", "test = [5, 2]: give the shortest and the longest length"),
        ("tasks.arithmetic.hit_matrix=[16]", "hit_matrix = [16]: give lengths up to 15, the lon"),
        ("stages.ar_self.weighting=token", "weighting = 'token' is unknown: use one of sequence"),
        ("tasks.arithmetic.merge_beyond=[]", "merge_beyond = []: give at least one number"),
        ("tasks.arithmetic.merge_beyond=[0]", "merge_beyond = [0]: give at least 1"),
        ("tasks.arithmetic.self_counts=[4]", "self_counts = [4]: give one of each for every phase"),
        ("name=foo", "'name=foo': the name is the preset's own: choose another with --preset"),
        ("model={}", "'model={}': model holds d_model, n_heads"),
        ("stages.ar_relay.recompute=none", "sets nothing that preset 'cpu' holds"),
        # All stages have one of their own.
        ("training.muon_lr=0.1", "'training.muon_lr=0.1' sets nothing that preset 'cpu' holds"),
        ("training.batch_tokens=big", "training.batch_tokens is 4096, give another int"),
    ],
)
def test_bad_values_get_one_sentence(value, message) -> None:
    with pytest.raises(ValueError) as caught:
        override(load_preset("cpu"), values=[value], steps=2)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", preset_names())
def test_presets_pass(name) -> None:
    assert override(load_preset(name)) == load_preset(name)


def test_what_a_preset_leaves_out_can_be_set() -> None:
    values = ["training.recompute=state", "training.ema=0.99", "stages.ar_relay.graph=true",
              "stages.ar_relay.ema=0.9", "training.clip=2"]  # fmt: skip
    config = override(load_preset("cpu"), values=values)
    assert config["training"]["recompute"] == "state" and config["training"]["clip"] == 2
    assert recipe(config, "ar_baseline")["ema"] == 0.99
    assert recipe(config, "ar_relay")["ema"] == 0.9 and recipe(config, "ar_relay")["graph"] is True


def test_a_test_below_the_training_range() -> None:
    values = ["tasks.arithmetic.train=[5, 10]", "tasks.arithmetic.test=[3, 4]"]
    with pytest.raises(ValueError, match=r"test = \[3, 4\] ends below train = \[5, 10\]: test up"):
        override(load_preset("cpu"), values=values)


def test_only_the_chosen_tasks_are_checked() -> None:
    values = [f"tasks.lis.{key}=[7]" for key in ("self_lengths", "self_counts")]
    config = override(load_preset("paper"), tasks=["lis"], values=values)
    assert config["tasks"]["lis"]["self_counts"] == [7]
    with pytest.raises(ValueError, match=r"as many in all tasks"):
        override(load_preset("paper"), values=values)
