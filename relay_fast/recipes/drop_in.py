"""Example: a looped block in a plain PyTorch training loop, where every loop is one lookup.

A sequence is a table f(0) … f(m−1) and a start x. After t loops the model shall say f(f(…f(x))),
t times: each loop looks up one entry. Every state has a loss of its own, so that loop t learns
step t, and the trained block can be looped more often than it ever was.

Copy `Lookup` and `fit`: they are an ordinary module and an ordinary loop. `recompute="state"` keeps
one state a loop instead of everything between them; gradients are the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from relay_fast.config import BlockConfig
from relay_fast.models.looped_block import LoopedBlock
from relay_fast.recipes._common import Heads, Panel, Problems, Width, draw_panels
from relay_fast.relay.run_folder import RunFolder
from relay_fast.reporting.progress import Display
from relay_fast.reporting.progress import Problems as Done
from relay_fast.utils.settings import BatchSize, Count, LearningRate, Steps, settings

PUBLISHED: dict[str, Any] = {}  # an example, no paper's experiment


@settings
class Settings:
    steps: Steps = 400
    batch_size: BatchSize = 64
    lr: LearningRate = 3e-3
    symbols: Count = Field(8, description="entries of the table, m")
    loops: Count = Field(4, description="loops in training")
    tested: Count = Field(8, description="the most loops of the test")
    d_model: Width = 64
    n_heads: Heads = 4
    problems: Problems = 500

    def __post_init__(self) -> None:
        BlockConfig(self.d_model, self.n_heads, 1)  # refuses widths that do not fit together


PRESETS = {"cpu": Settings()}


class Lookup(nn.Module):
    """Embeds table and start, loops one layer over them, and reads the last token of each state.

    Args:
        symbols: Number of symbols.
        d_model: Width.
        n_heads: Attention heads.
    """

    def __init__(self, symbols: int, d_model: int, n_heads: int):
        super().__init__()
        self.places = nn.Embedding(symbols, d_model)
        self.values = nn.Embedding(symbols, d_model)
        self.start = nn.Embedding(symbols, d_model)
        self.block = LoopedBlock(d_model, n_heads, n_layers=1, recompute="state")
        self.norm = nn.RMSNorm(d_model)
        self.head = nn.Linear(d_model, symbols)

    def forward(self, table: Tensor, start: Tensor, loops: int) -> Tensor:
        """Applies the map `loops` times.

        Args:
            table: (B, symbols) the map.
            start: (B,) symbols to start from.
            loops: Number of applications.

        Returns:
            Logits (loops, B, symbols).
        """
        entries = self.places.weight + self.values(table)
        x = torch.cat([entries, self.start(start)[:, None]], dim=1)
        states = self.block(x, loops=loops, return_states=True)
        return self.head(self.norm(torch.stack([state[:, -1] for state in states])))


def draw(symbols: int, number: int, loops: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Draws problems.

    Args:
        symbols: Number of symbols.
        number: B.
        loops: Number of applications.
        generator: The random generator.

    Returns:
        Tables (B, symbols), starts (B,) and the true symbol after each loop (loops, B).
    """
    table = torch.randint(symbols, (number, symbols), generator=generator)
    start = torch.randint(symbols, (number,), generator=generator)
    here, steps = start, []
    for _ in range(loops):
        here = table.gather(1, here[:, None])[:, 0]
        steps.append(here)
    return table, start, torch.stack(steps)


def fit(model: nn.Module, s: Settings, seed: int, device: str, progress) -> None:
    """Trains a model in place.

    Args:
        model: The model.
        s: The settings.
        seed: Selects the problems.
        device: Where the model is.
        progress: Called with the steps that are done and all steps.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr)
    generator = torch.Generator().manual_seed(seed)
    for step in range(s.steps):
        batch = draw(s.symbols, s.batch_size, s.loops, generator)
        table, start, steps = (part.to(device) for part in batch)
        logits = model(table, start, s.loops)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), steps.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        progress(step + 1, s.steps)


@torch.no_grad()
def accuracy(model: nn.Module, s: Settings, seed: int, device: str) -> list[float]:
    """Measures a model on new problems.

    Args:
        model: The model.
        s: The settings.
        seed: Selects the problems.
        device: Where the model is.

    Returns:
        The share of correct symbols after 1, 2, ... `s.tested` loops.
    """
    generator = torch.Generator().manual_seed(seed + 2**32)
    batch = draw(s.symbols, s.problems, s.tested, generator)
    table, start, steps = (part.to(device) for part in batch)
    right = model(table, start, s.tested).argmax(-1) == steps
    return right.double().mean(1).tolist()


def run(
    settings: Settings, folder: RunFolder, *, seed: int, device: str, display: Display
) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = Lookup(settings.symbols, settings.d_model, settings.n_heads).to(device)
    display.start("lookup")
    progress = lambda *done: display.progress("lookup", Done(*done))
    fit(model, settings, seed, device, progress)
    return {"trained": settings.loops, "accuracy": accuracy(model, settings, seed, device)}


def rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Makes the table: the share of correct symbols by loops."""
    trained = results["trained"]
    lines = [
        [loops, "trained" if loops <= trained else "beyond", f"{share:.1%}"]
        for loops, share in enumerate(results["accuracy"], 1)
    ]
    return ["loops", "", "correct"], lines


def plot(results: Mapping[str, Any], path: Path) -> Path:
    """Plots the accuracy against the loops."""
    shares = [100 * share for share in results["accuracy"]]
    curves = {"one layer, looped": (range(1, len(shares) + 1), shares)}
    title = f"trained with {results['trained']} loops"
    panel = Panel(title, "loops", "correct (%)", curves, y_range=(-2, 103))
    return draw_panels(path, [panel])
