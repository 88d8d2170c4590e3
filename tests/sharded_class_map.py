"""Targets of a ``ClassMap`` with the classes of both sides over the processes, beside the same on one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from bench import scaling
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import softcurve
from softcurve import ClassMap, JensenShannon, LinearTeacher, Logits, LowRankWeight, Probabilities

from .cases import least_of
from .pairwise import pairwise
from .process_cases import Cases, begin, distance
from .sharded_heads import derivatives, whole
from .sharded_training import counted
from .test_class_map import MAPS, OwnMember

F64 = torch.float64
ROWS, WIDTH, NARROW = (3, 2), 4, 3  # rows, and features of the model and of a teacher
DIVERGENCES = {
    "forward": softcurve.ForwardKL(), "reverse": softcurve.ReverseKL(), "js": JensenShannon(0.3), "own": OwnMember(0.3),
}  # fmt: skip
# Classes of the model and of the teacher: uneven shards, and fewer of either side, or one, than there are processes.
CLASSES = ((11, 14), (2, 9), (9, 2), (5, 1))
# The tensors of a teacher, which of them are sharded on their classes, and what it makes of them.
CHOSEN = torch.tensor([3, 0, -1, 2])


@dataclass(frozen=True)
class Teacher:
    """A kind of teacher: the tensors of so many classes, and the placements of those that are not plain."""

    tensors: Callable[[int], list[Tensor]]
    make: Callable[..., Any]
    placed: dict[int, Any]


def of_head(classes: int) -> list[Tensor]:
    return [torch.randn(*ROWS, NARROW), torch.randn(classes, NARROW), torch.randn(classes)]


def of_low_rank(classes: int) -> list[Tensor]:
    return [*of_head(classes), torch.randn(classes, 2), torch.randn(2, NARROW)]


def of_values(classes: int) -> list[Tensor]:
    return [torch.randn(*ROWS, classes)]


def of_masses(classes: int) -> list[Tensor]:
    return [torch.randn(*ROWS, classes, dtype=F64).softmax(-1)]


def head(e: Tensor, u: Tensor, bias: Tensor) -> LinearTeacher:
    return LinearTeacher(e, u, bias, softcap=3.0, scale=0.7)


def low_rank(e: Tensor, u: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> LinearTeacher:
    return LinearTeacher(e, LowRankWeight(u, a, b, 0.5), bias)


def chosen(e: Tensor, u: Tensor, bias: Tensor) -> LinearTeacher:
    return LinearTeacher(e, u, bias, classes=CHOSEN[torch.arange(len(u)) % 4].clamp(max=len(u) - 1))


ON_CLASSES = {1: 0, 2: 0}
TEACHERS = {
    "head": Teacher(of_head, head, {}),
    "sharded head": Teacher(of_head, head, ON_CLASSES),
    "low rank": Teacher(of_low_rank, low_rank, ON_CLASSES | {3: 0}),
    "chosen classes": Teacher(of_head, chosen, {}),
    "logits": Teacher(of_values, Logits, {}),
    "sharded logits": Teacher(of_values, Logits, {0: len(ROWS)}),
    "probabilities": Teacher(of_masses, Probabilities, {}),
    "sharded probabilities": Teacher(of_masses, Probabilities, {0: len(ROWS)}),
}


def map_of(name: str, student: int, teacher: int) -> ClassMap:
    """Groups of one class and a rest, of several classes here and there, or with one that only the teacher has."""
    count = min(student, teacher)
    sides = [torch.randperm(classes) for classes in (student, teacher)]
    if name == "bucket":
        return ClassMap(*(side.clamp(max=count - 1) for side in sides))
    ragged = [side * side % count for side in sides]
    if name == "ragged":
        used = torch.cat(ragged).unique()
        return ClassMap(*(torch.searchsorted(used, side) for side in ragged))
    count = max(1, student // 2)
    return ClassMap(sides[0] % count, torch.cat([torch.tensor([count]), sides[1][1:] % count]))


# Four processes, whose messages cost several times those of two, take fewer combinations.
KINDS: dict[int, Any] = {
    2: (list(TEACHERS), list(DIVERGENCES)),
    3: (["sharded head", "chosen classes", "logits", "sharded probabilities"], ["reverse", "js"]),
    4: (["sharded head", "low rank", "sharded logits"], ["forward", "own"]),
}
LEVELS: dict[str, Any] = {
    "classes": CLASSES,
    "map": ("bucket", "ragged", "one-sided"),
    "loss": ("divergence", "distillation", "statistics"),
    "layout": ("plain rows", "rows"),
    "temperature": (1.0, 0.7),
    "softcap": (None, 2.5),
    "tiles": ("whole", "few rows"),
    "reduction": ("mean", "none"),
    "excludes": (False, True),
}


def possible(name: str, level: Any, other: str, value: Any) -> bool:
    """A group without a class of the model is compared where that is finite."""
    return {(name, level), (other, value)} not in (
        {("divergence", "forward"), ("map", "one-sided")},
        {("divergence", "forward"), ("excludes", True)},
        {("divergence", "reverse"), ("excludes", True)},
    )


OF_TEACHER = 5  # where the leaves of a teacher begin


class Case:
    """A loss of the leaves ``x, w, b`` and a teacher's."""

    def __init__(self, setting: dict[str, Any]) -> None:
        self.setting, self.teacher = setting, TEACHERS[setting["teacher"]]
        student, classes = setting["classes"]
        self.map = map_of(setting["map"], student, classes)
        of_model = [
            torch.randn(shape) for shape in ((*ROWS, WIDTH), (student, WIDTH), (student,), (student, 2), (2, WIDTH))
        ]
        self.leaves = [leaf.to(F64) for leaf in (*of_model, *self.teacher.tensors(classes))]
        self.labels = torch.randint(student, ROWS)
        self.exclude = torch.randint(-1, student, (*ROWS, 1)) if student > 2 else None

    def __call__(self, *leaves: Tensor, budget: int | None) -> tuple[Tensor, list[Tensor]]:
        """The loss, its statistics added to it if they are wanted, and the statistics that have no derivatives."""
        s, (x, w, b, low, rank, *of_teacher) = self.setting, leaves
        target = self.map.target(self.teacher.make(*of_teacher))
        options = {
            "divergence": DIVERGENCES[s["divergence"]], "temperature": s["temperature"], "softcap": s["softcap"],
            "reduction": s["reduction"], "linear_bias": b, "memory_budget": budget,
            "exclude": self.exclude if s["excludes"] else None,
        }  # fmt: skip
        if s["loss"] == "divergence":
            return softcurve.linear_divergence(x, LowRankWeight(w, low, rank, 0.5), target, **options), []
        more = {"return_stats": s["loss"] == "statistics"}
        if s["loss"] == "statistics" and s["softcap"] is None:
            loss, stats = softcurve.linear_divergence(x, w, target, **options, **more)
        else:
            options |= {"alpha": 0.4, "entropy_bonus": 0.1, "label_smoothing": 0.1}
            loss = softcurve.linear_distillation(x, w, self.labels, target, **options, **more)
            if s["loss"] == "distillation":
                return loss, []
            loss, stats = loss
        numbers = [each for each in stats if each.shape[len(ROWS) - 1 :] == ROWS[-1:]]
        moving = [each for each in numbers if each.is_floating_point()]
        rows = sum((each.where(each.isfinite(), 0.0).sin() for each in moving), start=0)
        return whole(loss) + whole(rows if s["reduction"] == "none" else rows.sum()), [*numbers]  # type: ignore[union-attr]


def settings(processes: int) -> list[dict[str, Any]]:
    teachers, divergences = KINDS[processes]
    return pairwise({"teacher": teachers, "divergence": divergences} | LEVELS, possible)


def spread(case: Case, mesh: DeviceMesh, by_class: int, rows: int | None) -> list[Tensor]:
    """The leaves where the setting has them; ``rows`` is the dimension of the mesh that has those of the features."""
    placed = {1: 0, 2: 0, 3: 0} | {OF_TEACHER + number: dim for number, dim in case.teacher.placed.items()}
    leaves = []
    for number, leaf in enumerate(case.leaves):
        placements: list[Any] = [Replicate()] * mesh.ndim
        if number in placed:
            placements[by_class] = Shard(placed[number])
        if rows is not None and number in (0, OF_TEACHER):  # features of both sides, or values
            placements[rows] = placements[rows] if placements[rows].is_shard() else Shard(0)
        plain = all(placement.is_replicate() for placement in placements)
        leaves.append(leaf.clone() if plain else distribute_tensor(leaf, mesh, placements))
    return [leaf.requires_grad_() for leaf in leaves]


def compare(name: str, case: Case, mesh: DeviceMesh, by_class: int, rows: int | None) -> Cases:
    alone, many = [leaf.clone().requires_grad_() for leaf in case.leaves], spread(case, mesh, by_class, rows)
    budget = None
    if case.setting["tiles"] == "few rows":
        try:
            case(*many, budget=1)
        except ValueError as error:
            budget = least_of(str(error)) * 5 // 4  # the pass of statistics needs more than that of the loss
    (value, statistics), (expected, right) = case(*many, budget=budget), case(*alone, budget=None)
    for number, (got, wanted) in enumerate(zip(statistics, right, strict=True)):
        yield f"{name}: statistics {number}", distance(whole(got).detach(), wanted.detach()), 1e-10
    yield f"{name}: value", distance(whole(value).detach(), expected.detach()), 1e-10
    pairs = zip(derivatives(value, tuple(many)), derivatives(expected, tuple(alone)), strict=True)
    for number, (got, wanted) in enumerate(pairs):
        yield f"{name}: derivative {number}", distance(got.detach(), wanted.detach()), 1e-10


def all_settings(mesh: DeviceMesh) -> Cases:
    for number, setting in enumerate(settings(mesh.size())):
        torch.manual_seed(number)
        rows = 0 if setting["layout"] == "rows" else None
        yield from compare(f"{number} {setting}", Case(setting), mesh, 0, rows)


def two_dimensions() -> Cases:
    """Rows over one dimension of the mesh, classes over the other."""
    mesh = init_device_mesh("cpu", (2, 2))
    for number, teacher in enumerate(("head", "sharded head", "probabilities", "sharded logits")):
        torch.manual_seed(number)
        setting = {name: values[number % len(values)] for name, values in LEVELS.items()}
        setting |= {"teacher": teacher, "divergence": "js", "classes": (7, 5)}
        yield from compare(f"2-D {setting}", Case(setting), mesh, 1, 0)


def beside_offsets(mesh: DeviceMesh) -> Cases:
    """Common offsets change nothing in single precision; one class of either side has nearly all of the mass."""
    generator = torch.Generator().manual_seed(3)
    y, z = (torch.randint(-1500, 1500, (4, classes), generator=generator) / 512 for classes in (14, 11))
    y[1, 0], z[1, 5] = 26.0, 26.0  # a loss of 1e-9
    y[:, 5], z[:, 7] = -torch.inf, -torch.inf
    groups = ClassMap(*map(torch.tensor, MAPS["bucket"]))
    for offset in (0.0, 1e4):
        for spreads in (False, True):
            target, w = y + offset, (z + offset).masked_fill(z == -torch.inf, 0.0).T.contiguous()
            bias = torch.zeros(11).masked_fill(z[0] == -torch.inf, -torch.inf)
            target = distribute_tensor(target, mesh, [Shard(1)]) if spreads else target
            weight, bias = (distribute_tensor(t, mesh, [Shard(0)]).requires_grad_() for t in (w, bias))
            loss = softcurve.linear_kl_divergence(
                torch.eye(4), weight, groups.target(Logits(target)), linear_bias=bias, reduction="none"
            )
            wide = z.double().requires_grad_()
            truth = softcurve.kl_divergence(groups.target(Logits(y.double())), wide, reduction="none")
            yield f"offset {offset}, {spreads}", float(((loss - truth).abs() / truth).detach().max()), 1e-5
            (in_w,), (in_z,) = torch.autograd.grad(loss.sum(), weight), torch.autograd.grad(truth.sum(), wide)
            yield f"offset {offset}, {spreads}: gradient", distance(whole(in_w).T, in_z), 1e-5


class Student(nn.Module):
    """Features, and a head that meets its teacher in ``forward``, where FSDP has its parameters whole."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Linear(3, WIDTH), softcurve.nn.LinearKLDivergenceLoss(WIDTH, 7, bias=True)

    def forward(self, x: Tensor, target: Any) -> Tensor:
        return self.head(torch.tanh(self.features(x)), target)


def beside_fsdp() -> Cases:
    """FSDP2 over rows, and the classes of model and teacher over the other dimension of the mesh."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "classes"))
    torch.manual_seed(0)
    x, e, u, groups = torch.randn(8, 3), torch.randn(8, NARROW), torch.randn(9, NARROW), map_of("ragged", 7, 9)
    alone, model = Student(), Student()
    model.load_state_dict(alone.state_dict())
    alone(x, groups.target(LinearTeacher(e, u))).backward()
    for name in ("weight", "bias"):
        part = distribute_tensor(getattr(model.head.linear, name).detach(), mesh["classes"], [Shard(0)])
        setattr(model.head.linear, name, nn.Parameter(part))
    for part in (model.head, model):
        fully_shard(part, mesh=mesh["rows"])
    half = slice(4 * mesh["rows"].get_local_rank(), 4 * mesh["rows"].get_local_rank() + 4)
    teacher = LinearTeacher(e[half], distribute_tensor(u, mesh["classes"], [Shard(0)]))
    model(x[half], groups.target(teacher)).backward()
    for (name, p), (_, right) in zip(model.named_parameters(), alone.named_parameters(), strict=True):
        assert p.grad is not None
        assert right.grad is not None
        yield f"FSDP2 and sharded classes: {name}", distance(whole(p.grad), right.grad), 1e-5


def traffic(mesh: DeviceMesh) -> Cases:
    """The formulas of docs/scaling.md, with one group of every process's classes; a plain target sends nothing."""
    rows = 12
    for classes in (64, 640):
        count, step = classes // 2 + 1, scaling.Step(rows, WIDTH, classes, by_classes=mesh.size(), itemsize=4)
        number = torch.arange(2 * classes)
        of_student = torch.where(number % 2 == 0, number // 2, count - 1)[:classes]
        groups = ClassMap(of_student, torch.where(number % 4 == 0, number // 4, count - 1))
        u = distribute_tensor(torch.randn(2 * classes, NARROW), mesh, [Shard(0)])
        teachers = {2: LinearTeacher(torch.randn(rows, NARROW), u), 1: Logits(torch.randn(rows, 2 * classes))}
        for sides, teacher in teachers.items():
            x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
            weight = distribute_tensor(torch.randn(classes, WIDTH), mesh, [Shard(0)]).requires_grad_()
            with counted() as sent:
                loss = softcurve.linear_kl_divergence(x, weight, groups.target(teacher))
                (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
            expected = [
                scaling.ON_THE_CPU,
                *scaling.of_groups(rows, count, 1, sides=sides),
                *scaling.of_gradients(step),
            ]
            yield f"traffic of {sides} sides, C={classes}: {sent} for {expected}", float(sent != expected), 0.0
            with counted() as sent:
                torch.autograd.grad(gradient.square().sum(), (x, weight))
            expected = [*scaling.of_groups(rows, count, 1, sides=sides, directed=True), *scaling.of_gradients(step)]
            yield f"Hessian product of {sides} sides, C={classes}: {sent} for {expected}", float(sent != expected), 0.0


def main() -> Cases:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    yield from all_settings(mesh)
    yield from beside_offsets(mesh)
    yield from traffic(mesh)
    if mesh.size() == 4:
        yield from two_dimensions()
        yield from beside_fsdp()


if __name__ == "__main__":
    begin(main)
