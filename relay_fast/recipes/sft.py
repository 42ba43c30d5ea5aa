"""Example: RELAY with somebody else's autoregressive model, a small Llama of transformers.

1. A looped model learns short chains of `own_jsonl`'s parity, and writes chains within and beyond
   its range. They are exported as `prompt` and `completion`, one JSON object a line.
2. A Llama learns from the chains within the range, as any causal language model would.
3. The same Llama is fine-tuned on the chains beyond it that passed the label-free check, mixed with
   the others, and solves longer problems than before.

It needs `pip install transformers`. The loop is written out; trl's `SFTTrainer` takes the same file
(`datasets.load_dataset("json", data_files="chains.jsonl")`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from relay_fast.config import BlockConfig
from relay_fast.recipes import own_jsonl
from relay_fast.recipes._common import Heads, Panel, Width, draw_panels
from relay_fast.recipes._optional import need
from relay_fast.relay.run_folder import RunFolder
from relay_fast.reporting.progress import Display
from relay_fast.reporting.progress import Problems as Done
from relay_fast.training.optim import make_optimizer, set_lr_scale
from relay_fast.utils.settings import (
    BatchSize,
    Count,
    LearningRate,
    MuonRate,
    Positive,
    Steps,
    settings,
)

PUBLISHED: dict[str, Any] = {}  # an example, no paper's experiment
PAD, END = 0, 1  # token ids in front of those of the characters
IGNORED = -100  # a target that transformers' loss leaves out

Pairs = Sequence[Mapping[str, Any]]


@settings
class Settings(own_jsonl.Settings):
    trained: Count = Field(4, description="the most rounds in training")
    tested: Count = Field(6, description="the most rounds of the test")
    scale: Positive = Field(0.05, description="share of the preset's steps and problems")
    chains: Count = Field(600, description="chains of each length that the looped model writes")
    steps: Steps = 300
    tuning: Steps = Field(300, description="steps of the fine-tuning")
    batch_size: BatchSize = 32
    lr: LearningRate = 1e-3
    muon_lr: MuonRate = 0.01
    d_model: Width = 64
    n_heads: Heads = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        BlockConfig(self.d_model, self.n_heads, 1)  # refuses widths that do not fit together


PRESETS = {"cpu": Settings()}


def prove(settings: Settings) -> None:
    """Raises ValueError if transformers is not installed."""
    need("sft", "transformers")


def write_chains(
    s: Settings, folder: Path, seed: int, device: str, display: Display
) -> list[dict[str, Any]]:
    """Trains the looped model, and lets it write chains.

    Args:
        s: The settings.
        folder: The folder of the run.
        seed: The run's seed.
        device: Where the model is.
        display: Shows progress.

    Returns:
        The records that passed the check.
    """
    from relay_fast.relay.chain_parts import chain_parts
    from relay_fast.relay.export import export_chains
    from relay_fast.relay.label_free import confidence_bounds
    from relay_fast.train import train
    from relay_fast.training.model_files import load_run_model, run_tasks

    config, run = own_jsonl.write_config(folder, s, seed), folder / "relay"
    options = {"stages": ["looped_aligned"], "device": device, "print_table": False}
    train(config, run, display=display, **options)
    model = load_run_model(run, "looped_aligned", device)
    tasks = run_tasks(RunFolder.open(run).config)[1]
    wanted = {"parity": dict.fromkeys(range(1, s.tested + 1), s.chains)}
    file = folder / "chains.jsonl"
    file.unlink(missing_ok=True)
    bounds = confidence_bounds(model, tasks, {"parity": [1, s.trained]}, seed)
    checks = {"verify": "self", "bounds": bounds}
    parts = chain_parts(model, tasks, wanted, seed=seed, part_chains=10_000, **checks)
    export_chains(file, parts, tasks, form="sft")
    chains = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [chain for chain in chains if chain["passed"]]


class Words:
    """A tokeniser: words are tokens, and so is a line's end."""

    def __init__(self, texts: Sequence[str]):
        self.words = sorted({word for text in texts for word in self.split(text) if word})
        self.ids = {word: i + 2 for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        return 2 + len(self.words)

    @staticmethod
    def split(text: str) -> list[str]:
        return text.replace("\n", " \n ").split(" ")

    def encode(self, text: str) -> list[int]:
        return [self.ids[word] for word in self.split(text) if word]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text up to the end token."""
        ids = list(ids)
        ids = ids[: ids.index(END)] if END in ids else ids
        return " ".join(self.words[i - 2] for i in ids if i >= 2).replace(" \n ", "\n")


def make_llama(tokens: int, longest: int, s: Settings) -> nn.Module:
    """Builds a Llama of two layers.

    Args:
        tokens: Size of the vocabulary.
        longest: The most tokens of a text.
        s: The settings.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=tokens,
        hidden_size=s.d_model,
        intermediate_size=4 * s.d_model,
        num_hidden_layers=2,
        num_attention_heads=s.n_heads,
        max_position_embeddings=longest,
        pad_token_id=PAD,
        eos_token_id=END,
        bos_token_id=END,
    )
    return LlamaForCausalLM(config)


def collate(pairs: Pairs, tokeniser: Words) -> dict[str, Tensor]:
    """Pads prompts with their completions on the right; the loss is on the completions alone."""
    rows = []
    for pair in pairs:
        prompt = tokeniser.encode(pair["prompt"])
        rows.append((prompt, [*tokeniser.encode(pair["completion"]), END]))
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids, labels = torch.full((len(rows), width), PAD), torch.full((len(rows), width), IGNORED)
    for i, (prompt, completion) in enumerate(rows):
        ids[i, : len(prompt) + len(completion)] = torch.tensor([*prompt, *completion])
        labels[i, len(prompt) : len(prompt) + len(completion)] = torch.tensor(completion)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}


def tune(
    model: nn.Module,
    pairs: Pairs,
    tokeniser: Words,
    s: Settings,
    steps: int,
    seed: int,
    progress: Callable[[int, int], None],
) -> None:
    """Trains a causal model of transformers in place on random batches of pairs.

    Args:
        model: The model.
        pairs: Problems and their completions.
        tokeniser: Makes token ids of them.
        s: The settings.
        steps: Number of steps.
        seed: Selects the batches.
        progress: Called with the steps that are done and all steps.
    """
    optimizer = make_optimizer(model, lr=s.lr, muon_lr=s.muon_lr)  # any other will do
    rng, device = np.random.default_rng(seed), next(model.parameters()).device
    model.train()
    for step in range(steps):
        chosen = rng.integers(0, len(pairs), s.batch_size)
        batch = collate([pairs[i] for i in chosen], tokeniser)
        loss = model(**{name: value.to(device) for name, value in batch.items()}).loss
        loss.backward()
        set_lr_scale(optimizer, 1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
        progress(step + 1, steps)


@torch.no_grad()
def solved(model: nn.Module, problems: Pairs, tokeniser: Words) -> float:
    """Measures the share of problems whose whole completion is right.

    Args:
        model: The model.
        problems: Problems of one length, with their completions.
        tokeniser: Makes token ids of them.
    """
    model.eval()
    ids = torch.tensor([tokeniser.encode(problem["prompt"]) for problem in problems])
    longest = max(len(problem["completion"]) for problem in problems) + 1
    ids = ids.to(next(model.parameters()).device)
    written = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=longest, do_sample=False
    )
    texts = [tokeniser.decode(row) for row in written[:, ids.shape[1] :].tolist()]
    right = [text == problem["completion"] for text, problem in zip(texts, problems, strict=True)]
    return sum(right) / len(right)


def true_problems(s: Settings, seed: int) -> dict[int, Pairs]:
    """Draws problems of each length beside the records, with the true completions."""
    rng = np.random.default_rng([seed, 1])
    found = {}
    for length in range(1, s.tested + 1):
        bits = rng.integers(0, 2, (s.problems, length + 1)).tolist()
        records = map(own_jsonl.parity, bits)
        found[length] = [
            {"prompt": f"{r['problem']}\n", "completion": "\n".join(r["rounds"])} for r in records
        ]
    return found


def run(
    settings: Settings, folder: RunFolder, *, seed: int, device: str, display: Display
) -> dict[str, Any]:
    s = settings
    chains = write_chains(s, folder.path, seed, device, display)
    inside = [chain for chain in chains if chain["length"] <= s.trained]
    if not inside:
        raise ValueError(
            f"none of the looped model's chains passed the check, at scale = {s.scale:g} of its "
            f"training: give a larger scale"
        )
    problems = true_problems(s, seed)
    texts = [chain["prompt"] + chain["completion"] for chain in chains]
    texts += [problem["prompt"] + problem["completion"] for problem in problems[s.tested]]
    tokeniser = Words(texts)
    torch.manual_seed(seed)
    model = make_llama(len(tokeniser), max(map(len, texts)) + 2, s).to(device)
    found: dict[str, Any] = {}
    for name, pairs, steps in (("trained", inside, s.steps), ("fine-tuned", chains, s.tuning)):
        display.start(name)
        progress = lambda *done, name=name: display.progress(name, Done(*done))
        tune(model, pairs, tokeniser, s, steps, seed, progress)
        found[name] = {n: solved(model, drawn, tokeniser) for n, drawn in problems.items()}
    beyond = len(chains) - len(inside)
    return {"trained": s.trained, "inside": len(inside), "beyond": beyond, "solved": found}


NAMES = {"trained": "Llama, trained within the range", "fine-tuned": "fine-tuned on looped chains"}


def rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Makes the table: problems solved, by rounds."""
    lengths = list(results["solved"]["trained"])
    lines = [
        [NAMES[name], *(f"{shares[length]:.0%}" for length in lengths)]
        for name, shares in results["solved"].items()
    ]
    head = f"chains right; {results['inside']} chains to {results['trained']} rounds"
    return [f"{head}, {results['beyond']} beyond", *lengths], lines


def plot(results: Mapping[str, Any], path: Path) -> Path:
    """Plots the share of problems solved against their rounds."""
    curves = {
        NAMES[name]: ([*map(int, shares)], [100 * share for share in shares.values()])
        for name, shares in results["solved"].items()
    }
    panel = Panel(
        "a Llama of transformers", "rounds", "chains right (%)", curves, y_range=(-2, 103)
    )
    return draw_panels(path, [panel])
