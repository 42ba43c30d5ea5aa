"""Numbers of numpy and tensors count as numbers everywhere; bools, text and fractions do not."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import nn

from relay_fast import (
    AutoregressiveTransformer,
    GrowthSchedule,
    IterationCrossEntropy,
    LoopedBlock,
    LoopedClassifier,
    functional,
    grow,
    loop,
    tie,
)
from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.decoding import language_model
from relay_fast.decoding.autoregressive import decode
from relay_fast.decoding.chains import unseen_problems
from relay_fast.tasks import Vocabulary, make_task
from relay_fast.training.model_files import load_model, save_model
from relay_fast.utils.numbers import as_bool, as_float, as_int, plain_numbers

KINDS = [np.int64, np.int32, np.uint8, lambda n: np.array(n), lambda n: torch.tensor(n)]
NOT_WHOLE = [True, np.True_, torch.tensor(True), 2.0, np.float32(2), "2", None, torch.tensor(2.0)]


def test_whole() -> None:
    for kind in [int, *KINDS]:
        assert as_int("n", kind(3)) == 3 and type(as_int("n", kind(3))) is int
    for value in NOT_WHOLE:
        with pytest.raises(ValueError, match="n = .*: it must be a whole number"):
            as_int("n", value)
    with pytest.raises(ValueError, match="n = 0: it must be at least 1"):
        as_int("n", np.int64(0), least=1)
    with pytest.raises(ValueError, match="n = -1: it must be 0 or more"):
        as_int("n", -1, least=0)


def test_real_and_truth() -> None:
    for value in (np.float32(0.5), np.float64(0.5), np.float16(0.5), torch.tensor(0.5), 0.5):
        assert as_float("x", value) == 0.5 and type(as_float("x", value)) is float
    assert as_float("x", np.int64(2)) == 2.0
    for value in (True, np.False_, "0.5", None, [0.5], float("nan"), np.inf):
        with pytest.raises(ValueError, match="x = .*: it must be (a number|finite)"):
            as_float("x", value)
    for value in (True, np.True_, torch.tensor(True)):
        assert as_bool("b", value) is True
    for value in (1, 0, "yes", None, np.int64(1)):
        with pytest.raises(ValueError, match="b = .*: it must be True or False"):
            as_bool("b", value)


SIZES = {"d_model": 16, "n_heads": 2, "n_layers": 1, "n_kv_heads": 1, "d_hidden": 8, "max_loops": 3}
FRACTIONS = {"eps": 0.5, "dropout": 0.25, "state_noise": 0.125, "rope_base": 100.0}
FLAGS = {"bias": True, "causal": True}


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_holds_python_s_numbers(kind) -> None:
    plain = BlockConfig(**SIZES, **FRACTIONS, **FLAGS)
    config = BlockConfig(
        **{name: kind(value) for name, value in SIZES.items()},
        **{name: np.float32(value) for name, value in FRACTIONS.items()},
        **{name: np.bool_(value) for name, value in FLAGS.items()},
    )
    assert config == plain and json.dumps(config.to_dict()) == json.dumps(plain.to_dict())
    assert [type(v) for v in asdict(config).values()] == [type(v) for v in asdict(plain).values()]
    model = ModelConfig(config, kind(11), max_tokens=kind(9))
    assert model == ModelConfig(plain, 11, 9) == ModelConfig.from_dict(model.to_dict())


def test_a_config_refuses_what_is_no_number() -> None:
    for name in SIZES:
        for value in (v for v in NOT_WHOLE if v is not None):
            with pytest.raises(ValueError, match=f"{name} = .*: it must be a whole number"):
                BlockConfig(**{**SIZES, name: value})
    for name in FRACTIONS:
        for value in ("much", True, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"{name} = .*: it must be"):
                BlockConfig(**SIZES, **{name: value})
    for name in FLAGS:
        with pytest.raises(ValueError, match=f"{name} = 'no': it must be True or False"):
            BlockConfig(**SIZES, **{name: "no"})
    for base in (0, -1.0):
        with pytest.raises(ValueError, match=f"rope_base = {float(base)}: give a positive number"):
            BlockConfig(**SIZES, rope_base=base)
    for name in ("vocabulary_size", "max_tokens"):
        with pytest.raises(ValueError, match=f"{name} = 0: it must be at least 1"):
            ModelConfig(BlockConfig(16, 2, 1), **{"vocabulary_size": 5, name: 0})


@pytest.mark.parametrize("kind", KINDS)
def test_calls_take_them(kind) -> None:
    torch.manual_seed(0)
    block, x = LoopedBlock(16, 2, 1, gather_rows=kind(8)), torch.randn(2, 3, 16)
    assert torch.equal(block(x, kind(2)), block(x, 2))
    assert torch.equal(block(x, [kind(2), kind(1)]), block(x, [2, 1]))
    states = block(x, 3, return_states=[1, 3])
    arrays = [kind(1), kind(3)], np.array([1, 3]), torch.tensor([3, 1, 3])
    for wanted in arrays:
        for a, b in zip(block(x, 3, return_states=wanted), states, strict=True):
            assert torch.equal(a, b)
    for module in (block, nn.Linear(16, 16)):
        grads = []
        for truncate in (2, kind(2)):
            out = loop(module, x, 3, truncate=truncate)
            grads.append(torch.autograd.grad(out.sum(), list(module.parameters())))
        for a, b in zip(*grads, strict=True):
            assert torch.equal(a, b)


def test_bools_of_numpy_ask_for_all_states_or_none() -> None:
    torch.manual_seed(0)
    block, x = LoopedBlock(16, 2, 1), torch.randn(2, 3, 16)
    for module in (lambda **o: block(x, 2, **o), lambda **o: loop(block, x, 2, **o)):
        assert len(module(return_states=np.True_)) == 2
        assert torch.equal(module(return_states=np.False_), module(return_states=False))
        for wrong, message in (
            ([1.5], "must be a whole number"), ([True], "must be a whole number"),
            (np.int64(1), "pass True for all states"), (torch.tensor(1), "pass True for all"),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=message):
                module(return_states=wrong)
        for wrong in (True, np.True_, 1.0, "1", np.int64(-1)):
            with pytest.raises(ValueError, match="truncate = .*: gradients flow through a whole"):
                module(truncate=wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_models_and_generation_take_them(kind, tmp_path) -> None:
    torch.manual_seed(0)
    config = BlockConfig(16, 2, 2, causal=True)
    model = LoopedClassifier(config, kind(11), loops=kind(2), prelude=kind(1), coda=kind(0))
    assert type(model.loops) is int and model.coda is None
    options = {"loops": 2, "min_loops": 1, "seed": 3, "temperature": 1.0}
    numbers = {name: kind(options[name]) for name in ("loops", "min_loops", "seed")}
    written = language_model.generate(model, [[1, 2]], kind(3), **{**options, **numbers})
    wanted = language_model.generate(model, [[1, 2]], 3, **options)
    assert np.array_equal(written.tokens, wanted.tokens)
    tied = tie(model, kind(1))
    assert tied.loops == 4 and type(tied.loops) is int
    model.loops = np.int64(2)
    assert tie(model).loops == 4
    grow(model, layers=kind(1))
    assert len(model.block.layers) == 3
    schedule = GrowthSchedule(kind(12), kind(3), layers=kind(1), stages=kind(3))
    assert schedule == GrowthSchedule(12, 3, layers=1, stages=3)
    loss = IterationCrossEntropy(kind(16), kind(11), eps=np.float32(0.5), z_loss=np.float64(0.25))
    assert loss.options["eps"] == 0.5 and type(loss.options["z_loss"]) is float

    ar = AutoregressiveTransformer(ModelConfig(config, kind(24)))
    prompts = np.array([3, 4, 5]), np.array([0, 1, 3])
    options = {"batch": 2, "sync_every": 2, "loops": 2, "seed": 5}
    numbers = {name: kind(value) for name, value in options.items()}
    a = decode(ar, *prompts, max_new=np.int64(4), temperature=np.float32(0.5), **numbers)
    b = decode(ar, *prompts, max_new=4, temperature=0.5, **options)
    assert np.array_equal(a.tokens, b.tokens)
    save_model(tmp_path / "m.safetensors", ar, {"seed": np.int64(7), "losses": [np.float32(0.5)]})
    assert load_model(tmp_path / "m.safetensors")[1] == {"seed": 7, "losses": [0.5]}


def test_bools_and_fractions_are_no_counts() -> None:
    model = AutoregressiveTransformer(ModelConfig(BlockConfig(16, 2, 1, causal=True), 24))
    prompts = np.array([3, 4, 5]), np.array([0, 1, 3])
    for name in ("batch", "sync_every", "loops", "seed"):
        for wrong in (True, 1.5, "2"):
            with pytest.raises(ValueError, match=f"{name} = .*: it must be a whole number"):
                decode(model, *prompts, max_new=2, **{name: wrong})


def test_plain_numbers() -> None:
    value = {"a": np.int64(1), "b": [np.float32(0.5), (np.bool_(True), "x")], "c": {"d": None}}
    assert json.dumps(plain_numbers(value)) == '{"a": 1, "b": [0.5, [true, "x"]], "c": {"d": null}}'


@pytest.mark.parametrize("kind", KINDS)
def test_ops_and_tasks_take_them(kind) -> None:
    x, norm = torch.randn(6, 16), torch.ones(16)
    qkv, cu = torch.randn(6, 48), torch.tensor([0, 6], dtype=torch.int32)
    same = lambda a, b: torch.equal(a, b)
    attended = functional.attention(qkv, cu, 2)
    assert same(functional.attention(qkv, cu, kind(2)), attended)
    for offsets in (cu.tolist(), cu.numpy()):
        assert same(functional.attention(qkv, offsets, 2, kind(2)), attended)
    up, down = torch.randn(32, 16), torch.randn(16, 32)
    for call in (
        lambda eps: functional.norm_linear(x, norm, up, eps=eps),
        lambda eps: functional.mlp(x, norm, up, down, eps=eps),
    ):
        assert same(call(np.float32(0.5)), call(0.5))

    vocabulary = Vocabulary(kind(200), multiple=kind(32))
    assert vocabulary == Vocabulary(200, 32)
    parameters = {
        "arithmetic": {"prime": 7},
        "lis": {"group": 5, "high": 99, "max_runs": 2},
        "edit_distance": {"insert": 1, "letters": 9, "alphabet": (3, 5)},
    }
    for name, own in parameters.items():
        numbers = {k: tuple(map(kind, v)) if k == "alphabet" else kind(v) for k, v in own.items()}
        task, plain = make_task(name, vocabulary, **numbers), make_task(name, vocabulary, **own)
        assert json.dumps(task.to_dict()) == json.dumps(plain.to_dict())
        a, b = (unseen_problems(t, s(3), 2, s(1)) for t, s in ((task, kind), (plain, int)))
        assert np.array_equal(a.problem, b.problem) and np.array_equal(a.answer, b.answer)
