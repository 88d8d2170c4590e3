"""One table of everything wrong that may be given to a loss of logits or of a head, and what the errors must say.

An error has the right type and names the argument, what it must be or what came, and where there is one the remedy.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable

import pytest
import torch

import softcurve

from .pairwise import pairwise
from .placement import ON_CPU, PLACED

NAN, INF = math.nan, math.inf

# A line is code | exceptions | words that the message must have. "nan" among the exceptions: the loss may also come back
# as NaN; "a/b" among the words: one of them. CE(target), KL, REVERSE and JS are losses of the route's model, which has
# three rows of the logits z = x wᵀ of five classes.
BOTH = """
CE(None)                                        | TypeError  | target; NoneType; Probabilities; cache[rows]
CE([0, 1, 2])                                   | TypeError  | target; list; tensor
CE(i > 0)                                       | TypeError  | target; bool; int64
CE(y + 0j)                                      | TypeError  | target; complex64
CE(torch.zeros(4).long())                       | ValueError | target; (3,); (4,)
CE(torch.eye(5)[:3].long())                     | ValueError | target; (3,); (3, 5)
CE(torch.full((3, 6), 0.2))                     | ValueError | target; (3, 5); (3, 6)
CE(torch.zeros(3))                              | ValueError | target; (3, 5); (3,); .long()
CE(y[:2])                                       | ValueError | target; (3, 5); (2, 5)
CE(Probabilities(y[:2]))                        | ValueError | target; (3, 5); (2, 5)
CE(Logits(y[:, :4]))                            | ValueError | target; (3, 5); (3, 4)
KL(LinearTeacher(x[:2], w))                     | ValueError | (3, 5); (2, 5)
KL(LinearTeacher(x, w[:4]))                     | ValueError | (3, 5); (3, 4)
KL(i)                                           | TypeError  | target/p ; int64; cross_entropy
JS(i)                                           | TypeError  | target/p ; int64; cross_entropy
KL(None)                                        | TypeError  | target/p ; NoneType
CE(i, ignore_index=1.0)                         | TypeError  | ignore_index; int; float
CE(i, ignore_index=True)                        | TypeError  | ignore_index; int; bool
CE(y, ignore_index=-1)                          | ValueError | ignore_index; distribution; sample_weight; -1
CE(Logits(y), ignore_index=2)                   | ValueError | ignore_index; distribution; sample_weight; 2
CE(TopK(k, l), ignore_index=0)                  | ValueError | ignore_index; distribution; sample_weight
CE(LinearTeacher(x, w), ignore_index=-1)        | ValueError | ignore_index; distribution; sample_weight
CE(TopK(k[:2], l[:2]))                          | ValueError | TopK indices; (3,); (2, 2)
CE(TopK(k, l), weight=torch.ones(5))            | ValueError | weight; bucket; renormalize
REVERSE(TopK(k, l, 'renormalize'))              | ValueError | renormalize; infinite; bucket
JS(TopK(k, l, 'renormalize'), beta=1.0)         | ValueError | renormalize; infinite; bucket
CE(i, weight=torch.ones(3))                     | ValueError | weight; (5,); (3,)
CE(i, weight=torch.ones(5).long())              | ValueError|TypeError | weight; floating; int64
CE(i, weight=[1.0] * 5)                         | TypeError|ValueError | weight; list
CE(i, weight=torch.ones(5, requires_grad=True)) | ValueError | weight; grad; detach
CE(i, sample_weight=torch.ones(4))              | ValueError | sample_weight; (3,); (4,)
KL(Probabilities(y), sample_weight=torch.ones(3, 1)) | ValueError | sample_weight; (3,); (3, 1)
JS(Probabilities(y), sample_weight=[1.0] * 3)   | TypeError|ValueError | sample_weight; list
CE(i, label_smoothing=1.1)                      | ValueError | label_smoothing; between 0 and 1; 1.1
CE(i, label_smoothing=-0.1)                     | ValueError | label_smoothing; -0.1
CE(i, label_smoothing=NAN)                      | ValueError | label_smoothing; nan
CE(i, label_smoothing='a')                      | TypeError|ValueError | label_smoothing; 'a'
CE(i, temperature=0.0)                          | ValueError | temperature; above 0; 0.0
CE(i, temperature=-1.0)                         | ValueError | temperature; -1.0
CE(i, temperature=INF)                          | ValueError | temperature; finite; inf
KL(Probabilities(y), temperature=NAN)           | ValueError | temperature; nan
JS(Probabilities(y), temperature=None)          | TypeError|ValueError | temperature; None
CE(i, softcap=0.0)                              | ValueError | softcap; above 0
CE(i, softcap=-30.0)                            | ValueError | softcap; -30
CE(i, softcap=INF)                              | ValueError | softcap; finite; inf
CE(i, z_loss=-1e-4)                             | ValueError | z_loss; at least 0; -0.0001
CE(i, z_loss=INF)                               | ValueError | z_loss; finite; inf
CE(i, reduction='average')                      | ValueError | reduction; 'batchmean'; 'average'
KL(Probabilities(y), reduction=None)            | TypeError|ValueError | reduction; None
CE(i, base=1.0)                                 | ValueError | base; 1.0
KL(Probabilities(y), base=0.0)                  | ValueError | base; above 0
CE(i, base=INF)                                 | ValueError | base; finite
JS(Probabilities(y), beta=1.5)                  | ValueError | beta; between 0 and 1; 1.5
JS(Probabilities(y), beta=-0.5)                 | ValueError | beta; -0.5
JS(Probabilities(y), beta=NAN)                  | ValueError | beta; nan
"""
# What only the values show. They are looked at on the CPU alone; elsewhere such a loss is NaN, or the device refuses.
VALUES = """
CE(torch.tensor([0, 5, 1]))                     | ValueError | target; 0 … 4; got 5; ignore_index
CE(torch.tensor([0, -1, 1]))                    | ValueError | target; got -1; ignore_index
CE(torch.tensor([0, -100, 1]), ignore_index=-1) | ValueError | target; -100; ignore_index (-1)
CE(y.index_fill(0, one, NAN))                   | ValueError|nan | NaN
CE(Logits(z.index_fill(0, one, NAN)))           | ValueError|nan | target; NaN
CE(Logits(z.index_fill(0, one, -INF)))          | ValueError|nan | target; mass
CE(TopK(k + 3, l))                              | ValueError | TopK indices; 0 … 4; got 5
KL(TopK(k - 1, l))                              | ValueError | TopK indices; 0 … 4; -1
CE(i, weight=torch.full((5,), NAN))             | ValueError | weight; NaN
CE(i, sample_weight=torch.full((3,), NAN))      | ValueError | sample_weight; NaN
"""
# Of these, what torch takes as well; they are not looked at elsewhere.
TAKEN = """
CE(torch.tensor([[1.5, -0.5, 0, 0, 0]]).expand(3, 5)) | ValueError | robabilities; >= 0; -0.5; Logits
CE(z)                                           | ValueError | robabilities; Logits
CE(Probabilities(-y))                           | ValueError | robabilities; >= 0
CE(Probabilities(2 * y))                        | ValueError | robabilities; sum to 1; sums to 2; divide
CE(Probabilities(0 * y))                        | ValueError | robabilities; sum to 1; sums to 0
CE(Probabilities(1.001 * y))                    | ValueError | robabilities; sum to 1; 1.001
KL(Probabilities(2 * y))                        | ValueError | robabilities; sums to 2; divide
JS(Probabilities(2 * y))                        | ValueError | robabilities; sums to 2
JS(Probabilities(y * NAN))                      | ValueError | robabilities; NaN
CE(y.index_fill(0, one, INF))                   | ValueError|nan | robabilities; finite; inf; divide
CE(TopK(torch.zeros_like(k), l))                | ValueError | indices; distinct; twice
KL(TopK(k, l + 2))                              | ValueError | log_probs; mass; log_softmax
CE(TopK(k, l - INF, 'renormalize'))             | ValueError | log_probs; fillers; sample_weight 0; bucket
JS(TopK(k, l * NAN))                            | ValueError | log_probs; nan
CE(i, weight=-torch.ones(5))                    | ValueError | weight; >= 0
"""
OF_LOGITS = """
softcurve.cross_entropy([[1.0, 2.0]], i)        | TypeError  | logits; list; Tensor
softcurve.cross_entropy(z.long(), i)            | TypeError  | logits; int64; .float()
softcurve.cross_entropy(z > 0, i)               | TypeError  | logits; bool
softcurve.cross_entropy(z + 0j, i)              | TypeError  | logits; complex64
softcurve.cross_entropy(torch.tensor(1.0), torch.tensor(0)) | ValueError | logits; (..., C)
softcurve.cross_entropy(torch.zeros(3, 0), i)   | ValueError | logits; (3, 0)
softcurve.cross_entropy(z.index_fill(1, one, NAN), i) | ValueError | logits; NaN; mask
softcurve.cross_entropy(z.index_fill(1, one, NAN), y) | ValueError | logits; NaN; mask
softcurve.cross_entropy(z.index_fill(1, one, INF), i) | ValueError | logits; +inf; clamp
softcurve.cross_entropy(z.index_fill(0, one, -INF), i) | ValueError | logits; -inf; unmask
softcurve.cross_entropy(z[:, :1], TopK(k, l))   | ValueError | TopK indices; k <= 1; (3, 2)
softcurve.kl_divergence(z, i)                   | TypeError  | q ; int64; cross_entropy
softcurve.js_divergence(z, [1.0])               | TypeError  | q ; list
softcurve.kl_divergence(z, z[:, :3])            | ValueError | p and q; (3, 3); (3, 5)
softcurve.kl_divergence(z, z[:2])               | ValueError | (2, 5); (3, 5)
softcurve.kl_divergence(z.index_fill(0, one, NAN), z) | ValueError | p must; NaN
softcurve.kl_divergence(z, z.index_fill(0, one, NAN)) | ValueError | q must; NaN
softcurve.kl_divergence(z.index_fill(0, one, INF), z) | ValueError | p must; +inf
softcurve.js_divergence(z, z.index_fill(0, one, INF)) | ValueError | q must; +inf
softcurve.kl_divergence(z.index_fill(1, one, INF), z) | ValueError | p must; +inf
softcurve.kl_divergence(z, z.index_fill(0, one, -INF)) | ValueError | q must; -inf
softcurve.js_divergence(z.index_fill(0, one, -INF), z) | ValueError | p must; -inf
softcurve.kl_divergence(TopK(k, l), TopK(k, l)) | ValueError | TopK; logits for all classes
softcurve.js_divergence(z, TopK(k, l, 'renormalize'), beta=0.0) | ValueError | renormalize; infinite
softcurve.entropy(i)                            | TypeError  | logits; int64
softcurve.entropy(z.index_fill(0, one, NAN))    | ValueError | logits; NaN
softcurve.entropy(z.index_fill(1, one, INF))    | ValueError | logits; +inf
softcurve.entropy(z.index_fill(0, one, -INF))   | ValueError | logits; -inf
softcurve.entropy(z, base=1.0)                  | ValueError | base
softcurve.softmax_jacobian(i)                   | TypeError  | logits; int64
softcurve.softmax_jacobian(torch.tensor(1.0))   | ValueError | logits; (..., C)
softcurve.softmax_jacobian_product(z, i)        | TypeError  | vector; int64
softcurve.softmax_jacobian_product(z, z[0])     | ValueError | vector; (3, 5); (5,); expand
Probabilities(i)                                | TypeError  | robabilities; int64
Probabilities([0.5, 0.5])                       | TypeError  | robabilities; list
Logits(i)                                       | TypeError  | Logits; int64
LinearTeacher(i, z)                             | TypeError  | LinearTeacher input; int64
LinearTeacher(z, torch.ones(5, 3))              | ValueError | LinearTeacher linear_weight; (C, 5); (5, 3)
LinearTeacher(z, torch.ones(5, 5).long())       | TypeError  | linear_weight; int64
LinearTeacher(z, torch.ones(6, 5), torch.ones(4)) | ValueError | LinearTeacher linear_bias; (6,); (4,)
TopK(k, l, tail='drop')                         | ValueError | tail; 'bucket'; 'drop'
TopK(k, k)                                      | TypeError  | log_probs; int64
TopK(l, l)                                      | TypeError  | indices; int64; float32; .long()
TopK(k > 0, l)                                  | TypeError  | indices; int64; bool
TopK.cat([])                                    | ValueError | lists; one or more; got 0
TopK.cat([TopK(k, l), TopK(k, l, 'renormalize')]) | ValueError | lists; tail; 'bucket', 'renormalize'
TopK.cat([TopK(k, l)] * 2, dim=1)               | ValueError | dim; leading; got 1
TopK.ragged([k[0]], [])                         | ValueError | one tensor; 1 and 0
TopK(k, l).with_label(i[:2], l[:, 0])           | ValueError | label; (3,); (2,)
TopK(k, l).with_label(i, l)                     | ValueError | log_probs; (3,); (3, 2)
TopK(k, l).with_label(l[:, 0], l[:, 0])         | TypeError  | label; int64; float32
TopK(k[:, :1], l)                               | ValueError | indices; (3, 2); (3, 1)
nn.CrossEntropyLoss(reduction='x')              | ValueError | reduction; 'x'
nn.KLDivergenceLoss(base=1.0)                   | ValueError | base
nn.CrossEntropyLoss(temperature=0.0)(z, i)      | ValueError | temperature; above 0
nn.JSDivergenceLoss(beta=2.0)(z, z)             | ValueError | beta; between 0 and 1
"""
OF_HEADS = """
linear([[1.0, 2.0]], w, i)                      | TypeError  | input; list; Tensor
linear(x.long(), w, i)                          | TypeError  | input; int64; .float()
linear(x > 0, w, i)                             | TypeError  | input; bool
linear(x + 0j, w, i)                            | TypeError  | input; complex64
linear(torch.tensor(1.0), w, torch.tensor(0))   | ValueError | input; (..., d); ()
linear(x[:, :1], w, i)                          | ValueError | linear_weight; (5, 2); input; 1
linear(x.index_fill(1, one, NAN), w, i)         | ValueError|nan | input; NaN
linear(x.index_fill(1, one, INF), w, i)         | ValueError|nan | input; inf
linear_kl([[1.0, 2.0]], w, y)                   | TypeError  | input; list
linear_js(x.long(), w, y)                       | TypeError  | input; int64
linear_kl(x.index_fill(1, one, NAN), w, Probabilities(y)) | ValueError|nan | input; NaN
linear(x, [[1.0, 2.0]], i)                      | TypeError  | linear_weight; list; Tensor
linear(x, torch.nn.Linear(2, 5), i)             | TypeError  | linear_weight; Linear; its bias as linear_bias
linear(x, w.long(), i)                          | TypeError  | linear_weight; int64; .float()
linear(x, w[0], i)                              | ValueError | linear_weight; (C, 2); (2,)
linear(x, torch.ones(5, 3), i)                  | ValueError | linear_weight; (5, 3); 2
linear(x, w.T, i)                               | ValueError | linear_weight; (2, 5); 2
linear(x, w[:0], i)                             | ValueError | linear_weight; (0, 2)
linear(x, w.index_fill(0, one, NAN), i)         | ValueError|nan | linear_weight; NaN
linear(x, torch.nn.Linear(2, 5), i)             | TypeError  | linear_weight; Linear; Tensor
linear_kl(x, torch.ones(5, 4, 2), y)            | ValueError | linear_weight; (C, 2); (5, 4, 2)
linear(x[0], torch.ones(5, 4, 2), i[0])         | ValueError | input; (2,); (N, d)
linear(x[None], torch.ones(5, 4, 2), i[None])   | ValueError | input; (1, 3, 2); (N, d)
linear(x, torch.ones(5, 4, 2), torch.zeros(3, 3).long()) | ValueError | target; (3, 4); (3, 3)
linear(x, torch.ones(5, 4, 2), torch.zeros(3, 4).long(), linear_bias=torch.zeros(5)) | ValueError | linear_bias; (5, 4); (5,)
linear_js(x, w[:1], TopK(k, l))                 | ValueError | TopK indices; k <= 1; (3, 2)
CE(i, linear_bias=[0.0] * 5)                    | TypeError  | linear_bias; list; Tensor
CE(i, linear_bias=torch.zeros(5).long())        | TypeError|ValueError | linear_bias; int64
CE(i, linear_bias=torch.zeros(4))               | ValueError | linear_bias; (5,); (4,)
CE(i, linear_bias=torch.zeros(5, 1))            | ValueError | linear_bias; (5,); (5, 1)
KL(y, linear_bias=torch.zeros(1))               | ValueError | linear_bias; (5,); (1,)
CE(i, linear_bias=torch.full((5,), NAN))        | ValueError|nan | linear_bias; NaN
KL(LinearTeacher(x * NAN, w))                   | ValueError|nan | target; NaN
JS(y)                                           | TypeError  | target; float32; Probabilities; Logits
CE(i, shift=-1)                                 | ValueError | shift; -1
CE(i, shift=1.0)                                | TypeError|ValueError | shift; int; 1.0/float
CE(i, shift=True)                               | TypeError|ValueError | shift; int; True/bool
linear(x[0], w, i[0], shift=1)                  | ValueError | shift; single row
CE(y, shift=1)                                  | ValueError | shift; class indices
CE(Logits(y), shift=1)                          | ValueError | shift; class indices
KL(Probabilities(y), shift=1)                   | ValueError | shift; class indices
JS(Logits(y), shift=2)                          | ValueError | shift; class indices
KL(Probabilities(y), softcap=-30.0)             | ValueError | softcap; -30
JS(Probabilities(y), softcap=INF)               | ValueError | softcap; finite; inf
KL(Probabilities(y), direction='sideways')      | ValueError | direction; 'forward'; 'reverse'; 'sideways'
KL(Probabilities(y), direction=None)            | TypeError|ValueError | direction; 'forward'; None
CE(i, memory_budget=0)                          | ValueError | memory_budget; positive int of bytes; got 0
KL(Probabilities(y), memory_budget=-1)          | ValueError | memory_budget; positive int of bytes; got -1
JS(Probabilities(y), memory_budget=8)           | ValueError | memory_budget; at least; bytes; got 8
CE(i, memory_budget='64MB')                     | TypeError|ValueError | memory_budget; bytes; 64MB/str
CE(i, memory_budget=1e9)                        | TypeError|ValueError | memory_budget; int; got 1000000000.0
CE(i, memory_budget=True)                       | TypeError|ValueError | memory_budget; int; bool/True
nn.LinearCrossEntropyLoss(2, 5, reduction='x')  | ValueError | reduction; 'x'
nn.LinearCrossEntropyLoss(2, 5, label_smoothing=1.5) | ValueError | label_smoothing; 1.5
nn.LinearCrossEntropyLoss(2, 5, temperature=0.0) | ValueError | temperature; above 0
nn.LinearKLDivergenceLoss(2, 5, softcap=-1.0)   | ValueError | softcap; -1.0
nn.LinearCrossEntropyLoss(2, 5, z_loss=-1.0)    | ValueError | z_loss; -1.0
nn.LinearCrossEntropyLoss(2, 5, weight=torch.ones(4)) | ValueError | weight; (5,); (4,)
nn.LinearKLDivergenceLoss(2, 5, base=1.0)       | ValueError | base
nn.LinearKLDivergenceLoss(2, 5, direction='up') | ValueError | direction; 'reverse'; 'up'
nn.LinearJSDivergenceLoss(2, 5, beta=2.0)       | ValueError | beta; between 0 and 1; 2.0
nn.LinearCrossEntropyLoss(2, 5, shift=-1)       | ValueError | shift; -1
nn.LinearCrossEntropyLoss(2, 5).to(x.device)(x[:, :1], i) | ValueError | linear_weight; (5, 2); 1
nn.LinearCrossEntropyLoss(2, 5, ignore_index=1).to(x.device)(x, y) | ValueError | ignore_index; distribution; sample_weight
"""
# The head is not told of a plain target of a divergence what the logits route takes for logits.
OF_HEADS_VALUES = """
KL(z)                                           | TypeError  | target; Probabilities; Logits
"""

# What is not an error, so that the checks above cannot pass by refusing everything.
GOOD_BOTH = """
CE(i)
CE(y)
CE(2 * y) + CE(0 * y) + CE(1.001 * y)
CE(i.int())
CE(y.to(torch.bfloat16)) + KL(Probabilities(y.to(torch.bfloat16)))
CE(i, base=2, temperature=2, label_smoothing=0, softcap=3, z_loss=1)
KL(TopK(k, l)) + REVERSE(TopK(k, l)) + JS(TopK(k, l))
CE(TopK(k, l), temperature=2.0, label_smoothing=0.1)
KL(TopK(k, l, 'renormalize'), temperature=2.0) + JS(TopK(k, l, 'renormalize'), beta=0.0)
CE(i, sample_weight=-torch.ones(3), reduction='sum')
CE(torch.tensor([0, -1, 1]), ignore_index=-1)
CE(y, ignore_index=None) + CE(y, ignore_index=-100)
KL(LinearTeacher(torch.randn(3, 7), torch.randn(5, 7)))
"""
GOOD_LOGITS = """
softcurve.cross_entropy(z.index_fill(1, torch.tensor([3]), -INF), i)
softcurve.cross_entropy(z[:0], i[:0], reduction='sum')
"""
GOOD_HEADS = """
CE(i, linear_bias=torch.tensor([0, 0, 0, 0, -INF]))
linear(x[:0], w, i[:0], reduction='sum')
CE(y, shift=0) + KL(Probabilities(y), shift=0) + JS(Probabilities(y), shift=0)
CE(i, memory_budget=1 << 20) + JS(Probabilities(y), memory_budget=1 << 20)
nn.LinearCrossEntropyLoss(2, 5, ignore_index=1).to(x.device)(x, i)
nn.LinearKLDivergenceLoss(2, 5).to(x.device)(x, Probabilities(y)) + nn.LinearJSDivergenceLoss(2, 5).to(x.device)(x, Probabilities(y))
"""


def lines(*tables: str) -> list[list[str]]:
    return [[part.strip() for part in line.split(" | ")] for table in tables for line in table.strip().splitlines()]


ROUTES = ("logits", "head") if ON_CPU else ("head",)
SEEN = {"logits": lines(BOTH, OF_LOGITS), "head": lines(BOTH, OF_HEADS)}
UNSEEN = {"logits": lines(VALUES), "head": lines(VALUES, OF_HEADS_VALUES)}
BAD = {(route, line[0]): line[1:] for route in ROUTES for line in (*SEEN[route], *lines(TAKEN), *UNSEEN[route])}
GOOD = [
    (route, line[0])
    for route in ROUTES
    for line in lines(GOOD_BOTH, {"logits": GOOD_LOGITS, "head": GOOD_HEADS}[route])
]

# Run in one process without the import hook, whose own TypeCheckError would come before ours.
PREAMBLE = f"""{PLACED}
import json, torch, softcurve
from softcurve import LinearTeacher, Logits, Probabilities, TopK, nn
linear, linear_kl, linear_js = softcurve.linear_cross_entropy, softcurve.linear_kl_divergence, softcurve.linear_js_divergence
NAN, INF = float("nan"), float("inf")
x, w, i, one = torch.randn(3, 2), torch.randn(5, 2), torch.tensor([0, 2, 1]), torch.tensor([1])
z = x @ w.T
y = torch.softmax(torch.randn(3, 5), -1)
k, l = torch.tensor([[0, 1], [2, 1], [1, 0]]), torch.log_softmax(z, -1)[:, :2]
LOSSES = {{
    "logits": dict(
        CE=lambda t, **o: softcurve.cross_entropy(z, t, **o),
        KL=lambda t, **o: softcurve.kl_divergence(t, z, **o),
        REVERSE=lambda t, **o: softcurve.kl_divergence(z, t, **o),
        JS=lambda t, **o: softcurve.js_divergence(t, z, **o),
    ),
    "head": dict(
        CE=lambda t, **o: linear(x, w, t, **o),
        KL=lambda t, **o: linear_kl(x, w, t, **o),
        REVERSE=lambda t, **o: linear_kl(x, w, t, direction="reverse", **o),
        JS=lambda t, **o: linear_js(x, w, t, **o),
    ),
}}

def outcome(route, code):
    try:
        return ["returned", repr(eval(code, globals() | LOSSES[route]))]
    except BaseException as error:
        of_entries = isinstance(error, softcurve.checks.InvalidEntriesError)  # a ValueError to users
        return ["ValueError" if of_entries else type(error).__name__, str(error)]
"""


@pytest.fixture(scope="module")
def outcomes(run_python: Callable[[str], object]) -> dict[tuple[str, str], list[str]]:
    # A device that has refused refuses everything that follows: what may make it so comes last.
    last = [(route, line[0]) for route in ROUTES for line in UNSEEN[route]]
    codes = [name for name in [*BAD, *GOOD] if name not in last] + last
    done = run_python(f"{PREAMBLE}\nprint(json.dumps([outcome(*code) for code in {codes!r}]))")
    return dict(zip(codes, json.loads(done.stdout.splitlines()[-1]), strict=True))  # type: ignore[attr-defined]


@pytest.mark.parametrize(("route", "code"), BAD)
def test_error_names_argument_and_remedy(route: str, code: str, outcomes: dict[tuple[str, str], list[str]]) -> None:
    exceptions, words = BAD[route, code]
    kind, message = outcomes[route, code]
    if not ON_CPU and code in {line[0] for line in UNSEEN[route]}:
        exceptions, words = exceptions + "|nan|RuntimeError|AcceleratorError", ""
    if not ON_CPU and code in {line[0] for line in lines(TAKEN)}:
        pytest.skip("values are not looked at on this device")
    if kind == "returned" and "nan" in exceptions.split("|"):
        assert message.startswith("tensor(nan")
        return
    assert kind in exceptions.split("|"), message
    missing = [word for word in words.split("; ") if not any(choice in message for choice in word.split("/"))]
    assert missing == [], message


@pytest.mark.parametrize(("route", "code"), GOOD)
def test_no_error(route: str, code: str, outcomes: dict[tuple[str, str], list[str]]) -> None:
    kind, shown = outcomes[route, code]
    assert kind == "returned", shown
    assert "nan" not in shown


# --- rows that have no part ---------------------------------------------------------------------------------------------

OPTIONS = ({}, {"label_smoothing": 0.1, "z_loss": 0.1}, {"temperature": 2.0, "softcap": 5.0})
POISONED = pairwise({"poison": (NAN, INF, -INF), "reduction": ("sum", "mean", "batchmean", "none"), "options": OPTIONS})


@pytest.mark.parametrize("setting", POISONED, ids=str)
def test_ignored_rows_may_hold_anything(setting: dict[str, object]) -> None:
    """Exactly zero value, gradient and Hessian product, as if they held zeros."""
    clean = torch.randn(5, 4, dtype=torch.float64)
    target = torch.tensor([0, -100, 2, -100, 3])
    results = []
    for fill in (0.0, setting["poison"]):
        z = clean.clone()
        z[1::2] = fill
        z.requires_grad_()
        loss = softcurve.cross_entropy(z, target, reduction=setting["reduction"], **setting["options"])
        (gradient,) = torch.autograd.grad(loss.sum(), z, create_graph=True)
        (second,) = torch.autograd.grad((gradient * clean).sum(), z)
        assert (gradient[1::2] == 0).all()
        assert (second[1::2] == 0).all()
        results.append((loss, gradient, second))
    for got, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(got, expected)


WEIGHTED = {
    "index": lambda z, t, w: softcurve.cross_entropy(z, torch.arange(5) % 4, sample_weight=w, reduction="sum"),
    "smoothed": lambda z, t, w: softcurve.cross_entropy(
        z, torch.arange(5) % 4, sample_weight=w, label_smoothing=0.1, z_loss=0.1
    ),
    "logits": lambda z, t, w: softcurve.cross_entropy(z, softcurve.Logits(t), sample_weight=w),
    "forward": lambda z, t, w: softcurve.kl_divergence(t, z, sample_weight=w, reduction="mean"),
    "reverse": lambda z, t, w: softcurve.kl_divergence(z, t, sample_weight=w, temperature=2.0),
    "js": lambda z, t, w: softcurve.js_divergence(z, t, sample_weight=w, beta=0.3, reduction="sum"),
}


@pytest.mark.parametrize(("name", "poison"), [*itertools.product(WEIGHTED, (NAN, INF, -INF))])
def test_rows_of_weight_zero_may_hold_anything(name: str, poison: float) -> None:
    clean = torch.randn(2, 5, 4, dtype=torch.float64)
    weight = torch.tensor([1.0, 0.0, 0.5, 0.0, 2.0], dtype=torch.float64)
    results = []
    for fill in (0.0, poison):
        both = clean.clone()
        both[:, 1::2] = fill
        z, t = both.requires_grad_()
        loss = WEIGHTED[name](z, t, weight)
        first = torch.autograd.grad(loss, (z, t), create_graph=True, materialize_grads=True)
        second = torch.autograd.grad(
            sum((g * c).sum() for g, c in zip(first, clean, strict=True)), (z, t), materialize_grads=True
        )
        assert all((g[1::2] == 0).all() for g in (*first, *second))
        results.append((loss, *first, *second))
    for got, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(got, expected)
