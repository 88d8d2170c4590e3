"""Multinomial logistic regression whose penalty is chosen by cross-validation."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import get_scorer
from sklearn.model_selection import check_cv
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from softcurve.fit.data.source import Source, rows_within
from softcurve.fit.data.subset import Subset
from softcurve.fit.estimator import (
    Array,
    Posed,
    Real,
    SoftmaxRegression,
    Whole,
    class_weighted,
    posed,
    target_labels,
    warn_of,
)
from softcurve.fit.fitting import Fit, coordinates_of, fit_head
from softcurve.fit.losses import row_losses
from softcurve.fit.path import regularisation_path
from softcurve.losses.divergences import Divergence
from softcurve.typing import FitLoss, FitPrecision

__all__ = ["SoftmaxRegressionCV"]


class SoftmaxRegressionCV(SoftmaxRegression):
    """:class:`SoftmaxRegression` with the ``C`` of the best mean score over the folds of a cross-validation.

    The folds' fits go from the smallest C to the largest, each started from the last. All know all classes, also those
    of which a fold has no row; of such a class a fit without rows says nothing but that it is improbable.

    Args:
        Cs: The inverse strengths of the penalty to try, or how many, spaced evenly from 1e-4 to 1e4 on a log scale.
        cv: How many folds, a splitter, or an iterable of pairs (rows to fit, rows to score); by default 5. Labels are
            stratified.
        scoring: By default minus the mean loss of the rows held out, in nats, weighted by ``sample_weight`` but not by
            ``class_weight``; for cross-entropy that is the mean log-likelihood. Or a scorer of scikit-learn, or its
            name, which ``score`` then uses too; it is given labels, of a distribution or a list the most probable
            class, and told all classes, as a fold may lack one. Where a score is NaN its fold is left out of the mean.
        refit: Whether the head is fitted again with the best C to all rows. Otherwise C and head are the means of
            those that were the best on each fold.
        loss: As of :class:`SoftmaxRegression`, and so are all other arguments.

    Attributes: those of :class:`SoftmaxRegression`, and ``C_``, ``Cs_``, ``scores_`` (folds × Cs), ``mean_scores_``.
    ``n_iter_`` counts the steps of all fits together. There is no ``objective_``, ``gradient_max_`` nor ``history_``
    without ``refit``.
    """

    Cs: Any  # set_params takes anything
    C_: float
    Cs_: Array
    scores_: Array
    mean_scores_: Array

    def __init__(
        self,
        *,
        Cs: Whole | Sequence[Real] | Array = 10,
        cv: Any = None,
        scoring: str | Callable[..., Any] | None = None,
        refit: bool = True,
        loss: FitLoss | Divergence = "cross_entropy",
        fit_intercept: bool = True,
        tol: Real = 1e-4,
        max_iter: Whole = 100,
        class_weight: Mapping[Any, Any] | Literal["balanced"] | None = None,
        precision: FitPrecision = "auto",
        memory_budget: int | None = None,
        verbose: bool = False,
    ) -> None:
        self.Cs = Cs
        self.cv = cv
        self.scoring = scoring
        self.refit = refit
        self.loss = loss
        self.fit_intercept = fit_intercept
        self.tol = tol
        self.max_iter = max_iter
        self.class_weight = class_weight
        self.precision = precision
        self.memory_budget = memory_budget
        self.verbose = verbose

    def fit(self, X: Any, y: Any, sample_weight: Any = None, groups: Any = None) -> SoftmaxRegressionCV:
        """Fit to rows ``X`` ``(n, d)`` and targets ``y``; ``sample_weight`` ``(n,)`` is ≥ 0.

        ``groups`` ``(n,)`` are given to the splitter, which keeps rows of one group together (``GroupKFold``).

        Raises ``ValueError`` for anything that cannot be used, and warns (``ConvergenceWarning``) of fits that have not
        converged, and of scores that are NaN.
        """
        self._require("tol")
        Cs = self._grid()
        problem = posed(self, X, y, sample_weight)
        source, weights = class_weighted(self, problem)
        options = self._options(source, weights)
        score = self._measure(problem, y, weighted=sample_weight is not None)
        scores: list[list[float]] = []
        heads: list[tuple[Tensor, Tensor]] = []  # of each C, or the best one; summed over the folds
        steps = late = 0
        for train, test in self._folds(problem, groups):
            rows, of_rows = _taken(source, weights, train)
            fits = regularisation_path(rows, Cs, sample_weight=of_rows, **options)
            scores.append([score(fit, test) for fit in fits])
            steps += sum(fit.iterations for fit in fits)
            late += sum(not fit.converged and not fit.separated for fit in fits)
            kept = fits if self.refit else [fits[_best(scores[-1])]]
            found = [(fit.weight, fit.bias) for fit in kept]
            heads = [(w + dw, b + db) for (w, b), (dw, db) in zip(heads, found, strict=True)] if heads else found
        self.Cs_, self.scores_, self.classes_ = np.array(Cs), np.array(scores), problem.classes
        self._warn_of_folds(late)
        self.mean_scores_ = _mean_over_folds(self.scores_)
        means = [(weight / len(scores), bias / len(scores)) for weight, bias in heads]
        if self.refit:
            best = _best(self.mean_scores_)
            self.C_ = Cs[best]
            fit = fit_head(source, C=self.C_, sample_weight=weights, start=means[best], **options)
            warn_of(fit, self)
            self._keep(fit, like=X)
            steps += fit.iterations
        else:
            self.C_ = float(np.mean([Cs[_best(of_fold)] for of_fold in self.scores_]))
            self._keep_head(*means[0], like=X)
        self.n_iter_ = np.array([steps], dtype=np.int32)
        return self

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """What ``scoring`` says of the head on these rows; without one, the share of rows whose label is predicted.

        A scorer is given labels, of a distribution or a list the most probable class.
        """
        if self.scoring is None or y is None:
            return super().score(X, y, sample_weight)
        check_is_fitted(self)
        rows, weight = (given.detach().cpu().numpy() if isinstance(given, Tensor) else given
                        for given in (X, sample_weight))  # fmt: skip
        return _Scoring(self.scoring, self.classes_)(self, rows, self._labels(y), weight)

    def _options(self, source: Source, weights: Tensor) -> dict[str, Any]:
        """Those of every fit."""
        return {
            "loss": self.loss,
            "fit_intercept": self.fit_intercept,
            "tol": float(self.tol),
            "max_iter": int(self.max_iter),
            "precision": self.precision,
            "memory_budget": self.memory_budget,
            "on_step": print if self.verbose else lambda step: None,
            "coordinates": coordinates_of(
                source, fit_intercept=self.fit_intercept, sample_weight=weights, memory_budget=self.memory_budget
            ),
        }

    def _warn_of_folds(self, late: int) -> None:
        if late:
            warnings.warn(
                f"{late} of the {self.scores_.size} fits to the folds have not converged to tol {self.tol:.1e}. Raise "
                "max_iter or tol, or scale the features to the order of 1",
                ConvergenceWarning,
                stacklevel=3,
            )
        if undefined := int(np.isnan(self.scores_).sum()):
            warnings.warn(
                f"scoring {self.scoring!r} is NaN for {undefined} of the {self.scores_.size} fits to the folds, as "
                "where one lacks a class: the means are over the others, and without any the first C is taken. "
                "Give folds that have every class, or another scorer",
                UserWarning,
                stacklevel=3,
            )

    def _grid(self) -> list[float]:
        if isinstance(self.Cs, int | np.integer) and not isinstance(self.Cs, bool) and self.Cs > 0:
            return [float(C) for C in np.logspace(-4, 4, self.Cs)]
        if isinstance(self.Cs, Sequence | np.ndarray) and not isinstance(self.Cs, str) and len(self.Cs):
            given = np.asarray(self.Cs)
            if given.ndim == 1 and given.dtype.kind in "iuf" and (given > 0).all():
                return [float(C) for C in given]
        raise ValueError(f"Cs must be a list of positive numbers, or how many to try; got {self.Cs!r}")

    def _folds(self, problem: Posed, groups: Any) -> Iterator[tuple[Array, Array]]:
        """The numbers of the rows to fit and of those to score; one may be there several times."""
        numbers = np.arange(problem.source.rows)
        if groups is not None:
            groups = groups.detach().cpu().numpy() if isinstance(groups, Tensor) else np.asarray(groups)
            if groups.shape != numbers.shape:
                raise ValueError(f"groups must have one entry for each of {len(numbers)} rows; got {groups.shape}")
        y = np.zeros(len(numbers)) if problem.labels is None else problem.labels
        splitter = check_cv(5 if self.cv is None else self.cv, y, classifier=problem.labels is not None)
        folds = 0
        for fold, (train, test) in enumerate(splitter.split(np.zeros(len(numbers)), y, groups)):
            folds += 1
            for rows, use in ((train, "fit"), (test, "score")):
                if not (problem.weights.numpy()[rows] > 0).any():
                    raise ValueError(f"fold {fold} of cv has no row with a positive weight to {use}: give fewer folds")
            yield numbers[train], numbers[test]
        if not folds:
            raise ValueError(f"cv must divide the rows at least once; {self.cv!r} has no fold")

    def _measure(self, problem: Posed, y: Any, *, weighted: bool) -> Callable[[Fit, Array], float]:
        """The score of a fit on some rows."""
        if self.scoring is None:
            return lambda fit, test: -_mean_loss(self.loss, fit, *_taken(problem.source, problem.weights, test))
        scoring = _Scoring(self.scoring, problem.classes)
        labels = target_labels(y) if problem.labels is None else problem.labels

        def score(fit: Fit, test: Array) -> float:
            head = SoftmaxRegression(loss=self.loss, fit_intercept=self.fit_intercept)
            head.classes_, head.n_features_in_ = problem.classes, problem.source.width
            head._keep_head(fit.weight, fit.bias, like=problem.rows)
            weight = problem.weights.numpy()[test] if weighted else None
            return scoring(head, problem.rows[test], labels[test], weight)

        return score


class _Scoring:
    """A scorer that knows all classes, also those of which the rows that it is given have none."""

    def __init__(self, scoring: Any, classes: Array) -> None:
        scorer = get_scorer(scoring) if isinstance(scoring, str) else scoring
        if not callable(scorer):
            raise ValueError(
                f"scoring must be None, the name of a scorer, or a function of (estimator, X, y); got {scoring!r}"
            )
        function = getattr(scorer, "_score_func", scorer)
        accepted = inspect.signature(function).parameters
        if function is not scorer:  # of make_scorer: log_loss and others take the classes for those of the rows
            options = dict(scorer._kwargs)
            if "labels" in accepted:
                options.setdefault("labels", classes)
            binary = len(classes) == 2 and options.get("average", "binary") == "binary"
            if binary and "pos_label" in accepted and 1 not in classes:  # 1 is scikit-learn's own default
                options.setdefault("pos_label", classes[-1])
            scorer = copy.copy(scorer)
            scorer._kwargs = options
        self.scorer, self.takes_weights = scorer, "sample_weight" in accepted

    def __call__(self, head: Any, rows: Any, labels: Array, weight: Any) -> float:
        given = {"sample_weight": weight} if weight is not None and self.takes_weights else {}
        return float(self.scorer(head, rows, labels, **given))


def _best(scores: Any) -> int:
    """The place of the largest score; a NaN is the worst."""
    return int(np.nan_to_num(scores, nan=-np.inf, posinf=np.inf, neginf=-np.finfo(np.float64).max).argmax())


def _mean_over_folds(scores: Array) -> Array:
    """Of each C, over the folds where the score is no NaN; NaN where there is none."""
    known = ~np.isnan(scores)
    with np.errstate(invalid="ignore"):
        means: Array = np.where(known, scores, 0.0).sum(0) / known.sum(0)
    return means


def _taken(source: Source, weights: Tensor, numbers: Array) -> tuple[Source, Tensor]:
    """The rows with these numbers, each once, and their weights times how often they are named."""
    times = torch.from_numpy(np.bincount(numbers, minlength=source.rows))
    return Subset(source, (times > 0).numpy()), (weights * times)[times > 0]


def _mean_loss(loss: str | Divergence, fit: Fit, rows: Source, weights: Tensor) -> float:
    total = 0.0
    for block in rows.blocks(rows_within(len(rows.classes), rows.width)):
        assert block.target is not None
        logits = torch.addmm(fit.bias, block.features.double(), fit.weight.T)
        of_rows = weights[block.start : block.start + len(block)]
        losses = row_losses(loss, logits, block.target)
        total += float((of_rows * torch.where(of_rows > 0, losses, 0.0)).sum())
    return total / float(weights.sum())
