"""The page: the sections' templates filled in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from softcurve.cli.explain.section import Section
from softcurve.cli.page.render import render_page


def render(sections: Sequence[Section], facts: Mapping[str, object]) -> str:
    """The whole page as one string of HTML."""
    values = {"sections": sections, "facts": facts}
    return render_page("softcurve.cli.explain", "page.html.j2", values, formulas_in_values=True)
