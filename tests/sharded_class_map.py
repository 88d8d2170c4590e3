"""Targets of a ``ClassMap`` with the classes of both sides over the processes, beside the same on one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import softcurve
from softcurve import ClassMap, JensenShannon, LinearTeacher, Logits, LowRankWeight, Probabilities

from .cases import least_of
from .pairwise import pairwise
from .process_cases import Cases, begin, distance
from .sharded_heads import derivatives, whole
from .test_class_map import OwnMember

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


LEVELS: dict[str, Any] = {
    "teacher": list(TEACHERS),
    "divergence": list(DIVERGENCES),
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
        of_model = [torch.randn(shape) for shape in ((*ROWS, WIDTH), (student, WIDTH), (student,), (student, 2), (2, WIDTH))]
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


def settings() -> list[dict[str, Any]]:
    return pairwise(LEVELS, possible)


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
            budget = least_of(str(error))
    (value, statistics), (expected, right) = case(*many, budget=budget), case(*alone, budget=None)
    for number, (got, wanted) in enumerate(zip(statistics, right, strict=True)):
        yield f"{name}: statistics {number}", distance(whole(got).detach(), wanted.detach()), 1e-10
    yield f"{name}: value", distance(whole(value).detach(), expected.detach()), 1e-10
    pairs = zip(derivatives(value, tuple(many)), derivatives(expected, tuple(alone)), strict=True)
    for number, (got, wanted) in enumerate(pairs):
        yield f"{name}: derivative {number}", distance(got.detach(), wanted.detach()), 1e-10


def all_settings(mesh: DeviceMesh) -> Cases:
    for number, setting in enumerate(settings()):
        torch.manual_seed(number)
        rows = 0 if setting["layout"] == "rows" else None
        yield from compare(f"{number} {setting}", Case(setting), mesh, 0, rows)


def main() -> Cases:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    yield from all_settings(mesh)


if __name__ == "__main__":
    begin(main)
