"""Fits of a softmax head by softcurve and by scikit-learn's solvers, to the same largest entry of the gradient.

:func:`bench.problems.judge` recomputes the gradient in float64 from the returned coefficients. Each fit runs in its own
process, which loads the data first and is killed after a time limit.
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
from scipy.sparse import csr_array, issparse, load_npz, save_npz

from bench.measure import ProcessFailure, extra_peak_of, in_fresh_process, median_ratio
from bench.problems import PROBLEMS, Array, Shape, judge
from bench.tables import Record, cell, print_head, print_row

OURS = "softcurve"
CONTESTANTS = (OURS, "lbfgs", "newton-cg", "newton-cholesky")
DTYPES = ("float64", "float32")
SMALL = Shape(300, 12, 5)
REPEATS, LIMIT = 3, 600.0
# The largest entry of the gradient that a fit must reach, and how often the tolerance of a solver is divided by three.
WANTED, TRIES = 1e-6, 7
SPARSE_ROWS = ".rows.npz"  # the suffix of the file with the rows of a sparse problem
# Seconds of a first run above which it is repeated at most once.
LONG = 60.0
# Bytes of newton-cholesky's Hessian above which it is not run, because solving with it needs copies.
LARGEST_HESSIAN = 8e9


def print_fits(
    names: Sequence[str], dtypes: Sequence[str], contestants: Sequence[str], *, repeats: int, limit: float, small: bool
) -> list[Record]:
    """Print seconds, iterations, extra memory and the final gradient of each solver on each problem."""
    print(f"\nfits of a softmax head until no entry of the gradient exceeds {WANTED:g}\n")
    for name in names:
        print(
            f"{name}: {PROBLEMS[name].what}, {SMALL if small else PROBLEMS[name].shape}, λ = {PROBLEMS[name].penalty:g}"
        )
    print(
        "\nShapes are (samples, features, classes). tol is the first of 1e-6, 3.3e-7, 1.1e-7, ... whose fit reaches\n"
        "this gradient, recomputed in float64 from the returned coefficients. Seconds are medians of the runs, ratios\n"
        f"medians of the ratios of all rounds; a solver that took more than {LONG:g} s ran at most twice. Extra\n"
        "memory excludes the data. The last column is the objective minus the smallest for its problem and dtype.\n",
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
    """Return one record for each solver; their runs are interleaved."""
    problem = PROBLEMS[name]
    rows, target = problem.make(SMALL if small else problem.shape)
    with TemporaryDirectory(prefix="softcurve-bench-") as folder:
        path = Path(folder) / "problem.npz"
        if issparse(rows):
            save_npz(path.with_suffix(SPARSE_ROWS), rows.astype(dtype))
            np.savez(path, target=target)
        else:
            np.savez(path, rows=rows.astype(dtype), target=target)
        classes = target.shape[1] if target.ndim == 2 else int(target.max()) + 1
        shape = Shape(*rows.shape, classes)
        fit = partial(_in_process, path, problem.penalty, limit)
        records: list[Record] = [{"problem": name, "shape": shape, "dtype": dtype, "who": who} for who in contestants]
        for record in records:
            reason = _unfit(record["who"], shape, dtype)
            record |= {"note": reason} if reason else _first_within(partial(fit, record["who"]))
        # The fits that determined the tolerances are the first round.
        for turn in range(1, repeats):
            for record in records:
                if "note" not in record and (turn == 1 or record["seconds"][0] <= LONG):
                    again = fit(record["who"], record["tol"])
                    if "note" not in again:
                        record["seconds"].append(again["seconds"])
                        record["gradient"] = max(record["gradient"], again["gradient"])
    return _compared(records)


def _compared(records: list[Record]) -> list[Record]:
    """Add the medians, the ratios to softcurve, and the excess over the smallest objective."""
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
    """Return the reason for not running a solver, or None."""
    hessian = (shape.classes * (shape.width + 1)) ** 2 * np.dtype(dtype).itemsize
    if who == "newton-cholesky" and hessian > LARGEST_HESSIAN:
        return f"skipped: a Hessian matrix of {hessian / 1e9:.0f} GB"
    return None


def _first_within(fit: partial[Record]) -> Record:
    """Decrease the tolerance until a fit reaches the gradient; if none does, return the closest with a note."""
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
        # If a smaller tolerance changes nothing, the fit was stopped by rounding.
        if last and found["iterations"] == last["iterations"] and found["gradient"] > 0.9 * last["gradient"]:
            break
        last, tol = found, tol / 3
    assert closest is not None
    return {**closest, "note": f"not reached (gradient {closest['gradient']:.1e})"}


def _in_process(path: Path, penalty: float, limit: float, who: str, tol: float) -> Record:
    """Return the record that :func:`print_fit` prints in a fresh process, or a note on why it failed."""
    call = f"fits.print_fit({str(path)!r}, {who!r}, {penalty!r}, {tol!r}, {limit!r})"
    try:
        found: Record = json.loads(in_fresh_process(f"from bench import fits\n{call}\n").splitlines()[-1])
    except ProcessFailure as failure:
        if failure.code == -signal.SIGALRM:
            return {"note": f"> {limit:g} s"}
        if failure.code == -signal.SIGKILL:
            return {"note": "killed, probably out of memory"}
        return {"note": f"failed: {failure.errors.strip().splitlines()[-1]}"}
    return found


# --- in the process of a fit ------------------------------------------------------------------------------------------


def print_fit(path: str, who: str, penalty: float, tol: float, limit: float) -> None:
    """Load the data, warm up, measure a fit, evaluate it, and print one line of JSON."""
    sparse = Path(path).with_suffix(SPARSE_ROWS)
    with np.load(path) as arrays:
        rows, target = load_npz(sparse) if sparse.exists() else arrays["rows"], arrays["target"]
    given = _given(who, rows, target)
    few = np.random.default_rng(0).normal(size=(60, 4)).astype(rows.dtype)
    few = csr_array(few) if issparse(rows) else few
    seconds = 0.0

    def run() -> None:
        nonlocal seconds
        start = time.perf_counter()
        estimator.fit(*given)
        seconds = time.perf_counter() - start

    _estimator(who, C=1.0, tol=1e-2).fit(few, np.arange(60) % 3)
    estimator = _estimator(who, C=1 / (penalty * len(target)), tol=tol)
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        # The signal has no handler, so it ends the process even during a matrix product.
        signal.setitimer(signal.ITIMER_REAL, limit)
        extra = extra_peak_of(run)
        signal.setitimer(signal.ITIMER_REAL, 0)
    found = {"seconds": seconds, "iterations": int(estimator.n_iter_.max()), "extra_mb": extra}
    found |= judge(rows, target, penalty, estimator.coef_, estimator.intercept_)
    found["by_lbfgs"] = any("lbfgs instead" in str(warning.message) for warning in raised)
    print(json.dumps(found))


def _estimator(who: str, *, C: float, tol: float) -> Any:
    """Return the estimator with enough iterations for the tolerance."""
    if who == OURS:
        from softcurve import SoftmaxRegression

        return SoftmaxRegression(C=C, tol=tol, max_iter=1000)
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(solver=who, C=C, tol=tol, max_iter=1_000_000)


def _given(who: str, rows: Any, target: Array) -> tuple[Any, ...]:
    """Return the arguments of ``fit``; for scikit-learn a distribution becomes weighted copies with each label."""
    if who == OURS or target.ndim == 1:
        return rows, target
    classes = target.shape[1]
    return np.repeat(rows, classes, axis=0), np.tile(np.arange(classes), len(rows)), target.ravel()
