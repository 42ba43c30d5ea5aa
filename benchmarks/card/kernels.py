"""Kernels' times: forward, backward, both, beside eager, torch.compile and peers, with the floor.

The floor of an op is the larger of FLOPs over the measured matmul rate and fewest bytes over the
measured copy rate. Calls run as CUDA graphs where they can be captured, so launches cost nothing;
peers and compiled functions alike.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.card.cases import Case, Draw
from benchmarks.card.device import Timer, graphed
from benchmarks.card.peers import Function, installed
from benchmarks.card.session import Row
from relay_fast.functional import select

Calls = dict[str, Callable[[], object]]


def compiled(function: Callable, device: str, **options) -> Callable:
    """torch.compile; on a CPU without code generation, which is not what is rehearsed."""
    backend = {} if device == "cuda" else {"backend": "aot_eager"}
    if backend:
        options.pop("mode", None)
    return torch.compile(function, dynamic=False, **backend, **options)


def own_calls(case: Case, inputs: SimpleNamespace, device: str) -> tuple[Calls, tuple[int, int]]:
    """Our kernels by direction, and the fewest bytes of forward and backward."""
    ops = select("triton", device)
    out = case.forward(ops, inputs)
    calls = {"forward": lambda: case.forward(ops, inputs)}
    grads = {}
    if case.backward is not None:
        grads = case.backward(ops, inputs, out)
        calls["backward"] = lambda: case.backward(ops, inputs, out)
        calls["both"] = lambda: case.backward(ops, inputs, case.forward(ops, inputs))
    if case.both is not None:
        calls["both"] = lambda: case.both(ops, inputs)
    return calls, case.bytes(inputs, out, grads)


def autograd_calls(function: Function, inputs: SimpleNamespace, names: tuple[str, ...]) -> Calls:
    """A differentiable function by direction."""
    with torch.no_grad():
        function(inputs)

    def forward() -> Tensor:
        with torch.no_grad():
            return function(inputs)

    if not names:
        return {"forward": forward}
    values = vars(inputs)
    leaves = {name: values[name].detach().requires_grad_() for name in names}
    bound = SimpleNamespace(**(values | leaves))
    out = function(bound)
    g = torch.randn_like(out)
    tensors = tuple(leaves.values())

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, tensors, g, retain_graph=True)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(bound), tensors, g)

    for call in (backward, both):
        call()
    return {"forward": forward, "backward": backward, "both": both}


def floors(case: Case, fewest: tuple[int, int], rates: dict[str, float]) -> dict[str, float]:
    """Seconds below which no kernel gets, by direction."""
    flops = dict(zip(("forward", "backward"), case.flops, strict=True))
    moved = dict(zip(("forward", "backward"), fewest, strict=True))
    floor = {k: max(flops[k] / rates["matmul"], moved[k] / rates["copy"]) for k in flops}
    return floor | {"both": sum(floor.values())}


def time_case(case: Case, timer: Timer, rates: dict[str, float], budget: float) -> list[Row]:
    """A row a provider and direction."""
    device = timer.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    inputs = case.make(Draw(0, dtype, device))
    own, fewest = own_calls(case, inputs, device)
    floor = floors(case, fewest, rates)
    providers = {"relay_fast": own, "eager": autograd_calls(case.eager, inputs, case.leaves)}
    notes: dict[str, str] = {}
    others = {}
    if case.compiles:
        others["torch.compile"] = (compiled(case.eager, device), case.leaves)
    peers, absent = installed(case)
    for name, (function, leaves) in (others | peers).items():
        try:
            providers[name] = autograd_calls(function, inputs, leaves)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a peer that does not take the shape is no failure of ours
            notes[name] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    label = {"op": case.op, "shape": case.shape, "dtype": str(dtype).removeprefix("torch.")}
    rows: list[Row] = [
        label | {"provider": name, "direction": "", "status": "skipped", "note": note}
        for name, note in (notes | {name: "not installed" for name in absent}).items()
    ]
    for direction in own:
        calls, how, peak = {}, {}, {}
        for name, by_direction in providers.items():
            peak[name] = peak_bytes(by_direction[direction], device)
            calls[name], how[name] = graphed(by_direction[direction], device)
        seconds = timer.seconds(calls, budget / len(own))
        for name, taken in seconds.items():
            rows.append(
                label
                | {
                    "provider": name,
                    "direction": direction,
                    "seconds": f"{taken:.4g}",
                    "floor_seconds": f"{floor[direction]:.4g}",
                    "share_of_floor": f"{floor[direction] / taken:.3g}",
                    "times_eager": f"{seconds['eager'] / taken:.3g}",
                    "peak_bytes": peak[name],
                    "graph": how[name],
                }
            )
    return rows


def peak_bytes(call: Callable[[], object], device: str) -> int | str:
    """Most bytes that the call has allocated at once, beyond what was there."""
    if device != "cuda":
        return ""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
