"""The stub driver refuses what a card would refuse, and kernels keep their variants."""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks.stub_driver import installed, launch_problem
from tests.support.fresh_python import run_fresh


def run(script: str, *arguments: str) -> str:
    """Runs Python with kernels that are not interpreted; returns what it prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = run_fresh(script, *arguments, environment=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_launches_that_a_card_refuses() -> None:
    meta, host = torch.empty(4, device="meta"), torch.empty(4)
    assert launch_problem("k", (1, 1, 1), (meta, 3, None)) is None
    assert "grid (0, 1, 1) is empty" in launch_problem("k", (0, 1, 1), ())
    assert "k: grid (1, 65536, 1)" in launch_problem("k", (1, 65_536, 1), ())
    assert "pointers on ['cpu', 'meta']" in launch_problem("k", (1, 1, 1), (meta, host))


def test_interpreted_kernels_cannot_be_rehearsed() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the kernels are compiled here")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set: unset it"), installed():
        pass


VARIANTS = """
from benchmarks.stub_driver import installed
import torch
from relay_fast.functional import select
ops = select("triton", "meta")
new = lambda *shape, of=torch.bfloat16: torch.empty(shape, dtype=of, device="meta")
lists = {of: new(5000, of=of) for of in (torch.int64, torch.float32, torch.int32)}
x, norm, head, d = new(5000, 64, of=torch.float32), new(64, of=torch.float32), new(320, 64), 64
weight, up, down, dout = new(64, 64), new(256, 64), new(64, 256), new(5000, 64)
with installed(90, compile=False) as log:
    # Every residue of a size and of a place in a list; 1, which Triton would make a constant.
    for first, rows in ((0, 1), (0, 4096), (1, 4000), (16, 4001), (4, 1600), (7, 33)):
        of_rows = lambda of: lists[of][first : first + rows]
        targets, loss = of_rows(torch.int64), of_rows(torch.float32)
        count = lists[torch.int32][first : first + 1]
        a = x[:rows]
        ops.norm_linear_fwd(a, norm, None, weight, None, row_count=count)
        ops.norm_linear_bwd(dout[:rows], a, norm, None, weight, row_count=count)
        ops.linear_residual_fwd(dout[:rows], weight, None, a, row_count=count)
        ops.linear_residual_bwd(a, weight, row_count=count)
        _, u, _, hidden = ops.mlp_fwd(a, norm, None, up, None, None, None, down, None,
                                      row_count=count)
        ops.mlp_bwd(a, a, u, None, norm, None, up, None, down, row_count=count)
        ops.weight_grad(new(64, 64, of=torch.float32), dout[:rows], dout[:rows], row_count=count)
        ops.cross_entropy_fwd(x, targets, norm, None, head, targets, row_count=count)
        grads = (new(320, 64, of=torch.float32), norm, None)
        ops.cross_entropy_bwd(loss, x, targets, loss, norm, None, head, *grads, targets,
                              row_count=count)
for name, keys in sorted(log.variants.items()):
    print(name, len(keys))
"""


RESOURCES = """
from dataclasses import replace
from relay_fast.kernels import _runtime
x, w = (torch.empty(500, 64, dtype=torch.bfloat16, device="meta") for _ in "xw")
acc = torch.empty(64, 64, device="meta")
with installed(90) as log:
    ops.weight_grad(acc, x, w)
worst = log.worst("_weight_grad_kernel")
assert log.launches == {"_weight_grad_kernel": 1, "_weight_grad_sum_kernel": 1}, log.launches
assert worst.registers > 32 and worst.spilled == 0 and worst.shared >= 3 * 2 * 64 * 64 * 2, worst
assert not log.problems
_runtime.DEVICE_PROPS[90] = replace(_runtime.DEVICE_PROPS[90], shared_bytes=worst.shared - 1)
with installed(90) as log:
    try:
        ops.weight_grad(acc, x, w)
    except RuntimeError as error:
        print(log.last, error)
assert not log.launches
"""


@pytest.fixture(scope="module")
def printed() -> list[str]:
    """What both scripts print, of one process: importing torch takes longer than they do."""
    return run(VARIANTS + RESOURCES).splitlines()


def test_sizes_and_places_in_lists_are_not_compiled_again(printed: list[str]) -> None:
    found = dict(line.split() for line in printed[:-1])
    assert len(found) == 10 and set(found.values()) == {"1"}, found


def test_a_kernel_that_does_not_fit_is_refused_by_its_loader(printed: list[str]) -> None:
    start = (
        "_weight_grad_kernel the kernel weight_grad needs 49152 of shared memory, and the device "
    )
    assert printed[-1].startswith(start), printed
