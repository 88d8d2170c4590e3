"""Heads whose classes lie over 3 and 4 processes equal the head of one."""

from __future__ import annotations

import pytest

from . import process_cases

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("count", [3, 4])
def test_sharded_classes_are_the_classes_of_one_process(count):
    found = process_cases.run("sharded_heads", count)
    assert len(found) > 200
    assert not process_cases.wrong(found)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_groups_of_classes_are_merged_over_processes(count):
    found = process_cases.run("sharded_class_map", count)
    assert len(found) > 200
    assert any("Hessian product of 1 sides" in case for case in found)
    assert (count == 4) == any("FSDP2" in case for case in found)
    assert not process_cases.wrong(found)


@pytest.mark.parametrize("count", [2, 4])
def test_beside_fsdp_and_tensor_parallel_plans_and_what_is_sent(count):
    found = process_cases.run("sharded_training", count)
    assert any("FSDP2:" in case for case in found)
    assert any("traffic js" in case for case in found)
    assert any("operations of 4 columns" in case for case in found)
    assert not process_cases.wrong(found)
