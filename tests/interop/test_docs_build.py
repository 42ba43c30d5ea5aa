"""`make docs` builds the API reference, every warning an error, with the pages of each topic."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "relay_fast.html": "LoopedBlock",
    "relay_fast/engine.html": "Memory against T",
    "relay_fast/kernels.html": "Numerics",
    "relay_fast/tasks.html": "A task of one's own",
}


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_reference_builds_without_a_warning(tmp_path) -> None:
    pytest.importorskip("pdoc")
    plan = ["make", "-n", "docs", f"SITE={tmp_path}", "VENV=.venv-none"]
    # Not as a part of the make that runs the tests.
    env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    printed = subprocess.run(plan, cwd=ROOT, capture_output=True, text=True, check=True, env=env)
    text = printed.stdout
    command = text[text.index("PYTHONWARNINGS=") :].replace(".venv-none/bin/python", sys.executable)
    done = subprocess.run(
        command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert "Warn" not in done.stderr
    for page, words in PAGES.items():
        assert words in (tmp_path / page).read_text(), page
    documented = {path.stem for path in (tmp_path / "relay_fast").glob("*.html")}
    folders = {path.parent.name for path in (ROOT / "relay_fast").glob("*/__init__.py")}
    assert folders - {"presets"} <= documented
