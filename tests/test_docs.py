"""What README and the contributors' guide name is there: modules, attributes, files, commands."""

from __future__ import annotations

import ast
import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ("README.md", ".github/CONTRIBUTING.md")
TOPS = ("relay_fast", "kernels", "tests", "benchmarks", ".ci", ".github")
SOURCES = (".py", ".toml", ".csv", ".md")  # a bare name with such an end is a file of the project
LONGEST_LINE = 120


@functools.cache
def text_of(document: str) -> str:
    return (ROOT / document).read_text()


def dotted(document: str) -> list[str]:
    return sorted(set(re.findall(r"\brelay_fast(?:\.[A-Za-z_]\w*)+", text_of(document))))


def paths(document: str) -> list[str]:
    """Paths as written, `<op>` and `*` included; those of results that a command makes are not."""
    text = re.sub(r"https?://\S+", "", text_of(document))
    found = set(re.findall(r"[\w.*<>/-]+", text))
    named = (word.rstrip(".") for word in found)
    return sorted(
        word
        for word in named
        if word.split("/")[0] in TOPS
        and "/" in word
        or word.endswith(SOURCES)
        and not word.startswith("runs/")
    )


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        try:
            functools.reduce(getattr, parts[n:], found)
        except AttributeError:
            return False
        return True
    return False


def exists(path: str) -> bool:
    pattern = re.sub(r"<\w+>", "*", path).rstrip("/")
    if "/" not in pattern and pattern not in TOPS:
        tops = [ROOT / top for top in TOPS]
        return any(ROOT.glob(pattern)) or any(f for top in tops for f in top.rglob(pattern))
    return any(ROOT.glob(pattern))


@pytest.mark.parametrize("document", DOCS)
def test_every_dotted_name_can_be_imported(document: str) -> None:
    names = dotted(document)
    assert names
    assert [name for name in names if not resolves(name)] == []


@pytest.mark.parametrize("document", DOCS)
def test_every_file_is_there(document: str) -> None:
    named = paths(document)
    assert len(named) > 10
    assert [path for path in named if not exists(path)] == []


@pytest.mark.parametrize("document", DOCS)
def test_lines_are_short(document: str) -> None:
    lines = text_of(document).splitlines()
    long = {i: len(line) for i, line in enumerate(lines, 1) if len(line) > LONGEST_LINE}
    assert not long


def has_arguments(node: ast.AST) -> bool:
    return "Args:" in (ast.get_docstring(node) or "")


def public_functions(folder: Path) -> Iterator[tuple[str, ast.FunctionDef, ast.ClassDef | None]]:
    """Functions and methods of modules, classes and names without a leading underscore."""
    for path in sorted(folder.rglob("*.py")):
        if path.stem.startswith("_") and path.stem != "__init__":
            continue
        tree = ast.parse(path.read_text())
        classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name[0] != "_"]
        for owner in (tree, *classes):
            for node in owner.body:
                if isinstance(node, ast.FunctionDef) and (
                    node.name[0] != "_" or node.name == "__init__"
                ):
                    inside = owner if isinstance(owner, ast.ClassDef) else None
                    yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node, inside


def test_functions_of_more_than_two_parameters_describe_them() -> None:
    """`__init__` in its class, a method of a derived class possibly in the one that it overrides.
    Kernels are described by their launchers, `run` of the recipes in relay_fast/recipes."""
    found = [f for top in ("relay_fast", "kernels") for f in public_functions(ROOT / top)]
    documented = {node.name for _, node, owner in found if owner and has_arguments(node)}
    missing, checked = [], 0
    for place, node, owner in found:
        taken = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        jit = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
        recipe = place.startswith("relay_fast/recipes/") and node.name == "run"
        if len([name for name in taken if name not in ("self", "cls")]) <= 2 or jit or recipe:
            continue
        checked += 1
        overrides = owner is not None and owner.bases and node.name in documented
        constructor = owner is not None and node.name == "__init__" and has_arguments(owner)
        if not (has_arguments(node) or overrides or constructor):
            missing.append(place)
    assert not missing, missing
    assert checked > 300


def test_names_in_the_guide_stand_in_the_sources() -> None:
    files = (path for top in TOPS[:4] for path in (ROOT / top).rglob("*.py"))
    words = {word for path in files for word in re.findall(r"\w+", path.read_text())}
    named = set(re.findall(r"`@?([A-Za-z_][\w.]*)(?:\([^`]*\))?`", text_of(DOCS[1])))
    named = {part for name in named if not name.endswith(SOURCES) for part in name.split(".")}
    assert {"RecomputePolicy", "kept", "POLICIES", "require"} <= named <= words, named - words


def test_make_targets_are_those_of_the_makefile() -> None:
    targets = set(re.findall(r"^(?:\.\S+/)?([\w-]+):", text_of("Makefile"), re.MULTILINE))
    for document in DOCS:
        named = set(re.findall(r"(?:^|`)make ([\w-]+)", text_of(document), re.MULTILINE))
        assert named and named <= targets, document


def test_what_is_not_there_is_noticed() -> None:
    assert resolves("relay_fast.engine.loop.run_loop") and resolves("relay_fast.loop")
    assert not resolves("relay_fast.engine.no_such") and not resolves("relay_fast.policy")
    assert exists("kernels/<op>_ref.py") and exists("train.py") and exists("tests/engine/")
    assert not exists("tests/test_construction*.py") and not exists("no_such.py")
