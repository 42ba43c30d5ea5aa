"""Training of one model on one stream: resumable, interruptible, deterministic from its seed."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from relay_fast.batch.capacity import Capacity
from relay_fast.batch.packed import PackedBatch
from relay_fast.data.streams import Step, prefetch
from relay_fast.models.transformers import AutoregressiveTransformer, LoopedTransformer, Losses
from relay_fast.reporting.progress import Compiling, Progress
from relay_fast.training.checkpoint import pack_training_state, unpack_training_state
from relay_fast.training.cuda_graph import PART_TOKENS, GraphedStep, graph_reason, take_step
from relay_fast.training.exchange import Exchange
from relay_fast.training.optim import make_optimizer, set_lr_scale
from relay_fast.training.ranks import Ranks, Stopped
from relay_fast.training.warmup import warmup
from relay_fast.utils.errors import Diverged
from relay_fast.utils.files import finite
from relay_fast.utils.interrupts import interrupts_deferred
from relay_fast.utils.numbers import as_int, plain_numbers
from relay_fast.utils.precision import autocast_dtype
from relay_fast.utils.tensor_files import load_checkpoint, save_checkpoint

Model = LoopedTransformer | AutoregressiveTransformer
BeforeStep = Callable[[int, torch.optim.Optimizer], None]

LOG_EVERY = 2.0  # seconds between two progress reports (each reads a loss back)
SAVE_EVERY = 20.0  # seconds between two resume points
PART_BYTES = 12 << 20  # split the files of a resume point at this size
# A CUDA graph's capacity: the largest of so many batches, enlarged by slack and spread. None of 400
# other batches of preset paper-fast exceeded it (12 % do at slack 0.1 without the spread).
CAPACITY_BATCHES, SLACK, SPREAD = 12, 0.05, 2.0
WARMED_UP = ("cuda",)  # kinds of devices for which kernels are compiled


class Trained(NamedTuple):
    """The record of a finished training; times include all resumed calls."""

    history: list[dict[str, float]]  # step, seconds, loss, chain_accuracy, answer_accuracy
    longest_true: dict[str, int]  # the longest true problem of each task
    seconds: float
    samples: int
    data_wait_seconds: float  # spent waiting for batches, or making them without data workers
    cuda_graph: str  # "replayed", or why the last step did not replay a CUDA graph
    cpu_seconds: float = 0.0  # of this process, all its threads; data workers not counted
    rows: tuple[int, ...] = ()  # token-iterations of each rank in this call, if there are several

    @staticmethod
    def of_phases(phases: Sequence[Trained]) -> Trained:
        """Combines the records of consecutive trainings; steps count from 1 in each."""
        history: list[dict[str, float]] = []
        longest_true: dict[str, int] = {}
        seconds = 0.0
        for phase in phases:
            history += [
                {**e, "seconds": round(e.get("seconds", 0.0) + seconds, 3)} for e in phase.history
            ]
            _raise_to(longest_true, phase.longest_true)
            seconds += phase.seconds
        samples = sum(phase.samples for phase in phases)
        waited = sum(phase.data_wait_seconds for phase in phases)
        cpu = sum(phase.cpu_seconds for phase in phases)
        rows = tuple(int(sum(own)) for own in zip(*(p.rows for p in phases), strict=False))
        graph = phases[-1].cuda_graph
        return Trained(history, longest_true, seconds, samples, waited, graph, cpu, rows)

    def record(self) -> dict[str, Any]:
        """Returns the entries of results.json about the time that the training took."""
        rows = {"token_iterations_by_rank": list(self.rows)} if self.rows else {}
        return {
            "seconds": round(self.seconds, 2),
            "cpu_seconds": round(self.cpu_seconds, 2),
            "samples": self.samples,
            "samples_per_s": round(self.samples / self.seconds, 1),
            "data_wait_share": round(self.data_wait_seconds / self.seconds, 4),
            "cuda_graph": self.cuda_graph,
            **rows,
        }


def _raise_to(longest: dict[str, int], found: Mapping[str, int]) -> None:
    """Raises each task's entry to at least the one in `found`."""
    for name, length in found.items():
        longest[name] = max(length, longest.get(name, 0))


def train_model(
    model: Model,
    stream: Dataset,
    recipe: Mapping[str, Any],
    state_path: str | os.PathLike,
    *,
    seed: int,
    data_workers: int = 0,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    before_step: BeforeStep | None = None,
    ranks: Ranks | None = None,
    warm_up: bool = True,
    on_compiling: Callable[[Compiling], None] = lambda compiling: None,
) -> Trained:
    """Trains a model in place on all steps of a stream; continues a saved state if there is one.

    On Ctrl-C or SIGTERM the state is saved between two steps. The same call then continues
    exactly, or returns at once if the last step was taken.

    Args:
        model: the model to train.
        stream: step → `relay_fast.data.streams.Step`, with a `schedule`.
        recipe: lr, optimizer, muon_lr, weight_decay and betas of `make_optimizer`; clip, the
            largest norm of the gradients; ema, the decay of averaged weights; autocast, "bf16" for
            GEMMs in bf16; graph, true to use a CUDA graph where possible.
        state_path: file of the training state.
        seed: of the random numbers that training draws.
        data_workers: processes that make batches ahead; 0 makes them in this process.
        on_progress: called with the progress every LOG_EVERY seconds.
        before_step: before_step(step, optimizer) may change model and optimizer, such as
            `relay_fast.models.layer_stack.grow` (without ema). A call that continues first repeats
            it for the steps taken before.
        ranks: the processes that train together, each with the same model, stream and arguments;
            default: this one alone. Their number changes nothing but rounding.
        warm_up: whether to compile all kernels before the first step on a GPU, rather than during
            the first steps. RELAY_FAST_WARM_UP=0 in the environment leaves it out too.
        on_compiling: called with the progress of the compilation.

    Raises:
        KeyboardInterrupt: after an interruption, with the state saved.
        Diverged: if a loss or the state is not finite; checked where values are read back anyway.
        WorkerDied: as `relay_fast.data.streams.prefetch`, or if another rank died.
        CheckpointError: if the state cannot be read or written, or belongs to another recipe.
    """
    training = _Training(model, stream, recipe, Path(state_path), seed, before_step, ranks)
    if warm_up and os.environ.get("RELAY_FAST_WARM_UP") != "0":
        training.warm_up(on_compiling)
    with interrupts_deferred() as interrupted:
        return training.run(data_workers, on_progress, interrupted)


def _not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Returns the name of the first tensor with NaN or inf; one synchronization."""
    names = [name for name, value in tensors.items() if value.is_floating_point()]
    finite = [tensors[name].isfinite().all() for name in names]
    home = finite[0].device
    good = torch.stack([value.to(home, non_blocking=True) for value in finite]).tolist()
    return next((name for name, well in zip(names, good, strict=True) if not well), None)


class _Training:
    """The state of a training: model, optimizer, averages, history and file."""

    def __init__(
        self,
        model: Model,
        stream: Dataset,
        recipe: Mapping,
        path: Path,
        seed: int,
        before_step: BeforeStep | None,
        ranks: Ranks | None = None,
    ):
        self.model, self.stream, self.path = model.train(), stream, path
        self.before_step = before_step or (lambda step, optimizer: None)
        self.ranks = ranks or Ranks()
        self.rows = np.zeros(self.ranks.size, np.int64)
        self.exchange = None if self.ranks.alone else Exchange(model, self.ranks)
        self.name = path.name.removesuffix(".safetensors").removesuffix(".state")
        self.clip, self.ema_decay = recipe.get("clip"), recipe.get("ema")
        seed = as_int("seed", seed)
        self.identity = {"seed": seed, "steps": len(stream), "recipe": plain_numbers(recipe)}
        names = ("optimizer", "weight_decay", "betas", "muon_lr")
        options = {k: recipe[k] for k in names if k in recipe}
        self.optimizer = make_optimizer(model, lr=recipe["lr"], **options)
        self.ema = None
        if self.ema_decay:
            self.ema = {name: p.detach().clone() for name, p in model.named_parameters()}
        torch.manual_seed(seed)
        self.step, self.samples = 0, 0
        self.seconds = self.cpu_seconds = self.data_wait_seconds = 0.0
        self.history: list[dict[str, float]] = []
        self.longest_true: dict[str, int] = {}
        self._generators = {"cpu": torch.default_generator}
        if model.device.type == "cuda":
            self._generators["cuda"] = torch.cuda.default_generators[model.device.index or 0]
        self.autocast = autocast_dtype(recipe.get("autocast", "fp32"))
        self.capacity: Capacity | None = None  # of the CUDA graph
        self.take = self._step_taker(self.autocast, recipe.get("graph"))
        if self.ranks.same(path.exists()):
            self._resume()

    def _step_taker(self, autocast: torch.dtype | None, graph: bool | None) -> Callable:
        options = {"clip": self.clip, "autocast": autocast, "exchange": self.exchange}
        self.no_graph: str | None = "not asked for"
        if graph:
            own = graph_reason(self.model.device, self.optimizer)
            self.no_graph = self.ranks.first_reason(own)
        if self.no_graph:
            device = self.model.device
            return lambda batch: take_step(self.model, self.optimizer, batch.to(device), **options)
        steps = np.linspace(0, len(self.stream) - 1, CAPACITY_BATCHES).astype(int)
        drawn = (self.stream[step].batch for step in sorted(set(steps.tolist())))
        if not self.ranks.alone:
            drawn = (self.ranks.share(batch)[0] for batch in drawn)
        self.capacity = Capacity.of(drawn, SLACK, SPREAD)
        return GraphedStep(self.model, self.optimizer, self.capacity, **options)

    def warm_up(self, on_compiling: Callable[[Compiling], None]) -> None:
        """Compiles the kernels of the remaining steps: by the next batch, the last one, whose
        problems are the longest, and the CUDA graph's capacity."""
        device = self.model.device
        if device.type not in WARMED_UP or self.step == len(self.stream):
            return
        batches = []
        for step in sorted({self.step, len(self.stream) - 1}):
            batch = self.stream[step].batch
            if not self.ranks.alone:
                batch, _ = self.ranks.share(batch)
            if isinstance(batch, PackedBatch):
                batch = next(batch.parts(PART_TOKENS[device.type]))
            batches.append(batch.to(device))
        capacity = [] if self.capacity is None else [self.capacity]
        on_call = lambda done, total: on_compiling(Compiling(done, total))
        warmup(self.model, batches + capacity, autocast=self.autocast, on_call=on_call)

    def run(
        self,
        data_workers: int,
        on_progress: Callable[[Progress], None],
        interrupted: Callable[[], bool],
    ) -> Trained:
        """Takes the remaining steps; see `train_model`."""
        started, spent = time.monotonic(), self.seconds
        cpu_spent = self.cpu_seconds - time.process_time()
        logged, saved, first, before = started, started, self.step, self.samples
        steps = prefetch(self.stream, self.step, data_workers, interrupted)
        try:
            for batch, longest_true in self._awaited(steps):
                self.before_step(self.step, self.optimizer)
                losses = self._train_step(batch, interrupted)
                self.samples += len(batch)
                _raise_to(self.longest_true, longest_true)
                last = self.step == len(self.stream)
                now = time.monotonic()
                if now - logged >= LOG_EVERY or self.step == first + 1 or last:
                    losses = Losses(*(value.item() for value in losses))  # waits for the device
                    now = logged = time.monotonic()
                    self.seconds = spent + now - started
                    on_progress(self._log(losses, (self.samples - before) / (now - started)))
                self.seconds = spent + now - started
                self.cpu_seconds = cpu_spent + time.process_time()
                if last or now - saved >= SAVE_EVERY:
                    self._save()
                    saved = now
                self._stop_if_asked(interrupted)
        except KeyboardInterrupt:
            self._save()
            raise
        finally:
            steps.close()  # ends the data workers
        if self.ema is not None:
            with torch.no_grad():
                for name, p in self.model.named_parameters():
                    p.copy_(self.ema[name])
        self.model.eval()
        graph = self.no_graph or self.ranks.first_reason(self.take.reason) or "replayed"
        return Trained(
            self.history,
            self.longest_true,
            self.seconds,
            self.samples,
            self.data_wait_seconds,
            graph,
            self.cpu_seconds,
            () if self.ranks.alone else tuple(self.rows.tolist()),
        )

    def _awaited(self, steps: Iterator[Step]) -> Iterator[Step]:
        """Yields the steps and adds up the time spent waiting for them."""
        while True:
            began = time.monotonic()
            step = next(steps, None)
            self.data_wait_seconds += time.monotonic() - began
            if step is None:
                return
            yield step

    def _train_step(self, batch, interrupted: Callable[[], bool]):
        set_lr_scale(self.optimizer, self.stream.schedule.lr_scale(self.step))
        if not self.ranks.alone:
            batch, rows = self.ranks.share(batch)
            self.rows += rows
            self.exchange.begin(batch, interrupted())
        losses = self.take(batch)
        self.step += 1
        if self.ema is not None:
            with torch.no_grad():
                decay = min(self.ema_decay, self.step / (self.step + 10))
                torch._foreach_lerp_(
                    list(self.ema.values()), list(self.model.parameters()), 1 - decay
                )
        return losses

    def _stop_if_asked(self, interrupted: Callable[[], bool]) -> None:
        """Raises KeyboardInterrupt after an interruption; on all ranks after the same step."""
        if self.ranks.alone and interrupted():
            raise KeyboardInterrupt
        if self.exchange is not None and self.exchange.stopped_before():
            raise Stopped

    def _log(self, losses: Losses, samples_per_s: float) -> Progress:
        """Adds an entry to the history; raises Diverged if the loss is not finite."""
        entry = {
            "step": self.step,
            "seconds": round(self.seconds, 3),
            "loss": losses.loss,
            "chain_accuracy": losses.chain_correct,
            "answer_accuracy": losses.answer_correct,
        }
        self.history.append(finite(entry))
        if not math.isfinite(losses.loss):
            raise self._diverged(f"the loss is {losses.loss}")
        return Progress(
            self.step, len(self.stream), samples_per_s, entry["loss"], entry["chain_accuracy"]
        )

    def _diverged(self, what: str) -> Diverged:
        losses = [(entry["step"], entry["loss"]) for entry in self.history]
        last = next((seen for seen in reversed(losses) if seen[1] is not None), None)
        seen = f" (last seen finite at step {last[0]}: {last[1]:.4g})" if last else ""
        return Diverged(
            f"the training of {self.name} diverged: {what} at step {self.step}{seen}; give a "
            f"smaller lr or muon_lr, a longer warmup or a smaller clip, and a new folder.",
            self.history,
        )

    def _save(self) -> None:
        """Saves the state; raises Diverged, and keeps the last one, if it is not finite."""
        if not self.step or not self.ranks.writes:
            return
        tensors = pack_training_state(self.model, self.optimizer, self.ema, self._generators)
        trained = {f"model.{name}" for name, _ in self.model.named_parameters()}
        learnt = {k: v for k, v in tensors.items() if k in trained or not k.startswith("model.")}
        if name := _not_finite(learnt):
            raise self._diverged(f"{name} holds NaN or inf")
        metadata = {
            "config": self.identity,
            "step": self.step,
            "samples": self.samples,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "data_wait_seconds": self.data_wait_seconds,
            "history": self.history,
            "longest_true": self.longest_true,
        }
        save_checkpoint(self.path, tensors, metadata, PART_BYTES)

    def _resume(self) -> None:
        tensors, metadata = load_checkpoint(self.path, expect=self.identity)
        for step in range(metadata["step"]):
            self.before_step(step, self.optimizer)
        # A state of another kind of device lacks some generators; those start from the seed.
        generators = {k: g for k, g in self._generators.items() if f"rng.{k}" in tensors}
        unpack_training_state(tensors, self.model, self.optimizer, self.ema, generators, self.path)
        self.step, self.seconds = metadata["step"], metadata["seconds"]
        # Older states lack these counts, or have the last under its old name.
        self.samples = metadata.get("samples", 0)
        self.cpu_seconds = metadata.get("cpu_seconds", 0.0)
        waited = metadata.get("waited", 0.0)
        self.data_wait_seconds = metadata.get("data_wait_seconds", waited)
        self.history, self.longest_true = metadata["history"], metadata["longest_true"]
