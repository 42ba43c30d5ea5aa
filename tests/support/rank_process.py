"""One rank of a training, started as torchrun starts it. A case `NAME@STEP:RANK` is interrupted on
that rank at that step."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import torch

from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.data.streams import BatchFormat, TruthStream
from relay_fast.models.transformers import AutoregressiveTransformer, LoopedTransformer
from relay_fast.training import trainer
from relay_fast.training.ranks import Ranks, joined_ranks
from relay_fast.training.schedule import Schedule
from relay_fast.utils.interrupts import interrupt_once, on_interrupt
from tests.support.fed_models import TASKS, VOCABULARY
from tests.support.forked import ended, start_ranks

STEPS = 30
RECIPE = {"lr": 3e-3, "muon_lr": 0.02, "weight_decay": 0.01, "betas": [0.9, 0.95], "clip": 1.0}
RANGES = {"arithmetic": (1, 4), "edit_distance": (1, 4), "lis": (1, 9)}
FED = {"feedback": "tokens", "feedback_noise": 0.1}
CASES = {  # options of the model, recompute policy
    "none": ({}, "none"),
    "sqrt": ({}, "sqrt"),
    "fed": (FED, "state"),
    "carried": (FED | {"carry_state": True}, "state"),
    "autoregressive": (None, "none"),
}


def make(case: str):
    """Returns the model and the stream of a case: all random options on, six samples a step."""
    options, recompute = CASES[case]
    torch.manual_seed(1)
    block = BlockConfig(16, 2, 1, causal=options is None, dropout=0.1, state_noise=0.1)
    if options is None:
        model = AutoregressiveTransformer(ModelConfig(block, VOCABULARY.size))
        form = BatchFormat("autoregressive")
    else:
        config = ModelConfig(block, VOCABULARY.size, **options)
        model = LoopedTransformer(config, recompute=recompute)
        fed, carried = config.feedback != "none", config.carry_state
        form = BatchFormat("looped", feedback=fed, carry_state=carried)
    stream = TruthStream(
        TASKS,
        RANGES,
        form,
        Schedule.by_steps(STEPS),
        batch_size=6,
        seed=0,
        truth=0.5 if form.carry_state else 1.0,
    )
    return model.double(), stream


def run(case: str, folder: Path, ranks: Ranks) -> dict:
    """Trains; returns the loss of every step, the rows of the ranks and the sum of the weights."""
    case, _, stop = case.partition("@")
    step, rank = map(int, stop.split(":")) if stop else (-1, -1)

    def interrupt(now: int, _) -> None:
        if (now, ranks.rank) == (step, rank):
            os.kill(os.getpid(), signal.SIGTERM)

    model, stream = make(case)
    try:
        trained = trainer.train_model(
            model,
            stream,
            RECIPE,
            folder / f"{case}.state.safetensors",
            seed=3,
            before_step=interrupt,
            ranks=ranks,
        )
    except KeyboardInterrupt:
        return {"interrupted": True}
    weights = sum(p.abs().sum().item() for p in model.parameters())
    losses = {entry["step"]: entry["loss"] for entry in trained.history}
    return {"losses": list(losses.values()), "rows": trained.rows, "weights": weights}


def start(size: int, folder: Path, *cases: str) -> list[dict]:
    """Runs cases in `size` processes; returns what each rank found, by case."""
    found = ended(start_ranks(size, folder, _rank, folder, cases))
    assert [rank.code for rank in found] == [0] * size, found
    return [json.loads((folder / f"rank{r}.json").read_text()) for r in range(size)]


def _rank(folder: Path, cases: tuple[str, ...]) -> None:
    trainer.LOG_EVERY = 0.0
    with joined_ranks("cpu") as (ranks, _):
        found = {}
        for case in cases:
            on_interrupt(interrupt_once)
            found[case] = run(case, folder, ranks)
    (folder / f"rank{ranks.rank}.json").write_text(json.dumps(found))
