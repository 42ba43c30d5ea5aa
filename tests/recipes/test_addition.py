"""Addition: the problems and their targets against strings, and what the recipe leaves."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from relay_fast.recipes import addition
from relay_fast.recipes.addition import END, PRESETS, PUBLISHED, Settings, draw_sums
from relay_fast.relay.run_folder import RunFolder
from relay_fast.reporting.progress import Display

SYMBOLS = "0123456789+=$"


@pytest.mark.parametrize("digits", [1, 2, 3, 9])
def test_problems_read_as_sums(digits) -> None:
    rng = np.random.default_rng(0)
    counts = rng.choice((1, 2, 5, 32), 40)
    tokens, rows, targets, cu_seqlens = draw_sums(rng, counts, digits)
    assert cu_seqlens[0] == 0 and cu_seqlens[-1] == len(tokens)
    asked = dict(zip(rows.tolist(), targets.tolist(), strict=True))
    for n, first, last in zip(counts, cu_seqlens[:-1], cu_seqlens[1:], strict=True):
        text = "".join(SYMBOLS[t] for t in tokens[first:last])
        problem, answer = text.split("=")
        operands = problem.split("+")
        assert len(operands) == n and {len(x) for x in operands} == {digits}
        assert answer == str(sum(map(int, operands)))
        # Read out from "=" to the answer's last digit, each the character that follows.
        read = range(first + len(problem), last)
        assert [k for k in asked if first <= k < last] == list(read)
        assert "".join(SYMBOLS[asked[k]] for k in read) == answer + "$"


def test_operands_are_uniform() -> None:
    tokens, _, _, cu = draw_sums(np.random.default_rng(0), np.full(4000, 2), 1)
    first = tokens[np.array(cu[:-1])]
    assert np.abs(np.bincount(first, minlength=10) / 4000 - 0.1).max() < 0.02


def test_accuracy_wants_the_whole_answer() -> None:
    """A model that knows every digit but the first gets nothing; one that knows all, everything."""

    class Oracle(torch.nn.Module):
        def __init__(self, wrong: bool):
            super().__init__()
            self.embedding, self.wrong = torch.nn.Embedding(1, 1), wrong

        def predict(self, tokens, rows, cu_seqlens):
            follows = torch.cat([tokens[1:], torch.tensor([END])])
            follows[torch.tensor(cu_seqlens[1:]) - 1] = END
            if self.wrong:
                follows[tokens == addition.EQUALS] = END
            return follows[rows]

    settings = replace(PRESETS["cpu"], problems=300)
    assert addition.accuracy(Oracle(False), settings, 3, seed=0) == 1.0
    assert addition.accuracy(Oracle(True), settings, 3, seed=0) == 0.0


@pytest.mark.parametrize("preset", ["cpu", "paper"])
def test_a_short_run(preset, tmp_path) -> None:
    whole = PRESETS[preset]
    settings = replace(
        whole,
        training=replace(whole.training, steps=20, batch_size=1),
        models=("1x1", "2x6"),
        problems=2,
    )
    with Display() as display:
        results = addition.run(
            settings, RunFolder(tmp_path, {}), seed=0, device="cpu", display=display
        )
    header, lines = addition.rows(results)
    assert [line[0] for line in lines] == ["1⊗1", "2⊗6"]
    assert all(len(line) == len(header) for line in lines)
    published = [cell for cell in lines[1][-5:-1]] if preset == "paper" else []
    assert published == ([100, 99.8, 99.7, 99.5] if preset == "paper" else [])
    assert addition.plot(results, tmp_path / "plot.png").stat().st_size > 10_000


def test_the_papers_sizes() -> None:
    s = PRESETS["paper"]
    assert (s.d_model, s.n_heads, s.digits, s.training.batch_size) == (256, 8, 3, 1024)
    assert s.counts == (2, 4, 8, 16, 32) and s.test_counts == (8, 16, 24, 32)
    assert set(s.models) == set(PUBLISHED)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"digits": 0}, "digits = 0: give 1 to 9"),
        ({"counts": ()}, "counts = []: give at least one number"),
        ({"test_counts": (2, 0)}, "test_counts = [2, 0]: give at least 1"),
        ({"problems": 0}, "problems = 0: give at least 1"),
        ({"models": ("4",)}, "model '4' is unknown: write layers x loops like 1x4"),
    ],
)
def test_bad_settings(options, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Settings(PRESETS["cpu"].training, **options)
