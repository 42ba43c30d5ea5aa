"""Chains as text for other programs: what stands in the file, and when there is one."""

from __future__ import annotations

import json

import numpy as np
import pytest

from relay_fast.relay.chain_dataset import ChainDataset, write_dataset
from relay_fast.relay.chain_parts import WrittenChains, chain_parts
from relay_fast.relay.export import export_chains
from relay_fast.tasks import NO_ANSWER, Samples
from relay_fast.tasks.record_files import parse
from tests.support.chain_models import TASKS, looped_model


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def true_chains() -> WrittenChains:
    """One solved problem of each task; the second did not pass, the third has no answer."""
    problems = {
        "arithmetic": "( 1 + 2 ) * 3 =",
        "edit_distance": "a b | a c d <sep>",
        "lis": "21 22 30 23 24 <sep>",
    }
    parts = []
    for name, text in problems.items():
        task = TASKS[name]
        ids = task.encode(text)
        rounds, answer = task.solve(ids)
        parts.append(
            Samples(
                task=np.array([task.index], np.int32),
                length=np.array([task.length_of(ids)], np.int32),
                problem=np.array(ids, np.int32),
                problem_offsets=np.array([0, len(ids)]),
                rounds=np.array([t for tokens in rounds for t in tokens], np.int32),
                round_offsets=np.cumsum([0, *map(len, rounds)]),
                loops=np.array([len(rounds)], np.int32),
                answer=np.array([answer if name != "lis" else NO_ANSWER], np.int32),
            )
        )
    return WrittenChains(Samples.concat(parts), np.array([True, False, True]), None)


def test_rounds(tmp_path):
    path = tmp_path / "chains.jsonl"
    assert export_chains(path, [true_chains()] * 2, TASKS) == (6, 4)
    assert lines(path)[:3] == lines(path)[3:]
    assert lines(path)[:3] == [
        {
            "task": "arithmetic",
            "length": 2,
            "problem": "( 1 + 2 ) * 3 =",
            "rounds": ["3 * 3 =", "4"],
            "answer": "4",
            "passed": True,
        },
        {
            "task": "edit_distance",
            "length": 2,
            "problem": "a b | a c d",
            "rounds": ["0 2 4 ,", "2 3 5 ,"],
            "answer": "5",
            "passed": False,
        },
        {
            "task": "lis",
            "length": 5,
            "problem": "21 22 30 23 24",
            "rounds": ["1 2 3 3", "4 4 4 4"],
            "answer": None,
            "passed": True,
        },
    ]


def test_prompts_and_completions(tmp_path):
    export_chains(tmp_path / "chains.jsonl", [true_chains()], TASKS, "sft")
    found = lines(tmp_path / "chains.jsonl")
    assert [(r["prompt"], r["completion"], r["passed"]) for r in found] == [
        ("( 1 + 2 ) * 3 =\n", "3 * 3 =\n4", True),  # the last round is the answer
        ("a b | a c d\n", "0 2 4 ,\n2 3 5 ,\n5", False),
        ("21 22 30 23 24\n", "1 2 3 3\n4 4 4 4", True),
    ]


def test_an_export_is_what_a_reader_of_records_reads(tmp_path):
    path = tmp_path / "chains.jsonl"
    export_chains(path, [true_chains()], TASKS)
    first = parse(path.read_bytes().splitlines()[0])
    assert first == ("( 1 + 2 ) * 3 =", ["3 * 3 =", "4"], "4", 2, None)


def test_parts_are_those_of_a_dataset(tmp_path):
    model, counts = looped_model(), {"arithmetic": {2: 5, 3: 4}}
    options = {"seed": 3, "verify": "self"}
    write_dataset(tmp_path / "chains", model, TASKS, counts, shard_chains=4, **options)
    folder = ChainDataset(tmp_path / "chains", only_passed=False)
    direct = chain_parts(model, TASKS, counts, part_chains=4, **options)
    assert export_chains(tmp_path / "a.jsonl", folder.parts(), TASKS)[0] == 9
    assert export_chains(tmp_path / "b.jsonl", direct, TASKS)[0] == 9
    assert lines(tmp_path / "a.jsonl") == lines(tmp_path / "b.jsonl")


def test_an_interruption_leaves_no_file(tmp_path):
    def parts():
        yield true_chains()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_chains(tmp_path / "chains.jsonl", parts(), TASKS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "form", "message"),
    [
        ("chains.jsonl", "csv", "format = 'csv' is unknown: use one of rounds, sft"),
        ("there.jsonl", "sft", "there.jsonl exists already: delete it, or export into another"),
        ("no/chains.jsonl", "sft", "chains.jsonl cannot be written: there is no folder"),
    ],
)
def test_refusals(tmp_path, name, form, message):
    (tmp_path / "there.jsonl").write_text("mine")
    with pytest.raises(ValueError, match=message):
        export_chains(tmp_path / name, [true_chains()], TASKS, form)
    assert (tmp_path / "there.jsonl").read_text() == "mine"
