"""One question, one answer: the routes to a loss against each other and against closed forms, on drawn problems.

``SOFTCURVE_DIFFERENTIAL`` multiplies the number of examples, for a search that is deeper than the suite's.
"""

from __future__ import annotations

import os
from random import Random

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from . import differential_processes
from .differential import Problem
from .differential_routes import disagreements, simplest
from .differential_strategies import faulty, seeded, sound

DEPTH = int(os.environ.get("SOFTCURVE_DIFFERENTIAL", "1"))
# A seed has no simpler one: a problem is made simpler by its options instead.
DRAWS = {"phases": [Phase.generate], "suppress_health_check": [HealthCheck.too_slow]}

pytestmark = pytest.mark.usefixtures("without_shape_checks")


def require_agreement(p: Problem) -> None:
    if disagreements(p):
        least = simplest(p)
        pytest.fail("\n  ".join([repr(least), *disagreements(least), f"drawn as {p!r}"]))


@settings(max_examples=250 * DEPTH, **DRAWS)
@given(seeded(sound))
def test_every_route_has_the_value_and_the_gradients_of_the_closed_form(p):
    require_agreement(p)


@settings(max_examples=200 * DEPTH, **DRAWS)
@given(seeded(faulty))
def test_every_route_refuses_the_same_arguments_by_the_same_error(p):
    require_agreement(p)


def test_a_head_sharded_on_classes_is_the_head_of_one_process():
    drawn = [sound(Random(n)) for n in range(60 * DEPTH)] + [faulty(Random(n)) for n in range(40 * DEPTH)]
    drawn = [p for p in drawn if not p.row_masks]  # no head makes such logits
    wrong = differential_processes.run(drawn)
    assert not wrong, "\n".join("\n  ".join([repr(p), *lines]) for p, lines in wrong)
