"""Convergence of a linear looped transformer on least squares (Chen et al. 2024, arXiv 2410.11268).

T loops of the layer of `relay_fast.recipes._thoughts`, with the weights of gradient descent and
rate n/λ_max(XᵀX), leave e_T = (I − XᵀX/λ_max)^T e_0, so

    ‖e_T‖ ≤ e^(−T/κ) ‖e_0‖,   κ = λ_max / λ_min of XᵀX:

with n = O(d) points κ is a constant, and T loops do T useful steps. Nothing is trained.

The sizes of the paper's experiments are not known; `paper` is the cpu preset with more draws. A
prompt with y = 0 whose first thought is e_0 has the errors themselves as its thoughts, which keeps
their relative precision down to 1e-300.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from relay_fast.recipes._common import Panel, draw_panels
from relay_fast.recipes._regression import draw_covariances
from relay_fast.recipes._thoughts import ThoughtLayer
from relay_fast.relay.run_folder import RunFolder
from relay_fast.reporting.progress import Display
from relay_fast.utils.settings import Count, Counts, Positive, settings

PUBLISHED: dict[str, Any] = {}  # the paper's numbers are not known


@settings
class Settings:
    dimension: Count = Field(16, description="coordinates of a point, d")
    ratios: tuple[Positive, ...] = Field(
        (1.2, 1.5, 2.0, 4.0, 8.0, 16.0), description="of points to dimensions, n/d"
    )
    loops: Count = Field(100, description="steps of the descent, T")
    shown: Counts = Field((10, 100), description="the steps of the table")
    draws: Count = Field(500, description="problems of each ratio")

    def __post_init__(self) -> None:
        for ratio in self.ratios:
            if round(ratio * self.dimension) < self.dimension:
                raise ValueError(
                    f"n/d = {ratio}: XᵀX of fewer points than dimensions is singular and its "
                    "condition number infinite; take ratios of at least 1"
                )
        if max(self.shown) > self.loops:
            raise ValueError(f"shown = {list(self.shown)}: give steps up to loops = {self.loops}")


PRESETS = {"cpu": Settings(), "paper": replace(Settings(), draws=2_000)}


@torch.no_grad()
def run(
    settings: Settings, folder: RunFolder, *, seed: int, device: str, display: Display
) -> dict[str, Any]:
    d = settings.dimension
    layer = ThoughtLayer.gradient_descent(d, 1.0).to(device)
    results = []
    for index, ratio in enumerate(settings.ratios):
        n = round(ratio * d)
        rng = np.random.default_rng([seed, index])
        s = torch.from_numpy(draw_covariances(rng, settings.draws, n, d)).to(device)
        start = torch.from_numpy(rng.standard_normal((settings.draws, d))).to(device)
        values = torch.linalg.eigvalsh(s)
        kappa = values[:, -1] / values[:, 0]
        s = torch.nn.functional.pad(s / values[:, -1, None, None], (0, 1, 0, 1))  # y = 0
        errors = layer.loop(s, start, settings.loops).norm(dim=2) / start.norm(dim=1)[:, None]
        steps = torch.arange(1, settings.loops + 1, device=device)
        bound = torch.exp(-steps / kappa[:, None])
        # 1e-12 allows for the rounding of eigenvalues and steps.
        held = (errors <= bound * (1 + 1e-12)).all(1).double().mean()
        results.append(
            {
                "ratio": ratio,
                "n": n,
                "kappa": kappa.median().item(),
                "held": held.item(),
                "error": errors.median(0).values.tolist(),
                "bound": bound.median(0).values.tolist(),
            }
        )
    return {"d": d, "shown": list(settings.shown), "ratios": results}


def rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Makes the table: medians over draws; the share within the bound counts every step."""
    header = ["n/d", "κ"]
    for t in results["shown"]:
        header += [f"error, T = {t}", "e^(−T/κ)"]
    lines = [
        [r["ratio"], r["kappa"]]
        + [r[key][t - 1] for t in results["shown"] for key in ("error", "bound")]
        + [f"{r['held']:.1%}"]
        for r in results["ratios"]
    ]
    return [*header, "draws inside"], lines


def plot(results: Mapping[str, Any], path: Path) -> Path:
    """Plots the error against loops, with the bound dashed."""
    curves, dashed = {}, {}
    for r in results["ratios"]:
        label = f"n/d = {r['ratio']:g}, κ = {r['kappa']:.3g}"
        steps = range(1, len(r["error"]) + 1)
        curves[label], dashed[label] = (steps, r["error"]), (steps, r["bound"])
    panel = Panel(
        "median of the draws; dashed: e^(−T/κ)",
        "loops T",
        "‖e_T‖ / ‖e_0‖",
        curves,
        dashed,
        log_y=True,
    )
    return draw_panels(path, [panel])
