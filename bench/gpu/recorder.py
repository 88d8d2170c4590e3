"""A pytest plugin that selects tests, records the start and end of each, and exits after a failure of the device.

``pytest -p bench.gpu.recorder --record PATH`` appends one line of JSON for the collection and for each start and end.
After an error of the device (an assertion in a kernel, an access out of bounds), every later call in the process fails.
The process therefore exits with the code ``DEVICE_LOST``, and its parent starts another one.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

DEVICE_LOST = 86
MESSAGE = 400  # maximum number of characters of a failure
Value = tuple[str, str]  # a parameter's name, and the text of its value in the test's name


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that select the tests of one process."""
    group = parser.getgroup("recorder")
    group.addoption("--record", type=Path, help="file to which a line is appended for each start and end")
    group.addoption("--share", default="0/1", metavar="I/N", help="run the tests with index I modulo N")
    group.addoption("--done", type=Path, help="file with the names of tests to skip, one per line")
    group.addoption("--every", action="store_true", help="run all tests instead of a pairwise selection")
    group.addoption("--at-most", type=int, metavar="N", help="maximum number of tests per function")


def pytest_configure(config: pytest.Config) -> None:
    """Register the recorder if ``--record`` is given."""
    if config.option.record is not None:
        config.pluginmanager.register(Recorder(config.option), "recorder of starts and ends")


class Recorder:
    """Writes and flushes one line per event, so that the lines survive the end of the process."""

    def __init__(self, options: Any) -> None:
        self.options = options
        self.file = options.record.open("a", encoding="utf-8")
        self.seconds = 0.0

    def write(self, **line: Any) -> None:
        """Write one line."""
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Select the tests, record the selection, and then deselect those that have already run."""
        chosen = items if self.options.every else pairwise(items)
        if self.options.at_most:
            chosen = first_of_each(chosen, self.options.at_most)
        own, shares = map(int, self.options.share.split("/"))
        chosen = chosen[own::shares]
        self.write(event="collected", tests=[item.nodeid for item in chosen])
        done = set(self.options.done.read_text(encoding="utf-8").splitlines()) if self.options.done else set()
        kept = [item for item in chosen if item.nodeid not in done]
        left = set(items) - set(kept)
        config.hook.pytest_deselected(items=[item for item in items if item in left])
        items[:] = kept

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Record the start, which identifies a test that does not end."""
        self.write(event="start", test=nodeid)
        self.outcome, self.message, self.seconds = "passed", "", 0.0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the outcome of the first failed phase of a test."""
        self.seconds += report.duration
        if report.failed and self.outcome != "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            text = crash.message if crash is not None else str(report.longrepr)
            self.outcome, self.message = "failed", text[:MESSAGE]
        elif report.skipped and self.outcome == "passed":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.outcome, self.message = "skipped", str(reason)[:MESSAGE]

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Record the end of a test, and exit if the device has failed."""
        self.write(event="end", test=nodeid, outcome=self.outcome, seconds=round(self.seconds, 3), message=self.message)
        if self.outcome == "failed" and device_lost():
            self.write(event="lost", test=nodeid)
            os._exit(DEVICE_LOST)


def device_lost() -> bool:
    """Return whether the CUDA device of this process is in an error state."""
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


# --- selection of tests ----------------------------------------------------------------------------------------------


def pairwise(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Select the tests of each function that :func:`covering` chooses, in their order."""
    kept = set()
    for group in by_function(items).values():
        kept.update(group[n].nodeid for n in covering([values_of(item) for item in group]))
    return [item for item in items if item.nodeid in kept]


def first_of_each(items: Sequence[pytest.Item], most: int) -> list[pytest.Item]:
    """Select at most ``most`` tests of each function, evenly spaced."""
    kept = set()
    for group in by_function(items).values():
        step = max(1, len(group) // most)
        kept.update(item.nodeid for item in group[::step][:most])
    return [item for item in items if item.nodeid in kept]


def by_function(items: Sequence[pytest.Item]) -> dict[str, list[pytest.Item]]:
    """Group the tests by file and function."""
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        groups.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return groups


def values_of(item: pytest.Item) -> list[Value]:
    """Return the parameters of a test and the text of their values."""
    call = getattr(item, "callspec", None)
    return [] if call is None else [(name, repr(value)) for name, value in sorted(call.params.items())]


def covering(settings: Sequence[Sequence[Value]]) -> list[int]:
    """Return indices of settings that cover all pairs of values, or all values if there are at most two parameters.

    The selection is greedy: each step takes the first setting with the largest number of new pairs.
    """
    size = 2 if max(map(len, settings), default=0) > 2 else 1
    sets = [frozenset(itertools.combinations(setting, size)) for setting in settings]
    missing = frozenset().union(*sets)
    if not missing:
        return list(range(len(settings)))
    chosen = []
    while missing:
        best = max(range(len(sets)), key=lambda n: len(sets[n] & missing))
        chosen.append(best)
        missing -= sets[best]
    return sorted(chosen)
