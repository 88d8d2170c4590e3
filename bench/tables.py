"""Tables for people: a row's cells, printed as they come."""

from __future__ import annotations

from typing import Any

Record = dict[str, Any]  # a row of a table, by its column


def print_head(*columns: str) -> None:
    """The names of the columns, and the line below them."""
    print_row(*columns)
    print_row(*["---"] * len(columns))


def print_row(*cells: str) -> None:
    """At once, for a table may take hours."""
    print(f"| {' | '.join(cells)} |", flush=True)


def cell(record: Record, column: str, form: str) -> str:
    """The formatted entry, or nothing where the record has none."""
    return format(record[column], form) if column in record else ""
