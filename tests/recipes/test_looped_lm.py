"""The looped language model as a recipe: corpus, results, what it says to bad input."""

import sysconfig
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import relay_fast.recipes.__main__ as command
from relay_fast.recipes import looped_lm
from relay_fast.relay.run_folder import RunFolder
from relay_fast.reporting.progress import Display

CPU = looped_lm.PRESETS["cpu"]
TINY = replace(
    CPU,
    context=16,
    d_model=16,
    n_heads=2,
    windows=4,
    scored=2,
    problems=1,
    shots=0,
    exits=(0.1,),
    test_loops=(1, 3),
    exit_loops=3,
    training=replace(CPU.training, steps=30, batch_size=4),
)


def test_the_standard_library_is_the_corpus() -> None:
    corpus = looped_lm.load_corpus()
    library = Path(sysconfig.get_path("stdlib"))
    assert corpus.about["folder"] == str(library) and corpus.about["licence"] == "PSF-2.0"
    texts = [f.read_bytes() for f in sorted(library.glob("*.py"))]
    texts = [text for text in texts if text]
    assert corpus.about["files"] == len(texts) and len(corpus.about["sha256"]) == 64
    assert len(corpus.train) + len(corpus.test) == sum(map(len, texts))
    assert corpus.test.tobytes().startswith(texts[9]) and corpus.train.dtype == np.uint8
    assert texts[9] not in corpus.train.tobytes()


def test_a_given_corpus(tmp_path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text("a" * 60)
    (tmp_path / "b.md").write_text("b" * 40)
    (tmp_path / "c.bin").write_text("c")
    corpus = looped_lm.load_corpus(str(tmp_path))
    assert corpus.train.tobytes() + corpus.test.tobytes() == b"b" * 40 + b"a" * 60
    assert len(corpus.test) == 10 and corpus.about["files"] == 2
    assert looped_lm.load_corpus(str(tmp_path / "c.bin")).about["train_bytes"] == 1
    assert looped_lm.windows(corpus.train, np.array([38, 0]), 3).tolist() == [
        [98, 98, 97], [98, 98, 98],
    ]  # fmt: skip


def test_the_recipe(tmp_path) -> None:
    with Display() as display:
        results = looped_lm.run(
            TINY, RunFolder(tmp_path, {}), seed=0, device="cpu", display=display
        )
    assert list(results["loss_by_loops"]) == ["1", "3"]
    history = results["history"]
    assert history[-1]["loss"] < history[0]["loss"] - 0.5
    assert results["loss_by_loops"]["3"] < np.log(256)
    whole, early = results["exits"]
    assert whole["loops"] == 3 and 1 <= early["loops"] <= 3 and early["exit_threshold"] == 0.1
    assert list(results["primitives"]) == [
        "depth 0, math", "depth 0, code", "depth 1, math", "depth 1, code",
    ]  # fmt: skip
    assert len(results["sample"]) > 0
    header, lines = looped_lm.rows(results)
    assert lines[0][0] == "1 loops" and {len(line) for line in lines} == {len(header)}
    assert lines[0][1] == pytest.approx(np.exp(results["loss_by_loops"]["1"]))
    assert looped_lm.plot(results, tmp_path / "p.png").stat().st_size > 10_000


def test_no_corpus(tmp_path, capsys, monkeypatch) -> None:
    arguments = ["looped_lm", "--out", str(tmp_path / "run"), "--set"]
    assert command.main([*arguments, f"corpus={tmp_path / 'none'}"]) == 2
    assert f"there is no corpus {tmp_path / 'none'}: give a text file" in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=rf"looked for \.py, .* in {empty}; give a text file or"):
        looped_lm.load_corpus(str(empty))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(empty))
    with pytest.raises(
        ValueError, match=rf"no corpus found: looked for \*\.py .* in {empty}; give"
    ):
        looped_lm.load_corpus()


@pytest.mark.parametrize("text", ["", "too short for a window of the test"])
def test_too_little_text(text, tmp_path) -> None:
    (tmp_path / "a.txt").write_text(text)
    message = "no corpus found" if not text else "4 for the test|bytes for training"
    with pytest.raises(ValueError, match=message), Display() as display:
        looped_lm.run(
            replace(TINY, corpus=str(tmp_path / "a.txt")),
            RunFolder(tmp_path / "run", {}),
            seed=0,
            device="cpu",
            display=display,
        )


def test_the_paper_preset(tmp_path) -> None:
    paper = looped_lm.PRESETS["paper"]
    assert (paper.d_model, paper.d_hidden, paper.prelude, paper.layers, paper.coda) == (
        2048, 5120, 4, 4, 4,
    )  # fmt: skip
    narrow = replace(
        paper,
        d_model=32,
        n_heads=2,
        d_hidden=80,
        context=32,
        windows=2,
        scored=1,
        problems=1,
        shots=0,
        training=replace(paper.training, steps=20, batch_size=1),
        test_loops=(4,),
    )
    with Display() as display:
        results = looped_lm.run(
            narrow, RunFolder(tmp_path, {}), seed=0, device="cpu", display=display
        )
    layer = 4 * 32 * 32 + 2 * 32 * 80 + 2 * 32
    assert results["parameters"] == 12 * layer + 2 * 32 + 2 * 256 * 32


@pytest.mark.parametrize(
    "change, message",
    [
        ({"context": 0}, "context = 0: give at least 1"),
        ({"test_loops": (0,)}, r"test_loops = \[0\]: give at least 1"),
    ],
)
def test_bad_input(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CPU, **change)
