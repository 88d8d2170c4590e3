"""Problems whose options make sense together, and those with one fault, drawn from a seed.

Hypothesis draws the seed. Were it to draw each option, five of six examples would be mutations of another one: it copies
what it drew for one option into all others of the same strategy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from random import Random
from typing import Any

import hypothesis.strategies as st

from .differential import CROSS_ENTROPY, LISTS, Problem
from .differential_faults import faults_of

KINDS = ("indices", "float", "probabilities", "logits", "bucket", "renormalize", "teacher")
DIVERGENCES = ("forward", "reverse", "js")
LEADING = ((4,), (3,), (1,), (2, 3), (9,), (2, 1, 2), (), (0,), (2, 0))
CLASSES = (5, 2, 7, 19, 40, 1)
MANY = 150  # classes in several tiles of the least budget
MANY_ROWS = 2500  # too many for a sum of weights in half precision
FEW = 2  # classes beside them


def _mostly(draw: Random, plain: Any, *others: Any) -> Any:
    """Return the plain value in two draws of three."""
    return draw.choice(others) if draw.random() < 1 / 3 else plain


def sound(draw: Random) -> Problem:
    """Draw a problem without a fault."""
    chosen: dict[str, Any] = {}
    loss = chosen["loss"] = draw.choice([CROSS_ENTROPY] * 3 + list(DIVERGENCES))
    kinds = KINDS if loss == CROSS_ENTROPY else KINDS[2:]
    kind = chosen["kind"] = draw.choice([k for k in kinds if (loss, k) != ("reverse", "renormalize")])
    if loss == "js":
        betas = [0.5, 0.25, 0.0, 0.9] + ([1.0] if kind != "renormalize" else [])
        chosen["beta"] = draw.choice(betas)
    chosen["reduction"] = draw.choice(["mean", "none", "sum", "batchmean"])
    chosen["dtype"] = draw.choice(["float64", "float32", "bfloat16", "float16"])
    chosen["head_dtype"] = _mostly(draw, None, "float32", "bfloat16")
    chosen["leading"] = draw.choice(LEADING)
    chosen["classes"] = _mostly(draw, draw.choice(CLASSES), MANY)
    if loss == CROSS_ENTROPY and kind in ("indices", "float"):
        chosen["positions"] = _mostly(draw, (), (2,), (2, 1), (1,), (33,))
        if chosen["positions"]:
            chosen["leading"] = draw.choice([(4,), (1,), (0,)])
    _draw_head(draw, chosen)
    _draw_target(draw, chosen)
    _draw_options(draw, chosen)
    if kind in ("indices", "renormalize") and not (chosen.get("dead_features") or chosen.get("anywhere")):
        chosen["row_masks"] = _mostly(draw, False, False, False, True)
    chosen["budget"] = _mostly(draw, "default", "least", "tiles")
    if chosen["classes"] <= FEW and chosen["leading"] == (9,):  # more rows than half precision counts to
        chosen |= {"leading": (MANY_ROWS,), "budget": "default"}
    chosen["numbers"] = _mostly(draw, "python", "numpy", "tensor")
    chosen["wanted"] = _mostly(draw, "all", "features", "head", "target", "none")
    chosen["strided"] = _mostly(draw, False, True)
    chosen["stats"] = _mostly(draw, False, True)
    chosen["seed"] = draw.randrange(2**16)
    return Problem(**chosen)


def _draw_head(draw: Random, chosen: dict[str, Any]) -> None:
    chosen["confident"] = _mostly(draw, False, True)
    chosen["bias"] = _mostly(draw, "none", "plain", "masked", "last", "one")
    if chosen["loss"] == CROSS_ENTROPY:
        chosen["softcap"] = _mostly(draw, None, 5.0)
    else:
        chosen["softcap"] = _mostly(draw, None, 3.0)
    if chosen["softcap"] is None:  # which is not invariant to an offset
        chosen["offset"] = _mostly(draw, 0.0, 8192.0, -1e4)
    chosen["sample_weight"] = _mostly(draw, "none", "some", "some", "zero")
    if chosen["sample_weight"] != "none":
        chosen["padding"] = _mostly(draw, "none", "nan", "zeros", "repeated")
        chosen["dead_features"] = _mostly(draw, False, True)
        chosen["weight_dtype"] = _mostly(draw, None, "float16", "float32", "float64")


def _draw_target(draw: Random, chosen: dict[str, Any]) -> None:
    kind = chosen["kind"]
    if kind == "indices":
        chosen["ignored"] = _mostly(draw, "none", "some", "some", "all")
        chosen["ignore_index"] = _mostly(draw, None, 0, -1, 1000)
        chosen["index_dtype"] = _mostly(draw, "int64", "int32")
        return
    chosen["target_dtype"] = _mostly(draw, None, "float32", "bfloat16", "float64")
    if chosen["bias"] in ("masked", "last", "one"):
        chosen["anywhere"] = _mostly(draw, False, True)
    reverse = chosen["loss"] == "reverse" or chosen.get("beta") == 1
    if not (kind == "bucket" and reverse):  # where a tail of rounding errors would be divided by
        chosen["target_zeros"] = _mostly(draw, False, True)
    if kind in LISTS:
        chosen["listed"] = draw.choice(["few", "live", "all"])
        if kind == "bucket" and chosen["listed"] == "all":  # the classes left out would be a tail of rounding errors
            chosen.pop("target_zeros", None)
    if kind in ("logits", "teacher"):
        chosen["target_offset"] = _mostly(draw, 0.0, 8192.0, -1e4)
        if chosen["target_offset"] and kind == "logits":
            chosen["target_dtype"] = "float64" if chosen["dtype"] == "float64" else "float32"


def _draw_options(draw: Random, chosen: dict[str, Any]) -> None:
    bucket = chosen["kind"] == "bucket"
    chosen["base"] = _mostly(draw, math.e, 2.0)
    if chosen["loss"] != CROSS_ENTROPY:
        chosen["temperature"] = 1.0 if bucket else _mostly(draw, 1.0, 2.0, 0.5, 0.7)
        return
    chosen["temperature"] = _mostly(draw, 1.0, 2.0, 0.5, 0.7)
    chosen["label_smoothing"] = _mostly(draw, 0.0, 0.125, 1.0)
    chosen["z_loss"] = _mostly(draw, 0.0, 0.25)
    if not bucket:
        chosen["class_weight"] = _mostly(draw, "none", "some", "some", "zero")
        if chosen["class_weight"] != "none":
            chosen["weight_dtype"] = _mostly(draw, None, "float16", "float32", "float64")
    if chosen["kind"] == "indices" and chosen["leading"] and not chosen.get("positions"):
        chosen["shift"] = _mostly(draw, 0, 1, 2, 20)


def faulty(draw: Random) -> Problem:
    """Draw a problem with one fault."""
    p = sound(draw)
    calm = dataclasses.replace(
        p, padding="none", dead_features=False, anywhere=False, budget="default", stats=False, row_masks=False
    )
    return dataclasses.replace(calm, fault=draw.choice(faults_of(calm)))


def seeded(make: Callable[[Random], Problem]) -> st.SearchStrategy[Problem]:
    """Return a strategy that draws the seed of ``make``."""
    return st.integers(0, 2**32 - 1).map(lambda seed: make(Random(seed)))
