"""Stacks that a regulariser draws towards loops and that are then tied (Saunshi et al. 2025).

loss = cross-entropy + λ · mean over groups of (1 − cosine between consecutive blocks), see
`relay_fast.models.layer_stack`; the sign printed in the paper would push the blocks apart. The task
is p-hop (`relay_fast.recipes.p_hop`). The paper regularises language models of 24 layers and 1.5 B
parameters on 250 B tokens of the Pile; `paper` takes the sizes of its p-hop experiment instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from relay_fast.models.classifier import LoopedClassifier
from relay_fast.models.layer_stack import (
    TIE_MODES,
    block_cosines,
    check_period,
    loop_regularizer,
    tie,
)
from relay_fast.recipes import p_hop
from relay_fast.recipes._common import Loss, Panel, Shapes, draw_panels, train
from relay_fast.recipes._models import classifier_loss, parse_shape
from relay_fast.recipes._own_tasks import OwnTasks
from relay_fast.relay.run_folder import RunFolder
from relay_fast.reporting.progress import Display
from relay_fast.utils.settings import Count, NotNegative, settings

# Table 4 of the paper (24 layers, the Pile): perplexity, mean of its tasks, reasoning primitives.
# With k = 4 and λ = 10 the cosines are at least 0.98, without the regulariser near 0.
PUBLISHED = {
    "baseline": {"perplexity": 7.40, "average": 26.0, "primitives": 47.5},
    "k=4 λ=1": {"perplexity": 7.41, "average": 27.2, "primitives": 42.5},
    "k=4 λ=10": {"perplexity": 7.38, "average": 30.0, "primitives": 57.2, "cosine": 0.98},
    "k=6 λ=10": {"perplexity": 7.40, "average": 27.5, "primitives": 55.8},
    "k=8 λ=10": {"perplexity": 7.43, "average": 27.6, "primitives": 56.3},
    "k=12 λ=10": {"perplexity": 7.51, "average": 27.0, "primitives": 50.7},
}


@settings
class Settings(p_hop.Settings):
    models: Shapes = ("4x1",)
    weights: Annotated[tuple[NotNegative, ...], Field(min_length=1)] = Field(
        (0.0, 1.0, 10.0), description="of the regulariser, λ"
    )
    period: Count = Field(1, description="layers of a block")
    tied_steps: Count = Field(
        100, description="of training the loop that is made of the mean of the blocks"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.models) != 1 or parse_shape(self.models[0])[2] != 1:
            raise ValueError(
                f"models = {list(self.models)}: give one stack without loops, like 4x1"
            )
        check_period(self.period, parse_shape(self.models[0])[1])


PRESETS = {
    "cpu": Settings(p_hop.PRESETS["cpu"].training),
    "paper": Settings(**{**vars(p_hop.PRESETS["paper"]), "models": ("6x1",), "hops": (16,)}),
}


def run(
    settings: Settings,
    folder: RunFolder,
    *,
    seed: int,
    device: str,
    display: Display,
    tasks: OwnTasks | None = None,
) -> dict[str, Any]:
    results = []
    size = settings.training.batch_size
    draw = p_hop.make_draw(settings) if tasks is None else tasks.draw(size, seed)
    for weight in settings.weights:
        model = p_hop.make_model(settings, settings.models[0], seed, tasks)
        trained = train(
            model,
            _regularized_loss(weight, settings.period),
            draw,
            settings.training,
            folder,
            f"weight_{weight:g}",
            display,
            seed=seed,
            device=device,
        )
        looped = {how: tie(model, settings.period, how) for how in TIE_MODES}
        tied = {how: _accuracies(m, settings, seed, tasks) for how, m in looped.items()}
        train(
            looped["mean"],
            classifier_loss,
            draw,
            replace(settings.training, steps=settings.tied_steps),
            folder,
            f"weight_{weight:g}_tied",
            display,
            seed=seed + 1,
            device=device,
        )
        tied["trained"] = _accuracies(looped["mean"], settings, seed, tasks)
        cosines = block_cosines(model.block.layers, settings.period)
        results.append(
            {
                "weight": weight,
                "cosines": {name: round(c.item(), 5) for name, c in cosines.items()},
                "accuracy": _accuracies(model, settings, seed, tasks),
                "tied": tied,
                "parameters": model.parameter_count(),
                "tied_parameters": looped["mean"].parameter_count(),
                "seconds": round(trained.seconds, 2),
                "history": trained.history,
            }
        )
    shape, steps = settings.models[0], settings.tied_steps
    found = {"models": results, "shape": shape, "period": settings.period, "tied_steps": steps}
    return found | ({} if tasks is None else {"own": tasks.label})


def _regularized_loss(weight: float, period: int) -> Loss:
    """Makes the loss with a regulariser of this weight."""

    def loss(model: LoopedClassifier, *batch: Any) -> tuple[Tensor, Tensor]:
        value, correct = classifier_loss(model, *batch)
        if weight:
            value = value + weight * loop_regularizer(model.block.layers, period).to(value)
        return value, correct

    return loss


def _accuracies(
    model: LoopedClassifier, settings: Settings, seed: int, tasks: OwnTasks | None
) -> dict[str, float]:
    if tasks is not None:
        return tasks.accuracy(model, settings.problems, seed)
    return {str(p): p_hop.accuracy(model, settings, p, seed) for p in settings.hops}


def rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Makes the table: a row for each λ, with the accuracies of the largest p."""
    p = max(results["models"][0]["accuracy"], key=int)
    size = _named(results)[1]
    header = ["λ", "parameters", "least cosine", "mean cosine", "paper"]
    header.append(f"correct, {size} = {p} (%)")
    lines = []
    for m in results["models"]:
        cosines = list(m["cosines"].values())
        paper = {0: "≈ 0", 10: "≥ 0.98"}.get(m["weight"], "–")
        tied = [100 * accuracy[p] for accuracy in m["tied"].values()]
        lines.append(
            [
                f"{m['weight']:g}",
                m["parameters"],
                min(cosines),
                sum(cosines) / len(cosines),
                paper,
                100 * m["accuracy"][p],
                *tied,
                m["tied_parameters"],
                m["seconds"],
            ]
        )
    tied = [f"tied, {name} (%)" for name in _tied_names(results)]
    return [*header, *tied, "tied parameters", "seconds"], lines


def _named(results: Mapping[str, Any]) -> tuple[str, str]:
    """Returns what the data is called, and the size of its problems."""
    own = results.get("own", {"title": "p-hop", "unit": "p"})
    return own["title"], own["unit"]


def _tied_names(results: Mapping[str, Any]) -> list[str]:
    """Returns the names of the tied models, in the order of a result's "tied"."""
    return [*TIE_MODES, f"mean and {results['tied_steps']} steps"]


def plot(results: Mapping[str, Any], path: Path) -> Path:
    """Plots cosines of the groups, and accuracy as a stack and tied, against λ."""
    models = results["models"]
    groups = list(models[0]["cosines"])
    cosines = {
        f"λ = {m['weight']:g}": (range(len(groups)), list(m["cosines"].values())) for m in models
    }
    places = range(len(models))
    p = max(models[0]["accuracy"], key=int)
    correct = {"stack": (places, [100 * m["accuracy"][p] for m in models])}
    for key, name in zip(models[0]["tied"], _tied_names(results), strict=True):
        correct[f"tied, {name}"] = places, [100 * m["tied"][key][p] for m in models]
    title, size = _named(results)
    labels = ", ".join(f"{i}: {name}" for i, name in enumerate(groups))
    weights = ", ".join(f"{i}: λ = {m['weight']:g}" for i, m in enumerate(models))
    panels = [
        Panel("consecutive blocks", labels, "cosine", cosines, y_range=(-0.1, 1.05)),
        Panel(f"{title}, {size} = {p}", weights, "correct (%)", correct, y_range=(0, 103)),
    ]
    return draw_panels(path, panels, "Looping regulariser")
