"""Chains as text, for other programs: one JSON object a line, with the check's verdict beside each.

| format | fields |
|---|---|
| `rounds` | `task`, `length`, `problem`, `rounds` (a list), `answer` (null if none can be read), `passed` |
| `sft` | `task`, `length`, `prompt`, `completion`, `passed` |

`passed` is the verdict. A prompt is the problem and a line's end; a completion is a line for each
round and one for the answer, which is left out where the last round is the answer already. The
library `datasets` reads both (`load_dataset("json", data_files=…)`), trl trains on `sft`.
"""  # noqa: E501

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from relay_fast.relay.chain_parts import WrittenChains
from relay_fast.tasks import NO_ANSWER, Samples, Task
from relay_fast.tasks.samples import tasks_present
from relay_fast.utils.files import cannot_write, replacing

FORMATS = ("rounds", "sft")


def export_chains(
    path: str | os.PathLike,
    parts: Iterable[WrittenChains],
    tasks: Mapping[str, Task],
    form: str = "rounds",
) -> tuple[int, int]:
    """Writes chains into a file that is there when all of them are.

    Args:
        path: The file, which must not exist yet.
        parts: The chains; one part is in memory at a time.
        tasks: Their tasks by name.
        form: "rounds" or "sft".

    Returns:
        How many chains there are, and how many of them passed.

    Raises:
        ValueError: The format is unknown or the file exists.
        OSError: The file cannot be written; names it.
    """
    path = Path(path)
    check_export(path, form)
    written = passed = 0
    try:
        with replacing(path) as partial, open(partial, "w", encoding="utf-8") as file:
            for part in parts:
                for record in _records(part, tasks, form):
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                written += len(part.chains)
                passed += int(part.passed.sum())
    except OSError as error:
        raise OSError(cannot_write(path, error)) from error
    return written, passed


def check_export(path: str | os.PathLike, form: str) -> None:
    """Raises ValueError for an unknown format and for a file that exists."""
    if form not in FORMATS:
        raise ValueError(f"format = {form!r} is unknown: use one of {', '.join(FORMATS)}")
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} exists already: delete it, or export into another file")
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no folder {path.parent}")


def _records(part: WrittenChains, tasks: Mapping[str, Task], form: str) -> Iterator[dict[str, Any]]:
    chains = part.chains
    of_index = tasks_present(chains.task, tasks)
    for i, passed in enumerate(part.passed.tolist()):
        task = of_index[int(chains.task[i])]
        record = {"task": task.name, "length": int(chains.length[i])}
        yield {**record, **_texts(chains, i, task, form), "passed": passed}


def _texts(chains: Samples, i: int, task: Task, form: str) -> dict[str, Any]:
    ids = [tokens.tolist() for tokens in chains.rounds_of(i)]
    problem, rounds = task.plain_text(chains.problem_of(i)), [*map(task.plain_text, ids)]
    token = int(chains.answer[i])
    answer = None if token == NO_ANSWER else task.answer_text(ids, token)
    if form == "rounds":
        return {"problem": problem, "rounds": rounds, "answer": answer}
    said = answer is not None and not (task.answer_suffix is None and rounds[-1:] == [answer])
    lines = [*rounds, answer] if said else rounds
    return {"prompt": f"{problem}\n", "completion": "\n".join(lines)}
