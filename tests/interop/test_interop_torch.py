"""torch's own: mixed precision with a GradScaler, an average of the weights, export."""

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from relay_fast import LoopedBlock
from tests.support.regression import STEPS, Regression, assert_trained, batches, make_optimizers


def test_grad_scaler(trained) -> None:
    model = Regression()
    optimizer = make_optimizers(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for x, labels in batches():
        optimizer.zero_grad()
        scaler.scale(model(x, labels)["loss"]).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_trained(model, trained)


def test_average_of_the_weights() -> None:
    model = Regression()
    optimizer = make_optimizers(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    wanted = None
    for x, labels in batches():
        optimizer.zero_grad()
        model(x, labels)["loss"].backward()
        optimizer.step()
        average.update_parameters(model)
        now = [p.detach().clone() for p in model.parameters()]
        pairs = now if wanted is None else zip(wanted, now, strict=True)
        wanted = now if wanted is None else [(a + b) / 2 for a, b in pairs]
    assert int(average.n_averaged) == STEPS
    assert_trained(average.module, wanted)
    x, labels = next(iter(batches()))
    assert average(x, labels)["predicted"].shape == labels.shape


def test_export() -> None:
    block = LoopedBlock(16, 2, 2, activation="swiglu").eval()
    x = torch.randn(2, 5, 16)
    program = torch.export.export(block, (x, 3))
    torch.testing.assert_close(program.module()(x, 3), block(x, 3))
