"""Formulas in LaTeX as inline SVG, which looks the same with whatever fonts a reader has."""

from __future__ import annotations

import re
import warnings
from functools import cache
from html import escape, unescape
from xml.etree import ElementTree

with warnings.catch_warnings():  # on import it opens its font by a function that Python 3.11 deprecates
    warnings.simplefilter("ignore", DeprecationWarning)
    from ziamath.tex import tex2mml
    from ziamath.zmath import Latex

# Templates hold LaTeX between \( and \) within a line, and between \[ and \] as a block.
FORMULA = re.compile(r"\\\((?P<inline>.+?)\\\)|\\\[(?P<block>.+?)\\\]", re.DOTALL)
SIZE = 16  # pixels of an em in the coordinates of the drawings
GLYPH = "STIXTwoMathRegular_"  # begins the names of glyphs, shortened
MISSING = f"{GLYPH}0"  # the box of a character that the font lacks


class FormulaWriter:
    """Draws the formulas of one page; each glyph is drawn once, in :attr:`glyphs`, and used by its name."""

    def __init__(self) -> None:
        self._glyphs: dict[str, str] = {}

    @property
    def glyphs(self) -> str:
        """The shapes that the formulas refer to, as one invisible element."""
        return f'<svg class="glyphs" width="0" height="0" aria-hidden="true">{"".join(self._glyphs.values())}</svg>'

    def replace(self, html: str) -> str:
        """Replace the LaTeX between its marks."""
        return FORMULA.sub(self._drawn, html)

    def draw(self, latex: str, *, inline: bool) -> str:
        """Return a formula as an SVG element. Raises ValueError if it cannot be drawn."""
        svg, glyphs = _draw(latex, inline=inline)
        self._glyphs |= glyphs
        return svg

    def _drawn(self, formula: re.Match[str]) -> str:
        latex = unescape(formula["inline"] or formula["block"]).strip()
        svg = self.draw(latex, inline=formula["block"] is None)
        return svg if formula["inline"] else f'<div class="formula">{svg}</div>'


@cache
def _draw(latex: str, *, inline: bool) -> tuple[str, dict[str, str]]:
    """Return the drawing, with the LaTeX as its text alternative, and the glyphs that it uses by their names."""
    try:
        root = Latex(latex, size=SIZE, inline=inline).svgxml()
    except Exception as error:  # the parser of LaTeX raises errors of many kinds, an AssertionError for a missing brace
        raise ValueError(f"the formula {latex!r} is not LaTeX that ziamath draws ({type(error).__name__})") from error
    # ziamath draws a command that it does not know as its name, and a character without a glyph as a box.
    if unknown := re.findall(r"\\[A-Za-z]+", tex2mml(latex, inline=inline)):
        raise ValueError(f"the formula {latex!r} has {unknown[0]}, which ziamath does not know; write it by others")
    glyphs: dict[str, str] = {}
    parts: list[str] = []
    for element in root:
        text = ElementTree.tostring(element, encoding="unicode").replace(GLYPH, "g")
        if element.tag == "symbol":
            glyphs[element.attrib["id"]] = text
        else:
            parts.append(text.replace('"black"', '"currentColor"'))
    if MISSING in glyphs:
        raise ValueError(f"the formula {latex!r} has a character that its font lacks; write it by a command")
    _, top, width, height = map(float, root.attrib["viewBox"].split())
    depth = top + height  # below the baseline
    style = f"width:{width / SIZE:.3f}em;height:{height / SIZE:.3f}em;vertical-align:{-depth / SIZE:.3f}em"
    opening = (
        f'<svg class="tex" role="img" aria-label="{escape(latex)}" viewBox="{root.attrib["viewBox"]}" style="{style}">'
    )
    return f"{opening}{''.join(parts)}</svg>", glyphs
