"""The predicted step: sums that can be checked by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks.card.step_prediction import (
    LAUNCH,
    NODE,
    REACHED,
    REACHED_BY_MORE,
    Group,
    Step,
    adamw,
    again_from_l2,
    expected_seconds,
    page,
    resident,
)


def test_programs_that_a_processor_holds() -> None:
    """sm_90: 65,536 registers, 228 KB of shared memory, 2,048 threads."""
    assert resident(255, 0, 8) == 1  # 256 · 256 registers
    assert resident(128, 0, 8) == 2
    assert resident(32, 100 << 10, 4) == 2  # 101 KB each
    assert resident(32, 0, 4) == 16  # 128 threads each: by registers and by threads
    assert resident(16, 0, 1) == 32
    assert resident(255, 300 << 10, 32) == 1


def test_waves_and_the_share_of_the_ceiling() -> None:
    # 132 processors with one program each, then a second wave that is almost empty.
    assert expected_seconds(1.0, 0.0, 132, 1) == pytest.approx(1 / REACHED[1])
    assert expected_seconds(1.0, 0.0, 133, 1) == pytest.approx(264 / 133 / REACHED[1])
    assert expected_seconds(1.0, 0.0, 133, 2) == pytest.approx(264 / 133 / REACHED[2])
    assert expected_seconds(1.0, 0.0, 66, 4) == pytest.approx(2 / REACHED[1])
    assert expected_seconds(1.0, 0.0, 132 * 4, 4) == pytest.approx(1 / REACHED_BY_MORE)
    assert expected_seconds(1.0, 5.0, 132, 1) == pytest.approx(5.0)  # L2 binds


def test_what_is_read_again() -> None:
    new = lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device="meta")
    up = {"up_weight_ptr": new(32, 8), "norm_weight_ptr": new(8), "x_ptr": new(100, 8)}
    up["down_weight_ptr"] = new(8, 32)
    up["dnorm_weight_ptr"] = new(7, 8)  # written, not read
    # Seven blocks of 16 rows read the weight; the first read is not again.
    assert again_from_l2("_mlp_fwd_kernel", up | {"M": 100, "BLOCK_M": 16}) == 6 * 2 * 2 * 32 * 8
    rows = {"a_ptr": new(100, 4), "weight_ptr": new(8, 4), "M": 100, "BLOCK_M": 64}
    found = again_from_l2("_linear_residual_fwd_kernel", rows | {"column_blocks": 3})
    assert found == 2 * 8 * 4 + 2 * 2 * 100 * 4
    grad = {"dy_ptr": new(100, 32), "x_ptr": new(100, 8), "M": 100, "N": 32, "D": 8}
    found = again_from_l2("_weight_grad_kernel", grad | {"BLOCK_N": 16, "BLOCK_D": 8})
    assert found == 2 * 100 * 8
    more = grad | {"M1": 50, "BLOCK_N": 16, "BLOCK_D": 8}  # a second pair of operands
    assert again_from_l2("_weight_grad_kernel", more) == 2 * 150 * 8
    assert again_from_l2("_weight_grad_sum_kernel", {"acc_ptr": new(4, 4)}) == 0


def test_a_step_is_the_sum_of_its_launches() -> None:
    step = Step({"a": Group(3, 1e-3, 2e-3), "b": Group(7, 4e-3, 5e-3)})
    assert step.whole == Group(10, pytest.approx(5e-3), pytest.approx(7e-3))
    assert step.graphed == pytest.approx((5e-3 + 10 * NODE[0], 7e-3 + 10 * NODE[1]))
    assert step.eager == pytest.approx((5e-3, 7e-3))  # the launches hide behind the work
    assert Step({"a": Group(1000, 1e-3, 2e-3)}).eager == pytest.approx(
        (1000 * LAUNCH[0], 1000 * LAUNCH[1])
    )
    text = page(step, 8, "none")
    assert "| all | 10 | 5 | 7 | 0.015 |" in text and "10 nodes, 5.01 ms (floor)" in text


def test_adamw_moves_every_parameter_seven_times() -> None:
    group = adamw([torch.empty(43, 1000)] * 37)
    assert group.nodes == 2
    assert group.floor == pytest.approx(37 * 43_000 * 28 / 4.3e12)
