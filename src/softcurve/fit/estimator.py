"""Multinomial logistic regression as a scikit-learn classifier, for labels and for distributions."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal, get_args, overload

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import accuracy_score
from sklearn.utils import Tags, check_consistent_length, column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted
from torch import Tensor, nn

from softcurve import checks
from softcurve.curvature.split import require_head
from softcurve.fit.arguments import (
    Array,
    TrainingData,
    as_given,
    class_weighted,
    feature_blocks,
    features_of,
    has_soft_targets,
    most_probable,
    to_numpy,
    to_tensor,
)
from softcurve.fit.coefficients import CoefficientSummary, feature_names, summarise
from softcurve.fit.covariance import CovarianceKind, class_covariances, full_covariance
from softcurve.fit.data.row_source import to_source
from softcurve.fit.data.source import Source
from softcurve.fit.data.sparse_features import linear
from softcurve.fit.fitted_head import FittedHead
from softcurve.fit.fitting import Fit, budget_of, check_budget, check_options, fit_head
from softcurve.fit.saved_head import linear_of
from softcurve.fit.solver.newton import Step
from softcurve.losses.divergences import Divergence
from softcurve.losses.topk import TopK
from softcurve.typing import FitLoss, FitPrecision
from softcurve.warn import warn_caller

Real = int | float | np.integer[Any] | np.floating[Any]
Whole = int | np.integer[Any]


class SoftmaxRegression(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Multinomial logistic regression with scikit-learn's objective and coefficients, fitted by Newton's method.

    ``LogisticRegression(C=C).fit(X, y, sample_weight)`` minimises the same ``½ ‖W‖² + C Σ w_i loss_i``, and so has the
    same ``coef_`` and ``intercept_``. Here ``y`` may also hold distributions, and there are other losses.

    ``y`` is one of: labels ``(n,)``; distributions ``(n, C)``, each equivalent to a copy of its sample per class with
    the class probabilities as weights; or a :class:`softcurve.TopK`. For the latter two the classes are 0…C-1. ``X`` is
    dense, sparse (it stays so where that pays), a ``numpy.memmap`` (never loaded as a whole), or a torch tensor, for
    which results are tensors too. Losses are in nats.

    Args:
        C: Inverse strength of the penalty, ``inf`` for none.
        loss: ``cross_entropy``, ``forward_kl``: D(target‖model), ``reverse_kl``: D(model‖target), or ``js`` (β = ½).
        fit_intercept: Whether there is a bias. It is not penalised.
        tol: The fit has converged when no entry of the gradient of the mean objective, ``½ ‖W‖² / (C Σ w) + Σ w loss /
            Σ w``, exceeds this in float64, and an undamped Newton step would gain at most ``tol / 50`` nats, which
            depends neither on the units of the features nor on the number of classes. At least one step is taken.
        max_iter: Maximum number of Newton steps.
        class_weight: A dict from labels to weights, or ``"balanced"``. They multiply the weights of the samples;
            for distributions (only with cross-entropy and forward KL) those of the copies of each sample. A label that
            the dict does not name has weight 1.
        warm_start: Whether another fit starts from the last coefficients, if the objective is lower there.
        precision: ``mixed``: products in float32, or in bfloat16 while that is accurate and where the processor has
            instructions for it, the objective and its gradient in float64; ``float64``; or ``auto``: ``mixed`` unless
            float32 would save nothing.
        memory_budget: Bytes in addition to the samples; by default 1 GiB, or 256 MiB for a ``numpy.memmap``.
        verbose: Whether each step is printed.

    Attributes: ``classes_``; ``coef_`` ``(C, d)`` and ``intercept_`` ``(C,)``, or for two classes ``(1, d)`` and
    ``(1,)``, their difference, in the dtype of ``X``; ``n_iter_``; ``objective_`` (the mean, in nats);
    ``gradient_max_``; ``history_``, a record of each step; ``n_features_in_``, ``feature_names_in_``.

    Example:
        >>> model = softcurve.SoftmaxRegression().fit([[0.0], [1.0], [2.0], [3.0]], [0, 0, 1, 1])
        >>> model.predict([[0.5], [2.5]])
        array([0, 1])
    """

    classes_: Array
    coef_: Any
    intercept_: Any
    n_iter_: Array
    objective_: float
    gradient_max_: float
    history_: tuple[Step, ...]
    n_features_in_: int

    def __init__(
        self, *, C: Real = 1.0, loss: FitLoss | Divergence = "cross_entropy", fit_intercept: bool = True,
        tol: Real = 1e-4, max_iter: Whole = 100, class_weight: Mapping[Any, Any] | Literal["balanced"] | None = None,
        warm_start: bool = False, precision: FitPrecision = "auto", memory_budget: int | None = None,
        verbose: bool = False,
    ) -> None:  # fmt: skip
        self.C, self.loss, self.fit_intercept, self.class_weight = C, loss, fit_intercept, class_weight
        self.tol, self.max_iter, self.warm_start, self.precision = tol, max_iter, warm_start, precision
        self.memory_budget, self.verbose = memory_budget, verbose

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> SoftmaxRegression:
        """Fit to samples ``X`` ``(n, d)`` and targets ``y``; ``sample_weight`` ``(n,)`` is ≥ 0.

        Raises ``ValueError`` for arguments that cannot be used. Warns (``ConvergenceWarning``) if ``max_iter`` steps
        were not enough, or if the loss has no minimum because separable classes are fitted without a penalty.
        """
        self._check_parameters(self.C)
        data = self._training_data(X, y, sample_weight)
        source, weights = class_weighted(data, self.class_weight, self.loss)
        start = self._start(data.classes) if self.warm_start else None
        fit = fit_head(source, C=float(self.C), sample_weight=weights, start=start, **self._options())
        self._keep(fit, data.classes, like=X)
        return self

    def _options(self) -> dict[str, Any]:
        """Return the options of :func:`fit_head` that do not depend on the rows."""
        return {
            **{name: getattr(self, name) for name in ("loss", "fit_intercept", "precision", "memory_budget")},
            "tol": float(self.tol), "max_iter": int(self.max_iter),
            "on_step": print if self.verbose else lambda step: None,
        }  # fmt: skip

    def _keep(self, fit: Fit, classes: Array, *, like: Any) -> None:
        """Set the fitted attributes. Warn if the objective has no minimum, or if the fit has not reached it."""
        message = ""
        if fit.separated:
            message = (
                "the classes can be separated, and without a penalty (C = inf) the loss has no minimum: it falls "
                f"forever as the weights grow; the fit ended where the gradient was {fit.gradient_max:.1e}. Give a "
                "finite C"
            )
        elif not fit.converged:
            message = (
                f"the fit has not converged: the largest entry of the gradient is {fit.gradient_max:.1e} and tol "
                f"{self.tol:.1e}; {fit.reason}"
            )
        if message:
            warnings.warn(message, ConvergenceWarning, stacklevel=3)
        self.classes_ = classes
        self._keep_head(fit.weight, fit.bias, like=like)
        self.n_iter_ = np.array([fit.iterations], dtype=np.int32)
        self.objective_, self.gradient_max_, self.history_ = fit.objective, fit.gradient_max, fit.history

    def _keep_head(self, weight: Tensor, bias: Tensor, *, like: Any) -> None:
        if len(bias) == 2:
            weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
        self.coef_, self.intercept_ = as_given(weight, like), as_given(bias, like)

    def _start(self, classes: Array) -> tuple[Tensor, Tensor] | None:
        """Return the head of the last fit if it has the same classes and features and is finite."""
        if not hasattr(self, "coef_") or not np.array_equal(np.asarray(self.classes_), classes):
            return None
        weight, bias = (part.double().cpu() for part in self._head())
        finite = bool(weight.isfinite().all() and bias.isfinite().all())
        return (weight, bias) if finite and weight.shape[1] == self.n_features_in_ else None

    def _head(self) -> tuple[Tensor, Tensor]:
        """Return the weight ``(C, d)`` and the bias ``(C,)``, of which two classes keep the difference alone."""
        weight, bias = to_tensor(self.coef_), to_tensor(self.intercept_)
        if len(self.classes_) == 2:
            weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
        return weight, bias

    def to_linear(self) -> nn.Linear:
        """Return the fitted head as a trainable ``nn.Linear`` with copies of its coefficients, in their dtype.

        Its outputs ``(n, C)`` are logits of the classes in the order of ``classes_``; those of two classes are ``∓z/2``
        of the decision function ``z``. There is a bias if ``fit_intercept`` is true.

        Example:
            >>> model = softcurve.SoftmaxRegression().fit([[0.0], [1.0], [2.0], [3.0]], [0, 0, 1, 2])
            >>> model.to_linear()
            Linear(in_features=1, out_features=3, bias=True)
        """
        check_is_fitted(self)
        weight, bias = self._head()
        return linear_of(weight, bias if self.fit_intercept else None)

    @classmethod
    def from_linear(cls, head: nn.Linear, classes: Any = None, **parameters: Any) -> SoftmaxRegression:
        """Return a fitted estimator with the weight and the bias of a head, the reverse of :meth:`to_linear`.

        It predicts as it is. With ``warm_start=True``, ``fit`` starts from the head if the labels are ``classes``.

        Args:
            head: An ``nn.Linear`` from ``d`` features to ``C ≥ 2`` classes. Half precision becomes float32.
            classes: The labels ``(C,)`` of its rows, which become ``classes_``; by default 0…C-1.
            parameters: Those of the estimator. ``fit_intercept`` is by default whether the head has a bias.

        Raises:
            TypeError: If ``head`` is no ``nn.Linear`` that computes ``W e + b``.
            ValueError: If ``classes`` are not ``C`` distinct labels, there is one class, or the head has no values
                (device ``meta``).

        Example:
            >>> head = torch.nn.Linear(4, 3)
            >>> model = softcurve.SoftmaxRegression.from_linear(head, ["ant", "bee", "cat"])
            >>> model.predict(np.zeros((5, 4))).shape
            (5,)
        """
        require_head(head)
        if head.weight.is_meta:
            raise ValueError(
                "head must have values, got one on the meta device; load its weight first, for example by "
                "head.to_empty(device='cpu') and head.load_state_dict(state)"
            )
        labels = np.arange(head.out_features) if classes is None else np.asarray(classes)
        if labels.shape != (head.out_features,) or len(set(labels.tolist())) != head.out_features:
            raise ValueError(
                f"classes must be {head.out_features} distinct labels, one for each row of the head's weight; got "
                f"{len(set(labels.ravel().tolist()))} distinct ones of shape {labels.shape}"
            )
        estimator = cls(**{"fit_intercept": head.bias is not None, **parameters})
        weight = checks.widened(head.weight.detach()).cpu().clone()
        bias = weight.new_zeros(len(weight)) if head.bias is None else head.bias.detach().cpu().to(weight.dtype).clone()
        estimator.classes_, estimator.n_features_in_ = labels, head.in_features
        estimator._keep_head(weight, bias, like=None)
        return estimator

    @overload
    def decision_function(self, X: Tensor) -> Tensor: ...
    @overload
    def decision_function(self, X: Any) -> Array: ...
    def decision_function(self, X: Any) -> Array | Tensor:
        """Return the logits ``(n, C)``; for two classes ``(n,)``, that of the second minus that of the first."""
        check_is_fitted(self)
        rows = features_of(self, X, reset=False)
        head = to_tensor(self.coef_), to_tensor(self.intercept_)
        parts = []
        for x in feature_blocks(rows, len(head[0])):
            where = x.device if isinstance(x, Tensor) else None  # sparse rows are scipy's, on the CPU
            parts.append(linear(x, *(part.to(device=where or "cpu", dtype=x.dtype) for part in head)))
        logits = torch.cat(parts)
        return as_given(logits[:, 0] if len(self.classes_) == 2 else logits, X)

    @overload
    def predict_log_proba(self, X: Tensor) -> Tensor: ...
    @overload
    def predict_log_proba(self, X: Any) -> Array: ...
    def predict_log_proba(self, X: Any) -> Array | Tensor:
        """Return the logarithms of the probabilities, ``(n, C)``."""
        logits = torch.as_tensor(self.decision_function(X))
        if logits.ndim == 1:
            logits = torch.stack([-logits / 2, logits / 2], 1)
        return as_given(torch.log_softmax(logits, 1), X)

    @overload
    def predict_proba(self, X: Tensor) -> Tensor: ...
    @overload
    def predict_proba(self, X: Any) -> Array: ...
    def predict_proba(self, X: Any) -> Array | Tensor:
        """Return the probabilities of the classes, in the order of ``classes_``, ``(n, C)``."""
        return as_given(torch.as_tensor(self.predict_log_proba(X)).exp(), X)

    def predict(self, X: Any) -> Any:
        """Return each sample's most probable class, ``(n,)``; for a tensor, a tensor if the classes are numbers."""
        logits = torch.as_tensor(self.decision_function(X))
        index = (logits > 0).long() if logits.ndim == 1 else logits.argmax(1)
        labels = np.asarray(self.classes_)[index.cpu().numpy()]
        numbers = isinstance(X, Tensor) and labels.dtype.kind in "iufb"
        return torch.as_tensor(labels, device=X.device) if numbers else labels

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the share of samples whose label, or most probable class, is predicted."""
        if y is None:
            raise ValueError("y must be labels or distributions to score against; got None")
        predicted = to_numpy(self.predict(X))
        return float(accuracy_score(self._labels(y), predicted, sample_weight=to_numpy(sample_weight)))

    def covariance(
        self, X: Any, y: Any, sample_weight: Any = None, *, kind: CovarianceKind = "hessian", base_class: Any = None,
        block: Literal["full", "class"] = "full", memory_budget: int | None = None,
    ) -> Any:  # fmt: skip
        """Return the covariance of the coefficients, from the rows that they were fitted to, in float64.

        The coefficients of a class are its row of ``coef_`` and then its intercept, if there is one: ``s`` in all.
        Without a penalty (``C = inf``) only differences between classes are determined, so they are relative to a base
        class, which is left out. The same holds for two classes, as ``coef_`` is a difference.

        Args:
            X, y, sample_weight: Those of the fit. A weight counts how often its row occurs.
            kind: ``"hessian"``: the inverse of the Hessian of ``Σ w loss + ‖W‖² / (2 C)``. ``"sandwich"``: the robust
                form, with the sum of the outer products of the rows' gradients between two inverses; it holds if the
                model is not true, and for distributions in place of labels.
            base_class: The label of the base class. By default the first class without a penalty or for two classes,
                and otherwise none: the covariance is that of ``coef_`` and of intercepts that sum to zero.
            block: ``"full"``: the covariance of all coefficients of the ``m`` classes without the base, ``(m s, m s)``
                by classes and features. ``"class"``: of those within each class, ``(m, s, s)``, which for many classes
                needs much less memory.
            memory_budget: Bytes in addition to the rows; by default that of the estimator.

        Raises:
            ValueError: If the loss is not a likelihood (a cross-entropy or forward KL of labels or distributions), the
                classes are separable without a penalty, features are collinear, the budget is too small (the message
                has the bytes), or an argument cannot be used.

        Warns (``UserWarning``) if the coefficients are not at the minimum for these rows.

        Source: Huber 1967 and White 1980 for the sandwich form; ``MNLogit.cov_params()`` of statsmodels is the same.

        Example:
            >>> X, y = np.array([[0.0], [1.0], [2.0], [3.0]]), [0, 1, 0, 1]
            >>> model = softcurve.SoftmaxRegression(C=np.inf, tol=1e-8).fit(X, y)
            >>> model.covariance(X, y).diagonal().round(3)
            array([1.178, 3.9  ])
        """
        head, base = self._fitted_head(X, y, sample_weight, kind, base_class, memory_budget)
        checks.require_choice("block", block, ("full", "class"))
        if block == "full":
            full = full_covariance(head, base, kind=kind)
            result = full.reshape(full.shape[0] * full.shape[1], -1)
        else:
            result = class_covariances(head, base, kind=kind)
        return result.to(X.device) if isinstance(X, Tensor) else result.numpy()

    def summary(
        self, X: Any, y: Any, sample_weight: Any = None, *, kind: CovarianceKind = "hessian", base_class: Any = None,
        level: Real = 0.95, memory_budget: int | None = None,
    ) -> CoefficientSummary:  # fmt: skip
        """Return the coefficients with standard errors, z statistics, p values and confidence intervals.

        Printing the result shows a table. The arguments are those of :meth:`covariance`, and ``level`` is that of the
        intervals. With a penalty the coefficients are biased towards zero, so that intervals and p values are
        approximations.

        Raises what :meth:`covariance` does, and ``ValueError`` for a ``level`` that is not between 0 and 1. Warns
        (``UserWarning``) if the coefficients are not at the minimum, or if a standard error by the Hessian is so large
        that the rows hardly determine the coefficient, as for classes that are nearly separable.

        Example:
            >>> X, y = np.array([[0.0], [1.0], [2.0], [3.0]]), [0, 1, 0, 1]
            >>> model = softcurve.SoftmaxRegression(C=np.inf, tol=1e-8).fit(X, y)
            >>> model.summary(X, y).standard_error.round(3)
            array([[1.085, 1.975]])
        """
        level = checks.require_number("level", level, lambda value: 0.0 < value < 1.0, "between 0 and 1")
        head, base = self._fitted_head(X, y, sample_weight, kind, base_class, memory_budget)
        result = summarise(head, base, tuple(self.classes_.tolist()), kind=kind, level=level)
        if result.caution:
            warn_caller(result.caution)
        return result

    def _fitted_head(
        self, X: Any, y: Any, sample_weight: Any, kind: Any, base_class: Any, memory_budget: Any
    ) -> tuple[FittedHead, int | None]:
        """Return the head with the rows of its fit, and the index of the base class if there is one."""
        check_is_fitted(self)
        checks.require_choice("kind", kind, get_args(CovarianceKind))
        budget = self.memory_budget if memory_budget is None else memory_budget
        check_budget(budget)
        labels = self.classes_.tolist()
        C, base = self._strength(), None if base_class is None else _index_of(base_class, labels)
        if base is None and (len(labels) == 2 or math.isinf(C)):
            base = 0
        data = self._training_data(X, y, sample_weight, reset=False)
        if not np.array_equal(data.classes, self.classes_):
            raise ValueError(
                f"y must have the classes of the fit, {_shown(labels)}; got {_shown(data.classes.tolist())}: give the "
                "y of the fit"
            )
        source, weights = class_weighted(data, self.class_weight, self.loss)
        weight, bias = (part.double().cpu() for part in self._head())
        names = getattr(self, "feature_names_in_", None)
        head = FittedHead(
            source, weights, self.loss, weight, bias, (2.0 if len(labels) == 2 else 1.0) / C, bool(self.fit_intercept),
            feature_names(source.width) if names is None else tuple(names),
            budget_of(source, budget),
        )  # fmt: skip
        tolerance = 10.0 * max(float(self.tol), getattr(self, "gradient_max_", 0.0))
        if (
            to_tensor(self.coef_).dtype == torch.float32
        ):  # rounding the coefficients changes the logits and the gradient
            squares = float(head.moments.squares.max().clamp(min=1.0) * weight.abs().max().clamp(min=1.0))
            tolerance = max(tolerance, 16.0 * torch.finfo(torch.float32).eps * squares)
        if message := head.require_covariance(tolerance):
            warn_caller(message)
        return head, base

    def _strength(self) -> float:
        """Return the inverse strength of the penalty that the head was fitted with."""
        return float(self.C)

    def _labels(self, y: Any) -> Array:
        """Return labels as they are, and the most probable classes of distributions and lists."""
        if has_soft_targets(y):
            return np.asarray(np.asarray(self.classes_)[most_probable(y)])
        return np.asarray(to_numpy(y))

    def _check_parameters(self, C: Any) -> None:
        check_options(C, self.tol, self.max_iter, self.precision, self.memory_budget)
        if not isinstance(self.fit_intercept, bool | np.bool_):
            raise ValueError(f"fit_intercept must be True or False; got {self.fit_intercept!r}")
        if not (self.class_weight is None or self.class_weight == "balanced" or isinstance(self.class_weight, dict)):
            raise ValueError(f'class_weight must be a dict of labels, "balanced" or None; got {self.class_weight!r}')
        for label, weight in self.class_weight.items() if isinstance(self.class_weight, dict) else ():
            if not (np.isreal(weight) and np.isfinite(weight) and weight >= 0):
                raise ValueError(f"class_weight must be finite and not negative; that of {label!r} is {weight!r}")

    def _training_data(self, X: Any, y: Any, sample_weight: Any, *, reset: bool = True) -> TrainingData:
        """Check rows, targets and weights; ``reset`` for a new fit. Raises ValueError."""
        if y is None:
            raise ValueError(f"{type(self).__name__} requires y to be passed, but the target y is None")
        rows = features_of(self, X, reset=reset)
        weight = to_numpy(sample_weight)
        weights = to_tensor(_check_sample_weight(weight, rows, dtype=np.float64, ensure_non_negative=True))
        if has_soft_targets(y):
            target = y if isinstance(y, TopK | Tensor) else np.asarray(y)
            source: Source = to_source(rows, target, features_name="X", target_name="y")
            return TrainingData(rows, source, np.arange(len(source.classes)), None, weights)
        labels = column_or_1d(to_numpy(y), warn=True)
        check_consistent_length(rows, labels)
        if labels.dtype.kind == "f" and not np.isfinite(labels).all():
            raise ValueError("Input y contains NaN or infinity; drop or mend such rows")
        check_classification_targets(labels)
        classes, index = np.unique(labels, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(
                f"{type(self).__name__} needs samples of at least 2 classes in the data, but the data contains only "
                f"one class: {classes.tolist()[0]!r}"
            )
        names, index = tuple(range(len(classes))), index.astype(np.int64)
        source = to_source(rows, index, classes=names, features_name="X", target_name="y")
        return TrainingData(rows, source, classes, labels, weights)


def _index_of(base_class: Any, labels: list[Any]) -> int:
    """Return the place of a label. Raises ValueError if it is none of the classes."""
    if base_class not in labels:
        raise ValueError(f"base_class must be one of the classes {_shown(labels)}; got {base_class!r}")
    return labels.index(base_class)


def _shown(labels: list[Any]) -> str:
    return ", ".join(map(repr, labels[:8])) + (", …" if len(labels) > 8 else "")
