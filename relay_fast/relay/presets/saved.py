"""Opens run folders of RELAY for the commands, and refuses all others."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relay_fast.relay.presets.schema import SavedRun
from relay_fast.relay.run_folder import RunFolder, RunFolderError
from relay_fast.utils.precision import autocast_dtype
from relay_fast.utils.settings import check

AUTOCAST_HELP = "precision of the GEMMs: fp32 or bf16; default the run's inference.autocast, fp32"


def open_run(path: str | os.PathLike, write: bool = False) -> RunFolder:
    """Opens the folder of a run of RELAY, written by any version.

    Args:
        path: Path of the folder.
        write: Lock it for writing an evaluation and check that it is writable.

    Raises:
        RunFolderError: The folder holds something else; nothing has been written.
    """
    folder = RunFolder.open(path)
    try:
        if "recipe" in folder.config:  # which may have tasks too
            raise ValueError("recipe is no setting of a run of RELAY")
        check(SavedRun, folder.config, others=True)
    except ValueError as error:
        raise RunFolderError(
            f"{path} holds {what_is(folder.config)} where a run of RELAY was expected ({error}); "
            f"give the --out of python -m relay_fast.train."
        ) from error
    return RunFolder.open(path, write=True) if write else folder


def run_autocast(config: Mapping[str, Any], asked: str | None = None) -> str:
    """Returns the precision of the GEMMs in which a run's models write chains and are evaluated.

    Args:
        config: The run's config.
        asked: Another precision, instead of the run's.

    Raises:
        ValueError: It is unknown.
    """
    own = config.get("inference", {}).get("autocast", "fp32")
    name = own if asked is None else asked
    autocast_dtype(name)
    return name


def refuse_foreign(path: str | os.PathLike, recipe: bool = False) -> None:
    """Raises RunFolderError for an existing folder that holds another kind of run.

    Args:
        path: Path of the folder.
        recipe: Expect the run of a recipe instead of RELAY.
    """
    if not (Path(path) / "config.json").is_file():
        return
    if not recipe:
        open_run(path)
    elif "recipe" not in (config := RunFolder.open(path).config):
        raise RunFolderError(
            f"{path} holds {what_is(config)} where a recipe's run was expected; give another --out."
        )


def what_is(config: Mapping[str, Any]) -> str:
    """Describes the kind of run or model that a config.json belongs to."""
    if "recipe" in config:
        return f"a run of the recipe {config['recipe']!r}"
    if "model_type" in config or "architectures" in config:
        return f"a model of another library ({config.get('model_type', 'unknown type')!r})"
    if "stages" in config and "tasks" in config:
        return "a run of RELAY by another version"
    return "the config of something else"
