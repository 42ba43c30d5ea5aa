"""Symbolic i-GSM, grade-school arithmetic as a graph (Saunshi et al. 2025, arXiv 2502.17416).

A hierarchy has entities in 4 levels; each edge from a level to the next is an integer variable,
like E#I; a random acyclic graph gives each variable a formula of others. The statements are
shuffled:

    E#I := 4. K#N := 3 * I#N + J#O. ... I#N?

The answer is the value of the last variable mod 7, one token (chance 1/7). The paper's 24.5 % for
one layer implies that only the answer is trained, without a chain, as it is here.

The constants of the paper's sampler are not known. Here there are 4 levels of `width` entities,
named by different letters; the variables are different, equally likely edges; in a hidden order, a
variable has 0 to `parents` different parents among those before it, uniformly, and the last one has
at least one. A variable without parents is a constant 0..6. Any other is the sum of its parents,
the first one times 2..`factor` in half of the cases. The depth of a constant is 0, that of another
variable one more than its deepest parent's.

This form takes more than minutes to learn. The cpu preset has an easier one, in which depth still
matters: each edge of the hierarchy is one token (names "whole"), all variables are asked for,
"? a b c", each answered at its own token (asked "every"), formulas are sums without factors, and
training starts with constants only and brings in formulas over a share of it (`curriculum`).

The paper trains with Adafactor, the cpu preset with AdamW and Muon.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field

from relay_fast.decoding._inference import inference
from relay_fast.models.classifier import LoopedClassifier
from relay_fast.recipes._common import Activation, Heads, Shapes, Training, Width, check_models
from relay_fast.recipes._compare import compare, comparison_plot, comparison_rows
from relay_fast.recipes._own_tasks import OwnTasks, compare_own, own_plot, own_rows
from relay_fast.relay.run_folder import RunFolder
from relay_fast.reporting.progress import Display
from relay_fast.utils.seeds import RECIPE_TEST_STREAM
from relay_fast.utils.settings import Count, Share, says, settings

LEVELS, MODULUS = 4, 7
ASKED, NAMES = ("last", "every"), ("letters", "whole")
SYMBOLS = (
    "0",
    "1",
    "2",
    "3",
    "4",
    "5",
    "6",
    "#",
    ":=",
    "+",
    "*",
    ".",
    "?",
    *"ABCDEFGHIJKLMNOPQRSTUVWXYZ",
)
HASH, IS, PLUS, TIMES, STOP, ASK, LETTERS = range(7, 14)

# Table 3 of the paper, % correct, for graphs of unknown sizes.
PUBLISHED: dict[str, float] = {
    "8x1": 73.2,
    "1x1": 24.5,
    "1x2": 52.3,
    "1x4": 69.9,
    "1x8": 73.2,
    "2x1": 54.0,
    "2x2": 66.9,
    "2x4": 73.6,
    "4x1": 71.3,
    "4x2": 71.6,
}


@settings
class Settings:
    training: Training
    models: Shapes = ("1x1", "1x2", "1x4", "4x1")
    variables: Annotated[tuple[Annotated[int, Field(ge=2)], ...], Field(min_length=1)] = Field(
        (5,), description="how many a problem has, each number as often as the others"
    )
    width: Annotated[
        int,
        Field(ge=1, le=len(SYMBOLS[LETTERS:]) // LEVELS),
        says("1 to 6, there are 26 letters"),
    ] = Field(2, description="entities of a level")
    parents: Count = Field(2, description="of a variable, at most")
    factor: Annotated[int, Field(ge=1, lt=MODULUS), says(f"1 to {MODULUS - 1}")] = Field(
        1, description="the largest, 1 for none"
    )
    asked: Literal[*ASKED] = Field("every", description="the variables that are asked for")
    names: Literal[*NAMES] = Field("whole", description="of variables: a token, or its letters")
    curriculum: Share = Field(0.4, description="of the training until all formulas are in")
    d_model: Width = 64
    n_heads: Heads = 4
    activation: Activation = "relu2"
    problems: Count = Field(1000, description="problems of each test")

    def __post_init__(self) -> None:
        if max(self.variables) > self.edges:
            raise ValueError(
                f"{max(self.variables)} variables do not fit into {LEVELS} levels of {self.width} "
                f"entities, which have {self.edges} edges: give fewer, or a larger width"
            )
        check_models(self.models, self.d_model, self.n_heads)

    @property
    def edges(self) -> int:
        """The number of edges of the hierarchy, which are the possible variables."""
        return (LEVELS - 1) * self.width**2

    @property
    def vocabulary_size(self) -> int:
        return LETTERS + (self.edges if self.names == "whole" else len(SYMBOLS) - LETTERS)


_CPU = Training(
    steps=1600,
    batch_size=64,
    lr=3e-3,
    muon_lr=0.03,
    warmup=0.05,
    betas=(0.9, 0.98),
    weight_decay=0.01,
    clip=1.0,
)
PRESETS = {
    "cpu": Settings(_CPU),
    "paper": Settings(
        Training(steps=200_000, batch_size=256, lr=1e-3, optimizer="adafactor"),
        models=tuple(PUBLISHED),
        variables=tuple(range(4, 17)),
        width=4,
        parents=3,
        factor=6,
        asked="last",
        names="letters",
        curriculum=0.0,
        d_model=128,
        n_heads=8,
        activation="gelu_tanh",
        problems=50_000,
    ),
}


class Problems(NamedTuple):
    """B packed problems that ask for R variables."""

    tokens: np.ndarray  # (N,)
    rows: np.ndarray  # (R,) tokens at which they are answered
    answers: np.ndarray  # (R,)
    depths: np.ndarray  # (R,) of the variables
    cu_seqlens: list[int]  # B + 1


class _Graph(NamedTuple):
    """Formulas of B problems of V variables with up to P parents, in a hidden order."""

    number: np.ndarray  # (B, V) parents of a variable
    parents: np.ndarray  # (B, V, P)
    used: np.ndarray  # (B, V, P) bool, the first `number`
    factor: np.ndarray  # (B, V) of the first parent
    constant: np.ndarray  # (B, V) for variables without parents
    value: np.ndarray  # (B, V)
    depth: np.ndarray  # (B, V)


def _draw_graph(
    rng: np.random.Generator, settings: Settings, batch: int, v: int, formulas: float
) -> _Graph:
    most, every = settings.parents, np.arange(batch)[:, None]
    # The parents of variable j are the first `number` of a random permutation of the variables
    # before it.
    number = np.minimum(rng.integers(0, most + 1, (batch, v)), np.arange(v))
    number[:, -1] = np.maximum(number[:, -1], 1)
    number = np.where(rng.random((batch, v)) < formulas, number, 0)
    order = np.where(np.tri(v, k=-1, dtype=bool), rng.random((batch, v, v)), 2.0).argsort(2)
    parents = np.pad(order, ((0, 0), (0, 0), (0, most)))[:, :, :most]
    used = np.arange(most) < number[..., None]
    factor = rng.integers(2, max(3, settings.factor + 1), (batch, v))
    factor = np.where((rng.random((batch, v)) < 0.5) & (settings.factor > 1), factor, 1)
    constant = rng.integers(0, MODULUS, (batch, v))

    value, depth = np.zeros((2, batch, v), np.int64)
    for j in range(v):
        terms = value[every, parents[:, j]] * used[:, j]
        terms[:, 0] *= factor[:, j]
        value[:, j] = np.where(number[:, j] == 0, constant[:, j], terms.sum(1) % MODULUS)
        depth[:, j] = np.where(used[:, j], depth[every, parents[:, j]] + 1, 0).max(1)
    return _Graph(number, parents, used, factor, constant, value, depth)


def _draw_names(rng: np.random.Generator, settings: Settings, batch: int, v: int) -> np.ndarray:
    """Draws the tokens (B, V, slots) of the variables' names."""
    width, every = settings.width, np.arange(batch)[:, None]
    # Variable j is an edge between entities of two consecutive levels.
    edges = rng.permuted(np.tile(np.arange(settings.edges), (batch, 1)), axis=1)[:, :v]
    if settings.names == "whole":
        name = edges[..., None] + LETTERS
    else:
        letters = rng.permuted(np.tile(np.arange(len(SYMBOLS) - LETTERS), (batch, 1)), axis=1)
        level, upper, lower = edges // width**2, edges // width % width, edges % width
        name = np.stack(
            [
                letters[every, level * width + upper] + LETTERS,
                np.full((batch, v), HASH),
                letters[every, (level + 1) * width + lower] + LETTERS,
            ],
            axis=2,
        )
    return name


def _statements(graph: _Graph, name: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the statements' slots (B, V, slots) and which of them are present."""
    batch, v, most = graph.used.shape
    every = np.arange(batch)[:, None]
    number, factor = graph.number, graph.factor
    # The slots: name :=  constant | factor * | name (+ name)*  .
    sign = lambda symbol: np.full((batch, v, 1), symbol)
    shown = lambda mask, slots: np.repeat(mask[..., None], slots, axis=2)
    always = np.ones((batch, v), bool)
    parts = [(name, always), (sign(IS), always), (graph.constant[..., None], number == 0)]
    scaled = (number > 0) & (factor > 1)
    parts += [(np.concatenate([factor[..., None], sign(TIMES)], 2), scaled)]
    for i in range(most):
        parent = name[every, graph.parents[:, :, i]]
        if i:
            parent = np.concatenate([sign(PLUS), parent], 2)
        parts.append((parent, graph.used[:, :, i]))
    parts.append((sign(STOP), always))
    tokens = np.concatenate([slots for slots, _ in parts], 2)
    present = np.concatenate([shown(mask, slots.shape[2]) for slots, mask in parts], 2)
    return tokens, present


def draw_problems(
    rng: np.random.Generator, settings: Settings, count: int, variables: int, formulas: float = 1.0
) -> Problems:
    """Draws problems.

    Args:
        rng: The random generator.
        settings: The recipe's settings.
        count: Number of problems.
        variables: Variables of each problem.
        formulas: Share of the formulas that is kept; the others become constants.
    """
    batch, v, every = count, variables, np.arange(count)[:, None]
    graph = _draw_graph(rng, settings, batch, v, formulas)
    name = _draw_names(rng, settings, batch, v)
    tokens, present = _statements(graph, name)
    shuffle = rng.random((batch, v)).argsort(1)
    tokens = tokens[every, shuffle].reshape(batch, -1)
    present = present[every, shuffle].reshape(batch, -1)
    mark = np.full((batch, 1), ASK)
    if settings.asked == "last":
        asked = np.full((batch, 1), v - 1)
        question = np.concatenate([name[:, -1], mark], axis=1)
        answered = np.arange(question.shape[1]) == question.shape[1] - 1
    else:
        asked = rng.random((batch, v)).argsort(1)
        question = np.concatenate([mark, name[every, asked].reshape(batch, -1)], axis=1)
        answered = np.arange(question.shape[1]) % name.shape[2] == 0
        answered[0] = False
    read = np.concatenate([np.zeros_like(present), np.tile(answered, (batch, 1))], axis=1)
    tokens = np.concatenate([tokens, question], axis=1)
    present = np.concatenate([present, np.ones_like(question, bool)], axis=1)
    return Problems(
        tokens[present],
        np.flatnonzero(read[present]),
        graph.value[every, asked].ravel(),
        graph.depth[every, asked].ravel(),
        [0, *present.sum(1).cumsum().tolist()],
    )


def accuracy(model: LoopedClassifier, settings: Settings, seed: int) -> dict[str, float]:
    """Measures the share of correct answers by depth, for depths of at least 1 % of the variables.

    Args:
        model: The model.
        settings: The settings.
        seed: Selects the problems, which are fresh ones.
    """
    rng = np.random.default_rng([seed, RECIPE_TEST_STREAM])
    device = model.embedding.weight.device
    correct, depths = [], []
    with inference(model):
        for first in range(0, settings.problems, 100):
            count = min(100, settings.problems - first)
            p = draw_problems(rng, settings, count, int(rng.choice(settings.variables)))
            chosen = model.predict(
                torch.from_numpy(p.tokens).to(device),
                torch.from_numpy(p.rows).to(device),
                cu_seqlens=p.cu_seqlens,
            )
            correct.append(chosen.cpu().numpy() == p.answers)
            depths.append(p.depths)
    correct, depths = np.concatenate(correct), np.concatenate(depths)
    counts = np.bincount(depths)
    often = np.flatnonzero(counts >= 0.01 * len(depths))
    return {str(depth): float(correct[depths == depth].mean()) for depth in often}


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
    ramp = settings.curriculum * settings.training.steps

    def draw(rng: np.random.Generator, step: int):
        # All problems of a batch have the same number of variables, drawn uniformly.
        variables = int(rng.choice(settings.variables))
        formulas = step / ramp if step < ramp else 1.0
        p = draw_problems(rng, settings, settings.training.batch_size, variables, formulas)
        return p.tokens, p.rows, p.answers, p.cu_seqlens

    models = compare(
        settings,
        settings.vocabulary_size,
        draw,
        lambda model: accuracy(model, settings, seed),
        folder,
        display,
        seed=seed,
        device=device,
    )
    return {"models": models}


def rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Makes the table: % correct by depth; the paper's column is over all of its depths."""
    if "own" in results:
        return own_rows(results)
    header, lines = comparison_rows(results["models"], {}, "depth")
    lines = [
        [*line, PUBLISHED.get(name)] for line, name in zip(lines, results["models"], strict=True)
    ]
    return [*header, "paper (its own sampler)"], lines


def plot(results: Mapping[str, Any], path: Path) -> Path:
    if "own" in results:
        return own_plot(results, path)
    title = "Symbolic i-GSM: looped layers against stacks (chance 14 %)"
    return comparison_plot(results["models"], {}, "depth", title, path)
