"""A final norm and a head as one readout of states: by their weights where they are no more than
that, else called.

Shapes: N rows of states, R of them with a target, d model width, V classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relay_fast.engine.adapters import chosen_module
from relay_fast.engine.block_weights import read_part
from relay_fast.engine.plain_modules import Holder, unwrapped
from relay_fast.engine.wrappers import gathered, shards
from relay_fast.kernels.norm_ref import upcast
from relay_fast.models.layer import Norm
from relay_fast.ops.cross_entropy import row_cross_entropy
from relay_fast.ops.dispatch import Ops


class ReadoutWeights(NamedTuple):
    """The final norm's weight and bias, and the head, (d,), (d,) or None, (V, d)."""

    norm: Tensor
    bias: Tensor | None
    head: Tensor


class NormAndHead:
    """The readout of a model, read anew for each pass.

    Args:
        owner: the model.
        norm, head: names of its parts.
        eps, kind: of the norm.
    """

    def __init__(self, owner: nn.Module, norm: str, head: str, eps: float, kind: str):
        self.norm, self.head = getattr(owner, norm), getattr(owner, head)
        self.eps, self.kind = eps, kind
        self._names = type(owner).__name__, norm, head
        self._weights: ReadoutWeights | str | None = None
        self._cast: Tensor | None = None  # the head, as `argmax` last read it

    def parts(self) -> tuple[nn.Module, nn.Module]:
        return self.norm, self.head

    def weights(self) -> ReadoutWeights | str:
        """Returns the weights, read once, or why a part has to be called."""
        if self._weights is None:
            self._weights = self._read()
        return self._weights

    def _read(self) -> ReadoutWeights | str:
        _, norm_name, head_name = self._names
        biased = getattr(self.norm, "bias", None) is not None
        kinds = ("weight", "bias") if biased else ("weight",)
        norm = read_part(norm_name, self.norm, kinds, Norm)
        head = read_part(head_name, self.head, ("weight",), nn.Linear)
        for found in (norm, head):
            if isinstance(found, str):
                return found
        return ReadoutWeights(norm[0], norm[1] if biased else None, head[0])

    def weights_only(self, what: str) -> ReadoutWeights:
        """Returns the weights.

        Args:
            what: who reads them and calls no parts.

        Raises:
            RuntimeError: that names a part which has to be called.
        """
        weights = self.weights()
        if isinstance(weights, str):
            raise RuntimeError(
                f"{weights}, which {what} would ignore because it reads the weights of "
                f"{self._names[0]} without calling its parts: use a plain part there"
            )
        return weights

    def argmax(self, states: Tensor, ops: Ops, dtype: torch.dtype) -> Tensor:
        """Returns the most likely class of each row (N,).

        Args:
            states: (N, d).
            ops: The implementation.
            dtype: The dtype of the GEMMs.
        """
        weights = self.weights()
        if isinstance(weights, str):
            return self._logits(states).argmax(-1)
        if self._cast is None or self._cast.dtype != dtype:
            self._cast = weights.head.to(dtype)
        return ops.argmax(states, weights.norm, weights.bias, self._cast, self.eps, self.kind)

    def row_losses(
        self, states: Tensor, rows: Tensor, targets: Tensor, impl: str, **options: float
    ) -> tuple[Tensor, Tensor]:
        """Computes what `row_cross_entropy` does.

        Args:
            states: (N, d).
            rows: (R,) rows of the states.
            targets: (R,) classes; negative ones are ignored.
            impl: "auto", "triton" or "torch".
            **options: `label_smoothing` and `z_loss`.
        """

        def compute(states: Tensor) -> tuple[Tensor, Tensor]:
            weights = self.weights()
            if isinstance(weights, str):
                return self.called_losses(states, rows, targets, **options)
            return row_cross_entropy(
                states,
                rows,
                targets,
                weights.norm,
                weights.head,
                weights.bias,
                eps=self.eps,
                norm=self.kind,
                impl=impl,
                **options,
            )

        return gathered(states, compute, (), shards(self.parts()))

    def called_losses(
        self,
        states: Tensor,
        rows: Tensor,
        targets: Tensor,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Does what `row_losses` does, by calling norm and head.

        Args:
            states: (N, d).
            rows: (R,) the rows with a target.
            targets: (R,) classes; negative ones are ignored.
            label_smoothing: Share of the target's probability that is spread evenly.
            z_loss: Weight of the squared log-partition function.

        Returns:
            The loss of each row, and whether its most likely class is the target.
        """
        logits = upcast(self._logits(states[rows]))
        lse, ignored = logits.logsumexp(-1), targets < 0
        own = logits.gather(1, targets.clamp(min=0).long().unsqueeze(1)).squeeze(1)
        loss = lse - (1 - label_smoothing) * own - label_smoothing * logits.mean(-1)
        loss = (loss + z_loss * lse.square()).masked_fill(ignored, 0)
        return loss, logits.argmax(-1) == targets

    def _logits(self, states: Tensor) -> Tensor:
        norm = chosen_module(unwrapped(self.norm))
        y = norm(states, self._plain_norm) if isinstance(norm, Holder) else self.norm(states)
        return self.head(y.to(states.dtype))

    def _plain_norm(self, x: Tensor) -> Tensor:
        norm, x = chosen_module(unwrapped(self.norm)), upcast(x)
        weight, bias = upcast(norm.weight), norm.bias
        if self.kind == "layer":
            bias = None if bias is None else upcast(bias)
            return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)
        return F.rms_norm(x, x.shape[-1:], weight, self.eps)
