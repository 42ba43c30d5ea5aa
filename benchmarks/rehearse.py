"""Rehearses training, generation and decoding on a card that is not there. No GPU.

    python benchmarks/rehearse.py --arch 89 --samples 512           # all, one batch after another
    python benchmarks/rehearse.py --arch 90 --count --batches 200   # variants only, not compiled

Steps run on meta tensors; every launch is bound, specialised and compiled by Triton and held to the
card's limits (`stub_driver.py`). Exits with 1, and names the launch, if a card would refuse it, or
if a training step after `relay_fast.warmup` needed a variant that was not compiled yet.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks import common  # noqa: E402
from benchmarks.stub_driver import Log, installed  # noqa: E402
from relay_fast.batch.capacity import Capacity, CapacityBatch  # noqa: E402
from relay_fast.batch.packed import PackedBatch  # noqa: E402
from relay_fast.config import ModelConfig  # noqa: E402
from relay_fast.decoding import step as decoding_step  # noqa: E402
from relay_fast.decoding.kv_cache import CacheSlice  # noqa: E402
from relay_fast.decoding.static_reading import Loaded, StaticReading, capacity_of  # noqa: E402
from relay_fast.kernels._runtime import DEVICE_PROPS  # noqa: E402
from relay_fast.models.transformers import AutoregressiveTransformer, LoopedTransformer  # noqa: E402
from relay_fast.reporting.text_table import text_table  # noqa: E402
from relay_fast.training.warmup import warmup  # noqa: E402

STAGES = ("training", "generation", "decoding")
POLICIES = ("none", "state", "every:4", "sqrt", "last:4", "budget:100000000")
PROMPTS, LENGTH, STEPS = 48, 96, 3  # of the decoding
NARROW = 128  # width of the model that the whole-loop kernel reads


def on_card(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Returns the model on the stub, its linears in the dtype that autocast gives to GEMMs."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)
    return model.to("meta")


class Rehearsal:
    """Runs stages under one log and collects what goes wrong.

    Args:
        log: of the stub driver.
        dtype: of the GEMMs in training; generation and decoding are in fp32.
    """

    def __init__(self, log: Log, dtype: torch.dtype):
        self.log, self.dtype, self.problems = log, dtype, []

    @contextmanager
    def stage(self, name: str, warm: bool = False) -> Iterator[None]:
        """Prints the new variants of a stage; none are allowed if it is `warm`."""
        known = {kernel: set(keys) for kernel, keys in self.log.variants.items()}
        began, reason, self.log.last = time.monotonic(), "ok", ""
        try:
            yield
        except Exception as error:  # what a card would say
            text = " ".join(str(error).split())
            reason = f"{self.log.last or 'before any launch'}: {type(error).__name__}: {text}"
        new = [k for k, keys in self.log.variants.items() if keys - known.get(k, set())]
        count = self.log.variant_count - sum(map(len, known.values()))
        if warm and new and reason == "ok":
            reason = f"variants that the warm-up did not compile: {', '.join(sorted(new))}"
        if reason != "ok":
            self.problems.append(f"{name}: {reason}")
        seconds = time.monotonic() - began
        print(f"{name:44} {count:3} new variants in {seconds:4.0f} s: {reason}", flush=True)

    def training(
        self, config: ModelConfig, policy: str, batches: list[PackedBatch], capacity: Capacity
    ) -> None:
        model = LoopedTransformer(config, impl="triton", recompute=policy)
        model = on_card(model.train(), self.dtype)
        with self.stage(f"{policy}: warm-up"):
            warmup(model, [batches[0].to("meta"), capacity])
        for what, items in (
            ("eager", batches),
            ("fixed capacity", [CapacityBatch(capacity, "meta").batch]),
        ):
            with self.stage(f"{policy}: {len(items)} steps, {what}", warm=True):
                for batch in items:
                    model.loss(batch.to("meta") if what == "eager" else batch).loss.backward()

    @torch.no_grad()
    def generation(self, config: ModelConfig, batch: PackedBatch) -> None:
        narrow = replace(config.block, d_model=NARROW)
        for block in (config.block, narrow):
            model = LoopedTransformer(replace(config, block=block), impl="triton").eval()
            for dtype in (torch.float32, torch.bfloat16):
                with self.stage(f"generation, d = {block.d_model}, {dtype}"):
                    on_card(model, dtype).predict_rounds(batch.to("meta"))
        for feedback, moves in (("none", False), ("tokens", True)):
            fed = replace(config, feedback=feedback)
            model = on_card(LoopedTransformer(fed, impl="triton").eval(), torch.float32)
            self.graph(model, capacity_of(Loaded(batch, [], moves), fed), moves)

    def graph(self, model: LoopedTransformer, capacity: Capacity, moves: bool) -> None:
        """Runs what the graph of a generation captures, and prints its launches."""
        before, loops = sum(self.log.launches.values()), len(capacity.rows)
        with self.stage(f"generation's graph, feedback = {model.config.feedback}"):
            StaticReading(model, capacity, moves, scored=False).run()
        launches = sum(self.log.launches.values()) - before
        print(f"{launches} launches of kernels in {loops} iterations, {launches / loops:.1f} each")

    @torch.no_grad()
    def decoding(self, config: ModelConfig) -> None:
        block = replace(config.block, causal=True)
        model = AutoregressiveTransformer(replace(config, block=block), impl="triton").eval()
        decoding_step.PREFILL_TOKENS["meta"] = decoding_step.PREFILL_TOKENS["cuda"]
        with self.stage(f"decoding, d = {block.d_model}"):
            stepper = decoding_step.Stepper(model.to("meta"), PROMPTS, 2 * LENGTH)
            lengths = np.arange(PROMPTS) % LENGTH + 1
            stepper.prefill(np.zeros(lengths.sum(), np.int64), lengths, 0)
            for _ in stepper.steps([CacheSlice(0, PROMPTS, LENGTH + STEPS)], STEPS):
                pass

    def table(self) -> str:
        columns = ("kernel", "launches", "variants", "registers", "spilled B", "shared B")
        rows = [
            (name, str(self.log.launches[name]), str(len(keys)), *map(str, self.log.worst(name)))
            for name, keys in sorted(self.log.variants.items())
        ]
        return text_table(columns, rows)


def rehearse(arch: int, options: argparse.Namespace) -> list[str]:
    """Rehearses on one architecture; returns the problems."""
    config = common.CONFIGS[options.config]
    with installed(arch, not options.count) as log:
        run = Rehearsal(log, common.DTYPES[options.dtype])
        for samples in options.samples:
            print(f"sm_{arch}, {samples} samples")
            make: Callable[[int], PackedBatch] = lambda seed, n=samples: common.task_batch(
                "multitask", n, seed, "cpu"
            )[0]
            batches = [make(seed) for seed in range(options.batches)]
            if "training" in options.stage:
                capacity = Capacity.of(batches[:3])
                for policy in options.policies:
                    run.training(config, policy, batches, capacity)
            if "generation" in options.stage:
                run.generation(config, batches[0])
        if "decoding" in options.stage:
            run.decoding(config)
    print(run.table())
    print(f"{log.variant_count} variants, {sum(log.launches.values())} launches on sm_{arch}")
    return [f"sm_{arch}, {problem}" for problem in (*run.problems, *dict.fromkeys(log.problems))]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    archs = sorted(DEVICE_PROPS)
    parser.add_argument("--arch", type=int, nargs="+", default=[90], choices=archs)
    parser.add_argument("--samples", type=int, nargs="+", default=[64], help="of each batch")
    parser.add_argument("--batches", type=int, default=3, help="random batches of each policy")
    parser.add_argument("--policies", nargs="+", default=POLICIES)
    parser.add_argument("--stage", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--config", default="relay", choices=sorted(common.CONFIGS))
    parser.add_argument("--dtype", default="bf16", choices=sorted(common.DTYPES))
    parser.add_argument("--count", action="store_true", help="variants only, nothing compiled")
    options = parser.parse_args(argv)
    problems = [problem for arch in options.arch for problem in rehearse(arch, options)]
    print(*problems, sep="\n", end="\n" if problems else "")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
