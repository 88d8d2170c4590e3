"""Multinomial logistic regression as a scikit-learn classifier, for labels and for distributions."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import Tags, check_consistent_length, column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor

from softcurve.fit.data.memory import to_source
from softcurve.fit.data.source import Source, rows_within
from softcurve.fit.fitting import Fit, fit_head
from softcurve.fit.solver.newton import Step
from softcurve.losses.divergences import Divergence
from softcurve.losses.targets import TopK
from softcurve.typing import FitLoss, FitPrecision

__all__ = ["SoftmaxRegression"]

Array = NDArray[Any]
Real = int | float | np.integer[Any] | np.floating[Any]
Whole = int | np.integer[Any]


class SoftmaxRegression(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Multinomial logistic regression, fitted by second order; the objective and coefficients of scikit-learn's.

    ``LogisticRegression(C=C).fit(X, y, sample_weight)`` minimises the same ``½ ‖W‖² + C Σ w_i loss_i``, and so has the
    same ``coef_`` and ``intercept_``. Here ``y`` may also be a distribution for each row, and the loss another one.

    ``y`` is one of: labels ``(n,)``; distributions ``(n, C)``, which are the weights of a row's copies with each label;
    a :class:`softcurve.TopK`, a teacher's list. Of the latter two the classes are 0…C-1. ``X`` is dense, sparse (made
    dense block by block), a ``numpy.memmap`` (never held as a whole), or a torch tensor; the latter has tensors come
    out. Losses are in nats.

    Args:
        C: Inverse strength of the penalty, ``inf`` for none.
        loss: ``cross_entropy``, ``forward_kl``: D(target‖model), ``reverse_kl``: D(model‖target), or ``js`` (β = ½).
        fit_intercept: Whether there is a bias. It is not penalised.
        tol: The fit has converged when no entry of the gradient of the mean objective, ``½ ‖W‖² / (C Σ w) + Σ w loss /
            Σ w``, exceeds this, in float64, and an undamped Newton step would gain at most ``tol / 50`` nats, which
            depends neither on the units of the features nor on the number of classes. At least one step is made.
        max_iter: Newton steps at most.
        class_weight: A dict of labels and weights, or ``"balanced"``: they multiply the weights of the rows; of a
            distribution (cross-entropy and forward KL alone) those of the row's copies. A label that is not named has
            weight 1.
        warm_start: Whether a second fit starts from the last one's coefficients, where the objective is lower there
            than without.
        precision: ``mixed``: products in float32, the objective and its gradient in float64; ``float64``; or ``auto``:
            ``mixed``, but where float32 would save nothing.
        memory_budget: Bytes beyond the rows; by default 1 GiB, or 256 MiB for a ``numpy.memmap``.
        verbose: Whether each step is printed.

    Attributes: ``classes_``, ``coef_`` ``(C, d)`` and ``intercept_`` ``(C,)``, or ``(1, d)`` and ``(1,)`` of two
    classes' difference, in the dtype of ``X``; ``n_iter_``; ``objective_`` (of the mean, in nats); ``gradient_max_``;
    ``history_``, a record for each step; ``n_features_in_``, ``feature_names_in_``.
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
        self,
        *,
        C: Real = 1.0,
        loss: FitLoss | Divergence = "cross_entropy",
        fit_intercept: bool = True,
        tol: Real = 1e-4,
        max_iter: Whole = 100,
        class_weight: Mapping[Any, Any] | Literal["balanced"] | None = None,
        warm_start: bool = False,
        precision: FitPrecision = "auto",
        memory_budget: int | None = None,
        verbose: bool = False,
    ) -> None:
        self.C = C
        self.loss = loss
        self.fit_intercept = fit_intercept
        self.tol = tol
        self.max_iter = max_iter
        self.class_weight = class_weight
        self.warm_start = warm_start
        self.precision = precision
        self.memory_budget = memory_budget
        self.verbose = verbose

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> SoftmaxRegression:
        """Fit to rows ``X`` ``(n, d)`` and targets ``y``; ``sample_weight`` ``(n,)`` is ≥ 0.

        Raises ``ValueError`` for anything that cannot be used. Warns (``ConvergenceWarning``) where ``max_iter`` steps
        were not enough, or where the loss has no minimum: without a penalty, on classes that can be separated.
        """
        self._require("C", "tol")
        problem = posed(self, X, y, sample_weight)
        source, weights = class_weighted(self, problem)
        fit = fit_head(
            source,
            loss=self.loss,
            C=float(self.C),
            fit_intercept=self.fit_intercept,
            sample_weight=weights,
            tol=float(self.tol),
            max_iter=int(self.max_iter),
            precision=self.precision,
            memory_budget=self.memory_budget,
            start=self._start(problem.classes) if self.warm_start else None,
            on_step=print if self.verbose else lambda step: None,
        )
        warn_of(fit, self)
        self.classes_ = problem.classes
        self._keep(fit, like=X)
        return self

    def _keep(self, fit: Fit, *, like: Any) -> None:
        self._keep_head(fit.weight, fit.bias, like=like)
        self.n_iter_ = np.array([fit.iterations], dtype=np.int32)
        self.objective_, self.gradient_max_, self.history_ = fit.objective, fit.gradient_max, fit.history

    def _keep_head(self, weight: Tensor, bias: Tensor, *, like: Any) -> None:
        if len(bias) == 2:
            weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
        self.coef_, self.intercept_ = as_given(weight, like), as_given(bias, like)

    def _start(self, classes: Array) -> tuple[Tensor, Tensor] | None:
        """The last fit's head, if it has the shape of this one and is finite."""
        if not hasattr(self, "coef_") or not np.array_equal(self._fitted_classes(), classes):
            return None
        weight, bias = self._head()
        finite = bool(weight.isfinite().all() and bias.isfinite().all())
        return (weight, bias) if finite and weight.shape[1] == self.n_features_in_ else None

    def _fitted_classes(self) -> Array:
        return np.asarray(self.classes_)

    def _head(self) -> tuple[Tensor, Tensor]:
        """Weight and bias in float64, a row for each class."""
        weight, bias = to_tensor(self.coef_).double(), to_tensor(self.intercept_).double()
        if len(self.classes_) == 2:
            weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
        return weight, bias

    @overload
    def decision_function(self, X: Tensor) -> Tensor: ...
    @overload
    def decision_function(self, X: Any) -> Array: ...
    def decision_function(self, X: Any) -> Array | Tensor:
        """Logits ``(n, C)``; of two classes ``(n,)``, the second's minus the first's."""
        check_is_fitted(self)
        rows = features_of(self, X, reset=False)
        coef, intercept = to_tensor(self.coef_), to_tensor(self.intercept_)
        parts = [torch.addmm(intercept.to(x.dtype), x, coef.to(x.dtype).T) for x in _blocks(rows, len(coef))]
        logits = torch.cat(parts)
        return as_given(logits[:, 0] if len(self.classes_) == 2 else logits, X)

    @overload
    def predict_log_proba(self, X: Tensor) -> Tensor: ...
    @overload
    def predict_log_proba(self, X: Any) -> Array: ...
    def predict_log_proba(self, X: Any) -> Array | Tensor:
        """Logarithms of the probabilities, ``(n, C)``."""
        logits = torch.as_tensor(self.decision_function(X))
        if logits.ndim == 1:
            logits = torch.stack([-logits / 2, logits / 2], 1)
        return as_given(torch.log_softmax(logits, 1), X)

    @overload
    def predict_proba(self, X: Tensor) -> Tensor: ...
    @overload
    def predict_proba(self, X: Any) -> Array: ...
    def predict_proba(self, X: Any) -> Array | Tensor:
        """Probabilities of the classes, in the order of ``classes_``, ``(n, C)``."""
        return as_given(torch.as_tensor(self.predict_log_proba(X)).exp(), X)

    def predict(self, X: Any) -> Any:
        """The most probable class of each row, ``(n,)``; a tensor for a tensor, where the classes are numbers."""
        logits = torch.as_tensor(self.decision_function(X))
        index = (logits > 0).long() if logits.ndim == 1 else logits.argmax(1)
        labels = np.asarray(self.classes_)[index.numpy()]
        return torch.as_tensor(labels) if isinstance(X, Tensor) and labels.dtype.kind in "iufb" else labels

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The share of rows whose label is predicted; the label of a distribution is its most probable class."""
        if y is None:
            raise ValueError("y must be labels or distributions to score against; got None")
        return float(super().score(X, self._labels(y), sample_weight))

    def _labels(self, y: Any) -> Array:
        """Labels as they are given, or those of distributions and lists."""
        require_dense(y)
        if is_soft(y):
            return np.asarray(np.asarray(self.classes_)[target_labels(y)])
        return y.detach().cpu().numpy() if isinstance(y, Tensor) else np.asarray(y)

    def _require(self, *positive: str) -> None:
        for name in positive:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, float | int | np.number) or not value > 0:
                raise ValueError(f"{name} must be a positive number; got {value!r}")
        if not isinstance(self.max_iter, int | np.integer) or self.max_iter < 0:
            raise ValueError(f"max_iter must be an integer of 0 or more; got {self.max_iter!r}")
        if not isinstance(self.fit_intercept, bool | np.bool_):
            raise ValueError(f"fit_intercept must be True or False; got {self.fit_intercept!r}")
        if self.memory_budget is not None and not isinstance(self.memory_budget, int | np.integer):
            raise ValueError(f"memory_budget must be an integer number of bytes, or None; got {self.memory_budget!r}")
        if not (self.class_weight is None or self.class_weight == "balanced" or isinstance(self.class_weight, dict)):
            raise ValueError(f'class_weight must be a dict of labels, "balanced" or None; got {self.class_weight!r}')
        if isinstance(self.class_weight, dict):
            for label, weight in self.class_weight.items():
                if not (np.isreal(weight) and np.isfinite(weight) and weight >= 0):
                    raise ValueError(f"class_weight must be finite and not negative; that of {label!r} is {weight!r}")


# --- what comes in ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Posed:
    """What came, checked: ``source`` has the rows and targets, ``labels`` is ``None`` for soft targets."""

    rows: Any
    source: Source
    classes: Array
    labels: Array | None
    weights: Tensor


def posed(estimator: Any, X: Any, y: Any, sample_weight: Any) -> Posed:
    """Check rows, targets and weights. Raises ValueError."""
    if y is None:
        raise ValueError(f"{type(estimator).__name__} requires y to be passed, but the target y is None")
    rows = features_of(estimator, X, reset=True)
    weights = to_tensor(_check_sample_weight(sample_weight, rows, dtype=np.float64, ensure_non_negative=True))
    require_dense(y)
    if is_soft(y):
        target = y if isinstance(y, TopK | Tensor) else np.asarray(y)
        source: Source = to_source(rows, target, features_name="X", target_name="y")
        return Posed(rows, source, np.arange(len(source.classes)), None, weights)
    labels = column_or_1d(y.detach().cpu().numpy() if isinstance(y, Tensor) else y, warn=True)
    check_consistent_length(rows, labels)
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        raise ValueError("Input y contains NaN or infinity; drop or mend such rows")
    check_classification_targets(labels)
    classes, index = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(
            f"{type(estimator).__name__} needs samples of at least 2 classes in the data, but the data contains only "
            f"one class: {classes.tolist()[0]!r}"
        )
    source = to_source(
        rows, index.astype(np.int64), classes=tuple(range(len(classes))), features_name="X", target_name="y"
    )
    return Posed(rows, source, classes, labels, weights)


def class_weighted(estimator: Any, problem: Posed) -> tuple[Source, Tensor]:
    """Targets and weights of the rows, with ``class_weight`` in them."""
    classes, labels, weights = problem.classes, problem.labels, problem.weights
    if estimator.class_weight is None:
        return problem.source, weights
    if labels is None:
        return _reweighted(estimator, problem.rows, problem.source, classes, weights)
    index = torch.as_tensor(np.searchsorted(classes, labels))
    mass = torch.zeros(len(classes), dtype=torch.float64).index_add_(0, index, weights)
    return problem.source, weights * _weights_of_classes(estimator.class_weight, classes, mass)[index]


def _reweighted(estimator: Any, rows: Any, source: Source, classes: Array, weights: Tensor) -> tuple[Source, Tensor]:
    """Class weights of distributions: each row's copies with a label are weighted by it, and the row by their sum."""
    if source.kind != "distributions" or estimator.loss not in ("cross_entropy", "forward_kl"):
        raise ValueError(
            "class_weight of distributions is defined for the losses cross_entropy and forward_kl alone, and not for a "
            f"TopK; got loss {estimator.loss!r} and targets of kind {source.kind!r}: weight the rows by sample_weight"
        )
    target = torch.cat([block.target.double() for block in source.blocks(2**16)])  # type: ignore[union-attr]
    target *= _weights_of_classes(estimator.class_weight, classes, weights @ target)
    mass = target.sum(1)
    target /= torch.where(mass > 0, mass, 1.0)[:, None]
    target[mass == 0] = 1.0 / len(classes)
    return to_source(rows, target, features_name="X", target_name="y"), weights * mass


def _weights_of_classes(class_weight: Any, classes: Array, mass: Tensor) -> Tensor:
    """The weight of each class, of which the rows have ``mass``; a class without any has no weight to be balanced by.

    scikit-learn's ``compute_class_weight`` reads text such as "01" as the number 1, and divides by a mass of zero. A
    number names a label that is its text here too.
    """
    if isinstance(class_weight, str):
        return torch.where(mass > 0, mass.sum() / (len(classes) * mass), 0.0)
    known, named, unknown = set(classes.tolist()), {}, []
    for name, weight in class_weight.items():
        if name in known:
            named[name] = float(weight)
        elif str(name) in known:
            named.setdefault(str(name), float(weight))
        else:
            unknown.append(name)
    if unknown and len(named) < len(known):  # with a weight for every class, others may be named
        shown = ", ".join(map(repr, classes[:8].tolist())) + (", …" if len(classes) > 8 else "")
        raise ValueError(f"class_weight names {unknown[0]!r}, which is none of the {len(classes)} classes ({shown})")
    return torch.tensor([named.get(label, 1.0) for label in classes.tolist()], dtype=torch.float64)


def require_dense(y: Any) -> None:
    """Raise ValueError for a sparse target."""
    sparse = issparse(y)
    if sparse or (isinstance(y, Tensor) and y.layout != torch.strided):
        what = "y.toarray()" if sparse else "y.to_dense()"
        raise ValueError(
            f"y must be dense, labels (n,) or distributions (n, C); got a sparse {type(y).__name__} of shape "
            f"{tuple(getattr(y, 'shape', ()))}: give {what}, or a softcurve.TopK of the largest entries of each row"
        )


def is_soft(y: Any) -> bool:
    """Whether targets are distributions or lists, not labels."""
    return (
        isinstance(y, TopK)
        or (getattr(y, "ndim", 1) == 2 and y.shape[1] > 1)
        or (isinstance(y, list) and bool(y) and isinstance(y[0], list | tuple | np.ndarray) and len(y[0]) > 1)
    )


def target_labels(y: Any) -> Array:
    """The most probable class of each row's distribution."""
    if isinstance(y, TopK):
        return y.indices.gather(1, y.log_probs.argmax(1, keepdim=True))[:, 0].numpy()
    labels: Array = np.asarray(y).argmax(1)
    return labels


def features_of(estimator: Any, X: Any, *, reset: bool) -> Any:
    """Checked as scikit-learn does; but of a memory map nothing is read, as its blocks are checked on the way."""
    if isinstance(X, np.memmap) and X.ndim == 2 and X.dtype.kind == "f":
        if reset:
            estimator.n_features_in_ = X.shape[1]
        elif X.shape[1] != estimator.n_features_in_:
            raise ValueError(
                f"X has {X.shape[1]} features, but {type(estimator).__name__} is expecting "
                f"{estimator.n_features_in_} features as input."
            )
        return X
    if isinstance(X, Tensor):
        if X.layout != torch.strided:
            raise ValueError(f"X must be a dense tensor; got layout {X.layout}: convert it to scipy's CSR")
        X = X.detach().cpu()
        X = (X.float() if X.dtype == torch.bfloat16 else X).numpy()
    return validate_data(estimator, X, reset=reset, accept_sparse="csr", dtype=[np.float64, np.float32])


def _blocks(rows: Any, classes: int) -> Iterator[Tensor]:
    if isinstance(rows, np.ndarray) and not isinstance(rows, np.memmap) and rows.flags.writeable:
        yield torch.as_tensor(np.ascontiguousarray(rows))
        return
    for block in to_source(rows, features_name="X").blocks(rows_within(classes, rows.shape[1])):
        yield block.features.clone()


def to_tensor(array: Any) -> Tensor:
    """The array's tensor; a copy where it cannot be written to, as torch would warn of it."""
    return torch.as_tensor(np.require(array, requirements=["C", "W"]) if isinstance(array, np.ndarray) else array)


# --- what goes out ------------------------------------------------------------------------------------------------


def as_given(result: Tensor, like: Any) -> Array | Tensor:
    """A tensor for a tensor, or else an array; in the dtype of what came, where that is a floating-point one."""
    dtype = str(getattr(like, "dtype", "")).removeprefix("torch.")
    result = result.float() if dtype == "float32" else result.double() if dtype == "float64" else result
    return result if isinstance(like, Tensor) else result.numpy()


def warn_of(fit: Fit, estimator: Any) -> None:
    """Say honestly where there is no minimum, or where it was not reached."""
    if fit.separated:
        warnings.warn(
            "the classes can be separated, and without a penalty (C = inf) the loss has no minimum: it falls forever "
            f"as the weights grow; the fit ended where the gradient was {fit.gradient_max:.1e}. Give a finite C",
            ConvergenceWarning,
            stacklevel=3,
        )
    elif not fit.converged:
        warnings.warn(
            f"the fit has not converged: the largest entry of the gradient is {fit.gradient_max:.1e} and tol "
            f"{estimator.tol:.1e}; {fit.reason}",
            ConvergenceWarning,
            stacklevel=3,
        )
