"""Templates filled in to one string of HTML, with formulas as MathML and nothing fetched from anywhere."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from html import unescape

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from latex2mathml.converter import convert
from markupsafe import Markup, escape

__all__ = ["count", "figure", "fixed", "render_page", "seconds"]

# LaTeX stands in the templates as \( … \) in a line and as \[ … \] on its own.
FORMULA = re.compile(r"\\\((?P<inline>.+?)\\\)|\\\[(?P<block>.+?)\\\]", re.DOTALL)


def render_page(package: str, template: str, values: Mapping[str, object], *, formulas_in_values: bool = False) -> str:
    """The page of a package's template, which may build on ``base.html.j2`` and the macros of this one.

    Formulas are those that stand in the templates. ``formulas_in_values`` also takes the values' backslashes for
    LaTeX; strings that come from somebody's data must not be.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("softcurve.cli.page")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=None if formulas_in_values else _literal,
    )
    environment.filters |= {"figure": figure, "fixed": fixed, "count": count, "seconds": seconds}
    return FORMULA.sub(_mathml, environment.get_template(template).render(values))


def _literal(value: object) -> object:
    """The same text, which opens no formula."""
    if isinstance(value, str) and not isinstance(value, Markup) and "\\" in value:
        return Markup(str(escape(value)).replace("\\", "&#92;"))
    return value


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
    digits = f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"  # the former would be 1e+03
    return Markup(digits.replace("-", "−"))


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


def count(value: int) -> Markup:
    """A whole number with thin spaces between thousands."""
    return Markup(f"{value:,}".replace(",", "\u202f").replace("-", "−"))


def seconds(value: float) -> Markup:
    """A time for people."""
    if value < 1:
        return Markup("{} ms").format(f"{1000 * value:.0f}")
    if value < 120:
        return Markup("{} s").format(f"{value:.1f}")
    minutes = round(value / 60)
    return Markup("{} min").format(minutes) if minutes < 120 else Markup("{} h").format(f"{value / 3600:.1f}")
