"""Linear looped transformer: the data's distribution, the closed forms, what more loops do."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from relay_fast.recipes import linear_loop
from relay_fast.recipes._regression import (
    descend,
    draw_covariances,
    draw_prompts,
    one_step_error,
    one_step_rate,
)
from relay_fast.recipes.linear_loop import FORMS, PRESETS, LinearLooped, Settings, errors
from relay_fast.relay.run_folder import RunFolder
from relay_fast.reporting.progress import Display

D = 10


def run(tmp_path, steps: int = 1000, **options) -> list[dict]:
    training = replace(PRESETS["cpu"].training, steps=steps)
    settings = Settings(training, **{"loops": (1,)} | options)
    with Display() as display:
        results = linear_loop.run(
            settings, RunFolder(tmp_path, {}), seed=0, device="cpu", display=display
        )
    header, lines = linear_loop.rows(results)
    assert all(len(line) == len(header) for line in lines)
    assert linear_loop.plot(results, tmp_path / "plot.png").stat().st_size > 10_000
    return results["models"]


# The data


@pytest.mark.parametrize("n", [3, 5, 20])  # fewer points than dimensions, as many, more
def test_covariances_have_the_moments_of_gaussian_points(n) -> None:
    d, count = 5, 40_000
    s = draw_covariances(np.random.default_rng(0), count, n, d)
    assert np.abs(s.mean(0) - np.eye(d)).max() < 0.02
    second = (s @ s).mean(0)  # E[S²] = (n + d + 1) / n · I
    assert np.abs(second / ((n + d + 1) / n) - np.eye(d)).max() < 0.05
    assert np.linalg.matrix_rank(s[:100]).max() == min(n, d)


def test_prompts_are_moments_of_points_and_labels() -> None:
    deviations = (1.0, 0.5, 2.0)
    s, w = draw_prompts(np.random.default_rng(0), 50_000, 8, 3, deviations)
    np.testing.assert_allclose(s, s.mT)
    np.testing.assert_allclose(s[:, 3, :3], np.einsum("bij,bj->bi", s[:, :3, :3], w))
    np.testing.assert_allclose(s[:, 3, 3], np.einsum("bi,bi->b", s[:, 3, :3], w))
    np.testing.assert_allclose(w.std(0) * deviations, 1, atol=0.02)
    np.testing.assert_allclose(s[:, range(3), range(3)].mean(0), np.square(deviations), rtol=0.02)


def test_bad_deviations() -> None:
    with pytest.raises(ValueError, match=r"deviations = \(1.0, 2.0\): give 3 positive numbers"):
        draw_prompts(np.random.default_rng(0), 1, 8, 3, (1.0, 2.0))


# The model


def test_without_u_it_is_gradient_descent() -> None:
    model = LinearLooped(D, "restricted")
    model.a.data, model.u.data = 0.7 * torch.eye(D).double(), torch.zeros(D).double()
    s, _ = map(torch.from_numpy, draw_prompts(np.random.default_rng(0), 5, 30, D))
    expected = descend(s, 0.7, 4)
    assert not expected[:, 0].any()
    for t, weights in enumerate(model.weights(s, 4)):
        torch.testing.assert_close(weights, expected[:, t + 1])


def test_predictions_are_linear_in_the_query() -> None:
    """The papers' own form on points: the loss may integrate the query out."""
    torch.manual_seed(0)
    model, n, loops = LinearLooped(D, "general", std=0.3), 12, 3
    x, w = torch.randn(n + 1, D, dtype=torch.float64), torch.randn(D, dtype=torch.float64)
    y = x @ w
    y[n] = 0
    z = torch.cat([x, y[:, None]], 1).mT  # columns are tokens, the last one is the query
    mask = torch.diag(torch.tensor([1.0] * n + [0.0], dtype=torch.float64))
    p, q = model.matrices()
    for _ in range(loops):
        z = z - p @ z @ mask @ (z.mT @ q @ z) / n
    xy = torch.cat([x[:n], y[:n, None]], 1)
    weights = model.weights((xy.mT @ xy / n)[None], loops)[-1][0]
    torch.testing.assert_close(-z[D, n], weights @ x[n])
    gap = (weights - w).detach()
    error = errors(weights[None], w[None], 2 * torch.ones(D, dtype=torch.float64)).detach()
    torch.testing.assert_close(error, 4 * (gap @ gap)[None])


# Trained


@pytest.mark.parametrize("form", FORMS)
def test_one_loop_finds_the_closed_forms(form, tmp_path) -> None:
    examples = (20, 100) if form == "restricted" else (20,)
    for m in run(tmp_path, examples=examples, forms=(form,), test_loops=(1,)):
        n = m["n"]
        assert m["step"] == pytest.approx(one_step_rate(n, D), rel=0.005)
        assert m["loss"] == pytest.approx(one_step_error(n, D), rel=0.005)
        assert m["step_spread"] < 0.02


def test_the_step_adapts_to_the_covariance(tmp_path) -> None:
    deviations = (1.0, 1.0, 0.5, 0.7, 1.0)
    (m,) = run(
        tmp_path,
        examples=(20,),
        dimension=5,
        deviations=deviations,
        forms=("restricted",),
        test_loops=(1,),
    )
    assert m["step"] == pytest.approx(one_step_rate(20, 5), rel=0.005)
    assert m["loss"] == pytest.approx(one_step_error(20, 5), rel=0.005)
    assert m["step_spread"] < 0.03  # A Σ is a multiple of the identity


def test_more_loops_help_with_many_examples_and_diverge_with_few(tmp_path) -> None:
    few, many = run(
        tmp_path, 400, examples=(20, 100), loops=(2,), forms=("restricted",), prompts=20_000
    )
    assert few["edge"] == pytest.approx(few["step"] * (1 + 0.5**0.5) ** 2)
    assert many["edge"] < 1.6
    losses = list(many["loss_by_loops"].values())
    assert losses == sorted(losses, reverse=True) and losses[-1] < 1e-4
    assert few["loss_by_loops"]["20"] > 100 > few["loss_by_loops"]["1"]
    assert few["loss"] < one_step_error(20, D) and many["loss"] < one_step_error(100, D)


def test_bad_settings() -> None:
    for options, message in [
        ({"forms": ("full",)}, r"forms = \['full'\] is unknown: use some of restricted, general"),
        ({"examples": (0,)}, r"examples = \[0\]: give at least 1"),
        ({"deviations": (1.0,)}, r"deviations = \(1.0,\): give 10 positive numbers, or none"),
        ({"loops": ()}, r"loops = \[\]: give at least one number"),
    ]:
        with pytest.raises(ValueError, match=message):
            Settings(PRESETS["cpu"].training, **options)
