"""The vocabulary of all tasks: special tokens, operators, letters, then the numbers.

Everything before the numbers has a fixed id, so that compiled code can use the module constants.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property

from relay_fast.utils.numbers import as_int

PAD, EOS = 0, 1
ARITHMETIC, EDIT_DISTANCE, LIS = 2, 3, 4
EQUALS, SEP, COMMA, BAR = 5, 6, 7, 8
PLUS, MINUS, TIMES, DIVIDE, LEFT, RIGHT = 9, 10, 11, 12, 13, 14
LETTER0, N_LETTERS = 15, 26
NUMBER0 = LETTER0 + N_LETTERS

_FIXED = ("<pad>", "<eos>", "[ARI]", "[ED]", "[LIS]", "=", "<sep>", ",", "|", *"+-*/()")
_FIXED += tuple(chr(ord("a") + i) for i in range(N_LETTERS))
_ALIASES = {"×": "*", "÷": "/", "−": "-"}


@dataclass(frozen=True)
class Vocabulary:
    """Maps token texts to ids.

    Args:
        max_number: The numbers 0..max_number are tokens, contiguous and last.
        multiple: `size`, the rows of an embedding, is rounded up to a multiple of this.

    Raises:
        ValueError: A parameter is out of range.
    """

    max_number: int = 249
    multiple: int = 64

    def __post_init__(self) -> None:
        for name in ("max_number", "multiple"):
            object.__setattr__(self, name, as_int(name, getattr(self, name)))
        if self.max_number < 0:
            raise ValueError(
                f"max_number is {self.max_number}; give the largest number, at least 0."
            )
        if self.multiple < 1:
            raise ValueError(f"multiple is {self.multiple}; give at least 1 (1 means no padding).")

    @property
    def n_tokens(self) -> int:
        """The number of tokens in use."""
        return NUMBER0 + self.max_number + 1

    @property
    def size(self) -> int:
        """`n_tokens` rounded up to a multiple of `multiple`."""
        return -(-self.n_tokens // self.multiple) * self.multiple

    def is_number(self, token: int) -> bool:
        """Tells whether `token` is the id of a number."""
        return NUMBER0 <= token < self.n_tokens

    def encode(self, text: str) -> list[int]:
        """Converts whitespace-separated tokens to ids; × ÷ − are read as * / -.

        Raises ValueError naming the first unknown token and its position (counted from 0).
        """
        ids = []
        for position, token in enumerate(text.split()):
            token = _ALIASES.get(token, token)
            if token not in self._id_of:
                raise ValueError(
                    f"unknown token {token!r} at position {position}; known are "
                    f"{' '.join(_FIXED[:LETTER0])}, the letters a..z and the numbers "
                    f"0..{self.max_number}, separated by spaces."
                )
            ids.append(self._id_of[token])
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Converts ids to texts separated by spaces.

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
        return " ".join(texts)

    def to_dict(self) -> dict[str, int]:
        """Returns the parameters for a config."""
        return asdict(self)

    @classmethod
    def from_dict(cls, params: dict[str, int]) -> Vocabulary:
        """Builds a vocabulary from `to_dict`'s result; raises ValueError for unknown parameters."""
        unknown = sorted(set(params) - {"max_number", "multiple"})
        if unknown:
            raise ValueError(
                f"unknown vocabulary parameter {unknown[0]!r}; known are max_number and multiple."
            )
        return cls(**params)

    @cached_property
    def _texts(self) -> tuple[str, ...]:
        return _FIXED + tuple(map(str, range(self.max_number + 1)))

    @cached_property
    def _id_of(self) -> dict[str, int]:
        return {text: token for token, text in enumerate(self._texts)}
