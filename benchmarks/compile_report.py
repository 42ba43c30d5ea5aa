"""Compiles every Triton kernel ahead of time and reports what the compiler made of it. No GPU.

    python benchmarks/compile_report.py --quick          # RELAY's sizes, sm_90, within 50 s
    python benchmarks/compile_report.py --csv report.csv # all sizes and architectures of ARCHS
    python benchmarks/compile_report.py --arch 86 --dtype bf16 --kernel weight_grad

Triton keeps what it compiled (TRITON_CACHE_DIR), so that a second run takes what has not changed
from there.

The launchers run on meta tensors, so that configurations, flags and specialisations are the ones a
GPU would get; each launch is recorded instead of made, then compiled. A row of the report is ok if
the kernel keeps its bound (`compile_bounds.py`): shared memory within its rule's and the
architecture's, no more spilled bytes than SPILLS allows, matrix instructions of the operands' own
dtype in every kernel with a dot (on sm_90 warp-group ones from tiles of 64 rows on), never TF32 for
fp32, and no uniform register read that nothing has written (`machine_code.py`); and if sm_80 runs
the same size with the same kernels, or the row says why not. Beside it stand the FLOPs and bytes of
that launch (`kernel_costs.py` has the formulas), the FLOPs a byte, and the time that a card needs
at least, by what binds it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from torch import Tensor  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from benchmarks import machine_code  # noqa: E402
from benchmarks.compile_bounds import APART, allowed_shared, allowed_spill  # noqa: E402
from benchmarks.compile_rows import Row, write_rows  # noqa: E402
from benchmarks.kernel_costs import Cost, launch_cost  # noqa: E402
from benchmarks.launches import recorded  # noqa: E402
from relay_fast.functional import SMALL_VOCABULARY, select  # noqa: E402
from relay_fast.kernels import tuning  # noqa: E402
from relay_fast.kernels._runtime import DEVICE_PROPS  # noqa: E402
from relay_fast.kernels.attention_ref import PaddedLayout  # noqa: E402
from relay_fast.kernels.dropout_ref import Dropout  # noqa: E402
from relay_fast.kernels.loop import loop_fwd  # noqa: E402
from relay_fast.kernels.loop_ref import LoopLayout, LoopWeights  # noqa: E402
from relay_fast.kernels.tuning import Rule  # noqa: E402
from relay_fast.utils.cores import usable_cores  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MANY_ROWS, FEW_ROWS = 24_000, 700  # first and last iteration of RELAY's mix at B = 512

ARCHS = (80, 86, 89, 90, 100, 120)  # sm_103 and sm_121 are their neighbours in code generation


@dataclass(frozen=True)
class Sizes:
    """A model whose kernels are compiled."""

    d: int
    head_dim: int
    hidden: int
    vocabulary: int
    length: int  # of the longest sequence
    activation: str = "gelu_tanh"
    norm: str = "rms"
    bias: bool = False
    dropout: float = 0.0
    kv_share: int = 1  # query heads of a key/value head
    causal: bool = False
    counted: bool = False  # with the number of rows on the device
    normed: bool = False  # with QK-norm and sandwich norms


RELAY = Sizes(256, 64, 1024, 320, 122)
LOOP = Sizes(128, 32, 512, 320, 122)  # what the whole-loop kernel is made for
ALL = (
    RELAY,
    LOOP,
    Sizes(64, 16, 256, 320, 122),
    Sizes(512, 64, 2048, 320, 122),
    Sizes(512, 64, 1408, 320, 122, "swiglu", "layer", True),
    Sizes(1024, 64, 4096, 320, 122),
    Sizes(256, 64, 1024, 50_304, 2048, causal=True),
    Sizes(256, 128, 1024, 320, 60, "swiglu", "layer", True, 0.1, 2),
    Sizes(128, 64, 384, 320, 30, "gelu", "layer", True, 0.1, 2, True),
    Sizes(256, 64, 1024, 320, 16, "relu2"),
    Sizes(256, 64, 1024, 320, 122, counted=True),
    Sizes(256, 64, 1024, 320, 122, normed=True),
    Sizes(1024, 128, 2816, 320, 122, "swiglu", "layer", True, 0.1, 4, True, normed=True),
    Sizes(256, 128, 1024, 320, 122),
    Sizes(256, 128, 1024, 320, 2048, causal=True),
    Sizes(64, 32, 192, 320, 60, "swiglu"),
    Sizes(32, 16, 128, 320, 60),
    Sizes(32, 16, 96, 320, 60, "swiglu"),
)


@dataclass(frozen=True)
class Launch:
    """A recorded launch, ready to compile."""

    function: JITFunction
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int, ...], list]
    options: dict[str, int | str]
    dtype: str
    arch: int
    cost: Cost
    rule: Rule | None  # of the table, that its configuration was picked by
    apart: bool = False  # whether sm_80 runs this size with another kernel

    @property
    def key(self) -> str:
        return repr((self.function.__name__, self.arch, self.signature, self.constexprs,
                     sorted(self.options.items())))  # fmt: skip

    @property
    def instructions(self) -> int:
        """The architecture whose matrix instructions it takes: another's than its own, if asked."""
        return int(str(self.options.get("arch", self.arch)).removeprefix("sm"))

    @property
    def config(self) -> str:
        named = {k: v for k, v in self.constexprs.items() if k.isupper() and v is not None}
        parts = [f"{k}={v}" for k, v in {**named, **self.options}.items()]
        counted = self.signature.get("count_ptr", "constexpr") != "constexpr"
        return " ".join([*parts, *(["row_count"] if counted else [])])


_NAMES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64",
    torch.int32: "i32", torch.int8: "i8", torch.bool: "i1", torch.uint8: "u8",
}  # fmt: skip


def record(calls: Callable[[], None], dtype: str, arch: int) -> list[Launch]:
    """The launches that `calls` makes on meta tensors."""
    launches: list[Launch] = []
    rule: Rule | None = None

    def add(kernel: JITFunction, values, options, grid) -> None:
        nonlocal rule
        rule = next(reversed(picked), rule)
        picked.clear()
        own = rule is not None and options.items() >= rule.config.launch.items()
        signature, constexprs, attrs = {}, {}, {}
        for i, parameter in enumerate(kernel.params):
            name, value = parameter.name, values[parameter.name]
            one = type(value) is int and value == 1 and not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or one:
                signature[name], constexprs[name] = "constexpr", value
                continue
            if isinstance(value, Tensor):
                signature[name] = f"*{_NAMES[value.dtype]}"
                divisible = True  # the caching allocator aligns to 512 bytes
            elif isinstance(value, float):
                signature[name], divisible = "fp32", False
            else:
                signature[name] = "i32" if abs(value) < 2**31 else "i64"
                divisible = value % 16 == 0
            if divisible and not (
                parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
            ):
                attrs[(i,)] = [["tt.divisibility", 16]]
        cost = launch_cost(kernel.__name__, values)
        by = rule if own else None
        launches.append(
            Launch(kernel, signature, constexprs, attrs, options, dtype, arch, cost, by)
        )

    with tuning.watching() as picked, recorded(arch, add):
        calls()
    return launches


def run_ops(s: Sizes, dtype: torch.dtype, rows: int) -> None:
    """Every op once, forward and backward, on meta tensors of these sizes."""
    ops = select("triton", "meta")

    def new(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    state = torch.float32
    d, heads = s.d, s.d // s.head_dim
    kv_heads = max(1, heads // s.kv_share)
    columns = (heads + 2 * kv_heads) * s.head_dim
    rotary = (heads + kv_heads) * s.head_dim
    x, norm_weight = new(rows, d, of=state), new(d, of=state)
    norm_bias = new(d, of=state) if s.bias else None
    biases = [new(n) if s.bias else None for n in (columns, d, s.hidden, d)]
    cos = new(rows, s.head_dim // 2, of=state)
    count = {"row_count": new(1, of=torch.int32) if s.counted else None}
    common = {"eps": 1e-6, "kind": s.norm, **count}
    dropout = None
    if s.dropout:
        tokens = new(rows, of=torch.int64)
        dropout = Dropout(s.dropout, new(1, of=torch.int64)[0], 1, 2, tokens)
    sequences = rows // s.length
    layout = PaddedLayout(new(sequences + 1, of=torch.int32), s.length, lambda: (0, None, ()), rows)

    norm, qkv_weight = (norm_weight, norm_bias), new(columns, d)
    rope = (cos, cos, rotary)
    qkv = ops.norm_linear_fwd(x, *norm, qkv_weight, biases[0], *rope, **common)
    o, lse = ops.attention_fwd(qkv, layout, heads, kv_heads, s.causal, **count)
    out_weight = new(d, heads * s.head_dim)
    ops.linear_residual_fwd(o, out_weight, biases[1], x, dropout, **count)
    up_weight, down_weight = new(s.hidden, d), new(d, s.hidden)
    gate_weight = new(s.hidden, d) if s.activation == "swiglu" else None
    gate_bias = biases[2] if gate_weight is not None else None
    mlp = (x, *norm, up_weight, biases[2], gate_weight, gate_bias, down_weight, biases[3])
    for keep in (False, True):
        _, up, gate, hidden = ops.mlp_fwd(*mlp, s.activation, dropout=dropout, keep=keep, **common)
    g = new(rows, d, of=state)
    *_, y, dup, _, dbranch = ops.mlp_bwd(
        g, x, up, gate, *norm, up_weight, gate_weight, down_weight, s.activation,
        dropout=dropout, **common,
    )  # fmt: skip
    ops.weight_grad(new(s.hidden, d, of=state), dup, y, **count)
    ops.weight_grad(new(d, s.hidden, of=state), dbranch, hidden, bias=norm_bias, **count)
    do, _ = ops.linear_residual_bwd(g, out_weight, dropout, **count)
    dqkv = ops.attention_bwd(do, qkv, o, lse, layout, heads, kv_heads, s.causal, **count)
    *_, dz, y = ops.norm_linear_bwd(dqkv, x, *norm, qkv_weight, *rope, **common)
    ops.weight_grad(new(columns, d, of=state), dz, y, **count)
    if s.normed:
        weights = (new(s.head_dim, of=state),) * 2
        turned = (*weights, heads, kv_heads, cos, cos)
        ops.qk_norm_fwd(qkv, *turned, **count)
        ops.qk_norm_bwd(dqkv, qkv, *turned, **count)
        branch = ops.linear_residual_fwd(o, out_weight, biases[1], None, **count)
        ops.mlp_fwd(*mlp, s.activation, residual=False, **common)
        ops.norm_residual_fwd(branch, *norm, x, dropout=dropout, **common)
        ops.norm_residual_bwd(g, branch, *norm, dropout=dropout, **common)
    run_readout(s, dtype, rows)
    if d <= 128 and not s.counted:
        run_loop(s, dtype, rows)


def run_readout(s: Sizes, dtype: torch.dtype, rows: int) -> None:
    """What enters the first layer, argmax and cross-entropy, forward and backward, on meta tensors
    of these sizes."""
    ops, state = select("triton", "meta"), torch.float32

    def new(*shape: int, of: torch.dtype = state) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    count = {"row_count": new(1, of=torch.int32) if s.counted else None}
    common = {"eps": 1e-6, "kind": s.norm, **count}
    x, norm_bias = new(rows, s.d), new(s.d) if s.bias else None
    norm, head = (new(s.d), norm_bias), new(s.vocabulary, s.d, of=dtype)
    targets = new(rows, of=torch.int64)
    ops.state_input_bwd(x, ops.state_input_fwd(x, x, norm[0], **count), norm[0], **count)
    ops.argmax(x, *norm, head, **common)
    if s.d > 512:  # the reference's chunks read nothing that a meta tensor does not have
        return
    _, lse, _ = ops.cross_entropy_fwd(x, targets, *norm, head, targets, **common)
    grads = (new(s.vocabulary, s.d), new(s.d), norm_bias)  # of the head and the norm
    if s.vocabulary > SMALL_VOCABULARY:
        ops.cross_entropy_grad(lse, x, targets, *norm, head, *grads, targets, eps=1e-6, kind=s.norm)
    ops.cross_entropy_bwd(lse, x, targets, lse, *norm, head, *grads, targets, **common)


def run_loop(s: Sizes, dtype: torch.dtype, rows: int) -> None:
    """The whole-loop kernel on meta tensors; fp32 programs hold 32 rows."""

    def new(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    length = min(s.length, 32) if dtype == torch.float32 else s.length
    if length > 128 or (dtype == torch.float32 and s.d > 64):
        return
    d, heads, state = s.d, s.d // s.head_dim, torch.float32
    kv_heads = max(1, heads // s.kv_share)
    lengths = np.full(rows // length, length)
    layout = LoopLayout(lengths, np.full(len(lengths), 30), "meta")
    weights = LoopWeights(
        new(3, d, of=state),
        new(3, (heads + 2 * kv_heads) * s.head_dim, d),
        new(3, d, d),
        new(3, d, of=state),
        new(3, s.hidden, d),
        new(3, s.hidden, d) if s.activation == "swiglu" else None,
        new(3, d, s.hidden),
        None,
        new(d, of=state),
        new(s.vocabulary, d),
    )
    x, cos = (
        new(int(lengths.sum()), d, of=state),
        new(int(lengths.sum()), s.head_dim // 2, of=state),
    )
    loop_fwd(x, layout, weights, cos, cos, heads, kv_heads, s.causal, s.activation, kind=s.norm)


def collect(quick: bool, archs: Sequence[int], dtypes: Sequence[str] | None = None) -> list[Launch]:
    """All distinct launches."""
    sizes = (RELAY, LOOP) if quick else ALL
    dtypes = dtypes or (("bf16", "fp32") if quick else tuple(DTYPES))
    found: dict[str, Launch] = {}
    for arch in archs:
        for dtype in dtypes:
            for s in sizes:
                for rows in (MANY_ROWS,) if quick else (MANY_ROWS, FEW_ROWS):
                    op = run_loop if quick and s is LOOP else run_ops
                    calls = lambda op=op, s=s, d=dtype, r=rows: op(s, DTYPES[d], r)
                    usual = {launch.function for launch in record(calls, dtype, 80)}
                    for launch in record(calls, dtype, arch):
                        launch = replace(launch, apart=launch.function not in usual)
                        if launch.apart or launch.key not in found:
                            found[launch.key] = launch
    return list(found.values())


def compile_row(launch: Launch) -> Row:
    """Compiles one launch and holds it to its bound."""
    source = ASTSource(
        fn=launch.function,
        signature=launch.signature,
        constexprs=launch.constexprs,
        attrs=launch.attrs,
    )
    target = GPUTarget("cuda", launch.arch, 32)
    allowed = allowed_spill(launch.function.__name__, launch.config, launch.instructions)
    shared_limit = allowed_shared(launch.arch, launch.rule)
    bound = f"spill<={allowed} shared<={shared_limit}"
    why = APART.get(launch.function.__name__, "") if launch.apart else "as sm_80"
    if why != "as sm_80":
        bound += f"; not as sm_80: {why}"
    head = (launch.function.__name__, launch.arch, launch.dtype, launch.config)
    seconds, binds = launch.cost.floor(launch.arch, launch.dtype)
    cost = (
        launch.cost.flops, launch.cost.bytes, round(launch.cost.intensity, 1),
        round(seconds * 1e6, 2), binds,
    )  # fmt: skip
    try:
        compiled = triton.compile(source, target=target, options=launch.options)
    except Exception as error:  # the report goes on; the row says what failed
        text = " ".join(str(error).split())[-200:]
        return Row(*head, -1, -1, -1, f"failed: {text}", bound, False, *cost)
    registers, stack = machine_code.usage(compiled.asm["cubin"])
    fault = machine_code.unwritten(compiled.asm["cubin"])
    if fault:
        bound += f"; reads a register that nothing has written: {fault}"
    shared = compiled.metadata.shared
    mma = machine_code.matrix_instructions(compiled.asm["ptx"])
    ok = shared <= shared_limit and stack <= allowed and why != "" and not fault
    if "tt.dot" in compiled.asm["ttir"]:
        own = {"bf16": "bf16", "fp16": "f16"}.get(launch.dtype)
        tile = launch.constexprs.get("BLOCK_M", launch.constexprs.get("BLOCK_N"))
        if own is None:
            ok = ok and mma == "-"
        elif launch.instructions == 90 and tile >= 64:
            ok = ok and f"wgmma.{own}" in mma
        else:
            # tcgen05's kind f16 takes bf16 too.
            ok = ok and (own in mma or "tcgen05.f16" in mma)
    ok = ok and "tf32" not in mma
    return Row(*head, registers, stack, shared, mma, bound, ok, *cost)


_launches: list[Launch] = []


def _compile_at(index: int) -> Row:
    return compile_row(_launches[index])


def report(launches: list[Launch], workers: int) -> Iterator[Row]:
    """Rows of all launches as they come, from forked workers (a jit function cannot be pickled)."""
    _launches[:] = launches
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        yield from pool.imap_unordered(_compile_at, range(len(launches)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="RELAY's sizes on sm_90 only")
    parser.add_argument("--arch", type=int, nargs="*", choices=sorted(DEVICE_PROPS))
    parser.add_argument("--dtype", nargs="*", choices=sorted(DTYPES))
    parser.add_argument("--kernel", nargs="*", help="parts of the names of the kernels to compile")
    parser.add_argument("--csv", type=Path, help="where to keep the rows, beside those of others")
    parser.add_argument("--workers", type=int, default=min(8, usable_cores()))
    options = parser.parse_args()
    start = time.perf_counter()
    archs = tuple(options.arch or ((90,) if options.quick else ARCHS))
    launches = collect(options.quick, archs, options.dtype)
    wanted = lambda kernel: not options.kernel or any(part in kernel for part in options.kernel)
    launches = [launch for launch in launches if wanted(launch.function.__name__)]
    rows = []
    for r in report(launches, options.workers):
        rows.append(r)
        mark = "ok  " if r.ok else "FAIL"
        numbers = (
            f"{r.registers:4} registers {r.spill_bytes:5} B spilled {r.shared_bytes:7} B shared "
            f"{r.flops / 1e9:9.2f} GFLOP {r.bytes / 1e6:7.1f} MB {r.flops_per_byte:6.0f} FLOP/B "
            f"floor {r.floor_us:7.1f} us ({r.floor})"
        )
        line = f"{mark} {r.kernel:34} sm_{r.arch:<4}{r.dtype} {numbers}  {r.mma}  {r.config}"
        print(line, flush=True)
    bad = sum(not r.ok for r in rows)
    print(f"{len(rows)} kernels, {bad} over their bound, {time.perf_counter() - start:.0f} s")
    if options.csv:
        write_rows(options.csv, rows, wanted, archs, options.dtype or tuple(DTYPES))
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
