"""p-hop induction by looped models (Saunshi et al. 2025, arXiv 2502.17416).

For characters v_1 … v_n: find_1(v, i) = max({0} ∪ {j ≤ i : v_{j−1} = v_i}), find_p = find_1 ∘
find_{p−1}, hop_p(v) = v_{find_p(v, n)}. A hop finds the last earlier occurrence of the current
character and moves to its successor. One layer can do p hops in ⌊log2 p⌋ + 2 loops (the paper's
Corollary 5.3, built in tests/models/test_construction_p_hop.py).

target "last": Saunshi's form: one p for each model, one answer for each sequence; p hops always
exist.
target "every": the denser form of Sanford et al. 2024 (arXiv 2402.09268): the sequence begins with
p, has no equal neighbours, and every position has its own hop_p, or ⊥ without p hops.

The paper trains with Adafactor; the cpu preset with AdamW, and Muon for the block's matrices. A
model's name is k x L, or prelude + k x L + coda, as in "1x4" and "1+1x2+1".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from relay_fast.decoding._inference import inference
from relay_fast.models.classifier import LoopedClassifier
from relay_fast.recipes._common import (
    Activation,
    Heads,
    Panel,
    Problems,
    Shapes,
    Training,
    Width,
    check_models,
    draw_panels,
    train,
)
from relay_fast.recipes._compare import comparison_rows
from relay_fast.recipes._models import classifier_loss, make_classifier
from relay_fast.recipes._own_tasks import OwnTasks, compare_own, own_plot, own_rows
from relay_fast.relay.run_folder import RunFolder
from relay_fast.reporting.progress import Display
from relay_fast.utils.seeds import RECIPE_TEST_STREAM
from relay_fast.utils.settings import Count, Counts, settings

TARGETS = ("every", "last")

# Table 2 of the paper, % correct: d 128, 8 heads, n = 256, 4 characters.
PUBLISHED: dict[str, dict[int, float]] = {
    "6x1": {16: 99.9, 32: 99.6},
    "1x1": {16: 48.9, 32: 49.0},
    "1x6": {16: 99.9, 32: 99.5},
    "2x1": {16: 68.8, 32: 59.4},
    "2x3": {16: 99.9, 32: 99.8},
    "3x1": {16: 97.2, 32: 73.0},
    "3x2": {16: 99.9, 32: 99.5},
}


@settings
class Settings:
    NEEDS_MODELS: ClassVar[bool] = True  # subclasses may do without

    training: Training
    models: Shapes = ("1x1", "1x4", "4x1", "1+1x2+1")
    length: Count = Field(48, description="characters of a sequence, n")
    characters: int = Field(4, ge=3, description="different characters")
    hops: Counts = Field((1, 2, 3, 4), description="the p that occur")
    target: Literal[*TARGETS] = Field("every", description="the positions that are asked for")
    d_model: Width = 64
    n_heads: Heads = 4
    activation: Activation = "relu2"
    problems: Problems = 1000

    def __post_init__(self) -> None:
        check_hops(max(self.hops), self.length, self.target)
        if self.models or self.NEEDS_MODELS:
            check_models(self.models, self.d_model, self.n_heads)

    @property
    def vocabulary_size(self) -> int:
        """The number of characters, plus ⊥ and one token for each p."""
        return self.characters + 1 + max(self.hops)


def check_hops(p: int, n: int, target: str = "last") -> None:
    """Checks that hops fit into a sequence.

    Args:
        p: Number of hops.
        n: Number of characters.
        target: "last" or "every".

    Raises:
        ValueError: They do not fit.
    """
    most = (n - 1) // 2 if target == "last" else n - 2
    if p > most:
        raise ValueError(
            f"p = {p} hops do not fit into a sequence of {n} characters, which holds at most "
            f"{max(0, most)}: choose a smaller p or a longer sequence"
        )


# Data


def hop(v: np.ndarray, p: int | np.ndarray, absent: int) -> np.ndarray:
    """Computes hop_p at every position.

    Args:
        v: (B, n) characters, counted from 0.
        p: An int, or one for each sequence (B,).
        absent: Stands for a hop that finds nothing.

    Returns:
        (B, n) characters.
    """
    batch, n = v.shape
    p = np.broadcast_to(p, batch)[:, None]
    landing = np.full((batch, n + 1), n)  # place n stands for "nowhere" and leads to itself
    places = np.arange(n)
    for character in range(v.max(initial=0) + 1):
        here = v == character
        last = np.maximum.accumulate(np.where(here, places, -1), axis=1)
        before = np.concatenate([np.full((batch, 1), -1), last[:, :-1]], axis=1)
        found = here & (before >= 0)
        landing[:, :n][found] = before[found] + 1
    at = np.tile(places, (batch, 1))
    for step in range(int(p.max(initial=0))):
        at = np.where(step < p, np.take_along_axis(landing, at, 1), at)
    return np.take_along_axis(np.pad(v, ((0, 0), (0, 1)), constant_values=absent), at, 1)


def draw_plain(rng: np.random.Generator, count: int, n: int, characters: int) -> np.ndarray:
    """Draws characters, each uniform among those that differ from the one before.

    Args:
        rng: The random generator.
        count: Number of sequences.
        n: Characters of a sequence.
        characters: Size of the alphabet.

    Returns:
        (count, n) characters.
    """
    steps = rng.integers(1, characters, (count, n))
    steps[:, 0] = rng.integers(0, characters, count)
    return steps.cumsum(1) % characters


def draw_chained(
    rng: np.random.Generator, count: int, n: int, p: int, characters: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draws sequences in which p hops from the end always exist.

    A random chain c_0 … c_p without equal neighbours is drawn; c_0 is the last character, and hop k
    lands on c_k at a uniformly drawn place, just after c_{k−1}. The characters between two landings
    are uniform among those that do not change the hops.

    Args:
        rng: The random generator.
        count: Number of sequences.
        n: Their length.
        p: Number of hops.
        characters: Size of the alphabet.

    Returns:
        Sequences (count, n) and their hop_p (count,).
    """
    check_hops(p, n)
    chain = draw_plain(rng, count, p + 1, characters)
    # The places of p pairs among n − 1 − 2p single characters, in random order.
    items = n - 1 - p
    pairs = np.sort(rng.random((count, items)).argsort(1)[:, :p], axis=1)
    landing = (pairs + np.arange(p) + 1)[:, ::-1]  # hop 1 lands last
    v = rng.integers(0, characters, (count, n))
    # c_k may occur again before hop k + 1's landing, but not from there to hop k's landing.
    hops_below = np.zeros((count, n), np.int64)
    np.put_along_axis(hops_below, landing, 1, 1)
    hops_below = hops_below.cumsum(1)
    guard = np.where(hops_below > 0, p - hops_below, 0)
    other = (v - np.take_along_axis(chain, guard, 1)) % characters
    shift = rng.integers(1, characters, (count, n))
    v = np.where((hops_below > 0) & (other == 0), (v + shift) % characters, v)
    np.put_along_axis(v, landing, chain[:, 1:], 1)
    np.put_along_axis(v, landing - 1, chain[:, :-1], 1)
    v[:, -1] = chain[:, 0]
    return v, chain[:, -1]


def draw_problems(
    rng: np.random.Generator, settings: Settings, p: int | np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws problems.

    Args:
        rng: The random generator.
        settings: The recipe's settings.
        p: An int, or with target "every" one for each problem (count,).
        count: Number of problems.

    Returns:
        Tokens (count, 1 + n), rows (R,) of the flat tokens that have a target, targets (R,).
    """
    s = settings
    width = s.length + 1
    if s.target == "last":
        v, answers = draw_chained(rng, count, s.length, int(p), s.characters)
        rows, targets = np.arange(1, count + 1) * width - 1, answers
    else:
        v = draw_plain(rng, count, s.length, s.characters)
        rows = (np.arange(count)[:, None] * width + np.arange(1, width)).ravel()
        targets = hop(v, p, absent=s.characters).ravel()
    first = np.broadcast_to(np.asarray(p) + s.characters, count)
    return np.concatenate([first[:, None], v], axis=1), rows, targets


# Models


def make_model(
    settings: Settings, name: str, seed: int, tasks: OwnTasks | None = None
) -> LoopedClassifier:
    """Builds a model.

    Args:
        settings: The settings.
        name: The model's shape, such as "1x4".
        seed: Selects its weights.
        tasks: What it is for, instead of p-hop.
    """
    return make_classifier(
        name,
        settings.vocabulary_size if tasks is None else tasks.vocabulary.size,
        d_model=settings.d_model,
        n_heads=settings.n_heads,
        activation=settings.activation,
        seed=seed,
    )


def make_draw(settings: Settings, p: int | None = None) -> Callable:
    """Makes the function that draws batches, of `p` hops or of all numbers in equal shares."""

    def draw(rng: np.random.Generator, _: int):
        size = settings.training.batch_size
        if p is None:  # one for each problem, or for the batch if that has only one
            hops = rng.choice(settings.hops, size if settings.target == "every" else None)
        else:
            hops = p
        return draw_problems(rng, settings, hops, size)

    return draw


def accuracy(model: LoopedClassifier, settings: Settings, p: int, seed: int, **options) -> float:
    """Measures the share correct on `settings.problems` fresh problems.

    With target "every", only the second half of the positions counts.

    Args:
        model: The model.
        settings: The recipe's settings.
        p: Number of hops.
        seed: Selects the problems.
        options: Passed to `LoopedClassifier.forward`.
    """
    rng = np.random.default_rng([seed, RECIPE_TEST_STREAM, p])
    device = model.embedding.weight.device
    correct = total = 0
    with inference(model):
        for first in range(0, settings.problems, 250):
            count = min(250, settings.problems - first)
            tokens, rows, targets = draw_problems(rng, settings, p, count)
            if settings.target == "every":
                late = rows % (settings.length + 1) > settings.length // 2
                rows, targets = rows[late], targets[late]
            at = torch.from_numpy(rows).to(device)
            chosen = model.predict(torch.from_numpy(tokens).to(device), at, **options)
            correct += int((chosen.cpu().numpy() == targets).sum())
            total += len(targets)
    return correct / total


PRESETS = {
    "cpu": Settings(
        Training(
            steps=700,
            batch_size=32,
            lr=3e-3,
            muon_lr=0.03,
            warmup=0.05,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            clip=1.0,
        )
    ),
    "paper": Settings(
        Training(steps=200_000, batch_size=256, lr=1e-3, optimizer="adafactor"),
        models=tuple(PUBLISHED),
        length=256,
        hops=(16, 32),
        target="last",
        d_model=128,
        n_heads=8,
        activation="gelu_tanh",
        problems=262_144,
    ),
}


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
    # One model for all p if its input has p, else one for each p.
    groups = [None] if settings.target == "every" else settings.hops
    results: dict[str, Any] = {}
    for name in settings.models:
        entry: dict[str, Any] = {"accuracy": {}, "seconds": 0.0}
        for p in groups:
            model = make_model(settings, name, seed)
            trained = train(
                model,
                classifier_loss,
                make_draw(settings, p),
                settings.training,
                folder,
                name if p is None else f"{name}_p{p}",
                display,
                seed=seed,
                device=device,
            )
            for q in settings.hops if p is None else [p]:
                entry["accuracy"][str(q)] = accuracy(model, settings, q, seed)
            entry["seconds"] += round(trained.seconds, 2)
            entry["parameters"] = model.parameter_count()
            entry.setdefault("history", {})["all" if p is None else str(p)] = trained.history
        results[name] = entry
    return {"models": results, "published": settings.target == "last" and settings.length == 256}


def rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Makes the table: % correct for each p, beside the paper's if the task is the same."""
    if "own" in results:
        return own_rows(results)
    published = PUBLISHED if results["published"] else {}
    return comparison_rows(results["models"], published, "p")


def plot(results: Mapping[str, Any], path: Path) -> Path:
    """Plots % correct against p, and the training losses."""
    if "own" in results:
        return own_plot(results, path)
    correct, dashed, losses = {}, {}, {}
    for name, m in results["models"].items():
        label = f"{name.replace('x', '⊗')} ({m['parameters'] / 1000:.0f}k)"
        correct[label] = [int(p) for p in m["accuracy"]], [100 * a for a in m["accuracy"].values()]
        if results["published"] and name in PUBLISHED:
            dashed[label] = list(PUBLISHED[name]), list(PUBLISHED[name].values())
        for p, entries in m["history"].items():
            key = label if p == "all" else f"{label}, p = {p}"
            losses[key] = [e["step"] for e in entries], [e["loss"] for e in entries]
    panels = [
        Panel("p-hop", "p", "correct (%)", correct, dashed, y_range=(0, 103)),
        Panel("training", "step", "loss", losses, log_y=True),
    ]
    return draw_panels(path, panels, "p-hop induction: looped layer against stacks")
