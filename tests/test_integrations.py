"""What the integrations compute, without the libraries that call them: sums, lists of a batch, losses, measurements."""

from __future__ import annotations

import math
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import softcurve
from softcurve.integrations.distillation import Distillation, lists_of_batch
from softcurve.integrations.metrics import means_of_labels, token_metrics
from softcurve.integrations.monitor import CurvatureMonitor

WORDS, WIDTH = 11, 4


class Model(nn.Module):
    """A language model whose logits may be scaled and capped behind its head."""

    def __init__(self, scale=1.0, cap=None, dtype=torch.float64):
        super().__init__()
        self.words, self.lm_head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.dropout, self.scale, self.cap = nn.Dropout(0.5), scale, cap
        self.drawn = []
        self.to(dtype)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, labels=None, attention_mask=None):
        self.drawn += [random.random(), np.random.rand(), torch.rand(())]  # noqa: NPY002  # of every global generator
        e = self.words(input_ids)
        z = self.lm_head(self.dropout(torch.tanh(e + e.roll(1, -2)))) * self.scale
        z = z if self.cap is None else torch.tanh(z / self.cap) * self.cap
        loss = None if labels is None else F.cross_entropy(z[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss, logits=z)


def batch(rows=3, length=5):
    ids = torch.randint(WORDS, (rows, length))
    lengths = torch.randint(2, length + 1, (rows, 1))
    mask = torch.arange(length) < lengths
    return {"input_ids": ids, "labels": ids.where(mask, -100), "attention_mask": mask.long()}


@pytest.mark.parametrize("library", ["transformers", "lightning"])
def test_a_missing_library_is_named_with_its_extra(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"softcurve.integrations.{library}", raising=False)
    message = rf"^softcurve.integrations.{library} needs {library}, .* the extra 'integration': run pip install"
    with pytest.raises(ImportError, match=message):
        __import__(f"softcurve.integrations.{library}")


# --- metrics -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize(
    ("shape", "shift", "dtype"),
    [
        ((3, 5), 1, torch.float64), ((3, 5), 0, torch.float64), ((4,), 0, torch.float64), ((2, 3, 4), 1, torch.float64),
        ((1, 1), 1, torch.float64), ((0, 5), 1, torch.float64), ((0,), 0, torch.float64), ((3, 0), 0, torch.float64),
        ((3, 5), 1, torch.bfloat16),
    ],
)  # fmt: skip
def test_metrics_are_means_over_all_labels_that_count(shape, shift, dtype, lazy):
    """Of two batches, of which each leaves four sums for a sequence; a class is masked, logits are at 1e4."""
    head = nn.Linear(WIDTH, WORDS, dtype=dtype)
    with torch.no_grad():
        head.bias += 1e4 if dtype == torch.float64 else 0
        head.bias[3] = -math.inf
    both = token_metrics(shift=shift)
    sums, dense = [], {"log_p": [], "labels": []}
    for _ in range(2):
        x, labels = torch.randn(*shape, WIDTH, dtype=dtype), torch.randint(4, WORDS, shape)
        labels[torch.rand(shape) < 0.3] = -100
        with torch.no_grad(), softcurve.lazy_logits(head, head, on_materialize="raise"):
            logits = head(x)
        assert isinstance(logits, torch.Tensor)
        part = both["preprocess_logits_for_metrics"]((logits if lazy else head(x).detach(), x), labels)
        assert part.shape == (shape[0], 4)
        sums.append(part)
        z = F.linear(x.double(), head.weight.double(), head.bias.double()).detach()
        length = labels.shape[-1] - shift
        here, ahead = (z.narrow(-2, 0, length), labels.narrow(-1, shift, length)) if shift else (z, labels)
        dense["log_p"].append(here[ahead != -100].log_softmax(-1))
        dense["labels"].append(ahead[ahead != -100])
    found = both["compute_metrics"](SimpleNamespace(predictions=torch.cat(sums).float().numpy()))
    log_p, labels = torch.cat(dense["log_p"]), torch.cat(dense["labels"])
    if not len(labels):
        assert all(math.isnan(value) for value in found.values())
        return
    # A made logit of bfloat16 is rounded to 8 bits.
    tol = 2e-6 if dtype == torch.float64 or lazy else 0.03
    assert found["perplexity"] == pytest.approx(F.nll_loss(log_p, labels).exp().item(), rel=tol)
    p = log_p.exp()
    assert found["entropy"] == pytest.approx(-(p * log_p.clamp(min=-1e30)).sum(-1).mean().item(), rel=tol)
    if tol < 0.01:
        assert found["accuracy"] == pytest.approx((log_p.argmax(-1) == labels).double().mean().item(), rel=1e-6)


def test_a_perplexity_beyond_all_numbers_is_infinite():
    assert means_of_labels(SimpleNamespace(predictions=np.array([[1.0, 0.0, 1e4, 0.0]])))["perplexity"] == math.inf


# --- distillation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("items", [None, 7])
@pytest.mark.parametrize("scale_and_cap", [(1.0, None), (0.3, None), (1.0, 2.0), (0.3, 2.0)])
def test_the_loss_of_a_step_is_the_dense_one(scale_and_cap, items):
    """The teacher has another scale and cap, and its classes in another order."""
    student, teacher, inputs = Model(*scale_and_cap), Model(0.7, 3.0), batch()
    student.eval()
    order = torch.randperm(WORDS)
    options = {"temperature": 2.0, "alpha": 0.3, "entropy_bonus": 0.1, "label_smoothing": 0.2}
    distillation = Distillation(teacher, divergence=softcurve.ReverseKL(), classes=order, **options)
    labels = inputs["labels"]
    arguments = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with softcurve.lazy_logits(student, on_materialize="raise"):
        loss = distillation.loss(student(**arguments).logits, labels, distillation.target(inputs), items)
    found = torch.autograd.grad(loss, list(student.parameters()))

    z, of_teacher = student(**arguments).logits[:, :-1], teacher(**arguments).logits.detach()[:, :-1, order]
    labels = labels[:, 1:]
    log_p, log_q = ((each / 2).log_softmax(-1) for each in (z, of_teacher))
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    log_p = z.log_softmax(-1)
    of_labels = F.cross_entropy(z.transpose(1, 2), labels, reduction="none", label_smoothing=0.2)
    rows = 0.3 * of_labels + 0.7 * 4 * divergence + 0.1 * (log_p.exp() * log_p).sum(-1)
    dense = rows[labels != -100].sum() / ((labels != -100).sum() if items is None else items)
    expected = torch.autograd.grad(dense, list(student.parameters()))
    torch.testing.assert_close((loss, *found), (dense, *expected), rtol=1e-10, atol=1e-12)


def test_cached_rows_lie_at_the_labels_however_they_are_named(tmp_path):
    """One row for a label; the first of a sequence; all of a sequence as one row, cut off or filled up."""
    inputs = batch(3, 5)
    mask = inputs["attention_mask"].bool()
    log_probs, indices = torch.randn(3, 5, WORDS).log_softmax(-1).topk(3)
    lists = softcurve.TopK(indices, log_probs)
    lists[mask].save(tmp_path / "tokens", classes=WORDS)
    tokens = softcurve.TopK.load(tmp_path / "tokens")
    first = torch.cat([torch.zeros(1).long(), mask.sum(1).cumsum(0)[:-1]])
    rows = torch.where(mask, first.unsqueeze(1) + torch.arange(5), -1)
    filled = log_probs.where(mask.unsqueeze(-1), -math.inf)

    for named in (rows, first):
        found = lists_of_batch(tokens, {**inputs, "teacher_rows": named})
        assert torch.equal(found.log_probs, filled)
        assert torch.equal(found.indices.long()[mask], indices[mask])
    # A sequence without lists has none at any position.
    found = lists_of_batch(tokens, {**inputs, "teacher_rows": first.where(torch.arange(3) != 1, -1)})
    assert (found.log_probs[1] == -math.inf).all()
    assert torch.equal(found.log_probs[::2], filled[::2])
    # Padding on the left moves the same rows to the right.
    flipped = {name: part.flip(1) for name, part in inputs.items()}
    found = lists_of_batch(tokens, {**flipped, "teacher_rows": first})
    assert torch.equal(found.log_probs[mask.flip(1)], log_probs[mask])

    lists.save(tmp_path / "windows", classes=WORDS)
    windows = softcurve.TopK.load(tmp_path / "windows")
    for length in (5, 3, 7):
        cut = {"labels": torch.zeros(2, length).long(), "teacher_rows": torch.tensor([2, -1])}
        found = lists_of_batch(windows, cut)
        assert torch.equal(found.log_probs[0, :5], log_probs[2, :length])
        assert (found.log_probs[0, 5:] == -math.inf).all()
        assert (found.log_probs[1] == -math.inf).all()


def test_arguments_that_do_not_fit_are_named(tmp_path):
    softcurve.TopK(torch.zeros(3, 1).long(), torch.full((3, 1), -1.0)).save(tmp_path / "lists", classes=WORDS)
    cache = softcurve.TopK.load(tmp_path / "lists")
    with pytest.raises(
        ValueError, match=r"inputs must hold 'teacher_rows'.*got \['attention_mask', 'input_ids', 'labels'\]"
    ):
        lists_of_batch(cache, batch())
    with pytest.raises(ValueError, match=r"teacher_rows must have the shape of the labels \(3, 5\).*got shape \(4,\)"):
        lists_of_batch(cache, {**batch(), "teacher_rows": torch.zeros(4).long()})
    with pytest.raises(
        TypeError, match="model must return the logits of its head, scaled or capped at most, got shape"
    ):
        Distillation(cache, alpha=0.5).loss(
            torch.randn(3, 5, WORDS), batch()["labels"], softcurve.Logits(torch.ones(1)), None
        )
    with pytest.raises(ValueError, match="alpha must be"):
        Distillation(cache, alpha=1.5)
    with pytest.raises(ValueError, match="label_smoothing must be"):
        Distillation(cache, alpha=0.5, label_smoothing=-0.1)


# --- curvature -----------------------------------------------------------------------------------------------------------


def global_numbers_of_numpy():
    return np.random.get_state()[1].tolist()  # noqa: NPY002  # what other code may draw from


@pytest.mark.parametrize("matrix", ["gauss_newton", "hessian"])
def test_the_figures_are_those_of_the_matrix_and_nothing_else_changes(matrix, without_shape_checks):
    model, inputs = Model(), batch(6, 4)  # the checks of shapes would draw random numbers
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = [(p.detach().clone(), p.grad.clone()) for p in model.parameters()]
    generators = [torch.get_rng_state().tolist(), random.getstate(), global_numbers_of_numpy()]
    monitor = CurvatureMonitor([inputs], matrix=matrix, shift=1, products=200, tol=1e-9, method="lanczos")
    measured = monitor.measure(model, step=7)

    assert [torch.get_rng_state().tolist(), random.getstate(), global_numbers_of_numpy()] == generators
    assert [module.training for module in model.modules()] == modes
    assert all(
        torch.equal(p, w) and torch.equal(p.grad, g) for p, (w, g) in zip(model.parameters(), before, strict=True)
    )
    assert monitor.history == [(7, measured)]

    model.eval()
    kind = softcurve.curvature.GGN if matrix == "gauss_newton" else softcurve.curvature.Hessian
    features, head = softcurve.curvature.split_head(model)
    dense = kind(features, head, [inputs], shift=1).to_dense()
    assert measured["curvature/top_eigenvalue"] == pytest.approx(torch.linalg.eigvalsh(dense)[-1].item(), rel=1e-8)
    assert measured["curvature/trace"] == pytest.approx(dense.trace().item(), rel=1e-10)  # as many products as columns
    assert measured["curvature/trace_error"] == 0
    noise = softcurve.curvature.gradient_noise(features, head, [inputs], shift=1)
    assert measured["curvature/gradient_noise_scale"] == noise.scale


def test_the_loss_of_the_model_is_compared_once():
    model, inputs = Model(scale=0.5), batch()
    monitor = CurvatureMonitor([inputs], figures=("gradient_noise",), shift=1)
    with pytest.warns(UserWarning, match=r"by the model and .* by the options of the callback"):
        monitor.measure(model, 1)
    monitor.measure(model, 2)  # warnings are errors
    CurvatureMonitor([inputs], figures=("gradient_noise",), shift=1, temperature=2.0).measure(model, 1)


def test_options_of_a_monitor_are_checked_at_the_start(without_shape_checks):
    with pytest.raises(TypeError, match="unexpected keyword argument 'shifts'"):
        CurvatureMonitor([batch()], shifts=1)
    with pytest.raises(TypeError, match="data must be a list of one or more batches"):
        CurvatureMonitor([])
    with pytest.raises(ValueError, match="every must be"):
        CurvatureMonitor([batch()], every=0)
    with pytest.raises(TypeError, match=r"figures must be a sequence of names, got 'trace'; pass figures=\('trace',\)"):
        CurvatureMonitor([batch()], figures="trace")
    for name, value in {"products": 1, "tol": -1.0, "method": "power", "seed": 0.5, "figures": ["traces"]}.items():
        with pytest.raises(ValueError, match=f"^{name} must be"):
            CurvatureMonitor([batch()], **{name: value})
