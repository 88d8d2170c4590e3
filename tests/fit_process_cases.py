"""Fits that one process makes alone and several make together; run as a module it is one of several.

A case is given a folder, and the group or ``None``; it returns numbers and texts, which must be the same.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import scipy.sparse
import torch
import torch.distributed as dist

from softcurve import TopK
from softcurve.fit import DataError
from softcurve.fit.coefficients import short_summary
from softcurve.fit.data import dataset
from softcurve.fit.data.files.arrays import FileRows
from softcurve.fit.data.opening import open_source
from softcurve.fit.data.row_source import own_share, to_source
from softcurve.fit.data.source import is_sparse
from softcurve.fit.data.subset import Subset, shared, split_source
from softcurve.fit.diagnostics import diagnose
from softcurve.fit.fitting import fit_head, regularisation_path
from softcurve.fit.group import ALONE, Group, raised_by_all
from softcurve.fit.head_spectrum import curvature_spectrum
from softcurve.fit.solver import curvature
from softcurve.fit.solver.curvature import Curvature, negligible_rows
from softcurve.fit.solver.preconditioner import ClassBlocks

RNG = np.random.default_rng(0)
ROWS, CLASSES = 331, 4
X = RNG.normal(size=(ROWS, 6)) * np.array([1.0, 3.0, 0.3, 1.0, 10.0, 1.0]) + 5.0
LOGITS = (X - 5.0) @ RNG.normal(size=(6, CLASSES)) * 0.3 + RNG.gumbel(size=(ROWS, CLASSES))
LABELS = LOGITS.argmax(1)
SOFT = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
LISTS = TopK(*(part.flip(1) for part in reversed(torch.log_softmax(torch.tensor(LOGITS), 1).topk(2, 1))))
WEIGHTS = torch.tensor(RNG.choice([0.0, 0.5, 3.7], size=ROWS))
Case = Callable[[Path, dist.ProcessGroup | None], dict[str, object]]


def told(fit):
    return {
        "weight": fit.weight.flatten().tolist(),
        "bias": fit.bias.tolist(),
        "objective": fit.objective,
        "converged": fit.converged,
        "separated": fit.separated,
        "reason": fit.reason,
        "steps": [
            (step.iteration, step.products - before, step.damping)
            for step, before in zip(fit.history, (0, *(step.products for step in fit.history)), strict=False)
        ],
        "objectives": [step.objective for step in fit.history],
    }


def plain(*rows, **options) -> Case:
    return lambda folder, group: told(fit_head(to_source(*rows), group=group, **{"tol": 1e-9} | options))


def mixed(*rows, **options) -> Case:
    """Products in float32: as many steps, but the last digits may cost a product more."""

    def case(folder, group):
        found = plain(*rows, precision="mixed", **options)(folder, group)
        return found | {"steps": len(found["steps"]), "objectives": found["objectives"][-1]}

    return case


def rounded(folder, group):
    """Products in bfloat16, which end at the same head; and none where a process could not make them."""
    together = ALONE if group is None else Group(group)
    used, product, pays = [], Curvature.rounded_product, curvature.rounding_pays
    Curvature.rounded_product = lambda self, direction: used.append(1) or product(self, direction)
    try:
        curvature.rounding_pays = lambda rows, size, classes: True
        found = mixed(X, LABELS, C=30.0)(folder, group)
        every = len(used)
        curvature.rounding_pays = lambda rows, size, classes: together.size > 1 and together.first
        fit_head(to_source(X, LABELS), group=group, precision="mixed")
        found["used"] = [every > 0, len(used) - every]
    finally:
        curvature.rounding_pays, Curvature.rounded_product = pays, product
    return {name: found[name] for name in ("weight", "bias", "objective", "converged", "used")}


def of(source, group):
    return source if group is None else shared(source, Group(group))


def separable() -> tuple[np.ndarray, np.ndarray]:
    """Most rows become certain at once, and are left out of the products."""
    rng = np.random.default_rng(1)
    labels = rng.integers(5, size=600)
    return rng.normal(size=(600, 8)) + 40.0 * np.eye(8)[labels] * (rng.random((600, 1)) > 0.05), labels


def many_classes(width: int) -> tuple[np.ndarray, np.ndarray]:
    """Enough products for the classes' own blocks to pay, and more classes than a matrix of confusions has."""
    rng = np.random.default_rng(2)
    scales = np.logspace(0, 2, width)
    rows = rng.normal(size=(900, width)) * scales
    return rows, (rows @ (rng.normal(size=(width, 210)) / scales[:, None]) * 3).argmax(1)


def classes_blocks(width: int, *, factored: bool, **options) -> Case:
    def case(folder, group):
        rows, labels = many_classes(width)
        # Classes with equally many rows have equal eigenvalues, and of these rounding chooses the eigenvectors.
        weights = torch.tensor(np.random.default_rng(5).uniform(0.5, 1.5, len(rows)))
        made, make = [], ClassBlocks.__init__

        def noted(self, curvature, memory):
            make(self, curvature, memory)
            made.append(self.factored)

        ClassBlocks.__init__ = noted
        try:
            fit = fit_head(to_source(rows, labels), group=group, precision="float64", sample_weight=weights, **options)
        finally:
            ClassBlocks.__init__ = make
        assert made
        assert all(made) == factored
        return told(fit) | {"blocks": made}

    return case


def negligible(folder, group):
    """The rows that are left out, by number, and how many fits leave out in all processes."""
    together = ALONE if group is None else Group(group)
    curving, of_logits = torch.tensor(np.random.default_rng(6).lognormal(sigma=3, size=(2, 500)))
    curving[::7] = 0.0
    found = {}
    for most, share in ((0.0, 1.0), (0.1, 1.0), (50.0, 0.2), (1e9, 0.9), (1e9, 0.4)):
        first = own_share(500, together).first
        own = slice(first, first + own_share(500, together).rows)
        rows, count = negligible_rows(curving[own], most, of_logits[own], share, together)
        numbers = torch.cat(together.gathered(rows + own.start)).sort().values
        found[f"{most} {share}"] = [numbers.tolist(), count]
    return found


def left_out(folder, group):
    counts, choose = [], Curvature.leave_out_negligible_rows

    def noted(self):
        choose(self)
        own = torch.zeros(1) if self._left_out is None else self._left_out.sum().float()[None]
        counts.append(int(sum(self.group.gathered(own))))

    Curvature.leave_out_negligible_rows = noted
    try:
        # Rows without weight are the surest ones to be left out.
        weights = torch.arange(600).remainder(4).eq(0).double()
        found = told(fit_head(to_source(*separable()), tol=1e-9, group=group, sample_weight=weights))
    finally:
        Curvature.leave_out_negligible_rows = choose
    assert min(counts) >= 450
    return found | {"left out": counts}


def held_out(folder, group):
    train, held = split_source(of(to_source(X, SOFT), group), 0.3, seed=4)
    fit = fit_head(train, C=0.5, tol=1e-9)
    found = told(fit)
    for name, side in (("train", train), ("held", held)):
        scores = diagnose(side, fit.weight, fit.bias, "cross_entropy", hardest=9)
        calibration = scores.calibration
        found[name] = {
            "hardest": [asdict(row) for row in scores.hardest],
            "features": scores.hardest_features.tolist(),
            "bins": [calibration.counts.tolist(), calibration.error, calibration.accuracy.nan_to_num(-1.0).tolist()],
            "counts": [t.tolist() for t in (scores.support, scores.predicted, scores.correct, scores.matrix)],
            "means": [scores.rows, scores.loss, scores.accuracy, scores.kl, scores.entropy, scores.brier],
        }
    return found


def confused(folder, group):
    rows, labels = many_classes(10)
    source = of(to_source(rows, labels, classes=tuple(range(210))), group)
    weight = torch.tensor(np.random.default_rng(3).normal(size=(210, 10)))
    scores = diagnose(source, weight, torch.zeros(210).double(), "cross_entropy")
    return {"pairs": [asdict(pair) for pair in scores.confused], "accuracy": scores.accuracy}


def spectra(folder, group):
    found = {}
    for name, target in (("labels", LABELS), ("soft", SOFT), ("lists", LISTS)):
        source = of(to_source(X, target), group)
        there = curvature_spectrum(source, torch.ones(CLASSES, 6) * 0.1, torch.zeros(CLASSES), rows=100)
        if group is None or dist.get_rank(group) == 0:
            found[name] = [there.trace, there.rows, there.largest.tolist()]
    return found


def standard_errors(folder, group):
    found = {}
    for name, rows, target, C in (
        *(("labels", X, LABELS, 1.0), ("no penalty", X, LABELS, math.inf), ("soft", X, SOFT, 3.0)),
        *(("two rows", X[:2], np.array([0, 1]), 1.0), ("refused", X, LISTS, 1.0)),
    ):
        source = of(to_source(rows, target), group)
        fit = fit_head(source, C=C, tol=1e-8)
        summary = short_summary(source, fit, loss="cross_entropy", C=C, intercept=True, tol=1e-8, budget=None)
        found[name] = summary if isinstance(summary, str) else summary.standard_error.ravel().tolist()
    return found


def path(folder, group):
    fits = regularisation_path(
        to_source(X, LABELS), [1.0, 0.01, 30.0], tol=1e-9, sample_weight=WEIGHTS + 1.0, group=group
    )
    return {str(number): told(fit) for number, fit in enumerate(fits)}


def write_shards(folder: Path) -> None:
    """Shards of uneven lengths, of every format, in which rows of a process begin and end anywhere."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from safetensors.numpy import save_file

    for kind in ("npz", "safetensors", "parquet", "npy"):
        (folder / kind).mkdir()
    names = np.array(["ant", "bee", "cat", "dog"])
    for number, (first, last) in enumerate([(0, 50), (50, 51), (51, 300), (300, ROWS)]):
        rows, labels = X[first:last], LABELS[first:last]
        np.savez(folder / "npz" / f"{number}.npz", X=rows, y=SOFT[first:last])
        np.save(folder / "npy" / f"{number}.npy", np.asfortranarray(rows))
        save_file(
            {"features": rows.astype(np.float32), "target": labels}, folder / "safetensors" / f"{number}.safetensors"
        )
        table = pa.table({"features": pa.array(list(rows)), "target": names[labels]})
        pq.write_table(table, folder / "parquet" / f"{number}.parquet", row_group_size=40)
    np.save(folder / "target.npy", LABELS)
    np.save(folder / "lists.npy", X)
    bad = X.copy()
    bad[-3, 2] = np.nan
    np.save(folder / "bad.npy", bad)


def opened(kind: str, target: str | None = None) -> Case:
    def case(folder, group):
        together = ALONE if group is None else Group(group)
        source = open_source(str(folder / kind), None if target is None else folder / target, group=together)
        fit = fit_head(Subset(source, np.arange(ROWS) % 5 > 0), tol=1e-9)
        return told(fit) | {"classes": [str(name) for name in source.classes], "fingerprint": source.fingerprint}

    return case


def own_rows_alone(folder, group):
    """What is read of a file is read once by all processes together."""
    read: list[tuple[int, int]] = []
    read_rows, digest = FileRows.read, FileRows.digest

    def noted(self, bounds):
        read.append((bounds[0], bounds[-1]))
        return read_rows(self, bounds)

    FileRows.read, FileRows.digest = noted, lambda self, most: b""  # all hash the same pieces of all rows
    try:
        together = ALONE if group is None else Group(group)
        source = open_source(str(folder / "lists.npy"), folder / "target.npy", group=together)
        read_labels = sorted(read)
        read.clear()
        for _ in source.walk(10):
            pass
    finally:
        FileRows.read, FileRows.digest = read_rows, digest
    rank, size = together.rank, together.size
    first, end = ROWS * rank // size, ROWS * (rank + 1) // size
    return {"labels": read_labels == [(first, end)], "rows": min(read)[0] == first and max(read)[1] == end}


def refused(name: str, attempt: Case) -> Case:
    """All processes say the same of what only one of them may have seen."""

    def case(folder, group):
        try:
            attempt(folder, group)
        except (ValueError, OSError, KeyboardInterrupt, RuntimeError) as error:
            said = re.sub("of rows [0-9]* to [0-9]*", "", str(error))  # of a block
            return {"kind": type(error).__name__, "said": said}
        return {"kind": "nothing"}

    return case


def not_finite(folder, group):
    together = ALONE if group is None else Group(group)
    source = open_source(str(folder / "bad.npy"), folder / "target.npy", group=together)
    fit_head(source)


def full_disk(folder, group):
    def on_step(step):
        if step.iteration == 1 and (group is None or dist.get_rank(group) == 0):
            raise DataError("no space left")

    fit_head(to_source(X, LABELS), group=group, on_step=on_step)


def zero_in_target(folder, group):
    target = SOFT.copy()
    target[[320, 330]] = [0.0, 0.5, 0.25, 0.25]
    fit_head(to_source(X, target), loss="reverse_kl", group=group)


@contextmanager
def counted(messages: list[int]):
    """Note the bytes of what is summed."""
    whole = dist.all_reduce

    def noted(tensor, *arguments, **options):
        messages.append(tensor.numel() * tensor.itemsize)
        return whole(tensor, *arguments, **options)

    dist.all_reduce = noted
    try:
        yield
    finally:
        dist.all_reduce = whole


def bytes_sent(folder, group):
    """A product sends its C × (d + 1) numbers in float64 and two of the status, in one message."""
    if group is None:
        return {"products": True, "points": True}
    messages, marks = [], []
    with counted(messages):
        fit = fit_head(to_source(X, LABELS), group=group, on_product=lambda products: marks.append(len(messages)))
    of_product, of_point = 8 * (CLASSES * 7 + 2), 8 * (CLASSES * 6 + CLASSES + 3)
    return {
        "products": all(messages[mark] == of_product for mark in marks) and messages.count(of_product) >= len(marks)
        and all(later > mark for mark, later in pairwise(marks)),
        "points": messages.count(of_point) >= fit.iterations + 1,
    }  # fmt: skip


def gone_on_with(folder, group):
    """From a state that one process has written, and from one that these have."""
    found = {}
    for writer in ("alone", "these"):
        file = folder / f"{writer}-{1 if group is None else dist.get_world_size(group)}"
        if writer == "alone":
            if group is None or dist.get_rank(group) == 0:
                fit_head(to_source(X, SOFT), C=50.0, max_iter=2, checkpoint=file, sample_weight=WEIGHTS)
            if group is not None:
                dist.barrier(group)
        else:
            fit_head(to_source(X, SOFT), C=50.0, max_iter=2, checkpoint=file, sample_weight=WEIGHTS, group=group)
        fit = fit_head(to_source(X, SOFT), C=50.0, tol=1e-9, checkpoint=file, sample_weight=WEIGHTS, group=group)
        found[writer] = told(fit)
    return found


def asked_to_stop(folder, group):
    """Where the last process is asked, all stop, and the first writes the state; the fit then ends as it would have."""
    file = folder / f"stopped-{1 if group is None else dist.get_world_size(group)}"
    if group is not None:
        asked = []
        together = Group(group, lambda: bool(asked) and dist.get_rank(group) == dist.get_world_size(group) - 1)
        source = shared(to_source(X, LABELS), together)
        try:
            fit_head(
                source,
                C=50.0,
                tol=1e-9,
                checkpoint=file,
                on_step=lambda s: asked.append(1) if s.iteration == 2 else None,
            )
        except KeyboardInterrupt as error:
            agreed = raised_by_all(error)
        else:
            return {"stopped": False}
        dist.barrier(group)
        assert agreed
        assert file.exists()
    return told(fit_head(to_source(X, LABELS), C=50.0, tol=1e-9, checkpoint=file, group=group))


def unlike(folder, group):
    """What all say where the last process alone has other rows, or another argument."""
    rows, labels, soft = X.copy(), LABELS.copy(), SOFT.copy()
    rows[170, 3] += 1e-6
    labels[3] = (labels[3] + 1) % CLASSES
    soft[50] = soft[51]
    start = torch.zeros(CLASSES, 6), torch.zeros(CLASSES)
    cases: dict[str, tuple[tuple[np.ndarray, ...], dict[str, object], str]] = {
        "features": ((rows, LABELS), {}, "data: features in process 0 and features in process LAST have other entries"),
        "labels": ((X, labels), {}, "data: target in process 0 and target in process LAST have other entries"),
        "distributions": ((X, soft), {}, "data: target in process 0 and target in process LAST have other entries"),
        "fewer": ((X[1:], LABELS[1:]), {}, "data: process 0 has 331 rows of 6 features with labels, and process LAST"),
        "C": ((X, LABELS), {"C": 2.0}, "C must be the same in all processes; process 0 has 1.0, and process LAST has 2.0"),
        "loss": ((X, LABELS), {"loss": "hinge"}, "loss must be the same in all processes; process 0 has cross_entropy"),
        "intercept": ((X, LABELS), {"fit_intercept": False}, "fit_intercept must be the same in all processes"),
        "memory": ((X, LABELS), {"memory_budget": 2**24}, "memory_budget must be the same in all processes; process 0 has"),
        "weights": ((X, LABELS), {"sample_weight": WEIGHTS}, "sample_weight must be the same in all processes; process 0"),
        "start": ((X, LABELS), {"start": start}, "start must be the same in all processes; process 0 has nothing, and"),
        "checkpoint": ((X, LABELS), {"checkpoint": folder / "one"}, "checkpoint must be the same in all processes"),
    }  # fmt: skip
    if group is None:
        return {name: expected for name, (_, _, expected) in cases.items()}
    found = {}
    last = dist.get_world_size(group) - 1
    for name, (arrays, options, expected) in cases.items():
        usual = (X, SOFT if name == "distributions" else LABELS)
        mine = dist.get_rank(group) == last
        try:
            fit_head(to_source(*(arrays if mine else usual)), group=group, **(options if mine else {}))
        except DataError as error:
            said = str(error).replace(f"process {last}", "process LAST")
            found[name] = expected if said.startswith(expected) else said
    return found


def sparse_rows(folder, group):
    """Rows that stay sparse although they are few, with a constant column and one that only some processes store."""
    rows = np.where(np.abs(X - 5.0) > 1.0, X, 0.0)
    rows[:, 2] = 3.0
    rows[100:, 5] = 0.0
    bounds = dataset.SPARSE_SIZE, dataset.SPARSE_SHARE
    dataset.SPARSE_SIZE, dataset.SPARSE_SHARE = 0, 0
    try:
        source = to_source(scipy.sparse.csr_array(rows), LABELS)
        assert is_sparse(source)
        options = {"tol": 1e-9, "precision": "float64"}
        whole = fit_head(source, group=group, sample_weight=WEIGHTS, **options)
        train, held = split_source(of(source, group), 0.2, 1)
        fit = fit_head(train, **options)
        return {"whole": told(whole), "train": told(fit), "held": diagnose(held, fit.weight, fit.bias, "js").loss}
    finally:
        dataset.SPARSE_SIZE, dataset.SPARSE_SHARE = bounds


CASES: dict[str, Case] = {
    "labels": plain(X, LABELS),
    "labels, mixed": mixed(X, LABELS, C=30.0),
    "labels, rounded": rounded,
    "no intercept": plain(X, LABELS, fit_intercept=False),
    "no penalty": plain(X, LABELS, C=math.inf),
    "separated": plain(*separable(), C=math.inf, max_iter=40),
    "distributions": plain(X, SOFT, loss="forward_kl"),
    "lists": plain(X, LISTS),
    "reverse KL": plain(X, SOFT, loss="reverse_kl", C=3.0),
    "reverse KL, lists": plain(X, LISTS, loss="reverse_kl", tol=1e-6),
    "JS": plain(X, SOFT, loss="js"),
    "JS, labels": plain(X, LABELS, loss="js", tol=1e-6),
    "weights": plain(X, SOFT, sample_weight=WEIGHTS),
    "weights, labels, mixed": mixed(X, LABELS, sample_weight=WEIGHTS),
    "negligible rows": negligible,
    "negligible rows left out": left_out,
    "classes' blocks": classes_blocks(10, factored=False, C=10.0, tol=1e-9),
    "classes' blocks of few rows": classes_blocks(64, factored=True, C=1e-3, tol=1e-8, memory_budget=2**24),
    "wide": plain(RNG.normal(size=(30, 50)), LABELS[:30]),
    "sparse rows": sparse_rows,
    "two rows": plain(X[:2], np.array([0, 1])),
    "three rows, streamed": lambda folder, group: told(
        fit_head(to_source(np.memmap(folder / "few", np.float64, "r", 0, (3, 6)), np.array([0, 1, 1])), group=group)
    ),
    "held out": held_out,
    "confused pairs": confused,
    "spectra": spectra,
    "standard errors": standard_errors,
    "path": path,
    "npz shards": opened("npz"),
    "npy shards": opened("npy", "target.npy"),
    "safetensors shards": opened("safetensors"),
    "parquet shards": opened("parquet"),
    "own rows alone": own_rows_alone,
    "bytes": bytes_sent,
    "gone on with": gone_on_with,
    "asked to stop": asked_to_stop,
    "refused: unlike": unlike,
    "refused: not finite": refused("not finite", not_finite),
    "refused: full disk": refused("full disk", full_disk),
    "refused: zero": refused("zero", zero_in_target),
    "refused: option": refused("option", plain(X, LABELS, C=-1.0)),
    "refused: no folder": refused("no folder", lambda folder, group: fit_head(
        to_source(X, LABELS), checkpoint=folder / "none" / "state", group=group)),
}  # fmt: skip


def prepare(folder: Path) -> None:
    write_shards(folder)
    X[:3].tofile(folder / "few")


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    group = dist.group.WORLD
    found = {name: CASES[name](folder, group) for name in sys.argv[2:]}
    (folder / f"{dist.get_world_size()}-{dist.get_rank()}.json").write_text(json.dumps(found))
    del group
    dist.destroy_process_group()
    # A group that something still refers to ends with the interpreter, and its threads may abort the process then.
    left = sorted(name for name in map(thread_name, os.listdir("/proc/self/task")) if "gloo" in name)
    assert not left, f"the group is still alive: {left}"


def thread_name(thread: str) -> str:
    return Path(f"/proc/self/task/{thread}/comm").read_text()


if __name__ == "__main__":
    main()
