"""Records the launches of Triton kernels instead of making them: on meta tensors, without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from triton.runtime.jit import JITFunction

from relay_fast.kernels._runtime import assume_arch

Options = Mapping[str, int | str]  # of the compiler
# (kernel, its arguments by name, options such as num_warps, the grid's sizes)
OnLaunch = Callable[[JITFunction, Mapping[str, Any], Options, tuple[int, ...]], None]
_OPTIONS = ("num_warps", "num_stages", "arch")


@contextmanager
def recorded(arch: int, on_launch: OnLaunch) -> Iterator[None]:
    """Calls `on_launch` for every launch inside, with configurations picked for `arch` (90: sm_90).

    TRITON_INTERPRET must be unset when the kernels are imported: interpreted ones have no launches.
    """

    def run(self: JITFunction, *args, grid, warmup, **kwargs) -> None:
        options = {k: kwargs.pop(k) for k in _OPTIONS if k in kwargs}
        on_launch(self, self.signature.bind(*args, **kwargs).arguments, options, grid)

    original, JITFunction.run = JITFunction.run, run
    try:
        assume_arch(arch)
        yield
    finally:
        JITFunction.run = original
