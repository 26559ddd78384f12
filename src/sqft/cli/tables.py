"""Rows on a terminal: a table, or a list where the terminal is too narrow for one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


def show_rows(title: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Print rows that have the same columns; the first column names them in a list."""
    if not rows:
        return
    table = Table(*rows[0], title=title or None)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    console = Console()
    unbounded = console.options.update(max_width=10_000)
    if Measurement.get(console, unbounded, table).minimum <= console.width:  # no word is cut
        console.print(table)
        return
    print(title)
    for row in rows:
        (_, first), *others = row.items()
        print(first)
        for name, value in others:
            print(f"  {name}: {value}")
