"""A chain of thought as gradient descent: the layer, the construction, what training finds."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from relay_fast.recipes import cot_gd
from relay_fast.recipes._regression import descend, draw_prompts, one_step_error
from relay_fast.recipes._thoughts import ThoughtLayer
from relay_fast.recipes.cot_gd import PRESETS, Settings
from relay_fast.relay.run_folder import RunFolder
from relay_fast.reporting.progress import Display

CPU = PRESETS["cpu"]


@pytest.fixture(scope="module")
def random_start(tmp_path_factory):
    return run(tmp_path_factory.mktemp("cot"), 800, loops=(), prompts=1000)


def run(folder, steps: int, lr: float = CPU.training.lr, **options) -> dict:
    settings = replace(CPU, training=replace(CPU.training, steps=steps, lr=lr), **options)
    with Display() as display:
        results = cot_gd.run(settings, RunFolder(folder, {}), seed=0, device="cpu", display=display)
    header, lines = cot_gd.rows(results)
    assert all(len(line) == len(header) for line in lines)
    assert cot_gd.plot(results, folder / "plot.png").stat().st_size > 10_000
    return results


def prompts(count: int, n: int = 12, d: int = 4):
    return map(torch.from_numpy, draw_prompts(np.random.default_rng(0), count, n, d))


# The layer


def test_the_layer_is_the_papers_on_points() -> None:
    """f(Z) = Z + V Z (Zᵀ W Z) / n on columns, its last column appended again and again."""
    n, d = 6, 3
    layer = ThoughtLayer(d, std=0.3)
    x, w = torch.randn(n, d, dtype=torch.float64), torch.randn(d, dtype=torch.float64)
    z = torch.zeros(2 * d + 2, n + 1, dtype=torch.float64)
    z[:d, :n], z[d, :n], z[-1, n] = x.T, x @ w, 1
    rows = torch.cat([x, (x @ w)[:, None]], 1)
    s = (rows.T @ rows / n)[None]
    written = layer.roll_out(s, 3, n)
    for step in range(4):
        torch.testing.assert_close(written[0, step], z[d + 1 : -1, n + step])
        z = torch.cat([z, (z + layer.v @ z @ (z.T @ layer.w @ z) / n).detach()[:, -1:]], 1)


def test_teacher_forcing_sees_the_thoughts_before() -> None:
    layer, n = ThoughtLayer(4, std=0.2), 12
    s, w = prompts(2)
    thoughts = torch.randn(2, 5, 4, dtype=torch.float64)
    whole = layer.think(s, thoughts, n)
    torch.testing.assert_close(whole[:, :3], layer.think(s, thoughts[:, :3], n))
    changed = thoughts.clone()
    changed[:, 0] += 1
    assert (layer.think(s, changed, n)[:, 4] - whole[:, 4]).abs().max() > 1e-3


def test_the_construction_is_gradient_descent() -> None:
    layer = ThoughtLayer.gradient_descent(4, 0.3)
    s, w = prompts(3)
    expected = descend(s, 0.3, 6)
    torch.testing.assert_close(layer.roll_out(s, 6, 12), expected)
    columns = layer.think(s, expected[:, :-1], 12)
    torch.testing.assert_close(columns, layer.columns(expected[:, 1:]))  # zeros and the one as well
    torch.testing.assert_close(layer.loop(s, torch.zeros_like(w), 6), expected[:, 1:])
    torch.testing.assert_close(layer.step_matrix(), -0.3 * torch.eye(4, dtype=torch.float64))


def test_the_theory_start_is_sparse_with_one_eigenbasis() -> None:
    layer = ThoughtLayer(4, "theory")
    v, w = layer.v[5:-1, :4].detach(), layer.w[:4, 5:-1].detach()
    torch.testing.assert_close(v @ w, w @ v)
    assert torch.linalg.eigvalsh(v).max() <= 0 <= torch.linalg.eigvalsh(w).min()
    assert (layer.v != 0).sum() == 16 and (layer.w != 0).sum() == 17


# Trained


def test_the_rollout_equals_gradient_descent_five_chains_long(random_start) -> None:
    for part in ("chain", "other_covariance"):
        found, truth = random_start[part]["rollout"], random_start[part]["gradient_descent"]
        assert len(found) == 101  # 5 · 20 steps and the start
        assert found == pytest.approx(truth, rel=5e-4)
        assert truth[100] < truth[20] < truth[1]
    assert random_start["step_error"] < 1e-3


def test_without_a_chain_one_step_is_the_best(random_start) -> None:
    assert random_start["answers"]["1"] == pytest.approx(one_step_error(20, 10), rel=0.01)


def test_theorys_start_and_the_looped_layer(tmp_path) -> None:
    results = run(tmp_path, 400, 0.02, loops=(2,), start="theory", prompts=500)
    found, truth = results["chain"]["rollout"], results["chain"]["gradient_descent"]
    assert found == pytest.approx(truth, rel=5e-4)
    assert results["answers"]["2"] < 0.6 * one_step_error(20, 10)  # two loops, no chain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "zero"}, "start = 'zero' is unknown: use one of random, theory"),
        ({"thoughts": 0}, "thoughts = 0: give at least 1"),
        ({"dimension": 2, "other_deviations": (1.0,)}, "give 2 positive numbers, or none"),
    ],
)
def test_bad_settings(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(CPU.training, **options)
