"""The curvature over 2, 3 and 4 processes is that of one."""

from __future__ import annotations

import pytest

from . import process_cases

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("count", [2, 3, 4])
def test_curvature_over_processes_is_that_of_one(count):
    found = process_cases.run("sharded_curvature", count)
    assert len(found) > 200
    assert not process_cases.wrong(found)


def test_models_in_wrappers_for_processes():
    found = process_cases.run("parallel_curvature", 2)
    assert len(found) > 40
    assert not process_cases.wrong(found)
