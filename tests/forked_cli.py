"""Run by test_cli_faults.py: each command line in a fork of one process, so that torch is imported once.

The forks end as any interpreter does, and have the standard streams that the case names: a path, or None for a closed one.
"""

from __future__ import annotations

import gc
import json
import os
import sys

import softcurve
from softcurve.cli.main import main

if __name__ == "__main__":
    for name in softcurve.__all__:  # which load torch
        getattr(softcurve, name)
    gc.freeze()  # A fork that ends does not free what has been imported, which would take most of its time.
    for arguments, *streams in json.loads(sys.argv[1]):
        if child := os.fork():
            sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
            sys.stdout.flush()
            continue
        files = [None if path is None else os.open(path, os.O_WRONLY | os.O_CREAT) for path in streams]
        for number, file in enumerate(files, 1):
            os.close(number) if file is None else os.dup2(file, number)
        sys.argv = ["softcurve", *arguments]
        main()
        break
