"""Launch configurations of every kernel, in one table, and the choice from it.

A rule applies to operands of `bits` bits and widths up to `widest` (d, or as listed below) on
architectures from `arch` on. The first rule that applies is used, so narrow widths come first. With
`rows` = "many" it applies to calls whose blocks of 128 rows keep the processors busy, with "few" to
the others. RELAY_FAST_AUTOTUNE=1 searches around a rule (`autotune.py`) and prints lines for this
table.

| op | width | block_m | block_n |
|---|---|---|---|
| norm_linear_fwd, _bwd | d | rows | column pairs |
| attention_short_fwd, _bwd | slots of the longest sequence | most queries at a time (bwd) | – |
| attention_long | head_dim | queries | keys |
| linear_residual | d | rows | columns |
| mlp, mlp_gated (d ≤ 256), mlp_up, mlp_up_gated | d | rows | hidden columns |
| readout | d | rows | tokens |
| weight_grad | smaller side of the gradient | columns of x | columns of dy |
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


class Rule(NamedTuple):
    """One line of the table."""

    op: str
    bits: int  # of the operands
    widest: int
    rows: str  # many, few or any
    config: Config
    arch: int = 80  # the lowest compute capability
    measured: str = AHEAD  # date and script


# fmt: off
TABLE = (
    #    op                   bits widest rows    Config(block_m, block_n, num_warps, num_stages)
    Rule("norm_linear_fwd",     16,  256, "many", Config(128,  32, 8, 2)),
    Rule("norm_linear_fwd",     16,  256, "few",  Config( 64,  32, 4, 2)),
    Rule("norm_linear_fwd",     16,  ANY, "any",  Config( 32,  16, 8, 2)),
    Rule("norm_linear_fwd",     32,  128, "any",  Config( 16,  16, 8, 1)),
    Rule("norm_linear_fwd",     32,  ANY, "any",  Config( 32,  16, 4, 1)),
    Rule("norm_linear_bwd",     16,  128, "many", Config(128,  32, 8, 2)),
    Rule("norm_linear_bwd",     16,   64, "few",  Config( 64,  32, 4, 2)),
    Rule("norm_linear_bwd",     16,  128, "few",  Config( 64,  32, 8, 2)),
    Rule("norm_linear_bwd",     16,  256, "any",  Config( 64,  16, 8, 2)),
    Rule("norm_linear_bwd",     16,  ANY, "any",  Config( 32,  16, 8, 2)),
    Rule("norm_linear_bwd",     32,  ANY, "any",  Config( 16,  16, 4, 1)),
    Rule("attention_short_fwd", 16,   64, "any",  Config(  0,   0, 4, 1)),
    Rule("attention_short_fwd", 16,  128, "any",  Config(  0,   0, 8, 1)),
    Rule("attention_short_fwd", 32,  128, "any",  Config(  0,   0, 4, 1)),
    Rule("attention_short_bwd", 16,   64, "any",  Config( 32,   0, 4, 1)),
    Rule("attention_short_bwd", 16,  128, "any",  Config( 32,   0, 8, 1)),
    Rule("attention_short_bwd", 32,  128, "any",  Config( 32,   0, 8, 1)),
    Rule("attention_long",      16,   64, "any",  Config( 64,  64, 4, 2)),
    Rule("attention_long",      16,  ANY, "any",  Config( 64,  64, 8, 2)),
    Rule("attention_long",      32,   64, "any",  Config( 32,  32, 8, 1)),
    Rule("attention_long",      32,  ANY, "any",  Config( 16,  16, 4, 1)),
    Rule("linear_residual",     16,  ANY, "many", Config(128,  64, 8, 3)),
    Rule("linear_residual",     16,  ANY, "few",  Config( 64,  64, 4, 3)),
    Rule("linear_residual",     32,  ANY, "any",  Config( 32,  32, 4, 2)),
    Rule("mlp",                 16,   32, "many", Config(128,  64, 4, 2)),
    Rule("mlp",                 16,   64, "many", Config(128,  64, 8, 2)),
    Rule("mlp",                 16,   64, "few",  Config( 64,  64, 4, 2)),
    Rule("mlp",                 16,  128, "any",  Config( 64,  64, 8, 2)),
    Rule("mlp",                 16,  ANY, "any",  Config( 64,  32, 8, 2)),
    Rule("mlp",                 32,  ANY, "any",  Config( 16,  16, 8, 1)),
    Rule("mlp_gated",           16,   32, "many", Config(128,  32, 4, 2)),
    Rule("mlp_gated",           16,   64, "many", Config(128,  32, 8, 2)),
    Rule("mlp_gated",           16,   64, "few",  Config( 64,  32, 4, 2)),
    Rule("mlp_gated",           16,  ANY, "any",  Config( 64,  32, 8, 2)),
    Rule("mlp_gated",           32,  ANY, "any",  Config( 16,  16, 8, 1)),
    Rule("mlp_up",              16,  ANY, "any",  Config( 64,  32, 8, 2)),
    Rule("mlp_up",              32,  ANY, "any",  Config( 32,  32, 8, 1)),
    Rule("mlp_up_gated",        16,  ANY, "any",  Config( 64,  32, 8, 2), 90),
    Rule("mlp_up_gated",        16,  ANY, "any",  Config( 32,  32, 8, 2)),
    Rule("mlp_up_gated",        32,  ANY, "any",  Config( 32,  32, 8, 1)),
    Rule("readout",             16,  128, "many", Config(128,  64, 8, 2)),
    Rule("readout",             16,  128, "few",  Config( 64,  64, 4, 2)),
    Rule("readout",             16,  256, "any",  Config( 64,  32, 8, 2)),
    Rule("readout",             16,  ANY, "any",  Config( 32,  32, 8, 2)),
    Rule("readout",             32,  ANY, "any",  Config( 16,  16, 4, 1)),
    Rule("weight_grad",         16,   64, "any",  Config( 64,  64, 4, 3)),
    Rule("weight_grad",         16,  ANY, "any",  Config(128, 128, 8, 3)),
    Rule("weight_grad",         32,  ANY, "any",  Config( 32,  32, 4, 2)),
)
# fmt: on
# mlp_up_gated: two stages of two weights of 512 columns and 64 rows are 200 KB, too much for sm_80.
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
    here = device_props(device or torch.device("cpu"))
    many = cdiv(rows, 128) >= here.processors // _BUSY.get(op, 1)
    rule = _rule(op, 32 if dtype == torch.float32 else 16, width, many, here.arch)
    config = _trying.get(op, rule.config)
    for watched in _watched:
        watched[rule] = config
    return config


@lru_cache(maxsize=4096)
def _rule(op: str, bits: int, width: int, many: bool, arch: int) -> Rule:
    for rule in (*_learned, *TABLE):
        fits = rule.op == op and rule.bits == bits and width <= rule.widest and arch >= rule.arch
        if fits and rule.rows in ("any", "many" if many else "few"):
            return rule
    raise KeyError(f"no configuration of {op} for {bits} bits, width {width}, sm_{arch}")


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
    return (
        f'    Rule("{rule.op}", {rule.bits}, {widest}, "{rule.rows}", {config}, {rule.arch}, '
        f'"{rule.measured}"),'
    )
