"""The optimiser, and training: the loss falls, and an interruption changes nothing."""

import math
import os
import pickle
import re
import signal
import time

import pytest
import torch
from torch import nn

from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.data.streams import BatchFormat, TruthStream
from relay_fast.models.transformers import AutoregressiveTransformer, LoopedTransformer
from relay_fast.tasks import Vocabulary, build_tasks
from relay_fast.training.checkpoint import pack_training_state, unpack_training_state
from relay_fast.training.optim import MuonAdamW, make_optimizer, orthogonalize, set_lr_scale
from relay_fast.training.schedule import Schedule
from relay_fast.training.trainer import Trained, _Training, train_model
from relay_fast.utils.errors import Diverged
from relay_fast.utils.tensor_files import CheckpointError, load_checkpoint, save_checkpoint

VOCABULARY = Vocabulary(max_number=2, multiple=4)
TASKS = build_tasks(["arithmetic"], VOCABULARY, arithmetic={"prime": 3, "operators": "+"})
RECIPE = {"lr": 3e-3, "muon_lr": 0.02, "weight_decay": 0.01, "betas": [0.9, 0.95], "clip": 1.0}


def make_model(kind="looped", **options):
    torch.manual_seed(1)
    block = {"d_model": 16, "n_heads": 2, "n_layers": 1, "causal": kind == "autoregressive"}
    config = ModelConfig(BlockConfig(**block | options), VOCABULARY.size, 64)
    return (LoopedTransformer if kind == "looped" else AutoregressiveTransformer)(config)


def make_stream(steps, kind="looped", longest=2, batch_size=8, **options) -> TruthStream:
    ranges, form = {"arithmetic": (1, longest)}, BatchFormat(kind)
    schedule = Schedule.by_steps(steps, **options)
    return TruthStream(TASKS, ranges, form, schedule, batch_size=batch_size, seed=0)


# The optimiser


@pytest.mark.parametrize("shape", [(8, 8), (16, 64), (64, 16), (3, 16, 32)])
def test_orthogonalize(shape) -> None:
    made = orthogonalize(torch.randn(shape))
    assert made.shape == shape
    values = torch.linalg.svdvals(made.double())
    assert shape == (8, 8) or 0.5 < float(values.min())  # a square one may have tiny ones
    assert float(values.max()) < 1.5
    assert float(values.mean()) > 0.6
    assert not orthogonalize(torch.zeros(4, 4)).isnan().any()


def test_orthogonalize_keeps_the_directions() -> None:
    u, _, v = torch.linalg.svd(torch.randn(8, 16), full_matrices=False)
    made = orthogonalize(u @ torch.diag(torch.linspace(1, 2, 8)) @ v)
    inside = u.T @ made @ v.T
    assert float((inside - inside.diag().diag()).abs().max()) < 1e-4
    assert 0.5 < float(inside.diag().min()) and float(inside.diag().max()) < 1.5


def test_stacked_parts_are_stepped_one_by_one() -> None:
    torch.manual_seed(0)
    start, grads = torch.randn(24, 8), [torch.randn(24, 8) for _ in range(3)]
    whole = nn.Parameter(start.clone())
    parts = [nn.Parameter(p.clone()) for p in start.split(8)]
    options = {"muon": True, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    together = MuonAdamW([{"params": [whole], "parts": 3, **options}], lr=1.0)
    apart = MuonAdamW([{"params": parts, "parts": 1, **options}], lr=1.0)
    for g in grads:
        whole.grad = g.clone()
        for p, piece in zip(parts, g.split(8), strict=True):
            p.grad = piece.clone()
        together.step()
        apart.step()
    assert torch.allclose(whole, torch.cat(list(parts)), atol=1e-6)
    momentum = together.state[whole]["momentum"]
    expected = sum(0.1 * 0.9 ** (2 - i) * g for i, g in enumerate(grads))
    assert torch.allclose(momentum, expected, atol=1e-6)


@pytest.mark.parametrize("muon_lr", [None, 0.02])
def test_groups(muon_lr) -> None:
    model = make_model(max_loops=4, bias=True, injection="concat")
    optimizer = make_optimizer(model, lr=1e-3, weight_decay=0.3, muon_lr=muon_lr)
    names = {id(p): name for name, p in model.named_parameters()}
    where = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    assert len(where) == sum(len(group["params"]) for group in optimizer.param_groups)
    assert set(where) == set(names.values())  # each parameter once
    for name, group in where.items():
        plain = "norm" in name or "embedding" in name or name.endswith("bias")
        assert group["weight_decay"] == (0.0 if plain else 0.3), name
        matrix = ".layers." in name and name.endswith("weight") and "norm" not in name
        assert group.get("muon", False) == (matrix and muon_lr is not None), name
        assert group.get("parts", 1) == (3 if group.get("muon") and "qkv" in name else 1), name
    set_lr_scale(optimizer, 0.5)
    for group in optimizer.param_groups:
        assert group["lr"] == 0.5 * group["base_lr"]
        assert group["base_lr"] == (muon_lr if group.get("muon") else 1e-3)
    set_lr_scale(optimizer, 1.0)
    assert optimizer.param_groups[0]["lr"] == 1e-3  # of the base, not of the last


def test_muon_takes_its_learning_rate_from_a_tensor_without_reading_it() -> None:
    steps = []
    for on_device in (False, True):
        model = make_model()
        optimizer = make_optimizer(model, lr=1e-2, muon_lr=0.02)
        for group in optimizer.param_groups:
            if on_device and group.get("muon"):
                group["lr"] = torch.tensor(group["lr"])
        for p in model.parameters():
            p.grad = torch.sin(torch.arange(p.numel()).view_as(p))
        set_lr_scale(optimizer, 0.5)
        optimizer.step()
        steps.append({name: p.detach() for name, p in model.named_parameters()})
    for name, value in steps[0].items():
        assert torch.allclose(value, steps[1][name], rtol=1e-6, atol=1e-7), name

    model = make_model().to("meta")  # where reading anything back fails
    optimizer = make_optimizer(model, lr=1e-2, muon_lr=0.02)
    muon = [group for group in optimizer.param_groups if group.get("muon")]
    assert len(muon) == 2
    for group in muon:
        group["lr"] = torch.tensor(group["lr"], device="meta")
        for p in group["params"]:
            p.grad = torch.empty_like(p)
        optimizer._muon_step(group["params"], group)


def test_optimizer_state_survives_packing() -> None:
    def step(model, optimizer, batch):
        optimizer.zero_grad()
        model.loss(batch).loss.backward()
        optimizer.step()

    stream = make_stream(5)
    runs = []
    for resumed in (False, True):
        model = make_model()
        optimizer = make_optimizer(model, lr=1e-3, muon_lr=0.02)
        for i in range(5):
            if resumed and i == 3:
                packed = {k: v.clone() for k, v in pack_training_state(model, optimizer).items()}
                assert any(name.endswith("qkv.weight.momentum") for name in packed)
                model = make_model()
                optimizer = make_optimizer(model, lr=1e-3, muon_lr=0.02)
                unpack_training_state(packed, model, optimizer)
            step(model, optimizer, stream[i].batch)
        runs.append(pack_training_state(model, optimizer))
    assert runs[0].keys() == runs[1].keys()
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


# Training


@pytest.mark.parametrize("kind", ["looped", "autoregressive"])
@pytest.mark.parametrize("muon_lr", [None, 0.02])
def test_the_loss_falls(tmp_path, kind, muon_lr) -> None:
    stream = make_stream(60, kind, batch_size=32)
    seen = []
    recipe, state = RECIPE | {"muon_lr": muon_lr}, tmp_path / "state.safetensors"
    trained = train_model(make_model(kind), stream, recipe, state, seed=0, on_progress=seen.append)
    first, last = trained.history[0], trained.history[-1]
    assert (first["step"], last["step"]) == (1, 60) == (seen[0].step, seen[-1].step)
    assert last["loss"] < 0.6 * first["loss"]
    assert last["chain_accuracy"] > first["chain_accuracy"]
    assert trained.longest_true == {"arithmetic": 2} and trained.seconds > 0
    assert seen[-1].steps == 60 and seen[-1].samples_per_s > 0
    assert seen[-1].loss == last["loss"]
    assert [e["seconds"] for e in trained.history] == sorted(e["seconds"] for e in trained.history)
    assert last["seconds"] == pytest.approx(trained.seconds, abs=1e-3)
    assert trained.samples == 60 * 32 and 0 < trained.data_wait_seconds < trained.seconds
    assert trained.cuda_graph == "not asked for"


def run(path, *, stop_at=None, ema=None, dropout=0.1, how="raise", monkeypatch=None, **options):
    """Parameters after training, interrupted at a step or not; None if interrupted."""
    model = make_model(dropout=dropout)

    def report(progress):
        if progress.step == stop_at:
            if how == "raise":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGINT)

    recipe = RECIPE | ({"ema": ema} if ema else {}) | options
    try:
        trained = train_model(model, make_stream(8), recipe, path, seed=5, on_progress=report)
    except KeyboardInterrupt:
        return None
    return {name: p.detach().clone() for name, p in model.named_parameters()}, trained


@pytest.mark.parametrize("how", ["raise", "signal"])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_interrupted_and_continued_is_bitwise_the_same(tmp_path, monkeypatch, ema, how) -> None:
    monkeypatch.setattr("relay_fast.training.trainer.LOG_EVERY", 0.0)
    whole, trained = run(tmp_path / "whole.safetensors", ema=ema)
    path = tmp_path / "parts.safetensors"
    for stop_at in (3, 4, 7):
        assert run(path, ema=ema, stop_at=stop_at, how=how) is None
        assert load_checkpoint(path)[1]["step"] == stop_at
    torch.rand(5)  # whatever else uses the global generator
    parts, continued = run(path, ema=ema)
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name
    assert [h["step"] for h in trained.history] == list(range(1, 9))
    strip = lambda history: {h["step"]: h["loss"] for h in history}
    assert strip(continued.history).items() <= strip(trained.history).items()
    assert continued.longest_true == trained.longest_true
    assert continued.samples == trained.samples == 64
    times = [h["seconds"] for h in continued.history]
    assert times == sorted(times)  # counted on, not anew
    assert times[-1] == pytest.approx(continued.seconds, abs=1e-3)
    other, _ = run(tmp_path / "other.safetensors", ema=ema, lr=1e-3)
    assert any(not torch.equal(value, other[name]) for name, value in whole.items())


def test_a_state_that_counts_neither_samples_nor_waiting_continues(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("relay_fast.training.trainer.LOG_EVERY", 0.0)
    path = tmp_path / "state.safetensors"
    assert run(path, stop_at=3) is None
    tensors, metadata = load_checkpoint(path)
    for name in ("samples", "data_wait_seconds", "parts"):
        metadata.pop(name, None)
    metadata["history"] = [{"step": h["step"], "loss": h["loss"]} for h in metadata["history"]]
    save_checkpoint(path, tensors, metadata)
    _, trained = run(path)
    assert trained.samples == 5 * 8 and trained.history[-1]["step"] == 8
    assert len(type(trained).of_phases([trained]).history) == 8


def test_the_waiting_of_a_state_under_its_old_name_counts_on(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("relay_fast.training.trainer.LOG_EVERY", 0.0)
    path = tmp_path / "state.safetensors"
    assert run(path, stop_at=3) is None
    tensors, metadata = load_checkpoint(path)
    metadata["waited"] = metadata.pop("data_wait_seconds") + 1000
    save_checkpoint(path, tensors, metadata)
    _, trained = run(path)
    assert 1000 < trained.data_wait_seconds < 1000 + trained.seconds


def test_processor_time_counts_on(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("relay_fast.training.trainer.LOG_EVERY", 0.0)
    path = tmp_path / "state.safetensors"
    assert run(path, stop_at=3) is None
    tensors, metadata = load_checkpoint(path)
    assert 0 < metadata["cpu_seconds"]
    save_checkpoint(path, tensors, {**metadata, "cpu_seconds": 1000.0})
    before = time.process_time()
    _, trained = run(path)
    assert 1000 < trained.cpu_seconds <= 1000 + time.process_time() - before
    assert trained.record()["cpu_seconds"] == round(trained.cpu_seconds, 2)


def test_what_phases_took_together() -> None:
    entry = lambda step, seconds: {"step": step, "seconds": seconds, "loss": 1.0}
    first = Trained([entry(1, 0.5), entry(2, 1.0)], {"lis": 4}, 1.0, 20, 0.25, "not asked for", 2.0)
    second = Trained([entry(1, 0.5)], {"lis": 3, "arithmetic": 2}, 3.0, 20, 0.75, "replayed", 1.5)
    whole = Trained.of_phases([first, second])
    assert [(e["step"], e["seconds"]) for e in whole.history] == [(1, 0.5), (2, 1.0), (1, 1.5)]
    assert whole.longest_true == {"lis": 4, "arithmetic": 2}
    assert whole.record() == {
        "seconds": 4.0, "cpu_seconds": 3.5, "samples": 40, "samples_per_s": 10.0,
        "data_wait_share": 0.25, "cuda_graph": "replayed",
    }  # fmt: skip


def test_an_interrupt_in_the_middle_of_a_step_waits_for_its_end(tmp_path, monkeypatch) -> None:
    whole, _ = run(tmp_path / "whole.safetensors")
    step, path = MuonAdamW.step, tmp_path / "parts.safetensors"

    def pressed(self, closure=None):
        os.kill(os.getpid(), signal.SIGINT)
        return step(self, closure)

    monkeypatch.setattr(MuonAdamW, "step", pressed)
    for done in (1, 2):
        assert run(path) is None
        assert load_checkpoint(path)[1]["step"] == done
    monkeypatch.undo()
    parts, _ = run(path)
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def poisoned(at: int):
    """A hook that makes a weight NaN before a step."""

    def before_step(step, optimizer):
        if step == at:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0][0, 0] = math.nan

    return before_step


@pytest.mark.parametrize("seen", ["in the loss", "while saving", "at Ctrl-C", "in the end"])
def test_what_diverges_stops_and_keeps_the_last_good_state(tmp_path, monkeypatch, seen) -> None:
    monkeypatch.setattr(
        "relay_fast.training.trainer.LOG_EVERY", 0.0 if seen == "in the loss" else 1e9
    )
    monkeypatch.setattr("relay_fast.training.trainer.SAVE_EVERY", 0.0)
    path, at = tmp_path / "toy.state.safetensors", 7 if seen == "in the end" else 5
    assert run(path, stop_at=1) is None
    good, last = [], {}
    hook = poisoned(at)

    def before_step(step, optimizer):
        hook(step, optimizer)
        good.append(load_checkpoint(path)[1]["step"])
        last["bytes"] = path.read_bytes()
        if seen == "at Ctrl-C" and step == at:
            monkeypatch.setattr("relay_fast.training.trainer.SAVE_EVERY", 1e9)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Diverged) as caught:
        train_model(
            make_model(dropout=0.1), make_stream(8), RECIPE, path, seed=5, before_step=before_step
        )
    text = str(caught.value)
    what = r"the loss is nan" if seen in ("in the loss", "in the end") else r"model\.\S+ holds NaN"
    assert re.match(rf"the training of toy diverged: {what}.* at step {at + 1} \(last seen", text)
    assert "give a smaller lr" in text and "\n" not in text
    assert path.read_bytes() == last["bytes"] and load_checkpoint(path)[1]["step"] == at == good[-1]
    history = caught.value.history
    assert (history[-1]["loss"] is None) == (seen in ("in the loss", "in the end"))
    assert pickle.loads(pickle.dumps(caught.value)).history == history
    whole, _ = run(tmp_path / "whole.safetensors")
    again, _ = run(path)  # what was kept goes on as if nothing had been
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_mask_may_be_infinite(tmp_path) -> None:
    model = make_model()
    model.register_buffer("mask", torch.full((2, 2), -math.inf).triu(1))
    assert train_model(model, make_stream(2), RECIPE, tmp_path / "x.safetensors", seed=0).samples


def test_a_state_goes_on_on_another_kind_of_device(tmp_path, monkeypatch) -> None:
    path = tmp_path / "state.safetensors"
    assert run(path, stop_at=1) is None
    training = _Training(make_model(dropout=0.1), make_stream(8), RECIPE, path, 5, None)
    training._generators["cuda"] = torch.Generator()  # as on a card: the state has none of it
    training._resume()
    assert training.step == 1
    training._save()
    assert run(path) is not None  # and back


@pytest.mark.parametrize(
    "change", [{"lr": math.inf}, {"lr": -1.0}, {"muon_lr": math.nan}, {"weight_decay": math.inf}]
)
def test_numbers_that_can_only_diverge_are_refused(change) -> None:
    (name, value), *_ = change.items()
    with pytest.raises(ValueError, match=f"{name} = {value}: give a finite number of at least 0"):
        make_optimizer(make_model(), **{"lr": 0.1} | change)
    for name in ("rope_base", "eps"):
        for value in (math.nan, math.inf):
            with pytest.raises(ValueError, match=f"{name} = {value}: it must be finite"):
                make_model(**{name: value})
    for name, value in (("rope_base", 0.0), ("rope_base", -1.0), ("eps", 0.0)):
        with pytest.raises(ValueError, match=f"{name} = {value}: give a .*positive number"):
            make_model(**{name: value})
    with pytest.raises(ValueError, match="eps = -1.0: it must be 0 or more"):
        make_model(eps=-1.0)


def test_it_saves_now_and_then(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("relay_fast.training.trainer.SAVE_EVERY", 0.0)
    path = tmp_path / "state.safetensors"
    monkeypatch.setattr("relay_fast.training.trainer.PART_BYTES", 4096)
    whole, trained = run(path)
    assert load_checkpoint(path)[1]["step"] == 8
    files = list(tmp_path.iterdir())
    assert len(files) > 2 and all(file.stat().st_size < 16384 for file in files)
    parts, again = run(path)  # finished: nothing is trained again
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert again.history == trained.history


def test_autocast_computes_in_bf16_and_keeps_fp32_parameters(tmp_path) -> None:
    models = {}
    for dtype in ("fp32", "bf16"):
        model = models[dtype] = make_model()
        recipe = {**RECIPE, "autocast": dtype, "graph": True}  # no CUDA: steps one by one
        trained = train_model(model, make_stream(3), recipe, tmp_path / dtype, seed=5)
        assert "CUDA graphs need a CUDA device" in trained.cuda_graph
        assert all(p.dtype == torch.float32 for p in model.parameters())
    pairs = zip(models["fp32"].parameters(), models["bf16"].parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_a_resume_file_of_another_recipe_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("relay_fast.training.trainer.LOG_EVERY", 0.0)
    path = tmp_path / "state.safetensors"
    assert run(path, stop_at=2) is None
    with pytest.raises(CheckpointError) as error:
        run(path, lr=1.0)
    text = str(error.value)
    assert "state.safetensors belongs to another config" in text
    assert "recipe.lr (1.0 here, 0.003 in the file)" in text
    with pytest.raises(CheckpointError, match=r"steps \(3 here, 8 in the file\)"):
        train_model(make_model(dropout=0.1), make_stream(3), RECIPE, path, seed=5)
    with pytest.raises(CheckpointError, match=r"seed \(6 here, 5 in the file\)"):
        train_model(make_model(dropout=0.1), make_stream(8), RECIPE, path, seed=6)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file.*delete it"):
        run(path)
