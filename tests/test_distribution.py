"""What the source archive contains, and that the files about the project agree with the package."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path

import softcurve

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# What someone who has the archive alone needs in order to install, test, lint, measure, document and cite the library.
NEEDED = {
    "Makefile", "constraints.txt", "pyproject.toml", "README.md", "LICENSE", "CITATION.cff", "SECURITY.md",
    "CHANGELOG.md", "CONTRIBUTING.md", ".ci/run", ".pre-commit-config.yaml", "bench/__main__.py", "bench/RESULTS.md",
    "docs/conf.py", "docs/benchmarks.md", "docs/pictures/scaling_classes.svg", "examples/README.md",
    "src/softcurve/py.typed", "tests/conftest.py",
}  # fmt: skip


def archived() -> set[str]:
    """Return the files of the source archive: by hatchling where it is installed, and otherwise by its patterns."""
    if importlib.util.find_spec("hatchling"):
        from hatchling.builders.sdist import SdistBuilder

        return {file.distribution_path for file in SdistBuilder(str(ROOT)).recurse_included_files()}
    patterns = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert all(re.fullmatch(r"/[\w./-]+", pattern) for pattern in patterns), "this test understands only plain paths"
    chosen = [ROOT / pattern[1:] for pattern in patterns]
    assert not [path for path in chosen if not path.exists()]
    return {
        file.relative_to(ROOT).as_posix()
        for path in chosen
        for file in (path.rglob("*") if path.is_dir() else [path])
        if file.is_file()
    }


def test_the_source_archive_has_what_is_needed():
    assert archived() >= NEEDED


def test_the_citation_is_of_this_version():
    lines = (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()
    assert f"version: {softcurve.__version__}" in lines
    assert f"license: {PROJECT['project']['license']}" in lines


def test_the_readme_names_the_extras_that_there_are():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE))
    assert named == set(PROJECT["project"]["optional-dependencies"])
