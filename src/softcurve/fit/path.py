"""Fits of one head at several strengths of the penalty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from softcurve.fit import DataError
from softcurve.fit.data.source import Source, share_of
from softcurve.fit.fitting import SAME, Fit, coordinates_of, fit_head, is_number, own_part
from softcurve.fit.group import require_same

__all__ = ["regularisation_path"]


def regularisation_path(source: Source, Cs: Sequence[float], **options: Any) -> tuple[Fit, ...]:
    """Return ``tuple(fit_head(source, C=C, **options) for C in Cs)``, each fit started from that of the next smaller C.

    The fits are in the order of ``Cs``, and share the coordinates. A ``start`` is that of the smallest C. Raises
    DataError for a C that is no inverse strength, and wherever ``fit_head`` does.
    """
    if not len(Cs) or not all(is_number(C) and C > 0 for C in Cs):
        raise DataError(f"Cs must be positive numbers, or inf for no penalty, and at least one; got {list(Cs)}")
    if options.get("checkpoint") is not None:
        raise DataError("checkpoint must be left out of a path: it holds one fit; give it to a fit of its own")
    if (group := options.pop("group", None)) is not None:
        compared = {name: options.get(name) for name in ("start", "coordinates")}
        source, options["sample_weight"] = own_part(source, options.get("sample_weight"), group, **compared)
    shared: dict[str, Any] = {name: options[name] for name in ("fit_intercept", "memory_budget") if name in options}
    require_same(share_of(source).group, {"Cs": list(Cs)} | shared, SAME)
    if options.get("coordinates") is None:
        options["coordinates"] = coordinates_of(source, sample_weight=options.get("sample_weight"), **shared)
    fits: dict[int, Fit] = {}
    for index in sorted(range(len(Cs)), key=lambda index: Cs[index]):
        fits[index] = fit = fit_head(source, C=Cs[index], **options)
        options["start"] = fit.weight, fit.bias
    return tuple(fits[index] for index in range(len(Cs)))
