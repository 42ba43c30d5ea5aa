"""What the losses must not do without a word: let ignored rows through, take targets that there are
not, lose small gradients in 16 bits, mix dtypes."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import interpreter
from benchmarks.common import synthetic_batch
from benchmarks.numerics import (
    assert_as_good_as_eager,
    assert_bitwise,
    assert_close,
    describe,
    rms_ratio,
)
from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.functional import iteration_cross_entropy, row_cross_entropy
from relay_fast.models.iteration_loss import IterationCrossEntropy
from relay_fast.models.transformers import AutoregressiveTransformer, LoopedTransformer

interpreter.mend()
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
D, ROWS, IGNORED = 16, 6, [2, 5]
FORMS = ("rows", "iterations", "module")
SMALL, LARGE = 11, 1030  # gradient formed in backward, and in forward
impls = pytest.mark.parametrize("impl", ["torch", "triton"])
vocabularies = pytest.mark.parametrize("vocabulary", [SMALL, LARGE])


def inputs(vocabulary: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return {
        "states": new(ROWS, D), "rows": torch.arange(ROWS),
        "targets": torch.randint(vocabulary, (ROWS,), generator=generator),
        "norm_weight": 1 + new(D) / 10, "head": new(vocabulary, D) / 4,
    }  # fmt: skip


def gradients(loss: Tensor, of: dict[str, Tensor]) -> dict[str, Tensor]:
    loss.backward()
    return {"loss": loss.detach()} | {n: of[n].grad for n in ("states", "norm_weight", "head")}


def require(i: dict[str, Tensor]) -> dict[str, Tensor]:
    for n in ("states", "norm_weight", "head"):
        i[n].requires_grad_()
    return i


@pytest.mark.parametrize(
    ("form", "value", "vocabulary", "impl"),
    [
        *((f, v, n, "torch") for f in FORMS for v in ("nan", "inf") for n in (SMALL, LARGE)),
        *((f, "nan", SMALL, "triton") for f in FORMS),
        ("rows", "inf", LARGE, "triton"),  # few rows: the vocabulary is split over programs
        ("iterations", "nan", LARGE, "triton"),
    ],
)
def test_ignored_rows_may_hold_anything(form: str, value: str, vocabulary: int, impl: str) -> None:
    """Their states and weights: the others' loss and gradients are what they are without them."""
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "impl": impl}

    def taken(i: dict[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
        i = require(i)
        if form == "iterations":
            return gradients(iteration_cross_entropy(weights=weights, **i, **options), i)
        if form == "rows":
            loss, correct = row_cross_entropy(**i, **options)
            loss.backward(weights)  # NaN where ignored
            return {"loss": loss.detach().sum(), "correct": correct.sum()} | {
                n: i[n].grad for n in ("states", "norm_weight", "head")
            }
        module = IterationCrossEntropy(D, vocabulary, **options)
        module.norm.weight, module.head.weight = (
            torch.nn.Parameter(i[n].detach()) for n in ("norm_weight", "head")
        )
        out = module(i["states"], i["rows"], i["targets"], weights)
        out.loss.backward()
        grads = (i["states"].grad, module.norm.weight.grad, module.head.weight.grad)
        return dict(zip(("states", "norm_weight", "head"), grads, strict=True)) | {
            "loss": out.loss.detach(),
            "losses": out.losses,
            "accuracy": out.accuracy,
        }

    kept = [r for r in range(ROWS) if r not in IGNORED]
    weights = torch.linspace(0.5, 1, ROWS)
    i = inputs(vocabulary)
    i["rows"], i["targets"] = i["rows"][kept], i["targets"][kept]
    expected = taken(i, weights[kept])
    i, weights = inputs(vocabulary), weights.clone()
    i["states"][IGNORED], i["targets"][IGNORED], weights[IGNORED] = float(value), -100, float(value)
    found = taken(i, weights)
    for name, truth in expected.items():
        assert_close(name, found[name], truth, 1e-5)
    assert not found["states"][IGNORED].any()


@impls
def test_ignored_weights_get_no_gradient(impl: str) -> None:
    i = require(inputs(LARGE))
    i["states"].data[IGNORED], i["targets"][IGNORED] = float("nan"), -1
    weights = torch.ones(ROWS, requires_grad=True)
    iteration_cross_entropy(weights=weights, **i, impl=impl).backward()
    loss, _ = row_cross_entropy(**i, impl=impl)
    assert_close("weights", weights.grad, loss, 1e-5)
    assert not weights.grad[IGNORED].any()


def test_a_batch_without_targets_has_no_loss_whatever_its_states_are() -> None:
    model = AutoregressiveTransformer(ModelConfig(BlockConfig(8, 1, 1, causal=True), SMALL))
    with torch.no_grad():
        model.embedding.weight.fill_(float("nan"))
    batch = synthetic_batch(*(torch.tensor([n]).numpy() for n in (3, 1)), 0, SMALL)
    losses = model.loss(batch)
    losses.loss.backward()
    assert losses.loss == 0


@impls
@vocabularies
@pytest.mark.parametrize("beyond", [0, 3, 5000])
def test_targets_that_there_are_not(beyond: int, vocabulary: int, impl: str) -> None:
    i = require(inputs(vocabulary))
    i["targets"][1] = vocabulary + beyond
    says = f"target {vocabulary + beyond} is outside of the vocabulary of {vocabulary}"
    with pytest.raises(ValueError, match=says):
        row_cross_entropy(**i, impl=impl)
    with pytest.raises(ValueError, match=says):
        iteration_cross_entropy(weights=torch.ones(ROWS), **i, impl=impl)
    with pytest.raises(ValueError, match=says):
        IterationCrossEntropy(D, vocabulary, impl=impl)(i["states"], i["rows"], i["targets"])


@impls
@pytest.mark.parametrize("part", ["targets", "answers"])
def test_targets_of_a_batch_that_there_are_not(part: str, impl: str) -> None:
    batch = synthetic_batch(*(torch.tensor([n]).numpy() for n in (3, 1)), 2, SMALL)
    getattr(batch, part)[0] = SMALL
    model = LoopedTransformer(ModelConfig(BlockConfig(8, 1, 1), SMALL), impl=impl)
    with pytest.raises(ValueError, match="target 11 is outside of the vocabulary of 11"):
        model.loss(batch)


@pytest.mark.parametrize(("vocabulary", "beyond"), [(SMALL, 0), (SMALL, 5000), (LARGE, 3)])
def test_on_a_card_such_a_target_is_loud(vocabulary: int, beyond: int) -> None:
    """Where nobody looks at the list: its loss is NaN and so are the gradients; the others' losses
    are what they were."""
    i = require(inputs(vocabulary))
    sound, _ = row_cross_entropy(**i, impl="triton")
    i["targets"][1] = vocabulary + beyond
    with patch("relay_fast.kernels.cross_entropy.check_lists"):
        loss, correct = row_cross_entropy(**i, impl="triton")
        total = iteration_cross_entropy(weights=torch.ones(ROWS), **i, impl="triton")
        assert loss[1].isnan() and not correct[1] and total.isnan()
        for backward in (loss.sum().backward, total.backward):
            backward()
            assert i["head"].grad.isnan().any() and i["states"].grad[1].isnan().all()
            i["head"].grad = i["states"].grad = None
    others = [0, 2, 3, 4, 5]
    assert_bitwise("loss of the others", loss[others], sound[others])


@impls
@pytest.mark.parametrize("row", [-1, ROWS])
def test_rows_that_there_are_not(row: int, impl: str) -> None:
    i = inputs(SMALL)
    i["rows"][3] = row
    with pytest.raises(ValueError, match=f"row {row} is none of the {ROWS} states"):
        row_cross_entropy(**i, impl=impl)


@impls
@pytest.mark.parametrize("scale", [1.0, 2.0**10, 2.0**16, 2.0**20])
@pytest.mark.parametrize("weight", [1 / 32, 1e-3, 1e-5, 1e-7])
def test_fp16_keeps_gradients_of_any_size(weight: float, scale: float, impl: str) -> None:
    """A loss scale reaches the gradient after it was formed, and a row's weight may be small: in
    fp32 both, with one row whose weight is larger still."""
    weights = torch.full((ROWS,), weight)
    weights[0] *= 30
    i = require(inputs(LARGE))
    with torch.autocast("cpu", torch.float16):
        loss = iteration_cross_entropy(weights=weights, **i, impl=impl)
    found = gradients(loss * scale, i)
    i = require({n: t.detach().double() if t.is_floating_point() else t for n, t in i.items()})
    expected = gradients(iteration_cross_entropy(weights=weights, **i) * scale, i)
    for name, truth in expected.items():
        assert found[name].dtype == torch.float32
        assert rms_ratio(found[name], truth) <= 2e-3, describe(name, found[name], truth)
    for row, truth in enumerate(expected["states"]):
        assert rms_ratio(found["states"][row], truth) <= 4e-3, f"state {row}"


def eager_mixed(i: dict[str, Tensor], weights: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weighted loss of `test_mixed_dtypes` and its gradients by autograd, all in one dtype."""
    i = require({n: t.detach().to(dtype) if t.is_floating_point() else t for n, t in i.items()})
    weights = weights.detach().to(dtype).requires_grad_()
    logits = F.rms_norm(i["states"], (D,), i["norm_weight"], 1e-6) @ i["head"].t()
    losses = F.cross_entropy(logits, i["targets"], reduction="none")
    return gradients((losses * weights).sum(), i) | {"weights": weights.grad}


@vocabularies
@pytest.mark.parametrize("wide", ["states", "head", "norm_weight", "weights"])
def test_mixed_dtypes(wide: str, vocabulary: int) -> None:
    """One fp64 tensor among fp32 ones: losses are fp64 where the states or the head are, gradients
    have their tensors' dtypes."""
    i = inputs(vocabulary) | {"weights": torch.linspace(0.5, 1, ROWS)}
    i[wide] = i[wide].double()
    weights = i.pop("weights").requires_grad_()
    loss = iteration_cross_entropy(weights=weights, **require(i))
    assert loss.dtype == (torch.float64 if wide in ("states", "head") else torch.float32)
    found = gradients(loss, i) | {"weights": weights.grad}
    truths, eagers = (eager_mixed(i, weights, dtype) for dtype in (torch.float64, torch.float32))
    for name, truth in truths.items():
        # A state's gradient is a product of V terms: how fp32 rounds that is up to the library and
        # its threads (1e-6 of it for V = 1,030 where they are added one after the other).
        assert_as_good_as_eager(name, found[name], eagers[name], truth, torch.float64)
    assert all(i[n].grad.dtype == i[n].dtype for n in ("states", "norm_weight", "head"))
    assert weights.grad.dtype == weights.dtype


@vocabularies
@pytest.mark.parametrize("op", [row_cross_entropy, iteration_cross_entropy])
def test_transforms_that_would_be_lost_are_refused(op: Callable, vocabulary: int) -> None:
    i = inputs(vocabulary)
    weights = {"weights": torch.ones(ROWS)} if op is iteration_cross_entropy else {}
    head = i.pop("head")

    def of(head: Tensor) -> Tensor:
        found = op(**i, head=head, **weights)
        return found if isinstance(found, Tensor) else found[0].sum()

    for run in (
        lambda: torch.func.grad(of)(head),
        lambda: torch.func.jvp(of, (head,), (head,)),
        lambda: torch.func.vmap(of)(torch.stack([head, head])),
        lambda: torch.func.grad(of)(head.requires_grad_()),
    ):
        with pytest.raises(RuntimeError, match="do not support forward-mode AD and the transforms"):
            run()


@pytest.mark.parametrize("op", [row_cross_entropy, iteration_cross_entropy])
@pytest.mark.parametrize("name", ["rows", "targets"])
def test_lists_are_of_whole_numbers(name: str, op: Callable) -> None:
    weights = {"weights": torch.ones(ROWS)} if op is iteration_cross_entropy else {}
    i = inputs(LARGE)
    truth = op(**i, **weights)
    short = op(**i | {name: i[name].int()}, **weights)
    assert_bitwise("int32", *(r if isinstance(r, Tensor) else r[0] for r in (short, truth)))
    for dtype in (torch.float32, torch.bool, torch.uint8):
        with pytest.raises(TypeError, match=f"{name} are of {dtype}: give int64"):
            op(**i | {name: i[name].to(dtype)}, **weights)


@impls
def test_nothing_to_norm(impl: str) -> None:
    """With eps = 0 a state of zeros stays one, and so do the rows beside it in a kernel's tile."""
    i = require(inputs(SMALL))
    i["states"].data[1] = 0
    loss, _ = row_cross_entropy(**i, eps=0.0, impl=impl)
    assert_close("loss", loss[1], torch.tensor(float(SMALL)).log(), 1e-6)
    loss.sum().backward()
    assert all(i[n].grad.isfinite().all() for n in ("states", "norm_weight", "head"))
