"""The modules that hold the parameters of a looped block's layers; the ops compute with them."""

from __future__ import annotations

import torch
from torch import nn

from relay_fast.config import BlockConfig
from relay_fast.engine.plain_modules import Holder, reset_submodules


class Norm(Holder):
    """Holds the weight of a norm, and the bias of a LayerNorm; the ops apply it."""

    def __init__(self, d: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d))
        self.bias = nn.Parameter(torch.empty(d)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class ResidualLinear(nn.Linear):
    """The last linear of a residual branch; `std`, where set, scales the initial weight."""

    std: float | None = None

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.std is not None:
            nn.init.normal_(self.weight, std=self.std)


class ZeroEmbedding(nn.Embedding):
    """An embedding that starts at zero, and so has no effect before training."""

    def reset_parameters(self) -> None:
        super().reset_parameters()  # keeps the random stream, so that seeds give the same models
        nn.init.zeros_(self.weight)


class Layer(Holder):
    """Holds the parameters of one pre-norm layer; the rows of qkv are [q; k; v]."""

    def __init__(self, c: BlockConfig):
        super().__init__()
        norm_bias, has = c.has_bias("norm"), c.has_bias
        columns = (c.n_heads + 2 * c.kv_heads) * c.head_dim
        self.norm1 = Norm(c.d_model, norm_bias)
        self.qkv = nn.Linear(c.d_model, columns, bias=has("qkv"))
        if c.qk_norm:
            self.q_norm, self.k_norm = Norm(c.head_dim, False), Norm(c.head_dim, False)
        self.out = ResidualLinear(c.n_heads * c.head_dim, c.d_model, bias=has("out"))
        if c.sandwich_norm:
            self.post_norm1 = Norm(c.d_model, norm_bias)
        self.norm2 = Norm(c.d_model, norm_bias)
        self.up = nn.Linear(c.d_model, c.hidden, bias=has("up"))
        if c.activation == "swiglu":
            self.gate = nn.Linear(c.d_model, c.hidden, bias=has("gate"))
        self.down = ResidualLinear(c.hidden, c.d_model, bias=has("down"))
        if c.sandwich_norm:
            self.post_norm2 = Norm(c.d_model, norm_bias)
        for linear in (self.out, self.down):  # residual branches start small
            linear.std = (2 * c.n_layers * linear.in_features) ** -0.5
            nn.init.normal_(linear.weight, std=linear.std)

    def reset_parameters(self) -> None:
        """Draws all parameters anew, as the constructor does."""
        reset_submodules(self)
