"""The sdist and the wheel: what is in them, and that they work outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import relay_fast

ROOT = Path(__file__).resolve().parents[1]
VERSION = relay_fast.__version__
MEGABYTE = 10**6
CODE = "import sys, setuptools.build_meta as backend; print(getattr(backend, sys.argv[1])({!r}))"

SMOKE = f"""
import time
began = time.process_time()
import relay_fast
assert time.process_time() - began < 3
from pathlib import Path
site = Path(relay_fast.__file__).parents[1]
import relay_fast.kernels as kernels
assert Path(kernels.__file__) == site / "relay_fast" / "kernels" / "__init__.py"
assert relay_fast.__version__ == {VERSION!r}
from importlib.metadata import version
assert version("relay_fast") == {VERSION!r}
import torch
block = relay_fast.LoopedBlock(d_model=16, n_heads=2, n_layers=1)
assert block(torch.zeros(2, 3, 16), loops=4).shape == (2, 3, 16)
from relay_fast.relay.presets import load_preset, preset_names
assert "paper" in preset_names() and all(load_preset(name) for name in preset_names())
print(site)
"""


def build(kind: str, source: Path, folder: Path) -> Path:
    """Builds with setuptools' backend, as pip and `python -m build` do, but without a download."""
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(str(folder)), kind],
        cwd=source, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel, built from the unpacked sdist, which is what a package index builds from."""
    pytest.importorskip("setuptools", minversion="77")
    work = tmp_path_factory.mktemp("wheel")
    tree = work / "tree"
    for folder in ("relay_fast", "kernels"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=lambda *_: ["__pycache__"])
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    sdist = build("build_sdist", tree, work / "sdist")
    assert sdist.name == f"relay_fast-{VERSION}.tar.gz" and sdist.stat().st_size < MEGABYTE
    with tarfile.open(sdist) as file:
        file.extractall(work / "unpacked", filter="data")
    return build("build_wheel", work / "unpacked" / f"relay_fast-{VERSION}", work / "dist")


def test_a_wheel_is_small_and_whole(wheel) -> None:
    assert wheel.name == f"relay_fast-{VERSION}-py3-none-any.whl"
    assert wheel.stat().st_size < MEGABYTE
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
        metadata = Parser().parsestr(file.read(f"relay_fast-{VERSION}.dist-info/METADATA").decode())
    expected = set()
    for top, inside in (("relay_fast", "relay_fast"), ("kernels", "relay_fast/kernels")):
        files = (p for p in (ROOT / top).rglob("*") if p.suffix in (".py", ".toml", ".typed"))
        expected |= {f"{inside}/{p.relative_to(ROOT / top).as_posix()}" for p in files}
    assert names == expected | {"relay_fast/py.typed"}
    assert metadata["Name"] == "relay_fast" and metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.11"
    triton = [x for x in metadata.get_all("Requires-Dist") if x.startswith("triton")]
    assert triton == ['triton>=3.6; sys_platform == "linux"']  # it has no build for others


def test_an_installed_wheel_runs_outside_the_checkout(wheel, tmp_path) -> None:
    pytest.importorskip("pip")
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (site,) = (venv / "lib").glob("python*/site-packages")
    # The other packages come from the environment of the tests, behind the new one.
    others = [path for path in sys.path if path.endswith("-packages")]
    (site / "zz_others.pth").write_text("\n".join(others))
    python = [str(venv / "bin" / "python")]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    options = {"cwd": tmp_path, "env": env, "capture_output": True, "text": True, "timeout": 300}
    install = ["-m", "pip", "install", "--no-deps", "-q", "--disable-pip-version-check"]
    install += ["--ignore-installed"]  # relay_fast may be one of the others
    done = subprocess.run([*python, *install, str(wheel)], **options)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([*python, "-c", SMOKE], **options)
    assert (done.returncode, done.stdout.strip()) == (0, str(site)), done.stderr
    done = subprocess.run([*python, "-m", "relay_fast.recipes", "list"], **options)
    assert done.returncode == 0 and "p_hop" in done.stdout


def test_the_workflow_tests_the_pythons_that_are_promised() -> None:
    import re
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    promised = re.findall(r"Python :: (3\.\d+)", " ".join(project["classifiers"]))
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    (matrix,) = re.findall(r"python: \[(.*)\]", workflow)
    assert re.findall(r"[\d.]+", matrix) == promised == ["3.11", "3.12", "3.13"]
    assert project["requires-python"] == f">={promised[0]}"
    targets = re.findall(r"run: make ([\w-]+)", workflow)
    assert {"test", "test-interop", "docs"} == set(targets)
    news = (ROOT / ".github" / "CHANGELOG.md").read_text()
    assert re.findall(r"^## (\S+)", news, re.MULTILINE)[0] == VERSION
