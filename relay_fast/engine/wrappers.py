"""Refuses wrappers for several devices that hide a module's parameters from the loop."""

from __future__ import annotations

from torch import Tensor, nn


def refuse_wrapped(module: nn.Module) -> None:
    """Raises RuntimeError for a module inside DataParallel or a separately sharded part of
    fully_shard, whose gradients would be lost."""
    for name, part in module.named_modules():
        if getattr(part, "_is_replica", False):
            raise RuntimeError(
                "torch.nn.DataParallel runs replicas without parameters, which cannot be looped: "
                "use torch.nn.parallel.DistributedDataParallel, one process for each device"
            )
        if any(kind.__name__ == "FSDPModule" for kind in type(part).__mro__):
            if any(type(p).__name__ == "DTensor" for p in part.parameters()):
                raise RuntimeError(
                    f"the parameters of {name or 'the module'} are still sharded (DTensor): "
                    "fully_shard gathers them on a call, but the loop does not call that part, so "
                    "apply fully_shard to the whole model only, or use DistributedDataParallel"
                )


def refuse_flattened(module: nn.Module) -> None:
    """Raises RuntimeError for a module inside FullyShardedDataParallel, which replaces its
    parameters by views of a flat one."""
    for part in module.modules():
        managed = getattr(part, "_is_fsdp_managed_module", False)
        if managed and any(type(value) is Tensor for value in vars(part).values()):
            raise RuntimeError(
                "FullyShardedDataParallel passes plain tensors instead of parameters, which cannot "
                "be looped: use fully_shard on the whole model, or DistributedDataParallel"
            )
