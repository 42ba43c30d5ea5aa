"""The style of README's pictures: readable on white and on near-black, at README's width."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from relay_fast.reporting.palette import BLUE, GREEN, ORANGE, PINK, SKY, VERMILION
from relay_fast.reporting.plots import new_figure
from relay_fast.utils.files import replacing

INK = "#737b86"  # contrast of 4.3 on white and 4.4 on GitHub's dark background
COLORS_OF: dict[str, dict[str, Any]] = {
    "looped_aligned": {"color": BLUE, "marker": "o", "linewidth": 1.8},
    "ar_relay": {"color": VERMILION, "marker": "s", "linewidth": 1.8},
    "ar_baseline": {"color": INK, "marker": "X", "linestyle": (0, (4, 2)), "linewidth": 1.5},
}
STYLES_OF: dict[str, dict[str, Any]] = {
    "eager PyTorch": {"color": INK, "marker": "s", "linestyle": (0, (4, 2))},
    "eager, a checkpoint an iteration": {"color": PINK, "marker": "s", "linestyle": (0, (4, 2))},
    "torch.compile": {"color": ORANGE, "marker": "s", "linestyle": (0, (4, 2))},
    "relay_fast, none": {"color": SKY, "marker": "o"},
    "relay_fast, state": {"color": BLUE, "marker": "o"},
    "relay_fast, sqrt": {"color": GREEN, "marker": "o"},
}


def svg_figure(width: float, height: float):
    """Makes a figure without a background."""
    figure = new_figure(width, height)
    figure.patch.set_alpha(0)
    return figure


def styled(axes: Any) -> None:
    """Gives axes the common greys, and no background."""
    axes.patch.set_alpha(0)
    axes.grid(color=INK, alpha=0.25, linewidth=0.6)
    axes.tick_params(colors=INK, labelsize=8)
    for part in (axes.title, axes.xaxis.label, axes.yaxis.label):
        part.set_color(INK)
    axes.title.set_fontsize(9.5)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(INK)


def digest(data: Any) -> str:
    """Returns 16 digits that stand for what a picture shows."""
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]


def save(figure: Any, path: Path, data: Any) -> Path:
    """Writes an SVG with the digest of what it shows; text becomes paths.

    The same picture gives the same bytes.
    """
    from matplotlib import rc_context

    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None, "Description": f"made of {digest(data)}"}
    with replacing(path) as file, rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(file, format="svg", metadata=metadata, transparent=True)
    return path
