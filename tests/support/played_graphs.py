"""CUDA graphs without a card: what a capture would record is recorded, and played again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from relay_fast.decoding import chain_reader

ASKS_THE_HOST = ("_local_scalar", "nonzero", "unique", "equal", "masked_select", "is_nonzero")


class Recording(TorchDispatchMode):
    """Records every op with the tensors that it reads and makes. `replay` does the same ops on the
    same memory again, whatever is in it by then; no Python of the body takes part."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.__name__
        assert not name.startswith(ASKS_THE_HOST), f"{name} asks the host"
        out = func(*args, **kwargs)
        self.ops.append((func, args, kwargs, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.ops:
            again = func(*args, **kwargs)
            for made, new in zip(tensors(out), tensors(again), strict=True):
                if made.data_ptr() != new.data_ptr():  # neither in place nor a view
                    made.copy_(new)


def tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


class Played:
    """What a reader captured and replayed.

    captures: the recordings; replays: how often each was replayed, in order of the replays.
    """

    def __init__(self) -> None:
        self.captures: list[Recording] = []
        self.replays: list[int] = []

    def captured(self, body: Callable[[], Any], *_) -> Callable[[], None]:
        with Recording() as recording:
            body()
        number = len(self.captures)
        self.captures.append(recording)

        def replay() -> None:
            self.replays.append(number)
            recording.replay()

        return replay


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    """Lets readers on a CPU do what they do on a card."""
    graphs = Played()
    monkeypatch.setattr(chain_reader, "device_graph_reason", lambda _: None)
    monkeypatch.setattr(chain_reader, "on_side_stream", lambda body: body())
    monkeypatch.setattr(chain_reader, "captured", graphs.captured)
    return graphs
