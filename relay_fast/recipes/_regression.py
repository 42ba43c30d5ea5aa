"""In-context linear regression: moments of prompts, drawn directly, and gradient descent.

x ~ N(0, Σ), w ~ N(0, Σ⁻¹), y = w·x. Linear attention and gradient descent depend on a prompt of n
points only through the moment of its rows (x, y), divided by n.

Shapes: B prompts, d dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def draw_covariances(rng: np.random.Generator, prompts: int, n: int, d: int) -> np.ndarray:
    """Draws XᵀX / n (B, d, d) of n points from N(0, I).

    For n ≥ d it uses Bartlett's decomposition of the Wishart distribution, O(d²) draws per prompt.

    Args:
        rng: The random generator.
        prompts: B.
        n: Points of each prompt.
        d: Dimensions.
    """
    if n < d:
        x = rng.standard_normal((prompts, n, d))
        return x.mT @ x / n
    lower = np.zeros((prompts, d, d))
    rows, columns = np.tril_indices(d, -1)
    lower[:, rows, columns] = rng.standard_normal((prompts, len(rows)))
    diagonal = np.arange(d)
    lower[:, diagonal, diagonal] = np.sqrt(rng.chisquare(n - diagonal, (prompts, d)))
    return lower @ lower.mT / n


def draw_prompts(
    rng: np.random.Generator, prompts: int, n: int, d: int, deviations: Sequence[float] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Draws prompts.

    Args:
        rng: The random generator.
        prompts: B.
        n: Points of each prompt.
        d: Dimensions.
        deviations: Standard deviations of x's coordinates (the diagonal of Σ^½), by default 1.

    Returns:
        Moments (B, d + 1, d + 1) of (x, y), divided by n, and weights w (B, d).
    """
    check_deviations(deviations, d)
    scale = np.asarray(deviations or np.ones(d))
    covariance = draw_covariances(rng, prompts, n, d) * np.outer(scale, scale)
    w = rng.standard_normal((prompts, d)) / scale
    xy = covariance @ w[:, :, None]
    yy = w[:, None, :] @ xy
    return np.block([[covariance, xy], [xy.mT, yy]]), w


def check_deviations(deviations: Sequence[float], d: int) -> None:
    """Raises ValueError unless there are d positive deviations, or none."""
    if deviations and (len(deviations) != d or min(deviations) <= 0):
        raise ValueError(f"deviations = {tuple(deviations)}: give {d} positive numbers, or none")


def descend(s: Tensor, rate: float, steps: int) -> Tensor:
    """Runs gradient descent from 0 on |Xw − y|² / 2n.

    Args:
        s: Moments (B, d + 1, d + 1) of (x, y), divided by n.
        rate: The learning rate.
        steps: Number of steps.

    Returns:
        (B, steps + 1, d), the iterates 0..steps.
    """
    covariance, xy = s[:, :-1, :-1], s[:, :-1, -1:]
    w, iterates = xy.new_zeros(xy.shape), []
    for _ in range(steps + 1):
        iterates.append(w)
        w = w - rate * (covariance @ w - xy)
    return torch.cat(iterates, 2).mT


def one_step_rate(n: int, d: int) -> float:
    """Returns n / (n + d + 1), the best rate on average for one step of gradient descent."""
    return n / (n + d + 1)


def one_step_error(n: int, d: int) -> float:
    """Returns d (d + 1) / (n + d + 1), the mean squared error after that step (Σ = I)."""
    return d * (d + 1) / (n + d + 1)
