"""Recipes from the shell: `python -m relay_fast.recipes NAME --preset cpu --out RUN`, `... list`.

The same command continues an interrupted run. Leaves results.json, plot.png and checkpoints.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from relay_fast.recipes import RECIPES, load_recipe

_KINDS = {
    int: "a whole number", float: "a number", str: "a text", bool: "true or false", tuple: "a list"
}  # fmt: skip


def run_recipe(
    name: str,
    out: str | Path,
    *,
    preset: str = "cpu",
    changes: Sequence[str] = (),
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, Any]:
    """Runs a recipe in the run folder `out`, or continues it there; returns results.json's content.

    changes: texts like "training.steps=20" that put other numbers into the preset's settings.
    Raises RunFolderError, ValueError, CheckpointError, Diverged with one clear sentence.
    """
    from relay_fast._errors import Diverged
    from relay_fast.display import Display
    from relay_fast.runs import RunFolder, versions
    from relay_fast.store import check_device

    recipe = load_recipe(name)
    if preset not in recipe.PRESETS:
        known = ", ".join(recipe.PRESETS)
        raise ValueError(f"preset {preset!r} of recipe {name} is unknown: use one of {known}")
    if seed < 0:
        raise ValueError(f"seed = {seed}: give at least 0")
    check_device(device)
    settings = changed(recipe.PRESETS[preset], changes)
    config = {
        "recipe": name, "preset": preset, "seed": seed, "settings": dataclasses.asdict(settings)
    }  # fmt: skip
    folder = RunFolder(out, config)
    if not folder.stage_done(name) or "results" not in folder.results():
        started, before = time.monotonic(), folder.results().get("seconds", 0.0)
        folder.update_results({"config": folder.config, "versions": versions(device)})
        try:
            with Display() as display:
                results = recipe.run(settings, folder, seed=seed, device=device, display=display)
            folder.update_results({"results": results})
        except Diverged as error:
            folder.update_results({"history": error.history})
            raise
        finally:
            seconds = round(before + time.monotonic() - started, 2)
            folder.update_results({"seconds": seconds})
        folder.mark_done(name)
    return folder.results()


def changed(settings: Any, changes: Sequence[str]) -> Any:
    """The dataclass `settings` with the `changes`, "name=value" or "part.name=value", put in.

    A value is JSON of the kind that its field is annotated with; the settings are checked once all
    are in. Raises ValueError for anything else.
    """
    hints = get_type_hints(type(settings))
    values: dict[str, Any] = {}
    parts: dict[str, list[str]] = {}
    for change in changes:
        path, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"{change!r} changes nothing: write NAME=VALUE")
        name, _, rest = path.partition(".")
        known = [field.name for field in dataclasses.fields(settings)]
        if name not in known:
            raise ValueError(f"setting {name!r} is unknown: use one of {', '.join(known)}")
        old = getattr(settings, name)
        if not dataclasses.is_dataclass(old):
            if rest:
                raise ValueError(f"setting {name!r} has no part {rest!r}: write {name}=VALUE")
            values[name] = _value(path, text, hints[name], old)
        elif rest:
            parts.setdefault(name, []).append(f"{rest}={text}")
        else:
            names = ", ".join(f"{name}.{field.name}" for field in dataclasses.fields(old))
            raise ValueError(f"setting {name!r} has parts: use one of {names}")
    for name, inner in parts.items():
        values[name] = changed(getattr(settings, name), inner)
    return dataclasses.replace(settings, **values)


def _value(name: str, text: str, hint: Any, old: Any) -> Any:
    """The JSON `text` as what `hint` annotates; `old` is an example."""
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    optional = type(None) in get_args(hint)
    if optional:
        hint = next(part for part in get_args(hint) if part is not type(None))
        if value is None:
            return None
    kind = get_origin(hint) or hint
    like = ", or null" if optional else ""
    like += "" if old is None or old == () else f", like {json.dumps(old)}"
    if kind is tuple and isinstance(value, list):
        parts = get_args(hint)
        if parts[-1] is ...:
            parts = parts[:1] * len(value)
        if len(parts) != len(value):
            raise ValueError(f"setting {name} = {text}: give {len(parts)} values{like}")
        example = old[0] if old else None
        return tuple(
            _value(name, json.dumps(x), part, example) for x, part in zip(value, parts, strict=True)
        )
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ValueError(f"setting {name} = {text}: give {_KINDS[kind]}{like}")
    return value


def table_text(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A plain table; cells are texts, numbers (4 digits) or None, numbers to the right."""
    cells = [[_cell(value) for value in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    text = [all(isinstance(row[i], str) for row in rows) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(row, widths, text, strict=True)
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "─" * len(lines[0]), *lines[1:]])


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _show(name: str, results: dict[str, Any], folder: Path) -> None:
    """The table on the terminal, the plot into the folder."""
    recipe = load_recipe(name)
    print(f"\n{name}: {RECIPES[name]}")
    print(table_text(*recipe.rows(results["results"])))
    try:
        recipe.plot(results["results"], folder / "plot.png")
        print(f"plot: {folder / 'plot.png'}")
    except ImportError as error:
        print(f"no plot: {error}", file=sys.stderr)
    print(f"results: {folder / 'results.json'}   {results['seconds']:.0f} s")


def help_text(name: str) -> str:
    """What a recipe is, and its settings in each preset. Raises ValueError for an unknown one."""
    recipe = load_recipe(name)
    presets = [_flat(dataclasses.asdict(preset)) for preset in recipe.PRESETS.values()]
    lines = [[key, *(json.dumps(preset[key]) for preset in presets)] for key in presets[0]]
    return f"{recipe.__doc__}\n{table_text(['setting (--set)', *recipe.PRESETS], lines)}"


def _flat(settings: dict[str, Any], start: str = "") -> dict[str, Any]:
    """Dotted name -> value."""
    found = {}
    for name, value in settings.items():
        part = isinstance(value, dict)
        found |= _flat(value, f"{start}{name}.") if part else {f"{start}{name}": value}
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m relay_fast.recipes", description=__doc__, add_help=False
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="a recipe, or: list")
    parser.add_argument(
        "-h", "--help", action="store_true", help="this text; after NAME also what the recipe is"
    )
    parser.add_argument("--preset", default="cpu", help="cpu (minutes) or paper (its sizes)")
    parser.add_argument("--out", metavar="RUN", help="default runs/NAME-PRESET")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--steps", type=int, help="the same as --set training.steps=STEPS")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SETTING=VALUE", dest="changes",
        help="another value for a setting, such as training.batch_size=8; may be repeated",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="cpu or cuda, default cpu")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, 1 where training diverged, 2 for bad input, 130 when interrupted."""
    parser = _parser()
    a = parser.parse_args(arguments)
    if a.name == "list":
        width = max(map(len, RECIPES), default=0)
        print("\n".join(f"{name:{width}s}  {summary}" for name, summary in RECIPES.items()))
        return 0
    if a.name is None:
        parser.print_help()
        return 0 if a.help else 2
    if a.help:
        try:
            text = help_text(a.name)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        parser.print_help()
        print(f"\n{a.name}: {text}")
        return 0
    from relay_fast._cores import limit_threads
    from relay_fast._errors import RunStopped
    from relay_fast._interrupts import interrupt_once, on_interrupt
    from relay_fast.checkpoint import CheckpointError
    from relay_fast.runs import RunFolderError

    on_interrupt(interrupt_once)
    limit_threads()
    changes = [*a.changes, *([] if a.steps is None else [f"training.steps={a.steps}"])]
    out = Path(a.out or f"runs/{a.name}-{a.preset}")
    try:
        results = run_recipe(
            a.name, out, preset=a.preset, changes=changes, seed=a.seed, device=a.device
        )
    except (ValueError, RunFolderError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunStopped as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues this run", file=sys.stderr)
        return 130
    _show(a.name, results, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
