"""A missing optional dependency ends in one sentence with the extra that brings it and a command that works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from softcurve.extras import DISTRIBUTION_OF, EXTRA_OF, needed

ROOT = Path(__file__).resolve().parent.parent

# The package that is missing, how softcurve is called, and what the sentence says needs it.
CALLS = [
    (("sklearn", "expression", "softcurve.SoftmaxRegression"), "softcurve.SoftmaxRegression"),
    (("scipy", "expression", "softcurve.SoftmaxRegressionCV"), "softcurve.SoftmaxRegressionCV"),
    (("safetensors", "expression", "softcurve.SoftmaxRegression"), "softcurve.SoftmaxRegression"),
    (("scipy", "expression", "matrix.to_scipy()"), "to_scipy"),
    (("scipy", "expression", "matrix.eigsh(1, method='lobpcg')"), "eigsh"),
    (("matplotlib", "expression", "matrix.spectral_density().plot()"), "plot"),
    (("typer", "module"), "the command line"),
    (("typer", "script", "fit", "--help"), "the command line"),
    (("rich", "module", "fit"), "this command"),
    (("rich", "script", "fit"), "this command"),
    (("safetensors", "module", "predict", "head.safetensors", "rows.parquet"), "this command"),
    (("pyarrow", "script", "fit", "rows.parquet"), "this command"),
    (("matplotlib", "module", "fit"), "this command"),
    (("jinja2", "module", "fit"), "this command"),
    (("ziamath", "module", "fit"), "this command"),
]
COMPLETIONS = [("sklearn", "completion"), ("safetensors", "completion"), ("typer", "completion")]


def sentence(package: str, purpose: str) -> str:
    extra = EXTRA_OF[package]
    return (
        f"{purpose} needs {DISTRIBUTION_OF.get(package, package)}, which is not installed and comes with the extra "
        f"'{extra}': run pip install -e '.[{extra}]' in the source directory of softcurve"
    )


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the calls share one import of torch by forking")
def test_a_missing_dependency_is_named_with_its_extra_and_a_command(tmp_path):
    (tmp_path / "rows.parquet").touch()
    calls = [*(call for call, _ in CALLS), *COMPLETIONS]
    command = [sys.executable, str(ROOT / "tests" / "missing_extras.py"), json.dumps(calls)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    expected: list[list[object]] = []
    for (package, call, *_), purpose in CALLS:
        said = sentence(package, purpose)
        expected.append([1, f"ImportError: {said}"] if call == "expression" else [2, f"softcurve: {said}\n"])
    # A completion works all the same, and offers the estimators where they can be used.
    expected += [[1, f"True {package == 'typer'}"] for package, _ in COMPLETIONS]
    assert found == expected


def test_the_extras_are_those_of_the_project():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    declared = {package: extra for extra in ("fit", "app") for package in extras[extra] if package != "softcurve[fit]"}
    assert declared == {DISTRIBUTION_OF.get(module, module): extra for module, extra in EXTRA_OF.items()}
    assert "softcurve[fit]" in extras["app"]


def test_other_missing_modules_are_no_matter_of_extras():
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'of_a_user'$"), needed("this"):
        import of_a_user
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'softcurve.nowhere'$"), needed("this", "fit"):
        import softcurve.nowhere  # noqa: F401
    with pytest.raises(ImportError, match=r"^this needs of_a_user, .* extra 'fit'"), needed("this", "fit"):
        import of_a_user  # noqa: F401
