"""Compares (k⊗L) models of several shapes on one task: training, table, plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from relay_fast.models.classifier import LoopedClassifier
from relay_fast.recipes._common import Draw, Panel, Training, draw_panels, train
from relay_fast.recipes._models import classifier_loss, make_classifier
from relay_fast.relay.run_folder import RunFolder
from relay_fast.reporting.progress import Display

Published = Mapping[str, Mapping[int, float]]  # shape -> size of the problem -> % correct


class Sizes(Protocol):
    """The settings that a comparison needs."""

    training: Training
    models: tuple[str, ...]
    d_model: int
    n_heads: int
    activation: str


def compare(
    settings: Sizes,
    vocabulary_size: int,
    draw: Draw,
    accuracy: Callable[[LoopedClassifier], dict[str, float]],
    folder: RunFolder,
    display: Display,
    *,
    seed: int,
    device: str,
) -> dict[str, Any]:
    """Trains a model of each shape and measures its accuracy.

    Args:
        settings: Shapes, sizes and training.
        vocabulary_size: Number of tokens.
        draw: Draws batches, the arguments of `classifier_loss`.
        accuracy: Model -> {size of the problem: share correct}.
        folder: The run folder.
        display: Shows the progress.
        seed: Seed of models and batches.
        device: Where models run.

    Returns:
        {shape: {"parameters", "accuracy", "history", "seconds"}}.
    """
    results = {}
    for name in settings.models:
        model = make_classifier(
            name,
            vocabulary_size,
            d_model=settings.d_model,
            n_heads=settings.n_heads,
            activation=settings.activation,
            seed=seed,
        )
        trained = train(
            model,
            classifier_loss,
            draw,
            settings.training,
            folder,
            name,
            display,
            seed=seed,
            device=device,
        )
        results[name] = {
            "parameters": model.parameter_count(),
            "accuracy": accuracy(model),
            "history": trained.history,
            "seconds": round(trained.seconds, 2),
        }
    return results


def comparison_rows(
    models: Mapping[str, Any], published: Published, size: str
) -> tuple[list[str], list[list[Any]]]:
    """Makes the table: a row for each model, % correct by problem size beside published numbers.

    Args:
        models: Results of `compare`.
        published: The paper's numbers.
        size: Symbol of the problem size.

    Returns:
        (header, rows).
    """
    sizes = list(next(iter(models.values()))["accuracy"])
    shown = [s for s in sizes if any(int(s) in by_size for by_size in published.values())]
    header = [
        "model",
        "parameters",
        *(f"{size} = {s}" for s in sizes),
        *(f"paper {s}" for s in shown),
        "seconds",
    ]
    lines = [
        [name.replace("x", "⊗"), m["parameters"], *(100 * m["accuracy"][s] for s in sizes)]
        + [published.get(name, {}).get(int(s)) for s in shown]
        + [m["seconds"]]
        for name, m in models.items()
    ]
    return header, lines


def comparison_plot(
    models: Mapping[str, Any], published: Published, size: str, title: str, path: Path
) -> Path:
    """Plots % correct by problem size, published numbers dashed, and the training losses.

    Args:
        models: Results of `compare`.
        published: The paper's numbers.
        size: Symbol of the problem size.
        title: Title of the plot.
        path: The PNG file.
    """
    correct, dashed, losses = {}, {}, {}
    for name, m in models.items():
        label = f"{name.replace('x', '⊗')} ({m['parameters'] / 1000:.0f}k)"
        correct[label] = [int(s) for s in m["accuracy"]], [100 * a for a in m["accuracy"].values()]
        if name in published:
            dashed[label] = list(published[name]), list(published[name].values())
        losses[label] = [e["step"] for e in m["history"]], [e["loss"] for e in m["history"]]
    shown = "fresh problems; dashed: published" if dashed else "fresh problems"
    panels = [
        Panel(shown, size, "correct (%)", correct, dashed, y_range=(-3, 103)),
        Panel("training", "step", "loss", losses, log_y=True),
    ]
    return draw_panels(path, panels, title)
