"""Static batches compute what the batches in them do, whatever was in them before; and a step over
them never asks the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import task_batch
from benchmarks.numerics import assert_close
from relay_fast.batch.capacity import Capacity, CapacityBatch
from relay_fast.batch.packed import PackedBatch
from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.models.transformers import AutoregressiveTransformer, LoopedTransformer
from relay_fast.training import cuda_graph
from relay_fast.training.cuda_graph import GraphedStep, graph_reason
from relay_fast.training.optim import make_optimizer
from tests.support.chain_models import TASKS, mixed_problems
from tests.support.fresh_python import run_fresh
from tests.support.graphed_steps import (
    batch_of,
    batches,
    make_model,
    plain_step,
    play_graphs,
    sgd,
    train,
)


def gradients(model: LoopedTransformer, batch: PackedBatch) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(1)  # of the dropout masks
    losses = model.loss(batch)
    losses.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {"loss": losses.loss.detach(), "answer": losses.answer} | grads


@pytest.mark.parametrize(
    "options",
    [
        {"recompute": "none"},
        {"recompute": "every:2"},
        {"recompute": "last:1", "causal": True, "n_kv_heads": 1, "norm": "layer", "bias": True},
        {"loop_norm": "pre", "injection": "concat", "max_loops": 9, "activation": "swiglu"},
        {"loop_norm": "post", "injection": "add", "dropout": 0.3, "state_noise": 0.1},
        {
            "head_dim": 12,
            "sandwich_norm": True,
            "rotary_share": 0.5,
            "rope_frequencies": (1.0, 0.1, 0.01),
            "bias": ("qkv",),
            "dropout": 0.3,
        },
    ],
)
def test_a_static_batch_computes_what_the_batch_does(options: dict) -> None:
    model = make_model(**options)
    static = CapacityBatch(Capacity.of(batches(), slack=0.5), "cpu")
    for batch in batches():
        truth = gradients(model, batch)
        static.load(batch)
        for name, value in gradients(model, static.batch).items():
            assert_close(name, value, truth[name], 1e-12)


def test_the_papers_mix_and_the_autoregressive_model() -> None:
    rounds = [task_batch("multitask", 5, seed, "cpu")[0] for seed in range(2)]
    texts = [PackedBatch.autoregressive(mixed_problems(number), TASKS) for number in (2, 3)]
    config = ModelConfig(BlockConfig(8, 2, 1, causal=True), 320)
    for kind, drawn in ((LoopedTransformer, rounds), (AutoregressiveTransformer, texts)):
        model, static = (
            kind(config, impl="torch").double(),
            CapacityBatch(Capacity.of(drawn), "cpu"),
        )
        for batch in drawn:
            truth = gradients(model, batch)
            static.load(batch)
            for name, value in gradients(model, static.batch).items():
                assert_close(name, value, truth[name], 1e-12)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loop_norm": "post", "state_noise": 0.1},
        {"loop_norm": "pre"},
        {"head_dim": 24, "qk_norm": True, "sandwich_norm": True, "dropout": 0.3},
        {"injection": "add", "max_loops": 4, "bias": True},
        {"injection": "concat", "max_loops": 4, "loop_norm": "pre", "norm": "layer", "bias": True},
    ],
    ids=str,
)
def test_kernels_leave_dead_rows_out(options: dict) -> None:
    """What a kernel does not write stays NaN here, and none of it comes through."""
    model = make_model("triton", **{"d_model": 16, "n_heads": 1, "n_layers": 1, **options})
    static = CapacityBatch(Capacity.of([batch_of([3, 2], [2, 1]), batch_of([6], [1])], 0.5), "cpu")
    static.load(batch_of([6], [1]))
    batch = batch_of([3, 2], [2, 1], seed=3)
    truth = gradients(model, batch)
    static.load(batch)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is allocated with NaN
    try:
        value = gradients(model, static.batch)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, v in value.items():
        assert_close(name, v, truth[name], 1e-5)


class Recorded(TorchDispatchMode):
    """Every op with its shapes; none may read a tensor back or bring one from the host."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        assert not name.startswith(("_local_scalar", "nonzero", "unique", "equal")), name
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        assert len({t.device.type for t in tensors}) <= 1, f"{name} mixes devices"
        self.ops.append((name, tuple(tuple(t.shape) for t in tensors)))
        return func(*args, **(kwargs or {}))


def whole_step(model: LoopedTransformer, batch: PackedBatch) -> list[tuple]:
    with Recorded() as recorded:
        model.zero_grad()
        model.loss(batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return recorded.ops


def test_every_batch_is_the_same_ops_on_the_same_shapes() -> None:
    model, static = make_model(dropout=0.1), CapacityBatch(Capacity.of(batches()), "cpu")
    seen = []
    for batch in batches():
        static.load(batch)
        seen.append(whole_step(model, static.batch))
    assert seen[0] == seen[1] == seen[2] == seen[3]
    assert whole_step(model, batches()[0]) != whole_step(model, batches()[1])


def test_a_step_brings_nothing_from_the_host() -> None:
    """On meta tensors a read-back raises, and a tensor from the host is seen."""
    model = make_model(dropout=0.1).to("meta")
    ops = whole_step(model, CapacityBatch(Capacity.of(batches()), "meta").batch)
    assert len(ops) > 500


KERNELS_ON_META = """
import os, sys
os.environ.pop("TRITON_INTERPRET", None)
import torch
from benchmarks.card.profile import traced
from tests.training.test_cuda_graph import Recorded, batches, make_model
from relay_fast.batch.capacity import Capacity, CapacityBatch
model = make_model("triton", d_model=32, dropout=0.1).to("meta")
static = CapacityBatch(Capacity.of(batches()), "meta")
with Recorded(), traced() as trace:
    model.loss(static.batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
from tests.support.host_copies import HostCopies
with HostCopies() as copies, traced():
    model.loss(batches()[0].to("meta")).loss.backward()
assert (copies.all, copies.blocking) == (1, 0), vars(copies)
parts = trace.parts
# 4 iterations of 2 layers, forward twice and backward once; four weights a layer and the two heads
assert parts["_mlp_fwd_kernel"].launches == 16 == 2 * parts["_mlp_bwd_kernel"].launches, parts
assert parts["_weight_grad_kernel"].launches == 4 * 2 * 4 + 2, parts
"""


def test_kernels_bring_nothing_from_the_host_either() -> None:
    """The launchers on meta tensors, their launches recorded instead of made."""
    done = run_fresh(KERNELS_ON_META)
    assert done.returncode == 0, done.stderr[-2000:]


def test_capacity_of_batches_by_hand() -> None:
    capacity = Capacity.of(batches(), slack=0.0)
    assert capacity.active == (4, 3, 2, 1)
    assert capacity.rows == (64, 64, 64, 64)  # 16, 13, 8, 7 in whole blocks
    assert capacity.targets == (7, 5, 4, 2)
    assert (capacity.sequences, capacity.longest) == (4, 7)
    assert capacity.token_iterations == 256
    assert Capacity.of([batch_of([100], [1])], slack=0.3).rows == (192,)


def test_a_capacity_in_depths() -> None:
    capacity = Capacity.of(batches(), slack=0.0)
    two, three, four = capacity.depths(3)
    assert (two.active, three.active) == ((4, 3), (4, 3, 2)) and four == capacity
    assert (two.rows, two.targets) == ((64, 64), (7, 5)) and two.sequences == 4
    assert capacity.depths(1) == [capacity] and len(capacity.depths(9)) == 4
    with pytest.raises(ValueError, match="depths = 0: give 1 or more"):
        capacity.depths(0)
    model, batch = make_model(), batches()[2]
    truth, static = gradients(model, batch), CapacityBatch(two, "cpu")
    static.load(batch)
    for name, value in gradients(model, static.batch).items():
        assert_close(name, value, truth[name], 1e-12)


def test_every_depth_is_warmed_up_before_its_capture(monkeypatch) -> None:
    play_graphs(monkeypatch)
    model = make_model()
    step, reasons = GraphedStep(model, sgd(model), Capacity.of(batches())), []
    for which in (0, 0, 0, 2, 2):
        step(batches()[which])
        reasons.append(step.reason)
    assert reasons == [
        *(f"warming up, step {k} of 3" for k in (1, 2, 3)), "warming up 2 iterations", None
    ]  # fmt: skip


def test_weights_replaced_after_the_capture_are_refused(monkeypatch) -> None:
    """A graph trains the memory that it was captured with; what changes in place is in it."""
    play_graphs(monkeypatch)
    model = make_model()
    step = GraphedStep(model, sgd(model), Capacity.of(batches()))
    for _ in range(4):
        step(batches()[0])
    with torch.no_grad():
        model.chain_head.weight.mul_(2)
    step(batches()[0])
    assert step.reason is None
    model.chain_head.weight.data = model.chain_head.weight.data.clone()
    with pytest.raises(RuntimeError, match="replaced after a step .* make a new GraphedStep$"):
        step(batches()[0])


def test_a_spread_makes_room_for_other_draws() -> None:
    rng = np.random.default_rng(0)

    def drawn():
        loops = rng.choice(30, 256, p=np.arange(1, 31) / 465) + 1  # few sequences loop longest
        return batch_of((40 + loops).tolist(), loops.tolist())

    measured, others = [drawn() for _ in range(12)], [drawn() for _ in range(60)]
    larger = lambda capacity: sum(capacity.reason(b) is not None for b in others)
    tight, roomy = Capacity.of(measured, 0.05), Capacity.of(measured, 0.05, 2.0)
    assert larger(tight) >= 4 and larger(roomy) == 0
    assert roomy.token_iterations < 1.3 * tight.token_iterations
    assert all(a <= roomy.sequences for a in roomy.active)
    model = make_model()
    few = [batch_of([100, 60, 50], [3, 2, 1]), batch_of([1, 90], [3, 2])]
    capacity = Capacity.of(few, 0.0, 2.0)  # fewer sequences, each with much more room: in order
    assert capacity.rows == tuple(sorted(capacity.rows, reverse=True))
    static = CapacityBatch(capacity, "cpu")
    for batch in few:
        truth = gradients(model, batch)
        static.load(batch)
        for name, value in gradients(model, static.batch).items():
            assert_close(name, value, truth[name], 1e-12)


def test_what_does_not_fit_is_named() -> None:
    capacity = Capacity((64, 64), (3, 2), (6, 2), 3, 10)
    for lengths, loops, reason in (
        ([1], [3], "loops 3 times, the capacity is 2"),
        ([1] * 4, [1, 0, 0, 0], "4 sequences, the capacity is 3"),
        ([11], [1], "11 tokens in its longest sequence, the capacity is 10"),
        ([1] * 3, [2] * 3, "3 active sequences in iteration 2, the capacity is 2"),
        ([2, 2], [2, 2], "4 targets in iteration 2, the capacity is 2"),
    ):
        batch = batch_of(lengths, loops)
        assert reason in capacity.reason(batch)
        with pytest.raises(ValueError, match=r"larger one with Capacity.of\(batches, slack\)"):
            CapacityBatch(capacity, "cpu").load(batch)
    assert "70 rows, the capacity" in Capacity((64,), (9,), (99,), 9, 99).reason(
        batch_of([35, 35], [1, 1])
    )
    assert capacity.reason(batch_of([9, 1], [2, 1])) is None


def test_capacities_that_make_no_sense() -> None:
    with pytest.raises(
        ValueError, match="have 0, 0 and 0 entries: give one entry per iteration, at least one"
    ):
        Capacity((), (), (), 1, 1)
    with pytest.raises(ValueError, match="rows must not increase with the iteration"):
        Capacity((64, 128), (1, 1), (1, 1), 1, 1)
    with pytest.raises(ValueError, match="got no batch: give at least one"):
        Capacity.of([])
    with pytest.raises(ValueError, match="do not support truncate"):
        CapacityBatch(Capacity((64,), (1,), (1,), 1, 1), "cpu").plan.row_ranges(1, truncate=1)


def test_without_cuda_the_step_is_eager_and_says_so() -> None:
    model = make_model()
    optimizer = make_optimizer(model, lr=1e-2)
    step = GraphedStep(model, optimizer, Capacity.of(batches()), clip=0.1)
    found = train(step, model, optimizer)
    assert step.reason == "CUDA graphs need a CUDA device, the model is on 'cpu'"
    model = make_model()
    optimizer = make_optimizer(model, lr=1e-2)
    assert found == train(plain_step(model, optimizer), model, optimizer)


def test_every_batch_is_taken_once_by_warm_up_graph_or_eager_step(monkeypatch) -> None:
    play_graphs(monkeypatch)
    replayed: list[int] = []
    own = GraphedStep._own

    def watched(self, losses, batch, depth):
        if self.reason is None:
            replayed.append(depth.static.plan.max_loops)
        return own(self, losses, batch, depth)

    monkeypatch.setattr(GraphedStep, "_own", watched)
    model = make_model()
    optimizer = sgd(model)
    graphed = GraphedStep(model, optimizer, Capacity.of(batches()), clip=0.1)
    reasons = []

    def step(batch):
        losses = graphed(batch)
        reasons.append(graphed.reason)
        return losses

    found = train(step, model, optimizer)
    assert isinstance(optimizer.param_groups[0]["lr"], Tensor)
    assert reasons[:4] == [f"warming up, step {k} of 3" for k in (1, 2, 3)] + [None]
    assert "longest sequence" in reasons[4] and reasons[5:] == [None] * 4
    # Of graphs of 2, 3 and 4 iterations, the shortest that a batch of 4, 4, 3, 1 and 4 fits.
    assert replayed == [4, 4, 3, 2, 4]
    model = make_model()
    optimizer = sgd(model)
    truth = train(plain_step(model, optimizer), model, optimizer)
    assert found == pytest.approx(truth, rel=1e-6)


def test_a_failed_capture_is_told_and_the_step_taken(monkeypatch) -> None:
    monkeypatch.setattr(cuda_graph, "graph_reason", lambda *_: None)
    monkeypatch.setattr(cuda_graph, "WARM_UP", 0)

    def fails(*_) -> None:
        raise RuntimeError("x")

    monkeypatch.setattr(cuda_graph, "captured", fails)
    model = make_model()
    step = GraphedStep(model, sgd(model), Capacity.of(batches()))
    before = model.norm.weight.detach().clone()
    for batch in batches():
        step(batch)
        place = ' (at raise RuntimeError("x"), test_cuda_graph.py:'
        assert step.reason.startswith(f"the step could not be captured: x{place}")
    assert not torch.equal(before, model.norm.weight)


def test_a_batch_that_the_model_cannot_read_is_refused() -> None:
    model = make_model()
    step = GraphedStep(model, make_optimizer(model, lr=1e-2), Capacity.of(batches()))
    with pytest.raises(ValueError, match="outside the model's vocabulary"):
        step(task_batch("lis", 1, 0, "cpu")[0])


def test_optimisers_that_cannot_be_captured() -> None:
    model, cuda = make_model(), torch.device("cuda")
    assert graph_reason(cuda, make_optimizer(model, lr=1e-2)) is None
    assert graph_reason(cuda, make_optimizer(model, lr=1e-2, muon_lr=1e-2)) is None
    assert "SGD has no capturable form" in graph_reason(cuda, torch.optim.SGD(model.parameters()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_graph_takes_the_same_steps_as_eager(impl: str) -> None:
    def run(graphed: bool) -> list[float]:
        model = make_model("triton").to("cuda") if impl == "triton" else make_model().cuda()
        optimizer = make_optimizer(model, lr=1e-2)
        step = plain_step(model, optimizer)
        if graphed:
            step = GraphedStep(model, optimizer, Capacity.of(batches()), clip=0.1)
        on_card = lambda batch: step(batch.to("cuda"))
        found = train(on_card, model, optimizer)
        assert not graphed or step.reason is None
        return found

    assert run(True) == pytest.approx(run(False), rel=1e-4)
