"""The benchmark of classes that are left out of a trained head's gradients: its shares where they are known."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from bench import trained, trained_heads
from safetensors.torch import load_file, save_file

N, D, LIVE, DEAD = 7, 5, 12, 36
C = LIVE + DEAD


@pytest.fixture
def rows() -> trained.Rows:
    """Rows whose residuals are of one size at the first classes, and below 1e-25 at all others."""
    input, weight = torch.randn(N, D).sign(), torch.randn(C, D).sign() / 4
    bias = torch.where(torch.arange(C) < LIVE, 0.0, -60.0)
    return trained.Rows(input, weight, bias, torch.randint(LIVE, (N,)))


def test_gradients_are_those_of_autograd(rows):
    exact = rows.in_float64()
    logits = F.linear(exact.input, exact.weight, exact.bias).requires_grad_()
    loss = F.cross_entropy(logits, rows.target, reduction="sum")
    (residual,) = torch.autograd.grad(loss, logits)
    ours = trained.gradients(exact)
    assert ours.loss == pytest.approx(loss.item())
    for got, truth in zip(ours[1:], (residual, residual @ exact.weight, residual.T @ exact.input), strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", trained.DTYPES, ids=str)
def test_only_classes_with_residual_must_stay(rows, dtype):
    record = trained.share_record(trained.Rows(*(t.to(dtype) for t in rows[:3]), rows.target))
    assert [record[name] for name in (*trained.REQUIRED[:5], "filter")] == [pytest.approx(LIVE / C)] * 6
    assert record["class_entries"] == 1, (
        "a class of small residuals has a gradient of small entries, none of them smaller"
    )
    assert max(record["filter_input"], record["filter_weight"]) < 1e-24
    roundoff = torch.finfo(dtype).eps / 2
    for name in ("dense_input", "dense_weight", "dense_class"):
        assert roundoff / 8 < record[name] < 64 * roundoff, "logits near −60 are rounded by up to 60 units"


def test_a_gradient_loses_no_more_than_allowed(rows):
    """Leaving out what the shares leave out keeps the bound, and one class more breaks it."""
    exact = rows.in_float64()._replace(bias=-torch.arange(C) / 3.0)
    of = trained.gradients(exact.in_float64())
    for u in (2.0**-8, 2.0**-4):
        norms = of.of_weight.norm(dim=1).sort().values
        lost = round(C * (1 - trained.classes_for_weight(of, u)))
        assert norms[:lost].norm() <= u * norms.norm() < norms[: lost + 1].norm()
        order = (of.residual.norm(dim=0) * exact.weight.norm(dim=1)).argsort()
        lost = round(C * (1 - trained.classes_for_input(exact, of, u)))
        errors = [(of.residual[:, order[:n]] @ exact.weight[order[:n]]).norm() for n in (lost, lost + 1)]
        assert errors[0] <= u * of.of_input.norm() < errors[1]
        assert 0 < trained.classes_for_input(exact, of, u) <= trained.classes_by_bound(exact, of, u) < 1
        assert trained.classes_for_input(exact, of, u) < trained.classes_for_each_row(exact, of, u) < 1
        # Rows that choose for themselves leave out at least what all of them can leave out by the same bound.
        terms = of.residual.abs() * exact.weight.norm(dim=1) / of.of_input.norm(dim=1, keepdim=True)
        common = (terms[:, terms.amax(0).argsort()].cumsum(1).amax(0) <= u).double().mean()
        assert trained.entries_for_each_row(exact, of, u) <= 1 - common


@pytest.mark.parametrize("way", trained.WAYS)
def test_products_of_a_share_of_the_classes(rows, way):
    of_input, of_weight = trained.WAYS[way]
    products = trained.Products(rows.in_float64())
    products.whole()
    whole = products.of_input.clone(), products.of_weight.clone()
    for tensor in (products.of_input, products.of_weight, products.logits):
        tensor.fill_(math.nan)
    products.part(LIVE / C, of_input=of_input, of_weight=of_weight)
    torch.testing.assert_close(products.of_input, whole[0])
    torch.testing.assert_close(products.of_weight, whole[1])
    assert bool((products.of_weight[LIVE:] == 0).all()) == of_weight
    torch.testing.assert_close(products.logits, F.linear(products.rows.input, products.rows.weight))


def test_the_tables(rows, tmp_path, capsys):
    path = tmp_path / "head.safetensors"
    parts = {f"{part}.{name}": getattr(rows, name).clone() for part in trained.PARTS for name in ("input", "target")}
    save_file({"linear_weight": rows.weight, "linear_bias": rows.bias, **parts}, path)
    trained.main([str(path), "--rows", "5", "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith(("| head | train | ", "| head | held_out | "))]) == 4
    assert len([line for line in lines if line.startswith(f"| head | (5, {D}, {C}) | ")]) == 2 * len(trained.SHARES)


def test_a_file_of_a_trained_head(tmp_path, monkeypatch):
    """The example's model, for one step on random windows."""
    pytest.importorskip("tokenizers", reason="the extra `all` is not installed")
    monkeypatch.syspath_prepend(trained_heads.EXAMPLES)
    texts = importlib.import_module("tiny_lm.text")
    text = texts.Text(torch.randint(30, (9, 16)), torch.randint(30, (2, 16)), torch.ones(30), 2, 1.0)
    monkeypatch.setattr(texts, "load", lambda vocab, context: text)
    for name, value in {"VOCAB": 30, "CONTEXT": 16, "WIDTH": 32, "LAYERS": 1, "BATCH": 2, "ROWS": 40}.items():
        monkeypatch.setattr(trained_heads, name, value)
    trained_heads.main(["tiny_lm", str(tmp_path / "head.safetensors"), "--steps", "1"])
    contents = load_file(tmp_path / "head.safetensors")
    for part in trained.PARTS:  # two held-out windows have 30 rows: they are used again
        assert (contents[f"{part}.input"].shape, contents[f"{part}.target"].shape) == ((40, 32), (40,))
        rows = trained.Rows.read(tmp_path / "head.safetensors", part, 40, torch.float32)
        assert trained.gradients(rows).loss / 40 == pytest.approx(math.log(30), rel=0.2)
