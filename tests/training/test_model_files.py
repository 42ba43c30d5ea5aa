"""Models come back from disk as they were, and wrong files are named."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from relay_fast.batch.packed import PackedBatch
from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.data.sample_files import load_samples
from relay_fast.models.transformers import AutoregressiveTransformer, LoopedTransformer
from relay_fast.tasks import Vocabulary, build_tasks, make_task
from relay_fast.training.model_files import (
    load_model,
    load_run_model,
    model_path,
    run_tasks,
    save_model,
)
from relay_fast.utils.tensor_files import CheckpointError, load_checkpoint, save_checkpoint


def make_model(kind: str):
    causal = kind == "autoregressive"
    block = BlockConfig(16, 2, 2, causal=causal, bias=True, norm="layer", loop_norm="post")
    config = ModelConfig(block, 48, max_tokens=33)
    if causal:
        return AutoregressiveTransformer(config)
    return LoopedTransformer(config, supervise="answer" if kind == "vanilla" else "chain")


@pytest.mark.parametrize("kind", ["looped", "vanilla", "autoregressive"])
def test_a_model_comes_back(tmp_path, kind):
    model = make_model(kind)
    save_model(tmp_path / "m.safetensors", model, {"seed": 3, "tasks": ["lis"]})
    loaded, info = load_model(tmp_path / "m.safetensors")
    assert info == {"seed": 3, "tasks": ["lis"]}
    assert type(loaded) is type(model) and loaded.config == model.config
    assert not loaded.training
    assert getattr(loaded, "supervise", None) == getattr(model, "supervise", None)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_a_model_in_half_the_size(tmp_path):
    model = make_model("looped")
    for name, dtype in (("whole", None), ("half", torch.bfloat16)):
        save_model(tmp_path / name, model, {}, dtype)
    weights = sum(4 * p.numel() for p in model.parameters())
    sizes = [(tmp_path / name).stat().st_size for name in ("whole", "half")]
    assert sizes[0] - sizes[1] == pytest.approx(weights / 2, rel=0.02)
    loaded, _ = load_model(tmp_path / "half")
    for name, value in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == value.dtype == torch.float32
        assert torch.equal(loaded.state_dict()[name], value.bfloat16().float()), name


def test_a_loaded_model_writes_the_same(tmp_path):
    model = make_model("looped").eval()
    vocabulary, tasks = run_tasks(
        {
            "vocabulary": {"max_number": 6, "multiple": 16},
            "tasks": {"arithmetic": {"parameters": {"prime": 3, "operators": "+"}}},
        }
    )
    assert vocabulary.size == 48
    path = model_path(tmp_path, "looped_aligned")
    save_model(path, model, {})
    loaded = load_run_model(tmp_path, "looped_aligned")
    batch = PackedBatch.looped(tasks["arithmetic"].sample([1, 4, 2], 0), tasks)
    for a, b in zip(model.predict_rounds(batch)[0], loaded.predict_rounds(batch)[0], strict=True):
        assert torch.equal(a, b)


def test_run_tasks_are_those_of_the_config():
    config = {
        "vocabulary": {"max_number": 100, "multiple": 8},
        "tasks": {
            "edit_distance": {"parameters": {"replace": 2, "alphabet": [2, 4]}},
            "lis": {"parameters": {"group": 5, "high": 90}, "train": [1, 5]},
        },
    }
    vocabulary, tasks = run_tasks(config)
    expected = build_tasks(
        ["edit_distance", "lis"],
        vocabulary,
        edit_distance={"replace": 2, "alphabet": (2, 4)},
        lis={"group": 5, "high": 90},
    )
    for name, task in expected.items():
        assert tasks[name].to_dict() == task.to_dict()
        lengths = np.array([3, 4])
        assert np.array_equal(
            tasks[name].sample(lengths, 1).problem, task.sample(lengths, 1).problem
        )


@pytest.mark.parametrize("device", ["foo", "mps", "meta", "cuda:x"])
def test_other_devices_are_refused(tmp_path, device):
    with pytest.raises(ValueError, match=f"device '{device}' is unknown: use cpu or cuda"):
        load_model(tmp_path / "m.safetensors", device)


def test_wrong_files_and_names(tmp_path):
    with pytest.raises(ValueError, match="unknown model 'gpt'; known are looped_aligned"):
        load_run_model(tmp_path, "gpt")
    with pytest.raises(CheckpointError, match="there is no checkpoint .*ar_relay"):
        load_run_model(tmp_path, "ar_relay")
    path = tmp_path / "state.safetensors"
    save_checkpoint(path, {"x": torch.zeros(1)}, {"step": 3})
    with pytest.raises(CheckpointError, match="holds no model \\(its header names no kind\\)"):
        load_model(path)
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        load_model(path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda(tmp_path):
    save_model(tmp_path / "m.safetensors", make_model("looped"), {})
    with pytest.raises(ValueError, match="CUDA is not available: use cpu"):
        load_model(tmp_path / "m.safetensors", device="cuda")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["config"]["block"].update(new_one=1), "model option 'new_one' is unknown"),
        (lambda m: m["config"].update(newer=1), "model option 'newer' is unknown"),
        (
            lambda m: m["config"]["block"].pop("d_model"),
            "the block's config has no 'd_model': add it",
        ),
        (lambda m: m["config"]["block"].update(d_model="wide"), "cannot build"),
        (lambda m: m["config"]["block"].update(norm="newer"), "norm = 'newer' is unknown"),
        (lambda m: m.pop("config"), "no 'config'"),
        (lambda m: m.update(config=[]), "cannot build"),
        (lambda m: m.pop("supervise"), "no 'supervise'"),
        (lambda m: m.update(supervise="later"), "'later'"),
    ],
)
def test_a_model_of_another_version(tmp_path, change, message):
    path = tmp_path / "m.safetensors"
    save_model(path, make_model("looped"), {})
    tensors, metadata = load_checkpoint(path)
    change(metadata)
    save_checkpoint(path, tensors, metadata)
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    text = str(caught.value)
    assert text.startswith(f"{path} holds a model of another version of relay_fast")
    assert "\n" not in text
    assert message in text and text.endswith("use that version, or train the model again.")


def test_samples_of_another_version(tmp_path):
    path = tmp_path / "s.safetensors"
    save_checkpoint(path, {"newer": torch.zeros(3)}, {"kind": "samples"})
    with pytest.raises(CheckpointError, match=r"another version .* \('answer'\); use that version"):
        load_samples(path)


def test_parameters_of_tasks_are_of_their_kind():
    vocabulary = Vocabulary(60, 1)
    for name, params, message in [
        ("arithmetic", {"prime": "7"}, "tasks.arithmetic.parameters.prime = '7': give a whole"),
        ("arithmetic", {"operators": ["+"]}, r"parameters.operators = \['\+'\]: give a text"),
        ("lis", {"group": 2.5}, "tasks.lis.parameters.group = 2.5: give a whole number"),
        ("lis", {"group": True}, "tasks.lis.parameters.group = True: give a whole number"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_task(name, vocabulary, **params)
    assert make_task("arithmetic", vocabulary, prime=np.int64(7)).prime == 7
