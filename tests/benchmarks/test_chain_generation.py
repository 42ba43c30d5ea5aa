"""The benchmark of chain generation compares equal things and counts what it says it counts."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch

from benchmarks import chain_baselines, chain_generation
from benchmarks.baselines import EagerTransformer
from benchmarks.chain_generation import TASKS, Case
from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.decoding.autoregressive import decode
from relay_fast.models.transformers import AutoregressiveTransformer
from relay_fast.tasks import Samples
from relay_fast.tasks.vocabulary import EOS

CONFIG = ModelConfig(BlockConfig(16, 2, 2), 320)


def case(number: int = 6) -> Case:
    lengths = np.arange(number) % 4 + 1
    parts = [TASKS["arithmetic"].sample(lengths, 0), TASKS["lis"].sample(lengths * 5, 0)]
    problems = Samples.concat(parts)
    order = np.random.default_rng(0).permutation(len(problems))
    return Case("mixed", "mixed", problems.take(order))


def autoregressive_model() -> AutoregressiveTransformer:
    model = AutoregressiveTransformer(chain_generation.causal_of(CONFIG)).double().eval()
    with torch.no_grad():
        model.chain_head.weight[EOS] *= 1.6
    return model


def test_quick_run(tmp_path, monkeypatch, capsys):
    """Rows of all providers that are there; no transformers needed."""
    monkeypatch.setattr(chain_generation, "QUICK_LENGTHS", {"arithmetic": (1, 2)})
    longest = {"arithmetic": 2, "edit_distance": 1, "lis": 5}
    monkeypatch.setattr(chain_generation, "QUICK_LONGEST", longest)
    path = tmp_path / "rows.csv"
    argv = [
        "--quick",
        "--device",
        "cpu",
        "--csv",
        str(path),
        "--number",
        "3",
        "--mixed",
        "8",
        "--seconds",
        "0",
    ]
    providers = [name for name in chain_generation.PROVIDERS if name != "ar_hf"]
    chain_generation.main([*argv, "--providers", *providers])
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[: len(chain_generation.COLUMNS)] == list(chain_generation.COLUMNS)
    names = ["eager_padded", "relay_fast_torch", "ar_eager", "ar_relay_fast"]
    assert [row["provider"] for row in rows] == names * 3
    assert [row["length"] for row in rows[::4]] == ["1", "2", "mixed"]
    for row in rows:
        assert float(row["chains_per_s"]) > 0 and float(row["flops_per_chain"]) > 0
        assert int(row["peak_bytes"]) >= 0 and row["machine"] and row["commit"]
    printed = capsys.readouterr().out
    assert "left out: relay_fast_triton" in printed and "arithmetic 1: relay_fast_torch" in printed
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_the_plain_loop_writes_what_ours_writes():
    model, c = autoregressive_model(), case()
    limits = c.limits + np.arange(len(c.problems)) % 3
    eager = EagerTransformer(model.config).double().eval()
    eager.load_state_dict(model.state_dict(), strict=False)
    p = c.problems
    ours = decode(model, p.problem, p.problem_offsets, max_new=limits)
    written = chain_baselines.eager_decode(eager, p.problem, p.problem_offsets, limits)
    assert 0 < ours.ended.sum() < len(limits)
    for i, (a, b) in enumerate(zip(ours.offsets, ours.offsets[1:], strict=False)):
        assert ours.tokens[a:b].tolist() == written[i, : b - a].tolist()


def test_a_provider_that_writes_something_else_is_refused(monkeypatch):
    names = ["eager_padded", "relay_fast_torch"]
    chain_generation.check_equal(names, CONFIG, case(), "cpu")

    class Wrong(chain_baselines.EagerReader):
        def predict_rounds(self, batch):
            rounds, answers = super().predict_rounds(batch)
            return rounds, answers + 1

    monkeypatch.setattr(chain_baselines, "EagerReader", Wrong)
    with pytest.raises(RuntimeError, match="relay_fast_torch writes other tokens than eager"):
        chain_generation.check_equal(names, CONFIG, case(), "cpu")


def test_flops_by_hand():
    d, hidden, size, layers = 16, 64, 320, 2
    linear = 4 * d * d + 2 * d * hidden
    p = TASKS["arithmetic"].sample([2], 0)
    one = Case("arithmetic", "2", p)
    n = int(p.problem_offsets[-1])
    looped = 2 * (layers * (2 * n * linear + 2 * 2 * n * n * d) + d * size * (2 * n + 1))
    assert chain_generation.looped_flops(CONFIG, one) == looped
    new = len(p.rounds) + 1
    assert one.limits.tolist() == [new]
    read = n + new - 1
    causal = 2 * (layers * (read * linear + 2 * d * read * (read + 1) / 2) + d * size * new)
    assert chain_generation.autoregressive_flops(CONFIG, one) == causal


def test_peak_memory_sees_what_is_there_for_a_moment():
    with chain_generation.PeakMemory("cpu") as memory:
        x = torch.ones(1 << 24)
        float(x.sum() + x.sum())
        del x
    assert 60e6 < memory.bytes < 100e6
