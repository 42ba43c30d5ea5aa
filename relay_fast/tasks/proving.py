"""What is tried of a task of texts before a run begins: its samples, their lengths, its solver.

A sample must be the same whenever and wherever it is drawn, because worker processes draw samples
and a continued run draws them again. So each is drawn twice, then by another instance in another
order, and some in a process with another hash seed, on which the order of a set of texts depends.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import product
from typing import Any

from relay_fast.tasks.own_code import OwnCodeError, own_code
from relay_fast.tasks.references import load_class, reference_of

PROVED = 8  # samples of a length that are looked at before a run
_ELSEWHERE = 2  # of them in another process
_PATIENCE = 300  # seconds for that process, which imports what the task imports
_PACKAGE = __name__.partition(".")[0]
_MARK = "samples of tasks: "  # before what the process says; the task's file may print too


def prove_samples(task: Any, lengths: Iterable[int]) -> dict[tuple[int, int], tuple]:
    """Tries a task of texts.

    Args:
        task: A `TokenizedTask`.
        lengths: Those of a run.

    Returns:
        The samples by length and number.

    Raises:
        ValueError: A sample cannot be encoded, differs when it is drawn again, has another length
            than asked, or `solve` contradicts it.
    """
    seen = {}
    for length in lengths:
        task.check_length(length)
        for index in range(PROVED):
            with own_code(task.text):
                seen[length, index] = _prove(task, length, index)
    with own_code(task.text):
        _prove_again(task, seen)
    if type(task.text).__module__.partition(".")[0] != _PACKAGE:
        _prove_elsewhere(task, seen)
    return seen


def refuse_changed(task: Any, built: Any, lengths: Iterable[int]) -> None:
    """Raises ValueError for a task that draws other samples than one that is built of its class and
    its arguments, as every process does.

    Args:
        task: A `TextTask`.
        built: The one that is built.
        lengths: Those to try.
    """
    for length, index in product(lengths, range(_ELSEWHERE)):
        first = task.draw(length, 0, index)
        if task.draw(length, 0, index) == first != built.draw(length, 0, index):
            raise ValueError(
                f"task {task.name!r} draws other samples than {type(task).__name__} built of its "
                f"arguments {task.arguments}: make what was set after the constructor an argument "
                f"of it"
            )


def _prove(task: Any, length: int, index: int) -> tuple:
    """Tries one sample and returns it."""
    text = task.text
    problem, rounds, answer = first = text.draw(length, 0, index)
    if text.draw(length, 0, index) != first:
        raise ValueError(
            f"task {task.name!r}: sample({length}, rng) differs between two calls with one seed; "
            f"draw all that is random from rng."
        )
    task.encoded(*first)
    _check_length(task, problem, length)
    if task.solves:
        solved, implied = text.solve(problem)
        if ([*solved], implied) != ([*rounds], answer):
            raise ValueError(
                f"task {task.name!r}: the problem {problem!r:.60} has the rounds "
                f"{[*rounds]!r:.60} and the answer {answer!r:.40} in sample, but "
                f"{[*solved]!r:.60} and {implied!r:.40} in solve; make them the same."
            )
    return first


def _check_length(task: Any, problem: str, length: int) -> None:
    if task.text.tells_lengths and (found := task.text.length_of(problem)) != length:
        raise ValueError(
            f"task {task.name!r}: sample({length}, rng) returned the problem {problem!r:.60}, "
            f"of length {found}; return one of the length asked for, or mend length_of."
        )


def _prove_again(task: Any, seen: Mapping[tuple[int, int], tuple]) -> None:
    """Tries the samples once more, the last one first: by another instance, as worker processes
    have, and by this one. Raises ValueError."""
    other = pickle.loads(pickle.dumps(task.text))
    for (length, index), first in reversed(seen.items()):
        if other.draw(length, 0, index) != first:
            raise ValueError(
                f"task {task.name!r}: sample({length}, rng) differs in another instance of "
                f"{type(other).__name__}, or after other calls; draw all that is random from rng, "
                f"and let the rest depend on length and the constructor's arguments alone."
            )
        if not task.text.tells_lengths:
            continue
        found = [text.length_of(first[0]) for text in (task.text, other)]
        if found != [length, length]:
            wrong = next(n for n in found if n != length)
            raise ValueError(
                f"task {task.name!r}: length_of says {wrong!r} of the problem {first[0]!r:.60}, "
                f"and said {length} when it was drawn; let it depend on the problem alone."
            )


def _prove_elsewhere(task: Any, seen: Mapping[tuple[int, int], tuple]) -> None:
    """Draws some of the samples in another process. Raises OwnCodeError if they differ."""
    wanted = {place: sample for place, sample in seen.items() if place[1] < _ELSEWHERE}
    text = task.text
    arguments = json.dumps(text.arguments, sort_keys=True)
    digests = _digests(reference_of(type(text)), arguments, tuple(wanted))
    if isinstance(digests, str):
        raise OwnCodeError(f"task {task.name!r} cannot be used in another process: {digests}")
    for ((length, _), sample), digest in zip(wanted.items(), digests, strict=True):
        if digest_of(sample) != digest:
            with own_code(text):
                raise ValueError(
                    f"task {task.name!r}: sample({length}, rng) differs in another process; draw "
                    f"all that is random from rng, and sort what comes out of a set of texts."
                )


@cache
def _digests(
    reference: str, arguments: str, places: tuple[tuple[int, int], ...]
) -> list[str] | str:
    """Returns the digests of samples (length, index) drawn by a new process, or what it says."""
    asked = json.dumps([reference, arguments, places, sys.path])
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    code = f"from {__name__} import answer; answer()"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=asked,
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=os.getcwd(),
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(_MARK):
            return json.loads(line.removeprefix(_MARK))
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def answer() -> None:
    """Prints the digests that `_digests` asks for on the standard input."""
    reference, arguments, places, path = json.load(sys.stdin)
    sys.path[:] = path
    try:
        text = load_class(reference)(**json.loads(arguments))
        found: Any = [digest_of(text.draw(length, 0, index)) for length, index in places]
    except Exception as error:
        found = str(error)
    print(f"\n{_MARK}{json.dumps(found)}", flush=True)


def digest_of(sample: Any) -> str:
    """Returns a short hash of samples."""
    return hashlib.blake2b(json.dumps(sample).encode(), digest_size=8).hexdigest()
