"""The examples among the recipes: what they compute, and that they run at small sizes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import relay_fast.recipes.__main__ as command
from relay_fast.recipes import drop_in, own_jsonl
from relay_fast.recipes._optional import need
from relay_fast.tasks import RecordsTask


def test_lookups_follow_the_table() -> None:
    generator = torch.Generator().manual_seed(0)
    table, start, steps = drop_in.draw(5, 7, 4, generator)
    assert (table.shape, start.shape, steps.shape) == ((7, 5), (7,), (4, 7))
    for b in range(7):
        here = int(start[b])
        for t in range(4):
            here = int(table[b, here])
            assert here == steps[t, b]


def test_more_loops_continue_the_same_states() -> None:
    torch.manual_seed(0)
    model = drop_in.Lookup(4, 16, 2)
    table, start, _ = drop_in.draw(4, 3, 1, torch.Generator().manual_seed(1))
    short, long = model(table, start, 2), model(table, start, 5)
    assert long.shape == (5, 3, 4) and torch.equal(long[:2], short)


def test_drop_in_runs(tmp_path, capsys) -> None:
    """A few steps lower the loss: after one loop more symbols are right than by chance (1/3)."""
    sizes = ["steps=80", "batch_size=32", "symbols=3", "loops=2", "tested=3", "d_model=16"]
    changes = [word for size in sizes for word in ("--set", size)]
    assert command.main(["drop_in", "--out", str(tmp_path), *changes]) == 0
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert len(results["accuracy"]) == 3 and results["accuracy"][0] > 0.6
    table = capsys.readouterr().out
    assert "2  trained" in table and "3  beyond" in table


def test_parity_has_one_bit_less_each_round() -> None:
    record = own_jsonl.parity([1, 0, 1, 1])
    rounds = ["1 1 1", "0 1", "1"]
    assert record == {"problem": "1 0 1 1", "rounds": rounds, "answer": "1"}
    for bits in ([0, 0], [1, 1, 1], [1, 0, 0, 1, 1]):
        assert own_jsonl.parity(bits)["answer"] == str(sum(bits) % 2)


def test_own_jsonl_runs(quick_workers, tmp_path, capsys) -> None:
    """Data, config and run stay in its folder; the models are evaluated beyond the training too."""
    sizes = ["scale=0.0005", "trained=2", "tested=3", "records=40", "problems=4"]
    changes = [word for size in sizes for word in ("--set", size)]
    assert command.main(["own_jsonl", "--out", str(tmp_path), *changes]) == 0
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert set(results["chains"]) == set(own_jsonl.MODELS)
    assert "3" in results["chains"]["ar_relay"] and "3" in results["trust"]
    assert "chains right; trained to 2 rounds" in capsys.readouterr().out
    assert (tmp_path / "relay" / "ar_relay.safetensors").is_file()
    task = RecordsTask("parity", str(tmp_path / "parity.jsonl"), shows="round")
    assert len(task.pools.index) == 3 * 40


def test_own_jsonl_needs_something_beyond_its_training() -> None:
    with pytest.raises(ValueError, match="tested = 8: give more than trained = 8"):
        replace(own_jsonl.PRESETS["cpu"], tested=8)


def test_a_missing_package_is_one_sentence(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr("relay_fast.recipes._optional.find_spec", lambda name: None)
    need_both = "recipe x needs a and b: pip install a b"
    with pytest.raises(ValueError, match=need_both):
        need("x", "a", "b")
    for name, package in (("fabric", "lightning"), ("sft", "transformers")):
        assert command.main([name, "--out", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert error == f"error: recipe {name} needs {package}: pip install {package}\n"
        assert not (tmp_path / name).exists()
