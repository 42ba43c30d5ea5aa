"""Launch configurations of every kernel, in one table, and the choice from it.

A rule applies to operands of `bits` bits and widths up to `widest` (d, or as listed below) on
architectures from `arch` to `until`, if a program's shared memory fits that of the device. The
first rule that applies is used, so narrow widths come first, and among equals the one that needs
more shared memory. With `rows` = "many" it applies to calls whose blocks of 128 rows keep the
processors busy, with "few" to the others. RELAY_FAST_AUTOTUNE=1 searches around a rule
(`autotune.py`) and prints lines for this table.

| op | width | block_m | block_n |
|---|---|---|---|
| norm_linear_fwd, _bwd | d | rows | column pairs |
| attention_short_fwd, _bwd | slots of the longest sequence | most queries at a time (bwd) | – |
| attention_wide_fwd, _bwd: short, head_dim > 64 | as attention_short | as attention_short | – |
| attention_narrow_bwd: short, head_dim ≤ 32 | as attention_short | as attention_short | – |
| attention_long_fwd, _bwd | head_dim | queries | keys |
| linear_residual | d | rows | columns |
| loop, loop_gated | rows of the longest sequence | rows | hidden columns |
| mlp, mlp_gated (d ≤ 256), mlp_up, mlp_up_gated | d | rows | hidden columns |
| readout | d | rows | tokens |
| weight_grad | smaller side of the gradient | columns of x | columns of dy |

`shared` is what the compiler asks for where the matrix instructions read registers: sm_80, 86, 89,
120 and 121, the only architectures with less than 227 KB for a program. There the compile report
holds every kernel to its rule's number; elsewhere it holds all of them to 227 KB.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch

from ._runtime import Config, cdiv, device_props

ANY = 1 << 30
AHEAD = "2026-11-21 compile_report.py"  # by registers, spills and instructions; not timed yet
H200 = "2026-11-26 run_all.py"  # 24,000 rows, d 256: benchmarks/results/h200


class Rule(NamedTuple):
    """One line of the table."""

    op: str
    bits: int  # of the operands
    widest: int
    rows: str  # many, few or any
    config: Config
    shared: int  # KiB that a program needs at most, see above
    arch: int = 80  # the lowest compute capability
    until: int = ANY  # the highest
    measured: str = AHEAD  # date and script


# fmt: off
TABLE = (
    #    op                   bits widest rows    Config(block_m, block_n, warps, stages), shared
    Rule("norm_linear_fwd",     16,  256, "many", Config(128,  32, 8, 3), 168, 90, 90, H200),
    Rule("norm_linear_fwd",     16,  256, "many", Config(128,  32, 8, 2), 104),
    Rule("norm_linear_fwd",     16,  256, "many", Config(128,  16, 8, 2), 84),
    Rule("norm_linear_fwd",     16,  256, "few",  Config( 64,  32, 4, 2), 68),
    Rule("norm_linear_fwd",     16,  ANY, "any",  Config( 32,  16, 8, 2), 66),
    Rule("norm_linear_fwd",     32,  128, "any",  Config( 16,  16, 8, 1), 24),
    Rule("norm_linear_fwd",     32,  ANY, "any",  Config( 16,  16, 8, 1), 48, 86, 89),
    Rule("norm_linear_fwd",     32,  ANY, "any",  Config( 32,  16, 4, 1), 64),
    Rule("norm_linear_bwd",     16,  128, "many", Config(128,  32, 8, 2), 80),
    Rule("norm_linear_bwd",     16,   64, "few",  Config( 64,  32, 4, 2), 40),
    Rule("norm_linear_bwd",     16,  128, "few",  Config( 64,  32, 8, 2), 48),
    Rule("norm_linear_bwd",     16,  256, "any",  Config( 32,  16, 4, 2), 227, 90, 90, H200),
    Rule("norm_linear_bwd",     16,  256, "any",  Config( 64,  16, 8, 2), 32),
    Rule("norm_linear_bwd",     16,  ANY, "any",  Config( 32,  16, 8, 2), 40),
    Rule("norm_linear_bwd",     32,  ANY, "any",  Config( 16,  16, 4, 1), 34),
    Rule("attention_short_fwd", 16,   64, "any",  Config(  0,   0, 4, 1), 24),
    Rule("attention_short_fwd", 16,  128, "any",  Config(  0,   0, 8, 1), 20),
    Rule("attention_short_fwd", 32,  128, "any",  Config(  0,   0, 4, 1), 16),
    Rule("attention_short_bwd", 16,   64, "any",  Config( 32,   0, 4, 1), 72),
    Rule("attention_short_bwd", 16,  128, "any",  Config( 32,   0, 4, 1),  72, 90, 90, H200),
    Rule("attention_short_bwd", 16,  128, "any",  Config( 32,   0, 8, 1), 72),
    Rule("attention_short_bwd", 32,  128, "any",  Config( 32,   0, 8, 1), 40),
    Rule("attention_narrow_bwd", 16,  64, "any",  Config( 32,   0, 4, 1), 72),
    Rule("attention_narrow_bwd", 16, 128, "any",  Config( 32,   0, 8, 1), 72),
    Rule("attention_narrow_bwd", 32, 128, "any",  Config( 32,   0, 8, 1), 40),
    Rule("attention_wide_fwd",  16,   64, "any",  Config(  0,   0, 4, 1), 24),
    Rule("attention_wide_fwd",  16,  128, "any",  Config(  0,   0, 8, 1), 36),
    Rule("attention_wide_bwd",  16,   64, "any",  Config( 32,   0, 4, 1), 72),
    Rule("attention_wide_bwd",  16,  128, "any",  Config( 32,   0, 8, 1), 128),
    Rule("attention_long_fwd",  16,   64, "any",  Config( 64,  64, 4, 2), 57),
    Rule("attention_long_fwd",  16,  ANY, "any",  Config( 64,  64, 8, 2), 56),
    Rule("attention_long_fwd",  32,   64, "any",  Config( 32,  32, 8, 1), 40),
    Rule("attention_long_fwd",  32,  ANY, "any",  Config( 16,  16, 4, 1), 34),
    Rule("attention_long_bwd",  16,   64, "any",  Config( 64,  64, 4, 2), 57),
    Rule("attention_long_bwd",  16,  ANY, "any",  Config( 64,  64, 8, 1), 80),
    Rule("attention_long_bwd",  32,   64, "any",  Config( 32,  32, 8, 1), 40),
    Rule("attention_long_bwd",  32,  ANY, "any",  Config( 16,  16, 8, 1), 34),
    Rule("linear_residual",     16,  ANY, "many", Config(128,  64, 8, 3), 99),
    Rule("linear_residual",     16,  ANY, "few",  Config( 64,  64, 4, 3), 58),
    Rule("linear_residual",     32,  ANY, "any",  Config( 32,  32, 4, 2), 13),
    Rule("loop",                16,   32, "any",  Config( 32,  64, 8, 1), 28, 120),
    Rule("loop",                16,   64, "any",  Config( 64,  64, 8, 1), 40, 80, 103),
    Rule("loop",                16,  128, "any",  Config(128,  32, 8, 1), 64),
    Rule("loop",                32,   32, "any",  Config( 32,  16, 8, 1), 16),
    Rule("loop_gated",          16,   64, "any",  Config( 64,  32, 8, 1), 40),
    Rule("loop_gated",          16,  128, "any",  Config(128,  32, 8, 1), 64),
    Rule("loop_gated",          32,   32, "any",  Config( 32,  16, 8, 1), 20),
    Rule("mlp",                 16,   64, "many", Config(128,  64, 8, 2), 64),
    Rule("mlp",                 16,   64, "few",  Config( 64,  64, 4, 2), 40),
    Rule("mlp",                 16,  128, "any",  Config( 64,  64, 8, 2), 72),
    Rule("mlp",                 16,  ANY, "any",  Config( 64,  32, 8, 4), 176, 90, 90, H200),
    Rule("mlp",                 16,  ANY, "any",  Config( 64,  32, 8, 2), 76),
    Rule("mlp",                 32,  ANY, "any",  Config( 16,  16, 8, 1), 17),
    Rule("mlp_gated",           16,   32, "many", Config(128,  32, 4, 2), 34),
    Rule("mlp_gated",           16,   64, "many", Config(128,  32, 8, 2), 52),
    Rule("mlp_gated",           16,   64, "few",  Config( 64,  32, 4, 2), 32),
    Rule("mlp_gated",           16,  ANY, "any",  Config( 64,  32, 8, 2), 96),
    Rule("mlp_gated",           32,  ANY, "any",  Config( 16,  16, 8, 1), 34),
    Rule("mlp_up",              16,  ANY, "any",  Config( 64,  32, 8, 2), 100),
    Rule("mlp_up",              16,  ANY, "any",  Config( 64,  16, 8, 2), 82),
    Rule("mlp_up",              32,  ANY, "any",  Config( 32,  32, 8, 1), 64),
    Rule("mlp_up_gated",        16,  ANY, "any",  Config( 64,  32, 8, 2), 132),
    Rule("mlp_up_gated",        16,  ANY, "any",  Config( 64,  16, 8, 2), 98),
    Rule("mlp_up_gated",        32,  ANY, "any",  Config( 32,  32, 8, 1), 98),
    Rule("readout",             16,  128, "many", Config(128,  32, 8, 2), 64, 120),
    Rule("readout",             16,  128, "many", Config(128,  64, 8, 2), 64),
    Rule("readout",             16,  128, "few",  Config( 64,  64, 4, 2), 48),
    Rule("readout",             16,  256, "any",  Config( 64,  32, 8, 2), 56),
    Rule("readout",             16,  ANY, "any",  Config( 32,  32, 8, 2), 68),
    Rule("readout",             32,  ANY, "any",  Config( 16,  16, 4, 1), 34),
    Rule("weight_grad",         16,   64, "any",  Config( 64,  64, 4, 3), 34),
    Rule("weight_grad",         16,  ANY, "any",  Config(128, 128, 8, 3), 68),
    Rule("weight_grad",         32,  ANY, "any",  Config( 32,  32, 4, 2), 9),
)
# fmt: on
# norm_linear_fwd in fp32: ptxas for sm_86 and sm_89 spills a LayerNorm of 32 rows as a whole, 4 KB.
# weight_grad: with the sum for a bias; without it 24, 48 and 8.
# attention_wide: in fp32 a whole sequence's tile spills everywhere, so those calls take blocks.
# loop: for sm_120 ptxas spills 0.4 KB of 64 rows at d 128 whatever the rest, and nothing of 32.
# linear_residual: two programs share a block of rows, so half as many blocks count as "many".
_BUSY = {"linear_residual": 2}
_learned: list[Rule] = []  # found by this process's search
_trying: dict[str, Config] = {}
_watched: list[dict[Rule, Config]] = []


def pick(
    op: str, dtype: torch.dtype, width: int, rows: int = 0, device: torch.device | None = None
) -> Config:
    """Returns the launch configuration of an op.

    Args:
        op: name in the table.
        dtype: dtype of the operands.
        width: width as listed in the table.
        rows: number of rows of the call.
        device: device of the tensors; None: the CPU.
    """
    config = pick_or_none(op, dtype, width, rows, device)
    if config is None:
        here = device_props(device or torch.device("cpu"))
        raise KeyError(
            f"no configuration of {op} for {_bits(dtype)} bits, width {width}, sm_{here.arch} with "
            f"{here.shared_bytes >> 10} KB of shared memory for a program"
        )
    return config


def pick_or_none(
    op: str, dtype: torch.dtype, width: int, rows: int = 0, device: torch.device | None = None
) -> Config | None:
    """Does what `pick` does, but returns None if no rule of the table applies and fits the device.

    Args:
        op: The operation.
        dtype: The dtype of the GEMMs.
        width: Width of the model.
        rows: Number of rows, 0 if unknown.
        device: Device of the tensors; None: the CPU.
    """
    here = device_props(device or torch.device("cpu"))
    many = cdiv(rows, 128) >= here.processors // _BUSY.get(op, 1)
    rule = _rule(op, _bits(dtype), width, many, here.arch, here.shared_bytes)
    if rule is None:
        return None
    config = _trying.get(op, rule.config)
    for watched in _watched:
        watched[rule] = config
    return config


@lru_cache(maxsize=4096)
def _rule(op: str, bits: int, width: int, many: bool, arch: int, shared_bytes: int) -> Rule | None:
    for rule in (*_learned, *TABLE):
        asked = rule.op == op and rule.bits == bits and width <= rule.widest
        there = rule.arch <= arch <= rule.until and rule.shared << 10 <= shared_bytes
        if asked and there and rule.rows in ("any", "many" if many else "few"):
            return rule
    return None


def _bits(dtype: torch.dtype) -> int:
    return 32 if dtype == torch.float32 else 16


@contextmanager
def watching() -> Iterator[dict[Rule, Config]]:
    """Yields a dict that collects the rules used inside the context, and their configurations."""
    seen: dict[Rule, Config] = {}
    _watched.append(seen)
    try:
        yield seen
    finally:
        _watched.remove(seen)


@contextmanager
def trying(op: str, config: Config) -> Iterator[None]:
    """Makes every launch of an op inside the context use this configuration."""
    before = dict(_trying)
    _trying[op] = config
    try:
        yield
    finally:
        _trying.clear()
        _trying.update(before)


def learn(rule: Rule) -> None:
    """Puts a rule before those of the table, in this process."""
    _learned.insert(0, rule)
    _rule.cache_clear()


def candidates(rule: Rule) -> list[Config]:
    """Returns at most 20 configurations to try for a rule, its own first. Each changes one
    parameter; warps also change with the rows."""
    c, found = rule.config, [rule.config]
    sizes = lambda size: [s for s in (size // 2, size * 2) if 16 <= s <= 256]
    for warps in (4, 8):
        found += [Config(m, c.block_n, warps, c.num_stages) for m in (c.block_m, *sizes(c.block_m))]
        found += [Config(c.block_m, n, warps, c.num_stages) for n in sizes(c.block_n)]
        found += [Config(c.block_m, c.block_n, warps, s) for s in (1, 2, 3, 4)]
    return list(dict.fromkeys(found))[:20]


def line(rule: Rule) -> str:
    """Formats the rule as a line of the table."""
    widest = "ANY" if rule.widest == ANY else rule.widest
    c = rule.config
    config = f"Config({c.block_m:3}, {c.block_n:3}, {c.num_warps}, {c.num_stages})"
    until = "ANY" if rule.until == ANY else rule.until
    return (
        f'    Rule("{rule.op}", {rule.bits}, {widest}, "{rule.rows}", {config}, {rule.shared}, '
        f'{rule.arch}, {until}, "{rule.measured}"),'
    )
