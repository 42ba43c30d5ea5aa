"""Plots of a run as PNG files: accuracy by length, hit matrices, losses.

matplotlib is imported with the first plot, and without pyplot: no display is needed, and the
caller's backend and open figures do not change.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from relay_fast.reporting.palette import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    SKY,
    VERMILION,
)
from relay_fast.reporting.tables import (
    ANSWER_ONLY,
    METRIC_NAMES,
    MODEL_NAMES,
    curve,
    in_order,
    length_name,
    models_of,
    task_title,
    tasks_of,
)
from relay_fast.utils.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class _Style(NamedTuple):
    color: str
    marker: str
    line: Any


# Markers and dashes differ too, for print without colours.
_STYLES = {
    "looped_aligned": _Style(BLUE, "o", "-"),
    "ar_relay": _Style(VERMILION, "s", "-"),
    "ar_baseline": _Style(BLACK, "X", (0, (4, 2))),
    "looped_vanilla": _Style(SKY, "^", (0, (6, 1.5, 1, 1.5))),
    "ar_self_truth": _Style(GREEN, "D", (0, (2, 1.5))),
    "ar_self_loop": _Style(PINK, "v", (0, (1, 1.2))),
}
_OTHER_STYLES = [_Style(ORANGE, "P", "-"), _Style(GREY, "*", (0, (3, 2)))]


def plot_run(results: Mapping[str, Any], folder: str | os.PathLike) -> list[Path]:
    """Draws every plot of a run into `folder`: accuracy by metric, hit matrices, losses.

    `results` is the content of results.json. Chains of models that were trained without any are
    left out. Returns the files. Raises ImportError without matplotlib.
    """
    return [draw() for _, draw in pictures(results, folder)]


def pictures(
    results: Mapping[str, Any], folder: str | os.PathLike
) -> Iterator[tuple[Path, Callable[[], Path]]]:
    """Yields the files of `plot_run`, each with the function that draws it."""
    folder = Path(folder)
    for metric in ("answer", "chain", "bit"):
        if _measured(results, metric):
            path = folder / f"accuracy_{metric}.png"
            yield path, partial(plot_accuracy, results, metric, path)
    for task, by_length in results.get("hit_matrix", {}).items():
        for length, matrices in by_length.items():
            matrices = {m: rows for m, rows in matrices.items() if m not in ANSWER_ONLY}
            if not matrices:
                continue
            title = (
                f"{task_title(results, task)} {length}: share of problems with the token correct"
            )
            path = folder / f"hits_{task}_{length}.png"
            yield path, partial(plot_hit_matrix, matrices, title, path)
    curves = {
        name: {
            "step": _counted_on([e["step"] for e in entries]),
            "loss": [e["loss"] for e in entries],
        }
        for name, entries in results.get("history", {}).items()
        if entries
    }
    if curves:
        yield folder / "losses.png", partial(plot_losses, curves, folder / "losses.png")


def plot_accuracy(results: Mapping[str, Any], metric: str, path: str | os.PathLike) -> Path:
    """Plots accuracy against length, with a panel for each task and a line for each model.

    Args:
        results: The content of results.json.
        metric: "answer", "chain", "bit" or "bit_forced"; models without it are left out.
        path: The PNG file.

    Returns:
        `path`.

    Raises:
        ValueError: Nothing was measured.
        ImportError: matplotlib is not installed.
    """
    tasks = _measured(results, metric)
    if not tasks:
        raise ValueError(f"the results hold no {metric!r} accuracy to draw; evaluate first.")
    figure = new_figure(4.9 * len(tasks) + 0.6, 4.9)
    panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    handles: dict[str, Any] = {}
    for panel, task in zip(panels, tasks, strict=True):
        handles |= _draw_accuracy(panel, results, task, metric)
    name = METRIC_NAMES.get(metric, metric)
    panels[0].set_ylabel(f"{name} (%)")
    shown = in_order(handles, MODEL_NAMES)
    figure.legend(
        [handles[model] for model in shown],
        [MODEL_NAMES.get(model, model) for model in shown],
        loc="outside lower center",
        ncols=min(len(shown), 2 if len(tasks) == 1 else 3),
        handlelength=4.5,
        frameon=False,
    )
    return save_figure(figure, path)


def plot_hit_matrix(
    matrix: Mapping[str, Sequence[Sequence[float | None]] | np.ndarray],
    title: str,
    path: str | os.PathLike,
) -> Path:
    """Plots heat maps side by side: how often each token of each round is correct.

    Args:
        matrix: For each model (rounds, positions) in 0..1, NaN or None where there is no token.
        title: Title of the plot.
        path: The PNG file.

    Returns:
        `path`.

    Raises:
        ValueError: A matrix is empty, or there is none.
        ImportError: matplotlib is not installed.
    """
    if not matrix:
        raise ValueError("there is no hit matrix to draw; evaluate first.")
    models = in_order(matrix, MODEL_NAMES)
    values = {model: np.array(matrix[model], dtype=float) for model in models}
    if any(array.ndim != 2 or array.size == 0 for array in values.values()):
        raise ValueError("a hit matrix must have rows (rounds) and columns (positions).")
    rounds = max(array.shape[0] for array in values.values())
    positions = max(array.shape[1] for array in values.values())
    cell = float(np.clip(5.0 / max(rounds, positions), 0.12, 0.40))
    columns = min(len(models), 3)
    lines = -(-len(models) // columns)
    width = columns * max(positions * cell + 0.8, 2.9) + 1.0
    figure = new_figure(width, lines * (rounds * cell + 1.0) + 0.5)
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    annotate = rounds * positions <= 150 and cell >= 0.35

    for panel, model in zip(panels.flat, models, strict=False):
        image = _draw_hits(panel, values[model], annotate)
        panel.set_title(MODEL_NAMES.get(model, model))
    for panel in panels.flat[len(models) :]:
        panel.set_visible(False)
    for panel in panels[:, 0]:
        panel.set_ylabel("round")
    for index, panel in enumerate(panels.flat[: len(models)]):
        if index + columns >= len(models):
            panel.set_xlabel("position in the round")
            panel.tick_params(labelbottom=True)
    bar = figure.colorbar(image, ax=list(panels.flat), shrink=0.9, pad=0.02)
    bar.set_label("correct (%)")
    figure.suptitle(title)
    return save_figure(figure, path)


def plot_losses(
    history: Mapping[str, Mapping[str, Sequence[float]]], path: str | os.PathLike
) -> Path:
    """Plots training losses on a logarithmic scale: faint raw losses below their moving mean.

    `history` has {"step": [...], "loss": [...]} of equal lengths for each model (or curve). Returns
    `path`. Raises ValueError if there is nothing to draw, ImportError without matplotlib.
    """
    curves = {name: h for name, h in history.items() if len(h["step"])}
    if not curves:
        raise ValueError("there are no losses to draw; train first.")
    figure = new_figure(7.5, 4.8)
    panel = figure.subplots()
    styles = _styles(curves)
    for name in in_order(curves, MODEL_NAMES):
        step = np.asarray(curves[name]["step"], dtype=float)
        loss = np.asarray(curves[name]["loss"], dtype=float)
        style = styles[name]
        window = max(1, len(loss) // 40)
        if window > 1:
            panel.plot(step, loss, color=style.color, alpha=0.18, linewidth=0.8)
        panel.plot(
            step,
            _moving_mean(loss, window),
            color=style.color,
            linestyle=style.line,
            marker=style.marker,
            markersize=5,
            markevery=max(1, len(loss) // 12),
            label=MODEL_NAMES.get(name, name),
        )
    panel.set_yscale("log")
    panel.set_xlabel("optimiser step")
    panel.set_ylabel("training loss")
    panel.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, handlelength=4.5, frameon=False)
    return save_figure(figure, path)


def _measured(results: Mapping[str, Any], metric: str) -> list[str]:
    """Returns the tasks for which some model has the metric."""
    return [
        task
        for task in tasks_of(results)
        if any(curve(results, model, task, metric)[0] for model in models_of(results, task))
    ]


def _counted_on(steps: Sequence[int]) -> list[int]:
    """Renumbers the steps of phases, each of which counts from 1, as steps of the whole."""
    steps = np.asarray(steps)
    ended = np.where(steps[1:] <= steps[:-1], steps[:-1], 0)  # the last step of each phase
    return (steps + np.concatenate([[0], np.cumsum(ended)])).tolist()


def _draw_accuracy(
    panel: Axes, results: Mapping[str, Any], task: str, metric: str
) -> dict[str, Any]:
    """Draws one task; returns the legend handle of each model."""
    models = [m for m in models_of(results, task) if curve(results, m, task, metric)[0]]
    styles = _styles(models)
    handles, ends = {}, []
    for index, model in enumerate(models):
        lengths, values = curve(results, model, task, metric)
        style = styles[model]
        # Broad lines below narrow ones, so that each shows where several lie on 100 %.
        step = -(-len(lengths) // 12)
        (handles[model],) = panel.plot(
            lengths,
            [100 * value for value in values],
            color=style.color,
            linestyle=style.line,
            linewidth=3.2 - 0.35 * index,
            marker=style.marker,
            markersize=7.5 - 0.6 * index,
            markeredgecolor="white",
            markeredgewidth=0.7,
            markevery=(index % step, step),
            zorder=3 + 0.1 * index,
            clip_on=False,
        )
        ends += [lengths[0], lengths[-1]]
    _length_axis(panel, min(ends), max(ends), results.get("train_lengths", {}).get(task))
    panel.set_ylim(-2, 103)
    panel.set_yticks(range(0, 101, 20))
    panel.grid(alpha=0.3)
    panel.set_title(task_title(results, task), pad=18)
    panel.set_xlabel(length_name(results, task))
    return handles


def _length_axis(panel: Axes, first: int, last: int, trained: Sequence[int] | None) -> None:
    """Sets the axis to lengths `first`..`last` and shades the training range.

    The lengths beyond the training range get at least two fifths of the width; where needed, the
    training range is compressed, and its label says so.
    """
    low, high = first - 0.5, last + 0.5
    if trained is None or trained[1] < first or trained[0] > last:
        panel.set_xlim(low, high)
        panel.set_xticks(_whole_ticks(first, last, 8))
        return
    left, edge = max(low, trained[0] - 0.5), min(high, trained[1] + 0.5)
    share = (high - edge) / (high - low)
    label = "trained"
    if 0 < share < 0.4:
        squeeze = (high - edge) * 1.5 / (edge - low)
        label = "trained (lengths compressed)"
        panel.set_xscale(
            "function",
            functions=(
                lambda x: np.where(x < edge, edge + (x - edge) * squeeze, x),
                lambda x: np.where(x < edge, edge + (x - edge) / squeeze, x),
            ),
        )
    panel.set_xlim(low, high)
    inner = int(edge - 0.5)
    beyond = [n for n in _whole_ticks(inner, last, 6) if n > inner + (last - inner) / 8]
    gap = (edge - low) / 8  # keeps the neighbours clear of the tick at the edge
    inside = [n for n in _whole_ticks(first, inner, 5) if n <= inner - gap]
    panel.set_xticks([*inside, inner, *beyond])
    panel.minorticks_off()
    panel.axvspan(left, edge, color="0.90", zorder=0)
    panel.annotate(
        label,
        ((max(left, low) + edge) / 2, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize="small",
        color="0.35",
    )


def _whole_ticks(first: int, last: int, most: int) -> list[int]:
    """Returns about `most` whole numbers at round steps in first..last."""
    from matplotlib.ticker import MaxNLocator

    ticks = MaxNLocator(most, integer=True, steps=[1, 2, 5, 10]).tick_values(first, last)
    return [int(n) for n in ticks if first <= n <= last]


def _draw_hits(panel: Axes, values: np.ndarray, annotate: bool) -> Any:
    """Draws one heat map (rounds, positions) with round 1 at the top; returns the image."""
    from matplotlib import colormaps

    rounds, positions = values.shape
    colors = colormaps["viridis"].with_extremes(bad="0.88")
    image = panel.imshow(
        100 * values,
        cmap=colors,
        vmin=0,
        vmax=100,
        aspect="equal",
        interpolation="nearest",
        extent=(0.5, positions + 0.5, rounds + 0.5, 0.5),
    )
    panel.set_xticks(_whole_ticks(1, positions, 12))
    panel.set_yticks(_whole_ticks(1, rounds, 12))
    if annotate:
        for (i, j), value in np.ndenumerate(values):
            if np.isfinite(value):
                dark = value < 0.55
                panel.text(
                    j + 1,
                    i + 1,
                    f"{100 * value:.0f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if dark else "black",
                )
    return image


def _styles(models: Sequence[str] | Mapping[str, Any]) -> dict[str, _Style]:
    others = [model for model in models if model not in _STYLES]
    spare = {m: _OTHER_STYLES[i % len(_OTHER_STYLES)] for i, m in enumerate(others)}
    return {model: _STYLES.get(model) or spare[model] for model in models}


def _moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Returns the mean of the last `window` values at each place, of fewer at the start."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    last = np.arange(1, len(values) + 1)
    first = np.maximum(last - window, 0)
    return (total[last] - total[first]) / (last - first)


def new_figure(width: float, height: float) -> Figure:
    """Makes an empty figure of this size in inches. Raises ImportError without matplotlib."""
    # A notebook's backend may be unknown to this interpreter, which makes the import fail.
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib, which is not installed: pip install relay_fast[train]"
        ) from error
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike) -> Path:
    """Writes the figure as a PNG, atomically, and makes its folder; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        figure.savefig(file, dpi=150, format="png")
    return path
