"""Runs recipes: `python -m relay_fast.recipes NAME --preset cpu --out RUN`, or lists them: `list`.

The same command continues an interrupted run. It writes results.json, plot.png and checkpoints.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from relay_fast.recipes import RECIPES, load_recipe
from relay_fast.reporting.terminal import draw_all, lenient_output, refused
from relay_fast.reporting.text_table import text_table

if TYPE_CHECKING:
    from relay_fast.recipes._own_tasks import OwnTasks
    from relay_fast.relay.run_folder import RunFolder


def run_recipe(
    name: str,
    out: str | Path,
    *,
    preset: str = "cpu",
    changes: Sequence[str] = (),
    seed: int = 0,
    device: str = "cpu",
    tasks: str | Path | None = None,
) -> dict[str, Any]:
    """Runs a recipe in the run folder `out`, or continues an interrupted run.

    Args:
        name: Name of the recipe.
        out: The run folder.
        preset: "cpu" or "paper".
        changes: Changed settings, texts like "training.steps=20".
        seed: Seed of all random numbers.
        device: "cpu" or a CUDA device.
        tasks: A config file or a run folder, whose tasks the recipe runs on instead of its own
            data.

    Returns:
        The content of results.json.

    Raises:
        ValueError: A name or a setting is invalid.
        RunFolderError, CheckpointError: The folder or a checkpoint cannot be used.
        Diverged: The training diverged.
    """
    from relay_fast.relay.presets.saved import refuse_foreign
    from relay_fast.relay.run_folder import RunFolder
    from relay_fast.training.model_files import check_device
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
        "recipe": name,
        "preset": preset,
        "seed": seed,
        "settings": dataclasses.asdict(settings),
    }
    options = {} if tasks is None else {"tasks": _own_tasks(name, recipe, tasks)}
    if options:
        config |= options["tasks"].identity
    folder = RunFolder(out, config)
    if not folder.stage_done(name) or "results" not in folder.results():
        _run(recipe, settings, folder, seed, device, options)
        folder.mark_done(name)
    return folder.results()


def _own_tasks(name: str, recipe: ModuleType, source: str | Path) -> OwnTasks:
    """Reads the tasks for a recipe; raises ValueError if it takes none."""
    from relay_fast.recipes._own_tasks import OwnTasks, check_takes_tasks

    check_takes_tasks(name, recipe)
    return OwnTasks.read(source)


def _run(
    recipe: ModuleType,
    settings: Any,
    folder: RunFolder,
    seed: int,
    device: str,
    options: dict[str, Any],
) -> None:
    """Runs a recipe and writes its results and seconds into results.json."""
    from relay_fast.relay.run_folder import versions
    from relay_fast.reporting.progress import Display
    from relay_fast.utils.errors import Diverged

    started, before = time.monotonic(), folder.results().get("seconds", 0.0)
    folder.update_results({"config": folder.config, "versions": versions(device)})
    try:
        with Display() as display:
            options |= {"seed": seed, "device": device, "display": display}
            results = recipe.run(settings, folder, **options)
        folder.update_results({"results": results})
    except Diverged as error:
        folder.update_results({"history": error.history})
        raise
    finally:
        folder.update_results({"seconds": round(before + time.monotonic() - started, 2)})


def _show(name: str, results: dict[str, Any], folder: Path) -> None:
    """Prints the table and draws the plot into the folder."""
    recipe = load_recipe(name)
    print(f"\n{name}: {RECIPES[name]}")
    print(text_table(*recipe.rows(results["results"])))
    path = folder / "plot.png"
    draw_all([(path, lambda: recipe.plot(results["results"], path))])
    print(f"results: {folder / 'results.json'}   {results['seconds']:.0f} s")


def help_text(name: str) -> str:
    """Returns a recipe's description, its settings in each preset and their meanings.

    Raises ValueError for an unknown name.
    """
    from relay_fast.utils.settings import described_text

    recipe = load_recipe(name)
    presets = [_flat(dataclasses.asdict(preset)) for preset in recipe.PRESETS.values()]
    lines = [[key, *(json.dumps(preset[key]) for preset in presets)] for key in presets[0]]
    table = text_table(["setting (--set)", *recipe.PRESETS], lines)
    meanings = described_text(type(next(iter(recipe.PRESETS.values()))))
    return f"{recipe.__doc__}\n{table}\n\nmeaning of the settings\n{meanings}"


def _flat(settings: dict[str, Any], start: str = "") -> dict[str, Any]:
    """Flattens nested settings to {dotted name: value}; `start` is the prefix."""
    found = {}
    for name, value in settings.items():
        nested = isinstance(value, dict)
        found |= _flat(value, f"{start}{name}.") if nested else {f"{start}{name}": value}
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m relay_fast.recipes", description=__doc__, add_help=False
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="a recipe, or: list")
    parser.add_argument(
        "-h", "--help", action="store_true", help="this text; after NAME also the recipe's settings"
    )
    parser.add_argument(
        "--preset", default="cpu", help="cpu (minutes; the default) or paper (its sizes)"
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="run on the tasks of a config (as relay_fast.train takes it) or of a run's folder",
    )
    parser.add_argument("--out", metavar="RUN", help="the run's folder; default runs/NAME-PRESET")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers; default 0")
    parser.add_argument("--steps", type=int, help="the same as --set training.steps=STEPS")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SETTING=VALUE",
        dest="changes",
        help="another value for a setting, such as training.batch_size=8; may be repeated",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda, default cpu")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    The exit status is 0, 1 if training diverged, 2 for bad input, 130 when interrupted.
    """
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
    from relay_fast.utils.tensor_files import CheckpointError

    limit_threads()
    changes = [*a.changes, *([] if a.steps is None else [f"training.steps={a.steps}"])]
    out = Path(a.out or f"runs/{a.name}-{a.preset}")
    try:
        options = {"seed": a.seed, "device": a.device, "tasks": a.config}
        results = run_recipe(a.name, out, preset=a.preset, changes=changes, **options)
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
    from relay_fast.utils.interrupts import interrupt_once, on_interrupt

    on_interrupt(interrupt_once)
    sys.exit(main())
