"""What is wrong with the code of a task of one's own, said in one sentence with file and line."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from relay_fast.utils.errors import RunStopped

_PACKAGE = str(Path(__file__).resolve().parents[1])


class OwnCodeError(ValueError):
    """Raised for a task's code that raises, or returns what cannot be used; says where it is."""


@contextmanager
def own_code(task: Any) -> Iterator[None]:
    """Raises OwnCodeError for an exception inside.

    It names the line of the task that raised it, or the task's `sample` for a ValueError by which
    this package refuses what the task returned.

    Args:
        task: A `TextTask`.
    """
    try:
        yield
    except (RunStopped, OwnCodeError):
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if isinstance(error, ValueError) and frames[-1].filename.startswith(_PACKAGE):
            raise OwnCodeError(f"{str(error).rstrip('.')}{_sampler(task)}") from error
        outside = [frame for frame in frames if not frame.filename.startswith(_PACKAGE)]
        # The task may have called a library: its own file is the first outside this package.
        own = [frame for frame in outside if frame.filename == outside[0].filename]
        frame = (own or frames)[-1]
        raise OwnCodeError(
            f"task {task.name!r}: {type(error).__name__} in {frame.name} ({error}); mend "
            f"{frame.filename}, line {frame.lineno}"
        ) from error


def _sampler(task: Any) -> str:
    code = getattr(inspect.unwrap(type(task).sample), "__code__", None)
    return "" if code is None else f" ({code.co_filename}, line {code.co_firstlineno})"
