"""`softcurve explain`: the softmax chain on digits, measured, drawn and checked, as one HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import softcurve
from softcurve.cli.encoding import encoded
from softcurve.cli.explain.chain_section import explain_chain
from softcurve.cli.explain.directions_section import explain_directions
from softcurve.cli.explain.jacobian_section import explain_jacobian
from softcurve.cli.explain.minimum_section import explain_minimum
from softcurve.cli.explain.network import HIDDEN, Network, train
from softcurve.cli.explain.page import render
from softcurve.cli.explain.section import Check, Section, plain
from softcurve.cli.explain.targets_section import explain_targets
from softcurve.cli.explain.vae_section import explain_vae
from softcurve.cli.interrupt import stop_if_interrupted
from softcurve.fit.atomic import check_writable, replacing

__all__ = ["write_explanation"]


def write_explanation(out: Path, *, seed: int = 0, console: Console) -> dict[str, object]:
    """Train a small network on digits, write the page that explains its chain, and print every check.

    The same seed gives the same page and the same record. Returns the record: figures by section, in nats where
    not said otherwise, as valid JSON (an infinity is `"inf"`).

    Raises:
        ValueError: `seed` is negative or too large, or `out` cannot be written; found before any work.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be from 0 to 2**63 − 1, but is {seed}; give another one")
    check_writable(out, "--out")
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out: {out} must end in .html")
    with _one_thread():
        network = train(seed)
        sections = _sections(network, seed)
        checks = [check for section in sections for check in section.checks]
        held = all(check.held for check in checks)
        facts = {
            "seed": seed,
            "hidden": HIDDEN,
            "accuracy": network.accuracy(),
            "rows": len(network.held_out.x),
            "steps": network.history.steps[-1],
            "checks": checks,
            "all_held": held,
            "version": softcurve.__version__,
            "torch": torch.__version__,
        }
        page = encoded(render(sections, facts))
        stop_if_interrupted()
        with replacing(out, "--out") as file:
            file.write(page)
    console.print(_table(checks))
    figures = {section.key: section.figures for section in sections}
    return {
        "command": "explain",
        "page": str(out),
        "seed": seed,
        "held_out_accuracy": network.accuracy(),
        "all_within_bounds": held,
        "checks": [plain(vars(check) | {"held": check.held}) for check in checks],
        **{key: plain(value) for key, value in figures.items()},
    }


def _sections(network: Network, seed: int) -> tuple[Section, ...]:
    return (
        explain_chain(network),
        explain_jacobian(network),
        explain_targets(network),
        explain_directions(),
        explain_minimum(network, seed),
        explain_vae(),
    )


def _table(checks: Sequence[Check]) -> Table:
    table = Table(title="The softmax chain: what was measured", title_justify="left")
    table.add_column("check", overflow="fold")
    table.add_column("measured", justify="right", no_wrap=True)
    table.add_column("bound", justify="right", no_wrap=True)
    table.add_column("held", no_wrap=True)
    for check in checks:
        bound = f"{check.relation} {check.bound:.3g}"
        table.add_row(check.name, f"{check.measured:.3g}", bound, "yes" if check.held else "NO")
    return table


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread: the matrices are tiny, and the sums keep one order on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
