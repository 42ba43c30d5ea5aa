"""Terminal output of the commands: printing that never raises, and error messages.

A closed pipe (`| head`), a full disk behind `>` or an encoding without box characters must not end
a training.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO


class _Lenient:
    """A text stream that discards its output after an error instead of raising."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, action: Callable[..., Any], *args: Any) -> None:
        try:
            action(*args)
        except OSError:
            # Discards the buffered text too, which the interpreter would flush at its end.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(nowhere, self._stream.fileno())
                closed = nowhere == self._stream.fileno()  # os.open reused its descriptor
            except OSError:  # a stream without a file
                self._stream, closed = open(os.devnull, "w"), False
            if not closed:
                os.close(nowhere)


@contextmanager
def lenient_output() -> Iterator[None]:
    """Makes printing in the body safe from errors.

    Characters that the encoding lacks are replaced; text after a write error is discarded.
    """
    streams = sys.stdout, sys.stderr
    errors = [getattr(stream, "errors", None) for stream in streams]
    for stream in streams:
        _reconfigure(stream, "replace")
    sys.stdout, sys.stderr = (_Lenient(stream or open(os.devnull, "w")) for stream in streams)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = streams
        for stream, before in zip(streams, errors, strict=True):
            _reconfigure(stream, before)


def _reconfigure(stream: Any, errors: str | None) -> None:
    if errors and hasattr(stream, "reconfigure"):
        with suppress(OSError):  # a closed stream, which the first print handles
            stream.reconfigure(errors=errors)


def refused(error: Exception) -> int:
    """Prints an error about the input in one line; returns the exit status, 2."""
    print(f"error: {error_text(error)}", file=sys.stderr)
    return 2


def error_text(error: Exception) -> str:
    """Returns an error about the input as one sentence."""
    if isinstance(error, MemoryError):
        return "there is not enough memory for so many problems: give fewer"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'} cannot be used ({error.strerror}): give another"
    return " ".join(str(error).split())


def draw_all(pictures: Iterable[tuple[Path, Callable[[], Any]]]) -> None:
    """Draws plots, given as (file, function that draws it), and prints their paths.

    A plot that fails is only a warning, because the same command can draw it later.
    """
    for path, draw in pictures:
        try:
            draw()
            print(f"plot: {path}")
        except ImportError as error:
            print(f"no plot: {error}; the same command then draws it", file=sys.stderr)
            return
        except Exception as error:
            text = " ".join(str(error).split()) or type(error).__name__
            print(
                f"warning: no plot {path}: {text}; the same command then draws it", file=sys.stderr
            )
