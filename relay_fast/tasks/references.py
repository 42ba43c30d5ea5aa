"""Names of classes by which another process, or a later one, finds them: `module:Class` or
`file.py:Class`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_loading: list[Path] = []  # files that are being imported


def reference_of(cls: type) -> str:
    """Returns the reference of a class.

    Raises ValueError for a class that other processes cannot import.
    """
    where = cls.__module__
    module = sys.modules.get(where)
    file = getattr(module, "__file__", None)
    if "<locals>" in cls.__qualname__ or (where == "__main__" and file is None):
        raise ValueError(
            f"class {cls.__qualname__} is defined in a function or an interactive session, where "
            f"other processes cannot import it; move it to the top of a Python file."
        )
    if where != "__main__" and not where.startswith(_PREFIX):
        return f"{where}:{cls.__qualname__}"
    spec = getattr(module, "__spec__", None)
    if where == "__main__" and spec is not None:  # python -m package.module
        return f"{spec.name}:{cls.__qualname__}"
    return f"{Path(file).resolve()}:{cls.__qualname__}"


def load_class(reference: str, what: str = "class") -> type:
    """Imports the class of a reference.

    Args:
        reference: `module:Class`, or `file.py:Class` with the path of a file.
        what: Names the reference in messages.

    Raises:
        ValueError: There is no such class, or its module cannot be imported.
    """
    where, colon, name = reference.rpartition(":")
    if not colon or not where or not name:
        raise ValueError(f'{what} = {reference!r}: write it as "module:Class" or "file.py:Class".')
    try:
        found = _module_of_file(Path(where)) if where.endswith(".py") else _module(where)
        for part in name.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{what} = {reference!r} cannot be imported ({type(error).__name__}: {error}); "
            f"make it importable from here, or give the path of its file."
        ) from error
    if not isinstance(found, type):
        raise ValueError(f"{what} = {reference!r} is no class; give the name of one.")
    return found


def refuse_while_loading() -> None:
    """Raises ValueError while `load_class` imports a file: a run must not start another one."""
    if _loading:
        raise ValueError(
            f"{_loading[-1]} starts a training when its task is imported; put the training under "
            f'if __name__ == "__main__".'
        )


_PREFIX = "relay_fast_task_file_"


def _module(name: str) -> ModuleType:
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    return main if spec is not None and spec.name == name else importlib.import_module(name)


def _module_of_file(path: Path) -> ModuleType:
    """Imports a file as a module, once in a process; the running script is already imported."""
    path = path.resolve()
    main = sys.modules["__main__"]
    if (file := getattr(main, "__file__", None)) and Path(file).resolve() == path:
        return main
    name = f"{_PREFIX}{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))  # for what stands beside it
        sys.modules[name] = module
        _loading.append(path)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        finally:
            _loading.pop()
    return sys.modules[name]
