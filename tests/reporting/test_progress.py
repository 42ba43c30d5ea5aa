"""What a run shows while it works: one line a stage, or bars on a terminal."""

import sys
import time

from relay_fast.reporting.progress import Compiling, Display, Problems, Progress


def test_plain_progress_has_rate_and_time_left(capsys, monkeypatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Display() as display:
        display.start("looped_aligned")
        for step in (1, 2, 51):  # the second comes too soon to be shown
            display.progress("looped_aligned", Progress(step, 101, 320.0, 0.25, 0.5))
            clock[0] += 1.0 if step == 1 else 9.0
        display.finish("looped_aligned", 12.4)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(line.startswith("looped_aligned ") for line in lines)
    assert "step 1/101" in lines[1] and "left" not in lines[1]
    assert "step 51/101" in lines[2] and "loss 0.2500" in lines[2] and "50.0%" in lines[2]
    assert "320 samples/s" in lines[2] and "10 s left" in lines[2]
    assert lines[3].endswith("done in 12 s")


def test_progress_of_stages_in_phases(capsys, monkeypatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    train_step = lambda step: Progress(step, 101, 320.0, 0.25, 0.5)
    phases = [
        *map(train_step, (1, 51)),
        *map(train_step, (11, 21)),
        Problems(30, 90),
        Problems(60, 90),
        Compiling(0, 4),
        Compiling(2, 4),
    ]
    with Display() as display:
        display.start("ar_self_truth")
        for progress in phases:
            display.progress("ar_self_truth", progress)
            clock[0] += 10.0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert ["left" in line for line in lines] == [False, True] * 4  # each phase by its own rate
    assert lines[1].endswith("10 s left") and lines[3].endswith("80 s left")
    assert lines[7].split()[1:] == "warm-up call 2/4 compiling kernels 10 s left".split()
    assert lines[5].split() == "ar_self_truth problem 60/90 3 problems/s 10 s left".split()


def test_a_slow_rate_is_a_number_and_an_unknown_one_is_not_shown(capsys, monkeypatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Display() as display:
        for done in (1, 3):
            display.progress("ar_relay", Problems(done, 9))
            clock[0] += 10.0
        display.progress("ar_relay", Progress(1, 9, 0.0, 0.25, 0.5))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "ar_relay problem 1/9".split()
    assert lines[1] == "ar_relay problem 3/9 0.2 problems/s 30 s left".split()
    assert lines[2] == "ar_relay step 1/9 loss 0.2500 correct 50.0%".split()


def test_bars_on_a_terminal(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with Display() as display:
        display.start("ar_baseline")
        display.progress("ar_baseline", Progress(3, 10, 320.0, 0.25, 0.5))
        display.progress("ar_baseline", Problems(1, 2))
        display.finish("ar_baseline", 1.0)
    out = capsys.readouterr().out
    assert "ar_baseline" in out and "done in 1 s" in out
