"""`python -m relay_fast`: its lines, and that its packages are those of pyproject.toml."""

from __future__ import annotations

import builtins
import re
import tomllib
from pathlib import Path

import torch

import relay_fast
import relay_fast.__main__ as command

ROOT = Path(__file__).resolve().parents[1]


def lines(text: str) -> dict[str, str]:
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in text.splitlines()}


def test_the_report(monkeypatch, capsys) -> None:
    monkeypatch.setenv("RELAY_FAST_IMPL", "torch")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert command.main() == 0
    printed = capsys.readouterr().out
    found = lines(printed)
    assert found["relay_fast"] == f"{relay_fast.__version__} in {ROOT / 'relay_fast'}"
    assert f"torch {torch.__version__}, " in found["packages"]
    assert "RELAY_FAST_IMPL=torch" in found["variables"] and found["cuda"].startswith("no card: ")
    block = next(line for line in printed.splitlines() if line.startswith("on cpu"))
    assert "RELAY_FAST_IMPL=torch is set" in block
    assert block.endswith("A small block: forward and backward ran")
    assert len(printed.splitlines()) < 20


def test_a_broken_torch_is_a_line_and_no_traceback(monkeypatch, capsys) -> None:
    real = builtins.__import__

    def broken(name, *rest, **options):
        if name == "torch":
            raise OSError("libcudart.so.12: cannot open shared object file")
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", broken)
    assert command.main() == 0
    found = lines(capsys.readouterr().out)
    assert found["cuda"] == "failed: OSError: libcudart.so.12: cannot open shared object file"


def test_cards_are_named(monkeypatch) -> None:
    class Card:
        name, major, minor, total_memory = "NVIDIA H200", 9, 0, 141 * 2**30

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: Card)
    monkeypatch.setattr(command, "_explained", lambda device: f"asked of {device}")
    found = list(command.report())
    card = f"NVIDIA H200, sm_90, 141 GiB, CUDA {torch.version.cuda}"
    assert ("cuda:0", card) in found and ("cuda:1", card) in found
    assert found[-1] == ("on cuda:1", "asked of cuda:1")


def test_its_packages_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name = lambda requirement: re.match(r"[\w-]+", requirement)[0]
    assert command.REQUIRED == tuple(map(name, project["dependencies"]))
    extras = project["optional-dependencies"]
    assert set(command.EXTRAS) == set(extras) - {"test"}
    for extra, packages in command.EXTRAS.items():
        assert packages == tuple(map(name, extras[extra])), extra
