"""The directive ``api``: a table of public names, followed by the entry of each."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from typing import get_origin

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.ext.autodoc.mock import mock
from sphinx.util.docutils import SphinxDirective

FUNCTION, CLASS, DATA = "autofunction", "autoclass", "autodata"


class ApiDirective(SphinxDirective):
    """Document the names of a module that the content lists, one a line.

    The argument is the module. ``:inherited-members:`` and ``:exclude-members:`` are those of autodoc, for the classes.
    """

    required_arguments = 1
    has_content = True
    option_spec = {  # noqa: RUF012 - docutils reads it from the class
        "inherited-members": directives.unchanged,
        "exclude-members": directives.unchanged,
    }

    def run(self) -> list[nodes.Node]:
        """Return the nodes of the table and of the entries."""
        module, names = self.arguments[0], [line.strip() for line in self.content if line.strip()]
        lines = [f".. currentmodule:: {module}", "", ".. autosummary::", "   :nosignatures:", ""]
        lines += [f"   {name}" for name in names]
        for name in names:
            lines += ["", *self._entry(module, name)]
        source, line = self.get_source_info()
        return self.parse_text_to_nodes(StringList(lines, source=source or "", items=[(source, line)] * len(lines)))

    def _entry(self, module: str, name: str) -> list[str]:
        with mock(self.config.autodoc_mock_imports):
            value = getattr(import_module(module), name)
        if not inspect.isclass(value):
            is_function = callable(value) and get_origin(value) is None  # the alias of a Literal is callable, too
            return [f".. {FUNCTION if is_function else DATA}:: {name}"]
        options = [f"   :{option}: {argument}" for option, argument in self.options.items()]
        return [f".. {CLASS}:: {name}", "   :members:", "   :show-inheritance:", *options]


def _named_aliases(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Show an alias in a union, such as ``Integer | None``, by its name: Sphinx 9 shows the repr of its reference."""
    reference = re.compile(r"TypeAliasForwardRef\('([\w.]+)'\)")
    return signature and reference.sub(r"\1", signature), returns and reference.sub(r"\1", returns)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive, and the names of aliases in signatures."""
    app.setup_extension("sphinx.ext.autodoc")
    app.setup_extension("sphinx.ext.autosummary")
    app.add_directive("api", ApiDirective)
    app.connect("autodoc-process-signature", _named_aliases)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
