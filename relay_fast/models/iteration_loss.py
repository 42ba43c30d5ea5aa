"""A module that computes the loss of all iterations in one call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from relay_fast.engine.plain_modules import reset_submodules
from relay_fast.kernels.norm_ref import NORMS
from relay_fast.models.layer import Norm
from relay_fast.models.readouts import NormAndHead
from relay_fast.ops.cross_entropy import weighted_losses
from relay_fast.ops.dispatch import check_impl
from relay_fast.utils.arguments import check_choice
from relay_fast.utils.numbers import as_float, as_int


class IterationLoss(NamedTuple):
    """The loss, and statistics by iteration, on the device."""

    loss: Tensor  # () weighted sum over all rows
    losses: Tensor  # (T,) each iteration's part of the loss, detached
    accuracy: Tensor  # (T,) share of an iteration's rows whose argmax is the target, 0 without rows
    counts: Tensor  # (T,) int64, rows of each iteration that carry a target


class IterationCrossEntropy(nn.Module):
    """Applies final norm, head and cross-entropy to the supervised rows of all iterations at once.

    Logits are computed in chunks of rows; the backward pass recomputes them from the saved
    log-sum-exp.

    Args:
        d_model: width of the states.
        vocabulary_size: number of token ids.
        norm: "rms" or "layer".
        bias: whether the norm has a bias ("layer" only).
        eps: of the norm.
        label_smoothing: in [0, 1).
        z_loss: weight of the squared log-sum-exp.
        impl: "auto", "triton" or "torch".

    Raises:
        ValueError: for options out of range.
    """

    def __init__(
        self,
        d_model: int,
        vocabulary_size: int,
        *,
        norm: str = "rms",
        bias: bool = False,
        eps: float = 1e-6,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        impl: str = "auto",
    ):
        super().__init__()
        check_choice("norm", norm, NORMS)
        if bias and norm != "layer":
            raise ValueError(f'bias = True needs norm = "layer", not norm = {norm!r}')
        check_impl(impl)
        d_model = as_int("d_model", d_model, least=1)
        vocabulary_size = as_int("vocabulary_size", vocabulary_size, least=1)
        eps, z_loss = as_float("eps", eps), as_float("z_loss", z_loss)
        label_smoothing = as_float("label_smoothing", label_smoothing)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing = {label_smoothing}: it must lie in [0, 1)")
        if z_loss < 0:
            raise ValueError(f"z_loss = {z_loss}: it must be 0 or more")
        self.norm = Norm(d_model, bias)
        self.head = nn.Linear(d_model, vocabulary_size, bias=False)
        self.options = {
            "eps": eps,
            "norm": norm,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "impl": impl,
        }

    def reset_parameters(self) -> None:
        """Draws all parameters anew, as the constructor does."""
        reset_submodules(self)

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())

    def forward(
        self,
        states: Tensor | list[Tensor],
        rows: Tensor,
        targets: Tensor,
        weights: Tensor | None = None,
        iteration: Tensor | None = None,
        iterations: int | None = None,
    ) -> IterationLoss:
        """Computes the loss of rows of the states.

        Args:
            states: (N, d), or the list that `LoopedBlock(..., return_states=True)` returns, which
                is concatenated.
            rows: (R,) int64 row indices into the states.
            targets: (R,) token ids; negative ones are ignored.
            weights: (R,) weights of the rows, default 1 / R each.
            iteration: (R,) int64, 0-based, the iteration of each row; for the statistics.
            iterations: how many there are, default 1.

        Raises:
            ValueError: for shapes that do not fit, and for targets outside the vocabulary. The
                targets are checked on the CPU only, to avoid a synchronization on a GPU.
        """
        if iteration is not None and iterations is None:
            raise ValueError("iteration needs iterations: give their number too")
        iterations = 1 if iterations is None else as_int("iterations", iterations)
        if isinstance(states, list):
            states = torch.cat([s.flatten(0, -2) for s in states])
        if weights is None:
            weights = torch.full_like(rows, 1 / max(1, len(rows)), dtype=torch.float32)
        if weights.shape != rows.shape:
            raise ValueError(
                f"weights {tuple(weights.shape)} must have one entry for each of the {len(rows)} "
                "rows"
            )
        options = dict(self.options)
        readout = NormAndHead(self, "norm", "head", options.pop("eps"), options.pop("norm"))
        loss, correct = readout.row_losses(states, rows, targets, **options)
        weighted = weighted_losses(loss, weights, targets)
        if iteration is None:
            iteration = torch.zeros_like(rows)
        per_iteration = lambda values: torch.zeros(
            iterations, dtype=values.dtype, device=values.device
        ).index_add_(0, iteration, values)
        counts = per_iteration((targets >= 0).long())
        right = per_iteration(correct.long())
        return IterationLoss(
            weighted.sum(), per_iteration(weighted.detach()), right / counts.clamp(min=1), counts
        )
