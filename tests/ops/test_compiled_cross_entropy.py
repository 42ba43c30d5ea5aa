"""The row cross-entropy under torch.compile, with both implementations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from relay_fast.functional import row_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def inputs(bias: bool = False) -> list[Tensor | None]:
    """states, norm weight, norm bias, head."""
    torch.manual_seed(0)
    shapes = ((9, 16), (16,), (16,), (7, 16))
    made = [torch.randn(s, device=DEVICE).requires_grad_() for s in shapes]
    return made if bias else [made[0], made[1], None, made[3]]


ROWS, TARGETS = torch.tensor([8, 0, 3], device=DEVICE), torch.tensor([6, -1, 2], device=DEVICE)


def loss_of(impl: str, states, norm_weight, norm_bias, head) -> Tensor:
    loss, correct = row_cross_entropy(
        states, ROWS, TARGETS, norm_weight, head, norm_bias, z_loss=0.1, impl=impl
    )
    return (loss * (1 + correct)).sum()


@pytest.mark.parametrize("frozen", [(), (0,), (1, 3), (0, 1)])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_fullgraph_equals_eager(impl: str, frozen: tuple[int, ...]) -> None:
    torch.compiler.reset()
    results = []
    for function in (loss_of, torch.compile(loss_of, fullgraph=True, backend="aot_eager")):
        tensors = inputs()
        for i in frozen:
            tensors[i].requires_grad_(False)
        loss = function(impl, *tensors)
        loss.backward()
        results.append([loss.detach()] + [t.grad for t in tensors if t is not None])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


def test_ops_keep_the_rules_of_custom_ops() -> None:
    from relay_fast.ops.cross_entropy import row_cross_entropy_bwd, row_cross_entropy_fwd

    states, norm_weight, norm_bias, head = inputs(bias=True)
    options = (1e-6, "layer", 0.1, 0.01, "torch")
    forward = (states, ROWS, TARGETS, norm_weight, norm_bias, head, *options)
    torch.library.opcheck(row_cross_entropy_fwd, forward)
    with torch.no_grad():
        loss, lse, _ = row_cross_entropy_fwd(*forward)
        tensors = (torch.ones_like(loss), states, ROWS, TARGETS, lse, norm_weight, norm_bias, head)
        detached = [t.detach() for t in tensors]
    for needed in ([True] * 4, [True, False, False, False], [False, True, False, True]):
        torch.library.opcheck(row_cross_entropy_bwd, (*detached, *options, needed))
