"""The examples with optional packages: Fabric trains as the plain loop does; a Llama is tuned."""

from __future__ import annotations

import json

import pytest
import torch

import relay_fast.recipes.__main__ as command


def results_of(name: str, folder, *sizes: str) -> dict:
    changes = [word for size in sizes for word in ("--set", size)]
    assert command.main([name, "--out", str(folder), *changes]) == 0
    return json.loads((folder / "results.json").read_text())["results"]


def test_fabric_trains_the_same_model_as_the_plain_loop(tmp_path, capsys) -> None:
    pytest.importorskip("lightning")
    sizes = ["steps=60", "batch_size=32", "symbols=3", "loops=2", "tested=3", "d_model=16"]
    plain = results_of("drop_in", tmp_path / "plain", *sizes)
    assert results_of("fabric", tmp_path / "fabric", *sizes) == plain


SIZES = ["records=60", "trained=2", "tested=3", "chains=12", "problems=4"]
SIZES += ["steps=3", "tuning=2", "d_model=16"]


def test_a_llama_is_tuned_on_chains_beyond_its_range(tmp_path, capsys) -> None:
    pytest.importorskip("transformers")
    found = results_of("sft", tmp_path, "scale=0.02", *SIZES)
    chains = [json.loads(line) for line in (tmp_path / "chains.jsonl").open()]
    assert {chain["length"] for chain in chains} == {1, 2, 3}
    passed = [chain["length"] for chain in chains if chain["passed"]]
    assert found["inside"] == sum(n <= 2 for n in passed) and found["beyond"] == passed.count(3)
    assert set(found["solved"]) == {"trained", "fine-tuned"}
    assert set(found["solved"]["trained"]) == {"1", "2", "3"}


def test_a_looped_model_that_learned_nothing_is_one_sentence(tmp_path, capsys) -> None:
    pytest.importorskip("transformers")
    changes = [word for size in ("scale=0.0003", *SIZES) for word in ("--set", size)]
    assert command.main(["sft", "--out", str(tmp_path), *changes]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: none of the looped model's chains passed the check, at scale")


def test_the_loss_is_on_completions_alone() -> None:
    pytest.importorskip("transformers")
    from relay_fast.recipes import sft

    pairs = [
        {"prompt": "1 0\n", "completion": "1"},
        {"prompt": "1 1 1\n", "completion": "0 1\n1"},
    ]
    tokeniser = sft.Words([pair["prompt"] + pair["completion"] for pair in pairs])
    assert tokeniser.words == ["\n", "0", "1"]
    batch = sft.collate(pairs, tokeniser)
    assert batch["input_ids"].shape == (2, 9)
    short, long = batch["labels"].tolist()
    assert short == [*[-100] * 3, *tokeniser.encode("1"), sft.END, *[-100] * 4]
    assert long == [*[-100] * 4, *tokeniser.encode("0 1\n1"), sft.END]
    assert batch["attention_mask"].sum(1).tolist() == [5, 9]
    assert tokeniser.decode([*tokeniser.encode("0 1\n1"), sft.END, sft.PAD]) == "0 1\n1"


def test_solved_counts_whole_completions() -> None:
    pytest.importorskip("transformers")
    from relay_fast.recipes import sft

    class Echo(torch.nn.Linear):
        """Writes `1` and the end after any prompt."""

        def generate(self, ids, **_):
            one = torch.tensor([tokeniser.encode("1") + [sft.END]])
            return torch.cat([ids, one.expand(len(ids), -1)], dim=1)

    tokeniser = sft.Words(["0 1\n"])
    problems = [
        {"prompt": "1 0\n", "completion": "1"},
        {"prompt": "1 1\n", "completion": "0"},
    ]
    assert sft.solved(Echo(1, 1), problems, tokeniser) == 0.5
