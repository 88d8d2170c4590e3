"""The package as a whole: what an import loads, which names are public, and that mutants aim at its text."""

from __future__ import annotations

import ast
import importlib.metadata
from pathlib import Path
from types import ModuleType

import softcurve

from .mutants import MUTANTS

SOURCE = Path(__file__).resolve().parent.parent / "src" / "softcurve"
FILES = sorted(SOURCE.rglob("*.py"))

OF_FIT = {"scipy", "sklearn", "safetensors", "pyarrow", "pandas"}
OF_APP = {"typer", "rich", "matplotlib", "jinja2", "ziamath"}
OF_INTEGRATIONS = {"transformers", "trl", "lightning", "softcurve.integrations"}


def test_an_import_loads_nothing_optional(run_python):
    code = f"import sys, softcurve; print(*sorted({OF_FIT | OF_APP | OF_INTEGRATIONS | {'torch._dynamo'}!r} & set(sys.modules)))"
    assert run_python(code).stdout.strip() == ""


def test_an_import_does_without_jaxtyping(run_python):
    """As on a machine that runs a checkout and has torch alone; what is imported later names it nowhere either."""
    run_python(
        "import sys; sys.modules['jaxtyping'] = None; import softcurve, torch\n"
        "softcurve.linear_cross_entropy(torch.eye(2), torch.eye(2), torch.tensor([0, 1]))"
    )
    named = {
        str(file.relative_to(SOURCE))
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module == "jaxtyping"
    }
    assert named == {"array_types.py"}


def test_no_module_names_an_architecture():
    """A model is known by its head and by the functions of torch that it calls, so that releases change nothing here."""
    for file in FILES:
        assert "transformers.models" not in file.read_text(encoding="utf-8"), file


def test_the_public_list_is_the_public_surface():
    listed = set(softcurve.__all__)
    assert len(softcurve.__all__) == len(listed), "a name is listed twice"
    assert not [name for name in listed if not hasattr(softcurve, name)], "a listed name does not exist"
    found = {name for name, value in vars(softcurve).items() if not isinstance(value, ModuleType)}
    assert {name for name in found if not name.startswith("_")} <= listed, "a public name is not listed"


def test_the_version_is_that_of_the_project():
    assert softcurve.__version__ == importlib.metadata.version("softcurve")


def test_the_package_says_that_it_is_typed():
    assert (Path(softcurve.__file__).parent / "py.typed").is_file()


def test_the_mutants_change_formulas_that_are_there():
    """The mutation test takes many minutes and is no part of the suite; that it still changes what it says is."""
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        ast.parse(mutant.source())
        assert mutant.new != mutant.old, mutant.name
