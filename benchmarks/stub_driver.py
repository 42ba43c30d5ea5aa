"""A Triton driver for machines without a GPU: launches take Triton's own way, all but the card.

    with installed(arch=90) as log:
        model.loss(batch.to("meta")).loss.backward()
    log.launches, log.variants, log.resources, log.problems

Arguments are bound and specialised by `JITFunction.run`, as on a card: integers that are 1 or
divisible by 16, None, and pointers by `data_ptr`, which on a meta tensor is its offset in bytes, so
that a view into the middle of a list is as unaligned as it would be. The real compiler compiles
each new variant for `arch`; Triton's own loader checks shared memory and threads, and raises
OutOfResources where it would; the launcher looks at grid and pointers instead of launching. Nothing
is computed, and nothing is shown about what happens on the card.
"""

from __future__ import annotations

import gc
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler.compiler import max_shared_mem
from triton.runtime.jit import JITFunction

from benchmarks import machine_code
from relay_fast.kernels._runtime import DEVICE_PROPS, assume_arch, device_props

GRID = (2**31 - 1, 65_535, 65_535)
_REGISTERS = 65_536  # of a processor


class Resources(NamedTuple):
    """What one binary needs: registers and spilled bytes of a thread, shared bytes of a program."""

    registers: int
    spilled: int
    shared: int


@dataclass
class Log:
    """What happened, by kernel.

    Attributes:
        launches: number of launches.
        variants: Triton's cache keys.
        resources: of every binary that was loaded.
        problems: one sentence for each launch that a card would refuse.
        last: the kernel that was bound last.
    """

    launches: Counter = field(default_factory=Counter)
    variants: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    resources: dict[str, list[Resources]] = field(default_factory=lambda: defaultdict(list))
    problems: list[str] = field(default_factory=list)
    last: str = ""

    @property
    def variant_count(self) -> int:
        return sum(map(len, self.variants.values()))

    def worst(self, kernel: str) -> Resources:
        """Returns the largest value of each resource among a kernel's binaries."""
        found = self.resources.get(kernel) or [Resources(0, 0, 0)]
        return Resources(*(max(values) for values in zip(*found, strict=True)))


class _Utils:
    """What Triton's loader asks of the driver's C module."""

    def __init__(self, arch: int, log: Log):
        self._arch, self._log = arch, log

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": DEVICE_PROPS[self._arch].shared_bytes}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        """Returns (module, function, registers, spilled bytes, most threads) of a cubin."""
        registers, stack = machine_code.usage(binary)
        fault = machine_code.unwritten(binary)
        if fault:
            self._log.problems.append(f"{name} reads a register that nothing has written: {fault}")
        self._log.resources[name].append(Resources(registers, stack, shared))
        granted = max(8, -(-registers // 8) * 8)  # registers are handed out in eights
        return 1, 1, registers, stack, min(1024, _REGISTERS // granted // 32 * 32)


def launch_problem(name: str, grid: tuple[int, int, int], arguments: tuple[Any, ...]) -> str | None:
    """Returns what a card would refuse in a launch, or None."""
    if any(not 0 < size <= most for size, most in zip(grid, GRID, strict=True)):
        return f"{name}: grid {grid} is empty or beyond {GRID}"
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    devices = sorted({str(t.device) for t in tensors})
    if len(devices) > 1:
        return f"{name}: pointers on {devices}"
    for t in tensors:
        if t.data_ptr() % t.element_size():
            return f"{name}: a {t.dtype} pointer is not aligned to {t.element_size()} bytes"
    return None


class StubDriver(DriverBase):
    """A card of compute capability `arch` on which nothing runs."""

    def __init__(self, arch: int):
        super().__init__()
        self.arch, self.log = arch, Log()
        self.utils = _Utils(arch, self.log)

    @classmethod
    def is_active(cls) -> bool:
        return False  # Triton never chooses it by itself

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self):
        raise NotImplementedError("a stub has no device")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self):
        raise NotImplementedError("nothing can be timed on a stub")

    def launcher_cls(self, src, metadata):
        """Returns the launcher of one binary, which records what cuLaunchKernel would refuse."""
        name, log = metadata.name, self.log

        def launch(x, y, z, stream, function, packed, extra, enter, leave, *arguments):
            log.launches[name] += 1
            problem = launch_problem(name, (x, y, z), arguments)
            if problem is not None:
                log.problems.append(problem)

        return launch


@contextmanager
def installed(arch: int = 90, compile: bool = True) -> Iterator[Log]:
    """Puts the stub in the place of Triton's driver, and yields its log.

    Args:
        arch: compute capability; launch configurations are picked for it too.
        compile: False counts variants and compiles none of them.

    Raises:
        RuntimeError: if the kernels are interpreted, and so never launched.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: unset it before relay_fast is imported")
    driver, counting = StubDriver(arch), not compile
    log = driver.log

    def seen(*, key, fn, **_) -> bool:
        log.last = fn.name.rpartition(".")[2]
        log.variants[log.last].add(key)
        if counting:
            log.launches[log.last] += 1
        return counting  # True: Triton leaves it at that

    before = triton.runtime.driver._active, knobs.runtime.jit_cache_hook
    assumed = device_props(torch.device("meta")).arch
    _forget()
    triton.runtime.driver._active, knobs.runtime.jit_cache_hook = driver, seen
    assume_arch(arch)
    try:
        yield log
    finally:
        triton.runtime.driver._active, knobs.runtime.jit_cache_hook = before
        assume_arch(assumed)
        _forget()


def _forget() -> None:
    """Makes Triton forget the variants that it knows, and the shared memory of the device."""
    max_shared_mem.cache_clear()
    for function in gc.get_objects():  # Triton 3.6 keeps no list of its functions
        if issubclass(type(function), JITFunction):
            function.device_caches.clear()
