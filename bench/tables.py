"""Output of tables as text, row by row, and as a JSON file."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

Record = dict[str, Any]  # a row of a table, by column name


def machine() -> Record:
    """Return the versions, the processor, the number of threads and the date of a run."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def print_head(*columns: str) -> None:
    """Print the column names and the separator line."""
    print_row(*columns)
    print_row(*["---"] * len(columns))


def print_row(*cells: str) -> None:
    """Print and flush a row, because a table may take hours."""
    print(f"| {' | '.join(cells)} |", flush=True)


def cell(record: Record, column: str, form: str) -> str:
    """Return the formatted entry, or an empty string if the record has none."""
    return format(record[column], form) if column in record else ""


def write_json(tables: Mapping[str, Any], path: Path) -> str:
    """Write the tables as one line of JSON, atomically, and return the line."""
    line = json.dumps(tables)
    beside = path.with_name(path.name + ".part")
    beside.write_text(line + "\n", encoding="utf-8")
    os.replace(beside, path)
    return line
