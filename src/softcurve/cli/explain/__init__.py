"""`softcurve explain`: the softmax chain on digits, measured, drawn and checked, as one HTML page."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

import softcurve
from softcurve.cli.explain.chain import explain_chain, explain_jacobian
from softcurve.cli.explain.divergences import explain_directions, explain_minimum, explain_targets
from softcurve.cli.explain.network import HIDDEN, train
from softcurve.cli.explain.vae import explain_vae
from softcurve.cli.interrupt import stop_if_interrupted
from softcurve.cli.options import check_suffix
from softcurve.cli.page.render import Section, render_page
from softcurve.cli.printing import Alignment, finite, print_table
from softcurve.cli.streams import encoded
from softcurve.files.atomic import check_writable, replacing


def write_explanation(out: Path, *, seed: int = 0, console: Console) -> dict[str, object]:
    """Train a small network on digits, write the page that explains its gradients, and print every check.

    The same seed gives the same page and the same record, which holds figures by section, in nats unless stated
    otherwise; an infinity is `"inf"`. Raises ValueError for a seed out of range, or if `out` cannot be written.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be from 0 to 2**63 − 1, but is {seed}; give another one")
    check_writable(out, "--out")
    check_suffix("--out", out, ".html", ".htm")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are tiny, and sums have the same order on every machine
    try:
        network = train(seed)
        sections = [
            explain_chain(network), explain_jacobian(network), explain_targets(network), explain_directions(),
            explain_minimum(network, seed), explain_vae(),
        ]  # fmt: skip
        checks = [check for section in sections for check in section.checks]
        accuracy = network.accuracy()
        page = render_page(
            "softcurve.cli.explain", "page.html.j2", [*sections, Section("checks", {"checked": sections})],
            seed=seed, hidden=HIDDEN, accuracy=accuracy, digits=len(network.held_out.x), checks=checks,
            training_steps=network.history.steps[-1], softcurve=softcurve.__version__, torch=torch.__version__,
        )  # fmt: skip
        stop_if_interrupted()
        with replacing(out, "--out") as file:
            file.write(encoded(page))
    finally:
        torch.set_num_threads(threads)
    rows = [(c.name, f"{c.measured:.3g}", f"{c.relation} {c.bound:.3g}", "yes" if c.held else "NO") for c in checks]
    columns: dict[str, Alignment] = {"check": "left", "measured": "right", "bound": "right", "held": "left"}
    print_table("softcurve explain", rows, columns, console)
    record: dict[str, object] = {
        "command": "explain", "page": str(out), "seed": seed, "held_out_accuracy": accuracy,
        "all_within_bounds": all(check.held for check in checks),
        "checks": [vars(check) | {"held": check.held} for check in checks],
    }  # fmt: skip
    return dict(finite(record | {section.key: section.figures for section in sections}, str))
