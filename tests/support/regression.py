"""What the tests of other people's libraries share: a small regression that each of them trains."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from relay_fast import LoopedBlock
from relay_fast.training.optim import make_optimizer

STEPS = 3


class Regression(nn.Module):
    """A looped block and its loss; inputs and outputs as HF's Trainer wants them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.block = LoopedBlock(16, 2, 1, activation="swiglu")
        self.head = nn.Linear(16, 1)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        predicted = self.head(self.block(x, 3)).squeeze(-1)
        return {"loss": (predicted - labels).square().mean(), "predicted": predicted}


def make_optimizers(model: nn.Module) -> torch.optim.Optimizer:
    return make_optimizer(model, lr=1e-2, muon_lr=1e-2)


def data() -> Dataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4 * STEPS, 5, 16, generator=generator)
    return TensorDataset(x, x.sum(-1))


def batches() -> DataLoader:
    return DataLoader(data(), batch_size=4)


@pytest.fixture
def trained() -> list[Tensor]:
    """The parameters after STEPS plain steps: what every library has to end at."""
    model = Regression()
    optimizer = make_optimizers(model)
    for x, labels in batches():
        optimizer.zero_grad()
        model(x, labels)["loss"].backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def assert_trained(model: nn.Module, trained: list[Tensor]) -> None:
    for (name, p), wanted in zip(model.named_parameters(), trained, strict=True):
        torch.testing.assert_close(p.detach(), wanted, rtol=1e-5, atol=1e-6, msg=name)
