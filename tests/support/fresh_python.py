"""Python code as in a process of its own. Importing torch is most of what such a process does: one
process has imported it, and nothing else, and forks for each piece of code."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST_SECONDS = 240


def run_fresh(
    code: str,
    *arguments: str,
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs code as `python -c` would where torch is imported first.

    Args:
        code: what to run.
        arguments: behind it, `sys.argv[1:]`.
        cwd: working folder, first in `sys.path`.
        environment: variables, PYTHONPATH too; default: those of this process.

    Returns:
        exit status, and the text on both streams.
    """
    with tempfile.TemporaryDirectory() as folder:
        request = {
            "code": code,
            "arguments": arguments,
            "cwd": str(cwd),
            "environment": dict(os.environ if environment is None else environment),
            "streams": [os.devnull, f"{folder}/out", f"{folder}/error"],
        }
        server = _server()
        print(json.dumps(request), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        out, error = (Path(folder, name).read_text() for name in ("out", "error"))
    return subprocess.CompletedProcess([sys.executable, "-c", code, *arguments], status, out, error)


@functools.cache
def _server() -> subprocess.Popen[str]:
    """The process that forks; it ends when this one closes its pipe by ending."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    return subprocess.Popen(
        [sys.executable, __file__],
        env=clean | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _serve() -> None:
    import torch  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if not child:
            os._exit(_run(**json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _run(
    code: str,
    arguments: list[str],
    cwd: str,
    environment: dict[str, str],
    streams: list[str],
) -> int:
    """Runs code in this process; returns its exit status."""
    signal.alarm(MOST_SECONDS)
    for number, path in enumerate(streams):
        file = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    given = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:1] = ["", *filter(None, given)]
    sys.argv = ["-c", *arguments]
    status: object = 0
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as left:
        status = left.code
        if status is not None and not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    return int(status or 0)


if __name__ == "__main__":
    _serve()
