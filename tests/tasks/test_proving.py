"""Tasks of texts whose samples a worker process, or a continued run, would not draw again."""

from __future__ import annotations

import os
import re

import pytest

from relay_fast.tasks import TextTask, Vocabulary
from relay_fast.tasks.proving import prove_samples
from tests.support.text_tasks import Parity

VOCABULARY = Vocabulary(None, 8, ("[parity]", *"0123456789", *"abcdefgh"))


class Remembers(Parity):
    """Takes the length of the sample that was drawn last for that of any problem."""

    def sample(self, length, rng):
        self.last = length
        return super().sample(length, rng)

    def length_of(self, problem):
        return self.last


class Plain(TextTask):
    """Zeros, with neither `solve` nor `length_of`."""

    name = "parity"

    def sample(self, length, rng):
        return " ".join("0" * length), ["0"] * length, "0"


class Changes(Plain):
    """Its samples depend on what was set after the constructor."""

    digit = "0"

    def sample(self, length, rng):
        return " ".join(self.digit * length), ["0"] * length, "0"


class Counts(Plain):
    """Depends on the largest length so far."""

    largest = 0

    def sample(self, length, rng):
        self.largest = max(self.largest, length)
        return " ".join("0" * length), [str(self.largest)] * length, str(self.largest)


class Unordered(Plain):
    """Takes a set of texts in the order that the process gives it."""

    def sample(self, length, rng):
        return " ".join(list(set("abcdefgh"))[:length]), ["0"] * length, "0"


class Empty(Plain):
    def sample(self, length, rng):
        return " ", ["0"] * length, "0"


class Elsewhere(Plain):
    """Cannot be built but in the process of the test."""

    def __init__(self) -> None:
        if os.environ.get("HOME_OF_TASKS") != str(os.getpid()):  # the child's is its parent's
            raise ValueError("not here")


def bound(text: TextTask):
    return text.bound(VOCABULARY, 3)


def test_a_good_task_passes() -> None:
    prove_samples(bound(Parity()), range(1, 5))


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Remembers, r"length_of says \d of the problem '.*', and said \d when it was drawn; let "),
        (Counts, r"sample\(1, rng\) differs in another instance of Counts, or after other call"),
        (Unordered, r"sample\(3, rng\) differs in another process; .* sort what comes out of a"),
        (Empty, r"the problem ' ' of the rounds \['0', '0', '0'\] is empty; give every prob"),
        (Elsewhere, "task 'parity' cannot be used in another process: not here"),
    ],
)
def test_what_is_refused(
    cls: type[TextTask], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME_OF_TASKS", str(os.getpid()))
    with pytest.raises(ValueError, match=f"^(task 'parity': )?{message}") as caught:
        prove_samples(bound(cls()), [3, 1])
    assert "\n" not in str(caught.value)
    if cls is not Elsewhere:
        assert re.search(rf"\({re.escape(__file__)}, line \d+\)$", str(caught.value))


def test_what_is_set_after_the_constructor_is_missed() -> None:
    text = Changes()
    text.digit = "1"
    with pytest.raises(ValueError, match="let the rest depend on length and the constructor's arg"):
        prove_samples(bound(text), [3])
