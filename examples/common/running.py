"""The command line of an example, the memory of a call in a fresh process, and bars of sizes."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from softcurve.files import DataError
from softcurve.files.atomic import check_writable

BLUE, ORANGE, MUTED = "#1f62c4", "#c2500c", "#8b949e"

Option = tuple[str, int, int, str]  # name, default, smallest value, meaning


def arguments(
    description: str, options: Iterable[Option], out: str, wrong: Callable[[argparse.Namespace], str] = lambda _: ""
) -> argparse.Namespace:
    """Parse and check the command line before any computation, and make the folder of the figure.

    ``wrong`` returns what is wrong with options that do not fit together. ``--measured``, which the help does not show,
    is for the processes that ``measure`` starts.
    """
    options = (*options, ("seed", 0, 0, "random seed"))
    parser = argparse.ArgumentParser(description=description)
    for name, default, _, meaning in options:
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} ({default})")
    parser.add_argument("--out", type=Path, default=Path(out), help="output file")
    parser.add_argument("--measured", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    for name, _, least, _ in options:
        if (value := getattr(chosen, name.replace("-", "_"))) < least:
            parser.error(f"argument --{name}: must be at least {least}, got {value}")
    if message := wrong(chosen):
        parser.error(f"argument {message}")
    if chosen.measured is None:
        try:
            chosen.out.parent.mkdir(parents=True, exist_ok=True)
            check_writable(chosen.out, "argument --out")
        except DataError as error:
            parser.error(str(error))
        except OSError as error:
            parser.error(f"argument --out: the folder {chosen.out.parent} cannot be made ({error.strerror})")
    return chosen


def settings(chosen: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of a run for its report."""
    return {name: str(value) if name == "out" else value for name, value in vars(chosen).items() if name != "measured"}


def measure(names: Sequence[str]) -> dict[str, dict[str, float]] | None:
    """Run this program with ``--measured name`` in a fresh process for each name, and return what they print.

    Return None where the system does not report a peak of the memory that can be reset, which only Linux does.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    program = [sys.executable, *sys.argv, "--measured"]
    done = {name: subprocess.run([*program, name], stdout=subprocess.PIPE, text=True, check=True) for name in names}
    return {name: json.loads(process.stdout.splitlines()[-1]) for name, process in done.items()}


def growth(call: Callable[[], object]) -> float:
    """Return by how many megabytes a call raises the peak of the resident set of this process."""
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    call()
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def bars(axes: Axes, sizes: dict[str, float], title: str, unit: str) -> None:
    """Draw one labelled bar per name."""
    drawn = axes.bar(list(sizes), list(sizes.values()), color=(BLUE, ORANGE), width=0.6)
    axes.bar_label(drawn, [f"{size:,.0f} {unit}" for size in sizes.values()], padding=2)
    axes.margins(y=0.1)
    axes.set_title(title, loc="left")
