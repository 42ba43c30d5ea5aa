"""Checkpoints: exact resume, atomic writing, and what each error says."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from relay_fast.training.checkpoint import pack_training_state, unpack_training_state
from relay_fast.utils.tensor_files import CheckpointError, load_checkpoint, save_checkpoint
from tests.support.users import as_nobody, open_folder

CONFIG = {"model": {"d_model": 8, "layers": 2}, "lengths": (1, 5)}


class Tied(nn.Module):
    """Dropout uses the generator, the frozen weight has no optimizer state, two are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.again = nn.Linear(8, 4, bias=False)
        self.again.weight = self.down.weight
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.count += 1
        h = nn.functional.dropout(self.up(self.frozen(x)).relu(), 0.3)
        return self.down(h) + self.again(h)


def step(model, optimizer, ema, generator):
    x = torch.randn(5, 4, generator=generator)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    for name, value in ema.items():
        value.lerp_(dict(model.named_parameters())[name].detach(), 0.1)


def make(optimizer_class=torch.optim.AdamW):
    model = Tied()
    optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    return model, optimizer, ema, torch.Generator().manual_seed(3)


def everything(model, optimizer, ema, generator):
    rng = {"data": generator, "torch": torch.default_generator}
    return {"module": model, "optimizer": optimizer, "ema": ema, "generators": rng}


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.Adagrad])
def test_resume_is_exact(tmp_path, optimizer_class):
    run = make(optimizer_class)
    for _ in range(3):
        step(*run)
    path = tmp_path / "state.safetensors"
    save_checkpoint(path, pack_training_state(**everything(*run)), {"config": CONFIG, "step": 3})
    for _ in range(3):
        step(*run)

    other = make(optimizer_class)
    torch.rand(7)
    tensors, metadata = load_checkpoint(path, expect=CONFIG)
    assert metadata["step"] == 3
    unpack_training_state(tensors, **everything(*other), source=path)
    for _ in range(3):
        step(*other)

    ours, theirs = (pack_training_state(**everything(*r)) for r in (run, other))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_parts_are_small_and_replace_each_other_whole(tmp_path) -> None:
    path, other = tmp_path / "run.state.safetensors", tmp_path / "run.safetensors"
    save_checkpoint(other, {"x": torch.zeros(3)}, {})
    tensors = {f"t{k}": torch.randn(100) for k in range(7)}
    for step in (1, 2):
        save_checkpoint(path, tensors, {"step": step, "config": CONFIG}, part_bytes=900)
        files = sorted(file.name for file in tmp_path.iterdir())
        assert len(files) == 5 and other.name in files  # 2 + 2 + 2 + 1 tensors, no older parts
        found, metadata = load_checkpoint(path, expect=CONFIG)
        assert metadata == {"step": step, "config": json.loads(json.dumps(CONFIG))}
        assert all(torch.equal(found[name], value) for name, value in tensors.items())
    lost = next(tmp_path.glob("*-2.safetensors"))
    lost.unlink()
    with pytest.raises(CheckpointError, match=f"there is no checkpoint {lost}"):
        load_checkpoint(path)
    save_checkpoint(path, tensors, {"step": 3})
    assert len(list(tmp_path.iterdir())) == 2


def test_resume_reuses_live_optimizer_state():
    # A captured CUDA graph holds the addresses.
    run = make()
    step(*run)
    packed = {k: v.clone() for k, v in pack_training_state(*run[:2]).items()}
    weight = run[0].up.weight
    addresses = [v.data_ptr() for v in run[1].state[weight].values()]
    step(*run)
    unpack_training_state(packed, *run[:2])
    assert [v.data_ptr() for v in run[1].state[weight].values()] == addresses
    assert torch.equal(run[1].state[weight]["step"], torch.tensor(1.0))


def test_only_the_weights_can_be_taken(tmp_path):
    run = make()
    step(*run)
    save_checkpoint(tmp_path / "a", pack_training_state(**everything(*run)), {})
    model = Tied()
    unpack_training_state(load_checkpoint(tmp_path / "a")[0], model)
    assert torch.equal(model.up.weight, run[0].up.weight)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).view(3, 4).t(),  # not contiguous
        torch.arange(12.0)[3:5],  # a small view of a larger storage
        torch.ones(1).expand(4),  # zero stride
        torch.zeros(0, 3),
        torch.tensor(2.0),
        torch.ones(3, dtype=torch.bfloat16),
        torch.tensor([True, False]),
    ],
)
def test_any_tensor_comes_back(tmp_path, tensor):
    save_checkpoint(tmp_path / "a.safetensors", {"a": tensor, "b": tensor}, {"step": 1})
    tensors, metadata = load_checkpoint(tmp_path / "a.safetensors")
    assert metadata == {"step": 1}
    for name in "ab":
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, {"a": torch.zeros(3)}, {"step": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="cannot be written .No space left on device."):
        save_checkpoint(path, {"a": torch.ones(3)}, {"step": 2})
    assert load_checkpoint(path)[1] == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be written .*check that its folder exists"):
        save_checkpoint(tmp_path / "no" / "a", {"a": torch.zeros(1)}, {})


def test_metadata_must_be_json(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_checkpoint(tmp_path / "a", {}, {"config": object()})


def test_not_found(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*a\.safetensors; .*train"):
        load_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_truncated(tmp_path, keep):
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, {"a": torch.zeros(100)}, {"step": 1})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"a\.safetensors is truncated .*delete it"):
        load_checkpoint(path)


def test_not_safetensors(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"a\.pt is truncated or not a safetensors file"):
        load_checkpoint(path)


@pytest.mark.parametrize("header", [None, {"format": "pt"}, {"relay_fast": "{"}])
def test_not_ours(tmp_path, header):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata=header)
    with pytest.raises(CheckpointError, match=r"a\.safetensors was not written by relay_fast"):
        load_checkpoint(path)


def test_metadata_is_json_in_the_header(tmp_path):
    # Any safetensors reader can show it, without relay_fast.
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, {"a": torch.zeros(1)}, {"config": CONFIG})
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])["__metadata__"]
    assert json.loads(header["relay_fast"])["config"]["model"]["d_model"] == 8


def test_another_config(tmp_path):
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, {}, {"config": CONFIG})
    load_checkpoint(path, expect=CONFIG)
    ours = {"model": {"d_model": 16, "heads": 2}, "lengths": [1, 5]}
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path, expect=ours)
    assert str(error.value).endswith(
        "a.safetensors belongs to another config: model.d_model (16 here, 8 in the file), "
        "model.heads (2 here, absent in the file), model.layers (absent here, 2 in the file); "
        "use the config it was written with, or another checkpoint."
    )


def test_wrong_tensors_change_nothing():
    model, optimizer, ema, generator = run = make()
    step(*run)
    good = {k: v.clone() for k, v in pack_training_state(**everything(*run)).items()}
    before = model.up.weight.detach().clone()

    def refused(change, match):
        tensors = dict(good)
        change(tensors)
        tensors["model.up.weight"] = tensors.get("model.up.weight", before) + 1
        with pytest.raises(CheckpointError, match=match):
            unpack_training_state(tensors, **everything(*run), source="here.safetensors")
        assert torch.equal(model.up.weight, before)

    refused(lambda t: t.pop("model.down.bias"), r"here\.safetensors lacks model\.down\.bias;")
    refused(lambda t: t.update({"model.x": torch.zeros(1)}), "has model.x that is unknown here")
    refused(
        lambda t: t.update({"model.down.bias": torch.zeros(3)}),
        r"has model\.down\.bias of shape \(3,\) where \(4,\) is needed",
    )
    refused(lambda t: t.pop("ema.up.bias"), r"lacks ema\.up\.bias")
    refused(lambda t: t.pop("rng.data"), r"lacks rng\.data")
    refused(
        lambda t: t.update({"optimizer.gone.weight.step": torch.zeros(())}),
        "has optimizer state for gone.weight",
    )
    refused(
        lambda t: [t.pop(k) for k in list(t) if k.startswith("optimizer.")],
        "holds no optimizer state",
    )


def test_an_optimizer_of_another_module():
    with pytest.raises(ValueError, match="a parameter of shape .* that is not the module's"):
        pack_training_state(nn.Linear(1, 1), make()[1])


def test_files_have_the_mode_of_any_new_file():
    with open_folder() as top:
        save_checkpoint(top / "a.safetensors", {"x": torch.zeros(1)}, {})
        (top / "b").touch()
        assert (top / "a.safetensors").stat().st_mode == (top / "b").stat().st_mode
        os.chmod(top / "a.safetensors", 0o000)
        with (
            as_nobody(),
            pytest.raises(CheckpointError, match="cannot be read .Permission"),
        ):
            load_checkpoint(top / "a.safetensors")
