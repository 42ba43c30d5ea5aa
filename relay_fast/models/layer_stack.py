"""Operations on a model's stack of layers: replace, grow, regularize towards a loop, tie.

Growing (gradual and middle stacking: Saunshi et al. 2024, MIDAS, arXiv 2409.19044): a model of n
blocks of b layers grows by a copy of one block, inserted right after it: the last block (gradual
stacking) or block ⌈n / 2⌉, counted from 1 (middle stacking). Nothing else changes. Prop-α schedule:
of T steps, stage i of k, with i blocks, takes T · i^α / Σ_j j^α. Layer work, relative to training
the whole stack throughout: Σ_i T_i · i / (k · T).

Regularizing (Saunshi et al. 2025, arXiv 2502.17416): for blocks of k layers in a stack of L, and
each group G of matrices (q, k, v, out, up, …):

    R_G = 1/(L − k) · Σ_l cos(θ_G^(l), θ_G^(l + k)),   loss = CE + λ · mean_G(1 − R_G)

The paper prints CE + λ · mean_G(R_G), which would push the blocks apart; its reported cosines of
0.98 and more agree with the sign used here. The cosine is that of the flattened matrices; norms and
biases are not regularized.
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
from relay_fast.engine.block_weights import read_part
from relay_fast.models.layer import Layer
from relay_fast.models.looped_block import LoopedBlock
from relay_fast.utils.arguments import check_choice, check_kind, kind_of
from relay_fast.utils.numbers import as_float, as_int

GROW_POSITIONS = ("middle", "last")
OPTIMIZER_STATE_MODES = ("copy", "reset")
TIE_MODES = ("mean", "first")


def stack_of(model: nn.Module) -> LoopedBlock:
    """Finds a model's LoopedBlock: the model itself, its `block`, or its only LoopedBlock.

    Raises ValueError if there is none, or more than one to choose from.
    """
    check_kind("model", model, nn.Module, "give a LoopedBlock, or a model with one")
    if isinstance(model, LoopedBlock):
        return model
    if isinstance(getattr(model, "block", None), LoopedBlock):
        return model.block
    found = [module for module in model.modules() if isinstance(module, LoopedBlock)]
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(found)} LoopedBlocks: pass one of them"
        )
    return found[0]


def set_stack(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Replaces the layers of the model's stack and updates its configuration."""
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
    """Returns `period` as an int; raises ValueError unless `depth` is a larger multiple of it."""
    period = as_int("period", period)
    if period < 1 or depth % period or depth == period:
        raise ValueError(
            f"period = {period} does not divide a stack of {depth} layers into at least two equal "
            "blocks: choose a smaller divisor"
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

    Args:
        model: a LoopedBlock, or a model with one (see `stack_of`).
        optimizer: gets each new parameter in the group of the parameter that it copies.
        layers: layers of a block.
        where: "middle" or "last", the block to copy.
        state: "copy" also copies the optimizer's state of the parameters, "reset" does not.

    Raises:
        ValueError: for an unknown choice, or if the depth is not a multiple of `layers`.
    """
    check_choice("where", where, GROW_POSITIONS)
    check_choice("state", state, OPTIMIZER_STATE_MODES)
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise TypeError(f"optimizer is {kind_of(optimizer)}: give a torch.optim.Optimizer, or None")
    layers = as_int("layers", layers)
    stack = list(stack_of(model).layers)
    if layers < 1 or len(stack) % layers:
        raise ValueError(
            f"layers = {layers} does not divide a stack of {len(stack)} layers: choose a divisor"
        )
    blocks = len(stack) // layers
    end = layers * (-(-blocks // 2) if where == "middle" else blocks)
    sources = stack[end - layers : end]
    copies = copy.deepcopy(sources)
    set_stack(model, [*stack[:end], *copies, *stack[end:]])
    if optimizer is not None:
        for source, new in zip(sources, copies, strict=True):
            for old_p, new_p in zip(source.parameters(), new.parameters(), strict=True):
                _add_parameter(optimizer, old_p, new_p, state)


def _add_parameter(
    optimizer: torch.optim.Optimizer, source: nn.Parameter, new: nn.Parameter, state: str
) -> None:
    """Adds `new` to the optimizer group of `source`, if `source` is in one."""
    for group in optimizer.param_groups:
        if any(p is source for p in group["params"]):
            group["params"].append(new)
            if state == "copy" and source in optimizer.state:
                optimizer.state[new] = copy.deepcopy(optimizer.state[source])


@dataclass(frozen=True)
class GrowthSchedule:
    """The Prop-α growth schedule from one block of `layers` layers to `depth` layers.

    Args:
        steps: T, the steps of all stages.
        depth: layers at the end.
        layers: layers of a block.
        alpha: exponent of the stages' shares of the steps.
        stages: default depth / layers.

    Raises:
        ValueError: if the schedule does not end at `depth`, or has fewer steps than stages.
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
                f"layers = {self.layers} does not divide depth = {self.depth}: choose a divisor of "
                "the depth"
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
        """The first step of each stage."""
        shares = [i**self.alpha for i in range(1, self.stages + 1)]
        ends = [round(self.steps * done / sum(shares)) for done in accumulate(shares)]
        return (0, *ends[:-1])

    def grows(self, step: int) -> bool:
        """Returns whether the stack grows before this step."""
        return step in self.starts[1:]

    @property
    def stage_steps(self) -> tuple[int, ...]:
        """T_i, the steps of each stage."""
        ends = (*self.starts[1:], self.steps)
        return tuple(b - a for a, b in zip(self.starts, ends, strict=True))

    @property
    def work(self) -> float:
        """Layer work relative to the whole stack throughout; its inverse is the ideal speed-up."""
        done = sum(steps * i for i, steps in enumerate(self.stage_steps, start=1))
        return done / (self.stages * self.steps)


def block_cosines(layers: Sequence[nn.Module], period: int = 1) -> dict[str, Tensor]:
    """Computes R_G (), the mean cosine between consecutive blocks of `period` layers, by group.

    `layers` are modules of one class, such as `block.layers`. A group is a matrix of the layer by
    name; `qkv` of a LoopedBlock counts as three. Raises ValueError if `period` does not divide
    the number of layers.
    """
    check_kind("layers", layers, Sequence | nn.ModuleList, "give layers, such as block.layers")
    for i, layer in enumerate(layers):
        check_kind(f"layers[{i}]", layer, nn.Module, "give layers, such as block.layers")
    if not layers:
        raise ValueError("layers is empty: give layers, such as block.layers")
    period = check_period(period, len(layers))
    return {
        name: torch.cosine_similarity(rows[:-period], rows[period:], dim=1).mean()
        for name, rows in _stacked(layers).items()
    }


@torch.no_grad()
def layer_similarity(layers: Sequence[nn.Module]) -> Tensor:
    """Computes the (L, L) cosines between layers, averaged over the groups."""
    unit = [torch.nn.functional.normalize(rows, dim=1) for rows in _stacked(layers).values()]
    return torch.stack([rows @ rows.mT for rows in unit]).mean(0)


def loop_regularizer(layers: Sequence[nn.Module], period: int = 1) -> Tensor:
    """Computes mean_G(1 − R_G) (), to be added to the loss times λ; see `block_cosines`."""
    return 1 - torch.stack(list(block_cosines(layers, period).values())).mean()


def tie(model: nn.Module, period: int = 1, how: str = "mean") -> nn.Module:
    """Returns a copy of `model` whose stack of L layers is tied into one block of `period` layers.

    A model with an attribute `loops` gets L / period times as many; for other models, such as a
    bare LoopedBlock, pass that many `loops` to the forward.

    Args:
        model: a LoopedBlock, or a model with one (see `stack_of`).
        period: layers of the tied block.
        how: "mean" of the blocks' weights, or "first", those of the first block.

    Raises:
        ValueError: if `period` does not divide L, or `how` is unknown.
    """
    check_choice("how", how, TIE_MODES)
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
    """Returns each layer's flattened matrices as (L, numel), by group."""
    by_group: dict[str, list[Tensor]] = {}
    for layer in layers:
        for name, matrix in _groups(layer):
            by_group.setdefault(name, []).append(matrix.flatten())
    return {name: torch.stack(rows) for name, rows in by_group.items()}


def _groups(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields the layer's matrices by group name; of a LoopedBlock's layer those that it computes
    with, such as parametrized or merged ones."""
    if not isinstance(layer, Layer):
        for name, p in layer.named_parameters():
            if p.ndim >= 2:
                yield name.removesuffix(".weight"), p
        return
    for name, part in layer.named_children():
        kinds = ("weight", "bias") if getattr(part, "bias", None) is not None else ("weight",)
        read = read_part(name, part, kinds)
        if isinstance(read, str):
            raise RuntimeError(f"{read}, so its matrix is not known: regularize plain layers")
        if name == "qkv":
            queries = layer.out.in_features
            keys = (len(read[0]) - queries) // 2
            yield from zip("qkv", read[0].split((queries, keys, keys)), strict=True)
        elif read[0].ndim >= 2:
            yield name, read[0]
