"""Steps of several ranks as CUDA graphs: the steps of one process, whoever falls back."""

from __future__ import annotations

import threading

import pytest
import torch

from relay_fast.batch.capacity import Capacity, CapacityBatch
from relay_fast.batch.shares import share_of
from relay_fast.models.transformers import LoopedTransformer, Losses
from relay_fast.training import cuda_graph
from relay_fast.training.cuda_graph import GraphedStep
from relay_fast.training.exchange import Exchange
from relay_fast.training.optim import make_optimizer
from relay_fast.training.ranks import Ranks
from tests.support.graphed_steps import (
    batch_of,
    batches,
    make_model,
    plain_step,
    play_graphs,
    sgd,
    train,
)
from tests.support.thread_ranks import ThreadRanks, run_ranks


def graphed_training(
    ranks: ThreadRanks, model: LoopedTransformer, capacity: Capacity | None = None
) -> dict:
    """Trains a model on this rank's shares; the default capacity is that of the shares."""
    optimizer = sgd(model)
    exchange = Exchange(model, ranks)
    own = Capacity.of([share_of(batch, ranks.rank, ranks.size) for batch in batches()])
    graphed = GraphedStep(model, optimizer, capacity or own, clip=0.1, exchange=exchange)
    reasons, stops = [], []

    def step(batch):
        part = share_of(batch, ranks.rank, ranks.size)
        exchange.begin(part, stop=(len(reasons), ranks.rank) == (2, 1))
        losses = graphed(part)
        reasons.append(graphed.reason)
        stops.append(exchange.stopped_before())
        return losses

    found = train(step, model, optimizer)
    weights = [p.detach() for p in model.parameters()]
    return {"found": found, "reasons": reasons, "stops": stops, "weights": weights}


@pytest.fixture(scope="module")
def truth() -> list[float]:
    """What one process finds: losses and accuracies of each step, sums of the weights."""
    model = make_model()
    optimizer = sgd(model)
    optimizer.param_groups[0]["lr"] = torch.tensor(1e-2)  # in fp32, as for a graph
    return train(plain_step(model, optimizer), model, optimizer)


def trained(size: int, capacities: dict[int, Capacity] | None = None) -> list[dict]:
    """Trains in so many ranks; returns what each found."""
    models = [make_model() for _ in range(size)]  # here: the threads share their random numbers
    given = capacities or {}
    return run_ranks(size, lambda r: graphed_training(r, models[r.rank], given.get(r.rank)))


def agree_with(truth: list[float], by_rank: list[dict]) -> None:
    for own in by_rank:
        assert own["found"] == pytest.approx(truth, rel=1e-7)  # accuracies are in fp32
        assert own["found"][::3] == pytest.approx(truth[::3], rel=1e-12)  # losses are not
        assert all(map(torch.equal, own["weights"], by_rank[0]["weights"]))
        assert own["stops"] == [False] * 3 + [True] + [False] * 5  # a step after the request


@pytest.mark.parametrize("size", [2, 3])
def test_graphs_before_and_after_the_message(size: int, truth, monkeypatch) -> None:
    play_graphs(monkeypatch)
    by_rank = trained(size)
    agree_with(truth, by_rank)
    for own in by_rank:  # the fifth batch exceeds the capacity of a rank, not of all
        assert own["reasons"][:3] == [f"warming up, step {k} of 3" for k in (1, 2, 3)]
        assert own["reasons"][3] is None and own["reasons"][5:] == [None] * 4
    assert any("longest sequence" in (own["reasons"][4] or "") for own in by_rank)


def test_a_rank_whose_batches_never_fit(truth, monkeypatch) -> None:
    play_graphs(monkeypatch)
    small = Capacity((64,), (9,), (99,), 9, 99)
    by_rank = trained(2, {1: small})
    agree_with(truth, by_rank)
    assert by_rank[0]["reasons"][5:] == [None] * 4
    assert any("times, the capacity is 1" in (r or "") for r in by_rank[1]["reasons"])


def test_no_rank_replays_the_update_if_one_cannot(truth, monkeypatch) -> None:
    play_graphs(monkeypatch)
    updates = []

    def captured(body):
        if threading.current_thread().name == "rank 1":
            raise RuntimeError("no room\nfor it")
        return lambda: (updates.append(body), body())[1]

    monkeypatch.setattr(cuda_graph, "captured", captured)
    by_rank = trained(2)
    agree_with(truth, by_rank)
    reason = by_rank[1]["reasons"][5]
    assert reason.startswith("the step could not be captured: no room for it (at raise ")
    assert by_rank[1]["reasons"][5:] == [reason] * 4
    assert by_rank[0]["reasons"][5:] == [f"rank 1: {reason}"] * 4  # computed by graph, then eager
    assert {body.__name__ for body in updates} == {"<lambda>"}


def test_static_shares_draw_the_random_numbers_of_their_batch() -> None:
    model = make_model(dropout=0.3, state_noise=0.1, loop_norm="post")
    static = CapacityBatch(Capacity.of(batches(), slack=0.5), "cpu")

    def drawn(parts) -> tuple[list[torch.Tensor], int]:
        model.zero_grad()
        for part in parts:
            torch.manual_seed(7)
            model.loss(part).loss.backward()
        after = int(torch.randint(2**31, ()))
        return [p.grad.clone() for p in model.parameters()], after

    def loaded(batch):
        static.load(batch)
        return static.batch

    for batch in batches():
        whole, after = drawn([batch])
        shares = (loaded(share_of(batch, k, 2)) for k in range(2))
        found, also = drawn(shares)
        assert after == also
        for one, other in zip(whole, found, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_a_model_that_grows_and_a_parameter_without_gradient() -> None:
    def step(ranks):
        own = torch.nn.ModuleList([torch.nn.Linear(2, 1, bias=False)])
        exchange, batch = Exchange(own, ranks), batch_of([3, 2], [1, 1])
        losses = Losses(*torch.arange(1.0, 6.0))
        exchange.begin(batch, stop=False)
        own[0].weight.grad = torch.full((1, 2), 1.0 + ranks.rank)
        first = exchange(losses)
        own.append(torch.nn.Linear(2, 1, bias=False))
        exchange.begin(batch, stop=False)
        own[0].weight.grad = None
        own[1].weight.grad = torch.full((1, 2), 2.0) if ranks.rank else None
        exchange(losses)
        return first, [p.grad.tolist() for p in own.parameters()]

    for losses, grads in run_ranks(2, step):
        assert [value.item() for value in losses] == [2, 4, 6, 4, 5]
        assert grads == [[[0.0, 0.0]], [[2.0, 2.0]]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_graphs_around_a_message_over_nccl(tmp_path) -> None:
    """A group of one rank, which NCCL adds up all the same, with its thread that watches."""
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("nccl", init_method=store, rank=0, world_size=1)

    class One(Ranks):
        alone = False

    def run(graphed: bool) -> list[float]:
        model = make_model("triton", dropout=0.1).to("cuda")
        optimizer = make_optimizer(model, lr=1e-2, muon_lr=1e-2)
        torch.manual_seed(0)
        if not graphed:
            return train(lambda b: plain_step(model, optimizer)(b.to("cuda")), model, optimizer)
        exchange = Exchange(model, One())
        capacity = Capacity.of(batches())
        step = GraphedStep(model, optimizer, capacity, clip=0.1, exchange=exchange)

        def take(batch):
            exchange.begin(batch, stop=False)
            return step(batch)

        found = train(take, model, optimizer)
        assert step.reason is None
        return found

    try:
        assert run(True) == pytest.approx(run(False), rel=1e-4)
    finally:
        torch.distributed.destroy_process_group()
