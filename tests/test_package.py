"""The package as a whole: what an import loads, which names are public, which room stands on which floor."""

from __future__ import annotations

import ast
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import jaxtyping
import pytest
import torch

import softcurve
from softcurve import reference

SOURCE = Path(__file__).resolve().parent.parent / "src" / "softcurve"
FILES = sorted(SOURCE.rglob("*.py"))

# From the ground up. Rooms on one floor do not know each other. The package itself (its public names) stands
# on the rooms that it re-exports, and below those that use the library as anybody would.
FLOORS = (
    {"array_types"},
    {"checks", "extras", "reference", "processes", "records", "typing", "warn"},
    {"divergences"},
    {"softmax"},
    {"targets"},
    {"objective"},
    {"autograd"},
    {"head"},
    {"functional"},
    {"posed"},
    {"linear"},
    {"nn", "chain"},
    {"curvature"},
    {"__init__"},
    {"fit"},
    {"app"},
    {"__main__"},
)
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}

OF_FIT = {"scipy", "sklearn", "safetensors", "pyarrow", "pandas"}
OF_APP = {"typer", "rich", "matplotlib", "jinja2", "latex2mathml"}


def room_of(file: Path) -> str:
    return file.relative_to(SOURCE).with_suffix("").parts[0]


def absolute(statement: ast.ImportFrom, file: Path) -> str:
    """The dotted name that ``from … import`` imports from, its leading dots resolved."""
    if statement.level == 0:
        return statement.module or ""
    package = file.relative_to(SOURCE.parent).parts[: -statement.level]
    return ".".join([*package, *([statement.module] if statement.module else [])])


def imported_rooms(file: Path) -> Iterator[str]:
    """The rooms that a file imports from, wherever in the file; ``__init__`` for a public name."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = absolute(node, file)
            rooms = [alias.name for alias in node.names] if module == "softcurve" else []
            modules = [f"softcurve.{room}" if room in FLOOR else "softcurve" for room in rooms] or [module]
        else:
            continue
        for module in modules:
            package, _, rest = module.partition(".")
            if package == "softcurve":
                yield rest.partition(".")[0] or "__init__"


def test_an_import_loads_nothing_optional(run_python):
    code = f"import sys, softcurve; print(*sorted({OF_FIT | OF_APP!r} & set(sys.modules)))"
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


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_a_room_imports_only_from_floors_below(file):
    room = room_of(file)
    assert room in FLOOR, f"give the room {room!r} a floor in this test"
    if room == "__init__":
        return
    above = {other for other in imported_rooms(file) if other != room and FLOOR[other] >= FLOOR[room]}
    assert not above, f"{room} imports from {sorted(above)}, which stand no lower"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_nothing_unpickles(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    unpicklers = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not unpicklers & {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] not in unpicklers
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called != "torch.load"
            assert not called.endswith("read_pickle")
            if called in {"np.load", "numpy.load"}:
                assert "allow_pickle=False" in [ast.unparse(keyword) for keyword in node.keywords]


# Two shapes that broadcast, and so pass without a word wherever nobody checks the annotation "*rows classes".
def test_shapes_are_checked_under_the_tests():
    with pytest.raises(jaxtyping.TypeCheckError):
        reference.cross_entropy(torch.full((2, 3), 1 / 3), torch.full((1, 3), 1 / 3))


def test_shapes_are_not_checked_in_a_process_of_its_own(run_python):
    run_python(
        "import torch; from softcurve import reference\n"
        "reference.cross_entropy(torch.full((2, 3), 1 / 3), torch.full((1, 3), 1 / 3))"
    )
