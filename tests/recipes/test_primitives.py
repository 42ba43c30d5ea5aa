"""Variable assignment: the problems' format and truth, and how answers are marked."""

import re

import numpy as np
import pytest

from relay_fast.recipes._primitives import (
    FORMS,
    few_shot,
    variable_assignment,
    variable_assignment_accuracy,
)


def solve(prompt: str) -> str:
    """The value that the last problem of a prompt asks for, by following its lines."""
    prompt = prompt[prompt.rindex("The following") :]
    lines = dict(re.findall(r"^(\w) ?= ?(\w+)$", prompt, re.MULTILINE))
    value = re.search(r"value of (\w)\?\nAnswer:$", prompt).group(1)
    while value in lines:
        value = lines[value]
    return value


def test_the_printed_format(seed) -> None:
    rng = np.random.default_rng(seed)
    prompt, answer = variable_assignment(rng, 0, "math")
    assert re.fullmatch(
        r"The following is a set of simple mathematical equations\.\n\n(\w=\d+\n){5}"
        r"What is the numerical value of \w\?\nAnswer:",
        prompt,
    )
    assert re.fullmatch(r" \d+", answer)
    prompt, _ = variable_assignment(rng, 1, "code")
    assert re.fullmatch(
        r"The following is a very short Python program\. Use the program to resolve the value of "
        r"the variable in the question\.\nProgram:\n(\w = \d+\n){5}(\w = [a-z]\n){5}\nQuestion:\n"
        r"What is the value of \w\?\nAnswer:",
        prompt,
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("depth", [0, 1])
def test_the_answer_is_true_and_the_asked_variable_is_at_its_depth(depth, form, seed) -> None:
    rng = np.random.default_rng(seed)
    asked = set()
    for _ in range(200):
        prompt, answer = variable_assignment(rng, depth, form)
        pairs = re.findall(r"^(\w) ?= ?(\w+)$", prompt, re.MULTILINE)
        names = [name for name, _ in pairs]
        assert len(set(names)) == 5 * (depth + 1)
        assert all(1 <= int(value) <= 25 for _, value in pairs[:5])
        assert sorted(value for _, value in pairs[5:]) == sorted(names[:5] * depth)  # one to one
        assert f" {solve(prompt)}" == answer
        name = re.search(r"value of (\w)\?", prompt).group(1)
        assert names.index(name) >= 5 * depth
        asked.add(names.index(name))
    assert len(asked) == 5


def test_solved_examples_come_first(seed) -> None:
    rng = np.random.default_rng(seed)
    prompt, answer = few_shot(rng, 0, "math", shots=3)
    assert len(re.findall(r"Answer: \d+\n\n", prompt)) == 3 and prompt.endswith("?\nAnswer:")
    assert f" {solve(prompt)}" == answer


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("depth", [0, 1])
def test_marking(depth, form) -> None:
    accuracy = lambda complete: variable_assignment_accuracy(complete, depth, form, problems=20)
    assert accuracy(lambda prompts, n: [f" {solve(p)}\n\nThe" for p in prompts]) == 1
    assert accuracy(lambda prompts, n: [f" {solve(p)}0" for p in prompts]) == 0
    assert accuracy(lambda prompts, n: ["?"] * len(prompts)) == 0
    half = accuracy(lambda ps, n: [solve(p) if i % 2 else "x" for i, p in enumerate(ps)])
    assert half == 0.5
    lengths = []
    accuracy(lambda prompts, n: (lengths.append(n), [""] * len(prompts))[1])
    assert lengths == [4]  # a blank, two digits, and what ends the number


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda rng: variable_assignment(rng, 2, "math"),
            "depth = 2: only the formats of depths 0 and 1 are known",
        ),
        (lambda rng: variable_assignment(rng, 0, "poem"), "form = 'poem' is unknown"),
        (
            lambda rng: variable_assignment_accuracy(lambda p, n: p, 0, "math", problems=0),
            "problems = 0, shots = 5: give at least 1, and 0",
        ),
    ],
)
def test_bad_input(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(np.random.default_rng(0))
