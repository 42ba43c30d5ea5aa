"""Adapters of peft on the parts of a block and on heads."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from relay_fast import AutoregressiveTransformer, LoopedBlock, LoopedTransformer, PackedBatch
from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.decoding.autoregressive import decode
from relay_fast.tasks import Vocabulary, build_tasks

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

D, PARTS = 16, ["qkv", "up", "gate", "down", "out"]
VOCABULARY = Vocabulary()
TASKS = build_tasks(["arithmetic"], VOCABULARY)


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.entry = nn.Linear(D, D)
        self.block = LoopedBlock(D, 2, 2, activation="swiglu", **options)

    def forward(self, x: Tensor, loops) -> Tensor:
        return self.block(self.entry(x), loops)


def config(**options) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": PARTS, **options})


def randomized(model: nn.Module) -> nn.Module:
    """B starts at zero; every adapter gets values of its own."""
    torch.manual_seed(1)
    for name, p in model.double().named_parameters():
        if "lora_A" in name or "lora_B" in name:
            p.data = 0.2 * torch.randn_like(p)
        elif "magnitude" in name:
            p.data *= 1 + 0.2 * torch.rand_like(p)
    return model


def adapted(how: str = "get", **options) -> nn.Module:
    model, c = Net().double(), config(**options)
    make = {"get": peft.get_peft_model, "inject": lambda m, c: peft.inject_adapter_in_model(c, m)}
    return randomized(make[how](model, c))


def block_of(model: nn.Module) -> LoopedBlock:
    return next(m for m in model.modules() if isinstance(m, LoopedBlock))


def calling(model: nn.Module) -> nn.Module:
    """The same model, in which peft's own forwards run."""
    model = copy.deepcopy(model)
    for layer in block_of(model).layers:
        for name in PARTS:
            getattr(layer, name).register_forward_hook(lambda *_: None)
    return model


X = torch.randn(2, 3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def outcome(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    out = model(X, [4, 2])
    out.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), **grads}


def assert_same(got: dict[str, Tensor], truth: dict[str, Tensor], bound: float = 1e-12) -> None:
    assert got.keys() == truth.keys()
    for name, expected in truth.items():
        scale = expected.abs().max()
        assert (got[name] - expected).abs().max() <= bound * scale, name


@pytest.mark.parametrize("how", ["get", "inject"])
@pytest.mark.parametrize("rslora", [False, True])
def test_lora_is_another_weight(how, rslora) -> None:
    """Against functional_call of the plain block with W + scaling · B · A."""
    model = adapted(how, use_rslora=rslora)
    assert not block_of(model).weights().called
    got = outcome(model)
    assert sum("lora" in name for name in got) == 2 * 2 * len(PARTS)
    scaling = 6 / 4**0.5 if rslora else 6 / 4
    named = {}
    for i, layer in enumerate(block_of(model).layers):
        for name in PARTS:
            part = getattr(layer, name)
            a, b = part.lora_A["default"].weight, part.lora_B["default"].weight
            named[f"layers.{i}.{name}.weight"] = part.base_layer.weight + scaling * b @ a
        for norm in ("norm1", "norm2"):
            named[f"layers.{i}.{norm}.weight"] = getattr(layer, norm).weight
    model.zero_grad()
    entry = next(m for name, m in model.named_modules() if name.endswith("entry"))
    plain = Net().double().block
    out = torch.func.functional_call(plain, named, (entry(X), [4, 2]))
    out.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same(got, {"out": out.detach(), **grads})


CASES = {
    "DoRA": ({"use_dora": True}, 0),
    "dropout": ({"lora_dropout": 0.4}, 10),
    "bias of B": ({"lora_bias": True}, 10),
    "some parts": ({"target_modules": ["qkv", "down"]}, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_is_what_peft_computes(case) -> None:
    options, called = CASES[case]
    model = adapted(**options)
    assert len(block_of(model).weights().called) == called
    assert_same(outcome(model), outcome(calling(model)))
    model.eval()  # dropout is another weight then
    assert len(block_of(model).weights().called) == (called if case == "bias of B" else 0)
    assert_same(outcome(model), outcome(calling(model)))


@pytest.mark.parametrize("second", [{}, {"use_dora": True}])
@pytest.mark.parametrize("order", [["default", "b"], ["b", "default"], ["b"]])
def test_several_adapters(order, second) -> None:
    model = peft.get_peft_model(Net().double(), config())
    model.add_adapter("b", config(r=2, target_modules=["qkv", "out"], **second))
    model.base_model.set_adapter(order)
    randomized(model)
    assert_same(outcome(model), outcome(calling(model)))


def test_switched_off_merged_and_unmerged() -> None:
    model = adapted()
    with torch.no_grad():
        active = model(X, 3)
        with model.disable_adapter():
            assert torch.equal(model(X, 3), Net().double()(X, 3))
        model.merge_adapter()
        assert torch.allclose(model(X, 3), active, rtol=0, atol=1e-12)
        with model.disable_adapter():  # unmerges
            assert torch.allclose(model(X, 3), Net().double()(X, 3), rtol=0, atol=1e-12)
        assert torch.allclose(model(X, 3), active, rtol=0, atol=1e-12)
        plain = copy.deepcopy(model).merge_and_unload()
    assert type(plain) is Net and torch.allclose(plain(X, 3), active, rtol=0, atol=1e-12)


def test_other_adapters_are_called() -> None:
    """IA³ scales what goes through a part."""
    c = peft.IA3Config(target_modules=["qkv", "down"], feedforward_modules=["down"])
    model = peft.get_peft_model(Net().double(), c)
    for name, p in model.double().named_parameters():
        if "ia3" in name:
            p.data = 1 + 0.3 * torch.rand_like(p)
    got = outcome(model)
    assert sum("ia3" in name for name in got) == 4
    assert_same(got, outcome(calling(model)))
    assert torch.allclose(copy.deepcopy(model).merge_and_unload()(X, [4, 2]), got["out"])


def test_injection_embedding_and_copies() -> None:
    """LoRA on the injection is merged; on the embedding it is called; a norm is trained as a
    copy."""
    net = Net(injection="concat", max_loops=4).double()
    c = config(target_modules=["injection", "loop_embedding"], modules_to_save=["norm1"])
    model = peft.get_peft_model(net, c)
    randomized(model)
    for name, p in model.named_parameters():
        if "embedding" in name:
            p.data = torch.randn_like(p)
    block = block_of(model)
    assert set(block.weights().called) == {"loop_embedding"}
    got = outcome(model)
    assert {"norm1", "lora_embedding_A", "lora_embedding_B"} <= {
        part for name in got for part in name.split(".")
    }
    with torch.no_grad():
        merged = copy.deepcopy(model).merge_and_unload()
        assert torch.allclose(merged(X, [4, 2]), got["out"], atol=1e-12, rtol=0)


def test_norm_tuning() -> None:
    """peft trains copies of the norms."""
    c = peft.LNTuningConfig(target_modules=["norm1", "norm2"])
    model = peft.get_peft_model(Net().double(), c)
    for name, p in model.named_parameters():
        if "ln_tuning_layers" in name:
            p.data += torch.rand_like(p)
    assert not block_of(model).weights().called
    got = outcome(model)
    assert sum("ln_tuning_layers" in name for name in got) == 4
    with torch.no_grad():
        plain, tuned = Net().double(), Net().double()
        assert torch.equal(disabled(model), plain(X, [4, 2]))
        model.merge_adapter()
        assert torch.equal(model(X, [4, 2]), got["out"])
        model.unmerge_adapter()
        for layer, own in zip(tuned.block.layers, block_of(model).layers, strict=True):
            for name in ("norm1", "norm2"):
                copied = getattr(own, name).ln_tuning_layers["default"]
                getattr(layer, name).weight.copy_(copied.weight)
        assert torch.equal(tuned(X, [4, 2]), got["out"])


def disabled(model: nn.Module) -> Tensor:
    with model.disable_adapter():
        return model(X, [4, 2])


def test_around_a_bare_block(tmp_path) -> None:
    block = LoopedBlock(D, 2, 2).double()
    model = randomized(peft.get_peft_model(copy.deepcopy(block), config(target_modules=["qkv"])))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(block, tmp_path)
    assert torch.equal(model(X, loops=[4, 2]), again(X, loops=[4, 2]))


def test_another_adapter_in_each_sample_is_refused() -> None:
    model = adapted()
    model.add_adapter("b", config())
    model.eval()
    with pytest.raises(RuntimeError, match=r"layers.0.qkv \(Linear\) gets adapter_names"):
        model(X, [4, 2], adapter_names=["default", "b"])


def test_an_adapter_beside_the_parts_is_refused() -> None:
    block = LoopedBlock(D, 2, 1)
    block.layers[0].adapter = nn.Linear(D, D)
    with pytest.raises(RuntimeError, match=r"unknown: \['layers.0.adapter.weight'"):
        block(torch.randn(1, 2, D), 2)


def test_under_compile() -> None:
    """The merge is traced, and the loop stays one op."""
    model = adapted(target_modules=["qkv"])
    block = block_of(model)
    torch.compiler.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    gradients = []
    for call in (block, compiled):
        model.zero_grad()
        call(X, 3).square().sum().backward()
        gradients.append([p.grad for p in block.parameters() if p.grad is not None])
    for value, expected in zip(*gradients, strict=True):
        assert torch.allclose(value, expected, rtol=1e-12, atol=1e-14)


def test_sixteen_bits_keep_the_weight_s_dtype() -> None:
    """peft keeps adapters in fp32 beside a 16-bit weight; the block computes in the latter."""
    model = peft.get_peft_model(Net().bfloat16(), config(target_modules=["qkv"]))
    weights = block_of(model).weights().named
    assert weights["layers.0.qkv.weight"].dtype == torch.bfloat16
    model(X.bfloat16(), 3).sum().backward()
    grads = [p.grad.dtype for name, p in model.named_parameters() if "lora" in name]
    assert set(grads) == {torch.float32}


def test_models_train_and_decode_with_adapters_on_heads_too() -> None:
    samples = TASKS["arithmetic"].sample(np.array([2, 3]), 0)
    c = ModelConfig(BlockConfig(D, 2, 2, causal=True), VOCABULARY.size)
    targets = ["qkv", "down", "chain_head", "answer_head"]
    for kind, make in (
        (LoopedTransformer, PackedBatch.looped),
        (AutoregressiveTransformer, PackedBatch.autoregressive),
    ):
        torch.manual_seed(0)
        here = targets if kind is LoopedTransformer else targets[:-1]
        model = randomized(peft.get_peft_model(kind(c), config(target_modules=here)))
        inner, batch = model.base_model.model, make(samples, TASKS)
        losses = model(batch)
        losses.loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
        merged = copy.deepcopy(model).merge_and_unload()
        assert torch.allclose(merged(batch).loss, losses.loss, rtol=1e-12)
        if kind is LoopedTransformer:
            pairs = zip(*(m.predict_rounds(batch)[0] for m in (inner, merged)), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
        else:
            prompts = (np.array([3, 4, 5, 6]), np.array([0, 2, 4]))
            assert str(decode(inner, *prompts, max_new=3)) == str(
                decode(merged, *prompts, max_new=3)
            )


def test_decoding_refuses_an_adapter_that_has_to_be_called() -> None:
    c = ModelConfig(BlockConfig(D, 2, 1, causal=True), VOCABULARY.size)
    model = peft.get_peft_model(
        AutoregressiveTransformer(c), config(target_modules=["qkv"], lora_bias=True)
    )
    with pytest.raises(RuntimeError, match=r"layers.0.qkv \(Linear\) has a custom forward"):
        decode(model.base_model.model, np.array([3, 4]), np.array([0, 2]), max_new=2)
