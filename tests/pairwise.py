"""Few settings of many factors in which any two levels of any two factors meet."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def pairwise(
    factors: Mapping[str, Sequence[Any]], possible: Callable[[str, Any, str, Any], bool] = lambda *_: True
) -> list[dict[str, Any]]:
    """Choose settings greedily, and the same ones every time, until every possible pair of levels has met.

    ``possible(name, level, other_name, other_level)`` says whether two levels go together, for names in the order of
    ``factors``. Any two levels that do must go together with some level of every other factor.
    """
    levels = [(name, n) for name, values in factors.items() for n in range(len(values))]
    partners: dict[Any, set[Any]] = {level: set() for level in levels}  # that the level can be together with
    for one, other in itertools.combinations(levels, 2):
        (name, m), (other_name, n) = one, other
        if name != other_name and possible(name, factors[name][m], other_name, factors[other_name][n]):
            partners[one].add(other)
            partners[other].add(one)
    unmet = {level: set(others) for level, others in partners.items()}
    settings: list[dict[str, Any]] = []
    for level in levels:
        while unmet[level]:
            chosen = {level, min(unmet[level], key=levels.index)}
            for name, values in factors.items():
                if all(name != taken for taken, _ in chosen):
                    turn = len(settings) % len(values)
                    candidates = [(name, n) for n in (*range(turn, len(values)), *range(turn))]
                    candidates = [one for one in candidates if chosen <= partners[one]]
                    chosen.add(max(candidates, key=lambda one: len(chosen & unmet[one])))
            for one in chosen:
                unmet[one] -= chosen
            settings.append({name: factors[name][n] for name, n in sorted(chosen, key=levels.index)})
    return settings
