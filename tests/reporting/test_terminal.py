"""What the commands print never stops them: narrow encodings, closed pipes, full disks, plots."""

import io
import json
import os
import subprocess
import sys

import pytest

from relay_fast.reporting.terminal import draw_all, lenient_output, refused

PRINTS = """
import sys
from relay_fast.reporting.terminal import lenient_output
from relay_fast.reporting.tables import print_report
with lenient_output():
    for k in range(20000):
        print("\\u2713 done \\u2502 \\u2500", k, flush=k % 100 == 0)
    print_report({"accuracy": {"m": {"lis": {str(n): {"answer": 0.5} for n in range(9)}}},
                  "train_lengths": {"lis": [0, 4]}})
sys.stderr.write("went on")
"""


def run(code: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, **options)


@pytest.mark.parametrize("settings", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}])
def test_a_narrow_encoding_gets_other_characters(settings) -> None:
    plain = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run(PRINTS, stdout=subprocess.PIPE, env={**os.environ, **plain, **settings})
    assert (done.returncode, done.stderr) == (0, b"went on")
    lines = done.stdout.splitlines()
    assert lines[0] == b"? done ? ? 0" and b"50.0" in done.stdout and len(lines) > 20000


def test_nobody_reads_on() -> None:
    read, write = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", PRINTS], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert os.read(read, 10)
    os.close(read)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, b"went on")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_the_output() -> None:
    with open("/dev/full", "w") as full:
        done = run(PRINTS, stdout=full)
    assert (done.returncode, done.stderr) == (0, b"went on")


def test_no_output_at_all() -> None:
    done = run("import os; os.close(1)\n" + PRINTS, stdout=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (0, b"went on")


def test_the_streams_are_given_back(monkeypatch) -> None:
    mine = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", mine)
    with lenient_output():
        print("─")
    assert sys.stdout is mine and mine.errors == "strict"
    assert mine.buffer.getvalue() == b"?\n"


def test_errors_are_one_sentence(capsys) -> None:
    assert refused(ValueError("two\n  lines")) == 2
    assert refused(PermissionError(13, "Permission denied", "here")) == 2
    assert refused(MemoryError()) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: two lines",
        "error: here cannot be used (Permission denied): give another",
        "error: there is not enough memory for so many problems: give fewer",
    ]


def test_plots_never_decide(tmp_path, capsys) -> None:
    def fails(error):
        raise error

    draw_all([
        (tmp_path / "a.png", lambda: fails(OSError(28, "No space left on device"))),
        (tmp_path / "b.png", lambda: fails(RuntimeError())),
        (tmp_path / "c.png", lambda: None),
        (tmp_path / "d.png", lambda: fails(ImportError("plots need matplotlib"))),
        (tmp_path / "e.png", lambda: None),
    ])  # fmt: skip
    out, warnings = capsys.readouterr()
    assert out == f"plot: {tmp_path / 'c.png'}\n"  # none after matplotlib was missed
    first, second, third = warnings.splitlines()
    assert first.startswith(f"warning: no plot {tmp_path / 'a.png'}: [Errno 28] No space left")
    assert second.startswith(f"warning: no plot {tmp_path / 'b.png'}: RuntimeError; the same comm")
    assert third == "no plot: plots need matplotlib; the same command then draws it"


def test_a_notebooks_backend(tmp_path) -> None:
    code = f"""
import json, os
from relay_fast.reporting.plots import plot_losses
plot_losses({{"m": {{"step": [1, 2], "loss": [2.0, 1.0]}}}}, {json.dumps(str(tmp_path / "x.png"))})
assert os.environ["MPLBACKEND"] == "NAME"
""".replace("NAME", "no_backend")
    done = run(code, env={**os.environ, "MPLBACKEND": "no_backend"})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.png").stat().st_size > 1000
