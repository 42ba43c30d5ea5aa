"""Prelude, loop and coda: the (k⊗L) model of Saunshi et al. (arXiv 2502.17416).

Shapes: B sequences, n tokens of a padded batch, N rows in all, R rows that are read out, V
vocabulary, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from relay_fast.config import BlockConfig
from relay_fast.engine.plain_modules import check_parts, reset_submodules
from relay_fast.models.looped_block import LoopedBlock, Norm
from relay_fast.ops.cross_entropy import row_cross_entropy
from relay_fast.ops.dispatch import select
from relay_fast.utils.numbers import as_int


class LoopedClassifier(nn.Module):
    """embedding → prelude layers → block applied `loops` times → coda layers → norm → head.

    block: of k layers; (k⊗L) is `loops=L`, the plain stack (k⊗1) is `loops=1`. prelude, coda:
    numbers of independent layers before and after, so that (4⊗1, 4, 1) with 24 effective layers is
    `loops=4, prelude=4, coda=4`. recompute, impl: as in `LoopedBlock`.
    """

    def __init__(
        self,
        block: BlockConfig,
        vocabulary_size: int,
        *,
        loops: int,
        prelude: int = 0,
        coda: int = 0,
        recompute: str = "none",
        impl: str = "auto",
    ):
        super().__init__()
        loops = as_int("loops", loops)
        if loops < 1:
            raise ValueError(f"loops = {loops}: give at least 1")
        prelude, coda = as_int("prelude", prelude, least=0), as_int("coda", coda, least=0)
        vocabulary_size = as_int("vocabulary_size", vocabulary_size, least=1)
        block = BlockConfig.of(block)
        options = {"recompute": recompute, "impl": impl}
        # The ends run once: what concerns iterations is the block's alone.
        end = replace(block, loop_norm="none", injection="none", max_loops=0, state_noise=0.0)
        stack = lambda layers: LoopedBlock(config=replace(end, n_layers=layers), **options)
        self.loops = loops
        self.embedding = nn.Embedding(vocabulary_size, block.d_model)
        self.prelude = stack(prelude) if prelude else None
        self.block = LoopedBlock(config=block, **options)
        self.coda = stack(coda) if coda else None
        self.norm = Norm(block.d_model, block.bias and block.norm == "layer")
        self.head = nn.Linear(block.d_model, vocabulary_size, bias=False)

    def reset_parameters(self) -> None:
        """Draws all parameters anew, as the constructor does."""
        reset_submodules(self)

    def forward(
        self,
        tokens: Tensor,
        rows: Tensor | None = None,
        targets: Tensor | None = None,
        *,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        loops: int | None = None,
        truncate: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Last states before the final norm, (B, n, d) or packed (N, d); with rows and targets,
        what `loss` gives, as what wraps a module (DistributedDataParallel) trains it.

        tokens: (B, n) or, with cu_seqlens (B + 1,), packed (N,). loops: default those of the model.
        truncate: gradient through the block's last so many iterations only. Raises TypeError for
        rows without targets, and the other way round.
        """
        options = {"cu_seqlens": cu_seqlens, "loops": loops, "truncate": truncate}
        if (rows is None) != (targets is None):
            raise TypeError("rows and targets go together: give both for the loss, or neither")
        if rows is not None:
            return self.loss(tokens, rows, targets, **options)
        h = self.embedding(tokens)
        if self.prelude is not None:
            h = self.prelude(h, 1, cu_seqlens=cu_seqlens)
        loops = self.loops if loops is None else loops
        h = self.block(h, loops, cu_seqlens=cu_seqlens, truncate=truncate)
        return h if self.coda is None else self.coda(h, 1, cu_seqlens=cu_seqlens)

    def loss(
        self, tokens: Tensor, rows: Tensor, targets: Tensor, **options
    ) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy (), share right (), of the rows (R,) of the flat states.

        rows: each at most once; targets (R,), negative ones are ignored. options: of `forward`.
        """
        loss, correct = self.row_losses(tokens, rows, targets, **options)
        count = (targets >= 0).sum().clamp(min=1)
        return loss.sum() / count, correct.sum() / count

    def row_losses(
        self, tokens: Tensor, rows: Tensor, targets: Tensor, **options
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy (R,) and whether the argmax is the target (R,); otherwise as `loss`."""
        c = self.block.config
        states = self._states(tokens, **options)
        loss, correct = row_cross_entropy(
            states, rows, targets, self.norm.weight, self.head.weight, self.norm.bias,
            eps=c.eps, norm=c.norm, impl=self.block.impl,
        )  # fmt: skip
        return loss, correct & (targets >= 0)

    @torch.no_grad()
    def predict(self, tokens: Tensor, rows: Tensor, **options) -> Tensor:
        """Token ids (R,) read out at the rows of the flat states; options: of `forward`."""
        c = self.block.config
        states = self._states(tokens, **options)[rows]
        ops = select(self.block.impl, states.device)
        head = self.head.weight.to(states.dtype)
        return ops.argmax(states, self.norm.weight, self.norm.bias, head, c.eps, c.norm)

    def _states(self, tokens: Tensor, **options) -> Tensor:
        """Flat states (rows, d); norm and head, whose weights are read, are plain."""
        check_parts(self, norm=Norm, head=nn.Linear)
        return self(tokens, **options).flatten(0, -2)

    def parameter_count(self) -> int:
        """All parameters, embedding and head included."""
        return sum(p.numel() for p in self.parameters())
