"""What a command prints: one line of JSON for programs, or tables that fit a terminal of 80 columns and 50 lines."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner

from softcurve.cli.main import app

WIDTH, HEIGHT = 80, 50


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def run_json(*arguments: object) -> dict[str, Any]:
    """The record of a run that must succeed, and print it alone, without a word on stderr."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1
    return json.loads(done.stdout, parse_constant=refuse_constant)


def run_tables(*arguments: object) -> str:
    """What a run that must succeed shows on a terminal; it replaces its outputs."""
    more = {"--no-json", "--overwrite"}.difference(map(str, arguments))
    done = CliRunner().invoke(app, [str(argument) for argument in (*arguments, *more)])
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    assert_fits(done.stdout)
    assert "{" not in done.stdout
    return done.stdout


def assert_fits(text: str) -> None:
    lines = text.splitlines()
    assert len(lines) < HEIGHT, text  # one line is that of the command
    # A path is as long as the directory of the test makes it.
    assert max(len(line) for line in lines if not line.startswith("/")) <= WIDTH, text


def run_both(*arguments: object) -> tuple[dict[str, Any], str]:
    """The record and the tables of two runs."""
    return run_json(*arguments), run_tables(*arguments)
