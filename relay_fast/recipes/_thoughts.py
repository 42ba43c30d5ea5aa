"""One linear attention layer that writes weights into thought columns (Huang, Wang, Lee 2025).

Columns (x, y, w, 1) of width D = 2d + 2: data (x, y, 0, 0), thoughts (0, 0, w, 1). The layer is
z ← z + V S W z / n, with S the sum of z zᵀ over the columns that z sees. One gradient descent step
with rate η is V[w, x] = −η I, W[x, w] = I, W[y, 1] = −1, zeros elsewhere.

Shapes: B prompts, m thoughts, d dimensions; columns are rows here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from relay_fast.recipes._linear_attention import (
    causal_linear_attention,
    linear_attention,
    loop_linear_attention,
)

STARTS = ("random", "theory")


class ThoughtLayer(nn.Module):
    """The layer, with V and W (D, D) in double precision.

    Moments s in the methods are those of (x, y), divided by n: (B, d + 1, d + 1).

    Args:
        d: Dimensions.
        start: "random": all entries from N(0, std²); "theory": the sparsity of gradient descent,
            with a random eigenbasis that both blocks share.
        std: Standard deviation of the random entries.
    """

    def __init__(self, d: int, start: str = "random", std: float = 0.02):
        super().__init__()
        self.d = d
        width = 2 * d + 2
        self.v, self.w = (
            nn.Parameter(std * torch.randn(width, width, dtype=torch.float64)) for _ in range(2)
        )
        if start == "theory":
            basis = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0]
            values = std * torch.rand(2, d, dtype=torch.float64)
            self._set(-(basis * values[0]) @ basis.T, (basis * values[1]) @ basis.T, -std)

    @classmethod
    def gradient_descent(cls, d: int, rate: float) -> ThoughtLayer:
        """Builds the layer that is one step of gradient descent."""
        layer = cls(d)
        eye = torch.eye(d, dtype=torch.float64)
        layer._set(-rate * eye, eye, -1.0)
        return layer

    @torch.no_grad()
    def _set(self, v: Tensor, w: Tensor, label: float) -> None:
        self.v.zero_()[self.d + 1 : -1, : self.d] = v
        self.w.zero_()[: self.d, self.d + 1 : -1] = w
        self.w[self.d, -1] = label

    def step_matrix(self) -> Tensor:
        """Returns the (d, d) matrix of the step, −η I for gradient descent."""
        return self.v[self.d + 1 : -1, : self.d] @ self.w[: self.d, self.d + 1 : -1]

    def columns(self, weights: Tensor) -> Tensor:
        """Returns thoughts (B, m, D) that hold weights (B, m, d)."""
        one = torch.ones_like(weights[..., :1])
        return nn.functional.pad(torch.cat([weights, one], -1), (self.d + 1, 0))

    def think(self, s: Tensor, weights: Tensor, n: int) -> Tensor:
        """Returns the columns (B, m, D) written after each thought, given the ones before it."""
        thoughts = self.columns(weights)
        seen = causal_linear_attention(thoughts, n * self._data(s), self.v / n, self.w)
        return thoughts + seen

    @torch.no_grad()
    def roll_out(self, s: Tensor, steps: int, n: int) -> Tensor:
        """Generates a chain from 0; returns its weights (B, steps + 1, d)."""
        seen, thought = self._data(s), self.columns(s.new_zeros(len(s), 1, self.d))
        written = [thought]
        for _ in range(steps):
            seen = seen + thought.mT @ thought / n
            thought = thought + linear_attention(thought, seen, self.v, self.w)
            written.append(thought)
        return torch.cat(written, 1)[..., self.d + 1 : -1]

    def loop(self, s: Tensor, start: Tensor, loops: int) -> Tensor:
        """Loops over the data and one thought, attending to the data only.

        Args:
            s: The moments.
            start: (B, d), weights of the thought.
            loops: Number of loops.

        Returns:
            (B, loops, d), the weights after each loop.
        """
        thought = self.columns(start[:, None])
        states = loop_linear_attention(
            thought, self._data(s), self.v, self.w, loops, return_states=True
        )
        return torch.cat(states, 1)[..., self.d + 1 : -1]

    def _data(self, s: Tensor) -> Tensor:
        """Returns the moment (B, D, D) of the data columns."""
        return nn.functional.pad(s, (0, self.d + 1, 0, self.d + 1))
