"""Captures, with a stand-in for the card."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from relay_fast.utils.cuda_graph import captured, device_graph_reason, not_captured


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What a card would be asked, in order."""
    made: list[tuple] = []

    class Graph:
        def register_generator_state(self, generator) -> None:
            made.append(("register", generator))

        def replay(self) -> None:
            made.append(("replay",))

    @contextmanager
    def graph(own, pool, capture_error_mode):
        made.append(("begin", pool, capture_error_mode))
        yield
        made.append(("end",))

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: made.append(("synchronize",)))
    return made


def test_what_a_body_launches_is_captured_once_and_replayed(calls: list[tuple]) -> None:
    generator = torch.Generator()
    replay = captured(lambda: calls.append(("body",)) or 7, pool="pool", generator=generator)
    begun = [("register", generator), ("begin", "pool", "thread_local"), ("body",), ("end",)]
    assert calls == begun
    assert replay() == replay() == 7 and calls == [*begun, ("replay",), ("replay",)]


def test_a_failed_capture_leaves_the_card_in_order(calls: list[tuple]) -> None:
    def fails() -> None:
        raise RuntimeError("not\n  permitted")

    with pytest.raises(RuntimeError) as error:
        captured(fails)
    assert calls == [("begin", None, "thread_local"), ("synchronize",)]
    said = "the step could not be captured: not permitted (at raise RuntimeError("
    assert not_captured("the step", error.value).startswith(said)


def test_a_failed_capture_names_the_code_of_its_op() -> None:
    """The end of the capture fails as well, and torch's own files say nothing."""

    def asks_the_host() -> None:
        try:
            torch.empty((), device="meta").item()
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    with pytest.raises(RuntimeError) as error:
        asks_the_host()
    said = not_captured("the step", error.value)
    assert said.startswith("the step could not be captured: Tensor.item() cannot be called on meta")
    assert ' (at torch.empty((), device="meta").item(), test_cuda_graph.py:' in said


def test_only_a_cuda_device_captures() -> None:
    assert device_graph_reason(torch.device("cuda:1")) is None
    assert device_graph_reason(torch.device("cpu")).endswith("the model is on 'cpu'")
