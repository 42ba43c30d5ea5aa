"""Recipes from the shell: `python -m relay_fast.recipes NAME --preset cpu --out RUN`, `... list`.

The same command continues an interrupted run. Leaves results.json, plot.png and checkpoints.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from relay_fast.recipes import RECIPES, load_recipe
from relay_fast.reporting.terminal import draw_all, lenient_output, refused
from relay_fast.reporting.text_table import text_table


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

    changes: texts like "training.steps=20" that put other values into the preset's settings (see
    `relay_fast.utils.settings.changed`).
    Raises RunFolderError, ValueError, CheckpointError, Diverged with one clear sentence.
    """
    from relay_fast.relay.presets.saved import refuse_foreign
    from relay_fast.relay.run_folder import RunFolder, versions
    from relay_fast.reporting.progress import Display
    from relay_fast.training.model_files import check_device
    from relay_fast.utils.errors import Diverged
    from relay_fast.utils.settings import Seed, check_value, with_changes

    recipe = load_recipe(name)
    if preset not in recipe.PRESETS:
        known = ", ".join(recipe.PRESETS)
        raise ValueError(f"preset {preset!r} of recipe {name} is unknown: use one of {known}")
    check_value("seed", seed, Seed)
    check_device(device)
    settings = with_changes(recipe.PRESETS[preset], changes)
    if hasattr(recipe, "prove"):
        recipe.prove(settings)
    refuse_foreign(out, recipe=True)
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


def _show(name: str, results: dict[str, Any], folder: Path) -> None:
    """The table on the terminal, the plot into the folder."""
    recipe = load_recipe(name)
    print(f"\n{name}: {RECIPES[name]}")
    print(text_table(*recipe.rows(results["results"])))
    path = folder / "plot.png"
    draw_all([(path, lambda: recipe.plot(results["results"], path))])
    print(f"results: {folder / 'results.json'}   {results['seconds']:.0f} s")


def help_text(name: str) -> str:
    """What a recipe is, its settings in each preset and what they mean. Raises ValueError for an
    unknown one."""
    from relay_fast.utils.settings import described_text

    recipe = load_recipe(name)
    presets = [_flat(dataclasses.asdict(preset)) for preset in recipe.PRESETS.values()]
    lines = [[key, *(json.dumps(preset[key]) for preset in presets)] for key in presets[0]]
    table = text_table(["setting (--set)", *recipe.PRESETS], lines)
    meanings = described_text(type(next(iter(recipe.PRESETS.values()))))
    return f"{recipe.__doc__}\n{table}\n\nwhat the settings mean\n{meanings}"


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
    with lenient_output():
        parser = _parser()
        return _main(parser, parser.parse_args(arguments))


def _main(parser: argparse.ArgumentParser, a: argparse.Namespace) -> int:
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
            return refused(error)
        parser.print_help()
        print(f"\n{a.name}: {text}")
        return 0
    from relay_fast.relay.run_folder import RunFolderError
    from relay_fast.utils.cores import limit_threads
    from relay_fast.utils.errors import RunStopped
    from relay_fast.utils.interrupts import interrupt_once, on_interrupt
    from relay_fast.utils.tensor_files import CheckpointError

    on_interrupt(interrupt_once)
    limit_threads()
    changes = [*a.changes, *([] if a.steps is None else [f"training.steps={a.steps}"])]
    out = Path(a.out or f"runs/{a.name}-{a.preset}")
    try:
        results = run_recipe(
            a.name, out, preset=a.preset, changes=changes, seed=a.seed, device=a.device
        )
    except (ValueError, RunFolderError, CheckpointError, OSError, MemoryError) as error:
        return refused(error)
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
