"""The package: what an import costs and touches, and that every folder is packaged."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.fresh_python import run_fresh

ROOT = Path(__file__).resolve().parent.parent


def run_python(code: str, cwd: Path, pythonpath: Path | None = None) -> str:
    """Standard output of `code` where nothing but torch is imported, stripped."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHONPATH", "COV_"))}
    if pythonpath is not None:
        env["PYTHONPATH"] = str(pythonpath)
    done = run_fresh(code, cwd=cwd, environment=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def setup_arguments() -> dict:
    """The keyword arguments of setup(), which are literals."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    (call,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
    ]
    return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}


def test_import_takes_less_than_3_s():
    # CPU time of the whole process: wall time would measure the machine's other load.
    code = "import relay_fast, time; print(time.process_time())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 3.0


def test_import_touches_neither_triton_nor_numba_nor_cuda():
    code = """
import sys, relay_fast, relay_fast.kernels
print(sorted({"triton", "numba", "matplotlib", "pydantic", "rich"} & set(sys.modules)))
import torch
print(torch.cuda.is_initialized())
"""
    assert run_python(code, ROOT) == "[]\nFalse"


def test_a_block_needs_no_pydantic(tmp_path):
    """Nor is it imported by compiled code, a task or a model of one."""
    code = """
import sys, torch
sys.modules["pydantic"] = None  # importing it is an error
import relay_fast, relay_fast.functional, relay_fast.engine, relay_fast.tasks
from relay_fast.config import BlockConfig, ModelConfig
block = relay_fast.LoopedBlock(16, 2, 1)
model = relay_fast.LoopedTransformer(ModelConfig(BlockConfig(16, 2, 1), 64))
print(block(torch.zeros(1, 3, 16), 2).shape == (1, 3, 16))
"""
    assert run_python(code, tmp_path, pythonpath=ROOT) == "True"


def test_bare_checkout_from_another_folder(tmp_path):
    code = "import relay_fast, relay_fast.kernels as k\nfor m in relay_fast, k: print(m.__file__)"
    relay_fast, kernels = run_python(code, tmp_path, pythonpath=ROOT).splitlines()
    assert Path(relay_fast) == ROOT / "relay_fast" / "__init__.py"
    assert Path(kernels) == ROOT / "kernels" / "__init__.py"


def test_kernels_come_from_the_checkout():
    code = """
import importlib, sys
import relay_fast
k = importlib.import_module("relay_fast.kernels")
print(k is relay_fast.kernels, k.__name__, k.__package__, *k.__path__)
"""
    assert run_python(code, ROOT) == (
        f"True relay_fast.kernels relay_fast.kernels {ROOT / 'kernels'}"
    )


def test_a_second_checkout_uses_its_own_kernels(tmp_path):
    # Whatever is installed, editable or not, in the environment that runs the tests.
    for folder in ("relay_fast", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=lambda *_: ["__pycache__"])
    shutil.copy(ROOT / "setup.py", tmp_path)
    code = "import relay_fast.kernels as k; print(k.__file__)"
    assert Path(run_python(code, tmp_path)) == tmp_path / "kernels" / "__init__.py"


def test_installed_package_ignores_a_stranger_called_kernels(tmp_path):
    # site-packages: our kernels inside relay_fast, somebody else's `kernels` beside it.
    ignore = lambda *_: ["__pycache__"]
    shutil.copytree(ROOT / "relay_fast", tmp_path / "relay_fast", ignore=ignore)
    shutil.copytree(ROOT / "kernels", tmp_path / "relay_fast" / "kernels", ignore=ignore)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise ImportError('a stranger')")
    code = "import relay_fast.kernels as k; print(k.__file__)"
    expected = tmp_path / "relay_fast" / "kernels" / "__init__.py"
    assert Path(run_python(code, tmp_path)) == expected


def test_top_level_kernels_exports_only_its_version():
    # transformers probes for a package called `kernels` and reads its version.
    code = """
import kernels
print({n: v for n, v in vars(kernels).items() if n == "__version__" or not n.startswith("__")})
"""
    assert run_python(code, ROOT) == "{'__version__': '0'}"


def test_every_folder_with_python_files_is_packaged():
    arguments = setup_arguments()
    folders = {p.parent for top in ("relay_fast", "kernels") for p in (ROOT / top).rglob("*.py")}
    expected = set()
    for folder in folders:
        parts = folder.relative_to(ROOT).parts
        expected.add(".".join(parts if parts[0] == "relay_fast" else ("relay_fast", *parts)))
    assert set(arguments["packages"]) == expected
    for name in expected:
        source = ROOT / arguments["package_dir"].get(name, name.replace(".", "/"))
        assert (source / "__init__.py").is_file(), f"{source} has no __init__.py"


def test_every_data_file_is_packaged():
    arguments = setup_arguments()
    packaged = set()
    for name, patterns in arguments["package_data"].items():
        source = ROOT / arguments["package_dir"].get(name, name.replace(".", "/"))
        packaged |= {p for pattern in patterns for p in source.glob(pattern)}
    data = {
        p
        for top in ("relay_fast", "kernels")
        for p in (ROOT / top).rglob("*")
        if p.is_file() and p.suffix not in (".py", ".pyc", ".nbi", ".nbc")
    }
    assert data == packaged


def test_public_names():
    import relay_fast

    missing = set(relay_fast.__all__) - set(dir(relay_fast))
    assert not missing
    with pytest.raises(AttributeError, match="'relay_fast' has no attribute 'nothing'"):
        relay_fast.nothing  # noqa: B018


def test_an_editable_install_works_in_the_folder_that_holds_the_clone(tmp_path):
    """Python takes the clone, a folder called relay_fast without __init__.py, for a namespace
    package unless sys.path leads to the real one."""
    pytest.importorskip("setuptools", minversion="77")
    pytest.importorskip("pip")
    clone, venv = tmp_path / "a b" / "relay_fast", tmp_path / "venv"
    for folder in ("relay_fast", "kernels"):
        shutil.copytree(ROOT / folder, clone / folder, ignore=lambda *_: ["__pycache__"])
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (site,) = (venv / "lib").glob("python*/site-packages")
    # The other packages come from the environment of the tests, but not relay_fast.
    others = [path for path in sys.path if path.endswith("-packages")]
    (site / "zz_others.pth").write_text("\n".join(others))
    python = [str(venv / "bin" / "python")]
    install = [*python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-q"]
    options = {"capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([*install, "--disable-pip-version-check", "-e", str(clone)], **options)
    assert done.returncode == 0, done.stderr
    code = """
import importlib.util, relay_fast, relay_fast.kernels as k
print(relay_fast.__version__)
for file in relay_fast.__file__, k.__file__, importlib.util.find_spec("relay_fast.tasks").origin:
    print(file)
"""
    options |= {"env": {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}}
    for cwd in (clone.parent, clone, tmp_path):
        done = subprocess.run([*python, "-c", code], cwd=cwd, **options)
        assert done.returncode == 0, (cwd, done.stderr)
        _, *files = done.stdout.splitlines()
        folders = [Path(file).parent.relative_to(clone) for file in files]
        assert folders == [Path("relay_fast"), Path("kernels"), Path("relay_fast/tasks")]
    command = [*python, "-m", "relay_fast.recipes", "list"]
    assert subprocess.run(command, cwd=clone.parent, **options).returncode == 0


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_in_a_folder_with_a_space(tmp_path):
    folder = tmp_path / "a b"
    folder.mkdir()
    for name in ("Makefile", "setup.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    # Not as a part of the make that runs the tests.
    env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "VENV"}
    options = {"cwd": folder, "capture_output": True, "text": True, "env": env}
    plan = subprocess.run(["make", "-n", "demo"], **options, check=True).stdout.splitlines()
    assert plan[-1] == ".venv/bin/python -m relay_fast.train --preset cpu --out runs/cpu"
    assert "touch .venv/.with-train" in plan
    plan = subprocess.run(["make", "-n", "test-interop"], **options, check=True).stdout.splitlines()
    assert plan[-1] == ".venv/bin/python -m pytest tests/interop -q"
    assert "touch .venv/.with-interop" in plan
    assert any(".[train,test,interop,docs]" in line for line in plan)
    refused = subprocess.run(["make", "-n", "demo", "VENV=/tmp/v 1"], **options)
    assert refused.returncode != 0 and "make knows no names with spaces" in refused.stderr
