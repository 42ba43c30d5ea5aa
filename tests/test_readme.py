"""README's tables are those of the files, and its commands and snippets run, at small sizes."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import relay_fast.__main__ as report
import relay_fast.evaluate as evaluate
import relay_fast.generate as generate
import relay_fast.recipes.__main__ as recipes
import relay_fast.train as train
from benchmarks import addition_records, readme_tables
from relay_fast.recipes import EXAMPLES, RECIPES
from relay_fast.relay.presets import load_preset, override
from relay_fast.relay.presets.own import read_config, resolved
from relay_fast.tasks import RecordsTask

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAINED = "benchmarks/results/trained"
NO_NUMBERS = ("| folder | what is in it |",)
SEEN = "| recipe | seen |"  # by hand, with numbers of many kinds


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, "" for those without."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


def commands() -> list[str]:
    """The lines of blocks without a language that are no records, comments cut off."""
    texts = [text for text in blocks("") if not text.startswith("{")]
    lines = "\n".join(texts).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip()]


def inline(start: str) -> list[str]:
    """Commands between backquotes."""
    return sorted({" ".join(c.split()) for c in re.findall(rf"`({start}[^`]+)`", README)})


# Tables


def test_its_tables_are_those_of_the_files() -> None:
    """If not: python benchmarks/readme_tables.py."""
    assert readme_tables.written(README) == README
    assert re.findall(r"<!-- table: (\w+)", README) == [*readme_tables.TABLES]
    heads = re.findall(r"^(\|.*)\n\|[-|]+$", README, re.MULTILINE)
    marked = [table()[0] for table in readme_tables.TABLES.values()]
    assert set(heads) == {*marked, SEEN, *NO_NUMBERS}


def test_the_numbers_of_the_recipes_are_in_their_files() -> None:
    rows = README[README.index(SEEN) :].split("\n\n")[0].splitlines()[2:]
    name, checked = "", 0
    for row in rows:
        first, seen = (cell.strip() for cell in row.strip("|").split("|"))
        name = first.strip("`") or name
        text = (ROOT / "benchmarks" / "results" / "recipes" / name / "results.json").read_text()
        values = [float(x) for x in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", text)]
        for shown in re.findall(r"(?<![\w.])(\d+\.?\d*(?:/\d+\.?\d*)*) %", seen):
            for number in shown.split("/"):
                digits = len(number.partition(".")[2])
                near = (v for v in values if f"{100 * v:.{digits}f}" == number)
                assert name in WORKED_OUT or next(near, None) is not None, (name, number)
                checked += 1
    assert checked > 25


WORKED_OUT = ("linear_loop", "stacking")  # shares of theory, means over several numbers


# Commands


def small(arguments: list[str], **values: str) -> list[str]:
    """The arguments with other values of some options, as in number="2"."""
    changed = list(arguments)
    for name, value in values.items():
        option = f"--{name}"
        if option in changed:
            changed[changed.index(option) + 1] = value
    return changed


def run_train(arguments: list[str]) -> int:
    if "cuda" in " ".join(arguments):  # a card, and hours: is it understood?
        a = train._parser().parse_args(arguments)
        assert override(load_preset(a.preset), values=a.values)
        return 0
    if "--config" in arguments:
        return train.main([*arguments, "--scale", "0.0003", "--stages", "looped_aligned"])
    sizes = ["--scale", "0.0003", "--set", "workers=1", "--stages", "looped_aligned"]
    return train.main([*arguments, *sizes])


def run_generate(arguments: list[str]) -> int:
    if "cuda" in arguments:
        assert generate._parser().parse_args(arguments).dataset
        return 0
    return generate.main(small(arguments, number="4"))


def run_evaluate(arguments: list[str]) -> int:
    arguments = small(arguments, problems="1", lengths="8-9")
    if "--shard" in arguments:
        assert evaluate._parser().parse_args(arguments).shard == "0/4"
        return 0
    return evaluate.main([*arguments, *([] if "--problems" in arguments else ["--problems", "1"])])


def run_recipe(arguments: list[str]) -> int:
    changes = ["--set", "steps=2", "--set", "problems=8"] if "--out" in arguments else []
    return recipes.main([*arguments, *changes])


RUNS: dict[str, Callable[[list[str]], int | None]] = {
    "relay_fast": lambda arguments: report.main(),
    "relay_fast.train": run_train,
    "relay_fast.generate": run_generate,
    "relay_fast.evaluate": run_evaluate,
    "relay_fast.recipes": run_recipe,
    "benchmarks/addition_records.py": addition_records.main,
}


def parts(command: str) -> tuple[str, list[str]]:
    """The module or file that a command runs, and its arguments."""
    words = shlex.split(command)
    words = words[2:] if words[0] == "torchrun" else words
    if words[0] == "python" and words[1] != "-m":
        return words[1], words[2:]
    at = words.index("-m")
    return words[at + 1], words[at + 2 :]


def test_commands_run_as_printed(quick_workers, tmp_path, monkeypatch, capsys) -> None:
    """In their order, from another folder; the trained run and the records lie beside it."""
    shutil.copytree(ROOT / TRAINED, tmp_path / TRAINED)
    monkeypatch.chdir(tmp_path)
    ran = []
    for command in commands():
        if command.startswith(("pip install", "python -m venv")):
            continue
        name, arguments = parts(command)
        assert not RUNS[name](arguments), (command, capsys.readouterr().err)
        ran.append(name)
    assert set(ran) == set(RUNS) and len(ran) > 15
    assert (tmp_path / "chains.jsonl").is_file()
    assert (tmp_path / "runs" / "addition" / "looped_aligned.safetensors").is_file()


def test_what_is_installed_is_there() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    named = re.findall(r"pip install '\.\[(\w+)\]'", README)
    assert named and all(f"\n{extra} = [" in project for extra in named)
    listed = README[README.index("- **Extras**") :].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)` \(", listed)) == set(report.EXTRAS)


def options_of(script: Path) -> str:
    """The text of a script and of what the benchmarks share."""
    shared = [*(ROOT / "benchmarks").glob("common.py"), *(ROOT / "benchmarks" / "card").glob("*")]
    return "".join(path.read_text() for path in (script, *shared) if path.suffix == ".py")


def test_commands_in_sentences_are_there() -> None:
    named = inline("python ")
    assert len(named) > 12
    for command in named:
        name, arguments = parts(command.replace("…", ""))
        options = [word for word in arguments if word.startswith("--")]
        if name.endswith(".py"):
            text = options_of(ROOT / name)
        else:
            text = (ROOT / name.replace(".", "/")).with_suffix(".py")
            text = text if text.is_file() else ROOT / name.replace(".", "/") / "__main__.py"
            text = text.read_text()
        assert all(f'"{option}"' in text for option in options), command
        if name == "relay_fast.recipes":
            assert arguments[0] in RECIPES, command
    listed = README[README.index("## Recipes") :]
    assert all(f"`{name}`" in listed for name in RECIPES)
    assert all(name in EXAMPLES or f"| `{name}` |" in listed for name in RECIPES)


# Snippets


def test_snippets_run(tmp_path, monkeypatch, capsys) -> None:
    """All but two, which run in tests/interop: test_export.py and test_sharded_script.py."""
    monkeypatch.chdir(tmp_path)
    ran = list(_run_snippets(tmp_path))
    assert sorted(ran) == ["class", "in place", "in place", "interop", "interop"]


def _run_snippets(folder: Path) -> Iterator[str]:
    for text in blocks("python"):
        if "trl." in text or "fully_shard" in text:
            yield "interop"
        elif "TextTask" in text:
            assert len(text.strip().splitlines()) <= 24
            smaller = text.replace("scale=0.1", "scale=0.0003, values=['workers=1']")
            smaller = smaller.replace("tasks=[", "stages=['looped_aligned'], tasks=[")
            assert len(smaller) > len(text) + 40
            (folder / "my_tasks.py").write_text(smaller)
            done = subprocess.run(
                [sys.executable, "my_tasks.py"], cwd=folder, capture_output=True, text=True,
                timeout=300,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            assert (folder / "runs" / "parity" / "looped_aligned.safetensors").is_file()
            yield "class"
        else:
            exec(compile(text, "README.md", "exec"), {})
            yield "in place"


def test_files_of_the_readme_are_read(tmp_path) -> None:
    """Configs, with the class and the records that they name beside them."""
    first, second = blocks("toml")
    (text,) = (block for block in blocks("python") if "TextTask" in block)
    (tmp_path / "my_tasks.py").write_text(text)
    (tmp_path / "parity.toml").write_text(first)
    config = resolved(read_config(tmp_path / "parity.toml"))
    assert config["tasks"]["parity"]["train"] == [1, 8]
    assert config["vocabulary"]["tokens"] == ["[parity]", "<sep>", "0", "1"]
    for seed, name in enumerate(("sums.jsonl", "sums-test.jsonl")):
        solved = addition_records.records(range(1, 13), 30, seed=seed)
        addition_records.write(tmp_path / name, solved)
    (tmp_path / "addition.toml").write_text(second)
    config = resolved(read_config(tmp_path / "addition.toml"))
    assert config["tasks"]["addition"]["train"] == [1, 10]
    records = next(block for block in blocks("") if block.startswith("{"))
    (tmp_path / "two.jsonl").write_text(records)
    index = RecordsTask("addition", str(tmp_path / "two.jsonl"), answer_is="round").pools.index
    assert len(index) == 2


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_targets_run_what_they_say() -> None:
    for target in inline("make "):
        plan = ["make", "-n", target.split()[1]]
        assert subprocess.run(plan, cwd=ROOT, capture_output=True).returncode == 0, target
