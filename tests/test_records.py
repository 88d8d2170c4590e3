"""The repr of a record shows shapes and dtypes; it is short, whatever the tensors hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import softcurve as sc
from softcurve.fit.data.row_source import to_source
from softcurve.fit.diagnostics import diagnose
from softcurve.fit.fitting import fit_head
from softcurve.records import ShortRepr, summary

HALF = torch.zeros(2, 3, dtype=torch.bfloat16)
ROWS = torch.full((2, 3), 1 / 3)
INDICES = torch.tensor([[0, 1], [1, 2]])


def of_a_head():
    return sc.linear_cross_entropy(ROWS, torch.ones(4, 3), INDICES[:, 0], return_stats=True)[1]


def of_a_chain():
    return sc.chain_rule(torch.nn.Linear(3, 5), torch.nn.Linear(5, 4, bias=False), ROWS, INDICES[:, 0])


SHOWN = {
    "Probabilities(values=float32[2, 3])": lambda: sc.Probabilities(ROWS),
    "Logits(values=bfloat16[2, 3])": lambda: sc.Logits(HALF),
    "LinearTeacher(input=float32[2, 3], linear_weight=float32[4, 3], linear_bias=None, softcap=None, scale=1, "
    "classes=int64[2])": lambda: sc.LinearTeacher(ROWS, torch.ones(4, 3), classes=INDICES[0]),
    "LowRankWeight(weight=bfloat16[2, 3], a=float32[2, 1], b=float32[1, 3], scale=0.5)": lambda: sc.LowRankWeight(
        HALF, ROWS[:, :1], ROWS[:1], 0.5
    ),
    "ClassMap(of_student=int64[2], of_teacher=int64[3])": lambda: sc.ClassMap(INDICES[0], torch.arange(3)),
    "TopK(indices=int64[2, 2], log_probs=float32[2, 2], tail='bucket')": lambda: sc.TopK(INDICES, ROWS[:, :2].log()),
    "LossStats(log_probs=float32[2], entropy=float32[2], lse=float32[2], mean_logit=float32[2], collision=float32[2], "
    "predicted=int64[2], correct=bool[2])": of_a_head,
    "ChainRule(e=float32[2, 5], z=float32[2, 4], p=float32[2, 4], loss=float32[2], dL_dp=float32[2, 4], "
    "dL_dz=float32[2, 4], dL_de=float32[2, 5], dL_dx=float32[2, 3], dL_dW=float32[4, 5], dL_db=None, "
    "dL_dtheta=<dict of 2>)": of_a_chain,
}


@pytest.mark.parametrize("shown", SHOWN, ids=lambda shown: shown.partition("(")[0])
def test_a_public_record_shows_shapes_and_dtypes(shown):
    assert repr(SHOWN[shown]()) == shown


def test_records_of_a_fit_show_no_weights():
    source = to_source(np.arange(60.0).reshape(20, 3) % 7, np.arange(20) % 4)
    fit = fit_head(source, max_iter=2)
    for record in (fit, diagnose(source, fit.weight, fit.bias, "cross_entropy")):
        assert isinstance(record, ShortRepr)
        assert "float64[4, 3]" in repr(record) or "int64[4]" in repr(record)
        assert "tensor(" not in repr(record)
        assert len(repr(record)) < 800


def test_what_holds_tensors_is_summed_up():
    assert summary(torch.zeros(3, device="meta")) == "float32[3], device='meta'"
    assert summary(np.zeros((2, 1), np.int8)) == "int8[2, 1]"
    assert summary([torch.zeros(3)] * 7) == "<list of 7>"
    assert summary(sc.Logits(HALF)) == "Logits(values=bfloat16[2, 3])"
    assert summary(1.5) == "1.5"
