"""A teacher's lists: fillers, dtypes, temperature, rows of lists; and the lists that are made from a head."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import softcurve
from softcurve import TopK
from softcurve.head import candidates
from softcurve.head.maxima import CHUNK, maxima_of_chunks

from . import oracle
from .pairwise import pairwise

F64, INF = torch.float64, math.inf
LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": lambda z, t, **o: softcurve.cross_entropy(z, t, reduction="none", **o),
    "forward": lambda z, t, **o: softcurve.kl_divergence(t, z, reduction="none", **o),
    "reverse": lambda z, t, **o: softcurve.kl_divergence(z, t, reduction="none", **o),
    "js": lambda z, t, **o: softcurve.js_divergence(t, z, beta=0.3, reduction="none", **o),
}
ON_HEAD: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": softcurve.linear_cross_entropy,
    "forward": softcurve.linear_kl_divergence,
    "reverse": lambda *a, **o: softcurve.linear_kl_divergence(*a, direction="reverse", **o),
    "js": lambda *a, **o: softcurve.linear_js_divergence(*a, beta=0.3, **o),
}


def on_head(name: str, z: Tensor, target: TopK, **options: Any) -> Tensor:
    """The loss of a head that has these logits, of which −inf is in whole columns."""
    eye, masked = torch.eye(len(z), dtype=z.dtype), (z == -INF).all(0)
    bias = torch.where(masked, -INF, 0.0).to(z.dtype)
    weight = torch.where(masked, 0.0, z).mT
    return ON_HEAD[name](eye, weight, target, linear_bias=bias, reduction="none", **options)


def ragged_lists(classes: int = 40) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Logits of four rows, and lists of 3, 1, 5 and 2 classes."""
    log_p = torch.randn(4, classes, dtype=F64).log_softmax(-1)
    chosen = [row.topk(k).indices for row, k in zip(log_p, (3, 1, 5, 2), strict=True)]
    return 2 * torch.randn(4, classes, dtype=F64), chosen, [row[at] for row, at in zip(log_p, chosen, strict=True)]


# --- fillers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_ragged_list_is_its_rows_one_by_one(name: str, tail: Any) -> None:
    """Whatever the fillers are called; value, gradients in logits and list, and a Hessian product."""
    if (name, tail) == ("reverse", "renormalize"):
        pytest.skip("infinite")
    z, indices, log_probs = ragged_lists()
    made = TopK.ragged(indices, log_probs, tail)
    leaves = (z.requires_grad_(), made.log_probs.requires_grad_())
    rows = [LOSSES[name](z[i], TopK(indices[i], made.log_probs[i, : len(indices[i])], tail)) for i in range(4)]
    direction = torch.randn(z.shape, dtype=F64)

    def derivatives(value: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(value.sin().sum(), leaves, create_graph=True)
        return [value, *first, *torch.autograd.grad((first[0] * direction).sum(), leaves)]

    expected = derivatives(torch.stack(rows))
    filler = made.log_probs == -INF
    for index in (-1, int(indices[0][0]), 10**6):
        target = TopK(torch.where(filler, index, made.indices), made.log_probs, tail)
        for value in (
            LOSSES[name](z, target),
            on_head(name, z, target),
            on_head(name, z, target, memory_budget=24_000),
        ):
            for got, truth in zip(derivatives(value), expected, strict=True):
                torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-12)


def test_a_list_of_fillers_alone() -> None:
    """A bucket of all classes is certain; there is nothing to rescale, unless the row does not count."""
    z, nothing = torch.randn(2, 6), torch.full((2, 3), -INF)
    for name in LOSSES:
        for value in (
            LOSSES[name](z, TopK(torch.zeros(2, 3).int(), nothing)),
            on_head(name, z, TopK(torch.zeros(2, 3).int(), nothing)),
        ):
            assert torch.equal(value, torch.zeros(2)), name
    some = TopK(torch.tensor([[0, 1, 2]] * 2), torch.tensor([[-1.0, -2.0, -INF], [-INF] * 3]), "renormalize")
    weight = torch.tensor([1.0, 0.0])
    for value in (LOSSES["forward"](z, some, sample_weight=weight), on_head("forward", z, some, sample_weight=weight)):
        assert value[0] > 0
        assert value[1] == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.int32, torch.uint32, torch.int64])
def test_indices_of_any_integer_dtype(dtype: torch.dtype) -> None:
    z, indices, log_probs = ragged_lists()
    made = TopK.ragged(indices, log_probs)
    narrow = TopK(made.indices.to(dtype), made.log_probs)
    for name in LOSSES:
        assert torch.equal(LOSSES[name](z, narrow), LOSSES[name](z, made))
        assert torch.equal(on_head(name, z, narrow), on_head(name, z, made))
    assert narrow.most_probable.tolist() == [int(each[0]) for each in indices]


# --- temperature -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 3.0])
@pytest.mark.parametrize("name", ["forward", "reverse", "js"])
def test_a_tempered_bucket_bounds_the_even_tail_from_below(name: str, temperature: float) -> None:
    """On both routes, with masked classes, which have no part of the tail; and T > 1 gives an even tail the most mass."""
    z, indices, log_probs = ragged_lists()
    topk, live = TopK.ragged(indices, log_probs), torch.arange(40) < 34
    z = torch.where(live, z, -INF)
    topk = TopK(topk.indices, torch.where(live[topk.indices], topk.log_probs, -INF))
    y = torch.zeros(4, 41, dtype=F64).scatter(
        -1, torch.where(topk.log_probs > -INF, topk.indices, 40), topk.log_probs.exp()
    )[:, :40]
    unlisted = (y == 0) & live
    even = torch.where(unlisted, (1 - y.sum(-1, keepdim=True)) / unlisted.sum(-1, keepdim=True), y)
    tempered, p = torch.softmax(even.log() / temperature, -1), torch.softmax(z / temperature, -1)

    def coarse(q: Tensor) -> Tensor:
        return torch.cat([torch.where(unlisted, 0.0, q), torch.where(unlisted, q, 0.0).sum(-1, keepdim=True)], -1)

    rows = {"forward": oracle.kl_rows, "reverse": lambda a, b: oracle.kl_rows(b, a)}
    rows["js"] = lambda a, b: oracle.js_rows(a, b, beta=0.3)
    truth = rows[name](coarse(tempered).log(), coarse(p).log())
    for value in (LOSSES[name](z, topk, temperature=temperature), on_head(name, z, topk, temperature=temperature)):
        torch.testing.assert_close(value, truth, rtol=1e-11, atol=1e-13)
    assert (truth <= rows[name](tempered.log(), p.log()) + 1e-12).all()
    uneven = torch.where(unlisted, even * torch.rand(4, 40, dtype=F64), y)
    uneven = torch.where(unlisted, uneven * ((1 - y.sum(-1)) / torch.where(unlisted, uneven, 0).sum(-1))[:, None], y)
    masses = [torch.where(unlisted, q ** (1 / temperature), 0).sum(-1) for q in (uneven, even)]
    assert (masses[0] < masses[1]).all() == (temperature > 1)


# --- rows of lists ---------------------------------------------------------------------------------------------------


def same(got: TopK, indices: Tensor, log_probs: Tensor) -> bool:
    return torch.equal(got.indices, indices) and torch.equal(got.log_probs, log_probs)


def test_rows_are_selected_joined_and_moved_as_tensors_are() -> None:
    indices, log_probs = torch.arange(24).view(2, 4, 3), -1.0 - torch.rand(2, 4, 3)
    topk = TopK(indices, log_probs, "renormalize")
    mask = torch.tensor([[True, False, True, True], [False, True, False, False]])
    for index in (
        0,
        -1,
        slice(1, None),
        mask,
        [1, 0],
        (0, 2),
        (slice(None), slice(1, 3)),
        (..., 1),
        (1, ...),
        None,
        torch.tensor(1),
    ):
        whole = (
            *(index if isinstance(index, tuple) else (index,)),
            *(() if isinstance(index, tuple) and ... in index else (...,)),
            slice(None),
        )
        assert same(topk[index], indices[whole], log_probs[whole])
        assert topk[index].tail == "renormalize"
    for index in ((0, 1, 2), (..., 0, 0, 0)):  # the entries of a list are no rows
        with pytest.raises(IndexError):
            topk[index]
    assert len(topk) == 2
    assert len(list(topk)) == 2
    with pytest.raises(TypeError, match="single row"):
        len(topk[0, 0])
    for dim in (0, 1, -1, -2):
        assert same(TopK.cat([topk, topk], dim), torch.cat([indices] * 2, dim % 2), torch.cat([log_probs] * 2, dim % 2))
    moved = topk.to(torch.float16)
    assert (moved.indices.dtype, moved.log_probs.dtype, moved.tail) == (torch.int64, torch.float16, "renormalize")
    assert topk.to("cpu", torch.float64).log_probs.dtype == F64


def test_lists_of_different_widths_and_dtypes_are_joined_by_fillers() -> None:
    short = TopK(torch.tensor([[3]], dtype=torch.uint16), torch.tensor([[-0.1]]))
    long = TopK(torch.tensor([[5, 6]]), torch.tensor([[-1.0, -2.0]]))
    joined = TopK.cat([short, long])
    assert torch.equal(joined.log_probs, torch.tensor([[-0.1, -INF], [-1.0, -2.0]]))
    assert joined.listed_classes()[:, 0].tolist() == [3, 5]


def test_the_label_is_listed_once() -> None:
    """Added where it is not listed, though a filler may name it; left as it is where it is; ignored if negative."""
    topk = TopK(
        torch.tensor([[4, 2], [4, 2], [4, 7], [4, 2]]),
        torch.tensor([[-1.0, -1.5], [-1.0, -1.5], [-1.0, -INF], [-1.0, -1.5]]),
    )
    label, log_probs = torch.tensor([7, 2, 7, -100]), torch.tensor([-3.0, -9.0, -2.0, -1.0])
    labelled = topk.with_label(label, log_probs)
    rows = [
        dict(zip(classes, values, strict=True))
        for classes, values in zip(labelled.listed_classes().tolist(), labelled.log_probs.tolist(), strict=True)
    ]
    listed = [{c: v for c, v in row.items() if v > -INF} for row in rows]
    assert listed == [{4: -1.0, 2: -1.5, 7: -3.0}, {4: -1.0, 2: -1.5}, {4: -1.0, 7: -2.0}, {4: -1.0, 2: -1.5}]
    assert softcurve.cross_entropy(torch.randn(4, 9), labelled).isfinite()


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_label_beside_a_list_of_all_classes(name: str, tail: Any) -> None:
    """Lists with C + 1 columns, of which one is a filler, are the lists of C; ignored rows and rows of weight 0 too."""
    if (name, tail) == ("reverse", "renormalize"):
        pytest.skip("infinite")
    z, log_probs = torch.randn(4, 5, dtype=F64), torch.randn(4, 5, dtype=F64).log_softmax(-1)
    log_probs[1, 2] = -INF  # a class of no probability, which the label of this row names
    full = TopK(torch.arange(5).expand(4, 5), log_probs.requires_grad_(), tail)
    added = torch.tensor([-9.0, -INF, -9.0, -9.0], dtype=F64)
    label = torch.tensor([3, 2, 0, -100])
    labelled, weight = full.with_label(label, added), torch.tensor([1.0, 0.5, 0.0, 2.0], dtype=F64)
    assert labelled.indices.shape == (4, 6)
    leaves = (z.requires_grad_(), log_probs)
    for loss, options in (
        (LOSSES[name], [{}]), (lambda *a, **o: on_head(name, *a, **o), [{}, {"memory_budget": 20_000}]),
    ):  # fmt: skip
        truth = LOSSES[name](z, full, sample_weight=weight)
        expected = [truth, *torch.autograd.grad(truth.sum(), leaves)]
        for given in options:
            value = loss(z, labelled, sample_weight=weight, **given)
            for got, right in zip([value, *torch.autograd.grad(value.sum(), leaves)], expected, strict=True):
                torch.testing.assert_close(got, right, rtol=1e-11, atol=1e-12)
    spoiled = labelled.log_probs.detach().clone()
    spoiled[2] = math.nan
    value = LOSSES[name](z, TopK(labelled.indices, spoiled, tail), sample_weight=weight)
    torch.testing.assert_close(value, truth, rtol=1e-11, atol=1e-12)
    six = TopK(torch.arange(6).expand(4, 6), torch.full((4, 6), -2.0, dtype=F64), tail)
    for refused in (LOSSES[name], lambda *a, **o: on_head(name, *a, **o)):
        with pytest.raises(ValueError, match=r"TopK indices must be of shape \(4,\) \+ \(k,\) with k <= 5 besides"):
            refused(z, six)


# --- the lists of a head ---------------------------------------------------------------------------------------------


def dense_topk(
    x: Tensor, w: Tensor, b: Tensor | None, k: int, temperature: float = 1.0, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    z = x.double() @ w.double().T
    z = z if b is None else z + b.double()
    z = torch.where(z == -INF, z, oracle.seen_by_softmax(z, temperature, softcap))
    order = z.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return order, torch.log_softmax(z, -1).gather(-1, order)


SETTINGS = pairwise(
    {
        "rows": ((5,), (), (2, 0), (3, 1, 2), (17,)),
        "classes": (1, 2, 37, 1100, 4099),
        "k": (1, 2, 33, 1024),
        "bias": (None, "dense", "masked", "nearly all masked", "offset"),
        "temperature": (1.0, 0.7),
        "softcap": (None, 3.0),
        "weight": ("normal", "integers"),
        "budget": ("whole", "least"),
        "dtype": (F64, torch.float32),  # on the CPU other code selects the classes
    }
)


@pytest.mark.parametrize("s", SETTINGS, ids=str)
def test_equals_the_sorted_dense_rows(s: dict[str, Any]) -> None:
    """Integers make many equal logits: the lower class comes first, also across blocks of classes."""
    classes, k = s["classes"], min(s["k"], s["classes"])
    draw = (
        (lambda *shape: torch.randint(-2, 3, shape).double())
        if s["weight"] == "integers"
        else (lambda *shape: torch.randn(shape, dtype=F64))
    )
    x, w, b = draw(*s["rows"], 3), draw(classes, 3), None if s["bias"] is None else draw(classes)
    x, w, b = (part if part is None else part.to(s["dtype"]) for part in (x, w, b))
    if "masked" in (s["bias"] or ""):
        b = torch.where(torch.rand(classes) < (0.3 if s["bias"] == "masked" else 0.99), -INF, b)
        b[classes // 2] = 0.0
    b = b + 1e4 if s["bias"] == "offset" else b
    options = {"linear_bias": b, "temperature": s["temperature"], "softcap": s["softcap"]}
    if s["budget"] == "least" and x.numel():
        with pytest.raises(ValueError, match="memory_budget") as refused:
            softcurve.linear_topk(x, w, k, **options, memory_budget=1)
        options["memory_budget"] = int(str(refused.value).split("at least ")[1].split()[0])
    got = softcurve.linear_topk(x, w, k, **options)
    indices, log_probs = dense_topk(x, w, b, k, s["temperature"], s["softcap"])
    narrow = s["dtype"] == torch.float32
    if s["weight"] == "integers" or (
        s["softcap"] is None and not narrow
    ):  # else rounding decides between capped logits
        assert torch.equal(got.indices, indices)
    rounding = 2.0**-9 if narrow and s["weight"] == "normal" else 1e-10  # of a logit of 1e4
    atol = rounding if s["bias"] == "offset" else 1e-12
    atol = max(atol, 2e-6) if narrow else atol
    torch.testing.assert_close(got.log_probs.double(), log_probs, rtol=1e-6 if narrow else 1e-11, atol=atol)
    assert not got.log_probs.requires_grad
    assert got.tail == "bucket"


@pytest.mark.parametrize("k", [1, 40, 300, 700])
def test_candidates_of_many_blocks(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rising, falling, equal and masked logits, in blocks narrower and wider than a list."""
    z = torch.stack([torch.arange(5000), -torch.arange(5000), torch.arange(5000) % 7, torch.zeros(5000)]).float()
    bias = torch.where(torch.arange(5000) % 9 == 4, 0.0, -INF)
    for entries in (4 * 256, 4 * 1024):
        monkeypatch.setattr("softcurve.head.plan.STREAMED_ENTRIES", entries)
        for b in (None, bias):
            indices, log_probs = dense_topk(torch.eye(4), z.mT, b, k)
            for budget in (None, 200_000):
                got = softcurve.linear_topk(torch.eye(4), z.mT.contiguous(), k, linear_bias=b, memory_budget=budget)
                assert torch.equal(got.indices, indices)
                torch.testing.assert_close(got.log_probs.double(), log_probs, rtol=1e-6, atol=1e-6)


def test_a_misleading_sample_of_the_classes() -> None:
    """The largest logits are those of the classes that are sampled, so that few others are above the bound."""
    z = torch.randn(3, 8192)
    z[:2, ::32] += 50.0
    got = softcurve.linear_topk(torch.eye(3), z.mT.contiguous(), 500)
    indices, log_probs = dense_topk(torch.eye(3), z.mT, None, 500)
    assert torch.equal(got.indices, indices)
    torch.testing.assert_close(got.log_probs.double(), log_probs, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_log_probabilities_are_float32_and_near_the_truth(dtype: torch.dtype) -> None:
    x, w = torch.randn(9, 16).to(dtype).requires_grad_(), (torch.randn(801, 16) / 4).to(dtype).requires_grad_()
    truth = dense_topk(x.detach(), w.detach(), None, 20)
    got = softcurve.linear_topk(x, w, 20)
    assert got.log_probs.dtype == torch.float32
    torch.testing.assert_close(got.log_probs.double(), truth[1], rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        lowered = softcurve.linear_topk(x, w, 20)
    assert lowered.log_probs.dtype == torch.float32
    truth = dense_topk(x.detach().bfloat16(), w.detach().bfloat16(), None, 20)
    torch.testing.assert_close(lowered.log_probs.double(), truth[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("budget", [None, 4000])
def test_a_confident_row_keeps_its_digits(budget: int | None) -> None:
    """log p = −log1p(Σ e^−gap), also where the largest class is in another block, and beside an offset of 2^13."""
    z = torch.full((1, 200), 2.0**13)
    z[0, 117] += 20.0
    got = softcurve.linear_topk(torch.ones(1, 1), z.mT.contiguous(), 2, memory_budget=budget)
    assert got.indices.tolist() == [[117, 0]]
    assert got.log_probs[0, 0].item() == pytest.approx(-math.log1p(199 * math.exp(-20)), rel=1e-6)
    assert got.log_probs[0, 1].item() == pytest.approx(-20.0, rel=1e-6)


def test_masked_classes_follow_as_fillers() -> None:
    w, bias = torch.randn(30, 2), torch.full((30,), -INF).index_fill(0, torch.tensor([3, 8]), 0.0)
    x = torch.randn(4, 2)
    got = softcurve.linear_topk(x, w, 5, linear_bias=bias)
    assert (got.log_probs[:, 2:] == -INF).all()
    assert (got.log_probs[:, :2].exp().sum(-1) - 1).abs().max() < 1e-6
    loss = softcurve.linear_kl_divergence(x, w, got, linear_bias=bias)
    assert loss.abs() < 1e-6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (lambda x, w: (x, w, 0), "k must be an int from 1 to 9, the smaller of the 9 classes and 1024, got 0"),
        (lambda x, w: (x, w, 10), "k must be an int from 1 to 9, .* got 10"),
        (lambda x, w: (x, w, True), "k must be an int .* got True"),
        (lambda x, w: (x, torch.randn(2000, 4), 1025), "k must be an int from 1 to 1024, .* got 1025"),
        (lambda x, w: (x * math.nan, w, 2), "input must hold numbers, got NaN"),
        (lambda x, w: (x, w.index_fill(0, torch.tensor([1]), INF), 2), "linear_weight must be finite, got \\+inf"),
    ],
)
def test_errors_name_the_argument(arguments: Callable[..., Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        softcurve.linear_topk(*arguments(torch.ones(3, 4), torch.randn(9, 4)))
    with pytest.raises(ValueError, match="linear_bias must have at least one finite entry"):
        softcurve.linear_topk(torch.ones(3, 4), torch.randn(9, 4), 2, linear_bias=torch.full((9,), -INF))


def test_compiles_without_a_graph_break(run_python: Callable[[str], Any]) -> None:
    run_python("""
import torch, softcurve
def step(x, w):
    teacher = softcurve.linear_topk(x, w, 4, softcap=5.0)
    return softcurve.linear_kl_divergence(x.flip(0), w, teacher[:], temperature=2.0), teacher.log_probs
x, w = torch.randn(6, 4), torch.randn(50, 4)
expected = step(x, w)
for got, truth in zip(torch.compile(step, fullgraph=True, backend="aot_eager")(x, w), expected):
    torch.testing.assert_close(got, truth)
""")


def test_candidates_of_every_width() -> None:
    """The chunks of a block lie where the maxima say, whatever columns are left over behind them."""
    for width in [*range(256, 700), 975, 3375]:
        z = torch.zeros(1, width).index_fill(1, torch.tensor([width - 1, 17, width // 2]), 9.0)
        lists = candidates.Candidates(1, 3, 64, torch.full((1, 1), 5.0))
        lists.add(z, maxima_of_chunks(z), CHUNK, slice(0, 1), 0)
        assert lists.largest(3)[1].tolist() == [[17, width // 2, width - 1]], width


def test_a_list_of_all_classes_keeps_the_mass_that_it_lacks() -> None:
    """Mass that no class of the model can take makes a divergence infinite, also where the list names every class."""
    half = softcurve.TopK(torch.tensor([[0, 1]]), torch.tensor([[0.25, 0.25]]).log())
    z = torch.zeros(1, 2)
    assert softcurve.kl_divergence(half, z).item() == INF
    assert softcurve.linear_kl_divergence(torch.zeros(1, 3), torch.zeros(2, 3), half).item() == INF
    whole = softcurve.TopK(torch.tensor([[0, 1]]), torch.tensor([[0.3, 0.7]]).log())
    assert 0 < softcurve.kl_divergence(whole, z).item() < 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_row_of_weight_zero_leaves_the_rounding_of_the_others(dtype: torch.dtype) -> None:
    """What log-probabilities of all classes lack by their rounding is no mass, whatever other rows hold."""
    rows = torch.linspace(-14.0, 14.0, 14).sin().reshape(2, 7).log_softmax(-1)
    indices, log_probs, z = torch.arange(7).expand(2, 7), rows.to(dtype), torch.zeros(2, 7)
    assert log_probs[0].double().exp().sum() < 1
    weight = torch.tensor([1.0, 0.0])
    with_padding = softcurve.TopK(indices.int(), log_probs.index_fill(0, torch.tensor([1]), math.nan))
    expected = pytest.approx(math.log(7) + float((rows[0].double().exp() * rows[0]).sum()), abs=1e-2)
    assert softcurve.kl_divergence(with_padding, z, sample_weight=weight).item() == expected
    head = torch.zeros(2, 3), torch.zeros(7, 3)
    assert softcurve.linear_kl_divergence(*head, with_padding, sample_weight=weight).item() == expected
