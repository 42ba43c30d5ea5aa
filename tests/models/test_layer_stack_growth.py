"""Stacks that grow in training: which layers, optimiser state, schedule, resuming."""

import numpy as np
import pytest
import torch
from torch import nn

import relay_fast
from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.models.classifier import LoopedClassifier
from relay_fast.models.layer_stack import GrowthSchedule, grow
from relay_fast.models.looped_block import LoopedBlock
from relay_fast.models.transformers import AutoregressiveTransformer
from relay_fast.recipes._common import Training, train
from relay_fast.relay.run_folder import RunFolder
from relay_fast.reporting.progress import Display
from relay_fast.training.optim import make_optimizer


def marked(layers: int) -> LoopedBlock:
    """A stack whose layer i has i in its first norm."""
    block = LoopedBlock(8, 2, layers)
    for i, layer in enumerate(block.layers):
        nn.init.constant_(layer.norm1.weight, i)
    return block


def marks(block: LoopedBlock) -> list[int]:
    return [int(layer.norm1.weight[0]) for layer in block.layers]


@pytest.mark.parametrize(
    "start, layers, where, expected",
    [
        (1, 1, "middle", [0, 0]),
        (2, 1, "middle", [0, 0, 1]),
        (3, 1, "middle", [0, 1, 1, 2]),
        (4, 1, "middle", [0, 1, 1, 2, 3]),
        (6, 2, "middle", [0, 1, 2, 3, 2, 3, 4, 5]),
        (3, 1, "last", [0, 1, 2, 2]),
        (4, 2, "last", [0, 1, 2, 3, 2, 3]),
    ],
)
def test_which_block_is_doubled(start, layers, where, expected) -> None:
    block = marked(start)
    grow(block, layers=layers, where=where)
    assert marks(block) == expected and block.config.n_layers == len(expected)
    x = torch.randn(1, 4, 8)
    fresh = LoopedBlock(config=block.config)
    fresh.load_state_dict(block.state_dict())
    assert torch.equal(block(x), fresh(x))


@pytest.mark.parametrize("options", [{}, {"muon_lr": 0.01}, {"optimizer": "adafactor"}])
@pytest.mark.parametrize("state", ["copy", "reset"])
def test_the_optimiser_takes_the_new_layers_in(state, options) -> None:
    model = AutoregressiveTransformer(ModelConfig(BlockConfig(8, 2, 2, causal=True), 5))
    optimizer = make_optimizer(model, lr=0.1, **options)

    def step():
        optimizer.zero_grad()
        model.block(torch.randn(2, 3, 8)).square().sum().backward()
        optimizer.step()

    step()
    relay_fast.grow(model, optimizer, state=state)
    assert model.config.block.n_layers == 3
    source, new, _ = model.block.layers
    grouped = {id(p): i for i, g in enumerate(optimizer.param_groups) for p in g["params"]}
    for old_p, new_p in zip(source.parameters(), new.parameters(), strict=True):
        assert new_p is not old_p and grouped[id(new_p)] == grouped[id(old_p)]
        old, own = optimizer.state[old_p], optimizer.state.get(new_p, {})
        assert set(own) == (set(old) if state == "copy" else set())
        for key, value in own.items():
            assert torch.equal(value, old[key]) and value is not old[key]
    before = new.up.weight.clone()
    step()
    assert not torch.equal(new.up.weight, before) and new.up.weight.shape == source.up.weight.shape


def test_frozen_layers_grow_too() -> None:
    block = marked(2)
    block.requires_grad_(False)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    grow(block, optimizer)
    assert len(block.layers) == 3 and len(optimizer.param_groups[0]["params"]) == 1


def test_the_schedule() -> None:
    schedule = GrowthSchedule(1500, 4)
    assert schedule.stage_steps == (150, 300, 450, 600) and schedule.starts == (0, 150, 450, 900)
    assert [step for step in range(1500) if schedule.grows(step)] == [150, 450, 900]
    assert schedule.work == 0.75
    # Σ T_i · i / (k · T), worked out by hand
    for k, alpha, work in ((6, 0, 0.5833), (6, 1, 13 / 18), (6, 2, 0.8077), (4, 2, 0.8333)):
        assert GrowthSchedule(100_000, 4 * k, 4, alpha).work == pytest.approx(work, abs=1e-4)
    assert GrowthSchedule(3, 3, alpha=0).stage_steps == (1, 1, 1)
    assert GrowthSchedule(10, 4, 4).starts == (0,)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: GrowthSchedule(100, 4, stages=3),
            "3 stages of 1 more layers each end at 3 layers, not at the 4 of the model: use 4",
        ),
        (lambda: GrowthSchedule(100, 4, layers=2, stages=4), "end at 8 layers, not at the 4"),
        (lambda: GrowthSchedule(100, 4, layers=3), "layers = 3 does not divide depth = 4"),
        (lambda: GrowthSchedule(3, 4), "3 steps are too few for 4 stages"),
        (lambda: GrowthSchedule(20, 4, alpha=9), "20 steps are too few for 4 stages"),
        (lambda: grow(marked(3), layers=2), "layers = 2 does not divide a stack of 3 layers"),
        (lambda: grow(marked(3), where="first"), "where = 'first' is unknown"),
        (lambda: grow(marked(3), state="keep"), "state = 'keep' is unknown"),
    ],
)
def test_bad_input(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_growing_training_is_exact_after_an_interruption(tmp_path) -> None:
    schedule = GrowthSchedule(8, 3)  # grows before steps 1 and 4
    training = Training(steps=8, batch_size=2, lr=0.01, muon_lr=0.01)

    def draw(rng, step):
        return rng.integers(0, 5, (2, 4)), np.array([3, 7]), rng.integers(0, 5, 2)

    def fit(name: str, draw=draw):
        torch.manual_seed(0)
        model = LoopedClassifier(BlockConfig(8, 2, 1, causal=True), 5, loops=1)

        def before_step(step, optimizer):
            if schedule.grows(step):
                grow(model, optimizer)

        with Display() as display:
            train(
                model,
                lambda m, *batch: m.loss(*batch),
                draw,
                training,
                RunFolder(tmp_path / name, {}),
                "m",
                display,
                seed=0,
                before_step=before_step,
            )
        return model.state_dict()

    whole = fit("whole")
    assert "block.layers.2.up.weight" in whole

    def interrupted(rng, step):
        if step == 4:  # the state is that of the moment before the second growth
            raise KeyboardInterrupt
        return draw(rng, step)

    with pytest.raises(KeyboardInterrupt):
        fit("broken", interrupted)
    resumed = fit("broken")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
