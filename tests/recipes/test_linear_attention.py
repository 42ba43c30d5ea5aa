"""Linear attention: the formula, its causal form, and the loop on moments against one on tokens."""

import pytest
import torch

import relay_fast
from relay_fast.recipes._linear_attention import (
    LinearAttention,
    causal_linear_attention,
    linear_attention,
    loop_linear_attention,
    moment,
)

B, N, D = 3, 7, 4  # prompts, context tokens, width


@pytest.fixture
def matrices():
    return 0.3 * torch.randn(2, D, D, dtype=torch.float64)


def tokens(n: int) -> torch.Tensor:
    return torch.randn(B, n, D, dtype=torch.float64)


def test_the_formula(matrices) -> None:
    p, q = matrices
    context, z = tokens(N), tokens(2)
    # Columns are tokens: P Z (Zᵀ Q z), as the papers write it.
    expected = p @ context.mT @ (context @ q @ z.mT)
    torch.testing.assert_close(linear_attention(z, moment(context), p, q), expected.mT)


def test_causal_is_a_growing_context(matrices) -> None:
    p, q = matrices
    context, z = tokens(N), tokens(5)
    got = causal_linear_attention(z, moment(context), p, q)
    for j in range(5):
        seen = moment(torch.cat([context, z[:, : j + 1]], 1))
        torch.testing.assert_close(got[:, j : j + 1], linear_attention(z[:, j : j + 1], seen, p, q))


@pytest.mark.parametrize("loops", [1, 2, 5])
def test_looping_moments_is_looping_tokens(matrices, loops) -> None:
    layer = LinearAttention(D).double()
    layer.p.data, layer.q.data = matrices
    context, z = tokens(N), tokens(2)
    shared = {"context": N, "scale": 1 / N}
    long = relay_fast.loop(layer, torch.cat([context, z], 1), loops, shared=shared)
    states = loop_linear_attention(
        z, moment(context) / N, layer.p, layer.q, loops, return_states=True
    )
    assert len(states) == loops
    torch.testing.assert_close(states[-1], long[:, N:])
    # Gradients too.
    long[:, N:].square().sum().backward()
    p, q = layer.p.detach().requires_grad_(), layer.q.detach().requires_grad_()
    loop_linear_attention(z, moment(context) / N, p, q, loops).square().sum().backward()
    torch.testing.assert_close(p.grad, layer.p.grad)
    torch.testing.assert_close(q.grad, layer.q.grad)
