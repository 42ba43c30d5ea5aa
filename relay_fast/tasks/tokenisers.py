"""Tokenisers of the texts of records: whitespace, characters, bytes, or a `tokenizers` JSON file.

A tokeniser cuts texts into tokens, which are texts themselves; the vocabulary of a run gives them
ids. An unknown token gets UNKNOWN, so that the caller can say where it stands.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np

UNKNOWN = -1
# texts -> (ids of all their tokens laid end to end (N,) int32, number of tokens of each (T,) int64)
Encoder = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]


class Tokeniser(ABC):
    """Cuts texts into tokens and joins tokens into texts.

    Attributes:
        name: As `make_tokeniser` takes it.
        files: Hashes of the files that it depends on.
        identity: Equal for tokenisers that cut all texts alike.
    """

    name: str
    files: tuple[str, ...] = ()

    @property
    def identity(self) -> str:
        return "-".join(self.files) or self.name

    @abstractmethod
    def tokens(self, texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
        """Returns the tokens of all texts, laid end to end, and how many each has (T,) int64."""

    @abstractmethod
    def encoder(self, ids: Mapping[str, int]) -> Encoder:
        """Returns a function from texts to ids, UNKNOWN for tokens that `ids` does not have."""

    @abstractmethod
    def join(self, tokens: Iterable[str]) -> str:
        """Returns the text of some tokens."""

    def key(self, tokens: Iterable[str]) -> bytes:
        """Returns bytes that are equal for equal tokens alone."""
        return self.join(tokens).encode()

    def check(self, texts: Sequence[str], tokens: Sequence[str]) -> None:  # noqa: B027
        """Raises ValueError, as the end of a sentence, if a part of the texts is not in their
        tokens."""


class _Whitespace(Tokeniser):
    name = "whitespace"

    def tokens(self, texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
        parts = [text.split() for text in texts]
        sizes = np.fromiter(map(len, parts), np.int64, len(parts))
        return list(chain.from_iterable(parts)), sizes

    def encoder(self, ids: Mapping[str, int]) -> Encoder:
        find = dict(ids).get

        def encode(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
            tokens, sizes = self.tokens(texts)
            return np.fromiter(map(find, tokens, repeat(UNKNOWN)), np.int32, len(tokens)), sizes

        return encode

    def join(self, tokens: Iterable[str]) -> str:
        return " ".join(tokens)


class _Characters(Tokeniser):
    name = "characters"

    def tokens(self, texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
        return list("".join(texts)), np.fromiter(map(len, texts), np.int64, len(texts))

    def encoder(self, ids: Mapping[str, int]) -> Encoder:
        points = {ord(token): k for token, k in ids.items() if len(token) == 1}
        table = np.full(max(points, default=0) + 2, UNKNOWN, np.int32)
        table[list(points)] = list(points.values())

        def encode(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
            found = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
            sizes = np.fromiter(map(len, texts), np.int64, len(texts))
            return table[np.minimum(found, len(table) - 1)], sizes

        return encode

    def join(self, tokens: Iterable[str]) -> str:
        return "".join(tokens)


class _Bytes(Tokeniser):
    """UTF-8 bytes; their tokens are called `<0x41>`."""

    name = "bytes"
    _names = tuple(f"<0x{byte:02X}>" for byte in range(256))
    _byte_of = {name: byte for byte, name in enumerate(_names)}

    def tokens(self, texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
        parts = [text.encode() for text in texts]
        sizes = np.fromiter(map(len, parts), np.int64, len(parts))
        return [self._names[byte] for byte in b"".join(parts)], sizes

    def encoder(self, ids: Mapping[str, int]) -> Encoder:
        table = np.array([ids.get(name, UNKNOWN) for name in self._names], np.int32)

        def encode(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
            parts = [text.encode() for text in texts]
            sizes = np.fromiter(map(len, parts), np.int64, len(parts))
            return table[np.frombuffer(b"".join(parts), np.uint8)], sizes

        return encode

    def key(self, tokens: Iterable[str]) -> bytes:
        return bytes(map(self._byte_of.__getitem__, tokens))

    def join(self, tokens: Iterable[str]) -> str:
        known, parts = self._byte_of, []
        for token in tokens:  # special tokens stay readable
            parts.append(bytes([known[token]]) if token in known else token.encode())
        return b"".join(parts).decode(errors="replace")


class _FromFile(Tokeniser):
    """A file of the `tokenizers` library, which encodes; its special tokens are not added."""

    def __init__(self, path: str) -> None:
        self.name = path
        try:
            self._text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"tokeniser = {path!r} cannot be read ({error}): give {_NAMES} or a JSON file of "
                f"the tokenizers library"
            ) from None
        self.files = (hashlib.sha256(self._text.encode()).hexdigest()[:16],)
        self._load()

    def _load(self) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ValueError(
                f"tokeniser = {self.name!r} needs the tokenizers library: pip install tokenizers"
            ) from None
        try:
            self._library = Tokenizer.from_str(self._text)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(
                f"tokeniser = {self.name!r} is no file of the tokenizers library ({error})"
            ) from None
        self._library.no_padding()
        self._library.no_truncation()
        self._ids = self._library.get_vocab(with_added_tokens=True)
        self._texts = {k: token for token, k in self._ids.items()}
        self._unknown, self._may_drop = _of_unknown(json.loads(self._library.to_str())["model"])
        self._kept: set[str] = set()  # characters that get tokens

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "files": self.files, "_text": self._text}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._load()

    def tokens(self, texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
        encoded = self._encode(texts)
        sizes = np.fromiter(map(len, encoded), np.int64, len(encoded))
        every = chain.from_iterable(own.ids for own in encoded)  # the fast way fills no tokens
        return list(map(self._texts.__getitem__, every)), sizes

    def encoder(self, ids: Mapping[str, int]) -> Encoder:
        table = np.full(max(self._ids.values(), default=0) + 1, UNKNOWN, np.int32)
        for token, own in self._ids.items():
            table[own] = ids.get(token, UNKNOWN)

        def encode(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
            encoded = self._encode(texts)
            sizes = np.fromiter(map(len, encoded), np.int64, len(encoded))
            every = chain.from_iterable(own.ids for own in encoded)
            return table[np.fromiter(every, np.int64, int(sizes.sum()))], sizes

        return encode

    def join(self, tokens: Iterable[str]) -> str:
        ids, parts = [], []
        for token in tokens:
            if token in self._ids:
                ids.append(self._ids[token])
            else:  # a special token of the run
                parts += [self._decode(ids), token]
                ids = []
        return " ".join(part for part in [*parts, self._decode(ids)] if part)

    def key(self, tokens: Iterable[str]) -> bytes:
        return " ".join(tokens).encode()  # decoding may lose what tells tokens apart

    def check(self, texts: Sequence[str], tokens: Sequence[str]) -> None:
        if self._unknown is not None and self._unknown in tokens:
            raise ValueError(f"for a part of which the tokeniser has only {self._unknown!r}")
        if not self._may_drop:
            return
        for character in set("".join(texts)) - self._kept:
            if self._written(character).strip() and not self._encode([character])[0].ids:
                raise ValueError(f"whose {character!r} the tokeniser leaves out")
            self._kept.add(character)

    def _written(self, text: str) -> str:
        """Returns a text as the model of the library is given it."""
        normalizer = self._library.normalizer
        return text if normalizer is None else normalizer.normalize_str(text)

    def _encode(self, texts: Sequence[str]) -> list:
        try:
            return self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"which the tokeniser cannot cut ({error})") from None

    def _decode(self, ids: list[int]) -> str:
        return self._library.decode(ids, skip_special_tokens=False) if ids else ""


def _of_unknown(model: Mapping[str, Any]) -> tuple[str | None, bool]:
    """Returns the token that a model of the library gives to what it does not know, and whether it
    leaves that out instead."""
    unknown = model.get("unk_token")
    if model.get("unk_id") is not None:
        unknown = model["vocab"][model["unk_id"]][0]
    other = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    drops = model.get("type") == "BPE" and not any(map(model.get, ("unk_token", *other)))
    return unknown, drops


_BY_NAME = {cls.name: cls for cls in (_Whitespace, _Characters, _Bytes)}
_NAMES = ", ".join(f'"{name}"' for name in _BY_NAME)


def make_tokeniser(name: str) -> Tokeniser:
    """Builds a tokeniser.

    Args:
        name: "whitespace", "characters", "bytes", or the path of a `tokenizers` JSON file.

    Raises:
        ValueError: The name is unknown, or the file or the library cannot be used.
    """
    if name in _BY_NAME:
        return _BY_NAME[name]()
    if not name.endswith(".json"):
        raise ValueError(
            f"tokeniser = {name!r} is unknown: give {_NAMES} or a JSON file of the tokenizers "
            f"library"
        )
    return _FromFile(name)
