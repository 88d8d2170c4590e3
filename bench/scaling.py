"""What a step costs over many processes, as formulas: operations, memory, messages (docs/scaling.md).

``tests/test_scaling.py`` holds the formulas to what is counted: torch's count of operations, and the bytes that the
processes of small meshes hand to their collectives. What follows for a machine rests on assumed rates, and says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.tables import print_head, print_row

GIGA = 1e9


@dataclass(frozen=True)
class Step:
    """``rows × width`` features, ``classes``; rows over ``by_rows`` processes, classes over ``by_classes``."""

    rows: int
    width: int
    classes: int
    by_rows: int = 1
    by_classes: int = 1
    tile: int | None = None  # rows of a tile; all at once by default
    itemsize: int = 2  # of parameters and features; sums are in single precision, or the parameters' own if wider

    @property
    def own_rows(self) -> int:
        """Of the process that has most; the same below."""
        return -(-self.rows // self.by_rows)

    @property
    def own_classes(self) -> int:
        """``C / R``."""
        return -(-self.classes // self.by_classes)

    @property
    def tiles(self) -> int:
        """Of one process."""
        return -(-self.own_rows // (self.tile or self.own_rows))

    @property
    def product(self) -> int:
        """Operations of one matrix product of one process."""
        return 2 * self.own_rows * self.width * self.own_classes

    @property
    def wide(self) -> int:
        """Bytes of an entry of a sum."""
        return max(self.itemsize, 4)


# --- operations, in products of one process ---------------------------------------------------------------------------

LOSS, GRADIENTS, TEACHER, HESSIAN_PRODUCT = 1, 3, 1, 7


def curvature_products(columns: int) -> int:
    """Of a Gauss-Newton product with directions in the weight: logits once, and two for each column."""
    return 1 + 2 * columns


# A message by which processes on the CPU see that their arguments go together, once on each dimension of the mesh.
ON_THE_CPU = 64

# --- bytes that one process hands to each collective ------------------------------------------------------------------


def of_list(rows: int, listed: int, *, directed: bool = False) -> list[int]:
    """Of a tile: the largest logit; then the listed logits and the others' sum, and their changes along a direction."""
    return [8 * rows, 8 * rows * (listed + 1) * (2 if directed else 1)]


def of_distribution(rows: int, *, sides: int, directed: bool = False) -> list[int]:
    """Of a tile whose target speaks of every class; two sides have a softmax, the target's by logits too.

    The largest logits; ``Σ e^z`` and who has the largest; the loss, ``Σ(p − y)``, the entropy and of each side ``S``,
    ``S`` without the largest class, ``p·ż``; and along a direction the sums of both sides' changes.
    """
    return [8 * rows * sides, 16 * rows * sides, 8 * rows * (3 + 3 * sides), *([16 * rows] if directed else [])]


def of_gradients(step: Step) -> list[int]:
    """The features' gradient, or its change, over the classes; the weight's over the rows, as it is rounded."""
    features = [step.wide * step.own_rows * step.width] if step.by_classes > 1 else []
    weight = [step.itemsize * step.own_classes * step.width] if step.by_rows > 1 else []
    return features + weight


def on_the_wire(payload: int, ways: int) -> float:
    """What a ring's process sends for an all-reduce of ``payload`` bytes."""
    return 2 * payload * (ways - 1) / ways


# --- a machine ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Rates that are assumed: of products, of a link within a node and beyond it, of a message."""

    operations: float = 700e12  # a second, of bfloat16
    near: float = 450e9  # bytes a second, each way
    far: float = 50e9
    node: int = 8
    latency: float = 20e-6

    def seconds(self, payload: int, ways: int, messages: int = 1) -> float:
        """Of an all-reduce among neighbours, or beyond a node."""
        if ways == 1:
            return 0.0
        rate = self.near if ways <= self.node else self.far
        return on_the_wire(payload, ways) / rate + messages * self.latency


def predicted(step: Step, machine: Machine) -> dict[str, float]:
    """Of the loss of class indices with its gradients: seconds of each part, and bytes of memory."""
    statistics = sum(of_list(step.own_rows, 1))
    sent = of_gradients(step)
    features = sent[0] if step.by_classes > 1 else 0
    weight = sent[-1] if step.by_rows > 1 else 0
    parameters = step.own_classes * step.width
    return {
        "products": GRADIENTS * step.product / machine.operations,
        "statistics": machine.seconds(statistics, step.by_classes, 2 * step.tiles),
        "features": machine.seconds(features, step.by_classes),
        # The processes that share a row of the mesh are neighbours; those that share its classes are not.
        "weight": on_the_wire(weight, step.by_rows) / machine.far + machine.latency if weight else 0.0,
        "weight bytes": parameters * (step.itemsize + step.wide),
        "features bytes": step.own_rows * step.width * (step.itemsize + step.wide),
        "logits bytes": 4.0 * step.own_rows * step.own_classes,
    }


MILLION = Step(rows=2**22, width=8192, classes=2**20)
MESHES = ((1, 1024), (8, 128), (64, 16), (1024, 1))


def tiled(step: Step, budget: int = 2**30) -> Step:
    """With the tile of whole shards of rows that a budget of bytes holds: single-precision logits."""
    return Step(**{**vars(step), "tile": max(1, budget // (4 * step.own_classes))})


def print_scaling(meshes: Sequence[tuple[int, int]] = MESHES) -> None:
    """The prediction for 1,024 processes and a million classes, by the shape of the mesh."""
    print(f"\nassumed, not measured: {Machine()}\n")
    print_head("classes × rows", "products s", "statistics s", "features s", "weight s", "weight GB", "features GB")
    for by_classes, by_rows in meshes:
        step = tiled(Step(MILLION.rows, MILLION.width, MILLION.classes, by_rows, by_classes))
        found = predicted(step, Machine())
        print_row(
            f"{by_classes} × {by_rows}",
            *(f"{found[name]:.3f}" for name in ("products", "statistics", "features", "weight")),
            *(f"{found[name] / GIGA:.1f}" for name in ("weight bytes", "features bytes")),
        )
