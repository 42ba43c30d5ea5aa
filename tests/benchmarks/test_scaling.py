"""What the page about several devices counts and computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch.distributed as dist

from benchmarks import scaling
from relay_fast.batch.shares import deal


def test_one_message_with_every_gradient_in_fp32() -> None:
    before = dist.all_reduce
    found = scaling.messages("cpu-arithmetic", "looped_aligned")
    context = scaling.context_of("cpu-arithmetic")
    parameters = sum(p.numel() for p in context.new_model("looped").parameters())
    assert (found["parameters"], found["messages"]) == (parameters, 1)
    assert found["bytes"] == 4 * (parameters + 8)
    assert dist.all_reduce is before and not dist.is_initialized()


@pytest.mark.parametrize("stage", scaling.STAGES)
def test_costs_are_those_of_the_packed_batch(stage: str) -> None:
    context = scaling.context_of("paper")
    plan = scaling.stream_of(context, stage, 24)[0].batch.plan
    form = lambda own: scaling.Costs(own.kind)
    costs = scaling.stream_of(context, stage, 24, form)[0].batch
    assert sorted(costs) == sorted(plan.lengths * plan.loops)


def test_excess_of_the_slowest_share() -> None:
    costs = np.array([5, 1, 3, 3])
    assert scaling.share_excess(costs, deal(costs, 2)) == 0
    assert scaling.share_excess(costs, [np.array([0, 2]), np.array([1, 3])]) == pytest.approx(1 / 3)


def test_ring() -> None:
    link = scaling.INFINIBAND
    copies = 4e6 * 4 / scaling.CARDS[scaling.ARCH].bandwidth
    expected = 2 * 63 / 64 * 4e6 / link.bandwidth + 126 * link.latency + copies
    assert scaling.exchange_seconds(4_000_000, 64) == pytest.approx(expected)
    assert scaling.exchange_seconds(4_000_000, 1) == 0


def test_page(tmp_path) -> None:
    argv = ["--quick", "--no-timing", "--csv", str(tmp_path / "scaling.csv")]
    rows = scaling.main(argv)
    own = next(r for r in rows if r["what"] == "imbalance" and r["stage"] == "looped_aligned")
    assert own["by_cost_worst"] <= 0.03 < own["by_number_mean"]
    text = (tmp_path / "SCALING.md").read_text()
    assert "has never run on a GPU" in text and "None of it is measured" in text
