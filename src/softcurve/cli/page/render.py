"""Pages of sections as HTML that loads nothing: templates, texts, formatted numbers, and formulas."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, pass_context
from jinja2.environment import TemplateModule
from jinja2.runtime import Context
from markupsafe import Markup, escape

from softcurve.cli.page.formula import FormulaWriter


@dataclass(frozen=True)
class Check:
    """A measured number and the bound that it must keep."""

    name: str
    measured: float
    relation: Literal["≤", "≥", "="]
    bound: float

    @property
    def held(self) -> bool:
        """Whether the value keeps the bound; NaN keeps none."""
        compare = {"≤": operator.le, "≥": operator.ge, "=": operator.eq}[self.relation]
        return bool(compare(self.measured, self.bound))


@dataclass(frozen=True)
class Section:
    """A section of a page, filled into the template ``<key>.html.j2``, which sets its ``title``.

    The template sees the entries of ``values`` and of ``figures`` by their names. ``figures`` and ``checks`` are also
    part of the JSON record.
    """

    key: str
    values: Mapping[str, object] = field(default_factory=dict)
    figures: Mapping[str, object] = field(default_factory=dict)
    checks: tuple[Check, ...] = ()


Texts = Mapping[str, Mapping[str, str]]  # by the part of a page, and by their names in it


def render_page(
    package: str, template: str, sections: Sequence[Section], texts: Texts | None = None, /, **common: object
) -> str:
    """Fill the template of a package, which extends ``base.html.j2``, with sections; all of them see ``common``.

    A template calls ``t("name.title")`` for the entry ``texts["name"]["title"]``, which is a template itself, so that
    pages in several languages share one structure; ``t(key, "p")`` makes each of its paragraphs an element ``p``.
    Only templates and texts hold formulas: a backslash in a value, which may be a user's text, is shown as it is.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("softcurve.cli.page")]), undefined=StrictUndefined,
        autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_literal, extensions=["jinja2.ext.do"],
    )  # fmt: skip
    environment.filters |= {"show": show, "seconds": seconds}
    environment.globals |= {"zip": zip, "t": _lookup(texts or {})}
    common["texts"] = texts
    macros = environment.get_template("macros.html.j2").module
    environment.globals |= {name: getattr(macros, name) for name in ("chart", "image", "table")}
    bodies: dict[str, TemplateModule] = {}
    for section in sections:
        variables = {**common, "bodies": bodies, **section.figures, **section.values}
        bodies[section.key] = environment.get_template(f"{section.key}.html.j2").make_module(variables)
    formulas = FormulaWriter()
    page = formulas.replace(environment.get_template(template).render(common, bodies=bodies))
    return page.replace("<!-- glyphs -->", formulas.glyphs, 1)


def _lookup(texts: Texts) -> Callable[..., Markup]:
    """Return the function ``t`` of a page's templates."""

    @pass_context
    def t(context: Context, key: str, tag: str = "") -> Markup:
        part, _, name = key.partition(".")
        filled = context.environment.from_string(texts[part][name]).render(context.get_all())
        if tag:
            filled = "".join(f"<{tag}>{part}</{tag}>" for part in filled.strip().split("\n\n"))
        return Markup(filled)  # the texts are part of this package, and the values in them have been escaped

    return t


def _literal(value: object) -> object:
    """Replace the backslashes of a plain string, so that it opens no formula."""
    if isinstance(value, str) and not isinstance(value, Markup) and "\\" in value:
        return Markup(str(escape(value)).replace("\\", "&#92;"))
    return value


def show(value: object, form: str = "") -> object:
    """Format a number as :func:`format` does, by default in three digits; None is a dash, and text stays as it is.

    Without a form a number near one is plain, any other has a power of ten, and only zero is shown as 0.
    """
    if value is None:
        return "–"
    if not isinstance(value, int | float) or form == "s":
        return value
    if not math.isfinite(value):
        return {math.inf: "+∞", -math.inf: "−∞"}.get(value, "NaN")
    if form or not value or 1e-3 <= abs(value) < 1e4:
        text = format(value, form or (".3g" if abs(value) < 999.5 else ".0f"))  # in three digits, 999.5 would be 1e+03
    else:
        digits, exponent = f"{value:.1e}".split("e")
        sign = "-" if value < 0 else ""
        factor = sign if abs(value) == float(f"1e{exponent}") else f"{digits}&nbsp;·&nbsp;"
        text = f"{factor}10<sup>{int(exponent)}</sup>"
    return Markup(text.replace("-", "−").replace(",", "\u202f").replace("%", "&nbsp;%"))


def seconds(value: float) -> str:
    """Format a time in the unit that people would use."""
    if value < 1:
        return f"{1000 * value:.0f} ms"
    if value < 120:
        return f"{value:.1f} s"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 120 else f"{value / 3600:.1f} h"
