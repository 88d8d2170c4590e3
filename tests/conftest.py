"""Every test runs with shapes checked, from one seed, on one thread; fresh processes serve what must go without.

The head's tests also run where only torch, triton and pytest are installed, without the checks of shapes.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from .placement import ON_CPU, place_tensors
from .spawned import run_program

ROOT = Path(__file__).resolve().parent.parent

INTERPRETS_TRITON = os.environ.get("TRITON_INTERPRET") == "1"

# Before the first import of softcurve: annotated functions and dataclasses then check shapes and dtypes. Not in Triton's
# interpreter: what runs there checks the values of calls whose shapes other processes check.
CHECKS_SHAPES = all(map(importlib.util.find_spec, ("jaxtyping", "beartype"))) and not INTERPRETS_TRITON
if CHECKS_SHAPES:
    from jaxtyping import config, install_import_hook

    install_import_hook("softcurve", "beartype.beartype")

# The same examples on every run, and no deadline: the machine may be busy with other things.
if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    settings.register_profile("softcurve", deadline=None, derandomize=True)
    settings.load_profile("softcurve")

place_tensors()


Run = Callable[[str], subprocess.CompletedProcess[str]]

# What torch does to itself when its inductor is first used, and nothing that a caller could change.
DEPRECATED = "`torch.jit.script_method` is deprecated"
INDUCTOR_WARNING = f"ignore:{DEPRECATED}:DeprecationWarning"


# Their tests share a fixture that takes seconds to make, so that one worker runs all of them (make test).
SHARES_A_FIXTURE = {
    *("test_bad_input", "test_documentation", "test_examples", "test_explain", "test_explain_browser"),
    *("test_fit_processes", "test_fit_torchrun", "test_tiny_lm"),
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Send the tests of a file that share a fixture to one worker: xdist's own groups have no effect in pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFixture(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            stem = Path(nodeid.partition("::")[0]).stem
            return stem if stem in SHARES_A_FIXTURE else nodeid

    return ByFixture(config, log)


@pytest.fixture(autouse=True)
def reproducible() -> None:
    """Each test starts from the same random numbers, on one thread, whichever worker runs it."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=INTERPRETS_TRITON)
def language_patched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare Triton's interpreter a third of its time.

    It replaces the functions of triton.language at a launch, and looks for what to replace again whenever a kernel calls
    another function of its module, where there is nothing left.
    """
    from triton.runtime.interpreter import InterpretedFunction

    call_it = InterpretedFunction.__call__

    def call(function: Any, *arguments: Any, **named: Any) -> Any:
        if function.fn.__module__.startswith("softcurve."):
            return function.rewrite()(*arguments, **named)
        return call_it(function, *arguments, **named)

    monkeypatch.setattr(InterpretedFunction, "__call__", call)


@pytest.fixture
def without_shape_checks() -> Iterator[None]:
    """For tests of thousands of small calls, which the checks would double; other tests make the same calls checked."""
    if CHECKS_SHAPES:
        config.update("jaxtyping_disable", True)
    yield
    if CHECKS_SHAPES:
        config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def run_python() -> Run:
    """Run code in a fresh interpreter at the repository's root, without the import hook, warnings as errors.

    For what the hook's wrappers disturb (``torch.compile``) and what only a fresh process shows (imports).
    A failure of the code is a failure of the test and shows the code's standard error.
    """

    def run(code: str) -> subprocess.CompletedProcess[str]:
        # A driver's warnings are its own, and so are those of Triton's interpreter.
        strict = ON_CPU and not INTERPRETS_TRITON
        warnings = ["-W", "error", "-W", INDUCTOR_WARNING] if strict else []
        command = [sys.executable, *warnings, "-c", code]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode != 0:
            pytest.fail(f"exit code {done.returncode}:\n{done.stdout}{done.stderr}", pytrace=False)
        return done

    return run


@pytest.fixture(scope="session")
def run_forked(run_python: Run) -> Run:
    """Run code as ``run_python`` does, but in a fork of a process that has imported torch, softcurve and dynamo."""
    if not ON_CPU:
        return run_python

    def run(code: str) -> subprocess.CompletedProcess[str]:
        done = run_program("-c", code, timeout=300, ignored=[DEPRECATED])
        if done.returncode != 0:
            pytest.fail(f"exit code {done.returncode}:\n{done.stdout}{done.stderr}", pytrace=False)
        return done

    return run
