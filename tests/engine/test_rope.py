"""RoPE's tables: exact at every position, in fp64 where the block is."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.numerics import assert_close
from relay_fast import LoopedBlock
from relay_fast.engine import rope
from relay_fast.engine.rope import rope_table

POSITIONS = [0, 1, 1000, 123_457, 1_000_000, 2**31 - 1]


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2**-24), (torch.float64, 1e-6)], ids=str
)
def test_tables_are_those_of_exact_angles(dtype: torch.dtype, bound: float) -> None:
    """In fp64 an angle near 2³¹ itself is known to 2⁻²² only."""
    cos, sin = rope_table(torch.tensor(POSITIONS, dtype=torch.int32), 8, 10_000.0, dtype)
    assert cos.dtype == sin.dtype == dtype
    for row, position in enumerate(POSITIONS):
        for i in range(4):
            angle = position * 10_000.0 ** (-i / 4)
            assert abs(float(cos[row, i]) - math.cos(angle)) <= bound
            assert abs(float(sin[row, i]) - math.sin(angle)) <= bound


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-8), (torch.float32, 1e-5)], ids=str
)
def test_only_distances_matter(dtype: torch.dtype, bound: float) -> None:
    block = LoopedBlock(16, 2, 1, causal=True).to(dtype)
    with torch.no_grad():
        block.layers[0].qkv.weight.mul_(3)
        x = torch.randn(1, 9, 16, dtype=dtype)
        near = block(x, 2)
        for offset in (1000, 1_000_000):
            far = block(x, 2, positions=torch.arange(9) + offset)
            assert_close(f"offset {offset}", far, near, bound)
        assert (block(x, 2, positions=3 * torch.arange(9)) - near).abs().max() > 0.01


def test_frequencies_stay_where_a_graph_reads_them() -> None:
    """However many other blocks there are."""
    device, place = torch.device("cpu"), rope._on_device((1.0, 0.5), torch.device("cpu"))
    for k in range(40):
        rope._on_device((float(k), 0.5), device)
    assert rope._on_device((1.0, 0.5), device) is place
