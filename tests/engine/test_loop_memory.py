"""What the engine keeps between forward and backward, counted in bytes."""

from __future__ import annotations

import gc
from dataclasses import replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from benchmarks.numerics import assert_bitwise
from relay_fast.engine.loop import run_loop
from tests.support.loop_cases import Case, D, make_inputs, relay


def alive() -> dict[int, int]:
    """Bytes of every tensor storage that lives."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
    return {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if t.layout is torch.strided and not t.is_meta and not isinstance(t, FakeTensor)
    }


class Kept:
    """Bytes that autograd's saved tensors hold beyond what is the caller's own."""

    def __init__(self, own: list[Tensor]):
        self.own = {t.untyped_storage().data_ptr() for t in own}
        self.storages: dict[int, int] = {}

    def __call__(self, t: Tensor) -> Tensor:
        pointer = t.untyped_storage().data_ptr()
        if pointer not in self.own:
            self.storages[pointer] = t.untyped_storage().nbytes()
        return t


def kept_bytes(case: Case) -> int:
    inputs = make_inputs(case)
    case.plan.layout(0, 1)
    record = Kept(list(inputs.leaves.values()))
    with torch.autograd.graph.saved_tensors_hooks(record, lambda t: t):
        run = inputs.block.run(case.plan)
        final, *_ = run_loop(run, inputs.x, list(inputs.block.parameters()))
    record.storages.pop(final.untyped_storage().data_ptr(), None)  # the output itself
    return sum(record.storages.values())


def test_policies_keep_what_they_say() -> None:
    case = Case(lengths=(4, 3), loops=(9, 5))
    row = D * 8
    rows = [7] * 5 + [4] * 4  # N_t of t = 1..9
    expected = {
        "state": sum(rows[:8]),
        "every:3": rows[2] + rows[5],
        "sqrt": rows[2] + rows[5],
        "last:2": rows[6] + rows[7],
        f"budget:{11 * row}": rows[2] + rows[5],
        f"budget:{sum(rows[:8]) * row}": sum(rows[:8]),
    }
    for policy, count in expected.items():
        assert kept_bytes(replace(case, policy=policy)) == count * row, policy
    assert kept_bytes(replace(case, policy="none")) > 10 * sum(rows) * row
    assert kept_bytes(replace(case, loops=(1, 1), policy="state")) == 0


def test_nothing_else_survives_the_forward() -> None:
    case = Case(lengths=(4, 3), loops=(9, 5), policy="state")
    inputs = make_inputs(case)
    run = inputs.block.run(case.plan)
    parameters = list(inputs.block.parameters())
    run_loop(run, inputs.x, parameters)  # fills the plan's caches
    before = alive()
    outputs = run_loop(run, inputs.x, parameters)
    new = [size for pointer, size in alive().items() if pointer not in before]
    kept = sum(run.plan.active_rows[:-1]) * D * 8
    assert sum(new) == outputs[0].nbytes + kept


def test_no_grad_keeps_nothing() -> None:
    case = Case(readout=True)
    inputs = make_inputs(case)
    record = Kept([])
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(record, lambda t: t):
        _, outputs = relay(case, inputs)
    assert not record.storages
    assert all(not value.requires_grad for value in outputs.values())
    truth = relay(case, inputs)[1]
    for name, value in outputs.items():
        assert_bitwise(name, value, truth[name].detach())
