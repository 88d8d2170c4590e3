"""Fits of a softmax head: ours beside scikit-learn's solvers, all run until the same gradient is small.

A fit's own claim is not believed: :func:`bench.problems.judge` takes the gradient again, in float64, from the returned
coefficients. Each fit has a process of its own, which loads the rows first and which a time limit can end.
"""

from __future__ import annotations

import json
import signal
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from bench.measure import ProcessFailure, extra_peak_of, in_fresh_process, median_ratio
from bench.problems import PROBLEMS, Array, Shape, judge
from bench.tables import Record, cell, print_head, print_row

OURS = "softcurve"
CONTESTANTS = (OURS, "lbfgs", "newton-cg", "newton-cholesky")
DTYPES = ("float64", "float32")
SMALL = Shape(300, 12, 5)
REPEATS, LIMIT = 3, 600.0
# The largest entry of the gradient that ends a fit, and how often a solver may be asked for a third of the tolerance.
WANTED, TRIES = 1e-6, 7
# Seconds of a first run beyond which there is one more at most.
LONG = 60.0
# Bytes of newton-cholesky's Hessian matrix beyond which it is not tried, for the solution needs copies of it.
LARGEST_HESSIAN = 8e9


def print_fits(
    names: Sequence[str], dtypes: Sequence[str], contestants: Sequence[str], *, repeats: int, limit: float, small: bool
) -> list[Record]:
    """Seconds, iterations and extra memory of each contestant on each problem, and what was reached."""
    print(f"\nfits of a softmax head, until no entry of the gradient exceeds {WANTED:g}\n")
    for name in names:
        print(
            f"{name}: {PROBLEMS[name].what}, {SMALL if small else PROBLEMS[name].shape}, λ = {PROBLEMS[name].penalty:g}"
        )
    print(
        "\nShapes are (rows, features, classes). tol is the first of 1e-6, 3.3e-7, 1.1e-7, ... whose fit has the\n"
        "wanted gradient, which is taken from the returned coefficients in float64. Seconds are the median of the\n"
        f"runs, the ratio that of the rounds' own; who took more than {LONG:g} s was run twice at most. Extra memory\n"
        "is beyond the rows. The last column is the objective minus the least of the same problem and dtype.\n",
        flush=True,
    )
    print_head(
        *("problem", "dtype", "who", "s", "runs", f"{OURS} / it"),
        *("tol", "gradient", "iterations", "extra MB", "above the best"),
    )
    records = []
    for name in names:
        for dtype in dtypes:
            for record in figures(name, dtype, contestants, repeats=repeats, limit=limit, small=small):
                _print_fit(record)
                records.append(record)
    return records


def _print_fit(record: Record) -> None:
    print_row(
        record["problem"],
        record["dtype"],
        record["who"] + (", ended by lbfgs" if record.get("by_lbfgs") else ""),
        record.get("note") or f"{record['s']:.2f}",
        cell(record, "runs", "d"),
        cell(record, "ratio", ".2f"),
        cell(record, "tol", ".1e"),
        cell(record, "gradient", ".1e"),
        cell(record, "iterations", "d"),
        cell(record, "extra_mb", ".0f"),
        cell(record, "above_best", ".1e"),
    )


def figures(
    name: str, dtype: str, contestants: Sequence[str], *, repeats: int, limit: float, small: bool = False
) -> list[Record]:
    """A record for each contestant, who take turns."""
    problem = PROBLEMS[name]
    rows, target = problem.make(SMALL if small else problem.shape)
    with TemporaryDirectory(prefix="softcurve-bench-") as folder:
        path = Path(folder) / "problem.npz"
        np.savez(path, rows=rows.astype(dtype), target=target)
        classes = target.shape[1] if target.ndim == 2 else int(target.max()) + 1
        shape = Shape(len(rows), rows.shape[1], classes)
        fit = partial(_in_process, path, problem.penalty, limit)
        records: list[Record] = [{"problem": name, "shape": shape, "dtype": dtype, "who": who} for who in contestants]
        for record in records:
            reason = _unfit(record["who"], shape, dtype)
            record |= {"note": reason} if reason else _first_within(partial(fit, record["who"]))
        # The fits that found the tolerances were the first round.
        for turn in range(1, repeats):
            for record in records:
                if "note" not in record and (turn == 1 or record["seconds"][0] <= LONG):
                    again = fit(record["who"], record["tol"])
                    if "note" not in again:
                        record["seconds"].append(again["seconds"])
                        record["gradient"] = max(record["gradient"], again["gradient"])
    return _compared(records)


def _compared(records: list[Record]) -> list[Record]:
    """Medians, ratios to ours, and what is left above the least objective."""
    least = min((record["objective"] for record in records if "objective" in record), default=0.0)
    seconds = {record["who"]: record["seconds"] for record in records if "note" not in record}
    for record in records:
        if "objective" in record:
            record["above_best"] = record["objective"] - least
        if "note" in record:
            continue
        record |= {"s": median(record["seconds"]), "runs": len(record["seconds"])}
        if OURS in seconds and record["who"] != OURS:
            rounds = min(len(seconds[OURS]), len(record["seconds"]))
            record["ratio"] = median_ratio(seconds[OURS][:rounds], record["seconds"][:rounds])
    return records


def _unfit(who: str, shape: Shape, dtype: str) -> str | None:
    """Why a contestant is not tried at all."""
    hessian = (shape.classes * (shape.width + 1)) ** 2 * np.dtype(dtype).itemsize
    if who == "newton-cholesky" and hessian > LARGEST_HESSIAN:
        return f"skipped: a Hessian matrix of {hessian / 1e9:.0f} GB"
    return None


def _first_within(fit: partial[Record]) -> Record:
    """The first fit whose gradient is wanted, at ever smaller tolerances; or the closest one, with a note."""
    tol = WANTED
    closest: Record | None = None
    last: Record | None = None
    for _ in range(TRIES):
        found = fit(tol)
        if "note" in found:
            if closest is None:
                return found
            return {
                **closest,
                "note": f"not reached (gradient {closest['gradient']:.1e}); at {tol:.1e} {found['note']}",
            }
        found |= {"tol": tol, "seconds": [found["seconds"]]}
        if found["gradient"] <= WANTED:
            return found
        if closest is None or found["gradient"] < closest["gradient"]:
            closest = found
        # Whoever does the same for less tolerance was not stopped by it, but by rounding.
        if last and found["iterations"] == last["iterations"] and found["gradient"] > 0.9 * last["gradient"]:
            break
        last, tol = found, tol / 3
    assert closest is not None
    return {**closest, "note": f"not reached (gradient {closest['gradient']:.1e})"}


def _in_process(path: Path, penalty: float, limit: float, who: str, tol: float) -> Record:
    """What :func:`print_fit` prints in a fresh process, or a note why it does not."""
    call = f"fits.print_fit({str(path)!r}, {who!r}, {penalty!r}, {tol!r}, {limit!r})"
    try:
        found: Record = json.loads(in_fresh_process(f"from bench import fits\n{call}\n").splitlines()[-1])
    except ProcessFailure as failure:
        if failure.code == -signal.SIGALRM:
            return {"note": f"> {limit:g} s"}
        if failure.code == -signal.SIGKILL:
            return {"note": "killed from outside, probably for want of memory"}
        return {"note": f"failed: {failure.errors.strip().splitlines()[-1]}"}
    return found


# --- in the process of a fit ------------------------------------------------------------------------------------------


def print_fit(path: str, who: str, penalty: float, tol: float, limit: float) -> None:
    """Load, warm up, fit (the time and the memory of this alone are taken), judge; a line of JSON."""
    with np.load(path) as arrays:
        rows, target = arrays["rows"], arrays["target"]
    given = _given(who, rows, target)
    few = np.random.default_rng(0).normal(size=(60, 4)).astype(rows.dtype)
    seconds = 0.0

    def run() -> None:
        nonlocal seconds
        start = time.perf_counter()
        estimator.fit(*given)
        seconds = time.perf_counter() - start

    _estimator(who, C=1.0, tol=1e-2).fit(few, np.arange(60) % 3)
    estimator = _estimator(who, C=1 / (penalty * len(rows)), tol=tol)
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        # Nothing handles the signal, so that it ends the process in the midst of any matrix product.
        signal.setitimer(signal.ITIMER_REAL, limit)
        extra = extra_peak_of(run)
        signal.setitimer(signal.ITIMER_REAL, 0)
    found = {"seconds": seconds, "iterations": int(estimator.n_iter_.max()), "extra_mb": extra}
    found |= judge(rows, target, penalty, estimator.coef_, estimator.intercept_)
    found["by_lbfgs"] = any("lbfgs instead" in str(warning.message) for warning in raised)
    print(json.dumps(found))


def _estimator(who: str, *, C: float, tol: float) -> Any:
    """Told to take as many iterations as the tolerance needs."""
    if who == OURS:
        from softcurve import SoftmaxRegression

        return SoftmaxRegression(C=C, tol=tol, max_iter=1000)
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(solver=who, C=C, tol=tol, max_iter=1_000_000)


def _given(who: str, rows: Array, target: Array) -> tuple[Array, ...]:
    """What ``fit`` is called with: scikit-learn takes a distribution as a row's copies, weighted, with each label."""
    if who == OURS or target.ndim == 1:
        return rows, target
    classes = target.shape[1]
    return np.repeat(rows, classes, axis=0), np.tile(np.arange(classes), len(rows)), target.ravel()
