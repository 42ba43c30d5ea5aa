"""Training on tasks of one's own is continued exactly, with any number of data workers."""

from __future__ import annotations

import json

import pytest
import torch

from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.data.streams import BatchFormat, TruthStream
from relay_fast.models.transformers import LoopedTransformer
from relay_fast.tasks import RecordsTask, TextTask, Vocabulary, tasks_of_config
from relay_fast.training.schedule import Schedule
from relay_fast.training.trainer import train_model
from tests.support.text_tasks import Parity

RECIPE = {"lr": 3e-3, "weight_decay": 0.01, "betas": [0.9, 0.95], "clip": 1.0}


def parity(folder) -> TextTask:
    return Parity()


def jsonl(folder) -> TextTask:
    """Records of parity, fewer than the training draws, so that they come again in another
    order."""
    path = folder / "parity.jsonl"
    with open(path, "w") as file:
        for i in range(40):
            problem, rounds, answer = Parity().draw(1 + i % 4, 0, i)
            record = {"problem": problem, "rounds": rounds, "answer": answer}
            file.write(json.dumps(record) + "\n")
    return RecordsTask("parity", str(path), held_out=0.0)


@pytest.mark.parametrize("source", [parity, jsonl])
def test_it_is_continued_with_other_workers(source, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RELAY_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("relay_fast.training.trainer.LOG_EVERY", 0.0)
    text = source(tmp_path)
    vocabulary = Vocabulary(None, 8, ("[parity]", "<sep>", "0", "1"))
    task = tasks_of_config({"parity": text.reference()}, vocabulary)["parity"]

    def run(name: str, workers: int, stop_at: int | None = None):
        torch.manual_seed(1)
        config = ModelConfig(BlockConfig(16, 2, 1, dropout=0.1), vocabulary.size, 16)
        model = LoopedTransformer(config)
        parts = {"parity": task}, {"parity": (1, 4)}, BatchFormat("looped"), Schedule.by_steps(8)
        stream = TruthStream(*parts, batch_size=8, seed=0, curriculum=0.5)

        def report(progress) -> None:
            if progress.step == stop_at:
                raise KeyboardInterrupt

        path, options = tmp_path / f"{name}.safetensors", {"seed": 5, "data_workers": workers}
        trained = train_model(model, stream, RECIPE, path, on_progress=report, **options)
        losses = {entry["step"]: entry["loss"] for entry in trained.history}
        return losses, [p.detach().clone() for p in model.parameters()]

    whole, parameters = run("whole", 0)
    assert list(whole) == list(range(1, 9))
    for stop_at, workers in ((3, 2), (5, 1)):
        with pytest.raises(KeyboardInterrupt):
            run("parts", workers, stop_at)
    losses, continued = run("parts", 0)
    assert losses.items() <= whole.items() and {1, 6, 7, 8} <= set(losses)
    assert all(map(torch.equal, parameters, continued))
    losses, ahead = run("ahead", 2)
    assert losses == whole and all(map(torch.equal, parameters, ahead))
