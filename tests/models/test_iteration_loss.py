"""`IterationCrossEntropy`: the loss of all iterations at once, and what it says for the log."""

import pytest
import torch
from torch.nn import functional as F

import relay_fast
from benchmarks.numerics import assert_bitwise, assert_close
from relay_fast.models.iteration_loss import IterationCrossEntropy

D, V = 8, 11


def inputs():
    """A block's states (three sequences of 4 tokens), and supervised rows of each iteration."""
    block = relay_fast.LoopedBlock(D, 2, 1).double()
    x = torch.randn(3, 4, D, dtype=torch.float64, requires_grad=True)
    states = block(x, [3, 1, 2], return_states=True)  # 12, 8 and 4 rows
    rows = torch.tensor([0, 5, 11, 12, 19, 20, 22])
    iteration = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    targets = torch.tensor([1, -1, 3, 4, 5, 10, 0])
    return x, states, rows, iteration, targets, torch.rand(7, dtype=torch.float64)


@pytest.mark.parametrize("smoothing, z_loss", [(0.0, 0.0), (0.1, 0.01)])
@pytest.mark.parametrize("norm, bias", [("rms", False), ("layer", True)])
def test_equals_autograd(norm, bias, smoothing, z_loss) -> None:
    x, states, rows, iteration, targets, weights = inputs()
    criterion = IterationCrossEntropy(
        D, V, norm=norm, bias=bias, label_smoothing=smoothing, z_loss=z_loss
    ).double()
    torch.nn.init.normal_(criterion.norm.weight)
    got = criterion(states, rows, targets, weights, iteration, 3)
    h = torch.cat([s.flatten(0, 1) for s in states])[rows]
    if norm == "rms":
        y = F.rms_norm(h, (D,), criterion.norm.weight, 1e-6)
    else:
        y = F.layer_norm(h, (D,), criterion.norm.weight, criterion.norm.bias, 1e-6)
    logits = criterion.head(y)
    row = F.cross_entropy(
        logits, targets, ignore_index=-1, reduction="none", label_smoothing=smoothing
    )
    row = (row + z_loss * logits.logsumexp(-1) ** 2 * (targets >= 0)) * weights
    assert_close("loss", got.loss, row.sum())
    right = (logits.argmax(-1) == targets).double()
    for t in range(3):
        part = iteration == t
        assert_close(f"loss {t}", got.losses[t], row[part].sum())
        share = right[part].sum() / (targets[part] >= 0).sum()
        assert_close(f"accuracy {t}", got.accuracy[t], share, 1e-6)
    assert got.counts.tolist() == [2, 2, 2]
    leaves = [x, *criterion.parameters()]
    truth = torch.autograd.grad(row.sum(), leaves, retain_graph=True)
    for i, value in enumerate(torch.autograd.grad(got.loss, leaves)):
        assert_close(f"gradient {i}", value, truth[i])


def test_defaults() -> None:
    _, states, rows, iteration, targets, _ = inputs()
    criterion = IterationCrossEntropy(D, V).double()
    flat = torch.cat([s.flatten(0, 1) for s in states]).detach()
    plain = criterion(flat, rows, targets)
    full = criterion(states, rows, targets, torch.full((7,), 1 / 7), iteration, 5)
    assert_bitwise("loss", plain.loss, full.loss)
    assert plain.counts.tolist() == [6]
    assert full.counts.tolist() == [2, 2, 2, 0, 0]
    assert full.accuracy[3:].tolist() == [0, 0]  # and not NaN


def test_no_rows() -> None:
    _, states, rows, *_ = inputs()
    criterion = IterationCrossEntropy(D, V).double()
    got = criterion(states, rows[:0], rows[:0], iterations=2)
    got.loss.backward()
    assert got.loss.item() == 0 and got.accuracy.tolist() == [0, 0]
    assert not criterion.head.weight.grad.any()


def test_bad_input() -> None:
    _, states, rows, _, targets, weights = inputs()
    criterion = IterationCrossEntropy(D, V).double()
    with pytest.raises(ValueError, match=r"weights \(6,\) must have one entry for each of the 7"):
        criterion(states, rows, targets, weights[:6])
    with pytest.raises(ValueError, match="must both be"):
        criterion(states, rows, targets[:6], weights)
    with pytest.raises(ValueError, match="label_smoothing = 1.5"):
        IterationCrossEntropy(D, V, label_smoothing=1.5)
    with pytest.raises(ValueError, match="z_loss = -1"):
        IterationCrossEntropy(D, V, z_loss=-1)
    with pytest.raises(ValueError, match="norm = 'rmsnorm' is unknown: use one of"):
        IterationCrossEntropy(D, V, norm="rmsnorm")
    with pytest.raises(ValueError, match="bias = True needs norm = .layer."):
        IterationCrossEntropy(D, V, bias=True)
    with pytest.raises(ValueError, match="give their number too"):
        criterion(states, rows, targets, iteration=torch.zeros(7, dtype=torch.int64))
    with pytest.raises(ValueError, match="target 11 is outside of the vocabulary of 11"):
        criterion(states, rows, targets + 1)
