"""The table of launch configurations: which line a call gets, and the search around a line."""

from __future__ import annotations

import math

import pytest
import torch

from relay_fast.kernels import autotune, tuning
from relay_fast.kernels._runtime import DEVICE_PROPS, Config, DeviceProps
from relay_fast.kernels.tuning import ANY, Rule, pick
from relay_fast.ops import dispatch
from relay_fast.ops.dispatch import select

CPU = torch.device("cpu")
OPS = dict.fromkeys(rule.op for rule in tuning.TABLE)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture
def unlearned():
    """Leaves the table as it was."""
    yield
    tuning._learned.clear()
    tuning._rule.cache_clear()


def assumed(monkeypatch, arch: int) -> None:
    monkeypatch.setattr(tuning, "device_props", lambda device: DEVICE_PROPS[arch])


@pytest.mark.parametrize("arch", sorted(DEVICE_PROPS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("op", OPS)
def test_every_call_finds_a_line(monkeypatch, arch: int, dtype: torch.dtype, op: str) -> None:
    assumed(monkeypatch, arch)
    widths = (8, 64, 65, 128, 256, 512, 1024)
    if "short" in op or "narrow" in op:
        widths = (16, 32, 64, 128)
    elif "wide" in op:
        widths = () if dtype == torch.float32 else (16, 32, 64, 128)
    elif "loop" in op:
        widths = (1, 32) if dtype == torch.float32 else (1, 32, 64, 128)
    small = DEVICE_PROPS[arch].shared_bytes == 99 << 10
    for width in widths:
        for rows in (0, 700, 24_000):
            if op == "attention_wide_bwd" and width > 64 and small:
                assert tuning.pick_or_none(op, dtype, width, rows, CPU) is None  # the long kernels
                continue
            config = pick(op, dtype, width, rows, CPU)
            for size in (config.block_m, config.block_n):
                assert size == 0 or (size >= 16 and size & (size - 1) == 0)
            assert config.num_warps in (4, 8)


def test_no_line_is_hidden_by_one_before_it() -> None:
    assert len(tuning.TABLE) > len(OPS) > 5
    for i, later in enumerate(tuning.TABLE):
        for earlier in tuning.TABLE[:i]:
            hides = (
                earlier[:2] == later[:2]
                and earlier.widest >= later.widest
                and earlier.rows in ("any", later.rows)
                and earlier.arch <= later.arch
                and earlier.until >= later.until
                and earlier.shared <= later.shared
            )
            assert not hides, (earlier, later)


def test_the_first_line_that_fits_is_taken(monkeypatch) -> None:
    assumed(monkeypatch, 90)
    # 132 processors: 128 · 131 + 1 rows make 132 blocks.
    for rows, block in ((128 * 131, 64), (128 * 131 + 1, 128)):
        assert pick("norm_linear_fwd", torch.bfloat16, 256, rows, CPU).block_m == block
    for rows, block in ((128 * 65, 64), (128 * 65 + 1, 128)):
        assert pick("linear_residual", torch.bfloat16, 256, rows, CPU).block_m == block
    assert pick("readout", torch.float16, 257, 0, CPU) == Config(32, 32, 8, 2)
    assert pick("mlp_up_gated", torch.float16, 512, 0, CPU).block_m == 64
    assumed(monkeypatch, 86)
    assert pick("norm_linear_fwd", torch.float32, 256, 0, CPU) == Config(16, 16, 8, 1)
    assumed(monkeypatch, 90)
    assert pick("norm_linear_fwd", torch.float32, 256, 0, CPU) == Config(32, 16, 4, 1)


def test_only_what_fits_the_devices_own_shared_memory_is_taken(monkeypatch) -> None:
    """The architecture does not decide: a device of 99 KB gets small tiles whatever it is."""

    def picked(arch: int, kilobytes: int, op: str, width: int) -> Config:
        props = DeviceProps(arch, 80, kilobytes << 10)
        monkeypatch.setattr(tuning, "device_props", lambda device: props)
        return pick(op, torch.bfloat16, width, 128 * 80, CPU)

    for arch in (80, 86, 90, 120):
        for op, width, least, wide, narrow in (
            ("norm_linear_fwd", 256, 104, Config(128, 32, 8, 2), Config(128, 16, 8, 2)),
            ("mlp_up", 512, 100, Config(64, 32, 8, 2), Config(64, 16, 8, 2)),
            ("mlp_up_gated", 512, 132, Config(64, 32, 8, 2), Config(64, 16, 8, 2)),
        ):
            assert picked(arch, least, op, width) == wide
            assert picked(arch, least - 1, op, width) == narrow
            assert picked(arch, 99, op, width) == narrow
    with pytest.raises(KeyError, match="mlp_up for 16 bits, width 512, sm_86 with 64 KB"):
        picked(86, 64, "mlp_up", 512)


def test_a_line_found_by_a_search_is_for_cards_with_as_much_shared_memory() -> None:
    rule = next(r for r in tuning.TABLE if r.op == "mlp_up")
    best = Config(128, 32, 8, 2)
    found = autotune.better(rule, {rule.config: 1.0, best: 0.5}, 80, "")
    assert found.config == best and found.shared == 163 and found.arch == 80


def test_a_call_that_no_line_serves_is_named() -> None:
    with pytest.raises(KeyError, match="attention_short_fwd for 16 bits, width 256, sm_90"):
        pick("attention_short_fwd", torch.bfloat16, 256, 24_000, CPU)


def test_candidates_are_few_and_the_lines_own_comes_first() -> None:
    for rule in tuning.TABLE:
        found = tuning.candidates(rule)
        assert found[0] == rule.config and 1 < len(found) <= 20
        assert len(set(found)) == len(found)
        for c in found:
            assert {c.num_warps, c.num_stages} <= {1, 2, 3, 4, 8}
            assert c.block_m == 0 or 16 <= c.block_m <= 256


def linear_residual():
    ops = select("triton", "cpu")
    a, weight, residual = torch.randn(40, 32), torch.randn(48, 32), torch.randn(40, 48)
    return lambda: ops.linear_residual_fwd(a, weight, None, residual)


def test_kernels_take_what_is_tried_and_say_what_they_took() -> None:
    call = linear_residual()
    with tuning.watching() as own:
        expected = call()
    ((rule, config),) = own.items()
    assert rule.op == "linear_residual" and rule.bits == 32 and config == rule.config
    other = Config(16, 64, 4, 1)
    with tuning.trying("linear_residual", other), tuning.watching() as seen:
        torch.testing.assert_close(call(), expected)
    assert seen == {rule: other}
    with tuning.watching() as again:
        call()
    assert again == own


def test_the_search_finds_the_quickest_and_passes_over_what_does_not_fit() -> None:
    call, quickest = linear_residual(), Config(64, 32, 4, 2)

    def seconds(_) -> float:
        config = tuning._trying["linear_residual"]
        if config.num_stages == 4:
            raise RuntimeError("out of resource: shared memory")
        return 0.5 if config == quickest else 1.0

    ((rule, times),) = autotune.search(call, seconds).items()
    assert min(times, key=times.get) == quickest
    assert {c.num_stages for c, t in times.items() if t == math.inf} == {4}
    better = autotune.better(rule, times, 90, "here.py")
    assert better.config == quickest and better.arch == 90 and better.measured.endswith("here.py")
    assert autotune.better(rule, {c: 1.0 for c in times}, 90, "") is None
    assert autotune.better(rule, {rule.config: 1.0, quickest: 0.99}, 90, "") is None


def test_a_tuned_op_prints_a_line_that_is_one(monkeypatch, capsys, unlearned) -> None:
    quickest = Config(16, 32, 4, 2)
    timed = lambda call: 0.5 if tuning._trying["weight_grad"] == quickest else 1.0
    monkeypatch.setattr(autotune, "_median", timed)
    tuned = autotune.autotuned(select("triton", "cpu").weight_grad, "cpu")
    acc, dy, x = torch.zeros(16, 16), torch.randn(9, 16), torch.randn(9, 16)
    tuned(acc, dy, x)
    torch.testing.assert_close(acc, dy.t() @ x)  # the search added to copies only
    printed = capsys.readouterr().out.strip()
    (rule,) = eval(f"[{printed}]", {"Rule": Rule, "Config": Config, "ANY": ANY})
    assert rule.config == quickest and rule.op == "weight_grad"
    assert pick("weight_grad", torch.float32, 16, 0, CPU) == quickest
    tuned(acc, dy, x)
    assert capsys.readouterr().out == ""  # searched once


def test_ops_search_only_where_asked_for_and_on_a_gpu(monkeypatch, capsys) -> None:
    launcher = dispatch._triton_ops.__wrapped__().weight_grad.__wrapped__  # inside of its guard
    assert not hasattr(launcher, "__wrapped__")
    monkeypatch.setenv("RELAY_FAST_AUTOTUNE", "1")
    monkeypatch.setattr(autotune, "_median", lambda call: pytest.fail("searched on a CPU"))
    ops = dispatch._triton_ops.__wrapped__()
    assert ops.weight_grad.__wrapped__.__wrapped__ is launcher
    ops.weight_grad(torch.zeros(16, 16), torch.randn(9, 16), torch.randn(9, 16))
