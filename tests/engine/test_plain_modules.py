"""Parts that are more than their weights are called where a pass can call them, and refused by name
where it cannot."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from relay_fast import (
    AutoregressiveTransformer,
    IterationCrossEntropy,
    LoopedBlock,
    LoopedClassifier,
    LoopedTransformer,
    PackedBatch,
)
from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.decoding import language_model
from relay_fast.decoding.autoregressive import decode
from relay_fast.decoding.chains import generate_looped_chains, generate_scored
from relay_fast.tasks import Vocabulary, build_tasks

VOCABULARY = Vocabulary()
TASKS = build_tasks(["arithmetic"], VOCABULARY)
CONFIG = BlockConfig(d_model=16, n_heads=2, n_layers=2, causal=True)
SAMPLES = TASKS["arithmetic"].sample(np.array([2, 3]), 0)


class Rounded(nn.Linear):
    """As quantisation-aware training has it: the weight by name, another product."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.round(decimals=1), self.bias)


def rounded(old: nn.Linear) -> Rounded:
    new = Rounded(old.in_features, old.out_features, bias=old.bias is not None)
    new.load_state_dict(old.state_dict())
    return new


def exchange(owner: nn.Module, name: str) -> None:
    setattr(owner, name, rounded(getattr(owner, name)))


def patch(owner: nn.Module, name: str) -> None:
    part = getattr(owner, name)
    part.forward = lambda x: 2 * type(part).forward(part, x)


HOOKS = {
    "forward hook": "register_forward_hook",
    "forward pre-hook": "register_forward_pre_hook",
    "backward hook": "register_full_backward_hook",
    "backward pre-hook": "register_full_backward_pre_hook",
}
CHANGES = {"another class": exchange, "forward of the instance": patch} | {
    name: lambda owner, part, method=method: getattr(getattr(owner, part), method)(lambda *_: None)
    for name, method in HOOKS.items()
}


def test_a_subclass_without_a_forward_is_plain() -> None:
    class Named(nn.Linear):
        pass

    block = LoopedBlock(16, 2, 1)
    x = torch.randn(2, 3, 16)
    before = block(x, 2)
    new = Named(16, 48, bias=False)
    new.load_state_dict(block.layers[0].qkv.state_dict())
    block.layers[0].qkv = new
    assert torch.equal(block(x, 2), before)


def test_hooks_on_the_block_itself_and_on_parameters_work() -> None:
    block = LoopedBlock(16, 2, 1)
    x = torch.randn(2, 3, 16)
    before = block(x, 2)
    block.register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:]))
    block.register_forward_hook(lambda _m, _a, out: 3 * out)
    seen = []
    block.layers[0].qkv.weight.register_hook(lambda g: seen.append(g.shape))
    out = block(x / 2, 2)
    assert torch.allclose(out, 3 * before)
    out.sum().backward()
    assert seen == [(48, 16)]


def make_model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    config = ModelConfig(CONFIG, VOCABULARY.size)
    if kind == "looped":
        return LoopedTransformer(config)
    if kind == "autoregressive":
        return AutoregressiveTransformer(config)
    if kind == "classifier":
        return LoopedClassifier(CONFIG, 11, loops=2, prelude=1, coda=1)
    return IterationCrossEntropy(16, 11)


def prompts() -> tuple[np.ndarray, np.ndarray]:
    return np.array([3, 4, 5, 6]), np.array([0, 2, 4])


TOKENS, ROWS, TARGETS = torch.arange(6).view(2, 3), torch.tensor([2, 5]), torch.tensor([3, 4])
STATES = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
# Every pass that reads weights and does not call what holds them, by model.
PASSES = {
    "looped": {
        "loss": lambda m: m(PackedBatch.looped(SAMPLES, TASKS)),
        "rounds": lambda m: m.predict_rounds(PackedBatch.looped(SAMPLES, TASKS)),
        "chains": lambda m: generate_looped_chains(m, SAMPLES, TASKS),
        "scored": lambda m: generate_scored(m, SAMPLES, TASKS),
    },
    "autoregressive": {
        "loss": lambda m: m(PackedBatch.autoregressive(SAMPLES, TASKS)),
        "forced": lambda m: m.teacher_forced_correct(PackedBatch.autoregressive(SAMPLES, TASKS)),
        "decode": lambda m: decode(m, *prompts(), max_new=2),
    },
    "classifier": {
        "loss": lambda m: m.loss(TOKENS, ROWS, TARGETS),
        "predict": lambda m: m.predict(TOKENS, ROWS),
        "generate": lambda m: language_model.generate(m, [[1, 2]], 2),
        "score": lambda m: language_model.score(m, TOKENS),
    },
    "loss": {"loss": lambda m: m(STATES, ROWS, TARGETS)},
}
HEADS = {"looped": ["chain_head", "answer_head"], "autoregressive": ["chain_head"]}
CALLS = [(kind, name) for kind, passes in PASSES.items() for name in passes]
# Passes over caches, which call no parts; chain scores need the weights too.
READ_ONLY = {("autoregressive", "decode"), ("classifier", "generate"), ("classifier", "score")}
HEADS_READ_ONLY = READ_ONLY | {("looped", "scored")}


def doubled(owner: nn.Module, name: str) -> None:
    """Twice the weight, by a forward of its own."""

    class Twice(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    getattr(owner, name).__class__ = Twice


def assert_honoured(kind: str, run: Callable, change: Callable[[nn.Module], None], name: str):
    """The change has the effect of a weight of twice the size."""
    changed, plain = make_model(kind), make_model(kind)
    change(changed)
    with torch.no_grad():
        plain.get_parameter(f"{name}.weight").mul_(2)
    for a, b in zip(tensors(run(changed)), tensors(run(plain)), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True), name


@pytest.mark.parametrize(("kind", "call"), CALLS)
def test_every_pass_calls_heads_or_refuses_them_by_name(kind, call) -> None:
    run = PASSES[kind][call]
    run(make_model(kind))
    for head in HEADS.get(kind, ["head"]):
        if (kind, call) not in HEADS_READ_ONLY:
            assert_honoured(kind, run, lambda m, head=head: doubled(m, head), head)
            continue
        for change in CHANGES.values():
            model = make_model(kind)
            change(model, head)
            with pytest.raises(RuntimeError, match=rf"{head} \(\w+\) has a .* would ignore"):
                run(model)
        model = make_model(kind)
        old = getattr(model, head)
        setattr(model, head, nn.Linear(old.in_features, old.out_features))
        with pytest.raises(RuntimeError, match=rf"{head} \(Linear\) has a bias"):
            run(model)
    if (kind, call) in HEADS_READ_ONLY:
        model = make_model(kind)
        model.norm.register_forward_hook(lambda *_: None)
        with pytest.raises(RuntimeError, match=r"norm \(Norm\) has a forward hook"):
            run(model)
    else:
        twice = lambda m: m.norm.register_forward_hook(lambda _m, _a, out: 2 * out)
        assert_honoured(kind, run, twice, "norm")


@pytest.mark.parametrize(("kind", "call"), [c for c in CALLS if c[0] != "loss"])
def test_every_pass_calls_parts_of_the_block_or_refuses_them_by_name(kind, call) -> None:
    run = PASSES[kind][call]
    if (kind, call) not in READ_ONLY:
        name = "block.layers.0.down"
        assert_honoured(kind, run, lambda m: doubled(m.block.layers[0], "down"), name)
    else:
        model = make_model(kind)
        exchange(model.block.layers[0], "up")
        with pytest.raises(RuntimeError, match=r"layers.0.up \(Rounded\) has a custom forward"):
            run(model)
    if call in ("predict",) or (kind, call) == ("classifier", "loss"):
        return  # these call the block
    model = make_model(kind)
    model.block.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"block \(LoopedBlock\) has a forward hook"):
        run(model)

    class Doubled(LoopedBlock):
        def forward(self, *args, **options):
            return 2 * super().forward(*args, **options)

    model = make_model(kind)
    model.block = Doubled(config=CONFIG)
    with pytest.raises(RuntimeError, match=r"block \(Doubled\) has a custom forward"):
        run(model)


class Own(nn.Linear):
    """As nn.Linear, but not known to be."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_gradients_of_called_heads() -> None:
    """Of the head, the final norm, and all below, in every model that trains."""
    for kind in ("looped", "autoregressive", "classifier", "loss"):
        for name in HEADS.get(kind, ["head"]):
            changed, plain = make_model(kind).double(), make_model(kind).double()
            getattr(changed, name).__class__ = Own
            for model in (changed, plain):
                inputs = {"loss": lambda m: m(STATES.double(), ROWS, TARGETS)}
                result = (inputs if kind == "loss" else PASSES[kind])["loss"](model)
                (result[0] if isinstance(result, tuple) else result.loss).backward()
            for p, q in zip(changed.parameters(), plain.parameters(), strict=True):
                assert torch.allclose(p.grad, q.grad, rtol=1e-12, atol=1e-14)


def test_a_head_with_a_bias_is_called() -> None:
    model = make_model("looped")
    model.chain_head = nn.Linear(16, VOCABULARY.size)
    with torch.no_grad():
        model.chain_head.bias[5] = 1e3
    ids, _ = model.predict_rounds(PackedBatch.looped(SAMPLES, TASKS))
    assert all((round_ == 5).all() for round_ in ids)


@pytest.mark.parametrize("kind", ["looped", "autoregressive"])
def test_the_embedding_is_called(kind) -> None:
    """Scaled by a hook, it gives what a scaled embedding gives, in every pass."""
    for name, run in PASSES[kind].items():
        scaled, plain = make_model(kind), make_model(kind)
        scaled.embedding.register_forward_hook(lambda _m, _a, out: 3 * out)
        with torch.no_grad():
            plain.embedding.weight.mul_(3)
        for a, b in zip(tensors(run(scaled)), tensors(run(plain)), strict=True):
            assert torch.allclose(a, b, equal_nan=True), name


def tensors(result) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result.detach().double()]
    if isinstance(result, np.ndarray):
        return [torch.from_numpy(result.astype(np.float64))]
    if isinstance(result, tuple | list):
        return [t for part in result for t in tensors(part)]
    return tensors([result.rounds, result.answer]) if hasattr(result, "rounds") else []


@pytest.mark.parametrize("kind", ["looped", "autoregressive"])
def test_parametrized_heads_are_honoured(kind) -> None:
    for run in PASSES[kind].values():
        model, plain = make_model(kind), make_model(kind)
        parametrizations.weight_norm(model.chain_head)
        with torch.no_grad():
            model.chain_head.parametrizations.weight.original0.mul_(1.5)
            plain.chain_head.weight.mul_(1.5)
        for a, b in zip(tensors(run(model)), tensors(run(plain)), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, equal_nan=True)


def learned_positions(base: type, method: str) -> nn.Module:
    """A model with learned positions, put in through one of the methods of its class."""

    class Learned(base):
        def __init__(self, config: ModelConfig):
            super().__init__(config)
            self.positions = nn.Embedding(config.max_tokens, config.block.d_model)

    def embed(self, batch: PackedBatch) -> Tensor:
        return base.embed(self, batch) + self.positions(batch.plan.positions)

    def own(self, batch: PackedBatch):
        raise AssertionError("not called")

    setattr(Learned, method, embed if method == "embed" else own)
    torch.manual_seed(0)
    return Learned(ModelConfig(CONFIG, VOCABULARY.size))


@pytest.mark.parametrize("method", ["embed", "forward", "loss"])
def test_decoding_refuses_a_subclass_with_a_pass_of_its_own(method) -> None:
    model = learned_positions(AutoregressiveTransformer, method)
    with pytest.raises(TypeError, match=f"Learned overrides {method}"):
        decode(model, *prompts(), max_new=2)


@pytest.mark.parametrize("method", ["forward", "loss"])
@pytest.mark.parametrize("call", ["rounds", "chains", "scored"])
def test_reading_chains_refuses_a_subclass_with_a_pass_of_its_own(call, method) -> None:
    model = learned_positions(LoopedTransformer, method)
    with pytest.raises(TypeError, match=f"Learned overrides {method}"):
        PASSES["looped"][call](model)


def test_reading_chains_honours_an_embedding_of_the_model_s_own() -> None:
    """Positions of zeros change nothing, others what the loss of them changes."""
    model, plain = learned_positions(LoopedTransformer, "embed"), make_model("looped")
    plain.load_state_dict(model.state_dict(), strict=False)
    model.eval()
    batch = PackedBatch.looped(SAMPLES, TASKS)
    with torch.no_grad():
        for position in (0.0, 1.0):
            model.positions.weight.fill_(position)
            shifted = copy.deepcopy(plain)
            shifted.embedding.weight.add_(position)
            for a, b in zip(
                tensors(model.predict_rounds(batch)),
                tensors(shifted.predict_rounds(batch)),
                strict=True,
            ):
                assert torch.equal(a, b)
            assert torch.allclose(model(batch).loss, shifted(batch).loss)


def test_a_language_model_with_a_forward_of_its_own_is_refused() -> None:
    class Capped(LoopedClassifier):
        def forward(self, *args, **options):
            return torch.tanh(super().forward(*args, **options))

    class Foreign(nn.Module):
        def __init__(self):
            super().__init__()
            other = make_model("classifier")
            for name, part in other.named_children():
                setattr(self, name, part)
            self.loops = 2

    plain = make_model("classifier")
    text = language_model.generate(plain, [[1, 2]], 3).tokens
    torch.manual_seed(0)
    with pytest.raises(TypeError, match="Capped overrides forward"):
        language_model.generate(Capped(CONFIG, 11, loops=2, prelude=1, coda=1), [[1, 2]], 3)
    foreign = Foreign()  # the parts alone: what they say is all there is
    assert np.array_equal(language_model.generate(foreign, [[1, 2]], 3).tokens, text)
    Foreign.forward = lambda self, tokens: None
    for call in (language_model.generate, language_model.score):
        with pytest.raises(TypeError, match="Foreign overrides forward"):
            call(foreign, *([[[1, 2]], 3] if call is language_model.generate else [TOKENS]))
    plain.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="LoopedClassifier has a forward hook"):
        language_model.generate(plain, [[1, 2]], 3)
