"""The package as a whole: what an import loads, which names are public, and that mutants aim at its text."""

from __future__ import annotations

import ast
import importlib.metadata
from pathlib import Path
from types import ModuleType

import pytest

import softcurve

from .mutants import MUTANTS

SOURCE = Path(__file__).resolve().parent.parent / "src" / "softcurve"
FILES = sorted(SOURCE.rglob("*.py"))

OF_FIT = {"scipy", "sklearn", "safetensors", "pyarrow", "pandas"}
OF_APP = {"typer", "rich", "matplotlib", "jinja2", "ziamath"}
OF_INTEGRATIONS = {"transformers", "trl", "lightning", "softcurve.integrations"}


def test_an_import_loads_nothing_and_the_names_nothing_optional(run_python):
    code = f"""
import sys, softcurve
assert not hasattr(softcurve, "__wrapped__")
print(*sorted({{"torch", "numpy"}} & set(sys.modules)))
assert not hasattr(softcurve, "no_such_name")
names = set(softcurve.__all__) - {{"SoftmaxRegression", "SoftmaxRegressionCV"}}
assert all(getattr(softcurve, name) is getattr(softcurve, name) for name in names)
print(*sorted({OF_FIT | OF_APP | OF_INTEGRATIONS | {"torch._dynamo"}!r} & set(sys.modules)))
"""
    assert run_python(code).stdout.split() == []


def test_a_name_that_is_first_used_in_compiled_code_needs_no_graph_break(run_python):
    code = """
import warnings, torch, softcurve
warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)  # dynamo's own doing
e, W, y = torch.randn(3, 2), torch.randn(5, 2), torch.tensor([0, 4, 2])
loss = torch.compile(lambda e: softcurve.linear_cross_entropy(e, W, y), backend="aot_eager", fullgraph=True)
torch.testing.assert_close(loss(e), torch.nn.functional.cross_entropy(e @ W.mT, y))
"""
    run_python(code)


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["fit", "--help"], []])
def test_the_command_line_helps_and_completes_without_torch(run_python, arguments):
    """Torch takes seconds to load. Without arguments, the shell asks for the completion of ``softcurve fit --lo``."""
    environment = (
        {}
        if arguments
        else {"_SOFTCURVE_COMPLETE": "complete_bash", "COMP_WORDS": "softcurve fit --lo", "COMP_CWORD": "2"}
    )
    code = f"""
import os, sys
sys.argv = ["softcurve", *{arguments!r}]
os.environ.update({environment!r})
from softcurve.cli.main import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
assert not {{"torch", "numpy", "rich"}} & set(sys.modules), set(sys.modules)
"""
    assert (
        softcurve.__version__ if arguments == ["--version"] else "--loss" if not arguments else "Usage"
    ) in run_python(code).stdout


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
