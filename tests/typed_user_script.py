"""Calls as a user writes them, with the types that a checker must see; checked and run by test_typing.py."""

from __future__ import annotations

from typing import Any, assert_type

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import softcurve as sc
from softcurve.typing import KLDirection, ReductionKind

features = torch.randn(6, 4, requires_grad=True)
head = torch.nn.Linear(4, 5)
labels = torch.tensor([0, 1, 2, 3, 4, 0])
teacher = torch.randn(6, 5)
listed = sc.TopK(labels[:, None], torch.full((6, 1), -0.5), tail="bucket")
asked = bool(torch.rand(()) < 2)

# --- on logits
assert_type(sc.cross_entropy(head(features), labels, temperature=2, base=2), Tensor)
assert_type(sc.cross_entropy(teacher, labels, temperature=np.float32(2), z_loss=torch.tensor(1e-4)), Tensor)
assert_type(sc.kl_divergence(teacher, head(features), reduction="none"), Tensor)
assert_type(sc.js_divergence(teacher, sc.Logits(teacher), beta=0.25, reduction="sum"), Tensor)
assert_type(sc.entropy(teacher), Tensor)
assert_type(sc.softmax_jacobian(teacher), Tensor)


def reduced(kind: ReductionKind, direction: KLDirection) -> Tensor:
    """Options that are passed on."""
    return sc.linear_kl_divergence(features, head.weight, sc.Logits(teacher), direction=direction, reduction=kind)


assert_type(reduced("sum", "reverse"), Tensor)

# --- on a head: return_stats decides on the type
assert_type(sc.linear_cross_entropy(features, head.weight, labels), Tensor)
assert_type(sc.linear_cross_entropy(features, head.weight, labels, return_stats=False), Tensor)
assert_type(sc.linear_cross_entropy(features, head.weight, labels, return_stats=True), tuple[Tensor, sc.LossStats])
assert_type(
    sc.linear_cross_entropy(features, head.weight, labels, return_stats=asked), Tensor | tuple[Tensor, sc.LossStats]
)
assert_type(sc.linear_kl_divergence(features, head.weight, listed), Tensor)
assert_type(sc.linear_kl_divergence(features, head.weight, listed, return_stats=True), tuple[Tensor, sc.LossStats])
assert_type(sc.linear_js_divergence(features, head.weight, listed, beta=1), Tensor)
assert_type(sc.linear_js_divergence(features, head.weight, listed, return_stats=True), tuple[Tensor, sc.LossStats])
loss, stats = sc.linear_cross_entropy(features, head.weight, labels, linear_bias=head.bias, return_stats=True)
assert_type(loss, Tensor)
assert_type(stats.correct, Tensor)

# --- modules: a call has the types of forward
of_logits = sc.nn.CrossEntropyLoss(label_smoothing=0.1)
assert_type(of_logits(teacher, labels), Tensor)
assert_type(sc.nn.KLDivergenceLoss(reduction="mean")(teacher, teacher), Tensor)
assert_type(sc.nn.JSDivergenceLoss(beta=0.5)(teacher, teacher), Tensor)
assert_type(sc.nn.DivergenceLoss(sc.AlphaDivergence(0.5))(teacher, teacher), Tensor)
of_head = sc.nn.LinearCrossEntropyLoss(4, 5, reduction="sum")
assert_type(of_head(features, labels), Tensor)
assert_type(of_head(features, labels, return_stats=True), tuple[Tensor, sc.LossStats])
reverse = sc.nn.LinearKLDivergenceLoss(4, 5, direction="reverse")
assert_type(reverse(features, sc.Logits(teacher)), Tensor)
assert_type(reverse(features, sc.Logits(teacher), return_stats=True), tuple[Tensor, sc.LossStats])
assert_type(sc.nn.LinearJSDivergenceLoss(4, 5)(features, listed, return_stats=True), tuple[Tensor, sc.LossStats])

skewed = sc.nn.LinearDivergenceLoss(4, 5, divergence=sc.SkewKL(0.1))
assert_type(skewed(features, sc.Logits(teacher), return_stats=True), tuple[Tensor, sc.LossStats])

distilled = sc.nn.LinearDistillationLoss(4, 5, alpha=0.5, weight=torch.ones(5))
assert_type(distilled(features, labels, sc.Logits(teacher)), Tensor)
assert_type(distilled(features, labels, sc.Logits(teacher), return_stats=True), tuple[Tensor, sc.LossStats])
assert_type(
    sc.linear_distillation(features, head.weight, labels, listed, alpha=0, return_stats=True),
    tuple[Tensor, sc.LossStats],
)

# --- the chain, and fits
record = sc.chain_rule(torch.nn.Identity(), head, features, labels, loss="forward_kl")
assert_type(record, sc.ChainRule)
assert_type(record.dL_dtheta, dict[str, Tensor])
rows = np.random.default_rng(0).standard_normal((40, 3))
classes = (rows[:, 0] > 0).astype(int)
probe = sc.SoftmaxRegression(C=0.1, loss="cross_entropy", class_weight="balanced").fit(rows, classes)
assert_type(probe, sc.SoftmaxRegression)
assert_type(probe.predict_proba(rows), NDArray[Any])
assert_type(probe.decision_function(torch.as_tensor(rows)), Tensor)
assert_type(probe.objective_, float)
assert_type(probe.score(rows, classes), float)
chosen = sc.SoftmaxRegressionCV(Cs=[0.1, 1.0], cv=2, precision="float64").fit(rows, classes)
assert_type(chosen, sc.SoftmaxRegressionCV)
assert_type(chosen.C_, float)
