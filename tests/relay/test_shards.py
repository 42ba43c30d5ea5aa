"""Shards of chains and of evaluation: what several processes write is what one writes."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from relay_fast import evaluate, generate
from relay_fast.relay import shards
from relay_fast.relay.chain_dataset import ChainDataset, DatasetError, read_manifest
from relay_fast.relay.shards import parse_shard, share_lengths, shared_start
from relay_fast.training.model_files import model_path, save_model
from relay_fast.training.ranks import Ranks
from relay_fast.utils.errors import RefusedTogether
from tests.support.chain_models import TASKS, VOCABULARY, ar_model, looped_model


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder of untrained models."""
    config = {
        "vocabulary": VOCABULARY.to_dict(),
        "tasks": {
            "arithmetic": {"parameters": {"prime": 5}, "train": [1, 4], "test": [4, 6]},
            "edit_distance": {"parameters": {}, "train": [1, 3], "test": [3, 4]},
        },
    }
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_model(model_path(folder, "looped_aligned"), looped_model(), {})
    save_model(model_path(folder, "ar_relay"), ar_model(), {})
    return folder


def write(run: Path, folder: Path, *more: str) -> int:
    arguments = ["--out", str(run), "--task", "arithmetic", "--lengths", "1-3", "--number", "17"]
    return generate.main([*arguments, "--shard-chains", "4", "--dataset", str(folder), *more])


def test_shards_of_chains(run, tmp_path, capsys) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert write(run, whole) == 0
    assert write(run, parts, "--shard", "1/2") == 0
    text = capsys.readouterr().out
    assert text.endswith("shard 1/2 is done; files of 0/2 are missing\n")
    own = {f"shard-0000{k}.safetensors" for k in (1, 3)}
    assert set(files(parts)) == {*own, "manifest.json"}
    with pytest.raises(DatasetError, match=r"not finished.*shard-00000.safetensors is missing"):
        ChainDataset(parts)
    assert not read_manifest(parts)["complete"]
    assert write(run, parts, "--shard", "0/2") == 0
    assert files(parts) == files(whole)
    assert "is done" not in capsys.readouterr().out
    assert write(run, parts, "--shard", "2/3") == 0  # nothing is left to do
    assert files(parts) == files(whole)


def test_shards_of_other_chains_are_refused(run, tmp_path, capsys) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    assert write(run, mine, "--shard", "0/2") == 0
    assert write(run, mine, "--shard", "1/2", "--seed", "1") == 2
    assert "holds other chains: seed (1 here, 0 there)" in capsys.readouterr().err
    assert write(run, mine, "--shard", "1/2", "--model", "ar_relay") == 2
    assert "holds other chains: model." in capsys.readouterr().err
    assert write(run, other, "--seed", "1") == 0
    for name in ("shard-00001.safetensors", "shard-00003.safetensors"):  # copied together
        (mine / name).write_bytes((other / name).read_bytes())
    capsys.readouterr()
    assert write(run, mine, "--shard", "0/2") == 2
    error = capsys.readouterr().err
    assert "shard-00001.safetensors belongs to another dataset" in error
    assert error.count("\n") == 1
    before = files(mine)
    for name in ("shard-00000.safetensors", "shard-00002.safetensors"):
        (mine / name).unlink()
    assert write(run, mine, "--shard", "0/2") == 2  # before its own are written again
    assert set(files(mine)) == set(before) - {"shard-00000.safetensors", "shard-00002.safetensors"}


def test_a_number_of_chains_under_its_old_name(run, tmp_path) -> None:
    assert write(run, tmp_path / "new") == 0
    with pytest.warns(DeprecationWarning, match="use --shard-chains N"):
        assert write(run, tmp_path / "old", "--shard", "4") == 0
    assert files(tmp_path / "old") == files(tmp_path / "new")


def measure(run: Path, *more: str) -> int:
    return evaluate.main(["--out", str(run), "--problems", "6", *more])


def test_shards_of_an_evaluation(run, capsys) -> None:
    assert measure(run) == 0
    whole = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").unlink()
    assert measure(run, "--shard", "2/3") == 0
    assert capsys.readouterr().out.endswith("shard 2/3 is done; missing: 0/3, 1/3\n")
    assert measure(run, "--shard", "0/3") == 0
    assert not (run / "evaluation.json").exists()
    assert measure(run, "--shard", "1/3") == 0
    assert "results: " in capsys.readouterr().out
    merged = json.loads((run / "evaluation.json").read_text())
    assert merged == whole
    assert [list(own) for own in merged["accuracy"]["ar_relay"].values()] == [
        [str(n) for n in range(1, 7)], [str(n) for n in range(1, 5)],
    ]  # fmt: skip
    assert not [*run.glob("evaluation-*")]


def test_shards_of_other_evaluations_are_refused(run, capsys, monkeypatch) -> None:
    assert measure(run, "--shard", "0/2") == 0
    monkeypatch.setattr(evaluate, "evaluate_problems", lambda *_, **__: pytest.fail("work"))
    assert measure(run, "--shard", "1/2", "--problems", "7") == 2
    error = capsys.readouterr().err
    assert "evaluation-0-of-2.json is of another evaluation: problems (7 here, 6 there)" in error
    save_model(model_path(run, "looped_aligned"), looped_model(), {})  # other weights
    assert measure(run, "--shard", "1/2") == 2
    error = capsys.readouterr().err
    assert "another evaluation: models.looped_aligned" in error and error.count("\n") == 1
    (run / "evaluation-0-of-2.json").write_text("{")
    assert measure(run, "--shard", "1/2") == 2
    assert "evaluation-0-of-2.json is damaged: delete it" in capsys.readouterr().err


def test_shares_of_lengths_cost_the_same() -> None:
    tasks = {"arithmetic": TASKS["arithmetic"]}
    cost = lambda n: tasks["arithmetic"].max_problem_tokens(n) * tasks["arithmetic"].loops(n)
    shares = [share_lengths(tasks, {"arithmetic": range(1, 13)}, (k, 3)) for k in range(3)]
    assert sorted(sum((own["arithmetic"] for own in shares), [])) == [*range(1, 13)]
    costs = [sum(map(cost, own["arithmetic"])) for own in shares]
    assert max(costs) - min(costs) <= cost(12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3/3", "--shard 3/3 is not there: shards count from 0, give 0/3 to 2/3"),
        ("0/0", "--shard 0/0 is not there"),
        ("-1/3", "--shard '-1/3' is not understood: give I/N, for example 0/4"),
        ("1", "not understood"),
        ("1/2/3", "not understood"),
    ],
)
def test_bad_shards(text, message) -> None:
    with pytest.raises(ValueError, match=message):
        parse_shard(text)


def test_bad_shards_get_one_sentence(run, tmp_path, capsys) -> None:
    calls = [
        (lambda: write(run, tmp_path / "new", "--shard", "2/2"), "--shard 2/2 is not there"),
        (lambda: measure(run, "--shard", "2/2"), "--shard 2/2 is not there"),
        (lambda: write(run, tmp_path / "new", "--shard", "0/2", "--export", "e"),
         "a shard of chains goes into a --dataset"),
        (lambda: generate.main(["--out", str(run), "--task", "arithmetic", "--length", "3",
                                "--shard", "0/2"]), "give --lengths and --dataset"),
    ]  # fmt: skip
    for call, message in calls:
        assert call() == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


class Hearing(Ranks):
    """A rank that hears from the others what a test says; None: the same as this one says."""

    def __init__(self, rank: int, *heard):
        super().__init__(rank, len(heard))
        self.heard = heard

    def gather(self, value):
        return [value if other is None else other for other in self.heard]


@pytest.fixture
def heard(monkeypatch):
    """Makes this process a rank of several that torchrun started."""

    def start(rank: int, *heard) -> None:
        monkeypatch.setenv("RANK", str(rank))
        ranks = Hearing(rank, *heard)
        monkeypatch.setattr(shards, "joined_ranks", lambda device: nullcontext((ranks, device)))

    return start


@pytest.mark.parametrize("command", [write, measure])
def test_bad_input_of_ranks_is_said_once(command, run, tmp_path, capsys, heard) -> None:
    arguments = (run, tmp_path / "new") if command is write else (run,)
    wrong = ["--device", "cuda:9"]
    for rank, said in ((0, 1), (1, 0)):
        heard(rank, None, None)
        assert command(*arguments, *wrong) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == said and ("device 'cuda:9'" in error) == bool(said)
    here, there = (None, {}), ("its disk is full", {})
    for rank, said in ((0, "error: rank 1: its disk is full\n"), (1, "")):
        heard(rank, here, there)
        assert command(*arguments) == 2
        assert capsys.readouterr().err == said
    assert not (run / "evaluation.json").exists()
    assert not [*(tmp_path / "new").glob("*.safetensors")]


def test_ranks_with_other_arguments_are_refused(run, tmp_path, capsys, heard) -> None:
    theirs = (None, {"lengths": "1-3", "number": 17, "seed": 5})
    heard(0, None, theirs)
    assert write(run, tmp_path / "new") == 2
    assert "rank 1 has another out than rank 0 (None, not " in capsys.readouterr().err


def test_ranks_of_torchrun_are_shards(run, tmp_path, capsys, heard) -> None:
    assert write(run, tmp_path / "whole") == 0
    for rank in (1, 0):
        heard(rank, None, None)
        capsys.readouterr()
        assert write(run, tmp_path / "parts") == 0
        shown = capsys.readouterr().out
        assert ("started" in shown) == (rank == 0)  # rank 0 shows the progress
        assert ("shard 1/2 is done; files of 0/2 are missing" in shown) == (rank == 1)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_an_explicit_shard_needs_no_others(monkeypatch) -> None:
    monkeypatch.setattr(shards, "joined_ranks", lambda device: pytest.fail("joined"))
    with shared_start("0/2", "cuda", dict) as start:
        start.ready()
    assert start[:2] == ((0, 2), "cuda")


def test_an_error_after_the_start_is_ones_own(heard) -> None:
    heard(1, None, None)
    with pytest.raises(ValueError, match="^disk full$") as caught:
        with shared_start(None, "cpu", dict) as start:
            start.ready()
            raise ValueError("disk full")
    assert start[:2] == ((1, 2), "cpu") and not isinstance(caught.value, RefusedTogether)
