"""Parameters sharded or replicated over several devices, as torch's wrappers keep them.

`torch.distributed.fsdp.fully_shard` gathers the parameters of a module when the module is called,
and reduces their gradients when the gradient of its output has passed. A loop does not call what
it reads the weights of, and calls a module it is given many times: `gathered` gathers once for all
iterations, and once more in the backward. Bytes of whole parameters in each process, with B in the
block (or the module of `relay_fast.loop`) and R in the rest of the model (measured in
`tests/engine/test_sharding.py`):

| fully_shard on | in the loop, forward and backward | elsewhere in the step | between steps |
|---|---|---|---|
| the model | B + R | B + R | 0 |
| the model, and the block, its layers or its parts | B + R | R | 0 |

A layer is not sharded again between two iterations: all of them use it, and the sums of the weight
gradients, as large as B (in fp32), live through the whole backward anyway.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from torch import Tensor, nn

T = TypeVar("T")


def sharding_used() -> bool:
    """Returns whether `fully_shard` was applied to any module in this process."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return kind is not None and bool(kind.__subclasses__())


def shards(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Returns the modules among `modules` that `fully_shard` was applied to, each once."""
    if not sharding_used():
        return []
    kind = sys.modules["torch.distributed.fsdp"].FSDPModule
    return list(dict.fromkeys(m for m in modules if isinstance(m, kind)))


def is_shard_hook(hook: Callable) -> bool:
    """Returns whether a module's hook is one of `fully_shard`'s own."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp")


def gathered(
    x: Tensor,
    compute: Callable[[Tensor], T],
    through: Sequence[nn.Module],
    beside: Sequence[nn.Module] = (),
) -> T:
    """Returns compute(x), computed while sharded modules hold whole parameters.

    The parameters are gathered again when the first gradient of the result arrives. What the
    modules' mixed-precision policies say of inputs and outputs is done to x and the result.

    Args:
        x: the input, whose gradient marks the end of the backward.
        compute: reads the parameters and returns tensors.
        through: sharded modules that x would enter, the outermost first.
        beside: sharded modules that only parts of the computation would enter; their gradients are
            reduced at the end of the whole backward.
    """
    for module in reversed(beside):
        compute = partial(_as_forward, module, compute)
    for module in reversed(through):
        compute = partial(_as_forward, module, compute, passed=True)
    return compute(x)


def _as_forward(
    module: nn.Module, compute: Callable[[Tensor], T], x: Tensor, passed: bool = False
) -> T:
    """Returns compute(x) as a forward of the sharded `module`; only with `passed` the module sees
    x."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    name = "_relay_fast_pass"
    setattr(module, name, compute if passed else lambda: compute(x))
    try:
        register_fsdp_forward_method(module, name)
        return getattr(module, name)(x) if passed else getattr(module, name)()
    finally:
        delattr(module, name)


@contextmanager
def kept_gathered(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Calls of gathered modules inside the context neither reshard nor reduce anything: they do
    what `fully_shard` does in a recomputation."""
    if not modules:
        yield
        return
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    states = [module._get_fsdp_state() for module in modules]
    before = [state._training_state for state in states]
    for state in states:
        state._training_state = TrainingState.PRE_BACKWARD
    try:
        yield
    finally:
        for state, value in zip(states, before, strict=True):
            state._training_state = value


def refuse_sharded(name: str, value: Tensor) -> None:
    """Raises RuntimeError for a parameter that is still sharded."""
    if type(value).__name__ == "DTensor":
        raise RuntimeError(
            f"the parameter {name} is still sharded (DTensor): only a training or inference call "
            "gathers it, so unshard() the whole model before the weights are read otherwise"
        )


def refuse_replicas(module: nn.Module) -> None:
    """Raises RuntimeError for a module inside DataParallel."""
    if any(getattr(part, "_is_replica", False) for part in module.modules()):
        raise RuntimeError(
            "torch.nn.DataParallel runs replicas without parameters, which cannot be looped: "
            "use torch.nn.parallel.DistributedDataParallel, one process for each device"
        )


def refuse_flattened(module: nn.Module) -> None:
    """Raises RuntimeError for a module inside FullyShardedDataParallel, which replaces its
    parameters by views of a flat one."""
    for part in module.modules():
        managed = getattr(part, "_is_fsdp_managed_module", False)
        if managed and any(type(value) is Tensor for value in vars(part).values()):
            raise RuntimeError(
                "FullyShardedDataParallel passes plain tensors instead of parameters, which cannot "
                "be looped: use fully_shard, or DistributedDataParallel"
            )
