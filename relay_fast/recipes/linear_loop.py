"""A looped linear transformer learns gradient descent (Gatmiry et al. 2024, arXiv 2410.08292).

Prompts of in-context regression (`relay_fast.recipes._regression`), tokens (x, y), query (x, 0):

    Z_{t+1} = Z_t − P Z_t M (Z_tᵀ Q Z_t) / n,   prediction −Z_L[d, query],   loss its squared error.

"general" trains all of P and Q; "restricted" trains A = Q[:d, :d] and u = P[d, :d], with
P[d, d] = 1 and zeros elsewhere. Both start there, near A = 0. With u = 0 the restricted form is
exactly w_{t+1} = w_t + Aᵀ Xᵀ(y − X w_t) / n. For L = 1 the best A is n/(n+d+1) · Σ⁻¹ = a · Σ⁻¹,
with loss d(d+1)/(n+d+1). With more loops than trained, the loss keeps falling if λ · a < 2, with λ
the largest eigenvalue of XᵀX/n, about (1 + √(d/n))² for Σ = I: n ≳ 10 d. The general form can also
change the context's x, and for L ≥ 2 it does.

The prediction is linear in the query, so the loss is the exact average over queries: d queries, one
for each axis.

The paper's n, batch, learning rate and steps are not known; `paper` takes those of Ahn et al. 2023
(arXiv 2306.00297, their code), but fresh prompts at each step and one clip for all matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from relay_fast.recipes._common import Panel, Training, draw_panels, train
from relay_fast.recipes._linear_attention import loop_linear_attention
from relay_fast.recipes._regression import (
    check_deviations,
    draw_prompts,
    one_step_error,
    one_step_rate,
)
from relay_fast.relay.run_folder import RunFolder
from relay_fast.reporting.progress import Display
from relay_fast.utils.settings import Count, Counts, Positive, settings

FORMS = ("restricted", "general")
PUBLISHED: dict[str, Any] = {}  # the paper plots its losses and prints none


@settings
class Settings:
    training: Training
    dimension: Count = Field(10, description="coordinates of x")
    examples: Counts = Field((20, 100, 200), description="points of a prompt")
    loops: Counts = Field((1, 2, 5), description="of the models")
    forms: tuple[Literal[*FORMS], ...] = Field(FORMS, description="of the attention's weights")
    deviations: tuple[Positive, ...] = Field(
        (), description="standard deviations of x's coordinates; [] for all 1"
    )
    test_loops: Counts = Field(
        (1, 2, 3, 5, 10, 20), description="of the evaluation, with a tenth of the prompts"
    )
    prompts: Count = Field(200_000, description="of the evaluation at the trained depth")

    def __post_init__(self) -> None:
        check_deviations(self.deviations, self.dimension)


_CPU = Settings(
    Training(steps=1000, batch_size=256, lr=0.02, warmup=0.05, betas=(0.9, 0.99), clip=1.0)
)
PRESETS = {
    "cpu": _CPU,
    "paper": replace(
        _CPU,
        training=Training(
            steps=20_000, batch_size=20_000, lr=0.01, betas=(0.99, 0.9), clip=0.01, decay="linear"
        ),
        examples=(20, 100),
    ),
}


class LinearLooped(nn.Module):
    """One linear attention layer to be looped, in a form of the module's docstring.

    Args:
        d: Dimensions.
        form: "general" or "restricted".
        std: Standard deviation of the initial weights.
    """

    def __init__(self, d: int, form: str, std: float = 0.01):
        super().__init__()
        self.form = form
        normal = lambda *shape: nn.Parameter(std * torch.randn(*shape, dtype=torch.float64))
        if form == "general":
            self.p, self.q = normal(d + 1, d + 1), normal(d + 1, d + 1)
            self.p.data[-1, -1] = 1.0
        else:
            self.a, self.u = normal(d, d), normal(d)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Returns P and Q, each (d + 1, d + 1)."""
        if self.form == "general":
            return self.p, self.q
        q = nn.functional.pad(self.a, (0, 1, 0, 1))
        last = torch.cat([self.u, self.u.new_ones(1)])
        return torch.cat([q.new_zeros(len(q) - 1, len(q)), last[None]]), q

    def step_matrix(self) -> Tensor:
        """Returns A (d, d), which is P[d, d] · Q[:d, :d] in the general form."""
        p, q = self.matrices()
        return p[-1, -1] * q[:-1, :-1]

    def weights(self, s: Tensor, loops: int) -> list[Tensor]:
        """Returns the weights (B, d) after each loop; the prediction is weights · query.

        `s` is the moment (B, d + 1, d + 1).
        """
        p, q = self.matrices()
        d = len(q) - 1
        queries = torch.eye(d, d + 1, dtype=s.dtype, device=s.device).expand(len(s), d, d + 1)
        states = loop_linear_attention(queries, s, -p, q, loops, return_states=True)
        return [-state[:, :, -1] for state in states]


def errors(weights: Tensor, w: Tensor, deviations: Tensor) -> Tensor:
    """Returns the squared error (B,) of the prediction, averaged over queries.

    Args:
        weights: (B, d), the model's.
        w: (B, d), the true weights.
        deviations: (d,) standard deviations of the query's coordinates.
    """
    return ((weights - w) * deviations).square().sum(1)


def run(
    settings: Settings, folder: RunFolder, *, seed: int, device: str, display: Display
) -> dict[str, Any]:
    d = settings.dimension
    deviations = torch.tensor(settings.deviations or [1.0] * d, dtype=torch.float64, device=device)
    results = []
    for form, n, loops in product(settings.forms, settings.examples, settings.loops):

        def loss(model: LinearLooped, s: Tensor, w: Tensor, loops=loops):
            return errors(model.weights(s, loops)[-1], w, deviations).mean(), None

        def draw(rng: np.random.Generator, _: int, n=n):
            return draw_prompts(rng, settings.training.batch_size, n, d, settings.deviations)

        torch.manual_seed(seed)
        model = LinearLooped(d, form)
        train(
            model,
            loss,
            draw,
            settings.training,
            folder,
            f"{form}_n{n}_L{loops}",
            display,
            seed=seed,
            device=device,
        )
        cell = {"form": form, "n": n, "loops": loops, "d": d}
        results.append(cell | _evaluate(model, settings, n, loops, seed, deviations))
    return {"models": results}


@torch.no_grad()
def _evaluate(
    model: LinearLooped, settings: Settings, n: int, loops: int, seed: int, deviations: Tensor
) -> dict[str, Any]:
    d = settings.dimension
    a = model.step_matrix() * deviations.square()  # A Σ: the identity times a number
    # The largest eigenvalue of A XᵀX / n for many points, where A Σ = a I.
    edge = a.diagonal().mean().item() * (1 + (d / n) ** 0.5) ** 2

    def measure(count: int, most: int) -> list[float]:
        rng, chunk, total = np.random.default_rng([seed, 2**32]), 20_000, torch.zeros(most)
        for first in range(0, count, chunk):
            size = min(chunk, count - first)
            s, w = draw_prompts(rng, size, n, d, settings.deviations)
            s, w = torch.from_numpy(s).to(deviations), torch.from_numpy(w).to(deviations)
            states = model.weights(s, most)
            total = total + torch.stack([errors(g, w, deviations).sum() for g in states]).cpu()
        return (total / count).tolist()

    by_loop = measure(max(1, settings.prompts // 10), max(settings.test_loops))
    return {
        "loss": measure(settings.prompts, loops)[-1],
        "step": a.diagonal().mean().item(),
        "step_spread": (a - a.diagonal().mean() * torch.eye(d).to(a)).abs().max().item(),
        "edge": edge,
        # None: out of the range of a double
        "loss_by_loops": {str(t): _finite(by_loop[t - 1]) for t in settings.test_loops},
    }


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None


def rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Makes the table: a row for each model; theory is known for L = 1 only."""
    header = ["form", "n", "L", "loss", "theory", "a", "theory", "a·λ (< 2)", "loss after"]
    lines = []
    for m in results["models"]:
        last = max(m["loss_by_loops"], key=int)
        after = m["loss_by_loops"][last]
        theory = [
            f(m["n"], m["d"]) if m["loops"] == 1 else None for f in (one_step_error, one_step_rate)
        ]
        lines.append(
            [
                m["form"],
                m["n"],
                m["loops"],
                m["loss"],
                theory[0],
                m["step"],
                theory[1],
                m["edge"] if m["form"] == "restricted" else None,
                f"{last} loops: " + ("infinite" if after is None else f"{after:.3g}"),
            ]
        )
    return header, lines


def plot(results: Mapping[str, Any], path: Path) -> Path:
    """Plots the loss against loops in the test, a panel for each number of examples."""
    panels = []
    for n in sorted({m["n"] for m in results["models"]}):
        curves = {}
        for m in results["models"]:
            if m["n"] == n:
                points = sorted((int(t), v) for t, v in m["loss_by_loops"].items() if v is not None)
                curves[f"{m['form']}, trained L = {m['loops']}"] = tuple(zip(*points, strict=True))
        panels.append(
            Panel(
                f"n = {n}",
                "loops in the test",
                "squared error",
                curves,
                log_x=True,
                log_y=True,
                y_range=(1e-8, 1e6),
            )
        )
    return draw_panels(path, panels, "Linear looped transformer: more loops than trained")
