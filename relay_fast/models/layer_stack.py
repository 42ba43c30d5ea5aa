"""The stack of layers inside a model: exchanged, grown during training, drawn towards a loop and
made one.

Growing (gradual and middle stacking: Saunshi et al. 2024, MIDAS, arXiv 2409.19044): a model of n
blocks of b layers grows by a copy of one block, put right after it: of the last block (gradual
stacking) or of block ⌈n / 2⌉, counted from 1 (middle stacking). Everything else stays. Prop-α: of
T steps, stage i of k, with i blocks, takes T · i^α / Σ_j j^α. Layer work compared with training the
whole stack throughout: Σ_i T_i · i / (k · T).

Regularizing (Saunshi et al. 2025, arXiv 2502.17416): for blocks of k layers in a stack of L, and
each group G of matrices (q, k, v, out, up, …):

    R_G = 1/(L − k) · Σ_l cos(θ_G^(l), θ_G^(l + k)),   loss = CE + λ · mean_G(1 − R_G)

The paper prints CE + λ · mean_G(R_G), which would push the blocks apart; its cosines of 0.98 and
more are those of the sign used here. The cosine is that of the flattened matrices; norms and biases
are in no group.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from numbers import Integral

import torch
from torch import Tensor, nn

from relay_fast.config import ModelConfig
from relay_fast.models.looped_block import Layer, LoopedBlock
from relay_fast.utils.numbers import as_float, as_int

GROW_POSITIONS = ("middle", "last")
OPTIMIZER_STATE_MODES = ("copy", "reset")
TIE_MODES = ("mean", "first")


def stack_of(model: nn.Module) -> LoopedBlock:
    """The LoopedBlock that `model` is, has as its `block`, or holds as its only one.

    Raises ValueError where there is none, or more than one to choose from.
    """
    if isinstance(model, LoopedBlock):
        return model
    if isinstance(getattr(model, "block", None), LoopedBlock):
        return model.block
    found = [module for module in model.modules() if isinstance(module, LoopedBlock)]
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(found)} LoopedBlocks: pass the one that is meant"
        )
    return found[0]


def set_stack(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Exchanges the layers of the model's stack, in its configuration too."""
    block = stack_of(model)
    block.set_layers(layers)
    if isinstance(getattr(model, "config", None), ModelConfig):
        model.config = replace(model.config, block=block.config)
    noted = getattr(model, "_hub_mixin_config", None)  # for huggingface_hub's mixin
    if model is not block and isinstance(noted, dict):
        for name, config in (("config", getattr(model, "config", None)), ("block", block.config)):
            if name in noted:
                noted[name] = config.to_dict()


def check_period(period: int, depth: int) -> int:
    """period as an int. Raises ValueError unless `depth` layers are several whole blocks of it."""
    period = as_int("period", period)
    if period < 1 or depth % period or depth == period:
        raise ValueError(
            f"period = {period} does not cut a stack of {depth} layers into equal blocks, two at "
            "least: choose a smaller divisor"
        )
    return period


def grow(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    layers: int = 1,
    where: str = "middle",
    state: str = "copy",
) -> None:
    """Adds a block of `layers` layers to the model's stack, in place.

    model: a LoopedBlock or a model with one (`relay_fast.models.layer_stack.stack_of`). optimizer:
    gets the new parameters in the groups of those that they are copies of; with state="copy" also
    their moments, with "reset" none. Raises ValueError for an unknown choice, and for a stack that
    is not made of blocks of `layers`.
    """
    for name, value, known in (
        ("where", where, GROW_POSITIONS),
        ("state", state, OPTIMIZER_STATE_MODES),
    ):
        if value not in known:
            raise ValueError(f"{name} = {value!r} is unknown: use one of {known}")
    layers = as_int("layers", layers)
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
                object.__setattr__(self, name, as_int(name, getattr(self, name)))
        object.__setattr__(self, "alpha", as_float("alpha", self.alpha))
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


def block_cosines(layers: Sequence[nn.Module], period: int = 1) -> dict[str, Tensor]:
    """group → R_G (), the mean cosine between consecutive blocks of `period` layers.

    layers: of one kind, such as `block.layers`. A group is a matrix of the layer by name; the
    package's `qkv` counts as three. Raises ValueError where the blocks do not come out even.
    """
    period = check_period(period, len(layers))
    return {
        name: torch.cosine_similarity(rows[:-period], rows[period:], dim=1).mean()
        for name, rows in _stacked(layers).items()
    }


@torch.no_grad()
def layer_similarity(layers: Sequence[nn.Module]) -> Tensor:
    """(L, L) cosine between every two layers, the mean over the groups."""
    unit = [torch.nn.functional.normalize(rows, dim=1) for rows in _stacked(layers).values()]
    return torch.stack([rows @ rows.mT for rows in unit]).mean(0)


def loop_regularizer(layers: Sequence[nn.Module], period: int = 1) -> Tensor:
    """mean_G(1 − R_G) (): add λ times it to the loss. Arguments as in `block_cosines`."""
    return 1 - torch.stack(list(block_cosines(layers, period).values())).mean()


def tie(model: nn.Module, period: int = 1, how: str = "mean") -> nn.Module:
    """A copy of `model` whose stack of L layers is one block of `period` layers, to be looped.

    how: "mean" of the blocks' weights, or the "first" block. A model that has `loops` runs L /
    period times as many; a bare LoopedBlock, or a model told its loops elsewhere, must be asked for
    them. Raises ValueError where `period` does not divide the stack.
    """
    if how not in TIE_MODES:
        raise ValueError(f"how = {how!r} is unknown: use one of {TIE_MODES}")
    layers = stack_of(model).layers
    period = check_period(period, len(layers))
    looped = copy.deepcopy(model)
    chosen = list(stack_of(looped).layers[:period])
    if how == "mean":
        for j, layer in enumerate(chosen):
            alike = [dict(other.named_parameters()) for other in layers[j::period]]
            for name, p in layer.named_parameters():
                p.data = torch.stack([other[name].detach() for other in alike]).mean(0)
    set_stack(looped, chosen)
    if isinstance(getattr(looped, "loops", None), Integral):
        looped.loops = int(looped.loops) * (len(layers) // period)
        if "loops" in (noted := getattr(looped, "_hub_mixin_config", None) or {}):
            noted["loops"] = looped.loops
    return looped


def _stacked(layers: Sequence[nn.Module]) -> dict[str, Tensor]:
    """group → (L, numbers), each layer's matrix flattened."""
    by_group: dict[str, list[Tensor]] = {}
    for layer in layers:
        for name, matrix in _groups(layer):
            by_group.setdefault(name, []).append(matrix.flatten())
    return {name: torch.stack(rows) for name, rows in by_group.items()}


def _groups(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, p in layer.named_parameters():
        if p.ndim < 2:
            continue
        name = name.removesuffix(".weight")
        if isinstance(layer, Layer) and name == "qkv":
            keys = (p.shape[0] - layer.out.in_features) // 2
            yield from zip("qkv", p.split((layer.out.in_features, keys, keys)), strict=True)
        else:
            yield name, p
