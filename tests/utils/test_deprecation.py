"""Old names stay accepted, each with one warning that names the new one."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch

from relay_fast import evaluate, generate
from relay_fast.batch.packed import PackedBatch
from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.decoding import chains, language_model
from relay_fast.models.classifier import LoopedClassifier
from relay_fast.models.transformers import AutoregressiveTransformer, LoopedTransformer
from relay_fast.recipes._common import Training
from relay_fast.relay import evaluation
from relay_fast.relay.presets import load_preset, override
from relay_fast.relay.run_folder import RunFolder, RunFolderError
from relay_fast.tasks import Vocabulary, make_task
from relay_fast.training.schedule import DECAYS, Schedule
from relay_fast.utils.deprecation import current_config, renamed_keywords
from relay_fast.utils.tensor_files import load_checkpoint, save_checkpoint

VOCABULARY = Vocabulary()
TASKS = {"arithmetic": make_task("arithmetic", VOCABULARY)}


def once(call, match: str):
    """The call's value; it must warn exactly once."""
    with pytest.warns(DeprecationWarning, match=match) as found:
        value = call()
    assert len(found) == 1, [str(one.message) for one in found]
    assert found[0].filename == __file__
    return value


@pytest.fixture(autouse=True)
def no_other_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        yield


def model(kind: type, **block):
    torch.manual_seed(0)
    return kind(ModelConfig(BlockConfig(16, 2, 1, **block), VOCABULARY.size, 64)).eval()


def test_old_keywords_of_language_models() -> None:
    torch.manual_seed(0)
    lm = LoopedClassifier(BlockConfig(16, 2, 1, causal=True), 11, loops=6).eval()
    tokens = torch.arange(6).view(2, 3)
    new = language_model.score(lm, tokens, exit_threshold=1e9, min_loops=2)
    assert (new.loops == 2).all()
    for old in ({"exit_below": 1e9, "min_loops": 2}, {"exit_threshold": 1e9, "least_loops": 2}):
        name = next(key for key in old if key in ("exit_below", "least_loops"))
        match = f"^{name} of score\\(\\) is deprecated: use (exit_threshold|min_loops)$"
        found = once(lambda old=old: language_model.score(lm, tokens, **old), match)
        assert np.array_equal(found.loops, new.loops)
        assert np.array_equal(found.losses, new.losses)
    written = once(
        lambda: language_model.generate(lm, [[1, 2]], 4, exit_below=1e9),
        "^exit_below of generate\\(\\) is deprecated: use exit_threshold$",
    )
    assert (written.loops[:, 1:] == 1).all()


def test_old_and_new_keyword_together_are_refused() -> None:
    @renamed_keywords(old="new")
    def function(new: int = 0) -> int:
        return new

    assert function(new=1) == 1
    with pytest.raises(TypeError, match="function\\(\\) got old and new, which are the same"):
        function(old=1, new=1)


def test_old_methods_of_the_models() -> None:
    samples = TASKS["arithmetic"].sample([2, 3], 0)
    looped, batch = model(LoopedTransformer), PackedBatch.looped(samples, TASKS)
    old = once(lambda: looped.read(batch), "LoopedTransformer.read is deprecated: use predict_")
    new = looped.predict_rounds(batch)
    assert all(torch.equal(a, b) for a, b in zip(old[0], new[0], strict=True))
    assert torch.equal(old[1], new[1])
    ar, batch = (
        model(AutoregressiveTransformer, causal=True),
        PackedBatch.autoregressive(samples, TASKS),
    )
    old = once(lambda: ar.forced(batch), "forced is deprecated: use teacher_forced_correct")
    assert torch.equal(old, ar.teacher_forced_correct(batch))


@pytest.mark.parametrize(
    ("kind", "old", "call"),
    [
        (LoopedTransformer, "read", lambda m, s: chains.generate_looped_chains(m, s, TASKS)),
        (
            AutoregressiveTransformer,
            "forced",
            lambda m, s: m.teacher_forced_correct(PackedBatch.autoregressive(s, TASKS)),
        ),
    ],
)
def test_a_subclass_that_overrides_an_old_method_is_not_ignored(kind, old, call) -> None:
    own = type("Own", (kind,), {old: lambda self, batch: None})
    made = model(own, causal=kind is AutoregressiveTransformer)
    with pytest.raises(TypeError, match=f"Own .*\\b{old}\\b.* which would be ignored"):
        call(made, TASKS["arithmetic"].sample([2, 3], 0))


@pytest.mark.parametrize(
    ("old", "name", "new"),
    [
        (generate, "generate_chains", chains.generate_looped_chains),
        (generate, "write_chains", chains.generate_ar_chains),
        (generate, "read_chains", chains.parse_chains),
        (generate, "Scores", chains.ChainLogProbs),
        (evaluate, "mark_looped", evaluation.grade_looped),
    ],
)
def test_old_names_of_functions_are_forwarded(monkeypatch, old, name, new) -> None:
    old.__dict__.pop(name, None)
    match = f"{old.__name__}.{name} is deprecated: use {new.__module__}.{new.__name__}$"
    with pytest.warns(DeprecationWarning, match=match) as found:
        assert getattr(old, name) is new
    assert len(found) == 1
    assert getattr(old, name) is new  # not a second time


def test_the_old_decay_of_a_schedule() -> None:
    assert "late" not in DECAYS
    match = "decay = 'late' is deprecated: use 'wsd'"
    old = once(lambda: Schedule(np.arange(10) / 10, warmup=0.0, decay="late"), match)
    new = Schedule(np.arange(10) / 10, warmup=0.0, decay="wsd")
    assert old.decay == "wsd"
    assert [old.lr_scale(i) for i in range(10)] == [new.lr_scale(i) for i in range(10)]


def test_the_old_decay_of_settings() -> None:
    with pytest.warns(DeprecationWarning, match="use 'wsd'") as found:
        assert Training(steps=1, batch_size=1, lr=0.1, decay="late").decay == "wsd"
    assert len(found) == 1
    with pytest.warns(DeprecationWarning, match="use 'wsd'") as found:
        config = override(load_preset("cpu"), values=["stages.ar_relay.decay=late"])
    assert len(found) == 1 and config["stages"]["ar_relay"]["decay"] == "wsd"
    with pytest.raises(ValueError, match="use one of linear, cosine, wsd, constant"):
        Training(steps=1, batch_size=1, lr=0.1, decay="later")


def test_saved_configs_of_before_belong_to_the_same_run(tmp_path) -> None:
    old = {"stages": {"a": {"decay": "late", "lr": 0.1}}, "texts": ["late"]}
    new = current_config(old)
    assert new == {"stages": {"a": {"decay": "wsd", "lr": 0.1}}, "texts": ["late"]}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(old))
    assert RunFolder(tmp_path / "run", new).config == new
    assert RunFolder.open(tmp_path / "run").config == new
    other = {"stages": {"a": {"decay": "cosine", "lr": 0.1}}, "texts": ["late"]}
    with pytest.raises(RunFolderError, match="stages.a.decay"):
        RunFolder(tmp_path / "run", other)
    save_checkpoint(tmp_path / "state.safetensors", {}, {"config": old})
    load_checkpoint(tmp_path / "state.safetensors", expect=new)
