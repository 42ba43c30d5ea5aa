"""Capturing work on a CUDA device as a graph that is replayed."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_TORCH = Path(torch.__file__).parent


def device_graph_reason(device: torch.device) -> str | None:
    """Returns why nothing can be captured on a device, or None."""
    if device.type != "cuda":
        return f"CUDA graphs need a CUDA device, the model is on {device.type!r}"
    return None


def on_side_stream(body: Callable[[], Any]) -> Any:
    """Returns what `body` returns; launches it on another stream, as a capture does."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        result = body()
    torch.cuda.current_stream().wait_stream(side)
    return result


def captured(
    body: Callable[[], Any],
    pool: Any = None,
    generator: torch.Generator | None = None,
) -> Callable[[], Any]:
    """Captures what `body` launches without running it; returns a call that replays it.

    Other threads, which make batches or watch NCCL's messages, may call CUDA meanwhile.

    Args:
        body: launches on the current device.
        pool: memory that graphs share of which one runs at a time; None: its own.
        generator: whose draws go on from replay to replay.

    Raises:
        RuntimeError: it cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = body()
    except RuntimeError:
        torch.cuda.synchronize()
        raise

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def not_captured(what: str, error: RuntimeError) -> str:
    """Returns the reason that a failed capture gives, in one line, with the code that launched
    what cannot be captured."""
    while isinstance(error.__context__, RuntimeError):  # the end of the capture failed, too
        error = error.__context__
    called = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in called if not Path(frame.filename).is_relative_to(_TORCH)]
    place = "".join(f" (at {f.line}, {Path(f.filename).name}:{f.lineno})" for f in ours[-1:])
    return f"{what} could not be captured: {' '.join(str(error).split())[:300]}{place}"
