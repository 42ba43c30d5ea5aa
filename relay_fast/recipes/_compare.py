"""(k⊗L) models of several shapes, trained alike on one task and compared: run, table, picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from relay_fast.models.classifier import LoopedClassifier
from relay_fast.recipes._common import Draw, Panel, Training, draw_panels, train
from relay_fast.recipes._models import classifier_loss, make_classifier
from relay_fast.relay.run_folder import RunFolder
from relay_fast.reporting.progress import Display

Published = Mapping[str, Mapping[int, float]]  # shape -> size of the problem -> % right


class Sizes(Protocol):
    """What the settings of a comparison hold."""

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
    """For each shape: parameters, accuracy, history, seconds.

    draw: the arguments of `classifier_loss`. accuracy(model): size of the problem -> share right.
    """
    results = {}
    for name in settings.models:
        model = make_classifier(
            name, vocabulary_size, d_model=settings.d_model, n_heads=settings.n_heads,
            activation=settings.activation, seed=seed,
        )  # fmt: skip
        trained = train(
            model, classifier_loss, draw, settings.training, folder, name, display,
            seed=seed, device=device,
        )  # fmt: skip
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
    """A line a model: % right by size, beside what was published. size: its letter."""
    sizes = list(next(iter(models.values()))["accuracy"])
    shown = [s for s in sizes if any(int(s) in by_size for by_size in published.values())]
    header = ["model", "parameters", *(f"{size} = {s}" for s in sizes),
              *(f"paper {s}" for s in shown), "seconds"]  # fmt: skip
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
    """% right by size, published ones dashed, and the training losses."""
    right, dashed, losses = {}, {}, {}
    for name, m in models.items():
        label = f"{name.replace('x', '⊗')} ({m['parameters'] / 1000:.0f}k)"
        right[label] = [int(s) for s in m["accuracy"]], [100 * a for a in m["accuracy"].values()]
        if name in published:
            dashed[label] = list(published[name]), list(published[name].values())
        losses[label] = [e["step"] for e in m["history"]], [e["loss"] for e in m["history"]]
    shown = "fresh problems; dashed: published" if dashed else "fresh problems"
    panels = [
        Panel(shown, size, "right (%)", right, dashed, y_range=(-3, 103)),
        Panel("training", "step", "loss", losses, log_y=True),
    ]  # fmt: skip
    return draw_panels(path, panels, title)
