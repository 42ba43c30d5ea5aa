"""Example: the training of `drop_in` under Lightning Fabric, which brings devices and precision.

Four lines differ from the plain loop: `fabric.launch`, `fabric.setup`, `fabric.backward`, and the
batch that moves by `fabric.to_device`. It needs `pip install lightning`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from relay_fast.recipes import drop_in
from relay_fast.recipes._optional import need
from relay_fast.recipes.drop_in import Lookup, accuracy, draw, plot, rows
from relay_fast.relay.run_folder import RunFolder
from relay_fast.reporting.progress import Display
from relay_fast.reporting.progress import Problems as Done
from relay_fast.utils.settings import settings

__all__ = ["PRESETS", "PUBLISHED", "Settings", "plot", "prove", "rows", "run"]

PUBLISHED: dict[str, Any] = {}  # an example, no paper's experiment
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


@settings
class Settings(drop_in.Settings):
    precision: Precision = Field("32-true", description="Fabric's name of the precision")


PRESETS = {"cpu": Settings()}


def prove(settings: Settings) -> None:
    """Raises ValueError if Lightning is not installed."""
    need("fabric", "lightning")


def run(
    settings: Settings, folder: RunFolder, *, seed: int, device: str, display: Display
) -> dict[str, Any]:
    from lightning.fabric import Fabric

    kind = "cuda" if device.startswith("cuda") else "cpu"
    fabric = Fabric(accelerator=kind, devices=1, precision=settings.precision)
    fabric.launch()
    torch.manual_seed(seed)
    model = Lookup(settings.symbols, settings.d_model, settings.n_heads)
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=settings.lr))
    display.start("lookup")
    generator = torch.Generator().manual_seed(seed)
    for step in range(settings.steps):
        batch = draw(settings.symbols, settings.batch_size, settings.loops, generator)
        table, start, steps = fabric.to_device(batch)
        logits = model(table, start, settings.loops)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), steps.flatten())
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        display.progress("lookup", Done(step + 1, settings.steps))
    return {
        "trained": settings.loops,
        "accuracy": accuracy(model, settings, seed, str(fabric.device)),
    }
