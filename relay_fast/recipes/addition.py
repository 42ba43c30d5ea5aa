"""Addition of many numbers by looped models (Saunshi et al. 2025, arXiv 2502.17416).

`315+120+045+824=` → `1304`: operands uniform and zero-padded, the sum without leading zeros and
most significant digit first, then an end token. There is no chain of thought; n is drawn for each
problem. An answer is correct if each of its tokens is, given the true ones before it, which is when
greedy decoding writes it.

The paper does not state its tokenisation and position encoding: here each character is a token, and
positions are RoPE. The paper takes the best of 3 seeds, a run here is one. It trains with
Adafactor, the cpu preset with AdamW and Muon, on 2-digit operands: a single layer solves 1 digit,
and 3 digits need a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from relay_fast.decoding._inference import inference
from relay_fast.models.classifier import LoopedClassifier
from relay_fast.recipes._common import (
    Activation,
    Heads,
    Problems,
    Shapes,
    Training,
    Width,
    check_models,
)
from relay_fast.recipes._compare import compare, comparison_plot, comparison_rows
from relay_fast.recipes._own_tasks import OwnTasks, compare_own, own_plot, own_rows
from relay_fast.relay.run_folder import RunFolder
from relay_fast.reporting.progress import Display
from relay_fast.utils.seeds import RECIPE_TEST_STREAM
from relay_fast.utils.settings import Counts, says, settings

PLUS, EQUALS, END, VOCABULARY_SIZE = 10, 11, 12, 13

# Table 1 of the paper, % correct for n operands, best of 3 seeds.
PUBLISHED: dict[str, dict[int, float]] = {
    "12x1": {8: 100, 16: 100, 24: 100, 32: 100},
    "1x1": {8: 0.1, 16: 0.1, 24: 0.1, 32: 0.0},
    "1x12": {8: 99.9, 16: 100, 24: 99.9, 32: 99.6},
    "2x1": {8: 85.8, 16: 71.5, 24: 49.3, 32: 38.8},
    "2x6": {8: 100, 16: 99.8, 24: 99.7, 32: 99.5},
    "3x1": {8: 97.2, 16: 78.5, 24: 69.2, 32: 60.7},
    "3x4": {8: 100, 16: 99.1, 24: 97.0, 32: 96.6},
}


@settings
class Settings:
    training: Training
    models: Shapes = ("1x1", "1x4", "4x1", "1+1x2+1")
    digits: Annotated[int, Field(ge=1, le=9), says("1 to 9")] = Field(
        2, description="of an operand"
    )
    counts: Counts = Field((2, 3, 4), description="numbers of operands in training")
    test_counts: Counts = Field((2, 3, 4), description="numbers of operands in the test")
    d_model: Width = 64
    n_heads: Heads = 4
    activation: Activation = "relu2"
    problems: Problems = 1000

    def __post_init__(self) -> None:
        check_models(self.models, self.d_model, self.n_heads)


PRESETS = {
    "cpu": Settings(
        Training(steps=2500, batch_size=64, lr=2e-3, muon_lr=0.01, warmup=0.05, weight_decay=0.01)
    ),
    "paper": Settings(
        Training(steps=200_000, batch_size=1024, lr=5e-3, optimizer="adafactor"),
        models=tuple(PUBLISHED),
        digits=3,
        counts=(2, 4, 8, 16, 32),
        test_counts=(8, 16, 24, 32),
        d_model=256,
        n_heads=8,
        activation="gelu_tanh",
    ),
}


def draw_sums(
    rng: np.random.Generator, counts: np.ndarray, digits: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """Draws problems with their answers, packed.

    Args:
        rng: The random generator.
        counts: (B,) operands of each problem.
        digits: Digits of an operand.

    Returns:
        Tokens (N,), rows (R,) of "=" and of the answers' digits, targets (R,) (the answers' digits
        and END), cu_seqlens.
    """
    batch, most = len(counts), int(counts.max())
    present = np.arange(most) < counts[:, None]
    operands = np.where(present, rng.integers(0, 10**digits, (batch, most)), 0)
    answer = _digits(operands.sum(1), digits + len(str(most)))
    # Each operand is followed by a sign; the last sign is "=".
    sign = np.where(np.arange(most) == counts[:, None] - 1, EQUALS, PLUS)
    problem = np.concatenate([_digits(operands, digits), sign[..., None]], axis=2)
    written = answer.cumsum(1) > 0
    written[:, -1] = True
    tokens = np.concatenate([problem.reshape(batch, -1), answer], axis=1)
    used = np.concatenate([np.repeat(present, digits + 1, axis=1), written], axis=1)
    read = used & (np.arange(tokens.shape[1]) >= problem[0].size)
    read[:, : problem[0].size] |= tokens[:, : problem[0].size] == EQUALS
    cu_seqlens = np.concatenate([[0], used.sum(1).cumsum()])
    tokens, rows = tokens[used], np.flatnonzero((read & used)[used])
    follows = np.append(tokens[1:], END)
    follows[cu_seqlens[1:] - 1] = END
    return tokens, rows, follows[rows], cu_seqlens.tolist()


def _digits(numbers: np.ndarray, count: int) -> np.ndarray:
    """Returns (…, count) decimal digits, most significant first."""
    return numbers[..., None] // 10 ** np.arange(count)[::-1] % 10


def accuracy(model: LoopedClassifier, settings: Settings, n: int, seed: int) -> float:
    """Measures the share of correct sums on `settings.problems` fresh problems.

    Args:
        model: The model.
        settings: The recipe's settings.
        n: Operands of each sum.
        seed: Selects the problems.
    """
    rng = np.random.default_rng([seed, RECIPE_TEST_STREAM, n])
    device = model.embedding.weight.device
    correct = 0
    with inference(model):
        for first in range(0, settings.problems, 250):
            counts = np.full(min(250, settings.problems - first), n)
            tokens, rows, targets, cu_seqlens = draw_sums(rng, counts, settings.digits)
            chosen = model.predict(
                torch.from_numpy(tokens).to(device),
                torch.from_numpy(rows).to(device),
                cu_seqlens=cu_seqlens,
            )
            begins = np.flatnonzero(np.append(True, targets[:-1] == END))
            correct += int(np.logical_and.reduceat(chosen.cpu().numpy() == targets, begins).sum())
    return correct / settings.problems


def run(
    settings: Settings,
    folder: RunFolder,
    *,
    seed: int,
    device: str,
    display: Display,
    tasks: OwnTasks | None = None,
) -> dict[str, Any]:
    if tasks is not None:
        return compare_own(settings, tasks, folder, display, seed=seed, device=device)

    def draw(rng: np.random.Generator, _: int):
        counts = rng.choice(settings.counts, settings.training.batch_size)
        return draw_sums(rng, counts, settings.digits)

    def measure(model: LoopedClassifier) -> dict[str, float]:
        return {str(n): accuracy(model, settings, n, seed) for n in settings.test_counts}

    models = compare(
        settings, VOCABULARY_SIZE, draw, measure, folder, display, seed=seed, device=device
    )
    return {"models": models, "published": settings.digits == 3}


def _published(results: Mapping[str, Any]) -> Mapping[str, Mapping[int, float]]:
    """Returns the paper's numbers if the task is the paper's, else none."""
    return PUBLISHED if results["published"] else {}


def rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    if "own" in results:
        return own_rows(results)
    return comparison_rows(results["models"], _published(results), "n")


def plot(results: Mapping[str, Any], path: Path) -> Path:
    if "own" in results:
        return own_plot(results, path)
    title = "Addition: looped layers against stacks"
    return comparison_plot(results["models"], _published(results), "operands n", title, path)
