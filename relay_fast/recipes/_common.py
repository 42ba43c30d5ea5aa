"""Code that the recipes share: training that can be continued, and plots of curves."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset

from relay_fast.config import BlockConfig
from relay_fast.data.streams import Step
from relay_fast.kernels.mlp_ref import ACTIVATIONS
from relay_fast.models.transformers import Losses
from relay_fast.recipes._models import parse_shape
from relay_fast.relay.run_folder import RunFolder
from relay_fast.reporting.palette import COLORS
from relay_fast.reporting.plots import new_figure, save_figure
from relay_fast.reporting.progress import Display
from relay_fast.training.optim import OPTIMIZERS, check_optimizer
from relay_fast.training.schedule import Schedule
from relay_fast.training.trainer import BeforeStep, Trained, train_model
from relay_fast.utils.settings import (
    BatchSize,
    BetaPair,
    Clip,
    Count,
    DecayKind,
    Ema,
    LearningRate,
    MuonRate,
    Steps,
    Warmup,
    WeightDecay,
    settings,
)

# A batch: arrays become tensors on the device, lists (such as cu_seqlens) stay on the host.
Draw = Callable[[np.random.Generator, int], Sequence[np.ndarray | list]]
Loss = Callable[..., tuple[Tensor, Tensor | None]]


@settings
class Training:
    """Settings of one training, see `relay_fast.training.optim` and `.schedule`."""

    steps: Steps
    batch_size: BatchSize
    lr: LearningRate
    optimizer: Literal[*OPTIMIZERS] = Field("adamw", description="the optimiser")
    warmup: Warmup = 0.01
    decay: DecayKind = "cosine"
    weight_decay: WeightDecay = 0.0
    betas: BetaPair = (0.9, 0.95)
    muon_lr: MuonRate | None = None
    clip: Clip | None = None
    ema: Ema | None = None

    def __post_init__(self) -> None:
        check_optimizer(self.optimizer, self.muon_lr)


# Sizes of the models.
Width = Annotated[Count, Field(description="width of the states")]
Heads = Annotated[Count, Field(description="heads of the attention")]
Activation = Annotated[Literal[*ACTIVATIONS], Field(description="of the MLP")]
Problems = Annotated[Count, Field(description="problems of each test")]
Shapes = Annotated[
    tuple[str, ...],
    Field(description="layers x loops of the models, 1x4, or with independent ends, 1+1x2+1"),
]


def check_models(models: Sequence[str], d_model: int, n_heads: int, **options) -> None:
    """Checks the shapes and sizes of a recipe's models.

    Args:
        models: Shapes, see `relay_fast.recipes._models.parse_shape`.
        d_model: Width of the states.
        n_heads: Heads of the attention.
        options: Further fields of `BlockConfig`.

    Raises:
        ValueError: There is no model, or one cannot be built.
    """
    if not models:
        raise ValueError("models = []: give at least one, like 1x4")
    for name in models:
        parse_shape(name)
    BlockConfig(d_model, n_heads, 1, **options)


def train(
    model: nn.Module,
    loss: Loss,
    draw: Draw,
    training: Training,
    folder: RunFolder,
    name: str,
    display: Display,
    *,
    seed: int,
    device: str = "cpu",
    before_step: BeforeStep | None = None,
) -> Trained:
    """Trains a model in place; continues an interrupted training, reads a finished one.

    Args:
        model: The model.
        loss: (model, *batch) -> (loss (), share correct () or None).
        draw: (rng, step) -> the step's batch, which must depend on these two only; each step has
            its own `rng`.
        training: The settings.
        folder: The run folder, which keeps the state.
        name: Name of the model in the folder.
        display: Shows the progress.
        seed: Seed of the batches.
        device: Where the model is trained.
        before_step: See `relay_fast.training.trainer.train_model`.
    """
    display.start(name)
    trained = train_model(
        _Learner(model.to(device), loss),
        _Draws(draw, training, seed),
        asdict(training),
        folder.checkpoint(name),
        seed=seed,
        on_progress=lambda progress: display.progress(name, progress),
        before_step=before_step,
        on_compiling=lambda compiling: display.progress(name, compiling),
    )
    display.finish(name, trained.seconds)
    return trained


class _Batch:
    """The arguments of a loss, of which the tensors move together.

    It is not a tuple, because the data loader would turn that into a list.
    """

    def __init__(self, size: int, parts: Iterable[Tensor | list]):
        self.size, self.parts = size, tuple(parts)

    def to(self, device: torch.device) -> _Batch:
        return _Batch(self.size, (p.to(device) if isinstance(p, Tensor) else p for p in self.parts))

    def __len__(self) -> int:
        return self.size


class _Draws(Dataset):
    """A dataset of batches by step, the same after every interruption."""

    def __init__(self, draw: Draw, training: Training, seed: int):
        self.draw, self.size, self.seed = draw, training.batch_size, seed
        self.schedule = Schedule.by_steps(
            training.steps, warmup=training.warmup, decay=training.decay
        )

    def __len__(self) -> int:
        return self.schedule.steps

    def __getitem__(self, step: int) -> Step:
        parts = self.draw(np.random.default_rng([self.seed, step]), step)
        tensor = lambda part: part if isinstance(part, list) else torch.from_numpy(part)
        return Step(_Batch(self.size, map(tensor, parts)), {})


class _Learner(nn.Module):
    """A model with its loss, for the trainer."""

    def __init__(self, model: nn.Module, loss: Loss):
        super().__init__()
        self.model, self._loss = model, loss

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def forward(self, batch: _Batch) -> Losses:
        loss, correct = self._loss(self.model, *batch.parts)
        zero = loss.new_zeros(())
        correct = zero if correct is None else correct
        return Losses(loss, loss.detach(), zero, correct, correct)


@dataclass(frozen=True)
class Panel:
    """One panel of a plot: curves[label] = (x, y); dashed ones are theory or published."""

    title: str
    x: str
    y: str
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    dashed: Mapping[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)
    log_x: bool = False
    log_y: bool = False
    y_range: tuple[float, float] | None = None


_MARKERS = "osD^vPX*"


def draw_panels(path: str | os.PathLike, panels: Sequence[Panel], title: str = "") -> Path:
    """Draws panels side by side.

    Args:
        path: The PNG file.
        panels: The panels.
        title: Title of the plot.

    Returns:
        `path`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure(5.2 * len(panels), 4.4)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        colors = {}
        for i, (label, (x, y)) in enumerate(panel.curves.items()):
            colors[label] = COLORS[i % len(COLORS)]
            marker = _MARKERS[i % len(_MARKERS)] if len(x) <= 40 else None
            axes.plot(x, y, color=colors[label], marker=marker, markersize=5, label=label)
        for i, (label, (x, y)) in enumerate(panel.dashed.items()):
            color = colors.get(label, COLORS[(len(colors) + i) % len(COLORS)])
            shown = None if label in colors else label  # a pair shares one entry of the legend
            axes.plot(x, y, "--", color=color, alpha=0.7, linewidth=2.5, label=shown, zorder=1)
        axes.set_title(panel.title)
        axes.set_xlabel(panel.x)
        axes.set_ylabel(panel.y)
        if panel.log_x:
            axes.set_xscale("log")
        elif all(isinstance(value, Integral) for x, _ in panel.curves.values() for value in x):
            axes.xaxis.get_major_locator().set_params(integer=True)
        if panel.log_y:
            axes.set_yscale("log")
        if panel.y_range:
            axes.set_ylim(*panel.y_range)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", frameon=False)
    if title:
        figure.suptitle(title)
    return save_figure(figure, path)
