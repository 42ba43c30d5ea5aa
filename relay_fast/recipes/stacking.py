"""Stacks that grow during training, against the whole stack.

This is MIDAS (Saunshi et al. 2024, arXiv 2409.19044). `relay_fast.models.layer_stack` has middle
and gradual stacking and the Prop-α schedule. The tasks are p-hop (`relay_fast.recipes.p_hop`) and
RELAY's autoregressive model on the arithmetic chains of the preset `cpu-latent`, or on the chains
of the tasks of a --config. The results are accuracy, similarity of the layers, and the speed-up:
ideal (from layer work) and measured (from the seconds of a step at each depth).

The paper trains language models of up to 8 B parameters with UL2, and its tables are not available;
`paper` takes the sizes of the p-hop experiment of Saunshi et al. 2025 instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import nn

from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.data.streams import BatchFormat, TruthStream
from relay_fast.models.classifier import LoopedClassifier
from relay_fast.models.layer_stack import (
    GROW_POSITIONS,
    OPTIMIZER_STATE_MODES,
    GrowthSchedule,
    grow,
    layer_similarity,
    stack_of,
)
from relay_fast.models.transformers import AutoregressiveTransformer
from relay_fast.recipes import p_hop
from relay_fast.recipes._common import Panel, Shapes, Training, draw_panels, train
from relay_fast.recipes._models import classifier_loss
from relay_fast.recipes._own_tasks import OwnTasks
from relay_fast.relay.evaluation import evaluate_autoregressive
from relay_fast.relay.presets import load_preset
from relay_fast.relay.run_folder import RunFolder
from relay_fast.reporting.progress import Display
from relay_fast.training.optim import make_optimizer
from relay_fast.training.schedule import Schedule
from relay_fast.training.trainer import BeforeStep, Trained, train_model
from relay_fast.utils.settings import Count, NotNegative, settings

TASKS = ("p_hop", "arithmetic")
TIMED_STEPS = 9  # at each depth, for the measured speed-up

# The abstract's "up to 40 % faster".
PUBLISHED = {"speed_up": 1.4}


@settings
class Settings(p_hop.Settings):
    """The settings of p-hop, and those of stacking."""

    NEEDS_MODELS: ClassVar[bool] = False

    models: Shapes = ()
    tasks: Annotated[tuple[Literal[*TASKS], ...], Field(min_length=1)] = Field(
        TASKS, description="some of p_hop and arithmetic"
    )
    methods: Annotated[tuple[Literal["full", *GROW_POSITIONS], ...], Field(min_length=1)] = Field(
        ("full", *GROW_POSITIONS),
        description="full is the whole stack throughout, the others grow it",
    )
    depth: Count = Field(4, description="layers at the end")
    layers: Count = Field(1, description="layers of a block")
    alpha: NotNegative = Field(1.0, description="of the Prop-α schedule of growing")
    stages: Count | None = Field(None, description="of growing; null: as many as it takes")
    state: Literal[*OPTIMIZER_STATE_MODES] = Field(
        "copy", description="of the optimiser for a new layer"
    )
    arithmetic: Training = Training(
        steps=1000,
        batch_size=32,
        lr=1e-3,
        muon_lr=0.01,
        warmup=0.03,
        decay="wsd",
        weight_decay=0.01,
        clip=1.0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        BlockConfig(self.d_model, self.n_heads, 1)
        for training in (self.training, self.arithmetic):
            self.schedule(training)

    def schedule(self, training: Training) -> GrowthSchedule:
        """Returns the growth schedule of a training; raises ValueError if it is too short."""
        return GrowthSchedule(training.steps, self.depth, self.layers, self.alpha, self.stages)


PRESETS = {
    # Only the last stage trains the whole stack: the learning rate stays high until then.
    "cpu": Settings(replace(p_hop.PRESETS["cpu"].training, steps=1000, decay="wsd")),
    "paper": Settings(
        **{**vars(p_hop.PRESETS["paper"]), "models": (), "hops": (16,)}, tasks=("p_hop",), depth=6
    ),
}


class _Task(Protocol):
    """A task to compare methods on."""

    training: Training

    def new_model(self, layers: int) -> nn.Module: ...

    def train(self, model: nn.Module, name: str, before_step: BeforeStep | None) -> Trained: ...

    def loss(self, model: nn.Module) -> torch.Tensor:
        """Returns the loss of a batch, for timing."""

    def accuracy(self, model: nn.Module) -> dict[str, float]: ...


@dataclass
class _Hops:
    settings: Settings
    folder: RunFolder
    display: Display
    seed: int
    device: str

    def __post_init__(self) -> None:
        self.training = self.settings.training
        self._draw = p_hop.make_draw(self.settings)

    def new_model(self, layers: int) -> LoopedClassifier:
        return p_hop.make_model(self.settings, f"{layers}x1", self.seed).to(self.device)

    def train(self, model: nn.Module, name: str, before_step: BeforeStep | None) -> Trained:
        return train(
            model,
            classifier_loss,
            self._draw,
            self.training,
            self.folder,
            name,
            self.display,
            seed=self.seed,
            device=self.device,
            before_step=before_step,
        )

    def loss(self, model: LoopedClassifier) -> torch.Tensor:
        batch = self._draw(np.random.default_rng(self.seed), 0)
        return model.loss(*(torch.from_numpy(part).to(self.device) for part in batch))[0]

    def accuracy(self, model: nn.Module) -> dict[str, float]:
        s = self.settings
        return {str(p): p_hop.accuracy(model, s, p, self.seed) for p in s.hops}


def arithmetic_config() -> dict[str, Any]:
    """Returns the config of the preset `cpu-latent` with arithmetic alone."""
    config = load_preset("cpu-latent")
    config["tasks"] = {"arithmetic": config["tasks"]["arithmetic"]}
    return config


@dataclass
class _Chains:
    """RELAY's autoregressive model on whole chains; the accuracy is that of its answers."""

    settings: Settings
    folder: RunFolder
    display: Display
    seed: int
    device: str
    tasks: OwnTasks

    def __post_init__(self) -> None:
        t, model = self.settings.arithmetic, load_preset("cpu-latent")["model"]
        self.training = t
        self._sizes = {k: v for k, v in model.items() if not isinstance(v, dict)}
        schedule = Schedule.by_steps(t.steps, warmup=t.warmup, decay=t.decay)
        self._stream = TruthStream(
            self.tasks.tasks,
            self.tasks.ranges,
            BatchFormat("autoregressive"),
            schedule,
            batch_size=t.batch_size,
            seed=self.seed,
            lengths="uniform",
            lengths_per_batch=4,
        )

    def new_model(self, layers: int) -> AutoregressiveTransformer:
        torch.manual_seed(self.seed)
        block = BlockConfig(**{**self._sizes, "n_layers": layers}, causal=True)
        tasks = self.tasks.tasks.items()
        longest = max(t.max_sequence_tokens(self.tasks.ranges[name][1]) for name, t in tasks)
        config = ModelConfig(block, self.tasks.vocabulary.size, longest)
        return AutoregressiveTransformer(config).to(self.device)

    def train(self, model: nn.Module, name: str, before_step: BeforeStep | None) -> Trained:
        self.display.start(name)
        trained = train_model(
            model,
            self._stream,
            asdict(self.training),
            self.folder.checkpoint(name),
            seed=self.seed,
            before_step=before_step,
            on_progress=lambda progress: self.display.progress(name, progress),
            on_compiling=lambda compiling: self.display.progress(name, compiling),
        )
        self.display.finish(name, trained.seconds)
        return trained

    def loss(self, model: AutoregressiveTransformer) -> torch.Tensor:
        return model.loss(self._stream[0].batch.to(self.device)).loss

    def accuracy(self, model: AutoregressiveTransformer) -> dict[str, float]:
        accuracy = {}
        for name, task in self.tasks.tasks.items():
            lengths = task.tested_lengths(*self.tasks.ranges[name]).tolist()
            number = max(1, self.settings.problems // len(lengths))
            by_length = evaluate_autoregressive(
                model, self.tasks.tasks, name, lengths, number, self.seed
            )
            several = f"{name} " if len(self.tasks.tasks) > 1 else ""
            accuracy |= {f"{several}{n}": marks["answer"] for n, marks in by_length.items()}
        return accuracy


def run(
    settings: Settings,
    folder: RunFolder,
    *,
    seed: int,
    device: str,
    display: Display,
    tasks: OwnTasks | None = None,
) -> dict[str, Any]:
    results = {}
    for name in settings.tasks if tasks is None else ["own"]:
        if name == "p_hop":
            task = _Hops(settings, folder, display, seed, device)
        else:
            chains = OwnTasks(arithmetic_config()) if tasks is None else tasks
            task = _Chains(settings, folder, display, seed, device, chains)
        schedule = settings.schedule(task.training)
        seconds = _step_seconds(task, settings)
        models = {
            method: _train_one(task, settings, schedule, method, f"{name}_{method}")
            for method in settings.methods
        }
        spent = sum(n * t for n, t in zip(schedule.stage_steps, seconds, strict=True))
        results[name if tasks is None else tasks.label["title"]] = {
            "models": models,
            "stage_steps": list(schedule.stage_steps),
            "step_seconds": [round(t, 6) for t in seconds],
            "ideal_work": schedule.work,
            "measured_work": spent / (task.training.steps * seconds[-1]),
        }
    return {"tasks": results}


def _train_one(
    task: _Task, settings: Settings, schedule: GrowthSchedule, method: str, name: str
) -> dict[str, Any]:
    whole = method == "full"
    model = task.new_model(settings.depth if whole else settings.layers)

    def before_step(step: int, optimizer: torch.optim.Optimizer) -> None:
        if not whole and schedule.grows(step):
            grow(model, optimizer, layers=settings.layers, where=method, state=settings.state)

    trained = task.train(model, name, before_step)
    similarity = layer_similarity(stack_of(model).layers)
    return {
        "accuracy": task.accuracy(model),
        "similarity": [[round(c, 4) for c in row] for row in similarity.tolist()],
        "seconds": round(trained.seconds, 2),
        "history": trained.history,
    }


def _step_seconds(task: _Task, settings: Settings) -> list[float]:
    """Measures the median seconds of a training step with 1, 2, … blocks, in interleaved steps."""
    depths = range(settings.layers, settings.depth + 1, settings.layers)
    steps = [_timed_step(task, depth) for depth in depths]
    for step in steps:
        step()
    taken = [[step() for step in steps] for _ in range(TIMED_STEPS)]
    return [median(column) for column in zip(*taken, strict=True)]


def _timed_step(task: _Task, depth: int) -> Callable[[], float]:
    """Makes a function that takes a training step of a fresh model and returns its seconds."""
    model = task.new_model(depth)
    t = task.training
    optimizer = make_optimizer(model, lr=t.lr, optimizer=t.optimizer, muon_lr=t.muon_lr)
    cuda = next(model.parameters()).is_cuda
    # On a CPU, the process's own time: other processes do not count.
    clock = time.perf_counter if cuda else time.process_time

    def step() -> float:
        started = clock()
        loss = task.loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if cuda:
            torch.cuda.synchronize()
        return clock() - started

    return step


def rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Makes the table: a row for each task and method; speed-ups are over the whole stack."""
    header = [
        "task",
        "method",
        "correct (%)",
        "next-layer cosine",
        "speed-up, ideal",
        "measured",
        "paper, at most",
        "seconds",
    ]
    lines = []
    for task, found in results["tasks"].items():
        for method, m in found["models"].items():
            correct = 100 * sum(m["accuracy"].values()) / len(m["accuracy"])
            next_to = [c for _, c in _next_layer(m)]
            grown = method != "full"
            lines.append(
                [
                    task,
                    method,
                    correct,
                    sum(next_to) / max(1, len(next_to)),
                    1 / found["ideal_work"] if grown else 1.0,
                    1 / found["measured_work"] if grown else 1.0,
                    PUBLISHED["speed_up"] if grown else None,
                    m["seconds"],
                ]
            )
    return header, lines


def _next_layer(model: Mapping[str, Any]) -> list[tuple[int, float]]:
    """Returns (layer, its cosine with the next one) of each layer, counted from 1."""
    similarity = model["similarity"]
    return [(i + 1, similarity[i][i + 1]) for i in range(len(similarity) - 1)]


def plot(results: Mapping[str, Any], path: Path) -> Path:
    """Plots cosines of neighbouring layers and the training losses, for each task."""
    panels = []
    for task, found in results["tasks"].items():
        cosines, losses = {}, {}
        for method, m in found["models"].items():
            cosines[method] = tuple(zip(*_next_layer(m), strict=True)) or ((), ())
            losses[method] = tuple([e[k] for e in m["history"]] for k in ("step", "loss"))
        panels += [
            Panel(
                f"{task}: similarity", "layer and the next", "cosine", cosines, y_range=(-0.1, 1.05)
            ),
            Panel(f"{task}: training", "step", "loss", losses, log_y=True),
        ]
    return draw_panels(path, panels, "Stacking: similarity of grown layers, and training")
