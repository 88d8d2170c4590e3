"""What the commands print: a table for people, one JSON line for programs, progress on stderr."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from softcurve.cli.encoding import encodable
from softcurve.cli.interrupt import stop_if_interrupted
from softcurve.fit.solver.newton import Step

__all__ = ["as_json", "console", "fit_progress", "print_record", "print_table"]


def console() -> Console:
    """Return a console on the standard output of this moment."""
    return Console(highlight=False)


def print_table(title: str, lines: Sequence[tuple[str, str]]) -> None:
    """Print names and figures in two columns; text is shown as it is, without markup."""
    table = Table(title=Text(title), show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, figure in lines:
        table.add_row(Text(name), Text(encodable(figure)))
    console().print(table)


def print_record(record: Mapping[str, object]) -> None:
    """Print the record as one line of JSON; a number that is not finite becomes null.

    It is plain ASCII. A file name that is not UTF-8 has lone surrogates in it, as ``os.fsencode`` takes them.
    """
    print(as_json(record), flush=True)


def as_json(record: object) -> str:
    """JSON with null for a number that is not finite."""
    return json.dumps(_finite(record), allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def fit_progress(tol: float, *, show: bool | None) -> Iterator[tuple[Callable[[Step], None], Callable[[int], None]]]:
    """Give functions that show a step, and how many products there were, on stderr.

    The bar is the share of the decades that the gradient has to fall. ``show=None`` shows it on a terminal alone.
    """
    stderr = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("objective {task.fields[objective]:.6f}  gradient {task.fields[gradient]:.1e}"),
        TextColumn("{task.fields[products]} products"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    disable = not (stderr.is_terminal if show is None else show)
    with Progress(*columns, console=stderr, transient=stderr.is_terminal, disable=disable) as progress:
        task = progress.add_task("fit", total=1.0, objective=math.nan, gradient=math.nan, products=0)
        first = math.nan

        def on_step(step: Step) -> None:
            nonlocal first
            stop_if_interrupted()
            if step.iteration == 0 or math.isnan(first):
                first = step.gradient_max
                progress.reset(task)
            progress.update(
                task, completed=_share(first, step.gradient_max, tol), objective=step.objective,
                gradient=step.gradient_max, products=step.products,
            )  # fmt: skip

        def on_product(products: int) -> None:
            stop_if_interrupted()
            progress.update(task, products=products)

        yield on_step, on_product


def _share(first: float, now: float, tol: float) -> float:
    """Of the way from ``first`` to ``tol``, on a logarithmic scale."""
    if now <= tol:
        return 1.0
    return max(0.0, math.log(first / now) / math.log(first / tol)) if first > tol else 0.0
