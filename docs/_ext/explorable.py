"""The explorable page of ``softcurve explain``, written into the built site as explain.html and explain.zh.html."""

from __future__ import annotations

from pathlib import Path

from sphinx.application import Sphinx

import softcurve
from softcurve.cli.explain import write_explanation
from softcurve.cli.options import Language

PAGES: dict[Language, str] = {"en": "explain.html", "zh": "explain.zh.html"}


def write_pages(app: Sphinx, error: Exception | None) -> None:
    """Write each page that is older than the package's code, which takes some seconds."""
    if error is not None or app.builder.name != "html":
        return
    package = Path(softcurve.__file__).parent
    newest = max(file.stat().st_mtime for file in package.rglob("*") if file.is_file())
    for language, name in PAGES.items():
        page = Path(app.outdir) / name
        if not page.exists() or page.stat().st_mtime < newest:
            write_explanation(page, lang=language)


def setup(app: Sphinx) -> dict[str, bool]:
    """Write the pages at the end of a build."""
    app.connect("build-finished", write_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
