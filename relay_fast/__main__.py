"""Prints what an issue report needs: `python -m relay_fast`.

Versions, processor and cores, cards, the optional packages of each extra, which kernels a small
block uses on each device and why, and whether it runs. What is missing or broken is reported in its
line: the report itself never fails for it.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from importlib import metadata

from relay_fast import __version__

# Packages by the extra of pyproject.toml that installs them.
REQUIRED = ("torch", "triton", "einops", "numpy", "safetensors", "numba", "filelock")
REQUIRED += ("psutil", "pydantic", "rich")
EXTRAS = {
    "train": ("matplotlib",),
    "data": ("pyarrow", "tokenizers", "datasets"),
    "interop": (
        "lightning",
        "accelerate",
        "transformers",
        "huggingface_hub",
        "datasets",
        "trl",
        "peft",
    ),
    "flash": ("flash-attn",),
    "docs": ("pdoc",),
}
VARIABLES = r"RELAY_FAST_\w+|TRITON_INTERPRET|CUDA_VISIBLE_DEVICES|OMP_NUM_THREADS"
SIZES = {"d_model": 64, "head_dim": 16, "vocabulary": 64, "activation": "gelu"}


def report() -> Iterator[tuple[str, str]]:
    """Yields the lines of the report as (name, text)."""
    yield "relay_fast", f"{__version__} in {os.path.dirname(__file__)}"
    yield "commit", _said(_commit)
    yield "python", f"{platform.python_version()}, {platform.platform()}"
    yield "packages", _installed(REQUIRED)
    for extra, packages in EXTRAS.items():
        yield f"[{extra}]", _installed(packages)
    yield "processor", _said(_processor)
    yield "cores", _said(_cores)
    variables = {k: v for k, v in sorted(os.environ.items()) if re.fullmatch(VARIABLES, k)}
    yield "variables", ", ".join(f"{k}={v}" for k, v in variables.items()) or "none set"
    cards = _said_of(_cards)
    for number, card in enumerate(cards):
        yield f"cuda:{number}", card
    if not cards:
        yield "cuda", _said(_why_no_card)
    for device in ["cpu", *(f"cuda:{number}" for number in range(len(cards)))]:
        yield f"on {device}", _said(lambda device=device: _explained(device))


def _said(find: Callable[[], str]) -> str:
    """Returns the text that `find` finds, or in one line why it could not."""
    try:
        return find()
    except Exception as error:
        reason = " ".join(str(error).split())
        return f"failed: {type(error).__name__}: {reason[:200]}"


def _said_of(find: Callable[[], list[str]]) -> list[str]:
    try:
        return find()
    except Exception:  # torch cannot be imported, which another line says
        return []


def _installed(packages: tuple[str, ...]) -> str:
    """Returns each package with its version, without importing it."""
    found = []
    for name in packages:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def _commit() -> str:
    from relay_fast.relay.run_folder import checkout_commit

    return checkout_commit() or "none (installed from a package)"


def _processor() -> str:
    from relay_fast.relay.run_folder import processor_name

    return f"{processor_name()}, {os.cpu_count()} cores"


def _cores() -> str:
    from relay_fast.utils.cores import usable_cores, usable_threads

    return f"{usable_cores()} usable cores, {usable_threads()} threads"


def _cards() -> list[str]:
    import torch

    found = []
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        arch, memory = f"sm_{card.major}{card.minor}", card.total_memory / 2**30
        found.append(f"{card.name}, {arch}, {memory:.0f} GiB, CUDA {torch.version.cuda}")
    return found


def _why_no_card() -> str:
    import torch

    if torch.version.cuda is None:
        return f"no card: torch {torch.__version__} is built without CUDA"
    return f"no card: torch is built for CUDA {torch.version.cuda}, and finds no device"


def _explained(device: str) -> str:
    """Returns which kernels a small block uses, and that it runs forward and backward."""
    import torch

    from relay_fast.functional import explain
    from relay_fast.models.looped_block import LoopedBlock

    kernels = explain(device, dtype=torch.float32, **SIZES)
    torch.manual_seed(0)
    block = LoopedBlock(d_model=64, n_heads=4, n_layers=1).to(device)
    x = torch.randn(2, 7, 64, device=device, requires_grad=True)
    block(x, 3).square().mean().backward()
    finite = all(p.grad.isfinite().all() for p in block.parameters()) and x.grad.isfinite().all()
    ran = "forward and backward ran" if finite else "ran, and its gradients are NOT finite"
    return f"{kernels}. A small block: {ran}"


def main() -> int:
    """Prints the report; the exit status is 0."""
    from relay_fast.reporting.terminal import lenient_output

    with lenient_output():
        for name, text in report():
            print(f"{name:11s} {text}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
