"""How the error of a 30-iteration loop grows, under the Triton kernels and under plain torch.

    python benchmarks/error_growth.py [--dtype fp16 bf16 fp32] [--iterations 30] [--csv FILE]

A small block runs with fp32 states and GEMMs in the dtype; each iteration's state, and the gradient
of the input through all of them, are compared with the same in fp64. Error: RMS of the difference
over RMS of the truth. Without a GPU the kernels run in Triton's interpreter. Exit status 1 where
the kernels' error is over its bound, a multiple of plain torch's (fp32: an RMS ratio).
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from torch import Tensor  # noqa: E402

from benchmarks import interpreter  # noqa: E402
from benchmarks.numerics import rms_ratio  # noqa: E402
from relay_fast.models.looped_block import LoopedBlock  # noqa: E402
from relay_fast.utils.files import replacing  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# In the interpreter bf16 is emulated: four times plain torch's error there, twice on a card.
TIMES_EAGER = {"fp16": 2.0, "bf16": 2.0 if DEVICE == "cuda" else 4.0}
FP32_RATIO = 1e-5
LENGTHS, WIDTH = (9, 1, 6), 32
COLUMNS = ("dtype", "quantity", "iteration", "triton", "torch", "times_torch", "bound", "ok")


def run(impl: str, dtype: torch.dtype, iterations: int) -> list[Tensor]:
    """States 1..iterations, then the gradient of x through all of them."""
    torch.manual_seed(0)
    block = LoopedBlock(WIDTH, 2, 1, impl=impl, recompute="none")  # the same bits, run once
    x, g = torch.randn(2, sum(LENGTHS), WIDTH).to(DEVICE)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    block, x, g = block.to(DEVICE, wide), x.to(wide).requires_grad_(), g.to(wide)
    cu = torch.tensor([0, *LENGTHS]).cumsum(0)
    lowered = dtype in (torch.float16, torch.bfloat16)
    with torch.autocast(DEVICE, dtype if lowered else None, enabled=lowered):
        states = block(x, loops=iterations, cu_seqlens=cu, return_states=True)
    (states[-1] * g).sum().backward()
    return [*(s.detach() for s in states), x.grad]


def measure(dtypes: Sequence[str], iterations: int) -> list[dict[str, object]]:
    """One row a dtype and iteration, and one a dtype for the gradient."""
    interpreter.mend()
    truth = run("torch", torch.float64, iterations)
    rows = []
    for name in dtypes:
        triton, eager = (run(impl, DTYPES[name], iterations) for impl in ("triton", "torch"))
        for i, (value, plain, exact) in enumerate(zip(triton, eager, truth, strict=True)):
            error, usual = rms_ratio(value, exact), rms_ratio(plain, exact)
            bound = FP32_RATIO if name == "fp32" else TIMES_EAGER[name] * usual
            values = (
                name, "state" if i < iterations else "gradient of x", min(i + 1, iterations),
                f"{error:.3e}", f"{usual:.3e}", f"{error / usual:.2f}", f"{bound:.3e}",
                error <= bound,
            )  # fmt: skip
            rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", nargs="*", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--iterations", type=int, default=30)
    default = ROOT / "benchmarks" / "results" / "error_growth.csv"
    parser.add_argument("--csv", type=Path, default=default, help="where to keep the rows")
    a = parser.parse_args(argv)
    rows = measure(a.dtype, a.iterations)
    print(f"{'':5} {'':14} iteration  triton    torch     triton / torch")
    for r in rows:
        if r["iteration"] in (1, 2, 3, 5, 10, 15, 20, 25, a.iterations) or not r["ok"]:
            print(
                f"{r['dtype']:5} {r['quantity']:14} {r['iteration']:>9}  {r['triton']} "
                f"{r['torch']}  {r['times_torch']:>5}  {'ok' if r['ok'] else 'OVER ' + r['bound']}"
            )
    with replacing(a.csv) as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return 0 if all(r["ok"] for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
