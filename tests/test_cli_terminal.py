"""What stands on a terminal of 80 × 50: tables and paths, help, the version, completion; and what is not replaced."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import softcurve
from softcurve.cli.main import app
from softcurve.fit.saved_head import SavedHead

from .cli_output import HEIGHT, WIDTH, assert_fits, run_json, run_tables

COMMANDS = ("fit", "predict", "spectrum", "explain")
LONG = "a-rather-long-name-of-a-class-that-no-column-of-a-table-can-hold-in-one-line-" * 2


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = tuple(f"{number}-{LONG}" for number in range(30))
    SavedHead(torch.eye(30, 4), torch.zeros(30), names, "cross_entropy", 1.0).save("h.safetensors")
    np.savez(
        "d.npz", features=np.random.default_rng(0).normal(size=(90, 4)), target=np.array(names)[np.arange(90) % 30]
    )
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("asked", ["-h", "--help"])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_a_screen(command, asked, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    done = run(*command.split(), asked)
    assert done.exit_code == 0
    assert_fits(done.stdout)
    assert "Usage:" in done.stdout
    if not command:
        assert all(re.search(rf"^  {name} +[A-Z].*[^.]\.$", done.stdout, re.MULTILINE) for name in COMMANDS)
    if command == "fit":
        text = " ".join(done.stdout.split())
        assert "Number of classes for top-k targets. [default: largest index + 1]" in text


def test_the_version_is_printed():
    assert run("--version").stdout == f"softcurve {softcurve.__version__}\n"


def test_completion_offers_commands_options_and_choices(monkeypatch):
    monkeypatch.setenv("_SOFTCURVE_COMPLETE", "complete_bash")
    for words, offered in {"softcurve ": COMMANDS, "softcurve fit --precision ": ("auto", "mixed", "float64")}.items():
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
        assert tuple(CliRunner().invoke(app, prog_name="softcurve").stdout.split()) == offered


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        (["fit", "d.npz", "--out", "o.safetensors", "--path", "0.01,0.1"], ["o.safetensors", "o.json", "o.html"]),
        (["predict", "h.safetensors", "d.npz", "--out", "p.csv"], ["p.csv"]),
        (["predict", "h.safetensors", "d.npz"], []),
        (["spectrum", "h.safetensors", "d.npz", "-k", "40", "--probes", "2", "--out", "s.svg"], ["s.svg"]),
    ],
)
def test_tables_fit_a_screen_and_end_with_what_was_written(arguments, written, monkeypatch):
    monkeypatch.setattr("softcurve.cli.report.render_report", lambda report: "<!DOCTYPE html>")
    shown = run_tables(*arguments).splitlines()
    assert shown[len(shown) - len(written) :] == written
    assert shown[-len(written) - 1].startswith("└")
    assert all(os.path.exists(name) for name in written)


def test_a_terminal_gets_the_tables_and_any_other_output_one_line_of_json():
    """Also with a progress bar, which goes to standard error."""
    command = [sys.executable, "-m", "softcurve", "predict", "h.safetensors", "d.npz", "--out", "p.npy", "--overwrite"]
    terminal, end = pty.openpty()
    environment = os.environ | {"COLUMNS": str(WIDTH), "LINES": str(HEIGHT), "TERM": "dumb", "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, stdout=end, env=environment)
    os.close(end)
    shown = b""
    with suppress(OSError):  # which is how a terminal ends on Linux
        while piece := os.read(terminal, 4096):
            shown += piece
    os.close(terminal)
    assert running.wait(60) == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", shown.decode()).replace("\r\n", "\n")
    assert_fits(text)
    assert text.splitlines()[-1] == "p.npy"
    assert "{" not in text
    record = run_json(*command[3:])
    assert run_json(*command[3:], "--json").keys() == record.keys()
    assert record["rows"] == 90


OUTPUTS = {
    "--out: o.safetensors": ["fit", "none.npz", "--out", "o.safetensors"],
    "--record: o.json": ["fit", "none.npz", "--out", "new.safetensors", "--record", "o.json"],
    "--report: o.html": ["fit", "none.npz", "--out", "new.safetensors", "--report", "o.html"],
    "--out: o.csv": ["predict", "none.safetensors", "d.npz", "--out", "o.csv"],
    "--out: o.png": ["spectrum", "none.safetensors", "d.npz", "--out", "o.png"],
    "--out: o.html": ["explain", "--out", "o.html"],
}


@pytest.mark.parametrize("named", OUTPUTS)
def test_an_output_that_exists_is_refused_before_anything_is_read(named, monkeypatch):
    monkeypatch.setattr("softcurve.cli.explain.write_explanation", lambda *_, **__: pytest.fail("work was done"))
    path = Path(named.split()[1])
    path.write_text("old")
    done = run(*OUTPUTS[named])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == (f"softcurve: {named} exists already; give another path, or --overwrite to replace it\n")
    assert path.read_text() == "old"


def test_overwrite_replaces_an_output():
    Path("p.csv").write_text("old")
    assert json.loads(run("predict", "h.safetensors", "d.npz", "--out", "p.csv", "--overwrite").stdout)["rows"] == 90
    assert Path("p.csv").read_text().startswith("label,")
