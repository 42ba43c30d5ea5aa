"""Symbolic i-GSM, grade-school arithmetic as a graph (Saunshi et al. 2025, arXiv 2502.17416).

A hierarchy of entities in 4 levels; each edge from a level to the next is an integer variable, as
E#I; a random acyclic graph gives each a formula of others; the statements come shuffled:

    E#I := 4. K#N := 3 * I#N + J#O. ... I#N?

and the answer is the value of the last variable mod 7, one token (chance 1/7). The paper's 24.5 %
of one layer implies that it trained the answer alone, without its chain; so do we.

The paper's constants of the sampler are not known to us. Ours: 4 levels of `width` entities, named
by different letters; the variables are different edges, all alike; in a hidden order a variable has
0 to 3 different parents among those before it, uniform, and the asked one, the last, at least one.
None: a constant 0..6. Otherwise the sum of the parents, the first times 2..6 in half of the cases.
The paper trains with Adafactor, the cpu preset with AdamW and Muon.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from relay_fast._inference import inference
from relay_fast.display import Display
from relay_fast.looped_classifier import LoopedClassifier
from relay_fast.recipes._common import Training
from relay_fast.recipes._compare import compare, comparison_plot, comparison_rows
from relay_fast.recipes._models import parse_shape
from relay_fast.runs import RunFolder

LEVELS, MODULUS, PARENTS = 4, 7, 3
SYMBOLS = ("0", "1", "2", "3", "4", "5", "6", "#", ":=", "+", "*", ".", "?",
           *"ABCDEFGHIJKLMNOPQRSTUVWXYZ")  # fmt: skip
HASH, IS, PLUS, TIMES, STOP, ASK, LETTERS = range(7, 14)
_TEST = 2**32  # stream of the test problems; training counts its steps from 0

# Table 3 of the paper, % right, for graphs whose sizes are not known to us.
PUBLISHED: dict[str, float] = {
    "8x1": 73.2, "1x1": 24.5, "1x2": 52.3, "1x4": 69.9, "1x8": 73.2,
    "2x1": 54.0, "2x2": 66.9, "2x4": 73.6, "4x1": 71.3, "4x2": 71.6,
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """variables, test_variables: how many a problem has, in training and in the test. width:
    entities of a level. problems: of the test, for each number of variables."""

    training: Training
    models: tuple[str, ...] = ("1x1", "1x4", "4x1", "1+1x2+1")
    variables: tuple[int, ...] = (2, 3, 4)
    test_variables: tuple[int, ...] = (2, 3, 4)
    width: int = 3
    d_model: int = 64
    n_heads: int = 4
    activation: str = "relu2"
    problems: int = 1000

    def __post_init__(self) -> None:
        for name in ("variables", "test_variables"):
            if min(getattr(self, name), default=0) < 2:
                raise ValueError(f"{name} = {getattr(self, name)}: give some numbers of at least 2")
        if not 1 <= self.width <= len(SYMBOLS[LETTERS:]) // LEVELS:
            raise ValueError(f"width = {self.width}: give 1 to 6, there are 26 letters")
        if self.problems < 1:
            raise ValueError(f"problems = {self.problems}: give at least 1")
        check_variables(max(self.variables + self.test_variables), self.width)
        for name in self.models:
            parse_shape(name)


def check_variables(variables: int, width: int) -> None:
    """Raises ValueError for more variables than the hierarchy has edges."""
    edges = (LEVELS - 1) * width**2
    if variables > edges:
        raise ValueError(
            f"{variables} variables do not fit into {LEVELS} levels of {width} entities, which "
            f"have {edges} edges: give fewer, or a larger width"
        )


_CPU = Training(steps=1500, batch_size=64, lr=2e-3, muon_lr=0.01, warmup=0.05, weight_decay=0.01)
PRESETS = {
    "cpu": Settings(_CPU),
    "paper": Settings(
        Training(steps=200_000, batch_size=256, lr=1e-3, optimizer="adafactor"),
        models=tuple(PUBLISHED),
        variables=tuple(range(4, 17)),
        test_variables=(4, 8, 12, 16),
        width=4,
        d_model=128,
        n_heads=8,
        activation="gelu_tanh",
        problems=50_000,
    ),
}


def draw_problems(
    rng: np.random.Generator, count: int, variables: int, width: int
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Problems, packed: tokens (N,), answers (B,), cu_seqlens; a problem ends with its "?"."""
    check_variables(variables, width)
    batch, v = count, variables
    every = np.arange(batch)
    # The graph: in the hidden order, the parents of variable j are the first `number` of a random
    # order of the variables before it.
    number = np.minimum(rng.integers(0, PARENTS + 1, (batch, v)), np.arange(v))
    number[:, -1] = np.maximum(number[:, -1], 1)
    order = np.where(np.tri(v, k=-1, dtype=bool), rng.random((batch, v, v)), 2.0).argsort(2)
    parents = np.pad(order, ((0, 0), (0, 0), (0, PARENTS)))[:, :, :PARENTS]
    used = np.arange(PARENTS) < number[..., None]
    factor = np.where(rng.random((batch, v)) < 0.5, rng.integers(2, MODULUS, (batch, v)), 1)
    constant = rng.integers(0, MODULUS, (batch, v))

    value = np.zeros((batch, v), np.int64)
    for j in range(v):
        terms = value[every[:, None], parents[:, j]] * used[:, j]
        terms[:, 0] *= factor[:, j]
        value[:, j] = np.where(number[:, j] == 0, constant[:, j], terms.sum(1) % MODULUS)

    # Names: variable j is an edge between entities of two levels that follow each other.
    letters = rng.permuted(np.tile(np.arange(len(SYMBOLS) - LETTERS), (batch, 1)), axis=1)
    edges = rng.permuted(np.tile(np.arange((LEVELS - 1) * width**2), (batch, 1)), axis=1)[:, :v]
    level, upper, lower = edges // width**2, edges // width % width, edges % width
    name = np.stack([
        letters[every[:, None], level * width + upper] + LETTERS,
        np.full((batch, v), HASH),
        letters[every[:, None], (level + 1) * width + lower] + LETTERS,
    ], axis=2)  # fmt: skip

    # A statement's slots: name :=  constant | factor * | name (+ name)*  .
    sign = lambda symbol: np.full((batch, v, 1), symbol)
    shown = lambda mask, slots: np.repeat(mask[..., None], slots, axis=2)
    always = np.ones((batch, v), bool)
    parts = [(name, always), (sign(IS), always), (constant[..., None], number == 0)]
    scaled = (number > 0) & (factor > 1)
    parts += [(np.concatenate([factor[..., None], sign(TIMES)], 2), scaled)]
    for i in range(PARENTS):
        parent = name[every[:, None], parents[:, :, i]]
        if i:
            parent = np.concatenate([sign(PLUS), parent], 2)
        parts.append((parent, used[:, :, i]))
    parts.append((sign(STOP), always))
    tokens = np.concatenate([slots for slots, _ in parts], 2)
    present = np.concatenate([shown(mask, slots.shape[2]) for slots, mask in parts], 2)

    shuffle = rng.random((batch, v)).argsort(1)[..., None]
    tokens = np.take_along_axis(tokens, shuffle, 1).reshape(batch, -1)
    present = np.take_along_axis(present, shuffle, 1).reshape(batch, -1)
    question = np.concatenate([name[:, -1], np.full((batch, 1), ASK)], axis=1)
    tokens = np.concatenate([tokens, question], axis=1)
    present = np.concatenate([present, np.ones_like(question, bool)], axis=1)
    cu_seqlens = [0, *present.sum(1).cumsum().tolist()]
    return tokens[present], value[:, -1], cu_seqlens


def accuracy(model: LoopedClassifier, settings: Settings, variables: int, seed: int) -> float:
    """Share of the answers that are right."""
    rng = np.random.default_rng([seed, _TEST, variables])
    device = model.embedding.weight.device
    right = 0
    with inference(model):
        for first in range(0, settings.problems, 250):
            count = min(250, settings.problems - first)
            tokens, answers, cu_seqlens = draw_problems(rng, count, variables, settings.width)
            chosen = model.predict(
                torch.from_numpy(tokens).to(device), torch.tensor(cu_seqlens[1:]).to(device) - 1,
                cu_seqlens=cu_seqlens,
            )  # fmt: skip
            right += int((chosen.cpu().numpy() == answers).sum())
    return right / settings.problems


def run(
    settings: Settings, folder: RunFolder, *, seed: int, device: str, display: Display
) -> dict[str, Any]:
    def draw(rng: np.random.Generator, _: int):
        # One number of variables a batch, each as often as the others.
        variables = int(rng.choice(settings.variables))
        tokens, answers, cu_seqlens = draw_problems(
            rng, settings.training.batch_size, variables, settings.width
        )
        return tokens, np.array(cu_seqlens[1:]) - 1, answers, cu_seqlens

    models = compare(
        settings, len(SYMBOLS), draw, lambda model, v: accuracy(model, settings, v, seed),
        settings.test_variables, folder, display, seed=seed, device=device,
    )  # fmt: skip
    return {"models": models}


def rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """% right by variables; the paper's column is at its own, unknown number of variables."""
    header, lines = comparison_rows(results["models"], {}, "v")
    lines = [
        [*line, PUBLISHED.get(name)] for line, name in zip(lines, results["models"], strict=True)
    ]
    return [*header, "paper (its own sampler)"], lines


def plot(results: Mapping[str, Any], path: Path) -> Path:
    title = "Symbolic i-GSM: looped layers against stacks (chance 14 %)"
    return comparison_plot(results["models"], {}, "variables", title, path)
