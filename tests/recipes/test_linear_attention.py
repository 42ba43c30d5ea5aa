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
from relay_fast.recipes._thoughts import ThoughtLayer

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


def one_by_one(z, s, p, q, loops: int) -> torch.Tensor:
    for _ in range(loops):
        g = torch.eye(s.shape[-1], dtype=s.dtype) + p @ s @ q
        z, s = z @ g.mT, g @ s @ g.mT
    return z


@pytest.mark.parametrize("settles", [True, False])
def test_a_context_that_a_layer_leaves_unchanged(settles) -> None:
    """P writes into the last half of a token, the context lies in the first: G S Gᵀ is S."""
    layer = ThoughtLayer.gradient_descent(D, 0.3)
    s = moment(tokens(N)[..., :D]) / N
    width = 2 * D + 2
    s = torch.nn.functional.pad(s, (0, width - D, 0, width - D))
    if not settles:
        s = s + 0.01 * torch.eye(width, dtype=s.dtype)
    z = torch.randn(B, 2, width, dtype=torch.float64)
    p, q = layer.v.detach(), layer.w.detach()
    g = torch.eye(width, dtype=s.dtype) + p @ s @ q
    assert torch.equal(g @ s @ g.mT, s) == settles
    assert torch.equal(loop_linear_attention(z, s, p, q, 6), one_by_one(z, s, p, q, 6))
    # The moment's own gradients remain, whether or not its value changes.
    grads = []
    for run in (loop_linear_attention, one_by_one):
        leaves = [p.clone().requires_grad_(), q.clone().requires_grad_()]
        grads.append(torch.autograd.grad(run(z, s, *leaves, 6).square().sum(), leaves))
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
