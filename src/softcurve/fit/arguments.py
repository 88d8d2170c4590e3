"""The arguments of the estimators: checks, and conversions between arrays, tensors and the rows of a source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn.utils.validation import validate_data
from torch import Tensor

from softcurve.fit.data.row_source import to_source
from softcurve.fit.data.source import Source, block_rows
from softcurve.fit.data.sparse_features import Features, SparseFeatures
from softcurve.losses.divergences import Divergence, divergence_of
from softcurve.losses.topk import TopK

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Checked arguments: ``source`` has the rows and targets, ``labels`` is ``None`` for soft targets."""

    rows: Any
    source: Source
    classes: Array
    labels: Array | None
    weights: Tensor


def class_weighted(data: TrainingData, class_weight: Any, loss: str | Divergence) -> tuple[Source, Tensor]:
    """Return the rows with their targets, and their weights, both with ``class_weight`` applied.

    The copies of a row with a distribution are weighted by the weight of their class, and the row by their sum.
    """
    classes, source, weights = data.classes, data.source, data.weights
    if class_weight is None:
        return source, weights
    if data.labels is not None:
        index = torch.as_tensor(np.searchsorted(classes, data.labels))
        mass = torch.zeros(len(classes), dtype=torch.float64).index_add_(0, index, weights)
        return source, weights * _class_weights(class_weight, classes, mass)[index]
    if source.kind != "distributions" or not divergence_of(loss).hessian_is_fisher:  # linear in the target
        raise ValueError(
            "class_weight of distributions is defined for the losses cross_entropy and forward_kl, and not for "
            f"a TopK; got loss {loss!r} and targets of kind {source.kind!r}: weight the rows by sample_weight"
        )
    target = torch.cat([block.target.double() for block in source.blocks(2**16)])  # type: ignore[union-attr]
    target *= _class_weights(class_weight, classes, weights @ target)
    mass = target.sum(1)
    target /= torch.where(mass > 0, mass, 1.0)[:, None]
    target[mass == 0] = 1.0 / len(classes)
    return to_source(data.rows, target, features_name="X", target_name="y"), weights * mass


def _class_weights(class_weight: Any, classes: Array, mass: Tensor) -> Tensor:
    """Return the weight of each class, whose rows have the total weight ``mass``; balancing gives 0 to a mass of 0.

    scikit-learn's ``compute_class_weight`` reads text such as "01" as the number 1, and divides by a mass of zero. Here
    a number also names the label that is its text.
    """
    if isinstance(class_weight, str):
        return torch.where(mass > 0, mass.sum() / (len(classes) * mass), 0.0)
    labels = classes.tolist()
    known = set(labels)
    weights = {str(name): float(weight) for name, weight in class_weight.items() if str(name) in known}
    weights |= {name: float(weight) for name, weight in class_weight.items() if name in known}
    unknown = [name for name in class_weight if name not in weights and str(name) not in weights]
    if unknown and len(weights) < len(labels):  # if every class has a weight, the dict may name others
        shown = ", ".join(map(repr, labels[:8])) + (", …" if len(labels) > 8 else "")
        raise ValueError(f"class_weight names {unknown[0]!r}, which is none of the {len(labels)} classes ({shown})")
    return torch.tensor([weights.get(label, 1.0) for label in labels], dtype=torch.float64)


def has_soft_targets(y: Any) -> bool:
    """Whether targets are distributions or lists, and not labels. Raises ValueError for a sparse target."""
    sparse = issparse(y)
    if sparse or (isinstance(y, Tensor) and y.layout != torch.strided):
        what = "y.toarray()" if sparse else "y.to_dense()"
        raise ValueError(
            f"y must be dense, labels (n,) or distributions (n, C); got a sparse {type(y).__name__} of shape "
            f"{tuple(getattr(y, 'shape', ()))}: give {what}, or a softcurve.TopK of the largest entries of each row"
        )
    nested = isinstance(y, list) and bool(y) and isinstance(y[0], list | tuple | np.ndarray) and len(y[0]) > 1
    return nested or isinstance(y, TopK) or (getattr(y, "ndim", 1) == 2 and y.shape[1] > 1)


def most_probable(y: Any) -> Array:
    """Return the most probable class of each row of distributions or lists."""
    return y.most_probable.cpu().numpy() if isinstance(y, TopK) else np.asarray(to_numpy(y)).argmax(1)


def features_of(estimator: Any, X: Any, *, reset: bool) -> Any:
    """Check rows as scikit-learn does. A memory map is not read here, since its blocks are checked when they are.

    Rows to predict stay on their device; those to fit come to the CPU, where the solver is.
    """
    if isinstance(X, np.memmap) and X.ndim == 2 and X.dtype.kind == "f":
        if reset:
            estimator.n_features_in_ = X.shape[1]
        else:
            _require_width(estimator, X)
        return X
    if isinstance(X, Tensor):
        if X.layout != torch.strided:
            raise ValueError(f"X must be a dense tensor; got layout {X.layout}: convert it to scipy's CSR")
        if X.device.type != "cpu" and not reset and X.ndim == 2:
            _require_width(estimator, X)
            if not X.isfinite().all():
                raise ValueError("Input X contains NaN or infinity; drop or fill such rows")
            return X.detach().float() if X.dtype in (torch.bfloat16, torch.float32) else X.detach().double()
        X = X.detach().cpu()
        X = (X.float() if X.dtype == torch.bfloat16 else X).numpy()
    return validate_data(estimator, X, reset=reset, accept_sparse="csr", dtype=[np.float64, np.float32])


def _require_width(estimator: Any, X: Any) -> None:
    if X.shape[1] != estimator.n_features_in_:
        raise ValueError(
            f"X has {X.shape[1]} features, but {type(estimator).__name__} is expecting "
            f"{estimator.n_features_in_} features as input."
        )


def feature_blocks(rows: Any, classes: int) -> Iterator[Features]:
    """Yield checked rows to predict, block by block where they are not in writable memory."""
    if isinstance(rows, Tensor):
        yield rows
        return
    if isinstance(rows, np.ndarray) and not isinstance(rows, np.memmap) and rows.flags.writeable:
        yield torch.as_tensor(np.ascontiguousarray(rows))
        return
    source = to_source(rows, features_name="X")
    for block in source.blocks(block_rows(source, classes)):
        yield block.features if isinstance(block.features, SparseFeatures) else block.features.clone()


def to_numpy(value: Any) -> Any:
    """Return a tensor as an array, and anything else as it is."""
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else value


def to_tensor(array: Any) -> Tensor:
    """Return an array as a tensor. A read-only array is copied, because torch warns of it."""
    return torch.as_tensor(np.require(array, requirements=["C", "W"]) if isinstance(array, np.ndarray) else array)


def as_given(result: Tensor, like: Any) -> Array | Tensor:
    """Return a tensor on its device if ``like`` is one, else an array; in the dtype of ``like`` if it is floating."""
    dtype = str(getattr(like, "dtype", "")).removeprefix("torch.")
    result = result.float() if dtype == "float32" else result.double() if dtype == "float64" else result
    return result.to(like.device) if isinstance(like, Tensor) else result.cpu().numpy()
