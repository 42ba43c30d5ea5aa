"""Exported chains in the `datasets` library, and a step of trl's SFTTrainer on them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from relay_fast.relay.chain_parts import WrittenChains
from relay_fast.relay.export import export_chains
from relay_fast.tasks import RecordsTask
from tests.support.chain_models import TASKS, mixed_problems

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def exported(folder, form: str, number: int = 4) -> str:
    """True chains of all tasks; every third did not pass."""
    problems = mixed_problems(number)
    parts = [WrittenChains(problems, np.arange(len(problems)) % 3 != 0, None)]
    export_chains(folder / f"{form}.jsonl", parts, TASKS, form)
    return str(folder / f"{form}.jsonl")


def loaded(path: str, folder):
    return datasets.load_dataset(
        "json", data_files=path, split="train", cache_dir=str(folder / "cache")
    )


def test_datasets_reads_rounds(offline):
    path = exported(offline, "rounds")
    data = loaded(path, offline)
    assert data.column_names == ["task", "length", "problem", "rounds", "answer", "passed"]
    assert [dict(row) for row in data] == [json.loads(line) for line in open(path)]
    assert data.features["passed"].dtype == "bool"
    assert data.filter(lambda row: row["passed"]).num_rows == 8


def test_a_dataset_is_read_as_records(offline, monkeypatch):
    monkeypatch.setenv("RELAY_FAST_CACHE", str(offline / "cache"))
    data = loaded(exported(offline, "rounds"), offline)
    data = data.filter(lambda row: row["task"] == "edit_distance" and row["answer"] is not None)
    task = RecordsTask.of("again", data, answer_is="added", held_out=0.0)
    index = task.pools.index
    read = {record.problem: record.rounds for record in index.read(np.arange(len(index)))}
    assert read == {row["problem"]: [*row["rounds"], row["answer"]] for row in data} and read


def test_trl_trains_on_completions(offline):
    data = loaded(exported(offline, "sft"), offline)
    data = data.filter(lambda row: row["passed"])
    tokenizer = _tokenizer([*data["prompt"], *data["completion"]])
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    model = transformers.LlamaForCausalLM(config)
    before = model.lm_head.weight.detach().clone()
    arguments = trl.SFTConfig(
        output_dir=str(offline / "out"),
        max_steps=1,
        per_device_train_batch_size=4,
        use_cpu=True,
        bf16=False,
        fp16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        max_length=256,
        logging_steps=1,
    )
    trainer = trl.SFTTrainer(
        model=model, args=arguments, train_dataset=data, processing_class=tokenizer
    )
    row, prepared = data[0], trainer.train_dataset[0]
    prompt = tokenizer(row["prompt"])["input_ids"]
    whole = tokenizer(row["prompt"] + row["completion"])["input_ids"]
    assert prepared["input_ids"] == [*whole, tokenizer.eos_token_id]
    ignored = [-100] * len(prompt)  # the loss is on the chain alone
    assert prepared["labels"] == [*ignored, *whole[len(prompt) :], tokenizer.eos_token_id]
    trainer.train()
    assert trainer.state.global_step == 1
    assert not torch.equal(model.lm_head.weight, before)


def _tokenizer(texts: list[str]):
    """Characters as tokens."""
    special = ["<pad>", "<eos>"]
    characters = sorted({character for text in texts for character in text})
    library = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(
            {token: k for k, token in enumerate([*special, *characters])}, unk_token="<pad>"
        )
    )
    library.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    library.add_special_tokens(special)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=library, pad_token="<pad>", eos_token="<eos>"
    )
