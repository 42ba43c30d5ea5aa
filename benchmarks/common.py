"""What the benchmarks share: configurations, data, providers, files of results, flags."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.baselines import EagerTransformer, PaddedBatch, buckets
from relay_fast.batch.packed import PackedBatch
from relay_fast.batch.plan import Plan
from relay_fast.config import BlockConfig, ModelConfig
from relay_fast.models.transformers import LoopedTransformer
from relay_fast.relay.run_folder import versions
from relay_fast.reporting.text_table import text_table
from relay_fast.tasks import TASK_NAMES, Samples, Vocabulary, build_tasks
from relay_fast.utils.files import replacing
from relay_fast.utils.ragged import lengths_to_offsets

RESULTS = Path(__file__).parent / "results"
CONFIGS = {
    "relay": ModelConfig(BlockConfig(256, 4, 3), 320),  # the paper's; dropout off, to compare
    "lm": ModelConfig(BlockConfig(512, 8, 4, None, 1408, activation="swiglu", causal=True), 8192),
    "tiny": ModelConfig(BlockConfig(64, 2, 2), 320),
}  # fmt: skip
LONGEST = {"arithmetic": 15, "edit_distance": 30, "lis": 100}  # the paper's training ranges
MIXES = ("multitask", *LONGEST)
COLUMNS = (
    "config mix provider policy loops samples_per_s token_iterations_per_s useful_flops_per_s "
    "peak_share saved_bytes peak_bytes"
).split()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


# Data


def task_batch(mix: str, size: int, seed: int, device: str) -> tuple[PackedBatch, np.ndarray]:
    """`size` samples of the mix, lengths drawn in proportion to length; and each one's task."""
    tasks = build_tasks(TASK_NAMES, Vocabulary())
    rng = np.random.default_rng(seed)
    names = TASK_NAMES if mix == "multitask" else (mix,)
    drawn = rng.integers(len(names), size=size)
    parts = []
    for k, name in enumerate(names):
        lengths = np.arange(tasks[name].min_length, LONGEST[name] + 1)
        chosen = rng.choice(lengths, int((drawn == k).sum()), p=lengths / lengths.sum())
        parts.append(tasks[name].sample(chosen, seed=seed))
    samples = Samples.concat(parts)
    batch = PackedBatch.looped(samples, tasks, device=device)
    return batch, samples.task[batch.order]


def synthetic_batch(
    lengths: np.ndarray,
    loops: np.ndarray,
    targets_per_sequence: int | None,
    vocabulary: int,
    device: str = "cpu",
    seed: int = 0,
) -> PackedBatch:
    """Random tokens. Supervised: the last few rows of each sequence at each of its iterations, or
    (None) all its rows at its last iteration, as in language modelling."""
    rng = np.random.default_rng(seed)
    order = np.argsort(-loops, kind="stable")
    plan = Plan(lengths[order], loops[order], device)
    rows, weights = [np.zeros(0, np.int64)], [np.zeros(0)]  # for batches that do not loop at all
    for t in range(1, plan.max_loops + 1):
        for i in range(plan.active_sequences[t - 1]):
            a, b = plan.offsets[i : i + 2]
            if targets_per_sequence is not None:
                a = max(a, b - targets_per_sequence)
            elif t < plan.loops[i]:
                a = b
            rows.append(np.arange(a, b))
            share = 1.0 if targets_per_sequence is None else 1 / plan.loops[i]
            weights.append(np.full(b - a, share / max(1, b - a) / len(lengths)))
    per_iteration = np.zeros(plan.max_loops, np.int64)
    start = 1
    for t, active in enumerate(plan.active_sequences):
        per_iteration[t] = sum(len(r) for r in rows[start : start + active])
        start += active
    to = lambda array: torch.from_numpy(array).to(device)
    rows = np.concatenate(rows)
    return PackedBatch(
        to(rng.integers(vocabulary, size=plan.rows)),
        plan,
        to(rows),
        tuple(lengths_to_offsets(per_iteration).tolist()),
        to(rng.integers(vocabulary, size=len(rows))),
        to(np.concatenate(weights).astype(np.float32)),
        to(rng.integers(vocabulary, size=plan.sequences)),
        torch.full((plan.sequences,), 1 / plan.sequences, device=device),
        order,
        vocabulary - 1,
    )


def make_batch(
    config: str, mix: str, size: int, seed: int, device: str
) -> tuple[PackedBatch, np.ndarray]:
    """The batch of a configuration, and the group of each sequence that eager buckets keep apart.

    lm: 128 to 512 tokens, 1 to 8 loops, both uniform.
    """
    if config != "lm":
        return task_batch(mix, size, seed, device)
    rng = np.random.default_rng(seed)
    lengths, loops = rng.integers(128, 513, size), rng.integers(1, 9, size)
    batch = synthetic_batch(lengths, loops, None, CONFIGS["lm"].vocabulary_size, device, seed)
    return batch, batch.plan.loops


def useful_flops(config: ModelConfig, batch: PackedBatch) -> float:
    """FLOPs that a step needs: forward and twice that for backward, on real tokens and supervised
    rows only, recomputation excluded."""
    c, plan = config.block, batch.plan
    mlp = (3 if c.activation == "swiglu" else 2) * c.d_model * c.hidden
    linear = 2 * c.d_model * (c.n_heads + c.kv_heads) * c.head_dim + mlp
    pairs = plan.lengths * (plan.lengths + 1) / 2 if c.causal else plan.lengths**2
    layer = 2 * linear * plan.token_iterations + 4 * c.n_heads * c.head_dim * float(
        pairs @ plan.loops
    )
    readout = 2 * c.d_model * config.vocabulary_size * (len(batch.targets) + len(batch))
    return 3 * (c.n_layers * layer + readout)


# Providers


@dataclass
class Provider:
    """One way to take a training step over one batch's samples, in one piece or in several."""

    name: str
    policy: str
    model: nn.Module
    loss: Callable[[object], Tensor]
    pieces: list[object]
    dtype: torch.dtype
    device: str
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)  # there in every step but the first

    def forward(self, piece: object) -> Tensor:
        autocast = torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32)
        with autocast:
            return self.loss(piece)

    def forward_all(self) -> None:
        for piece in self.pieces:
            self.forward(piece)

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=False)
        for piece in self.pieces:
            self.forward(piece).backward()
        self.optimizer.step()


def make_providers(
    names: Iterable[str],
    policies: Iterable[str],
    config: ModelConfig,
    batch: PackedBatch,
    group: np.ndarray,
    dtype: torch.dtype,
    device: str,
    at_most: int = 8,
) -> list[Provider]:
    """Providers of the same weights and the same samples."""
    torch.manual_seed(0)
    weights = LoopedTransformer(config).state_dict()

    def eager(name: str, pieces: list, compiled: bool = False, **options) -> Provider:
        model = EagerTransformer(config).to(device)
        model.load_state_dict(weights)
        if compiled:
            model.block.iteration = torch.compile(model.block.iteration, dynamic=True)
        return Provider(
            name, "", model, lambda piece: model.loss(piece, **options), pieces, dtype, device
        )

    whole = [PaddedBatch.of(batch, np.arange(len(batch)))]
    cut = [PaddedBatch.of(batch, b) for b in buckets(batch, group, at_most)]
    make = {
        "eager_padded": lambda: eager("eager_padded", whole, dense=True),
        "eager_bucketed": lambda: eager("eager_bucketed", cut),
        "eager_bucketed_checkpoint": lambda: eager(
            "eager_bucketed_checkpoint", cut, per_iteration_checkpoint=True
        ),
        "compile_bucketed": lambda: eager("compile_bucketed", cut, compiled=True),
    }
    providers = []
    for name in names:
        if name != "relay_fast":
            providers.append(make[name]())
            continue
        for policy in policies:
            model = LoopedTransformer(config, recompute=policy).to(device)
            model.load_state_dict(weights)
            loss = lambda piece, model=model: model.loss(piece).loss
            providers.append(Provider(name, policy, model, loss, [batch], dtype, device))
    return providers


PROVIDERS = (
    "eager_padded", "eager_bucketed", "eager_bucketed_checkpoint", "compile_bucketed", "relay_fast",
)  # fmt: skip


def policies_for(batch: PackedBatch, d_model: int) -> list[str]:
    """Every policy; the budget is half of what `state` keeps."""
    kept = sum(batch.plan.active_rows[:-1]) * d_model * 4
    policies = ["none", "state", "every:4", "sqrt", "last:4"]
    return [*policies, f"budget:{kept // 2}"] if batch.plan.max_loops > 2 else policies


# Results


def machine(device: str) -> dict[str, str]:
    """Where and with what the numbers were taken."""
    facts = versions(device)
    threads = "" if device == "cuda" else f", {torch.get_num_threads()} threads"
    return {
        "machine": facts["device_name"] + threads,
        "versions": f"torch {facts['torch']}, python {facts['python']}",
        "commit": facts["commit"] or "unknown",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
    }


def append_rows(path: Path, rows: list[dict[str, object]]) -> None:
    """Appends to a CSV file, with a header if it is new; to one beside it where its columns are
    others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(rows[0])
    new = not path.exists()
    if not new:
        with path.open(newline="") as file:
            found = next(csv.reader(file), columns)
        if found != columns:
            path = path.with_name(f"{path.stem}.{datetime.now(UTC):%Y%m%d%H%M%S}{path.suffix}")
            print(f"the file of earlier results has other columns: these rows go to {path}")
            new = True
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    """Replaces a CSV file, atomically; the columns are those of the first row."""
    with replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Returns the rows of a CSV file, none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def show(rows: list[dict[str, object]], columns: Sequence[str] = COLUMNS) -> None:
    """Prints these columns of the rows as a table."""
    print(text_table(columns, [[str(row[c]) for c in columns] for row in rows]))


def arguments(description: str, default_csv: str) -> argparse.ArgumentParser:
    """The flags that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on CUDA, else fp32")
    parser.add_argument("--csv", type=Path, default=RESULTS / default_csv)
    parser.add_argument("--quick", action="store_true", help="small, within 50 s on 2 cores")
    return parser


def comma_separated(kind: Callable[[str], object]) -> Callable[[str], list]:
    """The type of a flag that takes several values, like 0,1,2."""
    return lambda text: [kind(part) for part in text.split(",")]


def chosen_dtype(args: argparse.Namespace) -> torch.dtype:
    return DTYPES[args.dtype or ("bf16" if args.device == "cuda" else "fp32")]
