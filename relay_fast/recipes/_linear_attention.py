"""Linear attention, and its loop at a cost that does not depend on the context's length.

A layer is z ← z + P S Q z for every token z, with the moment S = Σ z zᵀ over the context's tokens:
the context acts through S alone. In a loop every token is multiplied by G = I + P S Q, so S becomes
G S Gᵀ: one iteration takes a few D×D products, however many tokens there are.

Shapes: B prompts, m tokens, D width; tokens are rows. P and Q are (D, D), shared by all prompts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def moment(context: Tensor) -> Tensor:
    """Σ z zᵀ (B, D, D) of the context's tokens (B, m, D)."""
    return context.mT @ context


def linear_attention(tokens: Tensor, s: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """P S Q z for every token: tokens (B, m, D), s (B, D, D); returns (B, m, D)."""
    return tokens @ q.mT @ s @ p.mT


def causal_linear_attention(tokens: Tensor, s: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """As `linear_attention`, where each token also sees itself and the tokens before it.

    s: moment of a context that comes before all of them.
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
    """Tokens (B, m, D) after `loops` layers that also change their context, whose moment is s.

    The tokens themselves are not part of the context. With return_states, a list of the tokens
    after iterations 1..loops.
    """
    states = []
    eye = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
    for t in range(loops):
        g = eye + p @ s @ q
        tokens = tokens @ g.mT
        states.append(tokens)
        if t + 1 < loops:
            s = g @ s @ g.mT
    return states if return_states else tokens


class LinearAttention(nn.Module):
    """The layer on the tokens themselves, for `relay_fast.loop` and for stacks.

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
        """tokens (B, m, D), the first `context` of which are attended to; all of them change.

        scale: of the moment, 1/n for a mean.
        """
        s = scale * moment(tokens[:, :context])
        return tokens + linear_attention(tokens, s, self.p, self.q)
