"""Fits by several processes: the result of one; what ends or hangs ends all, with one message and a state to go on from."""

from __future__ import annotations

import json
import math

import pytest

from .fit_process_cases import CASES, prepare
from .spawned import start, wait

SIZES = (2, 3, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    prepare(folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    return {}


@pytest.fixture(scope="module", params=SIZES)
def together(request, folder):
    """What each of so many processes has found, by case."""
    ended = wait(start(request.param, "-m", "tests.fit_process_cases", str(folder)))
    assert ended.codes == [0] * request.param, "\n".join(ended.errors)
    return [json.loads((folder / f"{request.param}-{rank}.json").read_text()) for rank in range(request.param)]


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("name", CASES)
def test_several_processes_find_what_one_finds(name, together, folder, alone):
    if name not in alone:
        alone[name] = json.loads(json.dumps(CASES[name](folder, None)))
    for found in together:
        if name == "spectra" and not found[name]:
            continue  # the first process has it
        assert_same(found[name], alone[name], name)


def assert_same(found, expected, place):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key in expected:
            assert_same(found[key], expected[key], f"{place}: {key}")
    elif isinstance(expected, list) and expected and isinstance(expected[0], float):
        scale = max(abs(entry) for entry in expected)
        assert len(found) == len(expected), place
        worst = max(abs(one - other) for one, other in zip(found, expected, strict=True))
        assert worst <= 1e-8 * scale, f"{place}: {worst / scale:.1e}"
    elif isinstance(expected, list):
        assert len(found) == len(expected), f"{place}: {found} and {expected}"
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{place}[{number}]")
    elif isinstance(expected, float):
        assert math.isclose(found, expected, rel_tol=1e-8, abs_tol=1e-12), f"{place}: {found} and {expected}"
    else:
        assert found == expected, f"{place}: {found} and {expected}"
