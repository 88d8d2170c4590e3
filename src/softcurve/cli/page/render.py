"""Pages of sections as HTML that loads nothing: templates, numbers for people, and formulas as MathML."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import unescape
from typing import Literal

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from latex2mathml.converter import convert
from markupsafe import Markup, escape


@dataclass(frozen=True)
class Check:
    """A measured number and the bound that it must keep."""

    name: str
    measured: float
    relation: Literal["≤", "≥", "="]
    bound: float

    @property
    def held(self) -> bool:
        """Whether the bound is kept; NaN keeps none."""
        compare = {"≤": operator.le, "≥": operator.ge, "=": operator.eq}[self.relation]
        return bool(compare(self.measured, self.bound))


@dataclass(frozen=True)
class Section:
    """A section of a page, filled into the template ``<key>.html.j2``.

    The template sees the entries of ``values`` and of ``figures`` by their names. ``figures`` and ``checks`` are also
    part of the JSON record.
    """

    key: str
    title: str
    values: Mapping[str, object] = field(default_factory=dict)
    figures: Mapping[str, object] = field(default_factory=dict)
    checks: tuple[Check, ...] = ()


# Templates hold LaTeX between \( and \) within a line, and between \[ and \] as a block.
FORMULA = re.compile(r"\\\((?P<inline>.+?)\\\)|\\\[(?P<block>.+?)\\\]", re.DOTALL)


def render_page(package: str, template: str, sections: Sequence[Section], **common: object) -> str:
    """Fill the template of a package, which extends ``base.html.j2``, with sections; all of them see ``common``.

    Only a template holds formulas: a backslash in a value, which may be a user's text, is shown as it is.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("softcurve.cli.page")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_literal,
    )
    environment.filters |= {"show": show, "seconds": seconds}
    environment.globals["zip"] = zip
    macros = environment.get_template("macros.html.j2").module
    environment.globals |= {name: getattr(macros, name) for name in ("chart", "table")}
    bodies = [
        Markup(environment.get_template(f"{section.key}.html.j2").render(common, **section.figures, **section.values))
        for section in sections
    ]
    page = environment.get_template(template).render(common, sections=sections, bodies=bodies)
    return FORMULA.sub(_mathml, page)


def _literal(value: object) -> object:
    """Replace the backslashes of a plain string, so that it opens no formula."""
    if isinstance(value, str) and not isinstance(value, Markup) and "\\" in value:
        return Markup(str(escape(value)).replace("\\", "&#92;"))
    return value


def _mathml(found: re.Match[str]) -> str:
    latex = unescape(found["inline"] or found["block"])
    latex = re.sub(r"\\log(?!\()", r"\\log\\,", latex)  # MathML puts no space between a function and its argument
    if found["inline"]:
        return convert(latex, display="inline")
    return f'<div class="formula">{convert(latex, display="block")}</div>'


def show(value: object, form: str = "") -> object:
    """A number in the form of :func:`format`, by default in three digits; None as a dash, and text as it is.

    Without a form a number near one is plain, any other has a power of ten, and only zero is shown as 0.
    """
    if value is None:
        return "–"
    if not isinstance(value, int | float) or form == "s":
        return value
    if not math.isfinite(value):
        return {math.inf: "+∞", -math.inf: "−∞"}.get(value, "NaN")
    if not form and value and not 1e-3 <= abs(value) < 1e4:
        return _power(value)
    form = form or (".3g" if abs(value) < 999.5 else ".0f")  # in three digits, 999.5 would be 1e+03
    text = format(value, form).replace("-", "−").replace(",", "\u202f")
    return Markup(text.replace("%", "&nbsp;%"))


def _power(value: float) -> Markup:
    digits, exponent = f"{value:.1e}".split("e")
    power = Markup("10<sup>{}</sup>").format(str(int(exponent)).replace("-", "−"))
    if abs(value) == float(f"1e{exponent}"):
        return Markup("−" if value < 0 else "") + power
    return Markup("{}&nbsp;·&nbsp;{}").format(digits.replace("-", "−"), power)


def seconds(value: float) -> str:
    """A time in the unit that people would use."""
    if value < 1:
        return f"{1000 * value:.0f} ms"
    if value < 120:
        return f"{value:.1f} s"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 120 else f"{value / 3600:.1f} h"
