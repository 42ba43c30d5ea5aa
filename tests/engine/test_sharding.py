"""fully_shard in every arrangement: two processes get the gradients of one, to 1e-12."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import relay_fast
from relay_fast import LoopedBlock, LoopedTransformer, PackedBatch
from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.engine import loop as engine_loop
from relay_fast.models import looped_block
from relay_fast.tasks import Vocabulary, build_tasks

D = 16
X = torch.randn(2, 2, 3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Residual(nn.Module):
    """A module for relay_fast.loop."""

    def __init__(self):
        super().__init__()
        self.up, self.norm = nn.Linear(D, 2 * D), nn.LayerNorm(D)
        self.mlp = nn.Sequential(nn.GELU(), nn.Linear(2 * D, D))

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(h + self.mlp(self.up(h)))


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.entry, self.block = nn.Linear(D, D), LoopedBlock(D, 2, 2, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.entry(x), [3, 2])


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double()


def with_called_part(**options) -> nn.Module:
    model = Net(**options)
    model.block.layers[0].qkv.__class__ = Own
    model.block.layers[1].register_forward_hook(lambda *_: None)
    return model


layers = lambda m: [*m.block.layers]
# Name: the model, what is sharded beneath it, and whether it is sharded itself.
NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Sequence], bool]] = {
    "root": (Net, lambda m: [], True),
    "block": (Net, lambda m: [m.block], True),
    "layers": (Net, layers, True),
    "layers and block": (Net, lambda m: [*layers(m), m.block], True),
    "layers only": (Net, lambda m: [*layers(m), m.entry], False),
    "layers together": (Net, lambda m: [layers(m)], True),
    "parts": (Net, lambda m: [m.block.layers[0].qkv, m.block.layers[1].norm1], True),
    "none": (lambda: Net(recompute="none"), layers, True),
    "sqrt": (lambda: Net(recompute="sqrt"), layers, True),
    "called": (with_called_part, lambda m: [m.block.layers[0].qkv, *layers(m)], True),
    "called, none": (lambda: with_called_part(recompute="none"), layers, True),
}  # fmt: skip
MODULES = {
    "root": (lambda m: [], True),
    "parts": (lambda m: [m.up, m.mlp], True),
    "parts only": (lambda m: [m.up, m.mlp, m.norm], False),
}


def sharded(model: nn.Module, parts: Callable, root: bool, mesh, **options) -> nn.Module:
    for part in parts(model):
        fully_shard(part, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options) if root else model


def outcome(model: nn.Module, call: Callable, steps: int = 1) -> list[Tensor]:
    for _ in range(steps):
        model.zero_grad()
        out = call(model)
        (out.square().sum() if isinstance(out, Tensor) else out.loss).backward()
    whole = lambda g: g.full_tensor() if hasattr(g, "full_tensor") else g
    first = out if isinstance(out, Tensor) else out.loss
    return [first.detach(), *(whole(p.grad) for p in model.parameters())]


def compare(make: Callable, shard: Callable, calls: Sequence[Callable], rank: int) -> float:
    """Returns the largest error, relative to each tensor's largest element."""
    of_each = [outcome(made(make), call) for call in calls]
    truth = [(a + b) / 2 for a, b in zip(*of_each, strict=True)]
    truth[0] = of_each[rank][0]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", r".*FSDP(LoopedBlock|Layer)\) returned a view")
        got = outcome(shard(made(make)), calls[rank], steps=2)
    errors = ((a - b).abs().max() / b.abs().max() for a, b in zip(got, truth, strict=True))
    return float(max(errors))


def whole_bytes(model: nn.Module) -> int:
    """Bytes of the parameters that are not sharded now."""
    return sum(p.nbytes for p in model.parameters() if type(p).__name__ != "DTensor")


def memory(name: str, mesh) -> list[int]:
    """Bytes of whole parameters: before, in, after the loop's forward, and in its backward."""
    model, seen = sharded(made(Net), *NETS[name][1:], mesh), []
    model.entry.register_forward_hook(lambda *_: seen.append(whole_bytes(model)))

    def spy(function: Callable) -> Callable:
        def wrapped(*args):
            seen.append(whole_bytes(model))
            return function(*args)

        return wrapped

    with (
        mock.patch.object(looped_block, "run_loop", spy(looped_block.run_loop)),
        mock.patch.object(engine_loop, "backward_pass", spy(engine_loop.backward_pass)),
    ):
        out = model(X[0])
        seen.append(whole_bytes(model))
        out.sum().backward()
    return [*seen, whole_bytes(model)]


def mixed(rank: int, mesh) -> list[bool]:
    """What the mixed-precision policy says of parameters and inputs happens to the loop's."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    x, results = X[rank].float(), []
    for make, call in (
        (lambda: LoopedBlock(D, 2, 2), lambda m, x: m(x, 3)),
        (Residual, lambda m, x: relay_fast.loop(m, x, 3)),
    ):
        model, plain = (made(make).float() for _ in range(2))
        parts = (lambda m: m.layers) if isinstance(model, LoopedBlock) else (lambda m: [m.up])
        sharded(model, parts, True, mesh, mp_policy=policy)
        out, truth = call(model, x), call(plain.bfloat16(), x.bfloat16())
        out.sum().backward()
        results.append(torch.equal(out, truth) and out.dtype == torch.bfloat16)
    return results


def batches() -> list[PackedBatch]:
    tasks = build_tasks(["arithmetic"], Vocabulary())
    sample = lambda seed: tasks["arithmetic"].sample(np.array([2, 3]), seed)
    return [PackedBatch.looped(sample(seed), tasks) for seed in range(2)]


def transformer() -> nn.Module:
    return LoopedTransformer(ModelConfig(BlockConfig(D, 2, 2), Vocabulary().size))


def worker(rank: int, folder: str, prepared: list[PackedBatch]) -> None:
    torch.set_num_threads(1)
    address = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    mesh, found = init_device_mesh("cpu", (2,)), {}
    nets = [lambda m, x=x: m(x) for x in X]
    for name, (make, *how) in NETS.items():
        found[name] = compare(make, lambda m, how=how: sharded(m, *how, mesh), nets, rank)
    twice = [lambda m, x=x: m(x) + m(2 * x) for x in X]
    found["twice"] = compare(Net, lambda m: sharded(m, layers, True, mesh), twice, rank)
    for policy in ("none", "state", "sqrt"):
        calls = [lambda m, x=x, p=policy: relay_fast.loop(m, x, [3, 2], recompute=p) for x in X]
        for name, how in MODULES.items():
            found[f"loop, {name}, {policy}"] = compare(
                Residual, lambda m, how=how: sharded(m, *how, mesh), calls, rank
            )
    losses = [lambda m, b=batch: m(b) for batch in prepared]
    parts = lambda m: [*layers(m), m.block, m.norm, m.chain_head, m.answer_head]
    found["transformer"] = compare(
        transformer, lambda m: sharded(m, parts, True, mesh), losses, rank
    )
    bytes_ = {name: memory(name, mesh) for name in ("root", "block", "layers")}
    result = {"errors": found, "bytes": bytes_, "mixed": mixed(rank, mesh)}
    torch.save(result, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    folder = str(tmp_path_factory.mktemp("sharding"))
    context = mp.get_context("fork")
    prepared = batches()
    workers = [context.Process(target=worker, args=(r, folder, prepared)) for r in range(2)]
    try:
        for process in workers:
            process.start()
        for process in workers:
            process.join(timeout=240)
        assert all(process.exitcode == 0 for process in workers), "the workers fail or hang"
    finally:
        for process in workers:
            process.kill()
    return [torch.load(f"{folder}/{r}.pt") for r in range(2)]


def test_gradients_of_one_process(results) -> None:
    for result in results:
        assert len(result["errors"]) == len(NETS) + 3 * len(MODULES) + 2
        assert max(result["errors"].values()) <= 1e-12, result["errors"]


def test_which_parameters_are_whole_and_when(results) -> None:
    """The table of `relay_fast.engine.wrappers`."""
    model = made(Net)
    block, rest = (sum(p.nbytes for p in m.parameters()) for m in (model.block, model.entry))
    alone = [rest, block + rest, rest, block + rest, 0]
    assert results[0]["bytes"] == {
        "root": [block + rest] * 4 + [0],
        "block": alone,
        "layers": alone,
    }


def test_mixed_precision(results) -> None:
    assert all(all(result["mixed"]) for result in results)


def test_sharded_weights_are_refused_where_nothing_gathers_them(tmp_path) -> None:
    start = {"init_method": f"file://{tmp_path}/store", "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **start)
    try:
        model = fully_shard(transformer(), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(RuntimeError, match=r"layers.0.norm1.weight is still sharded"):
            model.predict_rounds(batches()[0])
    finally:
        dist.destroy_process_group()
