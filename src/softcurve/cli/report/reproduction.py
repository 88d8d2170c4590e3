"""What repeats a fit: the command line and the versions of the packages that compute it."""

from __future__ import annotations

import platform
import shlex
from dataclasses import fields
from importlib.metadata import version

import softcurve
from softcurve.cli.options import FitOptions

WITHOUT_EFFECT = "checkpoint", "checkpoint_every", "timeout"  # a checkpoint would end the fit at once
PACKAGES = ("torch", "numpy", "scipy", "scikit-learn")


def command_line(options: FitOptions) -> str:
    """Return the command with the data and with every option that matters and is not at its default."""
    words = ["softcurve", "fit", options.data]
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name in ("data", *WITHOUT_EFFECT) or value == field.default:
            continue
        if field.name == "fit_intercept":
            words.append("--no-intercept")
        else:
            words.append(f"--{field.name.replace('_', '-')}")
            words += [] if value is True else [str(value)]
    return shlex.join(words)


def versions() -> dict[str, str]:
    """Return the versions by the names of the packages."""
    packages = {name: version(name) for name in PACKAGES}
    return {"softcurve": softcurve.__version__, "Python": platform.python_version()} | packages
