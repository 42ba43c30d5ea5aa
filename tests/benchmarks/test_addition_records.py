"""The records of addition, and the rows and the plot of what is learned from them."""

from __future__ import annotations

import json

from benchmarks import addition_records
from relay_fast.tasks import TextTask
from relay_fast.tasks.addition import Addition


def test_its_rounds_are_those_of_the_task() -> None:
    task: TextTask = Addition()
    for record in addition_records.records(range(1, 6), 3, seed=0):
        assert task.solve(record["problem"]) == (record["rounds"], record["answer"])


def test_the_files_have_what_the_config_needs(tmp_path, monkeypatch) -> None:
    few = addition_records.records
    monkeypatch.setattr(addition_records, "records", lambda n, _, **more: few(n, 2, **more))
    config = addition_records.write_files(tmp_path)
    assert (
        config == tmp_path / "addition_records.toml" and 'data = "sums.jsonl"' in config.read_text()
    )
    lines = [json.loads(line) for line in (tmp_path / "sums.jsonl").read_text().splitlines()]
    assert [n["length"] for n in lines if "rounds" not in n] == [11, 11, 12, 12]
    assert len(lines) == 2 * 12
    tested = (tmp_path / "sums-test.jsonl").read_text().splitlines()
    assert {len(json.loads(line)["rounds"]) for line in tested} == set(addition_records.TESTED)


def test_rows_and_plot(tmp_path) -> None:
    cell = {"chain": 0.5, "answer": 1.0, "n": 4, "bit": 0.9}
    results = {"accuracy": {"ar_relay": {"addition": {"3": cell}}}}
    wanted = {"model": "ar_relay", "length": 3, "chain": 0.5, "answer": 1.0, "n": 4}
    assert addition_records.accuracy_rows(results) == [wanted]
    one = {"written": 4, "correct": 2, "precision": 1.0, "recall": 0.5}
    rows = [one | {"length": 11}, one | {"length": 12, "precision": None}]
    addition_records.plot_filter(rows, tmp_path / "filter.png")
    assert (tmp_path / "filter.png").stat().st_size > 10_000
