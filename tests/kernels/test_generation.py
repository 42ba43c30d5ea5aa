"""Generation under impl="triton": the whole-loop kernel where it serves, the same tokens always."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import torch

from benchmarks import interpreter
from relay_fast.batch.capacity import Capacity, CapacityBatch
from relay_fast.batch.packed import PackedBatch
from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.decoding.autoregressive import decode
from relay_fast.decoding.chains import generate_looped_chains
from relay_fast.decoding.scores import read_scored
from relay_fast.engine.fused_inference import block_reason, run_fused_loop
from relay_fast.models.transformers import AutoregressiveTransformer, LoopedTransformer
from relay_fast.tasks import Samples, Vocabulary, build_tasks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreter.mend()
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
TASKS = build_tasks(["arithmetic"], Vocabulary(max_number=10, multiple=1))


def problems() -> Samples:
    """Of 1, 3 and 2 rounds: the active prefix shrinks, and the order is not the engine's."""
    return TASKS["arithmetic"].sample(np.array([1, 3, 2, 2]), 0)


def model(impl: str, **options) -> LoopedTransformer:
    torch.manual_seed(0)
    block = BlockConfig(16, 2, 1, **options)
    vocabulary = TASKS["arithmetic"].vocabulary.size
    return LoopedTransformer(ModelConfig(block, vocabulary, 64), impl=impl).to(DEVICE)


def launches(impl: str, **options) -> tuple[Samples, int]:
    """What the model writes, and how many launches of the whole-loop kernel it took."""
    from relay_fast.kernels import loop

    written = model(impl, **options)
    calls = []

    def counted(*arguments):
        calls.append(1)
        return original(*arguments)

    run, original = written.block.run, loop.loop_fwd

    def counting_run(*arguments, **more):
        made = run(*arguments, **more)
        if made.ops.loop_fwd is None:
            return made
        return type(made)(**{**vars(made), "ops": made.ops._replace(loop_fwd=counted)})

    with patch.object(written.block, "run", counting_run):
        return generate_looped_chains(written, problems(), TASKS), len(calls)


@pytest.mark.parametrize(
    ("options", "served"),
    [
        ({}, True),
        ({"activation": "swiglu", "n_kv_heads": 1, "loop_norm": "post", "norm": "layer"}, True),
        ({"rope_base": None, "causal": True, "activation": "relu2"}, True),
        ({"injection": "add"}, False),
        ({"bias": True, "norm": "layer"}, False),
        ({"head_dim": 12, "rotary_share": 0.5, "rope_scale": 1.5}, True),
    ],
)
def test_generation_writes_the_same_tokens(options: dict, served: bool) -> None:
    value, count = launches("triton", **options)
    expected, none = launches("torch", **options)
    assert (count, none) == (int(served), 0)
    for name in ("rounds", "round_offsets", "loops", "answer"):
        assert np.array_equal(getattr(value, name), getattr(expected, name)), name
    with torch.no_grad():
        batch = PackedBatch.looped(problems(), TASKS, device=DEVICE)
        read, truth = (
            model(impl, **options).eval().predict_rounds(batch) for impl in ("triton", "torch")
        )
    assert [len(ids) for ids in read[0]] == list(batch.plan.active_rows)
    assert torch.equal(torch.cat([*read[0], read[1]]), torch.cat([*truth[0], truth[1]]))


@pytest.mark.parametrize("options", [{}, {"head_dim": 12, "qk_norm": True, "sandwich_norm": True}])
def test_decoding_writes_the_same_tokens(options: dict) -> None:
    """The step of the kernels, and the one of plain torch, which has ops of its own."""
    prompts = np.array([2, 45, 9, 46, 5, 2, 44]), np.array([0, 5, 7])
    written = []
    for impl in ("triton", "torch"):
        torch.manual_seed(0)
        config = ModelConfig(BlockConfig(16, 2, 1, causal=True, **options), 60, 64)
        writer = AutoregressiveTransformer(config, impl=impl).to(DEVICE)
        written.append(decode(writer, *prompts, max_new=3).tokens.tolist())
    assert written[0] == written[1] and len(written[0]) == 6


def test_why_the_kernel_does_not_serve() -> None:
    reason = lambda training=False, **options: block_reason(
        BlockConfig(16, 2, 1, **options), training
    )
    assert reason() is None and reason(dropout=0.1) is None
    assert reason(bias=True) == "the whole-loop kernel does not support biases"
    assert "neither input injection nor a loop-index embedding" in reason(injection="concat")
    assert "neither input injection nor a loop-index embedding" in reason(max_loops=4)
    assert "loop_norm='pre'" in reason(loop_norm="pre")
    assert "neither dropout nor state noise" in reason(dropout=0.1, training=True)

    def read(impl: str) -> str:
        looped = model(impl)
        sample = TASKS["arithmetic"].sample(np.array([20]), 0)
        batch = PackedBatch.looped(sample, TASKS, device=DEVICE)
        return run_fused_loop(
            looped.config.block,
            looped.block.run(batch.plan),
            looped.embed(batch),
            dict(looped.block.named_parameters()),
            looped.norm.weight,
            looped.chain_head.weight,
        )

    assert read("torch") == "plain torch has no whole-loop kernel"
    assert "supports sequences of up to 32 rows, not" in read("triton")


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_fixed_capacity_batch_is_refused(impl) -> None:
    """Its plan's sizes are a capacity's: chains of them would be wrong."""
    looped = model(impl).eval()
    batch = PackedBatch.looped(problems(), TASKS, device=DEVICE)
    static = CapacityBatch(Capacity.of([batch], 0.5), DEVICE)
    static.load(batch)
    for read in (looped.predict_rounds, lambda batch: read_scored(looped, batch)):
        with pytest.raises(
            ValueError, match="fixed-capacity batches are for training: generate from"
        ):
            read(static.batch)
    run = looped.block.run(static.plan)
    if run.ops.loop_fwd is not None:
        weights = (
            dict(looped.block.named_parameters()),
            looped.norm.weight,
            looped.chain_head.weight,
        )
        reason = run_fused_loop(looped.config.block, run, looped.embed(static.batch), *weights)
        assert reason == "the whole-loop kernel does not support fixed-capacity batches"
