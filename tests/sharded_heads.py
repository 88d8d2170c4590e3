"""Every loss × target kind with the head's classes over the processes, beside the same on one process."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import softcurve

from . import cases
from .cases import BY_NAME, CASES, OTHER_TEACHER, Problem, everything, problem
from .pairwise import pairwise
from .process_cases import Cases, begin, distance

IN_TWO_DIMENSIONS = (
    "cross_entropy-indices",
    "cross_entropy-float",
    "cross_entropy-bucket",
    "forward-LinearTeacher",
    "forward-renormalize",
    "reverse-Logits",
    "js0.3-LinearTeacher",
    "js0.3-bucket",
)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def layouts(p: Problem, mesh: DeviceMesh, *, by_rows: bool) -> dict[str, Any]:
    """The placements of the arguments that are not plain."""
    kind, on_classes = p.case.kind.name, [Shard(0)]
    placed: dict[str, Any] = {"linear_weight": on_classes}
    if "linear_bias" in p.names:
        placed["linear_bias"] = on_classes
    if "Teacher" in kind and p.case.kind is not OTHER_TEACHER:  # whose classes may be on other processes
        placed["target 1"] = on_classes
        if "target 2" in p.names:
            placed["target 2"] = on_classes
    if by_rows:
        placed["input"] = [Shard(0)]
        if "sample_weight" in p.names:
            placed["sample_weight"] = [Shard(0)]
        if kind in ("float", "Probabilities", "Logits"):
            placed["target 0"] = [Shard(p.arguments[p.names.index("target 0")].ndim - 1)]
    return placed


def spread(p: Problem, mesh: DeviceMesh, placed: dict[str, Any]) -> tuple[Tensor, ...]:
    given = []
    for name, argument in zip(p.names, p.arguments, strict=True):
        leaf = argument.detach().clone()
        if name in placed:
            leaf = distribute_tensor(leaf, mesh, placed[name])
        given.append(leaf.requires_grad_())
    return tuple(given)


def derivatives(value: Tensor, arguments: tuple[Tensor, ...]) -> Iterator[Tensor]:
    """The gradient in every argument, then a Hessian product; placements must be those of the arguments."""
    first = torch.autograd.grad(whole(value).sin().sum(), arguments, create_graph=True, materialize_grads=True)
    for gradient, argument in zip(first, arguments, strict=True):
        if isinstance(argument, DTensor):
            assert isinstance(gradient, DTensor), type(gradient)
            assert gradient.placements == argument.placements, (gradient.placements, argument.placements)
    inner = cases.along([whole(gradient) for gradient in first])
    yield from (whole(gradient) for gradient in first)
    for second in torch.autograd.grad(inner, arguments, materialize_grads=True):
        yield whole(second)


def compare(name: str, p: Problem, mesh: DeviceMesh, *, by_rows: bool, stats: bool, **more: Any) -> Cases:
    given = spread(p, mesh, layouts(p, mesh, by_rows=by_rows))
    loss, expected = p.ours(*given, return_stats=stats, **more), p.ours(*p.arguments, return_stats=stats)
    if stats:
        (loss, found_stats), (expected, expected_stats) = loss, expected
        for column, (got, wanted) in enumerate(zip(found_stats, expected_stats, strict=True)):
            yield f"{name}: statistics {column}", distance(whole(got).detach(), wanted.detach()), 1e-10
    assert isinstance(loss, DTensor) == by_rows
    yield f"{name}: value", distance(whole(loss).detach(), expected.detach()), 1e-10
    found, alone = derivatives(loss, given), derivatives(expected, p.arguments)
    for number, (got, wanted) in enumerate(zip(found, alone, strict=True)):
        yield f"{name}: derivative {number}", distance(got.detach(), wanted.detach()), 1e-10


# By the number of processes: uneven shards, fewer classes than processes, and with the least budget class blocks. Four
# processes, whose messages cost several times those of three, take fewer combinations.
CLASSES = {3: (11, 2, 90), 4: (7, 1)}
DIVERGENCES = {3: ("cross_entropy", "forward", "reverse", "js0.3"), 4: ("cross_entropy", "js0.3")}


def settings(processes: int) -> list[dict[str, Any]]:
    """Any two of kind of target, divergence, classes, placement, reduction, options, budget and statistics meet in one."""

    def possible(name: str, level: Any, other: str, value: Any) -> bool:
        if (name, other) == ("kind", "loss"):
            return f"{value}-{level}" in BY_NAME
        if name == "kind" and other == "classes" and value == 1:
            return not BY_NAME[f"cross_entropy-{level}"].kind.listed
        return True

    kinds = [case.kind.name for case in CASES if case.is_cross_entropy]
    factors = {"kind": kinds, "loss": DIVERGENCES[processes], "classes": CLASSES[processes]}
    factors |= {"by_rows": (False, True), "options": ("everything", "few"), "budget": (None, "least")}
    factors |= {"stats": (True, False)}
    return pairwise(factors | {"reduction": ("mean", "none", "sum")}, possible)


def all_losses(mesh: DeviceMesh) -> Cases:
    for number, s in enumerate(settings(mesh.size())):
        case = BY_NAME[f"{s['loss']}-{s['kind']}"]
        few = ("softcap", "label_smoothing", "shift") if s["options"] == "few" else ()
        few = (*few, "shift") if s["by_rows"] else few  # with which a sample weight must not require gradients
        torch.manual_seed(number)
        p = problem(case, everything(case, *few), s["reduction"], rows=(3, 4), classes=s["classes"])
        budget = {} if s["budget"] is None else {"memory_budget": p.least_budget}
        yield from compare(f"{number} {s}", p, mesh, by_rows=s["by_rows"], stats=s["stats"], **budget)


def unusual_rows(mesh: DeviceMesh) -> Cases:
    """Confident rows, masked classes (all of one process's among them), far offsets, and no rows at all."""
    torch.manual_seed(2)
    n, d, classes = 6, 3, 9
    weight, e = torch.randn(classes, d, dtype=torch.float64), torch.randn(n, d, dtype=torch.float64)
    bias = torch.randn(classes, dtype=torch.float64)
    target = torch.tensor([0, 4, 8, 2, 1, 5])
    for name, change in {
        "confident": lambda b: b.index_fill(0, torch.tensor([4]), 60.0),
        "masked": lambda b: b.index_fill(0, torch.tensor([3, 7]), -torch.inf),
        "a process masked": lambda b: torch.cat([b[:-3], torch.full((3,), -torch.inf, dtype=b.dtype)]),
        "a process masked, far below": lambda b: torch.cat([b[:-3] - 1e4, torch.full((3,), -torch.inf, dtype=b.dtype)]),
        "offset": lambda b: b + 1e4,
    }.items():
        moved = change(bias)
        label = torch.where(moved[target].isinf(), 0, target)
        leaves = [t.clone().requires_grad_() for t in (e, weight, moved)]
        spread_leaves = [
            leaves[0].detach().clone(),
            *(distribute_tensor(t.detach(), mesh, [Shard(0)]) for t in leaves[1:]),
        ]
        given = [t.requires_grad_() for t in spread_leaves]
        for loss in ("index", "teacher"):

            def value(x: Tensor, w: Tensor, b: Tensor, loss: str = loss, label: Tensor = label) -> Tensor:
                if loss == "index":
                    return softcurve.linear_cross_entropy(x, w, label, linear_bias=b, z_loss=0.0, reduction="none")
                teacher = softcurve.LinearTeacher(x.detach() * 0.9, w.detach(), b.detach())
                return softcurve.linear_kl_divergence(x, w, teacher, linear_bias=b, reduction="none")

            one, many = value(*leaves), value(*given)
            yield f"{name} {loss}: value", distance(many.detach(), one.detach()), 1e-9
            for number, (a, b) in enumerate(
                zip(torch.autograd.grad(many.sum(), given), torch.autograd.grad(one.sum(), leaves), strict=True)
            ):
                yield f"{name} {loss}: gradient {number}", distance(whole(a), b), 1e-9
    # A list that holds a class far above all others, which float32 has no room for beside it.
    spread_bias = torch.linspace(-500, 500, 9)
    far = torch.log_softmax(torch.stack([spread_bias / 400] * n), -1).flip(-1)[:, :3]
    at = torch.tensor([[8, 7, 0]] * n)
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in (e / 9, weight.detach())]
        given = [leaves[0].detach().clone().requires_grad_(),
                 distribute_tensor(leaves[1].detach(), mesh, [Shard(0)]).requires_grad_()]  # fmt: skip
        target = softcurve.TopK(at, far.to(dtype))

        def listed_loss(x: Tensor, w: Tensor, target: Any = target, dtype: Any = dtype) -> Tensor:
            return softcurve.linear_cross_entropy(x, w, target, linear_bias=spread_bias.to(dtype), reduction="none")

        dense_z = leaves[0].double() @ leaves[1].double().T + spread_bias.double()
        log_p = torch.log_softmax(dense_z, -1)
        unlisted = torch.logsumexp(log_p[:, 1:7], -1, keepdim=True)
        coarse = torch.cat([log_p.gather(-1, at), unlisted], -1)
        y = torch.cat([far.double().exp(), 1 - far.double().exp().sum(-1, keepdim=True)], -1)
        truth = -(y * coarse).sum(-1)
        bound = 1e-5 if dtype == torch.float32 else 1e-10
        one, many = listed_loss(*leaves), listed_loss(*given)
        yield f"far list {dtype}, one", distance(one.detach(), truth.detach()), bound
        yield f"far list {dtype}, many", distance(many.detach(), truth.detach()), bound
        for number, (a, b) in enumerate(
            zip(torch.autograd.grad(many.sum(), given), torch.autograd.grad(truth.sum(), leaves), strict=True)
        ):
            yield f"far list {dtype}: gradient {number}", distance(whole(a), b), bound
    none = softcurve.linear_cross_entropy(
        torch.zeros(0, d, dtype=torch.float64), distribute_tensor(weight, mesh, [Shard(0)]),
        torch.zeros(0, dtype=torch.int64), reduction="sum",
    )  # fmt: skip
    yield "no rows", float(none.abs()), 0.0


def half_precision(mesh: DeviceMesh) -> Cases:
    """No further from float64 than torch's dense loss in the same dtype."""
    torch.manual_seed(3)
    n, d, classes = 40, 32, 203
    for dtype in (torch.bfloat16, torch.float16):
        x, w = torch.randn(n, d).to(dtype), torch.randn(classes, d).to(dtype)
        y = torch.randint(classes, (n,))

        def dense(x: Tensor, w: Tensor, y: Tensor = y) -> Tensor:
            return torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, w), y, reduction="sum")

        errors = []
        exact = [t.double().requires_grad_() for t in (x, w)]
        truth = [dense(*exact).detach(), *torch.autograd.grad(dense(*exact), exact)]
        for function, given in (
            (dense, [x.clone(), w.clone()]),
            (softcurve.linear_cross_entropy, [x.clone(), distribute_tensor(w, mesh, [Shard(0)])]),
        ):
            given = [t.requires_grad_() for t in given]
            value = function(*given) if function is dense else function(*given, y, reduction="sum")
            found = [value.detach(), *(whole(g) for g in torch.autograd.grad(value, given))]
            errors.append([float((a.double() - b).norm()) for a, b in zip(found, truth, strict=True)])
        for name, theirs, ours in zip(("value", "features", "weight"), *errors, strict=True):
            yield f"{dtype} {name}: {ours:.2e} of {theirs:.2e}", float(ours > theirs), 0.0


def refused(mesh: DeviceMesh) -> Cases:
    """What each process would understand in its own way is an error in all of them."""
    rank = dist.get_rank()
    torch.manual_seed(rank)
    own = torch.nn.functional.layer_norm(torch.randn(6, 4), (4,))
    torch.manual_seed(0)
    e, weight = torch.randn(6, 4), distribute_tensor(torch.randn(9, 4), mesh, [Shard(0)])
    y = torch.arange(6)
    loss = softcurve.linear_cross_entropy
    rows = DTensor.from_local(e, mesh, [Shard(0)])
    for name, says, call in (
        ("rows of one's own", "input must be the same on every process", lambda: loss(own, weight, y)),
        ("of other numbers", "input must be the same", lambda: loss(e[: 6 - (rank == 0)], weight, y[: 6 - (rank == 0)])),
        ("targets of one process", "target must have the rows", lambda: loss(rows, weight, y)),
        ("weights of one process", "sample_weight must have the rows", lambda: loss(
            rows, weight, torch.arange(6 * mesh.size()) % 9, sample_weight=torch.ones(6))),
        ("a class that is not there", "target must hold classes in 0 … 8", lambda: loss(e, weight, y + 4)),
        ("a teacher of other classes", "must have the shape (6, 9)", lambda: softcurve.linear_kl_divergence(
            e, weight, softcurve.LinearTeacher(e, torch.randn(8, 4)))),
        ("a bias alone", "linear_bias must be plain", lambda: loss(
            e, weight.full_tensor(), y, linear_bias=distribute_tensor(torch.randn(9), mesh, [Shard(0)]))),
        ("a target alone", "target must be plain", lambda: softcurve.linear_kl_divergence(
            e, weight.full_tensor(), softcurve.Logits(distribute_tensor(torch.randn(6, 9), mesh, [Shard(1)])))),
        ("rows in another order", "input must be the same", lambda: loss(e.flip(0) if rank else e, weight, y)),
        ("chosen classes of a sharded teacher", "LinearTeacher classes must be None", lambda: softcurve.linear_kl_divergence(
            e, weight, softcurve.LinearTeacher(e, weight, classes=slice(9)))),
        ("a low rank alone", "linear_weight must be plain", lambda: loss(e, softcurve.LowRankWeight(
            weight.full_tensor(), distribute_tensor(torch.randn(9, 2), mesh, [Shard(0)]), torch.randn(2, 4)), y)),
        ("chosen classes of a grouped teacher", "LinearTeacher classes must be None", lambda: softcurve.linear_kl_divergence(
            e, weight, softcurve.ClassMap(y.new_zeros(9), y.new_zeros(4)).target(softcurve.LinearTeacher(
                e, weight, classes=slice(4))))),
        ("uneven shards", "must be sharded evenly", lambda: loss(e, DTensor.from_local(
            torch.randn(2 + (rank == mesh.size() - 1), 4), mesh, [Shard(0)], shape=(2 * mesh.size() + 1, 4), stride=(4, 1)), y % 2)),
    ):  # fmt: skip
        try:
            call()
            message = "no error"
        except (ValueError, NotImplementedError) as error:
            message = str(error)
        yield f"{name}: {message[:90]}", float(says not in message), 0.0
    if mesh.size() == 4:
        # Wrong in the rows of one process alone: an error in all, and nobody waits.
        both = init_device_mesh("cpu", (2, 2))
        rows = DTensor.from_local(e, both, [Shard(0), Replicate()])
        w = distribute_tensor(torch.randn(9, 4), both, [Replicate(), Shard(0)])
        bad = torch.zeros(12, dtype=torch.int64)
        bad[1] = 9
        weights = torch.ones(12)
        weights[2] = torch.nan
        lists = softcurve.TopK(bad.unsqueeze(-1), torch.zeros(12, 1) - 1)
        for name, call in (
            ("a class", lambda: loss(rows, w, bad)),
            ("a list", lambda: softcurve.linear_kl_divergence(rows, w, lists)),
            ("a weight", lambda: loss(rows, w, bad.clamp(max=8), sample_weight=weights)),
        ):
            try:
                call()
                message = "no error"
            except ValueError as error:
                message = str(error)
            yield f"{name} of one process: {message[:60]}", float("must" not in message), 0.0
    drifted = e + 1e-6 * torch.randn(e.shape, generator=torch.Generator().manual_seed(rank))
    yield "rounding is no difference", float(loss(drifted, weight, y).isnan()), 0.0
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*torch.jit.script", DeprecationWarning)  # torch's own, at the first jvp
            torch.func.jvp(lambda x: loss(x, weight, y), (e,), (e,))
        message = "no error"
    except NotImplementedError as error:
        message = str(error)
    yield f"forward mode: {message[:60]}", float("reverse mode alone" not in message), 0.0
    try:
        torch.func.grad(lambda x: loss(x, weight, y))(e)
        message = "no error"
    except NotImplementedError as error:
        message = str(error)
    yield f"torch.func: {message[:60]}", float("reverse mode alone" not in message), 0.0


def two_dimensions() -> Cases:
    """Rows over one dimension of the mesh, classes over the other; sums count the rows of all."""
    count = dist.get_world_size()
    if count % 2:
        return
    mesh = init_device_mesh("cpu", (2, count // 2), mesh_dim_names=("rows", "classes"))
    for number, name in enumerate(IN_TWO_DIMENSIONS):
        case = BY_NAME[name]
        torch.manual_seed(number)
        p = problem(case, everything(case, "shift"), ("mean", "batchmean", "none")[number % 3], rows=(5, 2), classes=7)
        placed: dict[str, Any] = {"input": [Shard(0), Replicate()], "linear_weight": [Replicate(), Shard(0)]}
        if "linear_bias" in p.names:
            placed["linear_bias"] = [Replicate(), Shard(0)]
        expected = p.ours(*p.arguments)
        given = spread(p, mesh, placed)
        value = p.ours(*given)
        yield f"2-D {case}: value", distance(whole(value).detach(), expected.detach()), 1e-10
        found, alone = derivatives(p.ours(*given), given), derivatives(p.ours(*p.arguments), p.arguments)
        for at, (got, wanted) in enumerate(zip(found, alone, strict=True)):
            yield f"2-D {case}: derivative {at}", distance(got.detach(), wanted.detach()), 1e-10
    # A shift looks over the edge of a process's part of a sequence.
    p = problem(BY_NAME["cross_entropy-indices"], {"shift": 1, "ignore_index": -100}, rows=(3, 6), classes=7)
    given = spread(p, mesh, {"input": [Shard(1), Replicate()], "linear_weight": [Replicate(), Shard(0)]})
    yield "2-D shift", distance(whole(p.ours(*given)).detach(), p.ours(*p.arguments).detach()), 1e-10


@dataclass(frozen=True)
class OwnMember(softcurve.AlphaDivergence):
    """A member that no kernel names, with the formulas of the α-divergence."""


def own_members(mesh: DeviceMesh) -> Cases:
    """A user's own member of the family, whole and cut, against each kind of distribution."""
    generator = torch.Generator().manual_seed(5)
    x, w, t = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((6, 5), (90, 5), (6, 90)))
    indices = t.topk(3).indices
    lists = softcurve.TopK(indices, torch.log_softmax(t, -1).gather(-1, indices))
    probabilities = softcurve.Probabilities(torch.softmax(t, -1))
    targets = {"Logits": softcurve.Logits(t), "Probabilities": probabilities, "TopK": lists}
    for kind, target in targets.items():
        for budget in (None, 8 * 6000):
            values, products = [], []
            for weight in (w, distribute_tensor(w, mesh, [Shard(0)])):
                leaf = weight.detach().requires_grad_()
                value = softcurve.linear_divergence(
                    x, leaf, target, divergence=OwnMember(0.4), memory_budget=budget
                )  # fmt: skip
                values.append(whole(value).detach())
                products.append(torch.cat([whole(each).detach() for each in derivatives(value, (leaf,))]))
            alone, sharded = values
            yield f"own member, {kind}, {budget}: value", distance(sharded, alone), 1e-10
            alone, sharded = products
            yield f"own member, {kind}, {budget}: derivatives", distance(sharded, alone), 1e-10


def statistics_and_distillation(mesh: DeviceMesh) -> Cases:
    """Statistics of a sharded softmax, of rows sure of a class too, and labels beside a teacher; whole and cut."""
    generator = torch.Generator().manual_seed(8)
    x, w, t = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((6, 5), (90, 5), (6, 90)))
    x[:3] *= 20
    index, labels = t.topk(3).indices, torch.tensor([0, 89, -100, 45, 7, 31])
    temperature = torch.rand(6, generator=generator, dtype=torch.float64) + 0.5

    exclude = torch.randint(-1, 90, (6, 4), generator=generator)
    exclude[0, 0] = index[0, 0]

    def statistics(x: Tensor, w: Tensor, budget: int | None) -> Tensor:
        found = softcurve.linear_log_probs(x, w, index, temperature=temperature, exclude=exclude, memory_budget=budget)
        columns = torch.stack([whole(part) for part in found[1:]], -1)
        log_probs = whole(found.log_probs)
        log_probs = torch.where(log_probs.isinf(), 1.0, log_probs)  # of an excluded class
        return (torch.cat([log_probs, columns], -1).sin()).sum(-1)

    def distillation(x: Tensor, w: Tensor, budget: int | None) -> Tensor:
        options: dict[str, Any] = {"alpha": 0.3, "temperature": 2.0, "entropy_bonus": 0.1, "label_smoothing": 0.1}
        return softcurve.linear_distillation(
            x, w, labels, softcurve.Logits(t), divergence=softcurve.ReverseKL(), reduction="none",
            memory_budget=budget, **options,
        )  # fmt: skip

    def mean_and_statistics(x: Tensor, w: Tensor, budget: int | None) -> Tensor:
        loss, stats = softcurve.linear_distillation(
            x, w, labels, softcurve.Logits(t), alpha=0.3, temperature=2.0, exclude=exclude[:, 1:],
            weight=torch.linspace(0.5, 2, 90, dtype=torch.float64), memory_budget=budget, return_stats=True,
        )  # fmt: skip
        return whole(loss) + torch.stack([whole(part) for part in stats[:5]]).sin().sum(0)

    for function in (statistics, distillation, mean_and_statistics):
        for budget in (None, 8 * 6000):
            results = []
            by_rows = distribute_tensor(x, mesh, [Shard(0)]), distribute_tensor(w, mesh, [Replicate()])
            for features, weight in ((x, w), (x, distribute_tensor(w, mesh, [Shard(0)])), by_rows):
                leaves = features.detach().requires_grad_(), weight.detach().requires_grad_()
                value = function(*leaves, budget)
                results.append([whole(value).detach(), *(whole(each).detach() for each in derivatives(value, leaves))])
            for number, (alone, *sharded) in enumerate(zip(*results, strict=True)):
                for layout, found in zip(("classes", "rows"), sharded, strict=True):
                    yield f"{function.__name__}, {layout}, {budget}: {number}", distance(found, alone), 1e-10


def wide_heads(mesh: DeviceMesh, rows: int | None = None) -> Cases:
    """A weight of low rank, and chosen classes of a teacher whose weight is plain; ``rows``: the mesh's dimension."""
    generator = torch.Generator().manual_seed(6)
    shapes = ((6, 5), (11, 5), (11, 2), (2, 5), (), (6, 3), (13, 3), (13, 1), (1, 3), (13,))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    chosen = torch.randperm(13, generator=generator)[:11].index_fill(0, torch.tensor([4]), -1)
    by_rows, by_class = ([Replicate()] * mesh.ndim for _ in range(2))
    by_class[-1] = Shard(0)
    if rows is not None:
        by_rows[rows] = Shard(0)

    def value(x: Tensor, *more: Tensor, budget: int | None = None) -> Tensor:
        w, a, b, scale, e, u, c, d, bias = more
        teacher = softcurve.LinearTeacher(e, softcurve.LowRankWeight(u, c, d), bias, classes=chosen, softcap=2.0)
        weight = softcurve.LowRankWeight(w, a, b, scale)
        return softcurve.linear_js_divergence(x, weight, teacher, temperature=0.7, memory_budget=budget)

    alone = [t.clone().requires_grad_() for t in tensors]
    expected = value(*alone)
    truth = list(derivatives(expected, tuple(alone)))
    for spread_a in (True, False):
        placed = {0: by_rows, 1: by_class, 2: by_class, 5: by_rows} if rows is not None else {1: by_class, 2: by_class}
        if not spread_a:
            del placed[2]
        given = [
            (distribute_tensor(t, mesh, placed[n]) if n in placed else t.clone()).requires_grad_()
            for n, t in enumerate(tensors)
        ]
        for budget in (None, 9000):
            name = f"low rank, {rows}, {spread_a}, {budget}"
            found = value(*given, budget=budget)
            yield f"{name}: value", distance(whole(found).detach(), expected.detach()), 1e-10
            for at, (got, right) in enumerate(zip(derivatives(found, tuple(given)), truth, strict=True)):
                yield f"{name}: derivative {at}", distance(got.detach(), right.detach()), 1e-10


def most_probable(mesh: DeviceMesh) -> Cases:
    """The list of a head, its equal logits in order over the processes; uneven and empty parts, masked classes, rows cut."""
    generator = torch.Generator().manual_seed(6)
    for classes, k in ((2, 2), (11, 7), (90, 20)):
        for number, by_rows in enumerate((False, True)):
            x, w, b = (
                torch.randint(-2, 3, s, generator=generator).double() for s in ((3, 4, 3), (classes, 3), (classes,))
            )
            b = torch.where(torch.arange(classes) % 5 == 3, -torch.inf, b)
            options: dict[str, Any] = {"temperature": 0.7, "softcap": 2.5} if number else {}
            if classes > 2:
                options["exclude"] = torch.randint(-1, classes, (3, 4, 3), generator=generator)
            alone = softcurve.linear_topk(x, w, k, linear_bias=b, **options)
            rows = distribute_tensor(x, mesh, [Shard(0)]) if by_rows else x
            weight, bias = (distribute_tensor(t, mesh, [Shard(0)]) for t in (w, b))
            for budget in (None, 40_000):
                name = f"list of {k} of {classes}, {by_rows}, {budget}"
                many = softcurve.linear_topk(rows, weight, k, linear_bias=bias, memory_budget=budget, **options)
                assert isinstance(many.indices, DTensor) == by_rows
                yield f"{name}: indices", float(not torch.equal(whole(many.indices), alone.indices)), 0.0
                yield f"{name}: log-probabilities", distance(whole(many.log_probs), alone.log_probs), 1e-10
                loss = softcurve.linear_kl_divergence(rows, weight, many, linear_bias=bias, **options)
                truth = softcurve.linear_kl_divergence(x, w, alone, linear_bias=b, **options)
                yield f"{name}: loss", distance(whole(loss), truth), 1e-10


def main() -> Cases:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    yield from all_losses(mesh)
    yield from unusual_rows(mesh)
    yield from refused(mesh)
    yield from two_dimensions()
    if mesh.size() == 3:
        yield from half_precision(mesh)
        yield from own_members(mesh)
    yield from wide_heads(mesh)
    yield from statistics_and_distillation(mesh)
    if mesh.size() == 4:
        yield from wide_heads(init_device_mesh("cpu", (2, 2)), rows=0)
    yield from most_probable(mesh)


if __name__ == "__main__":
    begin(main)
