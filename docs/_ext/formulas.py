"""Formulas of the pages as inline SVG, drawn by ziamath, so that a page needs no script, font or network."""

from __future__ import annotations

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.logging import getLogger
from sphinx.writers.html5 import HTML5Translator

from softcurve.cli.page.formula import FormulaWriter

LOGGER = getLogger(__name__)


class Formulas:
    """The formulas of the pages; a page draws each of its glyphs once and refers to it."""

    def __init__(self) -> None:
        self._writers: dict[str, FormulaWriter] = {}

    def visit_math(self, translator: HTML5Translator, node: nodes.math) -> None:
        """Write a formula within a line."""
        translator.body.append(self._draw(translator, node, inline=True))
        raise nodes.SkipNode

    def visit_math_block(self, translator: HTML5Translator, node: nodes.math_block) -> None:
        """Write a formula as a block; a blank line separates the formulas of a column."""
        svg = self._draw(translator, node, inline=False)
        translator.body.append(f'<div class="formula">{svg}</div>\n')
        raise nodes.SkipNode

    def _draw(self, translator: HTML5Translator, node: nodes.Element, *, inline: bool) -> str:
        page = translator.builder.current_docname
        latex = node.astext().strip()
        try:
            return self._writers.setdefault(page, FormulaWriter()).draw(latex, inline=inline)
        except ValueError as error:
            LOGGER.error("%s", error, location=node)
            return translator.encode(latex)

    def add_glyphs(self, _app: Sphinx, page: str, _template: str, context: dict[str, object], _tree: object) -> None:
        """Append the shapes of the glyphs to a page with formulas."""
        if page in self._writers:
            context["body"] = f"{context['body']}{self._writers[page].glyphs}"


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer as ``html_math_renderer = "svg"``."""
    formulas = Formulas()
    app.add_html_math_renderer("svg", (formulas.visit_math, None), (formulas.visit_math_block, None))
    app.connect("html-page-context", formulas.add_glyphs)
    return {"parallel_read_safe": True, "parallel_write_safe": False}
