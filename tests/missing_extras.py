"""Run by test_extras.py: each call in a fork that cannot import one package; its exit code and standard error, as JSON."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import rlcompleter
import runpy
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec

import torch

import softcurve


class Blocked:
    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def expression(code: str) -> None:
    data = [(torch.eye(20)[:2], torch.tensor([0, 1]))]
    matrix = softcurve.curvature.GGN(torch.nn.Identity(), torch.nn.Linear(20, 30), data)
    try:
        eval(code, {"softcurve": softcurve, "matrix": matrix})
    except ImportError as error:
        sys.exit(f"ImportError: {error}")


def completion() -> None:
    importlib.reload(softcurve)
    names: dict[str, object] = {}
    exec("from softcurve import *", names)
    find = rlcompleter.Completer({"softcurve": softcurve}).complete
    offered = itertools.takewhile(bool, (find("softcurve.", i) for i in itertools.count()))
    sys.exit(f"{'nn' in names} {any(name.startswith('softcurve.Softmax') for name in offered)}")


def module(*arguments: str) -> None:
    sys.argv = ["softcurve", *arguments]
    runpy.run_module("softcurve", run_name="__main__")


def script(*arguments: str) -> None:
    sys.argv = ["softcurve", *arguments]
    importlib.import_module("softcurve.cli.main").main()


def without(package: str, call: Callable[..., None], *arguments: str) -> tuple[int, str]:
    read, write = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.dup2(write, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.meta_path.insert(0, Blocked(package))  # type: ignore[arg-type]
        code = 0
        try:
            call(*arguments)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
            if isinstance(error.code, str):
                os.write(2, error.code.encode())
        except BaseException as error:
            os.write(2, repr(error).encode())
            code = 70
        sys.stderr.flush()
        os._exit(code)
    os.close(write)
    with os.fdopen(read) as stream:
        said = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


CALLS: dict[str, Callable[..., None]] = {
    "completion": completion,
    "expression": expression,
    "module": module,
    "script": script,
}

if __name__ == "__main__":
    for package, call, *arguments in json.loads(sys.argv[1]):
        sys.stdout.write(json.dumps(without(package, CALLS[call], *arguments)) + "\n")
