"""The drop-in block and the two models: shapes, orders, state dicts, bad input."""

import numpy as np
import pytest
import torch
from torch.nn.utils import prune

from benchmarks.baselines import EagerBlock, EagerTransformer, PaddedBatch
from benchmarks.numerics import assert_bitwise, assert_close
from relay_fast.batch.packed import PackedBatch
from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.functional import select
from relay_fast.models.looped_block import LoopedBlock
from relay_fast.models.transformers import AutoregressiveTransformer, LoopedTransformer
from relay_fast.tasks import TASK_NAMES, Samples, Vocabulary, build_tasks

D = 16
TASKS = build_tasks(TASK_NAMES, Vocabulary())
MIXED = ([2, 0, 3], [[1, 2], [1], [0, 5], [3, 3]])


def pair(**options) -> tuple[LoopedBlock, EagerBlock]:
    """Our block and the eager one with the same weights, in fp64."""
    block = LoopedBlock(D, 2, 2, **options).double()
    config = block.config
    eager = EagerBlock(config).double()
    eager.load_state_dict(block.state_dict())  # strict: the same keys
    return block, eager


def grads(*leaves: torch.Tensor) -> list[torch.Tensor]:
    values = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return values


@pytest.mark.parametrize("policy", ["none", "state", "sqrt"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("loops", [0, 3, [2, 0, 4]])
def test_padded_input(loops, causal: bool, policy: str) -> None:
    block, eager = pair(causal=causal, recompute=policy)
    x = torch.randn(3, 5, D, dtype=torch.float64, requires_grad=True)
    g = torch.randn_like(x)
    counts = torch.tensor(loops).expand(3)
    truth = eager(x, int(counts.max()), counts)
    out = block(x, loops)
    assert_close("output", out, truth)
    (truth * g).sum().backward()
    expected = grads(x)
    (out * g).sum().backward()
    assert_close("dx", grads(x)[0], expected[0])
    if counts.max():
        for (name, ours), theirs in zip(block.named_parameters(), eager.parameters(), strict=True):
            assert_close(name, ours.grad, theirs.grad)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_packed_input_in_the_callers_order(as_tensor: bool) -> None:
    block, _ = pair()
    lengths, loops = [3, 5, 1, 4], [2, 4, 0, 4]
    cu = [0, *np.cumsum(lengths).tolist()]
    x = torch.randn(13, D, dtype=torch.float64)
    out = block(
        x,
        torch.tensor(loops) if as_tensor else loops,
        cu_seqlens=torch.tensor(cu, dtype=torch.int32) if as_tensor else cu,
    )
    for i, (a, b) in enumerate(zip(cu[:-1], cu[1:], strict=True)):
        alone = block(x[None, a:b], loops[i])[0]
        assert_close(f"sequence {i}", out[a:b], alone, 1e-13)


def test_states_are_in_the_callers_order() -> None:
    block, eager = pair()
    x, loops = torch.randn(3, 4, D, dtype=torch.float64), [1, 3, 2]
    truth = list(eager.states(x, 3))
    states = block(x, loops, return_states=True)
    for t, members in enumerate(([0, 1, 2], [1, 2], [1]), start=1):
        assert_close(f"state {t}", states[t - 1], truth[t - 1][members])
    chosen = block(x, loops, return_states=[3, 1])
    assert [len(s) for s in chosen] == [3, 1]  # ascending
    assert_bitwise("state 3", chosen[1], states[2])
    packed = block(x.flatten(0, 1), loops, cu_seqlens=[0, 4, 8, 12], return_states=True)
    assert_bitwise("packed", packed[1], states[1].flatten(0, 1))


@pytest.mark.parametrize("truncate", [1, 2, 10])
def test_truncation_is_no_grad_for_the_first_iterations(truncate: int) -> None:
    block, eager = pair()
    x = torch.randn(2, 3, D, dtype=torch.float64)
    for loops in (0, 1, 4):
        h = x
        with torch.no_grad():
            for _ in range(loops - truncate):
                h = eager(h, 1)
        eager.zero_grad()
        block.zero_grad()
        out = eager(h, min(loops, truncate))
        ours = block(x, loops, truncate=truncate)
        assert_close("output", ours, out)
        if loops:
            out.square().sum().backward()
            ours.square().sum().backward()
            for (name, p), q in zip(block.named_parameters(), eager.parameters(), strict=True):
                assert_close(name, p.grad, q.grad)


def test_positions() -> None:
    block, _ = pair()
    x = torch.randn(2, 4, D, dtype=torch.float64)
    plain = block(x, 2)
    shifted = block(x, 2, positions=torch.arange(4) + 50)
    assert_close("RoPE sees distances only", shifted, plain, 1e-5)  # angles are fp32
    stretched = block(x, 2, positions=3 * torch.arange(4))
    assert float((stretched - plain).detach().abs().max()) > 1e-3
    packed = block(
        x.flatten(0, 1), [2, 2], cu_seqlens=[0, 4, 8], positions=3 * torch.arange(4).repeat(2)
    )
    assert_bitwise("packed", packed, stretched.flatten(0, 1))


def test_cost_grows_with_the_loops_of_each_sequence(monkeypatch) -> None:
    # Not time, which a busy machine makes unsure, but the rows that GEMMs see.
    block, _ = pair()
    seen = []
    ops = select("torch")
    counted = ops._replace(mlp_fwd=lambda x, *a: seen.append(len(x)) or ops.mlp_fwd(x, *a))
    monkeypatch.setattr("relay_fast.models.looped_block.select", lambda *_: counted)
    lengths, loops = [3, 5, 1, 4], [2, 4, 0, 4]
    with torch.no_grad():
        block(torch.randn(13, D).double(), loops, cu_seqlens=[0, 3, 8, 9, 13])
    assert sum(seen) == 2 * sum(n * t for n, t in zip(lengths, loops, strict=True))  # two layers


def test_bad_input_of_the_block() -> None:
    block = LoopedBlock(D, 2, 1, max_loops=4)
    x = torch.randn(2, 3, D)
    cases = [
        (lambda: block(torch.randn(2, 3, D + 1)), "x has shape .* pass"),
        (lambda: block(torch.randn(6, D)), "together with"),
        (lambda: block(x, cu_seqlens=[0, 6]), "together with"),
        (lambda: block(x.flatten(0, 1), cu_seqlens=[0, 3]), "cu_seqlens ends at 3"),
        (lambda: block(x.flatten(0, 1), cu_seqlens=[1, 6]), r"start at 0, not at \[1\]"),
        (
            lambda: block(x.flatten(0, 1), cu_seqlens=[0, 4, 3, 6]),
            "decreases from 4 to 3 at sequence 1",
        ),
        (lambda: block(x.flatten(0, 1), cu_seqlens=[]), r"start at 0, not at \[\]"),
        (lambda: block(x, [1, 2, 3]), "the batch holds 2 sequences"),
        (lambda: block(x, -1), "negative"),
        (lambda: block(x, 5), "build the block with a larger max_loops"),
        (lambda: block(x, 2, return_states=[3]), "has iterations .3.: give iterations in"),
        (lambda: block(x, 2, return_states=[0]), "has iterations .0.: give"),
        (lambda: block(x, 2, return_states=1), "return_states = 1: pass True for all states, or"),
        (lambda: block(x, 2, truncate=-1), "truncate = -1: .* 0 or more; use None for all"),
        (lambda: block(x, 2, truncate=1.5), "truncate = 1.5: .* a whole number of iterations"),
        (
            lambda: block(x, 2, positions=torch.arange(5)),
            r"positions has shape \(5,\) but x has \(2, 3, 16\): pass \(2, 3\) or \(3,\)",
        ),
        (lambda: LoopedBlock(D, 2, 1, recompute="sometimes"), "recompute policy 'sometimes'"),
        (lambda: LoopedBlock(D, 2, 1, impl="cuda"), "impl = 'cuda' is unknown"),
        (lambda: LoopedBlock(D, 3, 1), "not divisible by n_heads"),
        (lambda: LoopedBlock(D), "n_heads is missing: a block needs d_model, n_heads and"),
        (
            lambda: LoopedBlock(D, 2, 1, config=block.config),
            "config and d_model, n_heads, n_layers",
        ),
        (lambda: LoopedBlock(config=block.config, dropout=0.5), "config and dropout are both"),
        (lambda: LoopedBlock(D, 2, 1, n_kv_heads=-1), "n_kv_heads = -1: it must be at least 1"),
        (lambda: LoopedBlock(D, 2, 1, d_hidden=-8), "d_hidden = -8: it must be at least 1"),
        (lambda: LoopedBlock(D, 2, 1, max_loops=-1), "max_loops = -1: it must be 0 or more"),
        (lambda: LoopedBlock(D, 2, 1, state_noise=-1), "state_noise = -1: it must be 0 or more"),
        (
            lambda: LoopedBlock(D, 2, 1, recompute="budget:8")(x, 3),
            "is too small .* at least 'budget:",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_input_of_a_wrong_type() -> None:
    block, x = LoopedBlock(D, 2, 1, max_loops=4), torch.randn(2, 3, D)
    wrong_types = [
        (lambda: block(x, 1.5), "loops must be integers"),
        (lambda: block(x, [[1], [2, 3]]), "loops = .* pass an int or one int per sequence"),
        (lambda: block(x.long()), "x is torch.int64, .* embed the tokens first"),
        (
            lambda: block(x, positions=torch.rand(3)),
            "positions must be integers, got torch.float32",
        ),
        (
            lambda: block(x.flatten(0, 1), cu_seqlens=[0, 6.0]),
            "cu_seqlens must be integers, got fl",
        ),
    ]
    for call, message in wrong_types:
        with pytest.raises(TypeError, match=message):
            call()


def test_parts_must_be_those_of_the_config() -> None:
    x = torch.randn(2, 3, D)
    options = {"bias": True, "norm": "layer", "activation": "swiglu", "loop_norm": "pre",
               "injection": "concat", "max_loops": 3}  # fmt: skip
    for kept in ({}, options):
        block = LoopedBlock(D, 2, 2, **kept)
        named = dict(block.named_parameters())
        assert list(block.weights().names) == list(named)
        assert all(a is b for a, b in zip(block.weights().tensors, named.values(), strict=True))

    def refused(change, missing: str, unknown: str, **options) -> None:
        block = LoopedBlock(D, 2, 1, **options)
        change(block)
        message = rf"missing: \[{missing}\], unknown: \[{unknown}\]"
        with pytest.raises(RuntimeError, match=message):
            block(x)

    linear = lambda **k: torch.nn.Linear(D, 3 * D, **k)
    refused(lambda b: delattr(b.layers[0], "qkv"), "'layers.0.qkv'", "")
    refused(lambda b: setattr(b.layers[0], "extra", linear()), "", "'layers.0.extra.weight', .*")
    refused(lambda b: setattr(b, "extra", linear(bias=False)), "", "'extra.weight'")
    refused(lambda b: setattr(b.layers[0], "qkv", linear()), "", "'layers.0.qkv.bias'")
    refused(
        lambda b: setattr(b.layers[0], "qkv", linear(bias=False)),
        "'layers.0.qkv.bias'",
        "",
        bias=True,
    )
    own = lambda b: b.layers[0].register_parameter("own", torch.nn.Parameter(torch.ones(D)))
    refused(own, "", "'layers.0.own'")
    refused(lambda b: b.layers.pop(0), "'layers.0.*", "")
    block = LoopedBlock(D, 2, 1, bias=True)
    prune.l1_unstructured(block.layers[0].up, "weight", amount=0.5)
    prune.remove(block.layers[0].up, "weight")  # which puts it after the bias
    named = [n for n, _ in block.named_parameters()]
    assert named != list(block.weights().names) and set(named) == set(block.weights().names)
    block(x).sum().backward()
    assert all(p.grad is not None for p in block.parameters())


def samples() -> Samples:
    rng = np.random.default_rng(0)
    sizes = (("arithmetic", 7), ("edit_distance", 9), ("lis", 35))
    return Samples.concat([TASKS[n].sample(rng.integers(3, m, 3), seed=1) for n, m in sizes])


def model_config(**options) -> ModelConfig:
    return ModelConfig(BlockConfig(D, 2, 2, **options), 320)


@pytest.mark.parametrize("policy", ["none", "state", "last:2"])
def test_looped_transformer_equals_eager(policy: str) -> None:
    config, batch = model_config(), PackedBatch.looped(samples(), TASKS)
    model, eager = LoopedTransformer(config, recompute=policy).double(), EagerTransformer(config)
    eager.double().load_state_dict(model.state_dict())
    losses = model.loss(batch)
    losses.loss.backward()
    for dense in (False, True):
        eager.zero_grad()
        truth = eager.loss(PaddedBatch.of(batch, np.arange(len(batch))), dense=dense)
        truth.backward()
        assert_close("loss", losses.loss, truth)
        for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
            assert_close(name, p.grad, q.grad)


def test_reading_the_chain_agrees_with_the_loss_counts() -> None:
    batch = PackedBatch.looped(samples(), TASKS)
    model = LoopedTransformer(model_config()).eval()
    rounds, answers = model.predict_rounds(batch)
    assert [len(r) for r in rounds] == list(batch.plan.active_rows)
    right = torch.cat(
        [
            r[batch.rows[a:b]] == batch.targets[a:b]
            for r, a, b in zip(rounds, batch.row_offsets[:-1], batch.row_offsets[1:], strict=True)
        ]
    )
    losses = model.loss(batch)
    assert_close("chain", losses.chain_correct, right.float().mean(), 1e-6)
    assert_close("answer", losses.answer_correct, (answers == batch.answers).float().mean(), 1e-6)


def test_autoregressive_model_is_the_causal_block_once() -> None:
    batch = PackedBatch.autoregressive(samples(), TASKS)
    model = AutoregressiveTransformer(model_config(causal=True)).double()
    losses = model.loss(batch)
    x = model.embedding.weight[batch.tokens]
    h = model.block(x, 1, cu_seqlens=batch.plan.cu_seqlens)
    y = torch.nn.functional.rms_norm(h[batch.rows], (D,), model.norm.weight, 1e-6)
    row = torch.nn.functional.cross_entropy(model.chain_head(y), batch.targets, reduction="none")
    assert_close("loss", losses.loss, row @ batch.weights.double(), 1e-7)
    assert len(model.teacher_forced_correct(batch)) == len(batch.targets)


def test_empty_batch() -> None:
    batch = PackedBatch.looped(samples().take(slice(0, 0)), TASKS)
    model = LoopedTransformer(model_config())
    loss = model.loss(batch).loss
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_models_refuse_what_does_not_fit() -> None:
    batch = PackedBatch.looped(samples(), TASKS)
    with pytest.raises(ValueError, match="outside the model's vocabulary of 10"):
        LoopedTransformer(ModelConfig(BlockConfig(D, 2, 1), 10)).loss(batch)
    with pytest.raises(ValueError, match="longer than the model's limit of 5"):
        LoopedTransformer(ModelConfig(BlockConfig(D, 2, 1), 320, max_tokens=5)).loss(batch)
    with pytest.raises(ValueError, match="causal=True"):
        AutoregressiveTransformer(model_config())
    with pytest.raises(ValueError, match="supervise = 'rounds' is unknown"):
        LoopedTransformer(model_config(), supervise="rounds")


def test_grad_scaling() -> None:
    torch.manual_seed(0)
    block, x = LoopedBlock(16, 2, 1), torch.randn(3, 5, 16)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    loss = lambda x: block(x, 3).square().mean()
    loss(x).backward()
    plain = [p.grad.clone() for p in block.parameters()]
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss(x)).backward()
    scaler.unscale_(optimizer)
    for want, p in zip(plain, block.parameters(), strict=True):
        assert torch.equal(p.grad, want)  # a power of two costs no bit
    scaler.step(optimizer)
    scaler.update()

    before = [p.detach().clone() for p in block.parameters()]
    optimizer.zero_grad()
    scaler.scale(loss(torch.full_like(x, float("inf")))).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(a, b) for a, b in zip(before, block.parameters(), strict=True))
