"""accelerate prepares model, optimiser and data."""

import pytest

from tests.support.regression import Regression, assert_trained, batches, make_optimizers

accelerate = pytest.importorskip("accelerate")


def test_prepared(trained, tmp_path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    plain = Regression()
    model, optimizer, loader = accelerator.prepare(plain, make_optimizers(plain), batches())
    for batch in loader:
        optimizer.zero_grad()
        accelerator.backward(model(*batch)["loss"])
        optimizer.step()
    assert_trained(accelerator.unwrap_model(model), trained)

    accelerator.save_state(tmp_path)
    for p in plain.parameters():
        p.data.zero_()
    accelerator.load_state(tmp_path)
    assert_trained(plain, trained)
