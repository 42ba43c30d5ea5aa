"""Plots: that they come out, what is in them, and that nothing global is touched."""

import builtins
from pathlib import Path

import numpy as np
import pytest

from relay_fast.reporting import plots
from relay_fast.reporting.tables import MODEL_NAMES
from tests.support.fresh_python import run_fresh


def results(tasks=("lis", "arithmetic"), far=14) -> dict:
    curve = {
        str(n): {"answer": 1.0 if n <= 10 else 0.5, "chain": 0.5, "n": 500}
        for n in range(1, far + 1)
    }
    return {
        "accuracy": {model: {task: curve for task in tasks} for model in MODEL_NAMES},
        "train_lengths": {task: [1, 10] for task in tasks},
    }


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures = []
    save = plots.save_figure

    def keep(figure, path):
        figures.append(figure)
        return save(figure, path)

    monkeypatch.setattr(plots, "save_figure", keep)
    return figures


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_accuracy(tmp_path, drawn):
    path = plots.plot_accuracy(results(), "answer", tmp_path / "new" / "a.png")
    assert is_png(path)
    (figure,) = drawn
    panels = figure.axes
    assert [panel.get_title() for panel in panels] == ["Arithmetic", "LIS"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(MODEL_NAMES.values())
    for panel in panels:
        assert len(panel.lines) == len(MODEL_NAMES)
        looks = {(line.get_color(), line.get_marker()) for line in panel.lines}
        assert len(looks) == len(MODEL_NAMES)
        assert all(float(tick).is_integer() for tick in panel.get_xticks())
        assert {10, 14} <= set(panel.get_xticks())
        low, high = panel.get_ylim()
        assert low <= 0 and 100 <= high <= 105
        # The lengths beyond training fill two fifths of the width.
        (left, _), (edge, _), (right, _) = panel.transAxes.inverted().transform(
            panel.transData.transform([(0.5, 0), (10.5, 0), (14.5, 0)])
        )
        assert np.allclose([left, edge, right], [0, 0.6, 1], atol=1e-6)


@pytest.mark.parametrize("far", [1, 9, 10, 11, 40])
def test_accuracy_wherever_the_training_range_ends(tmp_path, far):
    assert is_png(plots.plot_accuracy(results(("lis",), far), "chain", tmp_path / "a.png"))


def test_accuracy_without_a_training_range_and_of_an_unknown_model(tmp_path):
    found = results(("lis",))
    del found["train_lengths"]
    found["accuracy"]["mine"] = found["accuracy"]["ar_relay"]
    assert is_png(plots.plot_accuracy(found, "answer", tmp_path / "a.png"))


def test_models_without_the_metric_are_left_out(tmp_path, drawn):
    found = results(("lis",))
    found["accuracy"]["looped_vanilla"] = {"lis": {"1": {"answer": 1.0, "chain": None, "n": 1}}}
    plots.plot_accuracy(found, "chain", tmp_path / "a.png")
    names = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert "Looped, vanilla" not in names and len(names) == len(MODEL_NAMES) - 1


def test_hit_matrix(tmp_path, drawn):
    matrix = np.full((3, 4), 0.5)
    matrix[2, :2] = np.nan
    as_lists = [[0.5, 0.5], [None, 1.0]]  # as read from results.json
    found = {"ar_relay": as_lists, "looped_aligned": matrix}
    assert is_png(plots.plot_hit_matrix(found, "LIS", tmp_path / "h.png"))
    first, second = drawn[0].axes[:2]
    assert (first.get_title(), second.get_title()) == ("Looped + alignment", "AR, RELAY-enhanced")
    assert len(first.texts) == 10 and {text.get_text() for text in first.texts} == {"50"}
    low, high = first.get_ylim()
    assert low > high, "round 1 is at the top"


def test_a_large_hit_matrix_is_not_annotated(tmp_path, drawn):
    plots.plot_hit_matrix({m: np.ones((14, 50)) for m in MODEL_NAMES}, "x", tmp_path / "h.png")
    assert not drawn[0].axes[0].texts


def test_losses(tmp_path, drawn):
    steps = list(range(100))
    history = {"looped_aligned": {"step": steps, "loss": [2.0**-n for n in range(100)]}}
    history["ar_baseline"] = {"step": [0], "loss": [1.0]}
    assert is_png(plots.plot_losses(history, tmp_path / "l.png"))
    assert drawn[0].axes[0].get_yscale() == "log"


def test_a_run_without_what_an_untrained_chain_head_writes(tmp_path, drawn):
    found = results(("lis",))
    found["hit_matrix"] = {"lis": {"9": {m: [[0.0, 1.0]] for m in MODEL_NAMES}}}
    phases = [{"step": s, "loss": 1.0} for s in (1, 5, 1, 4, 1, 1, 7)]
    found["history"] = {"ar_self_truth": phases}
    assert len(plots.plot_run(found, tmp_path)) == len(drawn) == 4
    answer, chain, hits, losses = drawn
    shown = [[text.get_text() for text in f.legends[0].get_texts()] for f in (answer, chain)]
    shown.append([panel.get_title() for panel in hits.axes if panel.get_title()])
    assert ["Looped, vanilla" in names for names in shown] == [True, False, False]
    assert losses.axes[0].lines[0].get_xdata().tolist() == [1, 5, 6, 9, 10, 11, 17]

    found = {**found, "history": {}, "accuracy": {"looped_vanilla": found["accuracy"]["ar_relay"]}}
    found["hit_matrix"]["lis"]["9"] = {"looped_vanilla": [[0.0]]}
    assert [file.name for file in plots.plot_run(found, tmp_path)] == ["accuracy_answer.png"]


def test_moving_mean():
    assert np.allclose(plots._moving_mean(np.array([1.0, 3.0, 5.0, 7.0]), 2), [1, 2, 4, 6])


@pytest.mark.parametrize(
    "draw, match",
    [
        (lambda path: plots.plot_accuracy({}, "answer", path), "no 'answer' accuracy to draw"),
        (lambda path: plots.plot_hit_matrix({}, "x", path), "no hit matrix to draw"),
        (lambda path: plots.plot_hit_matrix({"m": [1.0]}, "x", path), "must have rows"),
        (lambda path: plots.plot_losses({}, path), "no losses to draw"),
    ],
)
def test_nothing_to_draw(tmp_path, draw, match):
    with pytest.raises(ValueError, match=match):
        draw(tmp_path / "a.png")


def test_without_matplotlib(tmp_path, monkeypatch):
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install relay_fast\[train\]"):
        plots.plot_losses({"m": {"step": [0], "loss": [1.0]}}, tmp_path / "l.png")


def test_neither_import_nor_drawing_touches_pyplot(tmp_path):
    code = f"""
import sys
from relay_fast.reporting import plots
assert "matplotlib" not in sys.modules
plots.plot_losses({{"m": {{"step": [0], "loss": [1.0]}}}}, {str(tmp_path / "l.png")!r})
assert "matplotlib.pyplot" not in sys.modules
"""
    done = run_fresh(code)
    assert done.returncode == 0, done.stderr
