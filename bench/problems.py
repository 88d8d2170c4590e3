"""Classification problems from fixed random numbers or from text, and the evaluation of a fitted head.

The objective is ``Σ loss_i / n + ½ λ ‖W‖²`` in nats. The intercept is not penalised. λ is 1/(C n) for scikit-learn's C.
"""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BEFORE_REDUCTION = 20_000  # the most frequent words or pairs, of which the reduced problems are made
AROUND = 4  # words before and after the masked one


class Shape(NamedTuple):
    """The numbers of samples, features and classes."""

    rows: int
    width: int
    classes: int

    def __str__(self) -> str:
        return f"({self.rows}, {self.width}, {self.classes})"


@dataclass(frozen=True)
class Problem:
    """A problem; ``make(shape)`` returns samples ``(n, d)`` and labels ``(n,)`` or distributions ``(n, C)``.

    The samples are an array or a scipy CSR matrix.
    """

    what: str
    make: Callable[[Shape], tuple[Any, Array]]
    shape: Shape
    penalty: float


def digits(shape: Shape) -> tuple[Array, Array]:
    """Return scikit-learn's digits (at most 1,797, ten classes) as ``width`` random Fourier features."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    frequencies = 0.5 * rng.normal(size=(pixels.shape[1], shape.width))
    phases = rng.uniform(0, 2 * np.pi, shape.width)
    rows = np.sqrt(2) * np.cos(pixels[: shape.rows] / 16 @ frequencies + phases)
    return rows, labels[: shape.rows]


def power_law(shape: Shape) -> tuple[Array, Array]:
    """Return rotated features with standard deviations ∝ 1/j, and labels sampled from a softmax teacher."""
    rng = np.random.default_rng(1)
    rows = _rotated(rng, _decaying(rng, shape, power=1.0))
    logits = rows @ rng.normal(size=(shape.width, shape.classes)) * 3 / np.sqrt(shape.width)
    return rows, _consecutive((logits + rng.gumbel(size=logits.shape)).argmax(1))


def rare_classes(shape: Shape) -> tuple[Array, Array]:
    """Return normal clusters around one centre per class; class k has a frequency ∝ 1/k and at least one sample."""
    rng = np.random.default_rng(2)
    centres = rng.normal(size=(shape.classes, shape.width))
    shares = 1 / np.arange(1, shape.classes + 1)
    labels = rng.choice(shape.classes, size=shape.rows, p=shares / shares.sum())
    labels[: shape.classes] = np.arange(shape.classes)
    return 0.35 * centres[labels] + rng.normal(size=(shape.rows, shape.width)), labels


def near_separable(shape: Shape) -> tuple[Array, Array]:
    """Return rotated features with standard deviations ∝ 1/j, and noisy predictions of a linear teacher as labels.

    About three per cent of the labels differ from the teacher's prediction, at small margins. A head with this many
    features still separates all samples, with large weights for small features.
    """
    rng = np.random.default_rng(3)
    unrotated = _decaying(rng, shape, power=1.0)
    teacher = rng.normal(size=(shape.width, shape.classes)) * np.arange(1, shape.width + 1)[:, None] ** 0.25
    logits = unrotated @ teacher
    logits += 0.02 * logits.std() * rng.gumbel(size=logits.shape)
    return _rotated(rng, unrotated), _consecutive(logits.argmax(1))


def soft_labels(shape: Shape) -> tuple[Array, Array]:
    """Return rotated features with standard deviations ∝ 1/√j, and distributions of a teacher with noisy logits."""
    rng = np.random.default_rng(4)
    rows = _rotated(rng, _decaying(rng, shape, power=0.5))
    logits = rows @ rng.normal(size=(shape.width, shape.classes)) * 3 / np.sqrt(shape.width)
    return rows, _softmax(logits + rng.normal(size=logits.shape))[0]


def text(shape: Shape, *, ngrams: int) -> tuple[Any, Array]:
    """Return sparse TF-IDF rows of source lines of Python's standard library, and the number of the module of each.

    The modules are the largest top-level files, and each has equally many lines, its first with eight letters or more.
    The features are the most frequent words, or sequences of up to ``ngrams`` words.
    """
    lines: list[str] = []
    labels: list[int] = []
    for label, module in enumerate(_modules()[: shape.classes]):
        chosen = [line for line in module.splitlines() if sum(map(str.isalpha, line)) >= 8]
        chosen = chosen[: -(-shape.rows // shape.classes)]
        lines += chosen
        labels += [label] * len(chosen)
    return _tf_idf(lines, ngrams, shape.width), np.array(labels)


def dense_text(shape: Shape) -> tuple[Array, Array]:
    """Return :func:`text` of words and pairs of words, reduced to ``width`` dense features."""
    rows, labels = text(Shape(shape.rows, BEFORE_REDUCTION, shape.classes), ngrams=2)
    return _reduced(rows, shape.width), labels


def masked_words(shape: Shape) -> tuple[Array, Array]:
    """Return the words around a word of Python's standard library as dense features, and the word as the label.

    The words are the most frequent ones of the top-level files. Each has equally many rows, at occurrences that are
    evenly spaced, with the ``AROUND`` words before and after it, alone and with their positions.
    """
    words = [word for module in _modules() for word in re.findall(r"[a-z]{2,}", module.lower())]
    places: dict[str, list[int]] = {}
    for place, word in enumerate(words[AROUND:-AROUND], AROUND):
        places.setdefault(word, []).append(place)
    frequent = sorted(places, key=lambda word: (-len(places[word]), word))[: shape.classes]
    contexts: list[str] = []
    labels: list[int] = []
    for label, word in enumerate(frequent):
        count = min(-(-shape.rows // shape.classes), len(places[word]))
        for place in (places[word][len(places[word]) * i // count] for i in range(count)):
            around = (shift for shift in range(-AROUND, AROUND + 1) if shift)
            contexts.append(" ".join(f"{words[place + shift]} {words[place + shift]}_{shift % 9}" for shift in around))
            labels.append(label)
    return _reduced(_tf_idf(contexts, 1, BEFORE_REDUCTION), shape.width), np.array(labels)


PROBLEMS = {
    "digits": Problem("digits, random Fourier features", digits, Shape(1797, 512, 10), 1e-5),
    "power-law": Problem("features of power-law scales", power_law, Shape(20_000, 256, 100), 1e-5),
    "rare-classes": Problem("class frequencies by Zipf's law", rare_classes, Shape(20_000, 128, 2000), 1e-5),
    "near-separable": Problem(
        "a linear teacher's choice, blurred at its margins", near_separable, Shape(8000, 128, 30), 1e-6
    ),
    "soft-labels": Problem("distributions; of scikit-learn n C weighted rows", soft_labels, Shape(3000, 128, 10), 1e-5),
    "dense-text": Problem("TF-IDF of words and pairs, reduced by SVD", dense_text, Shape(20_000, 384, 58), 1e-5),
    "dense-text-weak": Problem("the same with a weaker penalty", dense_text, Shape(20_000, 384, 58), 1e-6),
    "masked-words": Problem(
        "TF-IDF of the words around, reduced by SVD; C = 10", masked_words, Shape(60_000, 384, 2000), 1 / 600_000
    ),
    "text-words": Problem("TF-IDF of words, sparse", partial(text, ngrams=1), Shape(31_900, 6000, 58), 3e-6),
    "text-bigrams": Problem(
        "TF-IDF of words and pairs of words, sparse", partial(text, ngrams=2), Shape(31_900, 60_000, 58), 3e-6
    ),
}


def judge(rows: Any, target: Array, penalty: float, weight: Array, bias: Array) -> dict[str, float]:
    """Return the objective, the largest entry of its gradient, and the accuracy, computed in float64."""
    rows, weight, bias = (array.astype(np.float64) for array in (rows, weight, bias))
    if target.ndim == 1:
        target = np.eye(len(weight))[target]
    logits = rows @ weight.T + bias
    probabilities, log_sums = _softmax(logits)
    losses = log_sums * target.sum(1) - (target * logits).sum(1)
    residual = (probabilities * target.sum(1, keepdims=True) - target) / len(target)
    gradients = residual.T @ rows + penalty * weight, residual.sum(0)
    return {
        "gradient": max(float(abs(gradient).max()) for gradient in gradients),
        "objective": float(losses.mean() + penalty / 2 * (weight**2).sum()),
        "accuracy": float((logits.argmax(1) == target.argmax(1)).mean()),
    }


def _softmax(logits: Array) -> tuple[Array, Array]:
    """Return the probabilities and the log-sum-exps ``(n,)``."""
    largest = logits.max(1, keepdims=True)
    exponentials = np.exp(logits - largest)
    sums = exponentials.sum(1, keepdims=True)
    return exponentials / sums, (largest + np.log(sums))[:, 0]


def _decaying(rng: np.random.Generator, shape: Shape, *, power: float) -> Array:
    """Return normal features with standard deviations ∝ ``j^−power`` and a mean variance of 1."""
    scales = np.arange(1, shape.width + 1) ** -power
    return rng.normal(size=(shape.rows, shape.width)) * scales / np.sqrt((scales**2).mean())


def _rotated(rng: np.random.Generator, rows: Array) -> Array:
    rotation = np.linalg.qr(rng.normal(size=(rows.shape[1], rows.shape[1])))[0]
    return rows @ rotation


def _modules() -> list[str]:
    """Return the text of the top-level files of Python's standard library, the largest first."""
    files = Path(sysconfig.get_path("stdlib")).glob("*.py")
    ordered = sorted(files, key=lambda file: (-file.stat().st_size, file.name))
    return [file.read_text(encoding="utf-8", errors="replace") for file in ordered]


def _tf_idf(texts: list[str], ngrams: int, width: int) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(sublinear_tf=True, ngram_range=(1, ngrams), max_features=width).fit_transform(texts)


def _reduced(rows: Any, width: int) -> Array:
    """Project sparse rows on their first ``width`` singular vectors, and scale them to a norm of 1, as LSA does."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.preprocessing import normalize

    svd = TruncatedSVD(min(width, min(rows.shape) - 1), random_state=0)
    reduced: Array = normalize(svd.fit_transform(rows))
    return reduced


def _consecutive(labels: Array) -> Array:
    """Renumber the labels from 0 without gaps, because no sample may have drawn a class."""
    return np.unique(labels, return_inverse=True)[1]
