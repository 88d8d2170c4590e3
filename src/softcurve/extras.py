"""The optional dependencies: which extra brings each, and the sentence for one that is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

# The extra in pyproject.toml that brings a module; "app" includes "fit".
EXTRA_OF = {
    "scipy": "fit",
    "sklearn": "fit",
    "safetensors": "fit",
    "pyarrow": "fit",
    "typer": "app",
    "rich": "app",
    "matplotlib": "app",
    "jinja2": "app",
    "latex2mathml": "app",
}
DISTRIBUTION_OF = {"sklearn": "scikit-learn"}


@contextmanager
def needed(purpose: str, extra: str | None = None) -> Iterator[None]:
    """Raise ImportError with one sentence where an import within the block does not find an optional dependency.

    ``extra`` is what ``purpose`` needs; it is named also for a module that is not in ``EXTRA_OF``, because an optional
    dependency may miss a dependency of its own. Without it, errors of other modules are passed on, and so are those of
    modules of this package, which are defects.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "softcurve").partition(".")[0]
        extra = EXTRA_OF.get(package, extra)
        if extra is None or package == "softcurve":
            raise
        raise ImportError(
            f"{purpose} needs {DISTRIBUTION_OF.get(package, package)}, which is not installed and comes with the extra "
            f"{extra!r}: run pip install -e '.[{extra}]' in the source directory of softcurve",
            name=error.name,
        ) from error


def installed(*modules: str) -> bool:
    """Whether all the modules can be found; none is imported."""
    try:
        return all(find_spec(module) is not None for module in modules)
    except (ImportError, ValueError):  # of a finder that refuses, of an entry None in sys.modules
        return False
