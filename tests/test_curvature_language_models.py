"""Language models as their libraries have them: batches are mappings with labels, models return records.

The oracle is the loss that the model itself returns, differentiated by torch.
"""

from __future__ import annotations

import math
from collections import UserDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import softcurve
from softcurve.curvature import GGN, Hessian, gradient_noise, influence, split_head

WORDS, WIDTH = 7, 3


class Record(SimpleNamespace):
    """What a model returns: its parts by name."""


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.mix = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids, attention_mask=None):
        e = self.words(input_ids)
        e = torch.tanh(self.mix(e + e.roll(1, -2)))
        return Record(last_hidden_state=e if attention_mask is None else e * attention_mask.unsqueeze(-1))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.lm_head = Body(), nn.Linear(WIDTH, WORDS, bias=False)
        self.double()

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.lm_head(self.body(input_ids, attention_mask).last_hidden_state)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return Record(loss=loss, logits=logits)


def batches():
    """Ragged sequences; of one no token counts."""
    found = []
    for lengths in ((5, 3, 4), (2, 6)):
        ids = torch.randint(WORDS, (len(lengths), max(lengths)))
        mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
        found.append(UserDict(input_ids=ids, attention_mask=mask.double(), labels=ids.where(mask, -100)))
    found[0]["labels"][1] = -100
    return found


def tokens(batch):
    return (batch["labels"][:, 1:] != -100).sum().item()


def each_sequence(data):
    for batch in data:
        for i in range(len(batch["labels"])):
            yield {name: part[i : i + 1] for name, part in batch.items()}


def gradients(model, data, operator):
    """``Σ ∇ℓ`` of each sequence, ``(n, P)``, from the model's own mean loss."""
    rows = []
    for one in each_sequence(data):
        count = tokens(one)
        grads = torch.autograd.grad(model(**one).loss, operator.layout.tensors, allow_unused=True) if count else ()
        rows.append(
            count * torch.cat([g.flatten() for g in grads]) if count else torch.zeros(operator.shape[0]).double()
        )
    return torch.stack(rows)


def test_the_hessian_is_that_of_the_loss_that_the_model_returns():
    model, data = Model(), batches()
    operator = Hessian(*split_head(model), data, shift=1)
    parameters = operator.layout.tensors
    total = sum(tokens(batch) for batch in data)
    loss = sum(tokens(batch) * model(**batch).loss for batch in data) / total
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])
    dense = torch.stack(
        [torch.cat([h.flatten() for h in torch.autograd.grad(g, parameters, retain_graph=True, materialize_grads=True)])
         for g in gradient]
    )  # fmt: skip
    torch.testing.assert_close(operator.to_dense(), dense, rtol=1e-9, atol=1e-12)


def test_features_may_return_a_record():
    model, data = Model(), batches()
    pairs = [({n: b[n] for n in ("input_ids", "attention_mask")}, b["labels"]) for b in data]
    whole, parts = GGN(*split_head(model), data, shift=1), GGN(model.body, model.lm_head, pairs, shift=1)
    assert torch.equal(whole.to_dense(), parts.to_dense())


def test_a_mapping_without_labels_is_an_error():
    with pytest.raises(TypeError, match=r"got dict in batch 0; .* a mapping must have labels"):
        GGN(*split_head(Model()), [{"input_ids": torch.zeros(1, 2, dtype=torch.int64)}])


def test_the_head_of_a_model_without_one_must_be_named():
    with pytest.raises(ValueError, match="head must be given for a Body"):
        split_head(Body())


def test_a_head_with_unmade_logits_has_the_same_curvature():
    model, data = Model(), batches()
    expected = GGN(*split_head(model), data, shift=1).to_dense()
    with softcurve.lazy_logits(model, on_materialize="raise"):
        assert torch.equal(GGN(*split_head(model), data, shift=1).to_dense(), expected)


@pytest.mark.parametrize("rows", ["mean", "each"])
def test_the_influence_of_a_sequence_is_the_one_of_its_loss(rows):
    model, train, test = Model(), batches(), batches()[1:]
    features, head = split_head(model)
    options = {"damping": 0.1, "shift": 1, "tol": 1e-12, "rows": rows}
    found = influence(features, head, train, test, unit="sequence", **options)
    operator = GGN(features, head, train, shift=1)
    damped = operator.to_dense() + 0.1 * torch.eye(operator.shape[0], dtype=torch.float64)
    of_test = gradients(model, test, operator)
    of_test = of_test.sum(0) / sum(map(tokens, test)) if rows == "mean" else of_test.T
    expected = -gradients(model, train, operator) @ torch.linalg.solve(damped, of_test)
    torch.testing.assert_close(found.values, expected, rtol=1e-7, atol=1e-10)
    assert found.values.shape[0] == 5
    assert not found.values[1].any()
    torch.testing.assert_close(found.of_removal, -expected / sum(map(tokens, train)), rtol=1e-7, atol=1e-10)


def test_the_sequences_of_rows_without_positions_are_rows():
    head, data = (
        nn.Linear(3, 4),
        [(torch.randn(5, 3), torch.randint(4, (5,))), (torch.randn(0, 3), torch.zeros(0).long())],
    )
    of_rows, of_sequences = (
        influence(nn.Identity(), head, data, data, damping=0.1, rows="each", unit=unit).values
        for unit in ("row", "sequence")
    )
    assert of_rows.shape == (5, 5)
    assert torch.equal(of_rows, of_sequences)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradient_noise_is_that_of_the_sequences_gradients(reduction):
    model, data = Model(), batches()
    features, head = split_head(model)
    found = gradient_noise(features, head, data, shift=1, reduction=reduction)
    summed = gradients(model, data, Hessian(features, head, data, shift=1))
    counted = summed[[0, 2, 3, 4]]  # the tokens of one sequence are all ignored
    g = counted * len(counted) / sum(map(tokens, data))
    variance = g.var(0).sum().item()
    signal = g.mean(0).square().sum().item() - variance / len(g)
    assert found.sequences == 4
    assert found.variance == pytest.approx(variance, rel=1e-9)
    assert found.squared_norm == pytest.approx(signal, rel=1e-9)
    assert found.scale == pytest.approx(variance / signal if signal > 0 else math.inf, rel=1e-8)


def test_gradient_noise_is_unbounded_without_a_signal_and_undefined_for_one_row():
    head, x = nn.Linear(2, 2, bias=False), torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    with torch.no_grad():
        head.weight.zero_()
    opposite = gradient_noise(nn.Identity(), head, [(x, torch.tensor([0, 1]))])
    assert opposite.scale == math.inf
    assert opposite.squared_norm < 0 < opposite.variance
    assert gradient_noise(nn.Identity(), head, [(x, torch.tensor([1, 1]))]).scale == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="data must hold two sequences that count, got 1"):
        gradient_noise(nn.Identity(), head, [(x, torch.tensor([-100, 1]))])
