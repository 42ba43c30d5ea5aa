"""Whatever is given to a public function in place of an argument, the error is the package's own:
one sentence, raised at the call, and none from deep inside torch or numpy."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import relay_fast
from relay_fast import functional as F
from relay_fast.batch.capacity import Capacity
from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.training.warmup import warmup
from tests.support.chain_models import TASKS, VOCABULARY, mixed_problems

ROOT = Path(relay_fast.__file__).resolve().parents[1]
JUNK = {
    "None": None, "-1": -1, "2.5": 2.5, "nan": float("nan"), "text": "junk", "object": object(),
    "[]": [], "{}": {}, "['a']": ["a"], "[None]": [None], "meta": torch.zeros(3, device="meta"),
    "array": np.zeros(2), "module": nn.Linear(2, 2), "class": nn.Linear, "dtype": torch.float32,
}  # fmt: skip
# A function or module whose own call fails is the caller's, and so is what a caller's function
# returns.
CALLERS_OWN = {("loop", "module", "module"), ("CurriculumDepth", "make", "module"),
               ("CurriculumDepth", "make", "class"), ("warmup", "on_call", "module")}  # fmt: skip


def block(layers: int = 1) -> relay_fast.LoopedBlock:
    return relay_fast.LoopedBlock(16, 2, layers)


BLOCK, SIZE = BlockConfig(16, 2, 1), VOCABULARY.size
LOOPED, CAUSAL = ModelConfig(BLOCK, SIZE), ModelConfig(BlockConfig(16, 2, 1, causal=True), SIZE)


# Long: a table of all functions.
@cache
def calls() -> dict[str, tuple[Callable, dict[str, Any]]]:
    """Functions with arguments that they take; those with a bracket are methods."""
    samples = mixed_problems(2)
    looped = relay_fast.PackedBatch.looped(samples, TASKS)
    written = relay_fast.PackedBatch.autoregressive(samples, TASKS)
    x, rows, d = torch.randn(2, 3, 16), torch.tensor([1, 2]), torch.ones(16)
    packed = torch.randn(6, 16)
    layer = {"x": packed, "norm_weight": d, "norm_bias": None, "eps": 1e-6, "norm": "rms"}
    losses = {"states": packed, "rows": rows, "targets": rows, "norm_weight": d, "norm_bias": None,
              "head": torch.randn(4, 16), "eps": 1e-6, "norm": "rms", "impl": "auto",
              "label_smoothing": 0.0, "z_loss": 0.0}  # fmt: skip
    grown = lambda model=None, **o: relay_fast.grow(block() if model is None else model, **o)
    classifier = relay_fast.LoopedClassifier(BLOCK, SIZE, loops=2)
    depth, least = {"max_loops": 9, "seed": 0}, {"threshold": 0.1, "min_loops": 1}
    # fmt: off
    return {
        "LoopedBlock": (relay_fast.LoopedBlock, dict(
            d_model=16, n_heads=2, n_layers=1, recompute="state", impl="auto", config=None)),
        "LoopedBlock()": (block(), dict(
            x=x, loops=2, attention_mask=None, positions=None, start=0, return_states=False,
            truncate=None)),
        "LoopedBlock(packed)": (block(), dict(x=packed, loops=[1, 2], cu_seqlens=[0, 2, 6])),
        "LoopedTransformer": (relay_fast.LoopedTransformer, dict(
            config=LOOPED, recompute="none", impl="auto", supervise="chain")),
        "LoopedTransformer()": (relay_fast.LoopedTransformer(LOOPED), dict(batch=looped)),
        "LoopedTransformer.predict_rounds": (
            relay_fast.LoopedTransformer(LOOPED).predict_rounds, dict(batch=looped)),
        "AutoregressiveTransformer": (relay_fast.AutoregressiveTransformer, dict(
            config=CAUSAL, recompute="none", impl="auto")),
        "AutoregressiveTransformer()": (
            relay_fast.AutoregressiveTransformer(CAUSAL), dict(batch=written)),
        "LoopedClassifier": (relay_fast.LoopedClassifier, dict(
            block=BLOCK, vocabulary_size=SIZE, loops=2, prelude=0, coda=0)),
        "LoopedClassifier()": (classifier, dict(tokens=torch.zeros(2, 3, dtype=torch.int64))),
        "LoopedClassifier.loss": (classifier.loss, dict(
            tokens=torch.zeros(2, 3, dtype=torch.int64), rows=rows, targets=rows)),
        "PackedBatch.looped": (relay_fast.PackedBatch.looped, dict(samples=samples, tasks=TASKS)),
        "PackedBatch.autoregressive": (
            relay_fast.PackedBatch.autoregressive, dict(samples=samples, tasks=TASKS)),
        "Plan": (relay_fast.Plan, dict(lengths=[2, 3], loops=[2, 1], device="cpu")),
        "IterationCrossEntropy": (
            relay_fast.IterationCrossEntropy, dict(d_model=16, vocabulary_size=SIZE, norm="rms")),
        "loop": (relay_fast.loop, dict(module=nn.Linear(16, 16), x=x, loops=2, recompute="state")),
        "StateChange": (relay_fast.StateChange, least),
        "CosineChange": (relay_fast.CosineChange, least),
        "ReadoutEntropy": (partial(relay_fast.ReadoutEntropy, nn.Linear(16, 4)), least),
        "ReadoutKL": (partial(relay_fast.ReadoutKL, nn.Linear(16, 4)), least),
        "HaltingGate": (partial(relay_fast.HaltingGate, nn.Linear(16, 1)), least),
        "noise_state": (relay_fast.noise_state, dict(like=x, std=0.5, generator=None)),
        "FixedDepth": (relay_fast.FixedDepth, dict(loops=2, **depth)),
        "UniformDepth": (relay_fast.UniformDepth, dict(least=1, most=2, **depth)),
        "PoissonLogNormalDepth": (
            relay_fast.PoissonLogNormalDepth, dict(mean=2.0, sigma=0.5, **depth)),
        "CurriculumDepth": (
            relay_fast.CurriculumDepth, dict(first=1.0, last=2.0, steps=3, make=None, **depth)),
        "loop_regularizer": (
            relay_fast.loop_regularizer, dict(layers=list(block(2).layers), period=1)),
        "tie": (relay_fast.tie, dict(model=block(2), period=1, how="mean")),
        "grow": (grown, dict(model=None, optimizer=None, where="middle", state="copy")),
        "GrowthSchedule": (relay_fast.GrowthSchedule, dict(steps=4, depth=2, layers=1, alpha=1.0)),
        "explain": (relay_fast.explain, dict(device="cpu")),
        "warmup": (warmup, dict(
            model=relay_fast.LoopedTransformer(LOOPED), batches=[looped], autocast=None,
            on_call=None)),
        "memory_estimate": (relay_fast.memory_estimate, dict(
            config=LOOPED, batch=looped, recompute="state", model=relay_fast.LoopedTransformer,
            dtype=torch.float32, device="cpu")),
        "Capacity": (Capacity, dict(
            rows=(4, 3), active=(2, 1), targets=(1, 1), sequences=2, longest=3)),
        "Capacity.of": (Capacity.of, dict(batches=[looped], slack=0.1, spread=0.0)),
        "functional.attention": (F.attention, dict(
            qkv=torch.randn(6, 24), cu_seqlens=[0, 6], heads=2, kv_heads=1 + 1, impl="auto")),
        "functional.norm_linear": (F.norm_linear, dict(
            weight=torch.randn(4, 16), bias=None, rotary=0, cos=None, sin=None, **layer)),
        "functional.linear_residual": (F.linear_residual, dict(
            a=packed, weight=torch.randn(4, 16), residual=torch.randn(6, 4), bias=None)),
        "functional.mlp": (F.mlp, dict(
            up_weight=torch.randn(8, 16), down_weight=torch.randn(16, 8), gate_weight=None,
            up_bias=None, down_bias=None, activation="gelu", impl="auto", **layer)),
        "functional.row_cross_entropy": (F.row_cross_entropy, losses),
        "functional.iteration_cross_entropy": (
            F.iteration_cross_entropy, dict(weights=torch.ones(2), **losses)),
        "functional.select": (F.select, dict(impl="auto", device="cpu")),
        "functional.supports": (F.supports, dict(device="cpu", dtype=torch.float32)),
    }
    # fmt: on


def raised_elsewhere(error: BaseException) -> str | None:
    """Returns where an error comes from, None if the package raises it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(frame.filename, frame.lineno)
    if Path(frame.filename).is_relative_to(ROOT) and "raise" in line:
        return None
    return f"{type(error).__name__}: {error} [{frame.filename}:{frame.lineno}]"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", calls())
def test_errors_are_the_packages_own(name: str) -> None:
    function, good = calls()[name]
    function(**good)
    wrong = []
    for argument in good:
        for kind, value in JUNK.items():
            if (name, argument, kind) in CALLERS_OWN:
                continue
            try:
                function(**{**good, argument: value})
            except Exception as error:
                if place := raised_elsewhere(error):
                    wrong.append(f"{argument} = {kind}: {place}")
    assert not wrong, "\n".join(wrong)


def test_every_public_function_is_here() -> None:
    public = {name for name in relay_fast.__all__ if name != "__version__"}
    public -= {name for name in public if isinstance(getattr(relay_fast, name), ModuleType)}
    assert public <= {name.split(".")[0] for name in calls()} | {"PackedBatch"}


@pytest.mark.parametrize("place", ["cu_seqlens", "loops"])
def test_meta_tensors_have_no_values(place: str) -> None:
    """In functional ops and modules, compiled or not."""
    given = {"cu_seqlens": torch.tensor([0, 2, 6]), "loops": torch.tensor([1, 2])}
    given[place] = given[place].to("meta")
    message = f"{place} is a meta tensor, which holds no values: give it on the CPU, or a list"
    x, owner = torch.randn(6, 16), block()
    classifier = relay_fast.LoopedClassifier(BLOCK, SIZE, loops=2)
    tokens = torch.zeros(6, dtype=torch.int64)
    attempts = [lambda: owner(x, **given), lambda: relay_fast.loop(nn.Linear(16, 16), x, **given)]
    if place == "cu_seqlens":
        attempts += [
            lambda: F.attention(torch.randn(6, 24), given[place], 2),
            lambda: classifier(tokens, cu_seqlens=given[place]),
        ]
    for attempt in attempts:
        with pytest.raises(ValueError, match=message):
            attempt()
