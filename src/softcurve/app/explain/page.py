"""The page: the sections' templates filled in, with formulas as MathML and nothing fetched from anywhere."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import unescape

from jinja2 import Environment, PackageLoader, StrictUndefined
from latex2mathml.converter import convert
from markupsafe import Markup

from softcurve.app.explain.section import Section

# LaTeX stands in the templates as \( … \) in a line and as \[ … \] on its own.
FORMULA = re.compile(r"\\\((?P<inline>.+?)\\\)|\\\[(?P<block>.+?)\\\]", re.DOTALL)


def render(sections: Sequence[Section], facts: Mapping[str, object]) -> str:
    """The whole page as one string of HTML."""
    environment = Environment(
        loader=PackageLoader("softcurve.app.explain"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": figure, "fixed": fixed}
    page = environment.get_template("page.html.j2").render(sections=sections, facts=facts)
    return FORMULA.sub(_mathml, page)


def _mathml(found: re.Match[str]) -> str:
    latex = unescape(found["inline"] or found["block"])
    latex = re.sub(r"\\log(?!\()", r"\\log\\,", latex)  # MathML puts no space between a function and its argument
    if found["inline"]:
        return convert(latex, display="inline")
    return f'<div class="formula">{convert(latex, display="block")}</div>'


def figure(value: float) -> Markup:
    """A number in few digits: plain near one, with a power of ten elsewhere, and 0 only where it is zero."""
    if value == 0 or not 1e-3 <= abs(value) < 1e4:
        return _power(value)
    return Markup(f"{value:.3g}".replace("-", "−"))


def _power(value: float) -> Markup:
    if value == 0 or not math.isfinite(value):
        return fixed(value, 0)
    digits, exponent = f"{value:.1e}".split("e")
    power = Markup("10<sup>{}</sup>").format(str(int(exponent)).replace("-", "−"))
    if abs(value) == float(f"1e{exponent}"):
        return Markup("−" if value < 0 else "") + power
    return Markup("{}&nbsp;·&nbsp;{}").format(digits.replace("-", "−"), power)


def fixed(value: float, decimals: int = 4) -> Markup:
    """A number with so many decimals, infinities as ∞."""
    if math.isinf(value):
        return Markup("+∞" if value > 0 else "−∞")
    return Markup(f"{value:.{decimals}f}".replace("-", "−"))
