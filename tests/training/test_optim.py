"""MuonAdamW keeps the contract of torch's AdamW: for its Muon groups as for the others."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from relay_fast import LoopedBlock
from relay_fast.training import optim
from relay_fast.training.optim import MuonAdamW, make_optimizer, set_lr_scale


def make(**options) -> tuple[LoopedBlock, MuonAdamW]:
    torch.manual_seed(0)
    block = LoopedBlock(16, 2, 1)
    return block, make_optimizer(block, lr=1e-2, muon_lr=2e-2, **options)


def loss_of(block: nn.Module, seed: int) -> Tensor:
    x = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(seed))
    return block(x, 2).square().mean()


def step(block: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    loss_of(block, seed).backward()
    optimizer.step()


def values(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def two_groups(**options) -> tuple[nn.Parameter, nn.Parameter, MuonAdamW]:
    """A Muon matrix and an AdamW vector, with gradients of 1 … n."""
    matrix, vector = nn.Parameter(torch.eye(4)), nn.Parameter(torch.ones(4))
    groups = [{"params": [vector]}, {"params": [matrix], "muon": True, "weight_decay": 0.1}]
    optimizer = MuonAdamW(groups, lr=0.1, **options)
    for p in (matrix, vector):
        p.grad = torch.arange(1.0, 1 + p.numel()).view_as(p)
    return matrix, vector, optimizer


def test_the_closure_comes_first_and_its_loss_is_returned() -> None:
    block, optimizer = make()
    wanted, plain = make()
    for seed in range(3):

        def closure() -> Tensor:
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = loss_of(block, seed)  # noqa: B023 (called at once)
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        assert loss.item() == loss_of(wanted, seed).item()
        step(wanted, plain, seed)
    assert equal(values(block), values(wanted))


def test_hooks_run_once_and_gradients_stay() -> None:
    torch.optim.AdamW([nn.Parameter(torch.ones(1))])  # AdamW.step now runs hooks by itself
    block, optimizer = make()
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    step(block, optimizer, 0)
    assert seen == ["before", "after"]
    assert all(p.grad is not None for p in block.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in block.parameters())


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("carry", [copy.deepcopy, through_a_file])
def test_a_state_dict_resumes(carry) -> None:
    block, optimizer = make()
    step(block, optimizer, 0)
    step(block, optimizer, 1)
    weights, state = copy.deepcopy(block.state_dict()), carry(optimizer.state_dict())
    for own in state["state"].values():
        assert torch.is_tensor(own["step"]) and float(own["step"]) == 2
    step(block, optimizer, 2)
    resumed, other = make()
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    step(resumed, other, 2)
    assert equal(values(resumed), values(block))


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_step_alike(twin) -> None:
    block, optimizer = make()
    step(block, optimizer, 0)
    twin_block, twin_optimizer = twin((block, optimizer))
    assert isinstance(twin_optimizer, MuonAdamW)
    step(block, optimizer, 1)
    step(twin_block, twin_optimizer, 1)
    assert equal(values(block), values(twin_block))
    assert not equal(values(block), values(make()[0]))


def test_a_state_from_before_steps_were_counted_is_taken() -> None:
    block, optimizer = make()
    step(block, optimizer, 0)
    state = copy.deepcopy(optimizer.state_dict())
    for own in state["state"].values():
        if "momentum" in own:
            del own["step"]
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert float(optimizer.state[p]["step"]) == (0 if group.get("muon") else 1)
    step(block, optimizer, 1)


def test_distributed_checkpoints_take_it() -> None:
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    block, optimizer = make()
    step(block, optimizer, 0)
    model_state, state = copy.deepcopy(get_state_dict(block, optimizer))
    step(block, optimizer, 1)
    other, other_optimizer = make()
    set_state_dict(other, other_optimizer, model_state_dict=model_state, optim_state_dict=state)
    step(other, other_optimizer, 1)
    assert equal(values(other), values(block))


def test_a_scaler_that_found_inf_skips_the_muon_step_too() -> None:
    found = []
    for inf in (False, True):
        matrix, vector, optimizer = two_groups(fused=True)
        assert optimizer._step_supports_amp_scaling
        wanted, wanted_vector, plain = two_groups(fused=True)
        plain.step()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(torch.zeros(()))  # makes the scale
        for p in (matrix, vector):
            p.grad *= 1024
        if inf:
            vector.grad[0] = torch.inf  # in AdamW's part: no part may step
        before = [p.detach().clone() for p in (matrix, vector)]
        scaler.step(optimizer)
        scaler.update()
        goal = before if inf else [wanted, wanted_vector]
        for p, q in zip((matrix, vector), goal, strict=True):
            assert torch.allclose(p, q, rtol=1e-6)
            assert float(optimizer.state[p]["step"]) == (0 if inf else 1)
        found.append(scaler.get_scale())
        momentum = optimizer.state[matrix]["momentum"]
        goal = torch.zeros(4, 4) if inf else plain.state[wanted]["momentum"]
        assert torch.allclose(momentum, goal)
    assert found == [1024.0, 512.0]


def test_maximize_climbs() -> None:
    down, _, plain = two_groups()
    up, _, climbing = two_groups(maximize=True)
    up.grad.neg_()
    plain.step()
    climbing.step()
    assert torch.equal(up, down)


@pytest.mark.parametrize("kind", ["foreach", "capturable", "fused", "amsgrad"])
def test_every_form_steps_alike(kind) -> None:
    plain, _, reference = two_groups()
    # A capturable step is for accelerators; what Muon does of it runs everywhere.
    options = {} if kind == "capturable" else {kind: True}
    p, vector, optimizer = two_groups(**options)
    if kind == "capturable":
        vector.grad = None
        optimizer.param_groups[1]["capturable"] = True
    for one in (reference, optimizer):
        one.step()
        one.step()
    assert torch.allclose(p, plain, rtol=1e-6)
    assert float(optimizer.state[p]["step"]) == 2


def test_groups_can_be_added_and_are_checked() -> None:
    matrix, _, optimizer = two_groups()
    more = nn.Parameter(torch.eye(4))
    optimizer.add_param_group({"params": [more], "muon": True, "lr": 0.1, "weight_decay": 0.1})
    more.grad = matrix.grad.clone()
    optimizer.step()
    assert torch.equal(more, matrix)
    for wrong, parts in ((torch.ones(4), 1), (torch.ones(4, 4), 3)):
        with pytest.raises(ValueError, match="is not a stack of . real matrices"):
            group = {"params": [nn.Parameter(wrong)], "muon": True, "parts": parts}
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 3


def test_numbers_of_numpy_leave_a_state_that_any_torch_loads() -> None:
    block = LoopedBlock(16, 2, 1)
    numbers = {"lr": np.float64(1e-2), "muon_lr": np.float32(2e-2), "weight_decay": np.float64(0.5)}
    optimizer = make_optimizer(
        block, betas=np.array([0.9, 0.5]), momentum=np.float64(0.5), **numbers
    )
    set_lr_scale(optimizer, np.float64(0.5))
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(6, 2))], "muon": True,
                               "parts": np.int64(3), "momentum": np.float32(0.25)})  # fmt: skip
    torch.save(optimizer.state_dict(), buffer := io.BytesIO())
    buffer.seek(0)
    first, *_, last = torch.load(buffer, weights_only=True)["param_groups"]
    assert (first["lr"], first["betas"], first["weight_decay"]) == (5e-3, (0.9, 0.5), 0.0)
    assert (last["parts"], last["momentum"]) == (3, 0.25)
    with pytest.raises(ValueError, match="parts = 0: it must be at least 1"):
        optimizer.add_param_group(
            {"params": [nn.Parameter(torch.eye(2))], "muon": True, "parts": 0}
        )


def test_no_gradient_no_step_and_sparse_ones_are_refused() -> None:
    matrix, vector, optimizer = two_groups()
    matrix.grad = None
    optimizer.step()
    assert torch.equal(matrix, torch.eye(4)) and matrix not in optimizer.state
    matrix.grad = torch.eye(4).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


def test_an_averaged_model_follows() -> None:
    block, optimizer = make()
    average = AveragedModel(block)
    start = values(block)
    step(block, optimizer, 0)
    average.update_parameters(block)
    step(block, optimizer, 1)
    average.update_parameters(block)
    assert int(average.n_averaged) == 2
    for p, a in zip(block.parameters(), average.module.parameters(), strict=True):
        assert not torch.equal(p, a)
    assert not equal(values(average.module), start)


def test_matrices_of_one_shape_are_orthogonalized_together(monkeypatch) -> None:
    """Also their transposes, and the parts of a stack; each becomes what it would be alone."""
    shapes = [(6, 9), (9, 6), (6, 9), (6, 6), (9, 6)]
    updates = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    batches = []
    own = optim.orthogonalize
    monkeypatch.setattr(optim, "orthogonalize", lambda m: batches.append(m.shape) or own(m))
    changes = optim.orthogonalize_all(updates)
    assert batches == [(4, 6, 9), (1, 6, 6)]
    for change, update in zip(changes, updates, strict=True):
        rows, columns = update.shape
        truth = own(update) * max(1.0, rows / columns) ** 0.5
        assert change.shape == update.shape and change.dtype == update.dtype
        assert torch.allclose(change, truth, rtol=0, atol=1e-12)
    (stacked,) = optim.orthogonalize_all([torch.cat((updates[0], updates[2]))], parts=2)
    assert torch.allclose(stacked, torch.cat((changes[0], changes[2])), rtol=0, atol=1e-12)
