"""What the code of a compiled kernel shows, without a GPU: its matrix instructions, registers,
stack, and faults of the assembler."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import triton

_TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);")
_WIDTHS = {".64": 2, ".WIDE": 2, ".128": 4, ".256": 8}


class Usage(NamedTuple):
    """What a binary needs: registers of a thread, and bytes of its stack, which hold spills."""

    registers: int
    stack: int


def usage(cubin: bytes) -> Usage:
    """Returns what a binary needs."""
    text = _dump(cubin, "--dump-resource-usage")
    return Usage(*(int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK")))


def unwritten(cubin: bytes) -> str:
    """Returns the first instruction of a binary that reads a uniform register which nothing before
    it has written, or "".

    ptxas 12.8 does that to some descriptors of warp-group instructions, if the operand stays at one
    address through nested loops. They then read anywhere in shared memory.
    """
    return unwritten_in(_dump(cubin, "--dump-sass"))


def unwritten_in(listing: str) -> str:
    """As `unwritten`, of a listing that cuobjdump has made."""
    written: set[int] = set()
    for address, text in _INSTRUCTION.findall(listing):
        instruction = re.sub(r"^@!?U?P\w+ ", "", text.strip())
        operation, _, rest = instruction.partition(" ")
        first, _, others = rest.partition(",")
        target = re.fullmatch(r"\s*UR(\d+)\s*", first)
        for register in _reads(operation, others if target else rest):
            if register not in written:
                return f"UR{register} of {address}: {instruction.strip()}"
        if target:
            width = max((n for suffix, n in _WIDTHS.items() if suffix in operation), default=1)
            written.update(range(int(target[1]), int(target[1]) + width))
    return ""


def matrix_instructions(ptx: str) -> str:
    """The kinds of matrix instructions in PTX, `wgmma.bf16` or `mma.f16` for example."""
    kinds = set()
    for unit, rest in re.findall(r"\b(wgmma\.mma_async|tcgen05\.mma|mma)\.([\w.:]+)", ptx):
        dtype = re.search(r"(tf32|bf16|f16)(?=\.(?:tf32|bf16|f16)|$)", rest.replace("::", "."))
        kind = re.search(r"kind\.(\w+)", rest.replace("::", "."))
        name = dtype.group(1) if dtype else kind.group(1) if kind else "?"
        kinds.add(f"{unit.split('.')[0]}.{name}")
    return " ".join(sorted(kinds)) or "-"


def _reads(operation: str, operands: str) -> Iterator[int]:
    """Yields the uniform registers that an instruction reads. A descriptor of global or shared
    memory takes two; warp-group instructions name both operands' by the first, and need only the
    second where the first operand lies in registers."""
    for match in re.finditer(r"(?:\b(gdesc|desc)\[)?\bUR(\d+)\b", operands):
        first, size = int(match[2]), 1 if match[1] is None else 2
        if match[1] == "gdesc" and operation.startswith("HGMMA"):
            in_registers = re.match(r"\s*R\d+, *R\d+,", operands)
            first, size = (first + 2, 2) if in_registers else (first, 4)
        yield from range(first, first + size)


def _dump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_TOOL, option, file.name]
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout
