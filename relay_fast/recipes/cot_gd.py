"""A chain of thought that is gradient descent (Huang, Wang, Lee 2025, arXiv 2502.21212).

The task is in-context *weight* prediction: given n pairs (x, y = w·x), x ~ N(0, I), write w. Tokens
are columns (x, y, w, 1) of width 2d + 2: data (x, y, 0, 0), thoughts (0, 0, w_i, 1). The model is
one linear attention layer, z ← z + V S W z / n with S the sum of z zᵀ over all columns so far; its
last column is appended at each step. The targets are the iterates of gradient descent,

    w_0 = 0,   w_{i+1} = w_i − η/n · Xᵀ(X w_i − y),
    loss ½ Σ_i ‖f(Z_i)[:, −1] − (0, 0, w_{i+1}, 1)‖².

The layer can do this exactly (`relay_fast.recipes._thoughts`). All its entries are trained, from
N(0, 0.02²) ("random") or from that sparsity with a random common eigenbasis ("theory"). Without a
chain, one layer does at best one step, with error d(d+1)/(n+d+1). The looped variant applies the
layer L times and is trained on the final weights only.

The paper's learning rate, batch and steps are not known; `paper` has its sizes, d = 10 and n = 20,
with other training settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from relay_fast.recipes._common import Panel, Training, draw_panels, train
from relay_fast.recipes._regression import check_deviations, descend, draw_prompts, one_step_error
from relay_fast.recipes._thoughts import STARTS, ThoughtLayer
from relay_fast.relay.run_folder import RunFolder
from relay_fast.reporting.progress import Display
from relay_fast.utils.settings import Count, Positive, settings

PUBLISHED: dict[str, Any] = {}  # the paper plots its losses


@settings
class Settings:
    training: Training
    dimension: Count = Field(10, description="coordinates of x")
    examples: Count = Field(20, description="points of a prompt")
    thoughts: Count = Field(20, description="steps of the trained chain")
    rate: Positive = Field(0.4, description="learning rate of the gradient descent in the chain")
    start: Literal[*STARTS] = Field("random", description="weights at the start")
    loops: tuple[Count, ...] = Field((2, 5), description="of the looped variants")
    loop_lr: Positive = Field(
        0.02, description="their learning rate, and that of one layer without a chain"
    )
    rollout: Count = Field(5, description="the longest chain evaluated, in trained chains")
    other_deviations: tuple[Positive, ...] = Field(
        (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0, 1.1, 1.1, 1.2),
        description="of x's coordinates in the second evaluation",
    )
    prompts: Count = Field(
        2_000, description="of the evaluation of a chain; the others get 20 times as many"
    )

    def __post_init__(self) -> None:
        check_deviations(self.other_deviations, self.dimension)


_CPU = Settings(
    Training(steps=1500, batch_size=128, lr=0.005, warmup=0.05, betas=(0.9, 0.99), clip=1.0)
)
PRESETS = {
    "cpu": _CPU,
    "paper": replace(_CPU, training=replace(_CPU.training, steps=20_000, batch_size=1024)),
}


def run(
    settings: Settings, folder: RunFolder, *, seed: int, device: str, display: Display
) -> dict[str, Any]:
    c, d, n = settings, settings.dimension, settings.examples

    def fit(name: str, loss, training: Training) -> ThoughtLayer:
        torch.manual_seed(seed)
        model = ThoughtLayer(d, c.start)
        draw = lambda rng, _: draw_prompts(rng, training.batch_size, n, d)
        train(model, loss, draw, training, folder, name, display, seed=seed, device=device)
        return model

    def chain_loss(model: ThoughtLayer, s: Tensor, w: Tensor):
        iterates = descend(s, c.rate, c.thoughts)
        error = model.think(s, iterates[:, :-1], n) - model.columns(iterates[:, 1:])
        return 0.5 * error.square().sum((1, 2)).mean(), None

    def answer_loss(model: ThoughtLayer, s: Tensor, w: Tensor, loops: int):
        return (model.loop(s, torch.zeros_like(w), loops)[:, -1] - w).square().sum(1).mean(), None

    chain = fit("chain", chain_loss, c.training)
    answers = {}
    for loops in (1, *c.loops):
        loss = lambda model, s, w, loops=loops: answer_loss(model, s, w, loops)
        model = fit(f"loops{loops}", loss, replace(c.training, lr=c.loop_lr))
        with torch.no_grad():
            parts = [loss(model, *_prompts(c, seed, device, part))[0].item() for part in range(20)]
        answers[str(loops)] = sum(parts) / len(parts)
    with torch.no_grad():
        eye = torch.eye(d, dtype=torch.float64, device=device)
        return {
            "d": d,
            "n": n,
            "thoughts": c.thoughts,
            "step_error": (chain.step_matrix() + c.rate * eye).abs().max().item(),
            "chain": _compare(chain, c, seed, device, ()),
            "other_covariance": _compare(chain, c, seed, device, c.other_deviations),
            "answers": answers,
        }


def _prompts(c: Settings, seed: int, device: str, part: int, deviations=()):
    """Draws moments and weights of `prompts` prompts; each `part` has its own."""
    rng = np.random.default_rng([seed, 2**32, part])
    prompts = draw_prompts(rng, c.prompts, c.examples, c.dimension, deviations)
    return (torch.from_numpy(array).to(device) for array in prompts)


def _compare(model: ThoughtLayer, c: Settings, seed: int, device: str, deviations) -> dict:
    """Returns mean squared errors of the rollout and of gradient descent after each step."""
    s, w = _prompts(c, seed, device, 0, deviations)
    steps = c.rollout * c.thoughts
    error = lambda iterates: (iterates - w[:, None]).square().sum(2).mean(0).tolist()
    return {
        "rollout": error(model.roll_out(s, steps, c.examples)),
        "gradient_descent": error(descend(s, c.rate, steps)),
    }


def shown_steps(results: Mapping[str, Any]) -> list[int]:
    """Returns the steps in the table: inside the trained chain, its end, and beyond."""
    k, last = results["thoughts"], len(results["chain"]["rollout"]) - 1
    return sorted({1, max(1, k // 4), max(1, k // 2), k, *(m for m in (5 * k // 2, last) if m > k)})


def rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Makes the table: squared errors of the weights beside gradient descent's or theory's."""
    lines = []
    for key, name in (("chain", "rollout"), ("other_covariance", "rollout, other covariance")):
        part = results[key]
        for t in shown_steps(results):
            beyond = " (beyond training)" if t > results["thoughts"] else ""
            lines.append(
                [f"{name}, step {t}{beyond}", part["rollout"][t], part["gradient_descent"][t]]
            )
    theory = one_step_error(results["n"], results["d"])
    for loops, error in results["answers"].items():
        name = "no chain, one layer" if loops == "1" else f"looped {loops} times, no chain"
        lines.append([name, error, theory if loops == "1" else None])
    return ["model", "error", "gradient descent / theory"], lines


def plot(results: Mapping[str, Any], path: Path) -> Path:
    """Plots the error against the number of thoughts, with gradient descent's."""
    panels = []
    for key, title in (("chain", "trained distribution"), ("other_covariance", "other covariance")):
        part = results[key]
        steps = range(len(part["rollout"]))
        trained = results["thoughts"]
        curves = {
            "model's own chain": (steps, part["rollout"]),
            "end of the trained chain": ([trained], [part["rollout"][trained]]),
        }
        dashed = {"gradient descent": (steps, part["gradient_descent"])}
        panels.append(Panel(title, "thoughts", "squared error of w", curves, dashed, log_y=True))
    return draw_panels(path, panels, "Chain of thought as gradient descent")
