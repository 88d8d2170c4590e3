"""The optional dependencies: the extra that installs each, and the error for a missing one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

# The extra in pyproject.toml that installs a module; "app" includes "fit".
EXTRA_OF = dict.fromkeys(("scipy", "sklearn", "safetensors", "pyarrow"), "fit")
EXTRA_OF |= dict.fromkeys(("typer", "rich", "matplotlib", "jinja2", "ziamath"), "app")
DISTRIBUTION_OF = {"sklearn": "scikit-learn"}


@contextmanager
def needed(purpose: str, extra: str | None = None) -> Iterator[None]:
    """Raise an ImportError that names the extra if an import in the block does not find an optional dependency.

    ``extra`` is the extra that ``purpose`` needs. It is also named for a module that is not in ``EXTRA_OF``, because an
    optional dependency may lack a dependency of its own. Without ``extra``, errors about other modules propagate, as do
    errors about modules of this package, which are bugs.
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
    """Return whether all modules can be found, without importing them."""
    try:
        return all(find_spec(module) is not None for module in modules)
    except (ImportError, ValueError):  # a finder rejects the import, or sys.modules contains None
        return False
