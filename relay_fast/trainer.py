"""Trains one model on one stream: resumable, interruptible, deterministic from its seed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from relay_fast.checkpoint import (
    load_checkpoint,
    pack_training_state,
    save_checkpoint,
    unpack_training_state,
)
from relay_fast.data import run_ahead
from relay_fast.graphs import GraphedStep, graph_reason, take_step
from relay_fast.modules import AutoregressiveTransformer, LoopedTransformer
from relay_fast.optim import make_optimizer, set_factor
from relay_fast.static import Capacity

Model = LoopedTransformer | AutoregressiveTransformer
BeforeStep = Callable[[int, torch.optim.Optimizer], None]

LOG_EVERY = 2.0  # seconds between two progress reports (each reads a loss back)
SAVE_EVERY = 20.0  # seconds between two resume points
PART_BYTES = 12 << 20  # of a file of the resume point: machines that are lent return small files
CAPACITY_BATCHES = (
    12  # batches, over the whole training, that a CUDA graph's capacity is taken from
)
DTYPES = {"fp32": None, "bf16": torch.bfloat16}


class Progress(NamedTuple):
    """What a training stage reports now and then."""

    step: int
    steps: int
    samples_per_s: float
    loss: float
    chain_accuracy: float


class Trained(NamedTuple):
    """What a finished training leaves beside the model."""

    history: list[dict[str, float]]  # step, loss, chain_accuracy, answer_accuracy
    longest_true: dict[str, int]
    seconds: float  # over all the calls that it took


def train_model(
    model: Model,
    stream: Dataset,
    recipe: Mapping[str, Any],
    state_path: str | os.PathLike,
    *,
    seed: int,
    data_workers: int = 0,
    report: Callable[[Progress], None] = lambda progress: None,
    before_step: BeforeStep | None = None,
) -> Trained:
    """Takes every step of `stream`, in place; continues from `state_path` if it is there.

    recipe: lr, muon_lr, weight_decay, betas, clip, ema, autocast ("bf16": of the GEMMs), graph (on
    CUDA, a step is one CUDA graph where that can be had). Interrupted (Ctrl-C), it saves its state
    between two steps and raises KeyboardInterrupt; the same call then continues exactly, and
    returns at once where the last step was taken. before_step(step, optimizer) may change model and
    optimizer, as `relay_fast.growth.grow` does (without ema); a call that continues first calls it
    for the steps that were taken.
    """
    training = _Training(model, stream, recipe, Path(state_path), seed, before_step)
    with _interrupts_deferred() as asked:
        return training.run(data_workers, report, asked)


@contextmanager
def _interrupts_deferred() -> Iterator[Callable[[], bool]]:
    """Yields whether Ctrl-C was pressed meanwhile, instead of raising in the middle of a step or
    of saving. Outside the main thread, which gets no signals, it changes nothing."""
    asked: list[int] = []
    here = threading.current_thread() is threading.main_thread()
    kinds = (signal.SIGINT, signal.SIGTERM) if here else ()
    kinds = [kind for kind in kinds if signal.getsignal(kind) is signal.default_int_handler]
    for kind in kinds:
        signal.signal(kind, lambda number, _: asked.append(number))
    try:
        yield lambda: bool(asked)
    finally:
        for kind in kinds:
            signal.signal(kind, signal.default_int_handler)


class _Training:
    def __init__(
        self,
        model: Model,
        stream: Dataset,
        recipe: Mapping,
        path: Path,
        seed: int,
        before_step: BeforeStep | None,
    ):
        self.model, self.stream, self.path = model.train(), stream, path
        self.before_step = before_step or (lambda step, optimizer: None)
        self.clip, self.ema_decay = recipe.get("clip"), recipe.get("ema")
        self.identity = {"seed": seed, "steps": len(stream), "recipe": dict(recipe)}
        options = {k: recipe[k] for k in ("weight_decay", "betas", "muon_lr") if k in recipe}
        self.optimizer = make_optimizer(model, lr=recipe["lr"], **options)
        self.ema = None
        if self.ema_decay:
            self.ema = {name: p.detach().clone() for name, p in model.named_parameters()}
        torch.manual_seed(seed)
        self.step, self.seconds = 0, 0.0
        self.history: list[dict[str, float]] = []
        self.longest_true: dict[str, int] = {}
        self._generators = {"cpu": torch.default_generator}
        if model.device.type == "cuda":
            self._generators["cuda"] = torch.cuda.default_generators[model.device.index or 0]
        self.take = self._step_taker(DTYPES[recipe.get("autocast", "fp32")], recipe.get("graph"))
        if path.exists():
            self._resume()

    def _step_taker(self, autocast: torch.dtype | None, graph: bool | None) -> Callable:
        options = {"clip": self.clip, "autocast": autocast}
        if not graph or graph_reason(self.model.device, self.optimizer):
            return partial(take_step, self.model, self.optimizer, **options)
        steps = np.linspace(0, len(self.stream) - 1, CAPACITY_BATCHES).astype(int)
        capacity = Capacity.of(self.stream[step].batch for step in sorted(set(steps.tolist())))
        return GraphedStep(self.model, self.optimizer, capacity, **options)

    def run(
        self, data_workers: int, report: Callable[[Progress], None], asked: Callable[[], bool]
    ) -> Trained:
        started, spent = time.monotonic(), self.seconds
        logged, saved, first = started, started, self.step
        samples = 0
        try:
            for batch, longest_true in run_ahead(self.stream, self.step, data_workers):
                self.before_step(self.step, self.optimizer)
                losses = self._train_step(batch.to(self.model.device))
                samples += len(batch)
                for name, length in longest_true.items():
                    self.longest_true[name] = max(length, self.longest_true.get(name, 0))
                now = time.monotonic()
                self.seconds = spent + now - started
                last = self.step == len(self.stream)
                if now - logged >= LOG_EVERY or self.step == first + 1 or last:
                    report(self._log(losses, samples / (now - started)))
                    logged = now
                if last or now - saved >= SAVE_EVERY:
                    self._save()
                    saved = now
                if asked():
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            self._save()
            raise
        if self.ema is not None:
            with torch.no_grad():
                for name, p in self.model.named_parameters():
                    p.copy_(self.ema[name])
        self.model.eval()
        return Trained(self.history, self.longest_true, self.seconds)

    def _train_step(self, batch):
        set_factor(self.optimizer, self.stream.schedule.factor(self.step))
        losses = self.take(batch)
        self.step += 1
        if self.ema is not None:
            with torch.no_grad():
                decay = min(self.ema_decay, self.step / (self.step + 10))
                torch._foreach_lerp_(
                    list(self.ema.values()), list(self.model.parameters()), 1 - decay
                )
        return losses

    def _log(self, losses, samples_per_s: float) -> Progress:
        entry = {
            "step": self.step,
            "loss": losses.loss.item(),
            "chain_accuracy": losses.chain_correct.item(),
            "answer_accuracy": losses.answer_correct.item(),
        }
        self.history.append(entry)
        return Progress(
            self.step, len(self.stream), samples_per_s, entry["loss"], entry["chain_accuracy"]
        )

    def _save(self) -> None:
        if not self.step:
            return
        tensors = pack_training_state(self.model, self.optimizer, self.ema, self._generators)
        metadata = {
            "config": self.identity,
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            "longest_true": self.longest_true,
        }
        save_checkpoint(self.path, tensors, metadata, PART_BYTES)

    def _resume(self) -> None:
        tensors, metadata = load_checkpoint(self.path, expect=self.identity)
        for step in range(metadata["step"]):
            self.before_step(step, self.optimizer)
        unpack_training_state(
            tensors, self.model, self.optimizer, self.ema, self._generators, self.path
        )
        self.step, self.seconds = metadata["step"], metadata["seconds"]
        self.history, self.longest_true = metadata["history"], metadata["longest_true"]
