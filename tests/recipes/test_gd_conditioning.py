"""Error against e^(−T/κ): the loop's errors are gradient descent's, and the bound holds always."""

import numpy as np
import pytest
import torch

from relay_fast.recipes import gd_conditioning
from relay_fast.recipes._regression import draw_prompts
from relay_fast.recipes._thoughts import ThoughtLayer
from relay_fast.recipes.gd_conditioning import PRESETS, Settings
from relay_fast.relay.run_folder import RunFolder
from relay_fast.reporting.progress import Display


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("gd")
    with Display() as display:
        results = gd_conditioning.run(
            PRESETS["cpu"], RunFolder(folder, {}), seed=0, device="cpu", display=display
        )
    header, lines = gd_conditioning.rows(results)
    assert all(len(line) == len(header) for line in lines)
    assert gd_conditioning.plot(results, folder / "plot.png").stat().st_size > 10_000
    return results


def test_the_bound_holds_in_every_draw(results) -> None:
    assert [r["held"] for r in results["ratios"]] == [1.0] * 6


def test_more_points_condition_better(results) -> None:
    kappas = [r["kappa"] for r in results["ratios"]]
    last = [r["error"][99] for r in results["ratios"]]
    assert kappas == sorted(kappas, reverse=True) and last == sorted(last, reverse=True)
    # Medians of an independent program, with other random numbers.
    assert kappas == pytest.approx([180, 51, 21, 6.8, 3.7, 2.5], rel=0.1)
    tenth = [r["error"][9] for r in results["ratios"]]
    assert tenth == pytest.approx([0.40, 0.31, 0.21, 0.057, 0.011, 0.0014], rel=0.1)
    assert last[5] < 1e-22  # far below the rounding of weights: errors keep their precision


def test_errors_are_those_of_weights_from_zero() -> None:
    """Label 0 and a start of e_0 is the problem w* = −e_0 started from 0, moved."""
    d, n = 5, 15
    s, w = map(torch.from_numpy, draw_prompts(np.random.default_rng(0), 4, n, d))
    layer = ThoughtLayer.gradient_descent(d, 0.3)
    weights = layer.loop(s, torch.zeros_like(w), 8)
    quiet = torch.nn.functional.pad(s[:, :d, :d], (0, 1, 0, 1))
    torch.testing.assert_close(layer.loop(quiet, -w, 8), weights - w[:, None])
    step = torch.eye(d, dtype=torch.float64) - 0.3 * s[:, :d, :d]
    power = torch.linalg.matrix_power(step, 8) @ -w[:, :, None]
    torch.testing.assert_close(power[:, :, 0], weights[:, -1] - w)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": (2.0, 0.5)}, "n/d = 0.5: XᵀX of fewer points than dimensions is singular"),
        ({"shown": (101,)}, "give steps up to loops = 100"),
        ({"draws": 0}, "draws = 0: give at least 1"),
    ],
)
def test_bad_settings(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**options)
