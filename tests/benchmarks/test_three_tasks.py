"""The table of the three tasks: from run folders to rows, means, ranges and plots."""

import csv
import json

import pytest

from benchmarks import three_tasks
from relay_fast.relay.presets import load_preset, override
from relay_fast.relay.stages import Context, run_stage


def cell(chain: float, n: int = 500, **more) -> dict:
    return {"answer": 1.0, "bit": 0.99, "chain": chain, "n": n, **more}


def run_of(folder, name: str, feedback: str, seed: int, accuracy: dict, minutes: float = 6.0):
    """A folder with the results of an LIS run; accuracy is {model: {length: cell}}."""
    path = folder / name
    path.mkdir()
    config = override(
        load_preset("cpu-lis"), seed=seed, values=[f"model.looped.feedback={feedback}"]
    )
    results = {
        "config": config,
        "versions": {"commit": "0123456789abcdef"},
        "training": {model: {"seconds": 60 * minutes} for model in accuracy},
        "accuracy": {
            model: {"lis": {str(n): one for n, one in by_length.items()}}
            for model, by_length in accuracy.items()
        },
        "hit_matrix": {"lis": {"20": {model: [[1.0, 0.5], [0.5, None]] for model in accuracy}}},
    }
    (path / "results.json").write_text(json.dumps(results))
    return path


@pytest.fixture
def runs(tmp_path):
    def by_length(inside: float, last: float, fifth: float, third: float, **more) -> dict:
        return {19: cell(inside), 20: cell(last, **more), 24: cell(fifth), 27: cell(third)}

    return [
        run_of(tmp_path, "fed0", "tokens", 0, {
            "looped_aligned": by_length(1.0, 0.98, 0.9, 0.8, answer_once=0.05),
            "ar_baseline": by_length(1.0, 1.0, 0.1, 0.0),
            "ar_relay": by_length(1.0, 1.0, 0.85, 0.7),
        }),
        run_of(tmp_path, "fed1", "tokens", 1, {
            "looped_aligned": by_length(1.0, 1.0, 0.8, 0.7, answer_once=0.07),
            "looped_vanilla": by_length(0.0, 0.0, 0.0, 0.0),
        }, minutes=8.0),
        run_of(tmp_path, "latent0", "none", 0, {
            "looped_aligned": by_length(0.5, 0.3, 0.0, 0.0),
            "ar_relay": by_length(0.1, 0.1, 0.1, 0.1),
            "ar_baseline": by_length(0.9, 0.9, 0.2, 0.2),
        }),
    ]  # fmt: skip


def test_table_and_rows(runs, tmp_path) -> None:
    out = tmp_path / "out"
    rows = three_tasks.main(["--runs", *map(str, runs), "--out", str(out)])
    with (out / "results.csv").open(newline="") as file:
        held = list(csv.DictReader(file))
    # The baseline and the enhanced model are those of the fed runs.
    assert len(held) == len(rows) == 4 * 6 and len({tuple(row.items()) for row in held}) == 24
    baseline = [row for row in held if row["model"] == three_tasks.BASELINE]
    assert [row["chain"] for row in baseline] == ["100.0", "100.0", "10.0", "0.0"]
    enhanced = [row["chain"] for row in held if row["model"] == three_tasks.RELAY]
    assert enhanced == ["100.0", "100.0", "85.0", "70.0"]
    vanilla = [row for row in held if row["model"] == three_tasks.VANILLA]
    assert {row["chain"] for row in vanilla} == {""} and {r["answer"] for r in vanilla} == {"100.0"}
    lines = (out / "table.md").read_text().splitlines()
    (fed,) = [line for line in lines if three_tasks.FED in line]
    assert fed == (
        "| `cpu-lis`, LIS 1–20 | looped, rounds fed back | 2 | 7.0 | 99.5 (99.0–100.0) | "
        "99.0 (98.0–100.0) | 24: 85.0 (80.0–90.0) | 27: 75.0 (70.0–80.0) |  | "
        "100.0 (100.0–100.0), 99.0 (99.0–99.0) | 6.0 (5.0–7.0) |"
    )
    (latent,) = [line for line in lines if three_tasks.LATENT in line]
    assert "| 1 | 6.0 | 40.0 | 30.0 | 24: 0.0 | 27: 0.0 |" in latent
    assert "500 problems a length or more" in lines[-1] and "Commit 012345678." in lines[-1]
    for name in ("cpu-lis_lis.png", "hits_cpu-lis_lis_20.png"):
        assert (out / name).stat().st_size > 5000


def test_few_problems_are_left_out_and_later_lengths_count(tmp_path) -> None:
    accuracy = {"looped_aligned": {20: cell(0.9), 24: cell(0.5, n=100)}}
    path = run_of(tmp_path, "fed", "tokens", 0, accuracy)
    later = {"looped_aligned": {"lis": {"20": cell(0.1), "27": cell(0.4)}}}
    results = json.loads((path / "results.json").read_text())
    (path / "evaluation.json").write_text(json.dumps({**results, "accuracy": later}))
    rows = three_tasks.rows_of(three_tasks.open_run(path), 500)
    assert [(row["length"], row["chain"]) for row in rows] == [(20, 90.0), (27, 40.0)]


def test_what_cannot_be_collected(runs, tmp_path, capsys) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "results.json").write_text((runs[0] / "results.json").read_text())
    for folders, text in (
        ([tmp_path / "nothing"], "nothing holds no run of RELAY that can be read"),
        ([runs[0], tmp_path / "copy"], "copy and fed0 are both 'looped, rounds fed back' of cpu-l"),
    ):
        with pytest.raises(SystemExit):
            three_tasks.main(["--runs", *map(str, folders), "--out", str(tmp_path / "out")])
        assert text in capsys.readouterr().err


def test_a_run_as_the_package_writes_it(tmp_path) -> None:
    values = ["tasks.lis.test=[20, 22]", "tasks.lis.hit_matrix=[20]"]
    config = override(load_preset("cpu-lis"), steps=1, batch_size=4, eval_problems=2, values=values)
    context = Context(tmp_path, config, "cpu", "auto")
    (tmp_path / "checkpoints").mkdir()
    results = {"config": config, "versions": {"commit": "abc"}}
    for stage in ("looped_aligned", "evaluate.looped_aligned"):
        results |= run_stage(context, stage, lambda progress: None)
    (tmp_path / "results.json").write_text(json.dumps(results))
    out = tmp_path / "out"
    rows = three_tasks.main(["--runs", str(tmp_path), "--out", str(out), "--least", "2"])
    assert [row["length"] for row in rows] == list(range(1, 23))
    assert {row["model"] for row in rows} == {three_tasks.FED}
    assert all(0 <= row[key] <= 100 for row in rows for key in three_tasks.METRICS)
    assert (out / "hits_cpu-lis_lis_20.png").is_file()
