"""`relay_fast.relay.presets.override`: values are checked before a run begins."""

from dataclasses import fields
from pathlib import Path

import pytest

from relay_fast.config import BlockConfig
from relay_fast.relay.presets import load_preset, override, preset_names, recipe
from relay_fast.relay.presets.own import resolved
from relay_fast.relay.presets.schema import RunConfig, SavedRun
from relay_fast.relay.stages import Context
from relay_fast.utils.settings import check, described


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
        ("training.batch_size=2147483648", "= 2147483648: give at most 2147483647"),
        (
            "tasks.arithmetic.train=[1, 10000000000]",
            "train = [1, 10000000000]: give at most 1000000",
        ),
        ("vocabulary.max_number=1000001", "max_number = 1000001: give at most 1000000"),
        ("data_workers=-1", "data_workers = -1: give at least 0"),
        ("seed=-1", "seed = -1: give at least 0"),
        ("evaluation.problems=0", "evaluation.problems = 0: give at least 1"),
        ("tasks.arithmetic.train=[1]", "train = [1]: give the shortest and the longest length"),
        ('tasks.arithmetic.train=["a", "b"]', "train = ['a', 'b']: give a whole number, at"),
        ("tasks.arithmetic.train=[1.5, 2]", "train = [1.5, 2]: give a whole number, at le"),
        ("tasks.arithmetic.train=[0, 5]", "tasks.arithmetic.train = [0, 5]: give at least 1"),
        ("tasks.arithmetic.test=[5, 2]", "test = [5, 2]: give the shortest and the longest length"),
        ("tasks.arithmetic.hit_matrix=[16]", "hit_matrix = [16]: give lengths up to 13, the lon"),
        ("stages.ar_self.weighting=token", "weighting = 'token' is unknown: use one of sequence"),
        ("tasks.arithmetic.merge_beyond=[]", "merge_beyond = []: give at least one number"),
        ("tasks.arithmetic.merge_beyond=[0]", "merge_beyond = [0]: give at least 1"),
        ("tasks.arithmetic.self_counts=[4]", "self_counts = [4]: give one of each for every phase"),
        ("name=foo", "'name=foo': the name is the preset's own: choose another with --preset"),
        ("model={}", "'model={}': model is a table: set one of its keys, like model.d_model="),
        ("stages.ar_relay.recompute=none", "recompute is unknown: the nearest is training.recomp"),
        # All stages have one of their own.
        ("training.muon_lr=0.1", "'training.muon_lr=0.1' sets nothing that preset 'cpu' holds"),
        ("training.batch_tokens=big", "training.batch_tokens = 'big': give a whole number, at"),
        # What is unknown, with the nearest there is.
        ("modle.d_model=3", "setting modle is unknown: the nearest is model"),
        ("model.d_modle=3", "setting model.d_modle is unknown: the nearest is model.d_model"),
        ("d_model=3", "setting d_model is unknown: the nearest is model.d_model"),
        ("stages.ar_rely.lr=1", "stages.ar_rely is unknown: the nearest is stages.ar_relay"),
        ("tasks.aritmetic.train=[1, 2]", "tasks.aritmetic is unknown: the nearest is tasks.arit"),
        ("seed.x=3", "'seed.x=3': seed has no parts: write it without a dot"),
        ("model.norm=\udcff", r"'model.norm=\udcff' is not text: write KEY=VALUE"),
        ("training.lr", "'training.lr' sets nothing: write KEY=VALUE, like"),
        # Another kind of value.
        ("workers=true", "workers = True: give a whole number, at least 1"),
        ("training.graph=1", "training.graph = 1: give true or false"),
        ("training.lr=null", "training.lr = None: give a positive number"),
        ("model.activation=tanh", "activation = 'tanh' is unknown: use one of gelu_tanh, gelu"),
        ("seed=99999999999999999999", "seed = 99999999999999999999: give at least 0 and less"),
        ("stages.ar_self.decay=2026-01-01", "decay = '2026-01-01' is unknown: use one of linear"),
        ("stages.ar_self.task_weights={lis=-1}", "task_weights.lis = -1: give a number"),
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


def test_a_stage_takes_another_kind_of_length() -> None:
    config = override(load_preset("cpu"), values=["stages.ar_relay.epochs=3"])
    assert config["stages"]["ar_relay"] == {
        "epochs": 3, "muon_lr": 0.005, "decay": "linear"
    }  # fmt: skip
    config["stages"]["ar_self"]["epochs"] = 3
    with pytest.raises(ValueError, match=r"stages.ar_self: a stage's length .* steps and epochs"):
        override(config)


def test_whole_configs_are_checked() -> None:
    """As a file would hold them: an unknown table, a missing one, a task's missing key."""
    for key, value, message in [
        ("tools", {"x": 1}, "table tools is unknown: the nearest is tasks"),
        ("stages", {}, "stages.looped_aligned is missing: give it a value"),
        ("model", 3, "model = 3: give a table of settings"),
        ("tasks", {"new": {}}, "tasks.new.train is missing: give it a value"),
        # Before what is missing: it may be that, misspelt.
        ("tasks", {"new": {"trian": [1, 2]}}, "setting tasks.new.trian is unknown: the nearest is "
         "tasks.new.train"),
    ]:  # fmt: skip
        with pytest.raises(ValueError) as caught:
            check(RunConfig, {**load_preset("cpu"), key: value})
        assert str(caught.value) == message


@pytest.mark.parametrize("checked", [override, resolved])
@pytest.mark.parametrize("key", ["stages", "tasks"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "KEY = 3: give a table of settings"),
        ([], r"KEY = \[\]: give a table of settings"),
        ({"ar_self": 3}, "KEY.ar_self = 3: give a table of settings|looped_aligned is missing"),
        (None, "KEY is missing: give it a value"),
    ],
)
def test_tables_of_another_shape_are_named(checked, key, value, message) -> None:
    config = load_preset("cpu")
    del config[key]
    if value is not None:
        config[key] = value
    with pytest.raises(ValueError, match=message.replace("KEY", key)):
        checked(config)


def test_a_task_of_any_name_fits_the_schema() -> None:
    config = load_preset("cpu")
    config["tasks"] = {"mine": {**config["tasks"]["arithmetic"], "parameters": {"size": [1, {}]}}}
    assert override(config) == config


def test_files_of_other_versions_are_read() -> None:
    newer = {**load_preset("cpu"), "new": 1, "training": {"newer": 2}}
    assert check(SavedRun, newer, others=True).tasks["arithmetic"].train == (1, 8)
    older = {key: newer[key] for key in ("vocabulary", "tasks")}
    check(SavedRun, older, others=True)


def test_every_setting_is_described() -> None:
    rows = list(described(RunConfig))
    assert all(row.meaning for row in rows)
    keys = {row.key for row in rows}
    assert {"seed", "model.d_model", "model.NAME.loop_norm", "stages.NAME.muon_lr"} <= keys
    assert {"tasks.NAME.hit_matrix", "training.recompute", "vocabulary.multiple"} <= keys
    sizes = {field.name for field in fields(BlockConfig)} - {"causal"}
    assert {key.removeprefix("model.") for key in keys if key.count(".") == 1} >= sizes


def test_options_of_a_block_can_be_set() -> None:
    values = [
        "model.head_dim=8", "model.qk_norm=true", "model.looped.sandwich_norm=true",
        "model.bias=['qkv']", "model.rotary_share=0.5",
        "model.rope_frequencies={rope_type='linear', factor=2.0}",
    ]  # fmt: skip
    context = Context(Path("nowhere"), override(load_preset("cpu"), values=values), "cpu", "auto")
    for kind in ("looped", "autoregressive"):
        block = context.model_config(kind).block
        assert (block.head_dim, block.qk_norm, block.bias) == (8, True, ("qkv",))
        assert block.rope_frequencies == pytest.approx((0.5, 0.5 * block.rope_base**-0.5))
        assert block.sandwich_norm == (kind == "looped")
    listed = override(load_preset("cpu"), values=["model.rope_frequencies=[1.0, 0.5]"])
    assert listed["model"]["rope_frequencies"] == [1.0, 0.5]
    for value, message in (
        ("bias=['q']", "model.bias: 'q' has no bias: give parts of"),
        ("bias=1", "model.bias = 1: give true or false"),
        ("rope_frequencies=3", "model.rope_frequencies = 3: give a list"),
        ("rotary_share=2.0", "model.rotary_share = 2.0: give 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            override(load_preset("cpu"), values=[f"model.{value}"])


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
