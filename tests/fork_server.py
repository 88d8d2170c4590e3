"""A process that has imported torch and softcurve once and starts each program of the tests as a fork of itself.

``python -m tests.fork_server N`` reads requests from the Unix socket with the file descriptor N until it is closed. A
program is named as on Python's command line: ``-m module``, ``-c code`` or a path, followed by its arguments. A fork has
the import hook of no test, ends as any interpreter does, and is killed by any signal. It differs from a new interpreter
in that modules are already imported and that all forks have the same hash seed.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import socket
import sys
import warnings
from contextlib import suppress
from typing import Any

import softcurve

# What most programs import, directly or through torch's lazy imports. None of these starts a thread.
PRELOADED = (
    *("torch", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"),
    *("sklearn.datasets", "sklearn.model_selection", "matplotlib.figure", "matplotlib.backends.backend_agg"),
    *("softcurve.cli.main", "tests.cases"),
)
PRELOADED_WITH_TRITON = ("torch._dynamo", "torch._dynamo.testing")


def serve(requests: socket.socket) -> dict[str, Any] | None:
    """Answer requests until the socket is closed. Return, in a fork, what it has to run, and otherwise ``None``."""
    while True:
        text, files, _, _ = socket.recv_fds(requests, 1 << 20, 2)
        if not text:
            return None
        request = json.loads(text)
        if "wait" in request:
            pid, status = os.waitpid(request["wait"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif (answer := os.fork()) == 0:
            for number, file in enumerate(files, 1):
                os.dup2(file, number)
                os.close(file)
            requests.close()
            return request
        for file in files:
            os.close(file)
        requests.send(json.dumps(answer).encode())


def run(request: dict[str, Any]) -> None:
    """Run a program as Python would, in the environment and the folder of the request."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    for message in request["ignored"]:
        warnings.filterwarnings("ignore", message)
    first, *arguments = request["program"]
    if first == "-c":
        sys.argv = ["-c", *arguments[1:]]
        main = sys.modules["__main__"] = type(sys)("__main__")
        exec(compile(arguments[0], "<string>", "exec"), main.__dict__)
    elif first == "-m":
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *arguments]
        sys.path[0] = os.path.dirname(first)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    for name in PRELOADED:
        with suppress(ModuleNotFoundError):  # of an extra that is not installed
            importlib.import_module(name)
    for name in softcurve.__all__:  # which load their modules
        getattr(softcurve, name)
    # An interpreter that ends does not free what is frozen, which spares each fork a second. Triton's bindings are not
    # frozen, because they print a message for each of their types that was not freed.
    gc.freeze()
    for name in PRELOADED_WITH_TRITON:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lack the other threads"
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        request = serve(requests)
    if request is not None:
        run(request)
