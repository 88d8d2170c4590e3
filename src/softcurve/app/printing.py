"""What the commands print: a table for people, one JSON line for programs, progress on stderr."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from softcurve.app.interrupt import stop_if_interrupted
from softcurve.fit.lbfgs import Step

__all__ = ["console", "fit_progress", "print_record", "print_table"]


def console() -> Console:
    """Return a console on the standard output of this moment."""
    return Console(highlight=False)


def print_table(title: str, lines: Sequence[tuple[str, str]]) -> None:
    """Print names and figures in two columns; text is shown as it is, without markup."""
    table = Table(title=Text(title), show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, figure in lines:
        table.add_row(Text(name), Text(figure))
    console().print(table)


def print_record(record: Mapping[str, object]) -> None:
    """Print the record as one line of JSON; a number that is not finite becomes null."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
    print(json.dumps(finite, allow_nan=False))


@contextmanager
def fit_progress(max_iter: int, *, show: bool | None) -> Iterator[Callable[[Step], None]]:
    """Give a function that shows a step on stderr; ``show=None`` shows it on a terminal alone."""
    stderr = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("objective {task.fields[objective]:.6f}  gradient {task.fields[gradient]:.1e}"),
        TimeElapsedColumn(),
    )
    disable = not (stderr.is_terminal if show is None else show)
    with Progress(*columns, console=stderr, transient=stderr.is_terminal, disable=disable) as progress:
        task = progress.add_task("fit", total=max_iter, objective=math.nan, gradient=math.nan)

        def update(step: Step) -> None:
            stop_if_interrupted()
            progress.update(task, completed=step.iteration, objective=step.objective, gradient=step.gradient_max)

        yield update
