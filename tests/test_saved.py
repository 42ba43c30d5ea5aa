"""Files that version 0.1.0 wrote before its modules moved into sub-packages still open.

tests/saved/run: preset cpu, --scale 0.01 --steps 5 --eval-problems 4 and width 8; looped_aligned
and chains finished, ar_baseline interrupted after step 3. tests/saved/chains: written by its model.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import relay_fast.evaluate
import relay_fast.generate
from relay_fast.relay.chain_dataset import ChainDataset
from relay_fast.relay.run_folder import RunFolder
from relay_fast.train import train
from relay_fast.training.model_files import load_model, model_hash
from relay_fast.utils.tensor_files import load_checkpoint

SAVED = Path(__file__).parent / "saved"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return shutil.copytree(SAVED / "run", tmp_path / "run")


def test_training_continues_from_its_state(run, quick_workers):
    state, metadata = load_checkpoint(run / "checkpoints" / "ar_baseline.state.safetensors")
    assert metadata["step"] == 3
    results = train(RunFolder.open(run).config, run, stages=["ar_baseline"], print_table=False)
    steps = [entry["step"] for entry in results["history"]["ar_baseline"]]
    assert steps[:3] == [1, 2, 3] and steps[-1] == 5
    assert [entry["step"] for entry in results["history"]["looped_aligned"]][-1] == 5
    model, info = load_model(run / "ar_baseline.safetensors")
    assert info == {"seed": 0, "stage": "ar_baseline"}
    before = state["model.chain_head.weight"]
    assert not torch.equal(model.chain_head.weight, before)
    torch.testing.assert_close(model.chain_head.weight, before, atol=0.05, rtol=0)  # two steps on


def test_generate_and_evaluate_read_the_run(run, capsys):
    arguments = ["--out", str(run), "--task", "arithmetic", "--length", "3", "--number", "2"]
    assert relay_fast.generate.main(arguments) == 0
    assert "of 2 answers right" in capsys.readouterr().out
    arguments = ["--out", str(run), "--lengths", "10-11", "--problems", "3"]
    assert relay_fast.evaluate.main(arguments) == 0
    results = json.loads((run / "evaluation.json").read_text())
    rows = results["accuracy"]["looped_aligned"]["arithmetic"]
    assert {length: row["n"] for length, row in rows.items()} == {"10": 3, "11": 3}


def test_the_chains_are_those_of_the_model():
    chains = ChainDataset(SAVED / "chains", only_passed=False)
    assert len(chains) == 8
    lengths = np.concatenate([chains[i].length for i in range(8)])
    assert sorted(lengths.tolist()) == [2, 2, 2, 2, 3, 3, 3, 3]
    model, _ = load_model(SAVED / "run" / "looped_aligned.safetensors")
    manifest = json.loads((SAVED / "chains" / "manifest.json").read_text())
    assert model_hash(model) == manifest["identity"]["model"]["hash"]
