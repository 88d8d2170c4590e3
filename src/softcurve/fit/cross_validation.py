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

from softcurve.fit.arguments import Array, TrainingData, class_weighted, most_probable, to_numpy
from softcurve.fit.data.source import Source, block_rows
from softcurve.fit.data.sparse_features import linear
from softcurve.fit.data.subset import Subset
from softcurve.fit.estimator import Real, SoftmaxRegression, Whole
from softcurve.fit.fitting import Fit, coordinates_of, fit_head, regularisation_path
from softcurve.fit.losses import row_losses
from softcurve.losses.divergences import Divergence
from softcurve.typing import FitLoss, FitPrecision
from softcurve.warn import warn_caller


class SoftmaxRegressionCV(SoftmaxRegression):
    """:class:`SoftmaxRegression` with the ``C`` of the best mean score over the folds of a cross-validation.

    On each fold the fits go from the smallest C to the largest, each started from the last. Every fit has all classes;
    a class without samples in a fold is only improbable.

    Args:
        Cs: The inverse strengths of the penalty to try, or their number, spaced evenly from 1e-4 to 1e4 on a log scale.
        cv: The number of folds, a splitter, or an iterable of pairs (samples to fit, samples to score); by default 5.
            Labels are stratified.
        scoring: By default minus the mean loss of the held-out samples, in nats, weighted by ``sample_weight`` but not
            by ``class_weight``; for cross-entropy that is the mean log-likelihood. Or a scorer of scikit-learn, or its
            name, which ``score`` then uses too. It receives labels, which are the most probable classes of
            distributions or lists, and all classes, as a fold may lack one. NaN scores are left out of the mean.
        refit: Whether the head is fitted again to all samples with the best C. Otherwise C and head are the means of
            the best on each fold.
        loss: This and all other arguments are those of :class:`SoftmaxRegression`.

    Attributes: those of :class:`SoftmaxRegression`, and ``C_``, ``Cs_``, ``scores_`` (folds × Cs), ``mean_scores_``.
    ``n_iter_`` counts the steps of all fits. Without ``refit`` there is no ``objective_``, ``gradient_max_`` or
    ``history_``.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> model = softcurve.SoftmaxRegressionCV(Cs=[0.1, 1.0], cv=2).fit(*load_iris(return_X_y=True))
        >>> model.C_
        1.0
    """

    Cs: Any  # set_params accepts any value
    C_: float
    Cs_: Array
    scores_: Array
    mean_scores_: Array

    def __init__(
        self, *, Cs: Whole | Sequence[Real] | Array = 10, cv: Any = None,
        scoring: str | Callable[..., Any] | None = None, refit: bool = True,
        loss: FitLoss | Divergence = "cross_entropy", fit_intercept: bool = True, tol: Real = 1e-4,
        max_iter: Whole = 100, class_weight: Mapping[Any, Any] | Literal["balanced"] | None = None,
        precision: FitPrecision = "auto", memory_budget: int | None = None, verbose: bool = False,
    ) -> None:  # fmt: skip
        self.Cs, self.cv, self.scoring, self.refit = Cs, cv, scoring, refit
        self.loss, self.fit_intercept, self.class_weight, self.precision = loss, fit_intercept, class_weight, precision
        self.tol, self.max_iter, self.memory_budget, self.verbose = tol, max_iter, memory_budget, verbose

    def fit(self, X: Any, y: Any, sample_weight: Any = None, groups: Any = None) -> SoftmaxRegressionCV:
        """Fit to samples ``X`` ``(n, d)`` and targets ``y``; ``sample_weight`` ``(n,)`` is ≥ 0.

        ``groups`` ``(n,)`` are passed to the splitter, such as ``GroupKFold``, which keeps a group on one side.

        Raises ``ValueError`` for arguments that cannot be used, and warns of fits that have not converged
        (``ConvergenceWarning``) and of scores that are NaN.
        """
        self._check_parameters(C=1.0)
        Cs = self._grid()
        data = self._training_data(X, y, sample_weight)
        source, weights = class_weighted(data, self.class_weight, self.loss)
        options = self._options()
        options["coordinates"] = coordinates_of(
            source, fit_intercept=self.fit_intercept, sample_weight=weights, memory_budget=self.memory_budget
        )
        score = self._scorer(data, y, weighted=sample_weight is not None)
        scores: list[list[float]] = []
        heads: list[tuple[Tensor, Tensor]] = []  # sums over the folds, for each C or for the best one
        steps = unconverged = 0
        for train, test in self._folds(data, groups):
            rows, row_weights = _selected(source, weights, train)
            fits = regularisation_path(rows, Cs, sample_weight=row_weights, **options)
            scores.append([score(fit, test) for fit in fits])
            steps += sum(fit.iterations for fit in fits)
            unconverged += sum(not fit.converged and not fit.separated for fit in fits)
            kept = [(fit.weight, fit.bias) for fit in (fits if self.refit else [fits[_best(scores[-1])]])]
            heads = [(w + dw, b + db) for (w, b), (dw, db) in zip(heads, kept, strict=True)] if heads else kept
        self.Cs_, self.scores_, self.classes_ = np.array(Cs), np.array(scores), data.classes
        self._warn_of_folds(unconverged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of the mean of a C without a number, which is NaN
            self.mean_scores_ = np.asarray(np.nanmean(self.scores_, axis=0))
        means = [(weight / len(scores), bias / len(scores)) for weight, bias in heads]
        if self.refit:
            best = _best(self.mean_scores_)
            self.C_ = Cs[best]
            fit = fit_head(source, C=self.C_, sample_weight=weights, start=means[best], **options)
            self._keep(fit, data.classes, like=X)
            steps += fit.iterations
        else:
            self.C_ = float(np.mean([Cs[_best(of_fold)] for of_fold in self.scores_]))
            self._keep_head(*means[0], like=X)
        self.n_iter_ = np.array([steps], dtype=np.int32)
        return self

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the score of ``scoring``, or without it the share of rows whose label is predicted.

        Labels are the most probable classes of distributions or lists.
        """
        if self.scoring is None or y is None:
            return super().score(X, y, sample_weight)
        check_is_fitted(self)
        return _Scoring(self.scoring, self.classes_)(self, to_numpy(X), self._labels(y), to_numpy(sample_weight))

    def _warn_of_folds(self, unconverged: int) -> None:
        if unconverged:
            warnings.warn(
                f"{unconverged} of the {self.scores_.size} fits to the folds have not converged to tol {self.tol:.1e}. "
                "Raise max_iter or tol, or scale the features to the order of 1",
                ConvergenceWarning,
                stacklevel=3,
            )
        if undefined := int(np.isnan(self.scores_).sum()):
            warn_caller(
                f"scoring {self.scoring!r} is NaN for {undefined} of the {self.scores_.size} fits to the folds, as "
                "where one lacks a class: the means are over the others, and without any the first C is taken. "
                "Give folds that have every class, or another scorer"
            )

    def _strength(self) -> float:
        return self.C_

    def _grid(self) -> list[float]:
        if isinstance(self.Cs, int | np.integer) and not isinstance(self.Cs, bool) and self.Cs > 0:
            return [float(C) for C in np.logspace(-4, 4, self.Cs)]
        if isinstance(self.Cs, Sequence | np.ndarray) and not isinstance(self.Cs, str) and len(self.Cs):
            given = np.asarray(self.Cs)
            if given.ndim == 1 and given.dtype.kind in "iuf" and (given > 0).all():
                return [float(C) for C in given]
        raise ValueError(f"Cs must be a list of positive numbers, or how many to try; got {self.Cs!r}")

    def _folds(self, data: TrainingData, groups: Any) -> Iterator[tuple[Array, Array]]:
        """Yield the numbers of the rows to fit and of those to score, which may occur several times."""
        numbers = np.arange(data.source.rows)
        if groups is not None:
            groups = np.asarray(to_numpy(groups))
            if groups.shape != numbers.shape:
                raise ValueError(f"groups must have one entry for each of {len(numbers)} rows; got {groups.shape}")
        y = np.zeros(len(numbers)) if data.labels is None else data.labels
        splitter = check_cv(5 if self.cv is None else self.cv, y, classifier=data.labels is not None)
        folds = 0
        for fold, (train, test) in enumerate(splitter.split(np.zeros(len(numbers)), y, groups)):
            folds += 1
            for rows, use in ((train, "fit"), (test, "score")):
                if not (data.weights.numpy()[rows] > 0).any():
                    raise ValueError(f"fold {fold} of cv has no row with a positive weight to {use}: give fewer folds")
            yield numbers[train], numbers[test]
        if not folds:
            raise ValueError(f"cv must divide the rows at least once; {self.cv!r} has no fold")

    def _scorer(self, data: TrainingData, y: Any, *, weighted: bool) -> Callable[[Fit, Array], float]:
        """Return the function that scores a fit on some rows."""
        if self.scoring is None:
            return lambda fit, test: -_mean_loss(self.loss, fit, *_selected(data.source, data.weights, test))
        scoring = _Scoring(self.scoring, data.classes)
        labels = most_probable(y) if data.labels is None else data.labels

        def score(fit: Fit, test: Array) -> float:
            head = SoftmaxRegression(loss=self.loss, fit_intercept=self.fit_intercept)
            head.classes_, head.n_features_in_ = data.classes, data.source.width
            head._keep_head(fit.weight, fit.bias, like=data.rows)
            weight = data.weights.numpy()[test] if weighted else None
            return scoring(head, data.rows[test], labels[test], weight)

        return score


class _Scoring:
    """A scorer that knows all classes, also those without a row among those that it scores."""

    def __init__(self, scoring: Any, classes: Array) -> None:
        scorer = get_scorer(scoring) if isinstance(scoring, str) else scoring
        if not callable(scorer):
            raise ValueError(
                f"scoring must be None, the name of a scorer, or a function of (estimator, X, y); got {scoring!r}"
            )
        function = getattr(scorer, "_score_func", scorer)
        accepted = inspect.signature(function).parameters
        if function is not scorer:  # made by make_scorer: log_loss and others would take the classes from the rows
            options = dict(scorer._kwargs)
            if "labels" in accepted:
                options.setdefault("labels", classes)
            binary = len(classes) == 2 and options.get("average", "binary") == "binary"
            if binary and "pos_label" in accepted and 1 not in classes:  # 1 is the default of scikit-learn
                options.setdefault("pos_label", classes[-1])
            scorer = copy.copy(scorer)
            scorer._kwargs = options
        self.scorer, self.takes_weights = scorer, "sample_weight" in accepted

    def __call__(self, head: Any, rows: Any, labels: Array, weight: Any) -> float:
        given = {"sample_weight": weight} if weight is not None and self.takes_weights else {}
        return float(self.scorer(head, rows, labels, **given))


def _best(scores: Any) -> int:
    """Return the place of the largest score; NaN is the worst."""
    return int(np.nan_to_num(scores, nan=-np.inf, posinf=np.inf, neginf=-np.finfo(np.float64).max).argmax())


def _selected(source: Source, weights: Tensor, numbers: Array) -> tuple[Source, Tensor]:
    """Return the rows with these numbers, each once, and their weights times the number of their occurrences."""
    times = torch.from_numpy(np.bincount(numbers, minlength=source.rows))
    return Subset(source, (times > 0).numpy()), (weights * times)[times > 0]


def _mean_loss(loss: str | Divergence, fit: Fit, rows: Source, weights: Tensor) -> float:
    total = 0.0
    for block in rows.blocks(block_rows(rows)):
        assert block.target is not None
        logits = linear(block.features, fit.weight, fit.bias)
        of_rows = weights[block.start : block.start + len(block)]
        losses = row_losses(loss, logits, block.target)
        total += float((of_rows * torch.where(of_rows > 0, losses, 0.0)).sum())
    return total / float(weights.sum())
