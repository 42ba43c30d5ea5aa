"""What wraps a module calls its forward: all models train through it."""

from __future__ import annotations

import importlib
import tempfile

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import relay_fast
from relay_fast import AutoregressiveTransformer, LoopedClassifier, LoopedTransformer, PackedBatch
from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.tasks import Vocabulary, build_tasks
from relay_fast.training.cuda_graph import take_step
from relay_fast.training.optim import make_optimizer
from tests.support.fresh_python import run_fresh

VOCABULARY = Vocabulary()
TASKS = build_tasks(["arithmetic"], VOCABULARY)
CONFIG = BlockConfig(d_model=16, n_heads=2, n_layers=1, causal=True)
KINDS = ["looped", "autoregressive", "classifier"]


def make(kind: str) -> tuple[nn.Module, tuple]:
    """A model, and what its forward takes to give a loss first of all."""
    torch.manual_seed(0)
    if kind == "classifier":
        inputs = torch.arange(6).view(2, 3), torch.tensor([2, 5]), torch.tensor([3, 4])
        return LoopedClassifier(CONFIG, 11, loops=2, prelude=1, coda=1), inputs
    cls = LoopedTransformer if kind == "looped" else AutoregressiveTransformer
    samples = TASKS["arithmetic"].sample(np.array([2, 3]), 0)
    return cls(ModelConfig(CONFIG, VOCABULARY.size)), (getattr(PackedBatch, kind)(samples, TASKS),)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        name.removeprefix("module.").removeprefix("_orig_mod."): p.grad.clone()
        for name, p in model.named_parameters()
    }


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_the_loss(kind) -> None:
    model, inputs = make(kind)
    for a, b in zip(model(*inputs), model.loss(*inputs), strict=True):
        assert torch.equal(a, b)
    assert_same(gradients(model, model(*inputs)[0]), gradients(model, model.loss(*inputs)[0]))


@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_batch_of_the_other_kind_is_refused(kind) -> None:
    (model, _), (_, (other,)) = make(kind), make(next(k for k in KINDS if k != kind))
    sentence = f"which {type(model).__name__} does not learn: make the batch .* PackedBatch.{kind}$"
    for call in (model, lambda batch: relay_fast.warmup(model, [batch])):
        with pytest.raises(ValueError, match=sentence):
            call(other)


def test_a_classifier_wants_rows_and_targets_together() -> None:
    model, (tokens, rows, targets) = make("classifier")
    assert model(tokens).shape == (2, 3, 16)
    loss, _ = model(tokens, rows, targets, loops=1)
    assert torch.equal(loss, model.loss(tokens, rows, targets, loops=1)[0])
    for one in ({"rows": rows}, {"targets": targets}):
        with pytest.raises(TypeError, match="rows and targets go together"):
            model(tokens, **one)


@pytest.fixture
def group():
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/f", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
def test_data_parallel_training_reduces_every_gradient(kind, group) -> None:
    model, inputs = make(kind)
    wanted = gradients(model, model.loss(*inputs)[0])
    wrapped, reduced = DistributedDataParallel(model), []

    def halved(_, bucket):
        reduced.extend(p.shape for p in bucket.parameters())
        future = torch.futures.Future()
        future.set_result(bucket.buffer() / 2)
        return future

    wrapped.register_comm_hook(None, halved)
    found = gradients(wrapped, wrapped(*inputs)[0])
    # What came out has passed through the reduction, every parameter of it.
    assert len(reduced) == len(wanted)
    assert_same(found, {name: g / 2 for name, g in wanted.items()})


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_in_place_and_around(kind) -> None:
    model, inputs = make(kind)
    wanted = gradients(model, model.loss(*inputs)[0])
    for around in (True, False):
        other, _ = make(kind)
        if around:
            compiled = torch.compile(other, backend="eager")
        else:
            other.compile(backend="eager")
            compiled = other
        found = gradients(compiled, compiled(*inputs)[0])
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, msg=name)


def test_a_step_goes_through_the_call() -> None:
    model, (batch,) = make("looped")
    seen = []
    model.register_forward_hook(lambda *_: seen.append("hook"))
    losses = take_step(model, make_optimizer(model, lr=1e-3), batch)
    assert seen == ["hook"] and losses.loss.isfinite()


def test_an_overridden_loss_is_what_a_step_takes() -> None:
    class Twice(LoopedTransformer):
        def loss(self, batch):
            losses = super().loss(batch)
            return losses._replace(loss=2 * losses.loss)

    plain, (batch,) = make("looped")
    torch.manual_seed(0)
    twice = Twice(plain.config)
    assert torch.equal(twice(batch).loss, 2 * plain(batch).loss)


def test_every_public_module_has_a_forward() -> None:
    public = [getattr(relay_fast, name) for name in relay_fast.__all__ if name != "__version__"]
    models = [cls for cls in public if isinstance(cls, type) and issubclass(cls, nn.Module)]
    models.append(importlib.import_module("relay_fast.recipes._linear_attention").LinearAttention)
    assert len(models) >= 6
    for cls in models:
        assert cls.forward is not nn.Module.forward, cls


def test_importing_the_models_leaves_torch_s_compiler_alone() -> None:
    code = "import sys, relay_fast.models.looped_block; sys.exit('torch._dynamo' in sys.modules)"
    assert run_fresh(code).returncode == 0
