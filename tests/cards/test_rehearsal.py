"""Training, generation and decoding go through Triton's binding and compiler for two cards."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("arch", [89, 90])
def test_every_policy_and_decoding_on_a_card(environment: dict[str, str], arch: int) -> None:
    arguments = ("--arch", str(arch), "--samples", "512")
    printed = python(environment, "benchmarks/rehearse.py", *arguments)
    stages = re.findall(
        r"^(\S+: .*|generation.*|decoding.*) new variants in .*: ok$", printed, re.M
    )
    assert len(stages) == 6 * 3 + 4 + 2 + 1, printed
    launches = re.findall(r"^(\d+) launches of kernels in (\d+) iterations", printed, re.M)
    # Five a layer in fp32 and the readout, whatever is fed; the latent loop's answers once.
    assert [int(n) - 16 * int(loops) for n, loops in launches] == [1, 0], printed


STEADY = """
from dataclasses import replace
from benchmarks import common
from benchmarks.rehearse import on_card
from benchmarks.stub_driver import installed
import torch
from relay_fast.models.transformers import LoopedTransformer
from relay_fast.training.warmup import warmup
config = common.CONFIGS["relay"]
config = replace(config, block=replace(config.block, n_layers=1))  # all layers share the kernels
model = on_card(LoopedTransformer(config, impl="triton", recompute="none"), torch.bfloat16)
with installed(90, compile=False) as log:
    for seed in range(201):
        batch = common.task_batch("multitask", 512, seed, "cpu")[0].to("meta")
        if seed == 0:
            warmup(model, [batch])
        model.loss(batch).loss.backward()
        if seed == 0:
            first = log.variant_count
print(first, log.variant_count)
"""


@pytest.fixture(scope="module")
def variants(environment: dict[str, str]) -> tuple[int, int]:
    """Of all kernels: after the first of 201 random batches, and after the last."""
    first, last = map(int, python(environment, "-c", STEADY).split())
    return first, last


def test_two_hundred_batches_add_no_variant_to_the_first(variants: tuple[int, int]) -> None:
    first, last = variants
    assert first == last > 10


def test_variants_are_few(variants: tuple[int, int]) -> None:
    assert variants[1] <= 22
