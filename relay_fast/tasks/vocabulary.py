"""The vocabulary of a run's tasks.

With `max_number` it begins with the layout of the built-in tasks: special tokens, operators,
letters, then the numbers. Everything before the numbers has a fixed id, so that compiled code can
use the module constants. Tokens of other tasks come last, in any vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from relay_fast.utils.numbers import as_int

PAD, EOS = 0, 1
ARITHMETIC, EDIT_DISTANCE, LIS = 2, 3, 4
EQUALS, SEP, COMMA, BAR = 5, 6, 7, 8
PLUS, MINUS, TIMES, DIVIDE, LEFT, RIGHT = 9, 10, 11, 12, 13, 14
LETTER0, N_LETTERS = 15, 26
NUMBER0 = LETTER0 + N_LETTERS

_FIXED = ("<pad>", "<eos>", "[ARI]", "[ED]", "[LIS]", "=", "<sep>", ",", "|", *"+-*/()")
_FIXED += tuple(chr(ord("a") + i) for i in range(N_LETTERS))
_SPECIAL = ("<pad>", "<eos>", "<sep>")  # all of a vocabulary without the built-in layout
RESERVED = (*_SPECIAL, "<unused>")  # no text of a task may hold them
_ALIASES = {"×": "*", "÷": "/", "−": "-"}


@dataclass(frozen=True)
class Vocabulary:
    """Maps token texts to ids.

    Args:
        max_number: The numbers 0..max_number are tokens, contiguous, behind the other tokens of the
            built-in tasks; None for a vocabulary of `tokens` alone.
        multiple: `size`, the rows of an embedding, is rounded up to a multiple of this.
        tokens: Further tokens, which get the last ids in this order; one that is there already
            keeps its id.

    Raises:
        ValueError: A parameter is out of range, or a token is empty or there twice.
    """

    max_number: int | None = 249
    multiple: int = 64
    tokens: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_number", "multiple"):
            if getattr(self, name) is not None or name == "multiple":
                object.__setattr__(self, name, as_int(name, getattr(self, name)))
        object.__setattr__(self, "tokens", tuple(self.tokens))
        if self.max_number is not None and self.max_number < 0:
            raise ValueError(
                f"max_number is {self.max_number}; give the largest number, at least 0."
            )
        if self.multiple < 1:
            raise ValueError(f"multiple is {self.multiple}; give at least 1 (1 means no padding).")
        seen: set[str] = set()
        for k, token in enumerate(self.tokens):
            if not isinstance(token, str) or not token or token in seen:
                raise ValueError(
                    f"token {token!r} at position {k} of the vocabulary is empty, no text or there "
                    f"twice; give different texts."
                )
            seen.add(token)

    @property
    def has_numbers(self) -> bool:
        """Whether it begins with the layout of the built-in tasks."""
        return self.max_number is not None

    @cached_property
    def n_tokens(self) -> int:
        """The number of tokens in use."""
        return len(self._texts)

    @property
    def end_of_numbers(self) -> int:
        """The id after the largest number's, 0 if there are no numbers."""
        return 0 if self.max_number is None else NUMBER0 + self.max_number + 1

    @property
    def size(self) -> int:
        """`n_tokens` rounded up to a multiple of `multiple`."""
        return -(-self.n_tokens // self.multiple) * self.multiple

    def is_number(self, token: int) -> bool:
        """Tells whether `token` is the id of a number."""
        return NUMBER0 <= token < self.end_of_numbers

    def __contains__(self, text: str) -> bool:
        return text in self._id_of

    def id_of(self, text: str) -> int:
        """Returns the id of a token; raises ValueError for an unknown one."""
        if text not in self._id_of:
            raise ValueError(f"unknown token {text!r}; known are {self._known()}.")
        return self._id_of[text]

    def encode(self, text: str) -> list[int]:
        """Converts whitespace-separated tokens to ids; × ÷ − are read as * / -.

        Raises ValueError naming the first unknown token and its position (counted from 0).
        """
        ids = []
        for position, token in enumerate(text.split()):
            if token not in self._id_of:
                token = _ALIASES.get(token, token)
            if token not in self._id_of:
                raise ValueError(
                    f"unknown token {token!r} at position {position}; known are {self._known()}, "
                    f"separated by spaces."
                )
            ids.append(self._id_of[token])
        return ids

    def texts(self, ids: Iterable[int]) -> list[str]:
        """Converts ids to the texts of their tokens.

        Ids that only pad the vocabulary, which an untrained model may write, become `<unused>`.
        Raises ValueError for ids outside 0..size-1.
        """
        texts = []
        for position, token in enumerate(ids):
            if not 0 <= token < self.size:
                raise ValueError(
                    f"id {token} at position {position} is outside the vocabulary; "
                    f"give ids from 0 to {self.size - 1}."
                )
            texts.append(self._texts[token] if token < self.n_tokens else "<unused>")
        return texts

    def decode(self, ids: Iterable[int]) -> str:
        """Converts ids to texts separated by spaces, as `texts` does."""
        return " ".join(self.texts(ids))

    def to_dict(self) -> dict[str, Any]:
        """Returns the parameters for a config, JSON-able."""
        params: dict[str, Any] = {} if self.max_number is None else {"max_number": self.max_number}
        params["multiple"] = self.multiple
        return params | ({"tokens": list(self.tokens)} if self.tokens else {})

    @classmethod
    def from_dict(cls, params: Mapping[str, Any]) -> Vocabulary:
        """Builds a vocabulary from `to_dict`'s result; raises ValueError for unknown parameters.

        A vocabulary with `tokens` has numbers only if `max_number` is given.
        """
        unknown = sorted(set(params) - {"max_number", "multiple", "tokens"})
        if unknown:
            raise ValueError(
                f"unknown vocabulary parameter {unknown[0]!r}; known are max_number, multiple and "
                f"tokens."
            )
        own = params.get("tokens") is not None and params.get("max_number") is None
        return cls(**{**params, **({"max_number": None} if own else {})})

    def _known(self) -> str:
        """Describes the tokens in a message."""
        if self.max_number is None:
            return _some(self._texts)
        own = self._texts[self.end_of_numbers :]
        fixed = f"{' '.join(_FIXED[:LETTER0])}, the letters a..z and the numbers "
        return f"{fixed}0..{self.max_number}" + (f" and {_some(own)}" if own else "")

    @cached_property
    def _texts(self) -> tuple[str, ...]:
        if self.max_number is None:
            fixed = _SPECIAL
        else:
            fixed = _FIXED + tuple(map(str, range(self.max_number + 1)))
        there = set(fixed)
        return fixed + tuple(token for token in self.tokens if token not in there)

    @cached_property
    def _id_of(self) -> dict[str, int]:
        return {text: token for token, text in enumerate(self._texts)}


def _some(texts: Sequence[str], most: int = 40) -> str:
    rest = f" and {len(texts) - most} more" if len(texts) > most else ""
    return " ".join(texts[:most]) + rest
