"""A stack of layers that is drawn towards a loop, and made one (Saunshi et al. 2025, 2502.17416).

For blocks of k layers in a stack of L, and each group G of matrices (q, k, v, out, up, …):

    R_G = 1/(L − k) · Σ_l cos(θ_G^(l), θ_G^(l + k)),   loss = CE + λ · mean_G(1 − R_G)

The paper prints CE + λ · mean_G(R_G), which would push the blocks apart; its cosines of 0.98 and
more are those of the sign used here. The cosine is that of the flattened matrices; norms and biases
are in no group.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from numbers import Integral

import torch
from torch import Tensor, nn

from relay_fast.modules import Layer
from relay_fast.stack import check_period, set_stack, stack_of

HOW = ("mean", "first")


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
    if how not in HOW:
        raise ValueError(f"how = {how!r} is unknown: use one of {HOW}")
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
