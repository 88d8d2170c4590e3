"""What a type checker and a completion see of the package."""

from __future__ import annotations

import ast
import inspect
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import softcurve
from softcurve import chain, curvature, functional, nn, reference, typing
from softcurve.losses.divergences import LOSS_NAMES
from softcurve.losses.reduction import REDUCTIONS

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tests" / "typed_user_script.py"


@pytest.mark.slow  # mypy reads torch, unless `make lint` has left its cache
def test_mypy_accepts_a_users_script_and_the_readme(tmp_path):
    pytest.importorskip("mypy")
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(blocks) >= 4
    readme = tmp_path / "readme_blocks.py"
    readme.write_text("\n".join(blocks), encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", str(SCRIPT), str(readme)]
    environment = os.environ | {"MYPYPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_users_script_runs():
    runpy.run_path(str(SCRIPT))


@pytest.mark.parametrize(
    "name",
    [
        "linear_cross_entropy",
        "linear_kl_divergence",
        "linear_js_divergence",
        "linear_divergence",
        "linear_distillation",
    ],
)
def test_overloads_offer_the_options_of_the_signature(name):
    tree = ast.parse((ROOT / "src" / "softcurve" / "linear.py").read_text(encoding="utf-8"))
    fields = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name.endswith("Options"):
            inherited = [option for base in node.bases for option in fields.get(ast.unparse(base), [])]
            own = [(each.target.id, ast.unparse(each.annotation)) for each in node.body if hasattr(each, "target")]
            fields[node.name] = [*inherited, *own]
    *overloads, whole = [node.args for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    kinds = []
    for overload in overloads:
        named = [(argument.arg, ast.unparse(argument.annotation)) for argument in overload.kwonlyargs]
        kinds.append(dict(named).pop("return_stats"))
        options = fields[ast.unparse(overload.kwarg.annotation).removeprefix("Unpack[").removesuffix("]")]
        offered = {option: kind.replace(" *positions", "") for option, kind in [*named, *options]}
        taken = {argument.arg: ast.unparse(argument.annotation) for argument in whole.kwonlyargs}
        taken = {option: kind.replace(" *positions", "") for option, kind in taken.items()}
        assert offered | {"return_stats": "bool"} == taken
        assert [argument.arg for argument in overload.args] == [argument.arg for argument in whole.args]
    assert kinds == ["Literal[False]", "Literal[True]", "bool"]


def test_literals_are_what_is_accepted():
    assert get_args(typing.ReductionKind) == REDUCTIONS
    assert get_args(typing.ChainLoss) == chain.LOSSES
    assert get_args(typing.FitLoss) == LOSS_NAMES


def test_completion_offers_the_public_names():
    assert {name for name in dir(softcurve) if not name.startswith("__")} == set(softcurve.__all__)
    assert {"SoftmaxRegression", "SoftmaxRegressionCV"} <= set(dir(softcurve))
    for module in (curvature, functional, nn, reference, typing):
        offered = {name: getattr(module, name) for name in dir(module)}
        assert set(offered) == set(module.__all__)
        assert not [name for name, value in offered.items() if inspect.ismodule(value)]
        made_here = {
            name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__
        }
        public = {name for name in made_here if not name.startswith("_")}
        assert public - set(module.__all__) <= {"require_class_weight", "require_finite_against", "weighted"}
