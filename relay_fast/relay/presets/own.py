"""Configs of one's own: read from a file, with one's own tasks and the vocabulary of these."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from relay_fast.relay.presets import load_preset
from relay_fast.relay.presets.complete import completed, used_lengths, with_drawable
from relay_fast.relay.presets.schema import LENGTHS_OF_A_STAGE, RunConfig, check_tables
from relay_fast.tasks import TextTask, Vocabulary, open_text_task
from relay_fast.tasks.proving import refuse_changed
from relay_fast.tasks.registry import is_compiled, name_of


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a config from a TOML file, or from a run's config.json.

    `base` names a preset, whose settings the file changes. The tasks are those of the file, each
    over the base's of that name; without any, all of the base. Classes and data are looked for
    beside the file.

    Raises:
        ValueError: The file cannot be read, or the base is unknown.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        own = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ValueError(f"the config {path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"the config {path} is damaged ({error})") from error
    if not isinstance(own, dict):
        raise ValueError(f"the config {path} holds {own!r:.60}: give a table of settings")
    _check_whole(path, own)
    config = {"name": path.stem, **_over_base(own)}
    tasks = config.get("tasks", {})
    for table in tasks.values() if isinstance(tasks, dict) else ():
        if isinstance(table, dict):
            _find_beside(table, path.resolve().parent)
    return completed(config)


def _check_whole(path: Path, own: Mapping[str, Any]) -> None:
    """Raises ValueError for a config that neither has a base nor all that one gives."""
    fields = RunConfig.model_fields
    if "base" in own or not fields.keys() >= own.keys():  # what is misspelt comes first
        return
    for name, field in fields.items():
        if name not in {"name", *own} and field.is_required():
            raise ValueError(
                f"the config {path} has no {name}: add it, or begin with base = "
                f'"cpu" (or another preset), which has all that is not changed'
            )


def _over_base(own: dict[str, Any]) -> dict[str, Any]:
    if "base" not in own:
        return own
    base = load_preset(own.pop("base"))
    del base["name"]
    tasks = own.get("tasks")
    if isinstance(tasks, dict) and tasks:
        base["tasks"] = {name: base["tasks"][name] for name in tasks if name in base["tasks"]}
        merged = _merged(base, own)
        return merged | {"tasks": {name: merged["tasks"][name] for name in tasks}}
    return _merged(base, own)


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Puts the settings of `new` over those of `old`, table by table."""
    merged = dict(old)
    if any(key in new for key in LENGTHS_OF_A_STAGE):  # replaces one of another kind
        merged = {key: value for key, value in old.items() if key not in LENGTHS_OF_A_STAGE}
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _find_beside(table: dict[str, Any], folder: Path) -> None:
    """Makes the paths in a task's table absolute, in place."""
    if isinstance(reference := table.get("class"), str):
        where, colon, name = reference.rpartition(":")
        file = where if where.endswith(".py") else f"{where.replace('.', '/')}.py"
        if colon and where and (folder / file).is_file():
            table["class"] = f"{folder / file}:{name}"
    parameters = table.get("parameters")
    for place, key in ((table, "data"), (parameters, "test_data"), (parameters, "tokeniser")):
        path = place.get(key) if isinstance(place, dict) else None
        if isinstance(path, str) and (folder / path).exists():
            place[key] = str(folder / path)


def resolved(config: Mapping[str, Any], tasks: Sequence[TextTask] = ()) -> dict[str, Any]:
    """Copies a config with all that a run needs: each task's class, and their vocabulary.

    Args:
        config: A config; what its tasks may leave out is completed.
        tasks: Tasks of one's own, whose names are among the config's.

    Raises:
        ValueError: A task cannot be used, or the config does not name it.
    """
    config = completed(config)
    check_tables(config)
    entries = config["tasks"]
    for task in tasks:
        if not isinstance(task, TextTask):
            raise ValueError(
                f"tasks holds {task!r:.60}, which is no task: give instances of classes that are "
                f"derived from relay_fast.tasks.TextTask"
            )
        name = name_of(task)
        if [getattr(other, "name", None) for other in tasks].count(name) > 1:
            raise ValueError(f"two tasks are called {name!r}: give each a name of its own")
        if name not in entries:
            raise ValueError(
                f"config['tasks'] has no {name!r}: give it train and test lengths there"
            )
        entries[name] = entries[name] | _of_instance(task, entries[name])
    own = {
        name: open_text_task(name, table)
        for name, table in entries.items()
        if not is_compiled(name, table)
    }
    for task in tasks:
        refuse_changed(task, own[task.name], used_lengths(entries[task.name])[:1])
    for name, task in own.items():
        entries[name] = with_drawable(_pinned(task, entries[name]), task.drawable)
    if own:
        config["vocabulary"] = _vocabulary(config, own)
    return config


def _of_instance(task: TextTask, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the class and the parameters of a task; raises ValueError for a table of others."""
    reference = task.reference()
    for key, value in reference.items():
        if entry.get(key) and entry[key] != value:
            raise ValueError(
                f"tasks.{task.name}.{key} = {entry[key]!r} is not that of the task given, "
                f"{value!r}: leave it out"
            )
    return reference


def _pinned(task: TextTask, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a task's table with what its data are recognised by, and where they are."""
    pinned = task.pinned()
    entry = {**entry, "parameters": {**entry.get("parameters", {}), **pinned}}
    if "data" in entry:
        entry["data"] = str(Path(entry["data"]).resolve())
    return entry


def _vocabulary(config: Mapping[str, Any], own: Mapping[str, TextTask]) -> dict[str, Any]:
    """Returns the vocabulary's table: the tokens given, or collected from the tasks.

    Without a built-in task in the run it has no numbers of its own.
    """
    table = dict(config.get("vocabulary", {}))
    special = [token for task in own.values() for token in task.special_tokens()]
    if table.get("tokens") is None:
        found: set[str] = set()
        for name, task in own.items():
            found.update(task.vocabulary_tokens(used_lengths(config["tasks"][name])))
        table["tokens"] = [*special, *sorted(found)]
    table["tokens"] = list(dict.fromkeys([*table["tokens"], *special]))
    if len(own) == len(config["tasks"]):
        table.pop("max_number", None)
    else:
        table.setdefault("max_number", 249)
    built_in = Vocabulary(table.get("max_number"), 1)
    for name, task in own.items():
        if (token := task.special_tokens()[0]) in built_in:
            raise ValueError(
                f"tasks.{name}: {token} is the token of a built-in task: give it another name"
            )
    return table


def config_text(config: Mapping[str, Any]) -> str:
    """Formats a config as TOML that `read_config` reads; TOML has no null, which is a comment."""
    return "\n".join(_lines(config, ())).strip() + "\n"


def _lines(table: Mapping[str, Any], path: tuple[str, ...]) -> Iterable[str]:
    plain = {k: v for k, v in table.items() if not isinstance(v, Mapping) and v is not None}
    if path and (plain or not table):
        yield f"\n[{'.'.join(map(_key, path))}]"
    for key, value in plain.items():
        yield f"{_key(key)} = {_value(value)}"
    for key in (key for key, value in table.items() if value is None):
        yield f"# --set {'.'.join((*path, key))}=null"
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _lines(value, (*path, key))


def _key(key: str) -> str:
    bare = key.replace("_", "").replace("-", "")
    return key if bare.isascii() and bare.isalnum() else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_key(k)} = {_value(v)}' for k, v in value.items())}}}"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)  # a text, a whole number, true or false
