"""Plain tables for terminals and files, drawn by rich."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

NONE = "–"


def text_table(
    header: Sequence[str], rows: Sequence[Sequence[Any]], left: int | None = None
) -> str:
    """Formats a table as text: a header, a rule and a line for each row.

    Args:
        header: Titles of the columns.
        rows: Cells: texts, numbers (floats get 4 digits) or None (a dash).
        left: The first `left` columns are aligned left and the others right; by default, columns
            that hold texts only are aligned left.
    """
    texts = [all(isinstance(row[i], str) for row in rows) for i in range(len(header))]
    on_left = texts if left is None else [i < left for i in range(len(header))]
    table = make_table(on_left)
    for column, title in zip(table.columns, header, strict=True):
        column.header = title
    for row in rows:
        table.add_row(*map(_cell, row))
    file = io.StringIO()
    make_console(table, file).print(table)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def make_table(left: Sequence[bool], gap: int = 2) -> Table:
    """Returns an empty table with a rule below its header.

    Args:
        left: For each column, whether it is aligned left.
        gap: Spaces between two columns, at least 1.
    """
    from rich.box import Box
    from rich.table import Table

    box = Box("    \n    \n ── \n    \n    \n    \n    \n    \n")
    table = Table(
        box=box,
        show_edge=False,
        pad_edge=False,
        padding=(0, gap - 1, 0, 0),
        border_style="dim",
        header_style="bold",
    )
    for on_left in left:
        table.add_column(justify="left" if on_left else "right", no_wrap=True)
    return table


def make_console(table: Table, file: TextIO | None, width: int = 0) -> Console:
    """Returns a console of `width` columns, or more where the table needs more.

    Args:
        table: The table that will be printed; it is never cropped.
        file: Where to print, by default stdout. Colours appear on terminals only.
        width: The least width.
    """
    from rich.console import Console

    plain = partial(Console, highlight=False, markup=False, emoji=False)
    measured = plain(file=io.StringIO(), width=100_000).measure(table).maximum
    return plain(file=file, width=max(width, measured))


def _cell(value: Any) -> str:
    if value is None:
        return NONE
    return f"{value:.4g}" if isinstance(value, float) else str(value)
