"""Length generalisation with one loop for each position (Fan et al. 2024, arXiv 2409.15647).

The input is the query, "=" and end tokens; the answer is read in parallel from "=" on, then an end
token. The model is one block without position encoding, with its final norm at each loop and the
input added before each. In training, a problem of length n takes T(n) = n loops, each sequence of a
batch its own number; the loss is at the last loop only. A curriculum increases the lengths.

    parity     0110= →  0          copy  011= → 011          addition  01+11= → 100

In a test the number of loops is n ("oracle"), or the most confident one: the loop whose answers
have the least cross-entropy to themselves, over all problems of a length together (as in the paper)
or for each problem separately. An answer is correct if all its tokens are.

Two differences to the authors' code: the state starts at the embedding instead of 0, and the
learning rate decays over the whole training instead of after the curriculum. The paper also has
multiplication, a binary sum and unique sets, and gives its accuracies as plots only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from relay_fast.config import INJECTIONS, BlockConfig
from relay_fast.decoding._inference import inference
from relay_fast.kernels.norm_ref import NORMS
from relay_fast.models.looped_block import LoopedBlock
from relay_fast.recipes._common import (
    Activation,
    Panel,
    Problems,
    Training,
    Width,
    draw_panels,
    train,
)
from relay_fast.relay.run_folder import RunFolder
from relay_fast.reporting.progress import Display
from relay_fast.utils.seeds import RECIPE_TEST_STREAM
from relay_fast.utils.settings import Count, Counts, Whole, settings

PLUS, EQUALS, END, VOCABULARY_SIZE = 2, 3, 4, 5
PUBLISHED: dict[str, Any] = {}  # plots only: near-perfect 10 and more beyond the trained lengths


TASKS = ("parity", "copy", "addition")


@settings
class Task:
    layers: Count = Field(description="of the block")
    heads: Count = Field(description="of the attention")
    longest: Count = Field(description="length that is trained")
    grow_every: Count = Field(description="steps from one longest length to the next")
    tests: Counts = Field(description="lengths of the test")


@settings
class Settings:
    training: Training
    tasks: Annotated[
        tuple[Literal[*TASKS], ...], Field(description="some of parity, copy, addition")
    ]
    parity: Task
    copy: Task
    addition: Task
    d_model: Width = 64
    activation: Activation = "relu2"
    norm: Literal[*NORMS] = Field("rms", description="kind of norm")
    injection: Literal[*INJECTIONS] = Field("add", description="how iterations see the input")
    more_loops: Whole = Field(
        5, description="beyond a test's longest length, from which confidence may choose"
    )
    problems: Problems = 1000

    def __post_init__(self) -> None:
        for name in self.tasks:
            task = getattr(self, name)
            BlockConfig(self.d_model, task.heads, task.layers, rope_base=None)


def draw_parity(rng: np.random.Generator, count: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws queries (count, n) and answers (count, 1).

    Args:
        rng: The random generator.
        count: Number of problems.
        n: Their length.
    """
    bits = rng.integers(0, 2, (count, n))
    return bits, bits.sum(1, keepdims=True) % 2


def draw_copy(rng: np.random.Generator, count: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws queries (count, n), which are also the answers.

    Args:
        rng: The random generator.
        count: Number of problems.
        n: Their length.
    """
    bits = rng.integers(0, 2, (count, n))
    return bits, bits


def draw_addition(rng: np.random.Generator, count: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws queries (count, 2n + 1) and answers (count, n + 1), most significant bit first.

    Args:
        rng: The random generator.
        count: Number of problems.
        n: Their length.
    """
    terms = rng.integers(0, 2, (count, 2, n))
    answer, carry = np.zeros((count, n + 1), np.int64), np.zeros(count, np.int64)
    for place in reversed(range(n)):
        total = terms[:, 0, place] + terms[:, 1, place] + carry
        answer[:, place + 1], carry = total % 2, total // 2
    answer[:, 0] = carry
    sign = np.full((count, 1), PLUS)
    return np.concatenate([terms[:, 0], sign, terms[:, 1]], axis=1), answer


DRAWS = {"parity": draw_parity, "copy": draw_copy, "addition": draw_addition}


def draw_problems(
    rng: np.random.Generator, task: str, count: int, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draws problems of one length.

    Args:
        rng: The random generator.
        task: A key of `TASKS`.
        count: Number of problems.
        n: Their length.

    Returns:
        Inputs (count, m) and targets (count, a + 1) of the last a + 1 tokens, those from "=" on.
    """
    query, answer = DRAWS[task](rng, count, n)
    end = np.full((count, answer.shape[1] + 1), END)
    targets = np.concatenate([answer, end[:, :1]], axis=1)
    end[:, 0] = EQUALS
    return np.concatenate([query, end], axis=1), targets


def pack(problems: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, ...]:
    """Packs problems of several lengths: tokens (N,), rows (R,), targets (R,), cu_seqlens."""
    tokens, rows, targets, cu_seqlens = [], [], [], [0]
    for inputs, wanted in problems:
        count, m = inputs.shape
        ends = cu_seqlens[-1] + m * np.arange(1, count + 1)
        rows.append((ends[:, None] - np.arange(wanted.shape[1], 0, -1)).ravel())
        tokens.append(inputs.ravel())
        targets.append(wanted.ravel())
        cu_seqlens += ends.tolist()
    return np.concatenate(tokens), np.concatenate(rows), np.concatenate(targets), cu_seqlens


class LoopedReader(nn.Module):
    """An embedding, a looped block with input injection and no positions, a linear read-out."""

    def __init__(self, settings: Settings, task: Task):
        super().__init__()
        s = settings
        self.embedding = nn.Embedding(VOCABULARY_SIZE, s.d_model)
        self.block = LoopedBlock(
            s.d_model,
            task.heads,
            task.layers,
            causal=True,
            rope_base=None,
            loop_norm="post",
            injection=s.injection,
            activation=s.activation,
            norm=s.norm,
            bias=s.norm == "layer",
            recompute="none",
        )
        self.head = nn.Linear(s.d_model, VOCABULARY_SIZE, bias=False)

    def loss(
        self, tokens: Tensor, rows: Tensor, targets: Tensor, cu_seqlens: list, loops: list
    ) -> tuple[Tensor, Tensor]:
        """Returns the cross-entropy () after each sequence's last loop and the share correct ().

        Args:
            tokens: (N,), packed.
            rows: (R,) tokens with a target.
            targets: (R,).
            cu_seqlens: Offsets of the sequences.
            loops: Loops of each sequence.
        """
        h = self.block(self.embedding(tokens), loops, cu_seqlens=cu_seqlens)
        logits = self.head(h[rows])
        correct = (logits.argmax(-1) == targets).float().mean()
        return nn.functional.cross_entropy(logits, targets), correct

    def read(self, tokens: Tensor, last: int, loops: int) -> Tensor:
        """Returns log-probabilities after each loop.

        Args:
            tokens: (B, m).
            last: How many tokens at the end are read.
            loops: Number of loops.

        Returns:
            (loops, B, last, V).
        """
        states = self.block(self.embedding(tokens), loops, return_states=True)
        return torch.stack([self.head(h[:, -last:]).log_softmax(-1) for h in states])


def make_draw(name: str, task: Task, batch_size: int):
    """Makes the function that draws batches: lengths are uniform up to a growing maximum.

    Args:
        name: A key of `TASKS`.
        task: Its settings.
        batch_size: Problems in a batch.
    """

    def draw(rng: np.random.Generator, step: int):
        longest = min(task.longest, 1 + step // task.grow_every)
        lengths, counts = np.unique(rng.integers(1, longest + 1, batch_size), return_counts=True)
        drawn = [
            draw_problems(rng, name, count, n)
            for n, count in zip(lengths.tolist(), counts.tolist(), strict=True)
        ]
        return *pack(drawn), np.repeat(lengths, counts).tolist()

    return draw


def evaluate(
    model: LoopedReader, name: str, n: int, most: int, problems: int, seed: int
) -> dict[str, float]:
    """Measures the share correct with n loops and with the most confident loop.

    Args:
        model: The model.
        name: A key of `TASKS`.
        n: Length of the problems.
        most: Confidence is compared over loops 1..most.
        problems: Number of problems.
        seed: Selects the problems.

    Returns:
        The shares with n loops, with the loop that is most confident on all problems together and
        with the most confident loop of each problem, and those loops.
    """
    rng = np.random.default_rng([seed, RECIPE_TEST_STREAM, n])
    device = model.embedding.weight.device
    correct, confidence = [], []
    with inference(model):
        for first in range(0, problems, 100):
            inputs, targets = draw_problems(rng, name, min(100, problems - first), n)
            wanted = torch.from_numpy(targets).to(device)
            read = model.read(torch.from_numpy(inputs).to(device), targets.shape[1], most)
            best, answer = read.max(-1)  # (loops, B, last)
            correct.append((answer == wanted).all(-1).cpu())
            confidence.append(best.mean(-1).cpu())
    correct, confidence = torch.cat(correct, 1).double(), torch.cat(confidence, 1)
    together, each = int(confidence.mean(1).argmax()), confidence.argmax(0)
    return {
        "oracle": correct[n - 1].mean().item(),
        "together": correct[together].mean().item(),
        "together_loops": together + 1,
        "each": correct.gather(0, each[None]).mean().item(),
        "each_loops": (each + 1).double().mean().item(),
    }


PRESETS = {
    "cpu": Settings(
        Training(steps=5000, batch_size=64, lr=1e-3, warmup=0.02, clip=1.0, muon_lr=0.01),
        tasks=("parity", "copy", "addition"),
        parity=Task(1, 4, longest=10, grow_every=80, tests=(5, 10, 12, 15, 20)),
        copy=Task(2, 4, longest=8, grow_every=200, tests=(4, 8, 10, 12)),
        addition=Task(3, 4, longest=6, grow_every=300, tests=(3, 6, 7, 8)),
    ),
    "paper": Settings(
        Training(steps=100_001, batch_size=64, lr=1e-4, warmup=0.0, clip=1.0, weight_decay=0.01),
        tasks=("parity", "copy", "addition"),
        parity=Task(1, 64, longest=20, grow_every=500, tests=(20, 30, 40, 50)),
        copy=Task(2, 8, longest=19, grow_every=1000, tests=(19, 25, 30)),
        addition=Task(3, 8, longest=19, grow_every=1600, tests=(19, 25, 30)),
        d_model=256,
        activation="gelu_tanh",
        norm="layer",
        problems=6400,
    ),
}


def run(
    settings: Settings, folder: RunFolder, *, seed: int, device: str, display: Display
) -> dict[str, Any]:
    results = {}
    for name in settings.tasks:
        task = getattr(settings, name)
        torch.manual_seed(seed)
        model = LoopedReader(settings, task)
        trained = train(
            model,
            LoopedReader.loss,
            make_draw(name, task, settings.training.batch_size),
            settings.training,
            folder,
            name,
            display,
            seed=seed,
            device=device,
        )
        most = max(task.tests) + settings.more_loops
        results[name] = {
            "longest": task.longest,
            "tests": {
                str(n): evaluate(model, name, n, most, settings.problems, seed) for n in task.tests
            },
            "history": trained.history,
            "seconds": round(trained.seconds, 2),
        }
    return {"tasks": results}


def rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    header = [
        "task",
        "n",
        "",
        "n loops, %",
        "most confident, %",
        "loops",
        "each by itself, %",
        "loops",
    ]
    lines = [
        [
            task,
            int(n),
            "trained" if int(n) <= r["longest"] else "longer",
            100 * m["oracle"],
            100 * m["together"],
            m["together_loops"],
            100 * m["each"],
            m["each_loops"],
        ]
        for task, r in results["tasks"].items()
        for n, m in r["tests"].items()
    ]
    return header, lines


def plot(results: Mapping[str, Any], path: Path) -> Path:
    """Plots % correct by length, a panel for each task; a dashed line ends the trained lengths."""
    panels = []
    for task, r in results["tasks"].items():
        lengths = [int(n) for n in r["tests"]]
        names = {"oracle": "n loops", "together": "most confident", "each": "each by itself"}
        curves = {
            label: (lengths, [100 * m[key] for m in r["tests"].values()])
            for key, label in names.items()
        }
        dashed = {"longest trained": ([r["longest"]] * 2, [0, 100])}
        panels.append(Panel(task, "length n", "correct (%)", curves, dashed, y_range=(-3, 103)))
    return draw_panels(path, panels, "Looping as often as the problem is long")
