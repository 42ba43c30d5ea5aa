"""Hugging Face's Trainer."""

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from tests.support.regression import STEPS, Regression, assert_trained, data, make_optimizers

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def test_trainer(trained, tmp_path) -> None:
    model = Regression()
    optimizer = make_optimizers(model)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        max_grad_norm=0.0,
        logging_steps=1,
    )

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return None

    trainer = InOrder(
        model=model,
        args=arguments,
        train_dataset=data(),
        data_collator=collate,
        optimizers=(optimizer, LambdaLR(optimizer, lambda step: 1.0)),
    )
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert_trained(model, trained)
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved").is_dir()


def collate(items):
    return {"x": torch.stack([x for x, _ in items]), "labels": torch.stack([y for _, y in items])}
