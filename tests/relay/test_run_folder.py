"""The run folder: made, continued, refused; the results in it and the table made of them."""

import errno
import io
import json
import os

import pytest

from relay_fast.relay import run_folder
from relay_fast.relay.run_folder import RunFolder, RunFolderError, versions
from relay_fast.reporting.tables import print_report, table_text
from relay_fast.utils.files import replacing
from tests.support.fresh_python import run_fresh
from tests.support.users import as_nobody, open_folder

CONFIG = {"preset": "cpu", "seed": 0, "tasks": {"arithmetic": {"prime": 3, "lengths": (1, 10)}}}


def test_a_run_is_made_and_continued(tmp_path):
    run = RunFolder(tmp_path / "runs" / "a", CONFIG)
    assert json.loads((run.path / "config.json").read_text())["seed"] == 0
    assert not run.stage_done("looped")
    run.mark_done("looped", {"step": 7})
    run.update_results({"seed": 0})

    again = RunFolder(run.path, CONFIG)
    assert again.stage_done("looped") and not again.stage_done("ar")
    assert json.loads((run.path / "stages.json").read_text())["looped"]["step"] == 7
    assert again.results() == {"seed": 0}
    assert again.checkpoint("looped") == run.path / "checkpoints" / "looped.safetensors"
    assert again.checkpoint("looped").parent.is_dir()

    opened = RunFolder.open(run.path)
    assert opened.config == again.config == json.loads(json.dumps(CONFIG))
    assert RunFolder.open(run.path, write=True).stage_done("looped")


def test_a_full_disk(tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "a", CONFIG)
    run.update_results({"seed": 0})

    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_folder, "write_json", full)
    for write, name in (
        (lambda: run.update_results({"seed": 1}), "results.json"),
        (lambda: run.mark_done("looped"), "stages.json"),
    ):
        with pytest.raises(RunFolderError, match=f"{name} cannot be written .No space.* not full"):
            write()
    assert run.results() == {"seed": 0}


def test_results_merge(tmp_path):
    run = RunFolder(tmp_path / "a", CONFIG)
    run.update_results({"accuracy": {"m": {"lis": {"1": {"n": 5}}}}, "seconds": {"looped": 1.0}})
    whole = run.update_results({"accuracy": {"m": {"lis": {2: {"n": 6}}}}, "list": [1, 2]})
    whole = run.update_results({"list": [3]})
    assert whole == run.results()
    assert whole["accuracy"]["m"]["lis"] == {"1": {"n": 5}, "2": {"n": 6}}
    assert whole["seconds"] == {"looped": 1.0} and whole["list"] == [3]


def test_killed_while_writing(tmp_path):
    run = RunFolder(tmp_path / "a", CONFIG)
    run.update_results({"seed": 1})
    with pytest.raises(KeyboardInterrupt), replacing(run.path / "results.json") as partial:
        partial.write_text('{"seed": ')
        raise KeyboardInterrupt
    assert run.results() == {"seed": 1}
    assert not list(run.path.glob(".*partial*"))


def test_another_config(tmp_path):
    RunFolder(tmp_path / "a", CONFIG)
    ours = {"preset": "cpu", "seed": 1, "tasks": {"arithmetic": {"prime": 7, "lengths": [1, 10]}}}
    with pytest.raises(RunFolderError) as error:
        RunFolder(tmp_path / "a", ours)
    assert str(error.value) == (
        f"the run folder {tmp_path / 'a'} belongs to another config: seed (1 here, 0 in the "
        f"folder), tasks.arithmetic.prime (7 here, 3 in the folder); give another --out, or the "
        f"same config to continue it."
    )


def test_many_differences_are_cut_short(tmp_path):
    RunFolder(tmp_path / "a", {str(i): 0 for i in range(9)})
    with pytest.raises(RunFolderError, match="2 .1 here, 0 in the folder. and 6 more; give"):
        RunFolder(tmp_path / "a", {str(i): 1 for i in range(9)})


@pytest.mark.parametrize("below", ["", "runs/a"])
def test_a_file_in_place_of_the_folder(tmp_path, below):
    (tmp_path / "a").write_text("x")
    with pytest.raises(RunFolderError, match="is a file, or lies below one.*another --out"):
        RunFolder(tmp_path / "a" / below, CONFIG)


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunFolderError, match="not empty and is not a run folder.*another --out"):
        RunFolder(tmp_path, CONFIG)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("made_before", [False, True])
def test_no_write_permission(made_before):
    with open_folder() as top:
        folder = top / "a"
        if made_before:
            RunFolder(folder, CONFIG)
            os.chmod(folder, 0o555)
        os.chmod(top, 0o555)
        try:
            with as_nobody(), pytest.raises(RunFolderError, match="no permission to write.*--out"):
                RunFolder(folder, CONFIG)
            if made_before:
                with as_nobody():
                    assert RunFolder.open(folder).config["seed"] == 0
                with as_nobody(), pytest.raises(RunFolderError, match="no permission to write"):
                    RunFolder.open(folder, write=True)
        finally:
            os.chmod(top, 0o755)
            if made_before:
                os.chmod(folder, 0o755)


def test_open_needs_a_run_folder(tmp_path):
    with pytest.raises(RunFolderError, match="is not a run folder .*relay_fast.train --out"):
        RunFolder.open(tmp_path / "a")


def test_damaged_config(tmp_path):
    RunFolder(tmp_path / "a", CONFIG)
    (tmp_path / "a" / "config.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"config\.json is damaged .*another --out"):
        RunFolder(tmp_path / "a", CONFIG)


def test_versions():
    found = versions()
    assert json.loads(json.dumps(found)) == found
    for name in ("python", "torch", "numpy", "relay_fast", "machine", "cpu_count", "device_name"):
        assert found[name], name


def test_the_commit_of_a_copy_without_git(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "relay_fast.relay.run_folder.__file__",
        str(tmp_path / "relay_fast" / "relay" / "run_folder.py"),
    )
    monkeypatch.delenv("RELAY_FAST_COMMIT", raising=False)
    assert versions()["commit"] is None
    monkeypatch.setenv("RELAY_FAST_COMMIT", "abc123")
    assert versions()["commit"] == "abc123"


def test_versions_do_not_import_triton():
    code = """
import sys
from relay_fast.relay.run_folder import versions
versions()
assert "triton" not in sys.modules
"""
    done = run_fresh(code)
    assert done.returncode == 0, done.stderr


def results(lengths=range(1, 15), longest=10) -> dict:
    cell = {"answer": 0.9876, "bit": 1.0, "chain": 0.5, "n": 500}
    by_length = {str(n): dict(cell) for n in lengths}
    answers_only = {n: {"answer": 0.25, "chain": None, "n": 500} for n in by_length}
    accuracy = {"looped_vanilla": {"lis": answers_only}, "looped_aligned": {"lis": by_length}}
    return {"accuracy": accuracy, "train_lengths": {"lis": [1, longest]}}


def test_table():
    text = table_text(results(), "lis")
    title, heading, _, first, second, note = text.splitlines()
    assert title == "LIS: final answer correct (%)"
    assert heading.split() == [*map(str, range(1, 11)), "│", "11", "12", "13", "14"]
    assert first.startswith("Looped + alignment") and second.startswith("Looped, vanilla")
    assert first.count("98.7") == 14 and second.count("25.0") == 14
    assert heading.index("│") == first.index("│") == second.index("│")
    assert note == "columns: numbers in the sequence; trained on 1 to 10"
    found = results()
    for cell in found["accuracy"]["looped_vanilla"]["lis"].values():
        cell["chain"] = 0.0  # what an untrained chain head writes
    row = table_text(found, "lis", "chain").splitlines()[4]
    assert row.startswith("Looped, vanilla") and row.count("–") == 14 and "0.0" not in row


@pytest.mark.parametrize("width", [60, 80, 100])
def test_a_long_table_fits_and_keeps_the_ends(width):
    lines = table_text(results(range(1, 121), 100), "lis", width=width).splitlines()
    assert max(map(len, lines)) <= width
    shown = lines[1].split()
    rule = shown.index("│")
    assert (shown[0], shown[rule - 1], shown[rule + 1], shown[-1]) == ("1", "100", "101", "120")
    assert "of 120 lengths fit" in " ".join(lines)


def test_never_rounded_up_to_100():
    table = results([1])
    table["accuracy"]["looped_aligned"]["lis"]["1"]["answer"] = 0.99999
    assert "99.9" in table_text(table, "lis")
    table["accuracy"]["looped_aligned"]["lis"]["1"]["answer"] = 1.0
    assert " 100\n" in table_text(table, "lis")


def test_the_report_is_the_same_in_a_file():
    printed = io.StringIO()
    print_report(results(), file=printed, width=100)
    assert "LIS: whole chain correct (%)" in printed.getvalue()
    tables = [table_text(results(), "lis", metric) + "\n\n" for metric in ("answer", "chain")]
    assert printed.getvalue() == "".join(tables) and "\x1b" not in printed.getvalue()
