"""Chains a second that are read off a looped model: op by op, as one CUDA graph, and as a stream of
graphs of which the next is started before one is waited for, in turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from unittest import mock

import numpy as np
import torch
from torch import nn

from benchmarks import common
from benchmarks.card.device import Timer
from benchmarks.card.session import Row, Unit
from benchmarks.chain_generation import QUICK_LONGEST, TASKS, mixed_case
from relay_fast.config import BlockConfig
from relay_fast.decoding import chain_reader
from relay_fast.decoding._inference import inference
from relay_fast.decoding.chain_reader import ChainReader
from relay_fast.decoding.chains import stream_order
from relay_fast.decoding.reading import read_batch
from relay_fast.models.transformers import LoopedTransformer
from relay_fast.tasks import Samples
from relay_fast.tasks.vocabulary import PAD

OPS = ("norm_linear", "attention", "linear_residual", "mlp", "cross_entropy")
SIZES = (64, 512, 2048)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
UNTIL_CAPTURED = 3  # readings of a batch after which it is replayed
STREAM, STREAMED = "stream of graphs", 4  # batches


def drawn(number: int, longest: dict[str, int] = common.LONGEST) -> Samples:
    """The paper's mix of problems, sorted as generation sorts it."""
    samples = mixed_case(number, longest).problems
    return samples.take(stream_order(samples))


def lowered(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Returns the model with its linears in the dtype that autocast would give to their GEMMs."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)
    return model


def reader_of(feedback: str, dtype: torch.dtype, tiny: bool, device: str) -> LoopedTransformer:
    """An untrained model that ends its rounds now and then."""
    config = replace(common.CONFIGS["relay"], feedback=feedback)
    if tiny:
        config = replace(config, block=BlockConfig(16, 1, 1))
    torch.manual_seed(0)
    model = LoopedTransformer(config, impl="triton" if device == "cpu" else "auto")
    with torch.no_grad():
        model.chain_head.weight[PAD] *= 2.5
    return lowered(model, dtype).to(device).eval()


def measure(
    feedback: str, dtype: str, number: int, timer: Timer, tiny: bool, budget: float
) -> list[Row]:
    """Three rows of one batch; `note`: why what should be a replay is none, and whether all chains
    are the same."""
    model = reader_of(feedback, DTYPES[dtype], tiny, timer.device)
    problems = drawn(number, QUICK_LONGEST if tiny else common.LONGEST)
    if tiny:
        problems = problems.take(np.flatnonzero(problems.loops == problems.loops.min())[:2])
    reader = ChainReader(model, TASKS, False)
    always = mock.patch.object(chain_reader, "LAUNCH", float("inf"))  # a graph, pay or not
    with always, inference(model):
        for _ in range(1 if tiny else UNTIL_CAPTURED):
            graph, _ = reader.read(problems)
        reason = reader.reason
        plain, _ = read_batch(model, problems, TASKS, False)
        calls: dict[str, Callable[[], object]] = {
            "op by op": partial(read_batch, model, problems, TASKS, False),
            "graph": partial(reader.read, problems),
            STREAM: partial(streamed, reader, problems),
        }
        seconds = timer.seconds(calls, budget)
        seconds[STREAM] /= STREAMED
    alike = sum(
        all(map(np.array_equal, graph.rounds_of(i), plain.rounds_of(i)))
        for i in range(len(problems))
    )
    return [
        {
            "model": "fed" if feedback == "tokens" else "latent", "dtype": dtype,
            "problems": len(problems), "provider": name, "seconds": f"{taken:.5g}",
            "chains_per_s": f"{len(problems) / taken:.5g}",
            "times_graph": f"{taken / seconds['graph']:.3g}",
            "same_chains": f"{alike / len(problems):.4f}",
            "note": (reason or "") if name != "op by op" else "",
        }
        for name, taken in seconds.items()
    ]  # fmt: skip


def streamed(reader: ChainReader, problems: Samples) -> None:
    """Reads STREAMED batches as `relay_fast.decoding.chains.stream_chains` does."""
    started = reader.start(problems)
    for _ in range(STREAMED - 1):
        following = reader.start(problems)
        started.chains()
        started = following
    started.chains()


def units(tiny: bool, timer: Timer) -> list[Unit]:
    """Every pair of rows that is wanted, the small batches first."""
    sizes, dtypes = ((4,), ("fp32",)) if tiny else (SIZES, tuple(DTYPES))
    return [
        Unit(
            f"readings/{'fed' if feedback == 'tokens' else 'latent'} {number} {dtype}",
            "readings",
            3 if tiny else 20,
            partial(measure, feedback, dtype, number, timer, tiny, 0.0 if tiny else 4.0),
            needs=OPS,
        )
        for number in sizes
        for dtype in dtypes
        for feedback in ("none", "tokens")
    ]
