"""What the commands print: tables and paths for people, or one JSON line for programs; and progress on stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from softcurve.cli.interrupt import stop_if_interrupted
from softcurve.cli.streams import encodable
from softcurve.fit.diagnostics import Scores
from softcurve.fit.solver.newton import Step

TextRows = list[tuple[str, str]]
Alignment = Literal["left", "right"]


def console() -> Console:
    """Return a console on the standard output of this moment."""
    return Console(highlight=False)


def print_table(
    title: str, rows: Sequence[Sequence[str]], columns: Mapping[str, Alignment] | None = None,
    to: Console | None = None,
) -> None:  # fmt: skip
    """Print a table of plain text, with headings and the alignments of their columns, or of names and values."""
    table = Table(title=Text(title), show_header=columns is not None, title_justify="left")
    if columns is None:
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
    for heading, justify in (columns or {}).items():
        table.add_column(heading, justify=justify, no_wrap=justify == "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(encodable(cell)) for cell in row))
    (to or console()).print(table)


def print_results(
    record: Mapping[str, object], show: Callable[[], None], *, as_json: bool | None, written: Sequence[object] = ()
) -> None:
    """Print the record, or the tables that ``show`` prints and, last, the paths of the files that were ``written``.

    ``as_json`` None prints the record unless standard output is a terminal.
    """
    if prints_json(as_json):
        print_record(record)
        return
    show()
    for path in written:  # not wrapped as a table is, so that it can be copied
        print(encodable(str(path)), flush=True)


def prints_json(as_json: bool | None) -> bool:
    """Return whether the record is printed and not the tables."""
    return not sys.stdout.isatty() if as_json is None else as_json


def print_record(record: Mapping[str, object]) -> None:
    """Print the record as one line of JSON in ASCII."""
    print(to_json(record), flush=True)


def to_json(record: object) -> str:
    """Return JSON, with null for a number that is not finite."""
    return json.dumps(finite(record, lambda number: None), allow_nan=False)


def finite(value: Any, otherwise: Callable[[float], str | None]) -> Any:
    """Replace every infinity and NaN, which JSON lacks, in nested mappings and sequences."""
    if isinstance(value, Mapping):
        return {str(key): finite(entry, otherwise) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry, otherwise) for entry in value]
    return otherwise(value) if isinstance(value, float) and not math.isfinite(value) else value


def score_figures(prefix: str, scores: Scores) -> dict[str, Any]:
    """Return a record's entries for the loss, the accuracy and D(target‖model), each name after ``prefix``."""
    return {
        f"{prefix}loss_nats": scores.loss,
        f"{prefix}loss_bits": scores.loss / math.log(2.0),
        f"{prefix}accuracy": scores.accuracy,
        f"{prefix}kl_nats": scores.kl,
    }


def score_rows(label: str, prefix: str, record: Mapping[str, Any]) -> TextRows:
    """Return the rows of a table for the entries of :func:`score_figures`, each name after ``label``."""
    loss, bits, accuracy, kl = (record[prefix + name] for name in ("loss_nats", "loss_bits", "accuracy", "kl_nats"))
    rows = [(f"{label}loss", f"{loss:.6f} nats = {bits:.6f} bits"), (f"{label}accuracy", f"{accuracy:.4f}")]
    return rows if kl is None else [*rows, (f"{label}KL(target||model)", f"{kl:.6f} nats")]


def progress_bar(show: bool | None, *columns: ProgressColumn) -> Progress:
    """Return a display of progress on stderr, with a bar after the description; None shows it on a terminal only."""
    stderr = Console(stderr=True)
    disable = not (stderr.is_terminal if show is None else show)
    columns = (TextColumn("{task.description}"), BarColumn(), *columns)
    return Progress(*columns, console=stderr, transient=stderr.is_terminal, disable=disable)


@contextmanager
def fit_progress(
    tol: float, on_step: Callable[[Step], None], *, show: bool | None
) -> Iterator[dict[str, Callable[[Any], None]]]:
    """Give the callbacks of a fit that show its steps and products, and call ``on_step``."""
    labels = "objective {task.fields[objective]}  gradient {task.fields[gradient]}"
    texts = [TextColumn(text) for text in (labels, "{task.fields[products]} HVPs", "left")]
    with progress_bar(show, *texts[:2], TimeElapsedColumn(), texts[2], TimeRemainingColumn()) as progress:
        task = progress.add_task("fit", total=1.0, objective="–", gradient="–", products=0)
        first = math.nan

        def show_step(step: Step) -> None:
            nonlocal first
            on_step(step)
            stop_if_interrupted()
            now = step.gradient_max
            if step.iteration == 0 or math.isnan(first):
                first = now
                progress.reset(task)
            # The bar is how far the gradient has come on its way down to the tolerance, on a logarithmic scale.
            share = max(0.0, math.log(first / now) / math.log(first / tol)) if first > tol and now > tol else now <= tol
            figures: dict[str, Any] = {
                "objective": f"{step.objective:.6f}",
                "gradient": f"{now:.1e}",
                "products": step.products,
            }
            progress.update(task, completed=share, **figures)

        def show_product(products: int) -> None:
            stop_if_interrupted()
            progress.update(task, products=products)

        yield {"on_step": show_step, "on_product": show_product}
