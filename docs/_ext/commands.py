"""The directive ``command``: what ``softcurve COMMAND --help`` prints, from the command line itself."""

from __future__ import annotations

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from typer.testing import CliRunner

from softcurve.cli.main import app as command_line

WIDTH = 80


class CommandDirective(SphinxDirective):
    """Show the help of the command that the argument names."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the help as a literal block."""
        done = CliRunner().invoke(
            command_line, [self.arguments[0], "--help"], prog_name="softcurve", terminal_width=WIDTH
        )
        if done.exit_code:
            raise self.error(f"softcurve has no command {self.arguments[0]}: {done.stderr}")
        text = done.stdout.rstrip()
        return [nodes.literal_block(text, text, language="text")]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("command", CommandDirective)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
