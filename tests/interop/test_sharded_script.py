"""The README's script over `fully_shard`: two processes save, and one continues."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"
SIZES = r"(?m)^(D, HEADS, LAYERS, BATCH, TOKENS, STEPS, SAVE_EVERY) = .*$"


def script(steps: int) -> str:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (text,) = (block for block in blocks if "fully_shard(" in block)
    text, found = re.subn(SIZES, rf"\1 = 16, 2, 2, 4, 8, {steps}, 1", text)
    assert found == 1
    return text


def run(folder: Path, steps: int, size: int) -> dict[int, float]:
    """Runs the script in so many processes; returns the losses that the first prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "corpus.txt").write_bytes(README.read_bytes()[:4000])
    (folder / "train_lm.py").write_text(script(steps))
    shared = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"OMP_NUM_THREADS": 1, "PYTHONPATH": README.parent, "CUDA_VISIBLE_DEVICES": ""}
    processes = []
    for rank in range(size):
        own = {k: str(v) for k, v in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        command, options = [sys.executable, "train_lm.py"], {"cwd": folder, "text": True}
        pipe = subprocess.PIPE
        processes.append(
            subprocess.Popen(command, env=os.environ | own, stdout=pipe, stderr=pipe, **options)
        )
    try:
        texts = [process.communicate(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * size, texts
    lines = [line.split() for line in texts[0][0].splitlines()]
    return {int(step): float(loss) for step, loss in lines}


def test_two_processes_save_and_one_continues(tmp_path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    expected = run(whole, 5, 1)
    found = run(parts, 3, 2)
    assert (list(expected), list(found)) == ([1, 2, 3, 4, 5], [1, 2, 3])
    (parts / "checkpoints" / "00000009").mkdir()  # a save that was killed
    continued = run(parts, 5, 1)
    assert list(continued) == [4, 5]
    # Weights, gradients and states are rounded to bf16; the batch is the same.
    assert found | continued == pytest.approx(expected, rel=2**-8)
