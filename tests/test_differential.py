"""One question, one answer: the routes to a loss against each other and against closed forms, on drawn problems.

``SOFTCURVE_DIFFERENTIAL`` multiplies the number of examples, for a search that is deeper than the suite's.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from . import differential_processes
from .differential import Problem
from .differential_routes import disagreements
from .differential_strategies import faulty, problems

DEPTH = int(os.environ.get("SOFTCURVE_DIFFERENTIAL", "1"))
SLOW_DRAWS = [HealthCheck.too_slow, HealthCheck.data_too_large]

pytestmark = pytest.mark.usefixtures("without_shape_checks")


def told(p: Problem, wrong: list[str]) -> str:
    """The call and what each route makes of it."""
    return "\n  ".join([repr(p), *wrong])


@settings(max_examples=250 * DEPTH, suppress_health_check=SLOW_DRAWS)
@given(problems())
def test_every_route_has_the_value_and_the_gradients_of_the_closed_form(p):
    wrong = disagreements(p)
    assert not wrong, told(p, wrong)


@settings(max_examples=150 * DEPTH, suppress_health_check=SLOW_DRAWS)
@given(faulty())
def test_every_route_refuses_the_same_arguments_by_the_same_error(p):
    wrong = disagreements(p)
    assert not wrong, told(p, wrong)


def test_a_head_sharded_on_classes_is_the_head_of_one_process():
    drawn: list[Problem] = []
    for strategy, count in ((problems(), 50), (faulty(), 20)):

        @settings(max_examples=count * DEPTH, phases=[Phase.generate], suppress_health_check=SLOW_DRAWS)
        @given(strategy)
        def draw(p):
            drawn.append(p)

        draw()
    wrong = differential_processes.run(drawn)
    assert not wrong, "\n".join(told(p, lines) for p, lines in wrong)
