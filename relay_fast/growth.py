"""Growing a stack of layers during training: gradual and middle stacking (Saunshi et al. 2024,
MIDAS, arXiv 2409.19044).

A model of n blocks of b layers grows by a copy of one block, put right after it: of the last block
(gradual stacking) or of block ⌈n / 2⌉, counted from 1 (middle stacking). Everything else stays.

Prop-α: of T steps, stage i of k, with i blocks, takes T · i^α / Σ_j j^α. Layer work compared with
training the whole stack throughout: Σ_i T_i · i / (k · T).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import nn

from relay_fast._numbers import real, whole
from relay_fast.stack import set_stack, stack_of

WHERE = ("middle", "last")
STATE = ("copy", "reset")


def grow(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    layers: int = 1,
    where: str = "middle",
    state: str = "copy",
) -> None:
    """Adds a block of `layers` layers to the model's stack, in place.

    model: a LoopedBlock or a model with one (`relay_fast.stack.stack_of`). optimizer: gets the new
    parameters in the groups of those that they are copies of; with state="copy" also their moments,
    with "reset" none. Raises ValueError for an unknown choice, and for a stack that is not made of
    blocks of `layers`.
    """
    for name, value, known in (("where", where, WHERE), ("state", state, STATE)):
        if value not in known:
            raise ValueError(f"{name} = {value!r} is unknown: use one of {known}")
    layers = whole("layers", layers)
    stack = list(stack_of(model).layers)
    if layers < 1 or len(stack) % layers:
        raise ValueError(
            f"a stack of {len(stack)} layers is not made of blocks of {layers}: choose a divisor"
        )
    blocks = len(stack) // layers
    end = layers * (-(-blocks // 2) if where == "middle" else blocks)
    sources = stack[end - layers : end]
    copies = copy.deepcopy(sources)
    set_stack(model, [*stack[:end], *copies, *stack[end:]])
    if optimizer is not None:
        for source, new in zip(sources, copies, strict=True):
            for old_p, new_p in zip(source.parameters(), new.parameters(), strict=True):
                _join(optimizer, old_p, new_p, state)


def _join(
    optimizer: torch.optim.Optimizer, source: nn.Parameter, new: nn.Parameter, state: str
) -> None:
    """Puts `new` into the group of `source`; a parameter that is not trained stays out."""
    for group in optimizer.param_groups:
        if any(p is source for p in group["params"]):
            group["params"].append(new)
            if state == "copy" and source in optimizer.state:
                optimizer.state[new] = copy.deepcopy(optimizer.state[source])


@dataclass(frozen=True)
class GrowthSchedule:
    """When a stack grows: Prop-α from one block of `layers` layers to `depth` layers.

    steps: T, of all stages. stages: default as many as it takes. Raises ValueError for a schedule
    that does not end at `depth`, and for fewer steps than stages.
    """

    steps: int
    depth: int
    layers: int = 1
    alpha: float = 1.0
    stages: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "depth", "layers", "stages"):
            if name != "stages" or self.stages is not None:
                object.__setattr__(self, name, whole(name, getattr(self, name)))
        object.__setattr__(self, "alpha", real("alpha", self.alpha))
        if self.layers < 1 or self.depth < self.layers or self.depth % self.layers:
            raise ValueError(
                f"blocks of {self.layers} layers do not make a stack of {self.depth}: choose a "
                "divisor of the depth"
            )
        needed = self.depth // self.layers
        if self.stages is None:
            object.__setattr__(self, "stages", needed)
        if self.stages != needed:
            raise ValueError(
                f"{self.stages} stages of {self.layers} more layers each end at "
                f"{self.stages * self.layers} layers, not at the {self.depth} of the model: use "
                f"{needed} stages, or leave them out"
            )
        if len(set(self.starts)) < needed or self.starts[-1] >= self.steps:
            raise ValueError(
                f"{self.steps} steps are too few for {needed} stages with alpha = {self.alpha}: "
                "use more steps"
            )

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First step of each stage."""
        shares = [i**self.alpha for i in range(1, self.stages + 1)]
        ends = [round(self.steps * done / sum(shares)) for done in accumulate(shares)]
        return (0, *ends[:-1])

    def grows(self, step: int) -> bool:
        """Whether the stack grows before this step."""
        return step in self.starts[1:]

    @property
    def stage_steps(self) -> tuple[int, ...]:
        """T_i, the steps of each stage."""
        ends = (*self.starts[1:], self.steps)
        return tuple(b - a for a, b in zip(self.starts, ends, strict=True))

    @property
    def work(self) -> float:
        """Layer work, 1 for the whole stack throughout; its inverse is the ideal speed-up."""
        done = sum(steps * i for i, steps in enumerate(self.stage_steps, start=1))
        return done / (self.stages * self.steps)
