"""When to stop a looped sequence: ready functions for `until`.

A criterion gets the iteration t, state t and state t − 1 of the sequences that still loop, and
returns which of them stop, a bool tensor (sequences,). States are padded, (sequences, …), or packed
rows, with the row offsets `cu_seqlens`. What is measured in 16 bits is measured in fp32.

| criterion | stops a sequence when | as in |
|---|---|---|
| `StateChange` | ‖h_t − h_{t−1}‖ ≤ tolerance · ‖h_{t−1}‖ | deep equilibrium models |
| `CosineChange` | 1 − cos(h_t, h_{t−1}) ≤ tolerance | |
| `ReadoutEntropy` | the readout's mean entropy ≤ threshold (nats) | early exit by confidence |
| `ReadoutKL` | KL(p_t ‖ p_{t−1}) of the readout, its mean ≤ threshold | Huginn, 2502.05171 |
| `HaltingGate` | Σ of a learned gate's halting probabilities ≥ threshold | ACT, Graves 2016 |
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from relay_fast.kernels.norm_ref import upcast
from relay_fast.utils.arguments import kind_of
from relay_fast.utils.numbers import as_float, as_int


class Criterion:
    """Base class: stops sequences from iteration `min_loops` on.

    Args:
        threshold: the bound.
        min_loops: the first iteration at which a sequence may stop.

    Raises:
        ValueError: for a threshold that is negative or not finite, and min_loops below 1.
    """

    def __init__(self, threshold: float, min_loops: int = 1):
        self.threshold = as_float("threshold", threshold, least=0)
        self.min_loops = as_int("min_loops", min_loops, least=1)

    def __call__(
        self, t: int, new: Tensor, old: Tensor, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        if t < self.min_loops:
            count = len(new) if cu_seqlens is None else len(cu_seqlens) - 1
            return torch.zeros(count, dtype=torch.bool, device=new.device)
        return self.measure(new, old, cu_seqlens) <= self.threshold

    def measure(self, new: Tensor, old: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Computes the value that is compared with the threshold.

        Args:
            new: State t of the sequences, padded or packed.
            old: State t − 1.
            cu_seqlens: Row offsets of packed states; None for padded ones.

        Returns:
            One value for each sequence.
        """
        raise NotImplementedError


class StateChange(Criterion):
    """Stops when the state changes by at most `threshold` times its norm."""

    def measure(self, new: Tensor, old: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        new, old = upcast(new), upcast(old)
        change = sequence_sum((new - old).square(), cu_seqlens)
        ratio = change / sequence_sum(old.square(), cu_seqlens)
        return ratio.sqrt().masked_fill(change == 0, 0)  # also where the states are 0


class CosineChange(Criterion):
    """Stops when 1 − the cosine of the two states is at most `threshold`."""

    def measure(self, new: Tensor, old: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        new, old = upcast(new), upcast(old)
        square = lambda h: sequence_sum(h.square(), cu_seqlens)
        a, b, change = square(new).sqrt(), square(old).sqrt(), square(new - old)
        # |a||b| − a·b without the cancellation of nearly equal numbers.
        difference = (change - (a - b).square()) / 2
        return (difference / (a * b)).masked_fill(change == 0, 0)


class ReadoutEntropy(Criterion):
    """Stops when the mean entropy of the readout is at most `threshold` nats.

    Args:
        readout: state → logits, (…, classes), such as a final norm and head.
        threshold: the bound.
        min_loops: the first iteration at which a sequence may stop.
    """

    def __init__(self, readout: Callable[[Tensor], Tensor], threshold: float, min_loops: int = 1):
        super().__init__(threshold, min_loops)
        self.readout = as_callable("readout", readout)

    def measure(self, new: Tensor, old: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        p = upcast(self.readout(new)).softmax(-1)
        return sequence_mean(torch.special.entr(p).sum(-1), cu_seqlens)


class ReadoutKL(ReadoutEntropy):
    """Stops when the mean KL divergence of the readout from the one before is at most `threshold`.

    Args:
        readout: state → logits, (…, classes).
        threshold: the bound, in nats.
        min_loops: the first iteration at which a sequence may stop.
    """

    def measure(self, new: Tensor, old: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        log_p, log_q = (upcast(self.readout(h)).log_softmax(-1) for h in (new, old))
        terms = log_p.exp() * (log_p - log_q)
        terms = terms.masked_fill(log_p == -math.inf, 0)  # a class that a mask excludes
        return sequence_mean(terms.sum(-1), cu_seqlens)


class HaltingGate(Criterion):
    """Stops when the halting probabilities of a learned gate add up to `threshold`.

    Keeps the sums of a loop: iteration 1 starts anew, a resumed loop goes on with them.

    Args:
        gate: state → logits, one for each sequence (sequences,), or one for each token (…, 1), of
            which the mean probability counts.
        threshold: the sum that stops; 0.5 with `accumulate=False` is the usual bound of a
            probability.
        min_loops: the first iteration at which a sequence may stop.
        accumulate: whether probabilities are added up over the iterations.
    """

    def __init__(
        self,
        gate: Callable[[Tensor], Tensor],
        threshold: float = 0.99,
        min_loops: int = 1,
        accumulate: bool = True,
    ):
        super().__init__(threshold, min_loops)
        self.gate, self.accumulate = as_callable("gate", gate), accumulate
        self._sums: Tensor | None = None

    def __call__(
        self,
        t: int,
        new: Tensor,
        old: Tensor,
        cu_seqlens: Tensor | None = None,
        sequences: Tensor | None = None,
    ) -> Tensor:
        count = len(new) if cu_seqlens is None else len(cu_seqlens) - 1
        p = upcast(self.gate(new)).sigmoid()
        p = p if p.shape == (count,) else sequence_mean(p, cu_seqlens)
        if self.accumulate:
            where = torch.arange(count, device=p.device) if sequences is None else sequences
            if t == 1 or self._sums is None:
                self._sums = p.new_zeros(int(where.max()) + 1 if count else 0)
            elif count > len(self._sums):
                raise ValueError(
                    f"the gate sees {count} sequences at iteration {t}, but has the sums of "
                    f"{len(self._sums)} from an earlier loop: use another HaltingGate for another "
                    "batch"
                )
            self._sums[where] += p
            p = self._sums[where]
        return (p >= self.threshold) & (t >= self.min_loops)


def as_callable(name: str, value: object) -> Callable:
    """Returns the value. Raises TypeError if it cannot be called."""
    if not callable(value):
        raise TypeError(f"{name} is {kind_of(value)}: give a module or a function of the state")
    return value


def sequence_sum(values: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Sums all entries of each sequence.

    Args:
        values: padded (sequences, …) or packed (rows, …).
        cu_seqlens: (sequences + 1,) row offsets of packed values.

    Returns:
        (sequences,).
    """
    per_row = values.flatten(1).sum(1) if values.ndim > 1 else values
    if cu_seqlens is None:
        return per_row
    lengths = cu_seqlens.diff().long()
    owner = torch.repeat_interleave(
        torch.arange(len(lengths), device=values.device), lengths, output_size=len(values)
    )
    return per_row.new_zeros(len(lengths)).index_add_(0, owner, per_row)


def sequence_mean(values: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Averages all entries of each sequence; arguments as in `sequence_sum`."""
    entries = sequence_sum(torch.ones_like(values), cu_seqlens)
    return sequence_sum(values, cu_seqlens) / entries
