"""Linear attention, and its loop at a cost independent of the context's length.

A layer is z ← z + P S Q z for every token z, with the moment S = Σ z zᵀ over the context's tokens:
the context acts through S alone. In a loop every token is multiplied by G = I + P S Q, so S becomes
G S Gᵀ: one iteration takes a few D×D products for any number of tokens.

Shapes: B prompts, m tokens, D width; tokens are rows. P and Q are (D, D), shared by all prompts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def moment(context: Tensor) -> Tensor:
    """Returns Σ z zᵀ (B, D, D) of the context's tokens (B, m, D)."""
    return context.mT @ context


def linear_attention(tokens: Tensor, s: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Returns P S Q z (B, m, D) for every token z.

    Args:
        tokens: (B, m, D).
        s: Moment (B, D, D) of the context.
        p, q: (D, D).
    """
    return tokens @ q.mT @ s @ p.mT


def causal_linear_attention(tokens: Tensor, s: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Does as `linear_attention`, but each token also sees itself and the tokens before it.

    Args:
        tokens: (B, m, D).
        s: Moment (B, D, D) of a context that comes before all tokens.
        p, q: (D, D).
    """
    asked = tokens @ q.mT
    return (asked @ s + (asked @ tokens.mT).tril() @ tokens) @ p.mT


def loop_linear_attention(
    tokens: Tensor,
    s: Tensor,
    p: Tensor,
    q: Tensor,
    loops: int,
    *,
    return_states: bool = False,
) -> Tensor | list[Tensor]:
    """Applies `loops` layers to tokens and to their context, which does not include the tokens.

    Args:
        tokens: (B, m, D).
        s: Moment (B, D, D) of the context before the first layer.
        p, q: (D, D).
        loops: Number of layers.
        return_states: Return a list of the tokens after each of the iterations 1..loops.

    Returns:
        The tokens (B, m, D) after the last iteration, or the list.
    """
    states = []
    eye = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
    g = eye + p @ s @ q
    following = g @ s @ g.mT
    # A layer that leaves the context as it was leaves it so again: G stays.
    settled = not following.requires_grad and torch.equal(following, s)
    for t in range(loops):
        if t and not settled:
            s = g @ s @ g.mT
            g = eye + p @ s @ q
        tokens = tokens @ g.mT
        states.append(tokens)
    return states if return_states else tokens


class LinearAttention(nn.Module):
    """The layer as a module on tokens, for `relay_fast.loop` and for stacks.

    P and Q start from N(0, std²).
    """

    def __init__(self, width: int, *, std: float = 0.02):
        super().__init__()
        self.std = std
        self.p = nn.Parameter(torch.empty(width, width))
        self.q = nn.Parameter(torch.empty(width, width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for matrix in (self.p, self.q):
            matrix.copy_(self.std * torch.randn_like(matrix))

    def forward(self, tokens: Tensor, context: int, scale: float = 1.0) -> Tensor:
        """Applies the layer to all tokens.

        Args:
            tokens: (B, m, D).
            context: The first `context` tokens are attended to.
            scale: Factor of the moment, 1/n for a mean.
        """
        s = scale * moment(tokens[:, :context])
        return tokens + linear_attention(tokens, s, self.p, self.q)
