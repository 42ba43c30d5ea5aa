"""Length generalisation: the problems, packing, the loops of each sequence, what a run leaves."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from relay_fast.recipes import length_generalization as recipe
from relay_fast.recipes.length_generalization import (
    DRAWS,
    END,
    EQUALS,
    PRESETS,
    LoopedReader,
    Task,
    draw_problems,
    make_draw,
    pack,
)
from relay_fast.relay.run_folder import RunFolder
from relay_fast.reporting.progress import Display

SYMBOLS = "01+=$"
CPU = PRESETS["cpu"]


def number(text: str) -> int:
    return int(text, 2)


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("n", [1, 2, 7])
def test_problems_have_their_answer(name, n) -> None:
    inputs, targets = draw_problems(np.random.default_rng(0), name, 50, n)
    for line, wanted in zip(inputs, targets, strict=True):
        text, answer = ("".join(SYMBOLS[t] for t in part) for part in (line, wanted))
        query, rest = text.split("=")
        # "=" and all the end tokens are read out: the answer, and an end.
        assert answer[-1] == "$" and rest == "$" * (len(answer) - 1)
        if name == "parity":
            assert len(query) == n and answer == f"{query.count('1') % 2}$"
        elif name == "copy":
            assert len(query) == n and answer == query + "$"
        else:
            a, b = query.split("+")
            assert len(a) == len(b) == n and len(answer) == n + 2
            assert number(answer[:-1]) == number(a) + number(b)


def test_packing_keeps_problems_and_their_rows() -> None:
    rng = np.random.default_rng(0)
    problems = [draw_problems(rng, "copy", 2, 3), draw_problems(rng, "copy", 1, 1)]
    tokens, rows, targets, cu_seqlens = pack(problems)
    assert cu_seqlens == [0, 7, 14, 17] and len(tokens) == 17
    np.testing.assert_array_equal(tokens[7:14], problems[0][0][1])
    np.testing.assert_array_equal(tokens[14:], problems[1][0][0])
    assert rows.tolist() == [3, 4, 5, 6, 10, 11, 12, 13, 15, 16]
    assert all(tokens[rows[k]] == EQUALS for k in (0, 4, 8))
    np.testing.assert_array_equal(targets[4:8], problems[0][1][1])


def test_the_curriculum_grows_to_the_longest() -> None:
    task = Task(1, 4, longest=5, grow_every=10, tests=(5,))
    draw = make_draw("parity", task, 200)
    for step, longest in ((0, 1), (9, 1), (10, 2), (39, 4), (1000, 5)):
        tokens, rows, targets, cu_seqlens, loops = draw(np.random.default_rng(step), step)
        assert len(loops) == 200 == len(cu_seqlens) - 1
        assert set(loops) == set(range(1, longest + 1))
        # A sequence is n bits, "=" and one end token: n loops.
        assert (np.diff(cu_seqlens) - 2).tolist() == loops
        assert set(targets[1::2]) == {END}


@pytest.mark.parametrize("preset", ["cpu", "paper"])
def test_each_sequence_loops_as_often_as_it_is_long(preset) -> None:
    torch.manual_seed(0)
    task = replace(PRESETS[preset].parity, heads=4)
    model = LoopedReader(replace(PRESETS[preset], d_model=32, parity=task), task)
    rng = np.random.default_rng(0)
    problems = [draw_problems(rng, "copy", 2, n) for n in (1, 3)]
    tokens, rows, targets, cu_seqlens = pack(problems)
    arrays = (torch.from_numpy(a) for a in (tokens, rows, targets))
    loss, right = model.loss(*arrays, cu_seqlens, [1, 1, 3, 3])
    logs = [
        model.read(torch.from_numpy(inputs), wanted.shape[1], 4)[n - 1].flatten(0, 1)
        for (inputs, wanted), n in zip(problems, (1, 3), strict=True)
    ]
    logs = torch.cat(logs)
    expected = torch.nn.functional.nll_loss(logs, torch.from_numpy(targets))
    torch.testing.assert_close(loss, expected)
    assert right == (logs.argmax(-1) == torch.from_numpy(targets)).float().mean()


def test_no_position_is_seen() -> None:
    """Without positions a causal block knows where it is only by what it can count."""
    model = LoopedReader(CPU, CPU.parity)
    tokens = torch.zeros(1, 6, dtype=torch.long)  # all alike: every state must be the same
    states = model.block(model.embedding(tokens), 3)
    torch.testing.assert_close(states, states[:, :1].expand_as(states))


def test_stopping_by_confidence() -> None:
    """A model that is right at loop 2 only, and surest there for all but one problem of ten."""

    class Sure(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(1, 1)

        def read(self, tokens, last, loops):
            parity = tokens[:, :3].sum(1) % 2
            truth = torch.stack([parity, torch.full_like(parity, END)], 1)
            logits = torch.full((loops, *truth.shape, 5), 0.0)
            for t, sure in enumerate([1.0, 3.0, 2.0][:loops]):
                shown = truth if t == 1 else (1 - truth) % 5
                logits[t].scatter_(-1, shown[..., None], sure)
            logits[0, ::10].mul_(9)
            return logits.log_softmax(-1)

    found = recipe.evaluate(Sure(), "parity", 3, 3, 200, seed=0)
    assert found["oracle"] == 0.0  # 3 loops
    assert (found["together"], found["together_loops"]) == (1.0, 2)
    assert found["each"] == pytest.approx(0.9) and found["each_loops"] == pytest.approx(1.9)


def run(folder, settings) -> dict:
    with Display() as display:
        results = recipe.run(settings, RunFolder(folder, {}), seed=0, device="cpu", display=display)
    header, lines = recipe.rows(results)
    assert all(len(line) == len(header) for line in lines)
    assert recipe.plot(results, folder / "plot.png").stat().st_size > 10_000
    return results


@pytest.mark.parametrize("preset", ["cpu", "paper"])
def test_a_short_run(preset, tmp_path) -> None:
    whole = PRESETS[preset]
    settings = replace(
        whole,
        training=replace(whole.training, steps=20, batch_size=1),
        tasks=tuple(DRAWS),
        problems=2,
        more_loops=0,
    )
    settings = replace(
        settings, **{name: replace(getattr(settings, name), tests=(3, 4)) for name in DRAWS}
    )
    results = run(tmp_path, settings)
    assert list(results["tasks"]) == ["parity", "copy", "addition"]


def test_short_parities_are_learned(tmp_path) -> None:
    training = replace(CPU.training, steps=250, batch_size=32)
    parity = replace(CPU.parity, longest=4, grow_every=50, tests=(2, 4))
    settings = replace(CPU, training=training, parity=parity, d_model=32, problems=200)
    settings = replace(settings, tasks=("parity",))
    tests = run(tmp_path, settings)["tasks"]["parity"]["tests"]
    assert tests["2"]["oracle"] > 0.95 and tests["4"]["oracle"] > 0.9


def test_the_papers_sizes() -> None:
    s = PRESETS["paper"]
    assert (s.d_model, s.training.lr, s.training.batch_size, s.problems) == (256, 1e-4, 64, 6400)
    sizes = {name: getattr(s, name) for name in DRAWS}
    assert [(t.layers, t.heads) for t in sizes.values()] == [(1, 64), (2, 8), (3, 8)]
    assert [t.longest for t in sizes.values()] == [20, 19, 19]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: replace(CPU, tasks=("sum",)), "tasks = ['sum'] is unknown: use some of parity"),
        (lambda: replace(CPU.parity, longest=0), "longest = 0: give at least 1"),
    ],
)
def test_bad_settings(change, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        change()
