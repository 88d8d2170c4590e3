"""The documentation as HTML: it builds without a warning, its links and formulas are whole, and it loads nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import softcurve
from softcurve import curvature, fit, nn, reference, typing

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
NEEDED = ("sphinx", "furo", "myst_parser", "sphinx_gallery", "sphinx_copybutton", "sphinx_design", "ziamath")
MODULES = {module.__name__.rpartition(".")[2] for module in (curvature, nn, reference, typing, softcurve.functional)}
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


@dataclass
class Page(HTMLParser):
    """What a page links to, loads, and shows as text outside of code."""

    path: Path
    ids: Counter[str] = field(default_factory=Counter)
    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    formulas: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self._open: list[str] = []
        self.feed(self.path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag not in VOID:
            self._open.append(tag)
        if "id" in values and tag != "symbol":
            self.ids[values["id"]] += 1
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag in {"script", "img", "iframe", "source"} and "src" in values:
            self.loaded.append(values["src"])
        elif tag == "link" and values.get("rel") not in {"canonical", "search"} and "href" in values:
            self.loaded.append(values["href"])
        elif tag == "svg" and values.get("class") == "tex":
            self.formulas += 1
            assert values["role"] == "img", self.path
            assert values["aria-label"], self.path

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"pre", "code", "script", "style", "title"} & set(self._open):
            self.text.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[Path, Page]:
    """Build the HTML once, in a process of its own, and read its pages."""
    if missing := [module for module in NEEDED if find_spec(module) is None]:
        pytest.skip(f"the documentation needs the extra docs: {', '.join(missing)} not installed")
    folder = tmp_path_factory.mktemp("site")
    out = folder / "html"
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(folder / "trees")]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [*command, str(DOCS), str(out)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {path: Page(path) for path in sorted(out.rglob("*.html")) if "_static" not in path.parts}


# Formulas that are not drawn, roles, literals and directives that are not resolved.
RAW = re.compile(r"\$|\\[A-Za-z]+\{|\\(frac|sum|log|partial)|:(?:[a-z]+:)?[a-z]+:`|``|\{eval-rst\}|^:::|\*\*\w")


def raw_markup(pages: Iterable[Page]) -> set[tuple[str, str]]:
    return {(page.path.name, text.strip()) for page in pages for text in page.text if RAW.search(text)}


def broken_links(site: dict[Path, Page]) -> set[tuple[str, str]]:
    """Return the links within the site whose file or anchor does not exist, by the names of their pages."""
    broken = set()
    for path, page in site.items():
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not target.is_file() or (anchor and target in site and anchor not in site[target].ids):
                broken.add((path.name, link))
    return broken


def foreign(site: dict[Path, Page]) -> set[tuple[str, str]]:
    """Return what pages load from another host."""
    return {(path.name, url) for path, page in site.items() for url in page.loaded if urlsplit(url).netloc}


@pytest.mark.slow
def test_no_markup_is_left(site):
    """Formulas are drawn and roles are resolved, also those of docstrings; sources are left out."""
    pages = {path: page for path, page in site.items() if "_modules" not in path.parts}
    assert sum(page.formulas for page in pages.values()) > 100
    assert not raw_markup(pages.values())


@pytest.mark.slow
def test_every_link_leads_somewhere(site):
    assert sum(len(page.links) for page in site.values()) > 1000
    assert not broken_links(site)


def test_a_broken_page_is_noticed(tmp_path):
    path = tmp_path / "page.html"
    path.write_text(
        "<p id=here>costs $5 <code>$x$</code> :func:`f` ``g`` \\frac12</p><a href=#there>x</a><a href=other.html>x</a>"
        "<a href=page.html#here>x</a><script src=https://a.b/c.js></script><img src=//a.b/c.png>", encoding="utf-8"
    )  # fmt: skip
    page = Page(path)
    assert len(raw_markup([page])) == 2
    assert all(RAW.search(text) for text in ("$5", ":func:`f`", "``g``", "\\frac12", ":py:class:`a`", "**bold"))
    assert broken_links({path: page}) == {("page.html", "#there"), ("page.html", "other.html")}
    assert len(foreign({path: page})) == 2


@pytest.mark.slow
def test_the_explorable_page_is_part_of_the_site(site):
    pages = {path.name for path in site}
    assert {"explain.html", "explain.zh.html"} <= pages
    linking = {path.name for path, page in site.items() if "explain.html" in page.links}
    assert {"index.html", "mathematics.html"} <= linking


@pytest.mark.slow
def test_nothing_is_loaded_from_another_host(site):
    out = next(path.parent for path in site if path.name == "index.html" and path.parent.name == "html")
    assert not foreign(site)
    for style in out.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//[^)\s]*", style.read_text("utf-8")), style.name


@pytest.mark.parametrize("latex", [r"\frac{a", r"a_{", r"\unknown x", "\N{GRINNING FACE}"])
def test_a_formula_that_cannot_be_drawn_is_an_error(latex):
    formula = pytest.importorskip("softcurve.cli.page.formula")
    with pytest.raises(ValueError, match="the formula"):
        formula.FormulaWriter().draw(latex, inline=True)


def test_every_example_has_a_small_picture():
    examples = {path.stem for path in (ROOT / "examples").glob("*.py")}
    sizes = {path.stem: path.stat().st_size for path in (DOCS / "pictures").glob("*.png") if path.stem in examples}
    assert sizes.keys() == examples
    assert max(sizes.values()) <= 60_000


def listed_names() -> Counter[str]:
    """Count the names in the directives ``api`` of all pages."""
    names: Counter[str] = Counter()
    for page in sorted((DOCS / "api").glob("*.md")):
        for module, block in re.findall(r"(?ms)^\.\. api:: (\S+)\n(.*?)^```", page.read_text(encoding="utf-8")):
            names.update(f"{module}.{name}" for name in re.findall(r"(?m)^   (\w+)$", block))
    return names


def test_every_public_name_stands_on_one_page():
    """The lists of the pages are those of the modules, so that a new name needs a page."""
    public = {f"softcurve.{name}" for name in set(softcurve.__all__) - MODULES}
    for module in (nn, curvature, reference, typing, fit):
        public |= {f"{module.__name__}.{name}" for name in module.__all__}
    listed = listed_names()
    assert not public - set(listed)
    assert max(listed.values()) == 1
    known = (*public, "softcurve.lazy.", "softcurve.integrations.", "softcurve.fit.coefficients.")
    assert not [name for name in listed if not name.startswith(known)]
