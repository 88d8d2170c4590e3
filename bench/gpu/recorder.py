"""A plugin of pytest: chooses few of the tests, writes down each as it starts and ends, and leaves a failed device.

``pytest -p bench.gpu.recorder --record PATH`` appends a line of JSON for what is collected and for each start and end.
After an error of the device itself (an assertion in a kernel, an access out of bounds) every later call in the process
fails as well, so the process ends with the code ``DEVICE_LOST`` and whoever started it goes on in another.
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
MESSAGE = 400  # characters of a failure that are kept
Value = tuple[str, str]  # a parameter's name, and the text of its value in the test's name


def pytest_addoption(parser: pytest.Parser) -> None:
    """What one process runs of a file."""
    group = parser.getgroup("recorder")
    group.addoption("--record", type=Path, help="the file that a line is appended to for each start and end")
    group.addoption("--share", default="0/1", metavar="I/N", help="the tests whose number leaves I when divided by N")
    group.addoption("--done", type=Path, help="a file of names of tests, one a line, that are left out")
    group.addoption("--every", action="store_true", help="all values with each other, and not pairwise")
    group.addoption("--at-most", type=int, metavar="N", help="so many of each test function")


def pytest_configure(config: pytest.Config) -> None:
    """Nothing is recorded unless it is asked for."""
    if config.option.record is not None:
        config.pluginmanager.register(Recorder(config.option), "recorder of starts and ends")


class Recorder:
    """Lines are flushed: whatever ends the process, they are there."""

    def __init__(self, options: Any) -> None:
        self.options = options
        self.file = options.record.open("a", encoding="utf-8")
        self.seconds = 0.0

    def write(self, **line: Any) -> None:
        """One line."""
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Choose, and say how many there are to run, before those are left out that have been run."""
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
        """Whoever watches sees which test it is that does not end."""
        self.write(event="start", test=nodeid)
        self.outcome, self.message, self.seconds = "passed", "", 0.0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of its three phases the first that failed is told."""
        self.seconds += report.duration
        if report.failed and self.outcome != "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            text = crash.message if crash is not None else str(report.longrepr)
            self.outcome, self.message = "failed", text[:MESSAGE]
        elif report.skipped and self.outcome == "passed":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.outcome, self.message = "skipped", str(reason)[:MESSAGE]

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """The end of a test, and of the process where the device has failed."""
        self.write(event="end", test=nodeid, outcome=self.outcome, seconds=round(self.seconds, 3), message=self.message)
        if self.outcome == "failed" and device_lost():
            self.write(event="lost", test=nodeid)
            os._exit(DEVICE_LOST)


def device_lost() -> bool:
    """Whether a CUDA device that this process uses answers nothing but errors."""
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


# --- which tests -----------------------------------------------------------------------------------------------------


def pairwise(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Of each function so many tests that what :func:`covering` wants is met, in their order."""
    kept = set()
    for group in by_function(items).values():
        kept.update(group[n].nodeid for n in covering([values_of(item) for item in group]))
    return [item for item in items if item.nodeid in kept]


def first_of_each(items: Sequence[pytest.Item], most: int) -> list[pytest.Item]:
    """So many tests of each function, spread over its list."""
    kept = set()
    for group in by_function(items).values():
        step = max(1, len(group) // most)
        kept.update(item.nodeid for item in group[::step][:most])
    return [item for item in items if item.nodeid in kept]


def by_function(items: Sequence[pytest.Item]) -> dict[str, list[pytest.Item]]:
    """The tests of each function of each file."""
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        groups.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return groups


def values_of(item: pytest.Item) -> list[Value]:
    """The parameters, by the text of each value; what is parametrized in one go has its values together."""
    call = getattr(item, "callspec", None)
    return [] if call is None else [(name, repr(value)) for name, value in sorted(call.params.items())]


def covering(settings: Sequence[Sequence[Value]]) -> list[int]:
    """Numbers of settings in which all meet that meet in any: two values of three or more parameters, else one value.

    Greedily, the setting with most that is new first; of equals, the first.
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
