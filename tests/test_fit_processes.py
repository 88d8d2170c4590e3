"""Fits by several processes: the result of one; what ends or hangs ends all, with one message and a state to go on from."""

from __future__ import annotations

import json
import math
import re

import pytest

from .fit_process_cases import CASES, prepare
from .spawned import start, wait

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_shape_checks")]

# Two take every case, since a message of more processes costs several times as much; three and four take those in which
# the number of processes counts.
OF_SIZE = {
    2: tuple(CASES),
    3: (
        *(
            "labels, mixed",
            "labels, rounded",
            "lists",
            "JS",
            "weights",
            "negligible rows",
            "negligible rows left out",
            "two rows",
            "classes' blocks of few rows",
        ),
        *(
            "three rows, streamed",
            "held out",
            "confused pairs",
            "spectra",
            "standard errors",
            "npz shards",
            "npy shards",
            "own rows alone",
        ),
        *("bytes", "gone on with", "asked to stop", "refused: unlike", "refused: full disk", "refused: zero"),
    ),
    4: ("two rows", "three rows, streamed", "wide", "parquet shards", "refused: not finite"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    prepare(folder)
    return folder


@pytest.fixture(scope="module")
def found_by(folder):
    """A function that gives what each of so many processes has found, by case; they are started once."""
    found = {}

    def of(size):
        if size not in found:
            ended = wait(start(size, "-m", "tests.fit_process_cases", str(folder), *OF_SIZE[size]))
            assert ended.codes == [0] * size, "\n".join(ended.errors)
            found[size] = [json.loads((folder / f"{size}-{rank}.json").read_text()) for rank in range(size)]
        return found[size]

    return of


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, names in OF_SIZE.items() for name in names])
def test_several_processes_find_what_one_finds(size, name, found_by, folder):
    alone = json.loads(json.dumps(CASES[name](folder, None)))
    for found in found_by(size):
        if name == "spectra" and not found[name]:
            continue  # the first process has it
        assert_same(found[name], alone, name)


def assert_same(found, expected, place):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key in expected:
            assert_same(found[key], expected[key], f"{place}: {key}")
    elif isinstance(expected, list) and expected and all(isinstance(entry, float) for entry in expected):
        scale = max(abs(entry) for entry in expected)
        assert len(found) == len(expected), place
        worst = max(abs(one - other) for one, other in zip(found, expected, strict=True))
        # The products of a step are summed in float32, whose rounding depends on how the rows are divided: the points on
        # the way differ by it, and the minimum, found by gradients in float64, does not.
        bound = 1e-5 if place.endswith(": objectives") else 1e-8
        assert worst <= bound * scale, f"{place}: {worst / scale:.1e}"
    elif isinstance(expected, list):
        assert len(found) == len(expected), f"{place}: {found} and {expected}"
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{place}[{number}]")
    elif isinstance(expected, float):
        assert math.isclose(found, expected, rel_tol=1e-8, abs_tol=1e-12), f"{place}: {found} and {expected}"
    elif isinstance(expected, int) and re.search(r"steps\[\d+\]\[1\]$", place):
        # Rounding decides which product of a step is its last.
        assert abs(found - expected) <= 1, f"{place}: {found} and {expected}"
    else:
        assert found == expected, f"{place}: {found} and {expected}"
