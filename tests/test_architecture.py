"""The wings of the package import downwards only, and no file or function grows out of hand, in
the package, its tests and its benchmarks.

Lazy imports (in functions), relative ones and modules named by a string (importlib) count.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
# The lowest floor first. A wing imports itself and what stands on lower floors.
FLOORS = (
    ("kernels",),
    ("utils",),
    ("config",),
    ("tasks", "batch", "reporting"),
    ("data", "ops"),
    ("functional", "engine"),
    ("models",),
    ("training", "decoding"),
    ("relay",),
    ("train", "generate", "evaluate"),
    ("recipes", "__main__"),
)
LEVEL = {wing: level for level, wings in enumerate(FLOORS) for wing in wings}
# Documented aliases: PackedBatch.looped and PackedBatch.autoregressive collate samples.
EXCEPTIONS = {("relay_fast.batch.packed", "relay_fast.data.collate")}
# These name other modules for their users and are imported by everybody.
HOOKS = {"relay_fast", "relay_fast._kernels_hook", "relay_fast._moved_paths"}
SHIMS = {"chain_dataset", "graphs", "presets"}  # paths of before that keep working
COMMANDS_AND_MORE = {"__main__", "config", "evaluate", "functional", "generate", "train"}
MOST_LINES, LONGEST_FUNCTION = 450, 60
REASON = "# Long: "  # above a longer function, and then why


class Import(NamedTuple):
    source: str  # module that imports
    target: str
    place: str  # file and line


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "relay_fast" else ("relay_fast", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_of(path): path
    for top in ("relay_fast", "kernels")
    for path in sorted((ROOT / top).rglob("*.py"))
}
AROUND = [path for top in ("tests", "benchmarks") for path in sorted((ROOT / top).rglob("*.py"))]
EVERY_FILE = [*FILES.values(), *AROUND]


def docstrings(tree: ast.AST) -> set[ast.AST]:
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    first = (n.body[0] for n in ast.walk(tree) if isinstance(n, kinds) and n.body)
    return {n.value for n in first if isinstance(n, ast.Expr)}


def absolute(module: str, node: ast.ImportFrom) -> str:
    """What `from .x import y` imports from, seen from `module`."""
    if not node.level:
        return node.module or ""
    package = module.split(".") if FILES[module].stem == "__init__" else module.split(".")[:-1]
    above = package[: len(package) - node.level + 1]
    return ".".join([*above, node.module] if node.module else above)


def targets(module: str, node: ast.AST) -> Iterator[str]:
    """The modules of the package that a node imports or names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        source = absolute(module, node)
        for alias in node.names:
            below = f"{source}.{alias.name}"
            if below in FILES:
                yield below
            elif source != "relay_fast" or not alias.name.startswith("__"):
                yield source
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        name = node.value.partition(":")[0]  # "module:Class" too
        if name in FILES and "." in name:
            yield name
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        first = node.args[0] if node.args else None
        if isinstance(first, ast.Constant) and str(first.value).startswith("."):
            level = len(first.value) - len(first.value.lstrip("."))
            yield absolute(module, ast.ImportFrom(first.value[level:], [], level))


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import relay_fast.train", {"relay_fast.train"}),
        ("def f():\n    from relay_fast.relay import stages", {"relay_fast.relay.stages"}),
        ("from relay_fast.relay.stages import Context", {"relay_fast.relay.stages"}),
        ("from ..relay import stages", {"relay_fast.relay.stages"}),
        ("from . import layers", {"relay_fast.ops.layers"}),
        ("from relay_fast import loop", {"relay_fast"}),
        ("import_module('relay_fast.relay.stages')", {"relay_fast.relay.stages"}),
        ("importlib.import_module('..relay.stages', __package__)", {"relay_fast.relay.stages"}),
        (
            "TASKS = {'addition': 'relay_fast.tasks.addition:Addition'}",
            {"relay_fast.tasks.addition"},
        ),
        ("from relay_fast import __version__\nimport torch, sys", set()),
    ],
)
def test_every_kind_of_import_is_seen(code: str, found: set[str]) -> None:
    """As a line of relay_fast/ops/dispatch.py."""
    nodes = ast.walk(ast.parse(code))
    seen = {name for node in nodes for name in targets("relay_fast.ops.dispatch", node)}
    assert {name for name in seen if name.split(".")[0] == "relay_fast"} == found


def imports() -> Iterator[Import]:
    for module, path in FILES.items():
        tree = ast.parse(path.read_text())
        left_out = docstrings(tree)
        for node in ast.walk(tree):
            if node in left_out:
                continue
            for target in targets(module, node):
                if target.split(".")[0] == "relay_fast" and target != module:
                    place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
                    yield Import(module, target, place)


def wing(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def checked_imports() -> list[Import]:
    """All but those of the hooks and shims, and the named exceptions."""
    return [
        found
        for found in imports()
        if found.source not in HOOKS
        and not (wing(found.source) in SHIMS and found.source.count(".") == 1)
        and found.target not in HOOKS - {"relay_fast"}
        and (found.source, found.target) not in EXCEPTIONS
    ]


def test_every_module_belongs_to_a_floor() -> None:
    unknown = {m for m in FILES if m not in HOOKS and wing(m) not in {*LEVEL, *SHIMS}}
    assert not unknown, f"{sorted(unknown)} stand on no floor of tests/test_architecture.py"


def test_no_import_runs_up() -> None:
    wrong = []
    for source, target, place in checked_imports():
        above, below = wing(source), wing(target)
        if above == below or LEVEL.get(below, len(FLOORS)) < LEVEL[above]:
            continue
        wrong.append(f"{place} imports {target}: {above} may not import {below or 'the package'}")
    assert not wrong, "\n".join(wrong)


def test_no_imports_in_a_circle() -> None:
    graph: dict[str, set[str]] = {module: set() for module in FILES}
    for source, target, _ in checked_imports():
        graph[source] |= {target} & set(FILES)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            circle = " -> ".join([*path[path.index(module) :], module])
            pytest.fail(f"imports in a circle: {circle}", pytrace=False)
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, (*path, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_only_doors_stand_directly_in_the_package() -> None:
    hooks = {name.partition(".")[2] or "__init__" for name in HOOKS}
    there = {path.stem for path in (ROOT / "relay_fast").glob("*.py")}
    allowed = hooks | SHIMS | COMMANDS_AND_MORE
    assert there <= allowed, f"{sorted(there - allowed)} belong into a wing"
    for name in SHIMS & there:
        tree = ast.parse((ROOT / "relay_fast" / f"{name}.py").read_text())
        assert len(tree.body) <= 3, f"relay_fast/{name}.py is more than a shim"


def test_no_file_is_too_long() -> None:
    lines = {path.relative_to(ROOT): path.read_text().count("\n") for path in EVERY_FILE}
    long = {str(path): count for path, count in lines.items() if count > MOST_LINES}
    assert not long, f"over {MOST_LINES} lines: {long}"


def is_exempt(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> bool:
    """Compiled for a device or by numba, an argument parser, or with a reason beside it."""
    decorators = [ast.unparse(d) for d in node.decorator_list]
    if any("jit" in decorator for decorator in decorators):
        return True
    if any("ArgumentParser" in ast.unparse(n) for n in ast.walk(node) if isinstance(n, ast.Call)):
        return True
    above = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 2
    while above >= 0 and lines[above].lstrip().startswith("#"):
        if lines[above].lstrip().startswith(REASON):
            return True
        above -= 1
    return False


def test_no_function_is_too_long() -> None:
    wrong = []
    for path in EVERY_FILE:
        text = path.read_text()
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            length = node.end_lineno - node.lineno + 1
            if length > LONGEST_FUNCTION and not is_exempt(node, lines):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {length} lines")
    assert not wrong, f"over {LONGEST_FUNCTION} lines and no '{REASON}…' above:\n" + "\n".join(
        wrong
    )


SKIPPED = "# fmt: " + "skip"
KERNEL = re.compile(r"\bops\.\w+$|(_fwd|_bwd|_grad|_ref|_kernel|\])$")  # and kernel[grid]
DISPLAYS = ast.Tuple | ast.List | ast.Set | ast.Dict


def is_kernel_call_or_table(statement: ast.AST) -> bool:
    for node in ast.walk(statement):
        if isinstance(node, ast.Call) and KERNEL.search(ast.unparse(node.func)):
            return True
        row = node.elt if isinstance(node, ast.ListComp | ast.GeneratorExp) else node
        if isinstance(row, DISPLAYS) and len(list(ast.iter_child_nodes(row))) > 2:
            return True
    return False


def lines_that_may_skip(tree: ast.AST) -> Iterator[int]:
    """Lines of kernels' call sites, tables and jit functions, which need no formatter."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            jit = any("jit" in ast.unparse(d) for d in node.decorator_list)
            found = [node] if jit else node.decorator_list
        elif isinstance(node, ast.For):
            found = [node.iter]
        else:
            found = [node] if isinstance(node, ast.stmt) and not hasattr(node, "body") else []
        for part in found:
            if isinstance(part, ast.FunctionDef) or is_kernel_call_or_table(part):
                last = part.end_lineno + isinstance(node, ast.For)
                yield from range(part.lineno, last + 1)


def test_the_formatter_is_held_off_kernels_and_tables_only() -> None:
    wrong = []
    for path in EVERY_FILE:
        if path.is_relative_to(ROOT / "kernels"):
            continue  # kernels, and what has their arguments
        lines = path.read_text().splitlines()
        skipped = {number for number, line in enumerate(lines, 1) if SKIPPED in line}
        if skipped:
            skipped -= set(lines_that_may_skip(ast.parse(path.read_text())))
        wrong += [f"{path.relative_to(ROOT)}:{number}" for number in sorted(skipped)]
    assert not wrong, f"{SKIPPED} on no jit signature, kernel's call site or table: {wrong}"


def outside_imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of what a test or benchmark imports, by a statement or importlib."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [a.value for a in node.args if isinstance(a, ast.Constant)]
            yield from ((node.lineno, name) for name in names)


def may_import(path: Path, name: str) -> bool:
    """Tests import tests.support and no other test, benchmarks nothing of tests/."""
    parts = name.split(".")
    if parts[0] == "" or parts[0].startswith("test_") or parts[0] == "conftest":
        return False
    if parts[0] == "tests":
        return path.is_relative_to(ROOT / "tests") and parts[1:2] == ["support"]
    return True


def test_no_test_imports_a_test_and_no_benchmark_imports_tests() -> None:
    assert len(AROUND) > 50 and ROOT / "tests" / "support" / "memory.py" in AROUND
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in AROUND
        for line, name in outside_imports(path)
        if not may_import(path, name)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("top", "name", "allowed"),
    [
        ("tests", "tests.support.memory", True),
        ("tests", "benchmarks.numerics.assert_close", True),
        ("tests", "tests.engine.test_loop", False),
        ("tests", "tests.conftest", False),
        ("tests", "test_loop", False),
        ("tests", ".test_loop.check", False),
        ("benchmarks", "tests.support.memory", False),
        ("benchmarks", "benchmarks.common", True),
    ],
)
def test_what_tests_and_benchmarks_may_import(top: str, name: str, allowed: bool) -> None:
    assert may_import(ROOT / top / "x.py", name) == allowed
