"""The precision in which a run's models write chains and are evaluated: used everywhere, recorded,
and not mixed with another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from relay_fast import evaluate, generate
from relay_fast.evaluate import evaluate_run
from relay_fast.models import looped_block
from relay_fast.relay.chain_dataset import DatasetError, read_manifest, write_dataset
from relay_fast.relay.presets import load_preset, override
from relay_fast.relay.resumable_chains import generate_confident_in_parts
from relay_fast.relay.run_folder import RunFolder, RunFolderError
from relay_fast.relay.stages import Context, run_stage
from relay_fast.training.model_files import model_path, save_model
from tests.support import chain_models, fed_models

LOW, FULL = torch.bfloat16, torch.float32


@pytest.fixture
def used(monkeypatch) -> set[torch.dtype]:
    """The dtypes of the GEMMs of all passes so far."""
    found = set()
    original = looped_block.compute_dtype

    def recorded(parameter: torch.Tensor) -> torch.dtype:
        found.add(original(parameter))
        return original(parameter)

    monkeypatch.setattr(looped_block, "compute_dtype", recorded)
    return found


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder of untrained models, as an older version wrote it."""
    task = {"parameters": {"prime": 5}, "train": [1, 3], "test": [3, 4]}
    config = {"vocabulary": chain_models.VOCABULARY.to_dict(), "tasks": {"arithmetic": task}}
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    save_model(model_path(folder, "looped_aligned"), chain_models.looped_model(), {})
    save_model(model_path(folder, "ar_relay"), chain_models.ar_model(), {})
    return folder


def test_stages_take_it_from_the_config(tmp_path, used) -> None:
    values = ["inference.autocast=bf16", "tasks.arithmetic.self_lengths=[9]",
              "tasks.arithmetic.self_counts=[2]"]  # fmt: skip
    options = {"steps": 1, "batch_size": 4, "eval_problems": 2, "values": values}
    config = override(load_preset("cpu-arithmetic"), **options)
    context = Context(tmp_path, config, "cpu", "auto")
    (tmp_path / "checkpoints").mkdir()
    for stage, expected in {
        "looped_aligned": {FULL},
        "evaluate.looped_aligned": {LOW},
        "chains": {LOW},
        "ar_baseline": {FULL},
        "evaluate.ar_baseline": {LOW},
        "looped_vanilla": {FULL},
        "ar_self_loop": {LOW, FULL},  # writes chains, then trains
    }.items():
        used.clear()
        run_stage(context, stage, lambda progress: None)
        assert used == expected, stage


def test_a_run_goes_on_in_its_own(tmp_path) -> None:
    config = load_preset("cpu")
    RunFolder(tmp_path / "run", override(config, values=["inference.autocast=bf16"]))
    message = r"another config: inference .*bf16.* in the folder"
    with pytest.raises(RunFolderError, match=message):
        RunFolder(tmp_path / "run", config)
    with pytest.raises(ValueError, match=r"inference.autocast = 'tf32x3' is unknown: use one of"):
        override(config, values=["inference.autocast=tf32x3"])


def test_interrupted_chains_go_on_in_their_own(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("relay_fast.relay.resumable_chains.SAVE_EVERY", 0.0)
    write = lambda **options: generate_confident_in_parts(
        fed_models.new_model(), fed_models.mixed(), fed_models.TASKS, tmp_path / "c", **options
    )[1].tolist()
    plain, low = write(), write(autocast="bf16")
    assert plain != low and len(list(tmp_path.iterdir())) == 2
    assert (write(), write(autocast="bf16")) == (plain, low)


def test_datasets_record_it(run, tmp_path, used, capsys) -> None:
    arguments = ["--out", str(run), "--task", "arithmetic", "--lengths", "1-3", "--number", "6"]
    low, full = str(tmp_path / "low"), str(tmp_path / "full")
    assert generate.main([*arguments, "--dataset", low, "--autocast", "bf16"]) == 0
    assert used == {LOW} and " in bf16; passed" in capsys.readouterr().out
    used.clear()
    assert generate.main([*arguments, "--dataset", full]) == 0
    assert used == {FULL} and "bf16" not in capsys.readouterr().out
    assert read_manifest(low)["identity"]["autocast"] == "bf16"
    assert "autocast" not in read_manifest(full)["identity"]  # as before there was a choice
    assert generate.main([*arguments, "--dataset", low]) == 2
    assert 'autocast ("fp32" here, "bf16" there); give another' in capsys.readouterr().err
    assert generate.main([*arguments, "--dataset", full, "--autocast", "bf16"]) == 2
    assert 'autocast ("bf16" here, "fp32" there); give another' in capsys.readouterr().err
    assert generate.main([*arguments, "--dataset", low, "--autocast", "bf16"]) == 0
    model, tasks = chain_models.looped_model(), chain_models.TASKS
    with pytest.raises(ValueError, match="autocast = 'fp8' is unknown"):
        write_dataset(tmp_path / "no", model, tasks, {"arithmetic": {1: 2}}, autocast="fp8")
    assert not (tmp_path / "no").exists()
    with pytest.raises(DatasetError, match="autocast"):
        counts = {"arithmetic": {1: 2, 2: 2, 3: 2}}
        write_dataset(low, model, tasks, counts)


@pytest.mark.parametrize("model", ["looped_aligned", "ar_relay"])
def test_printed_chains(model: str, run, used, capsys) -> None:
    arguments = ["--out", str(run), "--task", "arithmetic", "--length", "2", "--number", "2"]
    assert generate.main([*arguments, "--model", model, "--autocast", "bf16"]) == 0
    assert used == {LOW}


def test_evaluation_records_it(run, used, capsys) -> None:
    arguments = ["--out", str(run), "--problems", "2", "--lengths", "1-2"]
    written = lambda: json.loads((run / "evaluation.json").read_text())
    assert evaluate.main([*arguments, "--autocast", "bf16"]) == 0
    assert used == {LOW} and written()["autocast"] == "bf16"
    used.clear()
    assert evaluate.main(arguments) == 0
    assert used == {FULL} and written()["autocast"] == "fp32"
    config = json.loads((run / "config.json").read_text()) | {"inference": {"autocast": "bf16"}}
    (run / "config.json").write_text(json.dumps(config))
    used.clear()
    assert evaluate.main(arguments) == 0  # the run's own
    assert used == {LOW} and written()["autocast"] == "bf16"
    assert evaluate.main([*arguments, "--shard", "0/2"]) == 0
    capsys.readouterr()
    assert evaluate.main([*arguments, "--shard", "1/2", "--autocast", "fp32"]) == 2
    assert 'autocast (absent here, "bf16" there)' in capsys.readouterr().err
    with pytest.raises(ValueError, match="autocast = 'fp8' is unknown: use one of fp32, bf16"):
        evaluate_run(str(run), autocast="fp8")
