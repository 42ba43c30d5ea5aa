"""Lightning's Trainer (which steps with a closure) and Fabric."""

import pytest

from tests.support.regression import STEPS, Regression, assert_trained, batches, make_optimizers

lightning = pytest.importorskip("lightning")

QUIET = {"accelerator": "cpu", "devices": 1}


@pytest.mark.filterwarnings("ignore")
def test_trainer(trained, tmp_path) -> None:
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Regression()

        def training_step(self, batch, _):
            return self.model(*batch)["loss"]

        def configure_optimizers(self):
            return make_optimizers(self.model)

    module = Module()
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=1, default_root_dir=tmp_path, **QUIET, **options)
    trainer.fit(module, batches())
    assert trainer.global_step == STEPS
    assert_trained(module.model, trained)

    trainer.save_checkpoint(tmp_path / "state.ckpt")
    again = Module.load_from_checkpoint(tmp_path / "state.ckpt", weights_only=True)
    assert_trained(again.model, trained)
    resumed = Module()
    longer = lightning.Trainer(max_epochs=2, default_root_dir=tmp_path, **QUIET, **options)
    longer.fit(resumed, batches(), ckpt_path=tmp_path / "state.ckpt", weights_only=True)
    assert longer.global_step == 2 * STEPS


def test_fabric(trained) -> None:
    fabric = lightning.Fabric(**QUIET)
    plain = Regression()
    model, optimizer = fabric.setup(plain, make_optimizers(plain))
    for batch in fabric.setup_dataloaders(batches()):
        optimizer.zero_grad()
        fabric.backward(model(*batch)["loss"])
        optimizer.step()
    assert_trained(plain, trained)
