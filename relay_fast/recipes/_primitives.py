"""Reasoning primitives: variable assignment in words, for models that write text.

Depth 0 asks for one of five variables, depth 1 for one of five others that each stand for one of
the five. The format of the prompts is that of MIDAS (Saunshi et al. 2024, arXiv 2409.19044); the
format of the paper's other primitives is not known. Choosing among the five values scores 20 %.

Solved examples come first, with their answers filled in and an empty line between; that format is
not the paper's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from string import ascii_lowercase
from typing import NamedTuple

import numpy as np

FORMS = ("math", "code")
VARIABLES, LARGEST = 5, 25
Complete = Callable[[Sequence[str], int], Sequence[str]]


class Problem(NamedTuple):
    prompt: str  # ends with "Answer:"
    answer: str  # what comes next, such as " 22"


def variable_assignment(rng: np.random.Generator, depth: int, form: str) -> Problem:
    """Draws a problem.

    Args:
        rng: The random generator.
        depth: 0 or 1.
        form: "math" or "code".

    Raises:
        ValueError: The depth or the form is another one.
    """
    if depth not in (0, 1):
        raise ValueError(f"depth = {depth}: only the formats of depths 0 and 1 are known")
    if form not in FORMS:
        raise ValueError(f"form = {form!r} is unknown: use one of {FORMS}")
    names = rng.permutation(list(ascii_lowercase))[: VARIABLES * (depth + 1)].tolist()
    values = rng.integers(1, LARGEST + 1, VARIABLES).astype(str).tolist()
    lines = list(zip(names[:VARIABLES], values, strict=True))
    if depth:
        sources = rng.permutation(VARIABLES)
        lines += [(name, names[s]) for name, s in zip(names[VARIABLES:], sources, strict=True)]
        values = [values[s] for s in sources]
    asked = int(rng.integers(VARIABLES))
    name, answer = names[-VARIABLES:][asked], f" {values[asked]}"
    if form == "math":
        text = "\n".join(f"{left}={right}" for left, right in lines)
        return Problem(
            f"The following is a set of simple mathematical equations.\n\n{text}\n"
            f"What is the numerical value of {name}?\nAnswer:",
            answer,
        )
    text = "\n".join(f"{left} = {right}" for left, right in lines)
    return Problem(
        "The following is a very short Python program. Use the program to resolve the value of the "
        f"variable in the question.\nProgram:\n{text}\n\nQuestion:\nWhat is the value of {name}?\n"
        "Answer:",
        answer,
    )


def few_shot(rng: np.random.Generator, depth: int, form: str, shots: int = 5) -> Problem:
    """Draws a problem with `shots` solved ones before it, see `variable_assignment`."""
    solved = [variable_assignment(rng, depth, form) for _ in range(shots)]
    problem = variable_assignment(rng, depth, form)
    texts = [f"{prompt}{answer}\n\n" for prompt, answer in solved]
    return Problem("".join(texts) + problem.prompt, problem.answer)


def variable_assignment_accuracy(
    complete: Complete, depth: int, form: str, *, problems: int = 100, shots: int = 5, seed: int = 0
) -> float:
    """Measures the share of problems whose completion begins with the correct number.

    Args:
        complete: (prompts, n) -> the model's text after each prompt, n characters or more.
        depth: 0 or 1.
        form: "math" or "code".
        problems: Number of problems.
        shots: Solved examples before each problem.
        seed: Selects the problems.
    """
    if problems < 1 or shots < 0:
        raise ValueError(f"problems = {problems}, shots = {shots}: give at least 1, and 0")
    rng = np.random.default_rng(seed)
    asked = [few_shot(rng, depth, form, shots) for _ in range(problems)]
    written = complete([problem.prompt for problem in asked], len(str(LARGEST)) + 2)
    correct = [
        _number(text) == problem.answer.strip()
        for text, problem in zip(written, asked, strict=True)
    ]
    return sum(correct) / problems


def _number(text: str) -> str | None:
    found = re.match(r"\s*(\d+)", text)
    return found.group(1) if found else None
