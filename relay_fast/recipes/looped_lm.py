"""A small causal looped language model over bytes: prelude, block, coda.

The number of loops is drawn for each batch, and gradients flow through the last few loops only, as
in Geiping et al. 2025 (arXiv 2502.05171). `paper` takes the sizes of the middle-looped model of
Saunshi et al. 2025 (4⊗1, 4⊗4, 4⊗1) and Adafactor, which that paper uses for its other trainings.

The results, on held-out text: perplexity per byte against loops, perplexity and loops with early
exit (`relay_fast.decoding.language_model`), generated text, and variable assignment
(`relay_fast.recipes._primitives`), which models of this size are not expected to solve.

The corpus is the file or folder given as `corpus`, or by default the sources of Python's standard
library, which come with every installation (PSF licence).
"""

from __future__ import annotations

import hashlib
import platform
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from relay_fast.config import BlockConfig
from relay_fast.decoding._inference import inference
from relay_fast.decoding.language_model import generate, sample_loops, score
from relay_fast.models.classifier import LoopedClassifier
from relay_fast.recipes._common import Activation, Heads, Panel, Training, Width, draw_panels, train
from relay_fast.recipes._primitives import FORMS, variable_assignment_accuracy
from relay_fast.relay.run_folder import RunFolder
from relay_fast.reporting.progress import Display
from relay_fast.utils.settings import Count, Counts, Positive, Whole, settings

PUBLISHED: dict[str, Any] = {}  # there are no published numbers for bytes of this corpus
SUFFIXES = (".py", ".txt", ".md", ".rst")
TEST_SHARE = 10  # every tenth file is held out, or the last tenth of a single one


@settings
class Settings:
    training: Training
    corpus: str = Field("", description="a file or folder; without one Python's standard library")
    context: Count = Field(128, description="bytes of a window")
    d_model: Width = 64
    n_heads: Heads = 4
    d_hidden: Count | None = Field(None, description="width of the MLP; null: 4 d_model")
    activation: Activation = "relu2"
    prelude: Whole = Field(1, description="layers before the block")
    layers: Count = Field(1, description="layers of the block")
    coda: Whole = Field(1, description="layers after the block")
    mean_loops: float = Field(4.0, ge=1, description="of the draw of loops in training")
    most_loops: Count = Field(12, description="of that draw")
    truncate: Count = Field(4, description="iterations that gradients flow through")
    test_loops: Counts = Field((1, 2, 3, 4, 6, 8, 12), description="of the test")
    exits: tuple[Positive, ...] = Field(
        (0.05, 0.1, 0.2, 0.4), description="thresholds of early exit"
    )
    exit_loops: Count = Field(8, description="loops at most with early exit")
    windows: Count = Field(128, description="of the test")
    scored: Count = Field(32, description="windows read byte by byte for early exit")
    problems: Count = Field(20, description="of each reasoning primitive")
    shots: Whole = Field(5, description="examples before each of them")

    def __post_init__(self) -> None:
        BlockConfig(self.d_model, self.n_heads, 1)


def prove(settings: Settings) -> None:
    """Raises ValueError if there is no corpus or it is too small."""
    _long_enough(load_corpus(settings.corpus), settings.context)


def _long_enough(corpus: Corpus, context: int) -> Corpus:
    if min(len(corpus.train), len(corpus.test)) < context + 1:
        raise ValueError(
            f"the corpus {corpus.about['folder']} has {len(corpus.train)} bytes for training and "
            f"{len(corpus.test)} for the test: a window takes {context + 1}, give more text"
        )
    return corpus


PRESETS = {
    "cpu": Settings(
        Training(
            steps=600,
            batch_size=16,
            lr=3e-3,
            muon_lr=0.02,
            warmup=0.03,
            decay="linear",
            weight_decay=0.01,
            clip=1.0,
        )
    ),
    "paper": Settings(
        Training(steps=400_000, batch_size=512, lr=0.01, optimizer="adafactor", clip=1.0),
        context=1280,
        d_model=2048,
        n_heads=32,
        d_hidden=5120,
        activation="gelu_tanh",
        prelude=4,
        layers=4,
        coda=4,
        windows=1024,
        problems=200,
    ),
}


# Corpus


@dataclass(frozen=True)
class Corpus:
    """A corpus of bytes (uint8), split in two; `about` names its source, JSON-able."""

    train: np.ndarray
    test: np.ndarray
    about: dict[str, Any]


def load_corpus(path: str = "") -> Corpus:
    """Reads a file, or the texts in a folder; by default Python's standard library.

    Raises ValueError if there is no text; the message says how to give a corpus.
    """
    remedy = "give a text file or a folder of texts with --set corpus=PATH"
    if path:
        place, about = Path(path), {"what": "given", "licence": "the giver's"}
        if not place.exists():
            raise ValueError(f"there is no corpus {place}: {remedy}")
        files = (
            [place]
            if place.is_file()
            else sorted(f for f in place.rglob("*") if f.suffix in SUFFIXES and f.is_file())
        )
    else:
        place = Path(sysconfig.get_path("stdlib"))
        about = {
            "what": f"sources of Python {platform.python_version()}'s standard library",
            "licence": "PSF-2.0",
        }
        files = sorted(place.glob("*.py"))
    texts = [text for text in (f.read_bytes() for f in files) if text]
    if not texts:
        wanted = ", ".join(SUFFIXES) if path else "*.py"
        raise ValueError(f"no corpus found: looked for {wanted} with text in {place}; {remedy}")
    if len(texts) >= TEST_SHARE:
        test = texts[TEST_SHARE - 1 :: TEST_SHARE]
        train_texts = [t for i, t in enumerate(texts, start=1) if i % TEST_SHARE]
    else:
        whole = b"".join(texts)
        cut = len(whole) - len(whole) // TEST_SHARE
        train_texts, test = [whole[:cut]], [whole[cut:]]
    parts = [np.frombuffer(b"".join(part), np.uint8) for part in (train_texts, test)]
    about |= {
        "folder": str(place),
        "files": len(texts),
        "sha256": hashlib.sha256(b"".join(texts)).hexdigest(),
        "train_bytes": len(parts[0]),
        "test_bytes": len(parts[1]),
    }
    return Corpus(*parts, about)


def windows(text: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Cuts windows out of a text.

    Args:
        text: The bytes.
        starts: Where windows start.
        length: Bytes of a window.

    Returns:
        (len(starts), length) int64.
    """
    return text[starts[:, None] + np.arange(length)].astype(np.int64)


# The recipe


def make_model(settings: Settings, seed: int) -> LoopedClassifier:
    s = settings
    torch.manual_seed(seed)
    block = BlockConfig(
        s.d_model,
        s.n_heads,
        s.layers,
        d_hidden=s.d_hidden,
        activation=s.activation,
        causal=True,
        injection="add",
        loop_norm="post",
    )
    return LoopedClassifier(
        block, 256, loops=round(s.mean_loops), prelude=s.prelude, coda=s.coda, recompute="state"
    )


def run(
    settings: Settings, folder: RunFolder, *, seed: int, device: str, display: Display
) -> dict[str, Any]:
    s = settings
    corpus = _long_enough(load_corpus(s.corpus), s.context)
    least = s.context + 1

    def draw(rng: np.random.Generator, _: int):
        starts = rng.integers(0, len(corpus.train) - s.context, s.training.batch_size)
        return windows(corpus.train, starts, least), [sample_loops(rng, s.mean_loops, s.most_loops)]

    def loss(model: LoopedClassifier, text: Tensor, loops: list[int]):
        return model.loss(*_next_bytes(text), loops=loops[0], truncate=s.truncate)

    model = make_model(s, seed)
    trained = train(
        model, loss, draw, s.training, folder, "looped_lm", display, seed=seed, device=device
    )
    starts = np.linspace(0, len(corpus.test) - least, s.windows).astype(np.int64)
    text = torch.from_numpy(windows(corpus.test, starts, least)).to(device)
    return {
        "corpus": corpus.about,
        "parameters": model.parameter_count(),
        "seconds": round(trained.seconds, 2),
        "history": trained.history,
        "loss_by_loops": {str(t): _loss(model, text, t) for t in s.test_loops},
        "exits": _early_exits(model, text[: s.scored], s),
        "primitives": {
            f"depth {depth}, {form}": variable_assignment_accuracy(
                partial(_complete, model), depth, form, problems=s.problems, shots=s.shots
            )
            for depth in (0, 1)
            for form in FORMS
        },
        "sample": _complete(model, ["def "], 120, temperature=0.5)[0],
    }


def _next_bytes(text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns tokens, rows, targets of windows (B, n + 1): every byte but the first is a target."""
    targets = text[:, 1:].flatten()
    return text[:, :-1], torch.arange(len(targets), device=text.device), targets


def _loss(model: LoopedClassifier, text: Tensor, loops: int) -> float:
    """Returns the mean −log probability of a byte, in nats."""
    total = 0.0
    with inference(model):
        for part in text.split(32):
            total += model.row_losses(*_next_bytes(part), loops=loops)[0].sum().item()
    return total / text[:, 1:].numel()


def _early_exits(model: LoopedClassifier, text: Tensor, s: Settings) -> list[dict[str, float]]:
    """Returns loss, mean loops and processor seconds for each threshold; 0, without exit, first."""
    found = []
    for below in (0.0, *s.exits):
        started = time.process_time()
        scores = score(model, text, loops=s.exit_loops, exit_threshold=below)
        found.append(
            {
                "exit_threshold": below,
                "loss": float(scores.losses.mean()),
                "loops": float(scores.loops.mean()),
                "seconds": round(time.process_time() - started, 3),
            }
        )
    return found


def _complete(
    model: LoopedClassifier, prompts: Sequence[str], new: int, temperature: float = 0.0
) -> list[str]:
    texts = []
    for first in range(0, len(prompts), 4):  # long prompts: few at a time
        read = [list(prompt.encode()) for prompt in prompts[first : first + 4]]
        written = generate(model, read, new, temperature=temperature)
        texts += [bytes(row.tolist()).decode(errors="replace") for row in written.tokens]
    return texts


def rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Makes the table: perplexity per byte by loops, then with early exit."""
    lines = [
        [f"{t} loops", float(np.exp(loss)), loss / np.log(2), None, None]
        for t, loss in results["loss_by_loops"].items()
    ]
    for e in results["exits"]:
        name = f"exit below {e['exit_threshold']:g}" if e["exit_threshold"] else "no exit"
        bits = e["loss"] / np.log(2)
        lines.append([name, float(np.exp(e["loss"])), float(bits), e["loops"], e["seconds"]])
    lines += [[name, None, None, None, None] for name in _primitive_lines(results)]
    return ["test", "perplexity", "bits a byte", "mean loops", "reading (s)"], lines


def _primitive_lines(results: Mapping[str, Any]) -> list[str]:
    return [f"{name}: {100 * share:.0f} % correct" for name, share in results["primitives"].items()]


def plot(results: Mapping[str, Any], path: Path) -> Path:
    """Plots perplexity against loops, with and without early exit, and the training loss."""
    by_loops = {int(t): float(np.exp(loss)) for t, loss in results["loss_by_loops"].items()}
    exits = [(e["loops"], float(np.exp(e["loss"]))) for e in results["exits"]]
    alike = {"all bytes loop alike": (list(by_loops), list(by_loops.values()))}
    early = {"none, and at each threshold": tuple(map(list, zip(*sorted(exits), strict=True)))}
    history = results["history"]
    losses = {"training": ([e["step"] for e in history], [e["loss"] for e in history])}
    panels = [
        Panel("text not trained on", "loops a byte", "perplexity per byte", alike),
        Panel("early exit, fewer windows", "mean loops a byte", "perplexity per byte", early),
        Panel("training", "step", "loss (nats a byte)", losses),
    ]
    return draw_panels(path, panels, "Looped language model over bytes")
