"""The warm-up calls what a run will call, and leaves nothing behind."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import relay_fast
from benchmarks.common import synthetic_batch
from relay_fast.batch.capacity import Capacity, CapacityBatch
from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.data.streams import BatchFormat, TruthStream
from relay_fast.kernels.attention_ref import PaddedLayout
from relay_fast.models.looped_block import LoopedBlock
from relay_fast.models.transformers import AutoregressiveTransformer, LoopedTransformer
from relay_fast.ops import dispatch
from relay_fast.tasks import Vocabulary, build_tasks
from relay_fast.training import trainer
from relay_fast.training.schedule import Schedule
from relay_fast.training.trainer import train_model
from relay_fast.training.warmup import warmup

VOCABULARY = 40
BLOCK = BlockConfig(16, 2, 1, causal=True, dropout=0.3)
BATCH = synthetic_batch(np.array([40, 3]), np.array([2, 1]), 2, VOCABULARY)


@pytest.fixture
def longest(monkeypatch) -> list[tuple[str, int]]:
    """The longest sequence of every attention call, forward and backward."""
    seen: list[tuple[str, int]] = []

    def watched(name: str):
        op = getattr(dispatch.TORCH, name)

        def call(*args, **kwargs):
            layout = next(a for a in args if isinstance(a, PaddedLayout))
            seen.append((name, layout.max_length))
            return op(*args, **kwargs)

        return call

    names = ("attention_fwd", "attention_bwd")
    ops = dispatch.TORCH._replace(**{name: watched(name) for name in names})
    monkeypatch.setattr("relay_fast.models.looped_block.select", lambda *_: ops)
    monkeypatch.setattr("relay_fast.engine.block_iteration.TORCH", ops)
    return seen


def test_a_training_run_is_warmed_up_and_nothing_changes(longest: list) -> None:
    model = LoopedTransformer(ModelConfig(BLOCK, VOCABULARY), impl="torch").train()
    model.loss(BATCH).loss.backward()
    before = [(p.detach().clone(), p.grad.clone()) for p in model.parameters()]
    capacity = Capacity.of([BATCH])
    longest.clear()
    random = torch.get_rng_state()
    relay_fast.warmup(model, [BATCH, capacity])
    assert torch.equal(random, torch.get_rng_state())
    assert model.training
    for p, (value, grad) in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, value) and torch.equal(p.grad, grad)
    backward = [n for name, n in longest if name == "attention_bwd"]
    # Two iterations of the batch and two of the capacity, then shorter sequences by themselves:
    # other batches' last iterations may hold only such.
    assert backward == [40] * 4 + [16, 32]


def test_models_in_eval_mode_read(longest: list) -> None:
    config = ModelConfig(BLOCK, VOCABULARY)
    for model in (LoopedTransformer(config), AutoregressiveTransformer(config)):
        longest.clear()
        relay_fast.warmup(model.eval(), [BATCH])
        assert {name for name, _ in longest} == {"attention_fwd"}
        assert {n for _, n in longest} == {40, 16, 32}
        assert all(p.grad is None for p in model.parameters())


def test_a_block_gets_its_arguments(longest: list) -> None:
    block = LoopedBlock(config=BLOCK)
    relay_fast.warmup(block, [(torch.zeros(2, 5, 16), 3), torch.zeros(1, 7, 16)])
    assert [n for name, n in longest if name == "attention_bwd"] == [5, 5, 5, 7]


def test_a_capacity_is_warmed_up_without_live_rows() -> None:
    static = CapacityBatch(Capacity.of([BATCH]), "cpu").batch
    assert int(static.plan.row_count(1)) == 0


def test_a_bar_on_a_terminal_only(monkeypatch, capsys) -> None:
    model = LoopedTransformer(ModelConfig(BLOCK, VOCABULARY), impl="torch")
    relay_fast.warmup(model, [BATCH])
    assert capsys.readouterr().out == ""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    relay_fast.warmup(model, [BATCH], show=False)
    assert terminal.getvalue() == ""
    relay_fast.warmup(model, [BATCH])
    assert "compiling kernels" in terminal.getvalue() and "100%" in terminal.getvalue()


# In a training

NUMBERS = Vocabulary(max_number=2, multiple=4)
RECIPE = {"lr": 3e-3, "optimizer": "adamw", "clip": 1.0}


def numbers_model(**options) -> LoopedTransformer:
    torch.manual_seed(1)
    return LoopedTransformer(
        ModelConfig(BlockConfig(16, 2, 1, dropout=0.2), NUMBERS.size, 64), **options
    )


def numbers_stream(steps: int) -> TruthStream:
    """Problems of up to nine operators, the longer ones later."""
    tasks = build_tasks(["arithmetic"], NUMBERS, arithmetic={"prime": 3, "operators": "+"})
    schedule, form = Schedule.by_steps(steps), BatchFormat("looped")
    return TruthStream(tasks, {"arithmetic": (1, 9)}, form, schedule, batch_size=8, seed=0)


def trained(tmp_path: Path, name: str = "", steps: int = 3, **options) -> list[torch.Tensor]:
    """The parameters after a training with dropout, whose random numbers a call would move."""
    model = numbers_model()
    train_model(model, numbers_stream(steps), RECIPE, tmp_path / f"{name}.state", seed=3, **options)
    return [p.detach() for p in model.parameters()]


def test_a_training_compiles_first_and_is_the_same(tmp_path: Path, monkeypatch) -> None:
    without, calls, said = trained(tmp_path, "without"), [], []
    monkeypatch.setattr(trainer, "WARMED_UP", ("cpu",))

    def watched(model, batches, **options):
        calls.append((len(batches), options["autocast"]))
        warmup(model, batches, **options)

    monkeypatch.setattr(trainer, "warmup", watched)
    with_it = trained(tmp_path, "with", on_compiling=said.append)
    assert calls == [(2, None)]  # the first batch and the last one
    assert [c.done for c in said] == list(range(said[0].total + 1)) and said[0].total >= 2
    assert all(map(torch.equal, with_it, without))
    for options, variable in (({"warm_up": False}, "1"), ({}, "0")):
        monkeypatch.setenv("RELAY_FAST_WARM_UP", variable)
        trained(tmp_path, f"left out {variable}", **options)
    monkeypatch.delenv("RELAY_FAST_WARM_UP")
    trained(tmp_path, "with")  # has taken all its steps
    assert len(calls) == 1


STEADY = """
import sys
from pathlib import Path
from benchmarks.stub_driver import installed
from relay_fast.training import trainer
from tests.training import test_warmup as here
trainer.WARMED_UP, trainer.PART_TOKENS["meta"] = ("meta",), 1 << 17
model, stream = here.numbers_model(impl="triton").to("meta"), here.numbers_stream(9)
with installed(90, compile=False) as log:
    training = trainer._Training(model, stream, here.RECIPE, Path(sys.argv[1]), 0, None)
    training.warm_up(lambda compiling: None)
    warm = log.variant_count
    for step in range(9):
        model(stream[step].batch.to("meta")).loss.backward()
print(warm, log.variant_count)
"""


def test_no_step_after_it_needs_another_variant(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", STEADY, str(tmp_path / "state")]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    warm, last = map(int, done.stdout.split())
    assert warm == last > 10
