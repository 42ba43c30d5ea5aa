"""The benchmarks run, compare equal things, and count what they say they count."""

import csv

import numpy as np
import pytest
import torch

from benchmarks import common, loop_throughput, measuring, memory_vs_loops, recipe_ablation
from benchmarks.baselines import buckets
from relay_fast.config import BlockConfig, ModelConfig


def read(path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_throughput_appends_rows(tmp_path) -> None:
    path = tmp_path / "rows.csv"
    argv = ["--config", "tiny", "--device", "cpu", "--quick", "--batch", "2", "--mix", "arithmetic"]
    argv += ["--policies", "none", "state", "--seconds", "0", "--csv", str(path)]
    loop_throughput.main(argv)
    loop_throughput.main([*argv, "--providers", "relay_fast"])
    rows = read(path)
    assert [row["provider"] for row in rows[:3]] == list(common.PROVIDERS[:3])
    assert [row["policy"] for row in rows[3:]] == ["none", "state"] * 2
    assert list(rows[0])[: len(common.COLUMNS)] == list(common.COLUMNS)
    for row in rows:
        assert float(row["samples_per_s"]) > 0 and 0 < float(row["peak_share"]) < 1
        assert row["machine"] and row["versions"] and row["commit"]


def test_memory_grows_as_it_should(tmp_path) -> None:
    argv = ["--config", "tiny", "--device", "cpu", "--quick", "--batch", "2"]
    rows = memory_vs_loops.main([*argv, "--loops", "1", "30", "--csv", str(tmp_path / "m.csv")])
    assert (tmp_path / "m.png").stat().st_size > 10_000
    saved = {(r["provider"], r["policy"], r["loops"]): r["saved_bytes"] for r in rows}
    state = 2 * memory_vs_loops.TOKENS * 64 * 4
    growth = saved["relay_fast", "state", 30] - saved["relay_fast", "state", 1]
    assert 29 * state <= growth < 30 * state
    assert saved["eager_padded", "", 30] > 35 * saved["relay_fast", "state", 30]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_memory_counts_what_is_alive(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    n = 1 << 18

    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(torch.empty(3 * n, device=device))
            torch.empty(5 * n, device=device)  # gone before forward ends
            return x.sum()

        @staticmethod
        def backward(ctx, g):
            torch.empty(4 * n, device=device)
            return g.expand(n)

    model = torch.nn.Linear(1, 1, device=device)
    x = torch.zeros(n, device=device, requires_grad=True)
    provider = common.Provider(
        "", "", model, lambda _: Keeps.apply(x), [None], torch.float32, device
    )
    _, _, memory = measuring.measured_step(provider)
    assert 3 * n * 4 <= memory.saved < 3.1 * n * 4
    assert 8 * n * 4 <= memory.peak < 8.1 * n * 4


def test_a_provider_that_computes_something_else_is_refused() -> None:
    batch, group = common.task_batch("arithmetic", 2, 0, "cpu")
    config = ModelConfig(BlockConfig(16, 2, 1), 320)
    providers = common.make_providers(
        ["eager_bucketed", "relay_fast"], ["state"], config, batch, group, torch.float32, "cpu"
    )
    with torch.no_grad():
        providers[1].model.norm.weight[3] += 0.1
    with pytest.raises(RuntimeError, match="relay_fast state computes something else"):
        measuring.measure(providers, {}, config, batch, 0, 1.0)


def test_useful_flops_by_hand() -> None:
    config = ModelConfig(BlockConfig(8, 2, 1), 10)
    batch = common.synthetic_batch(np.array([3, 2]), np.array([1, 4]), 1, 10)
    linear = 8 * 24 + 8 * 8 + 2 * 8 * 32
    pairs = 9 * 1 + 4 * 4
    readout = 8 * 10 * (5 + 2)  # a supervised row an iteration, and two answers
    forward = 2 * (linear * 11 + 2 * 8 * pairs + readout)
    assert common.useful_flops(config, batch) == 3 * forward


def test_buckets_keep_groups_apart_and_lose_nobody() -> None:
    batch, group = common.task_batch("multitask", 50, 0, "cpu")
    cost = []
    for at_most in (1, 3, 8):
        cut = buckets(batch, group, at_most)
        assert sorted(np.concatenate(cut).tolist()) == list(range(50))
        assert all(len(set(group[b])) == 1 for b in cut)
        assert len(cut) <= 3 * at_most
        plan = batch.plan
        cost.append(sum(len(b) * plan.lengths[b].max() * plan.loops[b].max() for b in cut))
    assert cost[0] > cost[1] > cost[2] >= plan.token_iterations


def test_the_mix_is_the_papers() -> None:
    # About 600 token-iterations a sample against 3,030 padded.
    batch, _ = common.task_batch("multitask", 2000, 0, "cpu")
    assert 560 < batch.plan.token_iterations / 2000 < 640


def test_recipe_ablation(tmp_path) -> None:
    csv = tmp_path / "rows.csv"
    arguments = ["--work", "3e3", "--problems", "4", "--only", "base", "no_loop_norm"]
    rows = recipe_ablation.main([*arguments, "--csv", str(csv)])
    assert [row["change"] for row in rows] == ["base", "no_loop_norm"]
    assert all(row["longest_true_problem"] <= 10 for row in rows)
    assert len(csv.read_text().splitlines()) == 3
    assert csv.with_suffix(".png").stat().st_size > 1000
    more = recipe_ablation.main([*arguments, "adamw", "--csv", str(csv)])
    assert [row["change"] for row in more] == ["adamw"]  # the others are held already
    assert len(csv.read_text().splitlines()) == 4


def test_rows_of_other_columns_go_to_a_file_of_their_own(tmp_path, capsys) -> None:
    path = tmp_path / "rows.csv"
    common.append_rows(path, [{"a": 1}])
    common.append_rows(path, [{"a": 2}])
    assert path.read_text().split() == ["a", "1", "2"]
    common.append_rows(path, [{"a": 3, "b": 4}])
    (other,) = set(tmp_path.iterdir()) - {path}
    assert other.read_text().split() == ["a,b", "3,4"]
    assert f"these rows go to {other}" in capsys.readouterr().out
