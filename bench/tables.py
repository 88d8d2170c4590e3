"""Tables: for people, a row's cells, printed as they come; for programs, a file of JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
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


def write_json(tables: Mapping[str, Any], path: Path) -> str:
    """The line that now is the file: a reader finds the old one or the new one whole."""
    line = json.dumps(tables)
    beside = path.with_name(path.name + ".part")
    beside.write_text(line + "\n", encoding="utf-8")
    os.replace(beside, path)
    return line
