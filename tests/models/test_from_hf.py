"""The order in which a block's heads hold the columns of other heads; without transformers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.numerics import assert_close
from relay_fast.config import BlockConfig
from relay_fast.engine.rope import block_rope_table
from relay_fast.kernels.norm_linear_ref import rotate_ref
from relay_fast.models.from_hf import rotary_order
from relay_fast.models.looped_block import LoopedBlock


def half_split(x: Tensor, angle: Tensor) -> Tensor:
    """As in GPT-NeoX: the first columns of a head, j with j + rotary_dim / 2."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def interleaved(x: Tensor, angle: Tensor) -> Tensor:
    """As in GPT-J: 2j with 2j + 1, as a product of complex numbers."""
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(angle * 0 + 1, angle)
    return torch.view_as_real(turned).flatten(-2)


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(8, 8), (12, 6), (10, 2)])
@pytest.mark.parametrize("turn", [half_split, interleaved])
def test_scores_are_those_of_the_other_code(turn, head_dim: int, rotary_dim: int) -> None:
    config = BlockConfig(head_dim, 1, 1, rotary_share=rotary_dim / head_dim)
    positions = torch.arange(5)
    cos, sin = block_rope_table(config, positions, torch.float64)
    order = rotary_order(head_dim, rotary_dim, turn is interleaved)
    assert sorted(order) == list(range(head_dim))
    q, k = torch.randn(2, 5, head_dim, dtype=torch.float64)
    steps = torch.arange(rotary_dim // 2, dtype=torch.float64)
    angle = positions[:, None] * 10_000.0 ** (-2 * steps / rotary_dim)
    theirs = [torch.cat((turn(x[:, :rotary_dim], angle), x[:, rotary_dim:]), dim=1) for x in (q, k)]
    ours = [rotate_ref(x[:, order].clone(), cos, sin, head_dim) for x in (q, k)]
    assert_close("scores", ours[0] @ ours[1].T, theirs[0] @ theirs[1].T)


def test_orders_by_hand() -> None:
    assert rotary_order(6, 6, False) == [0, 1, 2, 3, 4, 5]
    assert rotary_order(6, 6, True) == [0, 2, 4, 1, 3, 5]
    assert rotary_order(8, 4, False) == [0, 1, 4, 5, 2, 3, 6, 7]
    assert rotary_order(8, 4, True) == [0, 2, 4, 5, 1, 3, 6, 7]


def test_other_modules_are_refused() -> None:
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.self_attn = nn.Linear(4, 4)

    with pytest.raises(ValueError, match="Layer cannot become a layer of a block: its class is no"):
        LoopedBlock.from_hf([Layer()])
