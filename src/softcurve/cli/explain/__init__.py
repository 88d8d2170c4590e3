"""`softcurve explain`: one interactive page on softmax, cross-entropy and KL, measured and checked on digits."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

import softcurve
from softcurve.cli.explain.chain import explain_chain, explain_jacobian
from softcurve.cli.explain.divergences import explain_directions, explain_minimum, explain_targets
from softcurve.cli.explain.lines import SETUP, run_lines
from softcurve.cli.explain.network import HIDDEN, Network, train
from softcurve.cli.explain.play import play_data
from softcurve.cli.explain.vae import explain_vae
from softcurve.cli.interrupt import stop_if_interrupted
from softcurve.cli.options import ExplainOptions, Language, check_suffix
from softcurve.cli.page.render import Section, render_page
from softcurve.cli.printing import finite, print_results, print_table
from softcurve.cli.streams import encoded
from softcurve.files.atomic import check_writable, replacing
from softcurve.fit.outputs import check_outputs

MOST_SHOWN = 12  # failed checks

# The parts of the page: the order of the statements, then what goes beyond them.
PARTS = (
    "notation", "probabilities", "decomposition", "chain", "gradients", "relative-entropy", "directions", "autoencoder",
    "equivalence", "minimum", "checks",
)  # fmt: skip


def explain_command(options: ExplainOptions, *, as_json: bool | None = None) -> None:
    """Write the page, and print a summary of its checks or the JSON line. Raises ValueError."""
    check_outputs({"--out": options.out}, {}, overwrite=options.overwrite)
    record = write_explanation(options.out, seed=options.seed, lang=options.lang)
    print_results(record, lambda: _print_checks(record), as_json=as_json, written=(options.out,))


def write_explanation(out: Path, *, seed: int = 0, lang: Language = "en") -> dict[str, Any]:
    """Train a small network on digits, and write the page that explains and checks its gradients.

    The page is in English or Chinese, by ``lang``; the record is the same. The same seed gives the same page and the
    same record, which holds figures by section, in nats unless stated otherwise; an infinity is `"inf"`. Raises
    ValueError for a seed out of range, or if `out` cannot be written.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be from 0 to 2**63 − 1, but is {seed}; give another one")
    check_writable(out, "--out")
    check_suffix("--out", out, ".html", ".htm")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are tiny, and sums have the same order on every machine
    try:
        network = train(seed)
        sections = measure(network, seed)
        page = render_explanation(network, sections, seed, lang)
        stop_if_interrupted()
        with replacing(out, "--out") as file:
            file.write(encoded(page))
    finally:
        torch.set_num_threads(threads)
    checks = [check for section in sections for check in section.checks]
    record: dict[str, Any] = {
        "command": "explain", "page": str(out), "seed": seed, "held_out_accuracy": network.accuracy(),
        "all_within_bounds": all(check.held for check in checks),
        "checks": [vars(check) | {"held": check.held, "section": section.key} for section in sections
                   for check in section.checks],
    }  # fmt: skip
    return dict(finite(record | {section.key: section.figures for section in sections}, str))


def _print_checks(record: dict[str, Any]) -> None:
    """Print how many numerical checks of each part of the page passed, and those that failed."""
    checks: list[dict[str, Any]] = record["checks"]
    sections = dict.fromkeys(check["section"] for check in checks)
    held = {key: [check["held"] for check in checks if check["section"] == key] for key in sections}
    titles = read_texts("en")["all-checks"]
    rows = [(titles[key], str(len(each)), str(sum(each))) for key, each in held.items()]
    rows.append(("all", str(len(checks)), str(sum(check["held"] for check in checks))))
    print_table("softcurve explain: numerical checks", rows, {"part": "left", "checks": "right", "passed": "right"})
    if broken := [check for check in checks if not check["held"]][:MOST_SHOWN]:
        figures = [
            (each["name"], f"{float(each['measured']):.3g}", f"{each['relation']} {float(each['bound']):.3g}")
            for each in broken  # the record holds an infinity as "inf"
        ]
        print_table("failed checks", figures, {"check": "left", "measured": "right", "bound": "right"})


def measure(network: Network, seed: int) -> list[Section]:
    """Measure everything that the page states."""
    return [
        explain_chain(network), explain_jacobian(network), explain_targets(network), explain_directions(),
        explain_minimum(network, seed), explain_vae(),
    ]  # fmt: skip


def render_explanation(network: Network, sections: Sequence[Section], seed: int, lang: Language) -> str:
    """Return the page in a language; its templates see the figures of a section by its name."""
    facts = {section.key: {**section.figures, **section.values} for section in sections}
    return render_page(
        "softcurve.cli.explain", "page.html.j2", [Section(part) for part in PARTS], read_texts(lang), lang=lang,
        seed=seed, hidden=HIDDEN, accuracy=network.accuracy(), digits=len(network.held_out.x), checked=sections,
        checks=[check for section in sections for check in section.checks], training_steps=network.history.steps[-1],
        softcurve=softcurve.__version__, torch=torch.__version__, setup=SETUP, lines=run_lines(),
        play_data=play_data(network), **facts,
    )  # fmt: skip


def read_texts(lang: Language) -> dict[str, dict[str, str]]:
    """Return the words of the page in a language, by the names of its parts."""
    return tomllib.loads(files("softcurve.cli.explain").joinpath(f"templates/{lang}.toml").read_text("utf-8"))
