"""Every code block of the documentation and every example of a docstring runs, and every command there exists."""

from __future__ import annotations

import ast
import doctest
import re
import shlex
import socket
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import softcurve

pytest.importorskip("sybil")

from sybil.document import Document
from sybil.parsers.myst import CodeBlockParser, PythonCodeBlockParser
from typer.main import get_command

from softcurve.cli.main import app

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "softcurve"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = [file for file in sorted(SOURCE.rglob("*.py")) if ">>> " in file.read_text(encoding="utf-8")]

# The extra `integration` brings them; what needs one is skipped where it is missing.
OPTIONAL = {"accelerate", "datasets", "lightning", "peft", "transformers", "trl"}

pytestmark = [
    pytest.mark.usefixtures("without_shape_checks"),
    # What these packages warn of.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument", "ignore:You are importing from 'trl.experimental'"),
    pytest.mark.filterwarnings("ignore:.* does not have many workers"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning"),
]


@pytest.fixture(autouse=True)
def folder_and_process_group(tmp_path, monkeypatch) -> Iterator[None]:
    """Run in an empty folder, with the environment that torchrun gives to a single process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.chdir(tmp_path)
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def missing_package(error: BaseException | None) -> str | None:
    """Return the optional package whose absence is the cause of an error."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in OPTIONAL:
            return error.name
        error = error.__cause__
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_blocks_of_a_page_run_in_order(page):
    """The blocks of a page share their names; one that needs names of a skipped block is skipped, too."""
    skipped: dict[int, str] = {}
    for block in Document.parse(str(page), PythonCodeBlockParser()).examples():
        try:
            block.evaluate()
        except (ImportError, NameError) as error:
            package = missing_package(error)
            if package is None and not (skipped and isinstance(error, NameError)):
                raise
            skipped[block.line] = package or str(error)
    if skipped:
        pytest.skip(f"blocks of {page.name} that need what is missing, by line: {skipped}")


def docstrings(file: Path) -> Iterator[tuple[str, int, str]]:
    """Yield the name, the line and the text of each docstring of a file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Module) and (text := ast.get_docstring(node)):
            yield getattr(node, "name", file.stem), node.body[0].lineno, text


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_the_examples_of_docstrings_run(file):
    """Each example stands for itself, besides the imports that the API reference names."""
    for package in sorted(OPTIONAL):
        if re.search(rf">>> from (softcurve\.integrations\.)?{package} import", file.read_text(encoding="utf-8")):
            pytest.importorskip(package)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for name, line, text in docstrings(file):
        names = {"torch": torch, "np": np, "softcurve": softcurve}
        runner.run(doctest.DocTestParser().get_doctest(text, names, name, str(file), line - 1))
    assert runner.summarize(verbose=False).failed == 0
    assert runner.tries > 0


# --- commands: whether they exist, without running them ---------------------------------------------------------------


def commands(page: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the line and the words of each command in the `console` blocks of a page."""
    for block in Document.parse(str(page), CodeBlockParser("console", lambda _: None)).examples():
        for line in re.sub(r"\\\n(> )?\s*", "", block.parsed).splitlines():
            if line.startswith("$ "):
                words = shlex.split(line[2:], comments=True)
                yield block.line, [word for word in words if not re.fullmatch(r"[A-Z_]+=.*", word)]


def unknown_words(words: list[str], page: str) -> set[str]:
    """Return what a command names and does not exist: a program, command, option, target, extra or file."""
    program, *rest = words
    match Path(program).name:
        case "softcurve":
            command = get_command(app).commands.get(rest[0])
            if command is None:
                return set(rest[:1]) - {"--version", "--help", "--install-completion"}
            options = {option for parameter in command.params for option in parameter.opts}
            return {word for word in rest if word.startswith("-")} - options - {"--help"}
        case "make":
            targets = set(re.findall(r"(?m)^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8")))
            return {word for word in rest if not word.startswith("-")} - targets
        case "pip":
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            asked = {extra for word in rest for part in re.findall(r"\[(.*?)\]", word) for extra in part.split(",")}
            return asked - set(extras["optional-dependencies"])
        case "python" | "torchrun":
            if "-m" in rest:
                module, *arguments = rest[rest.index("-m") + 1 :]
                if module == "softcurve":
                    return unknown_words([module, *arguments], page)
                return set() if find_spec(module) else {module}
            scripts = {word for word in rest if word.endswith(".py")}
            return {script for script in scripts if not (ROOT / script).exists() and page.count(script) < 2}
        case "cd" | "git" | "source":
            return set()
    return {program}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_exist(page):
    text = page.read_text(encoding="utf-8")
    assert not {(line, *unknown) for line, words in commands(page) if (unknown := unknown_words(words, text))}


def test_a_command_that_does_not_exist_is_noticed():
    wrong = ["softcurve fut", "softcurve fit --ot x", "make tset", "pip install '.[al]'", "python x.py", "pyhton x.py"]
    assert all(unknown_words(shlex.split(command), "") for command in wrong)
