"""Large vocabularies: the gradient formed in forward against autograd of plain torch, in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.numerics import assert_close
from relay_fast.functional import SMALL_VOCABULARY, iteration_cross_entropy

NAMES = ("states", "norm_weight", "norm_bias", "head", "weights")
VOCABULARY = SMALL_VOCABULARY + 7


def inputs() -> dict[str, Tensor]:
    """11 of 20 state rows, out of order; two of them are ignored."""
    generator = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, VOCABULARY, (11,), generator=generator)
    targets[[2, 10]] = -1
    return {
        "states": new(20, 6), "norm_weight": new(6) + 1, "norm_bias": new(6),
        "head": new(VOCABULARY, 6), "weights": new(11),
        "rows": torch.randperm(20, generator=generator)[:11], "targets": targets,
    }  # fmt: skip


def eager(i: dict[str, Tensor], smoothing: float, z_loss: float) -> Tensor:
    y = F.layer_norm(i["states"][i["rows"]], (6,), i["norm_weight"], i["norm_bias"], 1e-6)
    logits = y @ i["head"].t()
    loss = F.cross_entropy(
        logits, i["targets"], ignore_index=-1, reduction="none", label_smoothing=smoothing
    )
    z = z_loss * logits.logsumexp(-1).square() * (i["targets"] >= 0)
    return (loss + z) @ i["weights"]


def fused(i: dict[str, Tensor], smoothing: float, z_loss: float, impl: str = "torch") -> Tensor:
    return iteration_cross_entropy(
        i["states"],
        i["rows"],
        i["targets"],
        i["weights"],
        i["norm_weight"],
        i["head"],
        i["norm_bias"],
        norm="layer",
        label_smoothing=smoothing,
        z_loss=z_loss,
        impl=impl,
    )


@pytest.mark.parametrize("frozen", range(2 ** len(NAMES) - 1))
def test_every_combination_of_frozen_inputs(frozen: int, monkeypatch) -> None:
    monkeypatch.setattr("relay_fast.kernels.cross_entropy_ref.CHUNK_LOGITS", 4 * VOCABULARY)
    smoothing, z_loss = (0.1, 0.01) if frozen % 2 else (0.0, 0.0)
    results = []
    for function in (fused, eager):
        i = inputs()
        for bit, name in enumerate(NAMES):
            i[name].requires_grad_(not frozen >> bit & 1)
        loss = function(i, smoothing, z_loss)
        (3 * loss).backward()
        results.append({"loss": loss} | {n: i[n].grad for n in NAMES if i[n].grad is not None})
    assert set(results[0]) == set(results[1])
    for name, truth in results[1].items():
        assert_close(name, results[0][name], truth)


def test_the_logits_are_computed_once() -> None:
    """Two products of V · d a row: logits and dy (the counter does not see dW's, which is made in
    place); with the logits recomputed it would be three."""
    from torch.utils.flop_counter import FlopCounterMode

    def flops(impl) -> int:
        i = inputs()
        i["states"].requires_grad_(), i["head"].requires_grad_()
        with FlopCounterMode(display=False) as counter:
            impl(i, 0.0, 0.0).backward()
        return counter.get_total_flops()

    assert flops(fused) == 2 * 2 * 11 * VOCABULARY * 6


def test_without_gradients_none_is_formed() -> None:
    i = inputs()
    assert_close("loss", fused(i, 0.1, 0.01), eager(i, 0.1, 0.01))
    assert not fused(i, 0.1, 0.01).requires_grad


def test_weights_that_do_not_fit() -> None:
    i = inputs()
    i["head"].requires_grad_()
    i["weights"] = i["weights"][:5]
    with pytest.raises(ValueError, match=r"weights \(5,\) must be \(R,\) like rows \(11,\)"):
        fused(i, 0.0, 0.0)


def test_it_cannot_be_differentiated_twice() -> None:
    i = inputs()
    i["states"].requires_grad_()
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(fused(i, 0.0, 0.0), i["states"], create_graph=True)
