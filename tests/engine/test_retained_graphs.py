"""A looped module that leaves a gradient graph behind is refused, and no other."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import relay_fast
from relay_fast.engine.retained_graphs import find_retained_graphs

D = 4
KEPT: list[Tensor] = []


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.inner = nn.Linear(D, D), nn.Sequential(nn.Linear(D, D))
        self.list, self.dict, self.space = [], {}, SimpleNamespace(losses=deque())

    def keep(self, loss: Tensor) -> None:
        pass

    def forward(self, h: Tensor) -> Tensor:
        y = torch.tanh(self.linear(h))
        self.keep(y.square().mean())
        return y + self.inner(h)


class Attribute(Plain):
    def keep(self, loss):
        self.aux = loss


class OfAPart(Plain):
    def keep(self, loss):
        self.inner[0].aux = loss


class InAList(Plain):
    def keep(self, loss):
        self.list.append(loss)


class InADict(Plain):
    def keep(self, loss):
        self.dict["aux"] = (loss, 1)


class InAnObject(Plain):
    def keep(self, loss):
        self.space.losses.append(loss)


@dataclass(slots=True)
class Slots:
    loss: Tensor | None = None


class InSlots(Plain):
    def __init__(self):
        super().__init__()
        self.slots = Slots()

    def keep(self, loss):
        self.slots.loss = loss


class OfTheClass(Plain):
    kept: list[Tensor] = []  # noqa: RUF012

    def keep(self, loss):
        self.kept.append(loss)


class Global(Plain):
    def keep(self, loss):
        KEPT.append(loss)


class Closure(Plain):
    def __init__(self):
        super().__init__()
        kept = []
        self.keep = lambda loss: kept.append(loss)


class Hook(Plain):
    def __init__(self):
        super().__init__()
        kept = []
        self.linear.register_forward_hook(lambda module, inputs, y: kept.append(y))


class PartialHook(Plain):
    def __init__(self):
        super().__init__()
        self.linear.register_forward_hook(partial(lambda kept, m, i, y: kept.append(y), []))


class MethodHook(Plain):
    def __init__(self):
        super().__init__()
        self.linear.register_forward_hook(Collector().take)


class Collector:
    def __init__(self):
        self.taken = []

    def take(self, module: nn.Module, inputs: tuple, y: Tensor) -> None:
        self.taken.append(y)


LEAVES = {
    InSlots: r"slots\.loss",
    Attribute: "aux", OfAPart: r"inner\.0\.aux", InAList: r"list\[0\]", InADict: r"dict\['aux'\]",
    InAnObject: r"space\.losses\[0\]", OfTheClass: r"kept\[", Global: r"KEPT \(in keep\)",
    Closure: r"kept \(in keep\)", Hook: r"kept \(in linear\._forward_hooks",
    PartialHook: r"linear\._forward_hooks", MethodHook: r"taken\[0\]",
}  # fmt: skip


@pytest.mark.parametrize("policy", ["none", "state", "sqrt"])
@pytest.mark.parametrize("kind", LEAVES, ids=lambda kind: kind.__name__)
def test_what_is_left_is_refused_at_the_call(kind: type[Plain], policy: str) -> None:
    for frozen in (False, True):  # the gradient of x alone would be lost as well
        module = kind().requires_grad_(not frozen)
        x = torch.randn(2, D, requires_grad=frozen)
        with pytest.raises(RuntimeError, match=f"stored .* in .*{LEAVES[kind]}.* detach"):
            relay_fast.loop(module, x, [2, 1], recompute=policy)
    with torch.no_grad():
        relay_fast.loop(module, x, 2, recompute=policy)


class Detached(Plain):
    def keep(self, loss):
        self.aux = loss.detach()
        self.list.append(loss.item())


class OldWeightNorm(Plain):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.utils.weight_norm(self.linear)


class Recurrent(Plain):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRU(D, D, batch_first=True)

    def forward(self, h: Tensor) -> Tensor:
        return self.cell(h[:, None])[0][:, 0]


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("policy", ["none", "sqrt"])
@pytest.mark.parametrize("kind", [Plain, Detached, OldWeightNorm, Recurrent])
def test_modules_that_leave_nothing_are_looped(kind: type[Plain], policy: str) -> None:
    module, x = kind().double(), torch.randn(2, D, dtype=torch.float64)
    h = x
    for _ in range(3):
        h = module(h)
    used = [p for n, p in module.named_parameters() if kind is not Recurrent or "cell" in n]
    truth = torch.autograd.grad(h.sum(), used)
    got = torch.autograd.grad(relay_fast.loop(module, x, 3, recompute=policy).sum(), used)
    for value, expected in zip(got, truth, strict=True):
        torch.testing.assert_close(value, expected)


def test_what_was_there_before_is_not_the_loops() -> None:
    module, x = Plain(), torch.randn(2, D, requires_grad=True)
    module.list.append(module(x))
    relay_fast.loop(module, x, 2).sum().backward()
    assert [where for where, _ in find_retained_graphs(module).values()] == ["list[0]"]


class InAnArgument(Plain):
    def forward(self, h: Tensor, kept: dict) -> Tensor:
        y = super().forward(h)
        kept["losses"].append(y.square().mean())
        return y


@pytest.mark.parametrize("policy", ["none", "state", "sqrt"])
@pytest.mark.parametrize("there", [[], [torch.ones((), requires_grad=True) * 2]])
def test_what_is_left_in_an_argument_is_refused(there: list[Tensor], policy: str) -> None:
    x, kept = torch.randn(2, D, requires_grad=True), {"losses": list(there)}
    with pytest.raises(RuntimeError, match=r"needs a gradient in .kept\['losses'\]\[\d\]"):
        relay_fast.loop(InAnArgument(), x, 2, shared={"kept": kept}, recompute=policy)
    with torch.no_grad():
        relay_fast.loop(InAnArgument(), x, 2, shared={"kept": kept}, recompute=policy)
