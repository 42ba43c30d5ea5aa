"""The (k⊗L) model of Saunshi et al. (arXiv 2502.17416): prelude, looped block and coda.

Shapes: B sequences, n tokens of a padded batch, N tokens of a packed one, R rows with a target,
d model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from relay_fast.config import BlockConfig
from relay_fast.engine.plain_modules import reset_submodules
from relay_fast.models.layer import Norm
from relay_fast.models.looped_block import LoopedBlock
from relay_fast.models.readouts import NormAndHead
from relay_fast.ops.dispatch import select
from relay_fast.utils.arguments import check_tensors
from relay_fast.utils.numbers import as_int


class LoopedClassifier(nn.Module):
    """embedding → prelude layers → block applied `loops` times → coda layers → norm → head.

    Args:
        block: configuration of the looped block of k layers. (k⊗L) is `loops=L`; the plain stack
            (k⊗1) is `loops=1`.
        vocabulary_size: number of token ids.
        loops: iterations of the block.
        prelude: independent layers before the block.
        coda: independent layers after it.
        recompute: recompute policy (`relay_fast.engine.recompute`).
        impl: "auto", "triton" or "torch".

    Raises:
        ValueError: for sizes out of range.
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
        # Prelude and coda run once, so options about iterations apply to the block only.
        end = replace(block, loop_norm="none", injection="none", max_loops=0, state_noise=0.0)
        stack = lambda layers: LoopedBlock(config=replace(end, n_layers=layers), **options)
        self.loops = loops
        self.embedding = nn.Embedding(vocabulary_size, block.d_model)
        self.prelude = stack(prelude) if prelude else None
        self.block = LoopedBlock(config=block, **options)
        self.coda = stack(coda) if coda else None
        self.norm = Norm(block.d_model, block.has_bias("norm"))
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
        attention_mask: Tensor | None = None,
        loops: int | None = None,
        truncate: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Computes the last states before the final norm, or the loss of rows with targets.

        Args:
            tokens: (B, n) or, with `cu_seqlens`, packed (N,).
            rows: (R,) rows of the flat states to compute the loss of; wrappers such as
                DistributedDataParallel train a model through this argument.
            targets: (R,) token ids; needed with `rows`.
            cu_seqlens: (B + 1,) offsets of the packed sequences.
            attention_mask: (B, n), 1 for tokens and 0 for padding, as in `LoopedBlock.forward`.
            loops: iterations of the block, default the model's.
            truncate: number of last iterations of the block that get gradients, default all.

        Returns:
            States (B, n, d) or (N, d); with `rows`, what `loss` returns.

        Raises:
            TypeError: if only one of `rows` and `targets` is given.
        """
        ends = {"cu_seqlens": cu_seqlens, "attention_mask": attention_mask}
        options = {**ends, "loops": loops, "truncate": truncate}
        if (rows is None) != (targets is None):
            raise TypeError("rows and targets go together: give both for the loss, or neither")
        if rows is not None:
            return self.loss(tokens, rows, targets, **options)
        check_tensors(tokens=tokens)
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens are {tokens.dtype}: give token ids, as int64")
        h = self.embedding(tokens)
        if self.prelude is not None:
            h = self.prelude(h, 1, **ends)
        loops = self.loops if loops is None else loops
        h = self.block(h, loops, truncate=truncate, **ends)
        return h if self.coda is None else self.coda(h, 1, **ends)

    def loss(
        self, tokens: Tensor, rows: Tensor, targets: Tensor, **options
    ) -> tuple[Tensor, Tensor]:
        """Computes the mean cross-entropy () and the accuracy ().

        Args:
            tokens: (B, n) or packed (N,).
            rows: (R,) distinct rows of the flat states.
            targets: (R,) token ids; negative ones are ignored.
            **options: the keyword arguments of `forward`.
        """
        loss, correct = self.row_losses(tokens, rows, targets, **options)
        count = (targets >= 0).sum().clamp(min=1)
        return loss.sum() / count, correct.sum() / count

    def row_losses(
        self, tokens: Tensor, rows: Tensor, targets: Tensor, **options
    ) -> tuple[Tensor, Tensor]:
        """Computes cross-entropies (R,) and whether each argmax is correct (R,).

        Args:
            tokens, rows, targets, options: as in `loss`.
        """
        states = self._states(tokens, **options)
        loss, correct = self._readout().row_losses(states, rows, targets, self.block.impl)
        return loss, correct & (targets >= 0)

    @torch.no_grad()
    def predict(self, tokens: Tensor, rows: Tensor, **options) -> Tensor:
        """Predicts token ids (R,) at rows of the flat states; options: those of `forward`."""
        states = self._states(tokens, **options)[rows]
        ops = select(self.block.impl, states.device)
        return self._readout().argmax(states, ops, states.dtype)

    def _states(self, tokens: Tensor, **options) -> Tensor:
        """Returns flat states (N, d)."""
        return self(tokens, **options).flatten(0, -2)

    def _readout(self) -> NormAndHead:
        c = self.block.config
        return NormAndHead(self, "norm", "head", c.eps, c.norm)

    def parameter_count(self) -> int:
        """Counts all parameters, including embedding and head."""
        return sum(p.numel() for p in self.parameters())
