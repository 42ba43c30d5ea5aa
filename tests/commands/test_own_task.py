"""A task of one's own, in a script outside the package: all stages, and the commands afterwards."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import relay_fast.evaluate
import relay_fast.generate
import relay_fast.train
from relay_fast.relay.chain_dataset import ChainDataset, dataset_tasks, read_manifest
from relay_fast.relay.stages import STAGE_DEPENDENCIES
from relay_fast.training.model_files import load_model

SCRIPT = """
from relay_fast.relay.presets import load_preset, override
from relay_fast.tasks import TextTask
from relay_fast.train import train


class Parity(TextTask):
    name = "parity"
    title = "Parity of bits"
    unit = "number of bits"

    def sample(self, length, rng):
        bits = rng.integers(0, 2, length).tolist()
        rounds = [str(sum(bits[: k + 1]) % 2) for k in range(length)]
        return " ".join(map(str, bits)), rounds, rounds[-1]


if __name__ == "__main__":
    config = load_preset("cpu")
    config["tasks"] = {"parity": {"train": [1, 3], "test": [3, 5]}}
    config["model"] |= {"d_model": 16, "n_heads": 2, "n_layers": 1}
    config = override(config, steps=2, batch_size=8, eval_problems=3, values=["workers=1"])
    train(config, "run", tasks=[Parity()])
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the script and the run that it made, called from elsewhere."""
    place = tmp_path_factory.mktemp("own")
    (place / "scripts").mkdir()
    (place / "scripts" / "parity.py").write_text(SCRIPT)
    assert len(SCRIPT.strip().splitlines()) <= 40
    script = [sys.executable, "scripts/parity.py"]
    done = subprocess.run(script, cwd=place, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (place / "printed.txt").write_text(done.stdout)
    return place


def test_all_stages_run_and_the_tables_show_its_name_and_unit(place) -> None:
    run = place / "run"
    assert set(json.loads((run / "stages.json").read_text())) == set(STAGE_DEPENDENCIES)
    results = json.loads((run / "results.json").read_text())
    assert results["labels"] == {"parity": {"title": "Parity of bits", "unit": "number of bits"}}
    assert results["longest_true_problem"] == {"parity": 3}
    assert set(results["accuracy"]["ar_relay"]["parity"]) == {"1", "2", "3", "4", "5"}
    config = json.loads((run / "config.json").read_text())
    assert config["vocabulary"]["tokens"] == ["[parity]", "<sep>", "0", "1"]
    assert "max_number" not in config["vocabulary"]
    assert config["tasks"]["parity"]["class"] == f"{place / 'scripts' / 'parity.py'}:Parity"
    printed = (place / "printed.txt").read_text()
    assert "Parity of bits: whole chain correct (%)" in printed
    assert "columns: number of bits; trained on 1 to 3" in printed
    for plot in ("accuracy_answer", "accuracy_chain", "hits_parity_3", "losses"):
        assert (run / f"{plot}.png").stat().st_size > 1000
    _, info = load_model(run / "ar_relay.safetensors")
    assert info["vocabulary"] == config["vocabulary"]


def test_generate_and_evaluate_take_the_task_from_the_run(place, capsys) -> None:
    run, chains = str(place / "run"), str(place / "chains")
    generate, evaluate = relay_fast.generate.main, relay_fast.evaluate.main
    assert generate(["--out", run, "--task", "parity", "--length", "4", "--number", "2"]) == 0
    assert "of 2 chains right" in capsys.readouterr().out
    write = ["--out", run, "--task", "parity", "--lengths", "1-4", "--number", "8"]
    assert generate([*write, "--dataset", chains, "--verify", "none"]) == 0
    assert generate(["--show", chains, "--number", "2"]) == 0
    assert "parity of length" in capsys.readouterr().out
    (task,) = dataset_tasks(read_manifest(chains)).values()
    dataset = ChainDataset(chains)
    assert len(dataset) == 8 and task.index == dataset[0].task[0] == 3
    assert task.vocabulary.to_dict() == {"multiple": 16, "tokens": ["[parity]", "<sep>", "0", "1"]}
    assert evaluate(["--out", run, "--models", "ar_relay", "--problems", "3"]) == 0
    assert "columns: number of bits" in capsys.readouterr().out


def test_a_class_that_is_gone_is_named(place, capsys) -> None:
    script = place / "scripts" / "parity.py"
    config = json.loads((place / "run" / "config.json").read_text())
    gone = place / "gone"
    gone.mkdir()
    config["tasks"]["parity"]["class"] = f"{script.with_name('other.py')}:Parity"
    (gone / "config.json").write_text(json.dumps(config))
    command = ["--out", str(gone), "--task", "parity", "--length", "2"]
    assert relay_fast.generate.main(command) == 2
    error = capsys.readouterr().err
    assert f"tasks.parity.class = '{script.with_name('other.py')}:Parity' cannot be" in error


def test_a_script_without_a_guard_is_told_so(place, tmp_path, monkeypatch, capsys) -> None:
    guarded = '\nif __name__ == "__main__":\n'
    free = SCRIPT.replace(guarded, "\nif True:\n")
    (tmp_path / "free.py").write_text(free)
    (tmp_path / "mine.toml").write_text(
        'base = "cpu"\n[tasks.parity]\nclass = "free:Parity"\ntrain = [1, 3]\ntest = [3, 5]\n'
    )
    monkeypatch.chdir(tmp_path)
    command = ["--config", "mine.toml", "--out", "run"]
    assert relay_fast.train.main(command) == 2
    error = capsys.readouterr().err
    assert 'put the training under if __name__ == "__main__"' in error
    assert not (tmp_path / "run").exists()
