"""Tables of text."""

from collections.abc import Sequence

import polars as pl
from rich import box
from rich.console import Console
from rich.table import Table


def print_table(
    console: Console, title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1
) -> None:
    """Prints rows of text; the first ``left`` columns are left-aligned, the others right-aligned."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, header in enumerate(headers):
        table.add_column(header, justify="left" if index < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def format_rows(table: pl.DataFrame, spec: str = ".4g") -> list[list[str]]:
    """The rows of a frame as text; numbers are formatted by ``spec``.

    Examples:
      >>> format_rows(pl.DataFrame({"task": ["digits"], "accuracy": [97.25]}), ".1f")
      [['digits', '97.2']]
    """
    return [
        [cell if isinstance(cell, str) else f"{cell:{spec}}" for cell in row] for row in table.iter_rows()
    ]
