"""The cost model of docs/scaling.md: operations, memory and messages of a distributed step.

``tests/sharded_training.py`` compares the formulas with operations counted by torch and bytes counted at the
collectives of small meshes. The predictions of seconds use assumed rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.tables import print_head, print_row

GIGA = 1e9


@dataclass(frozen=True)
class Step:
    """A step with ``rows × width`` features; ``by_rows`` processes share the rows, ``by_classes`` the classes."""

    rows: int
    width: int
    classes: int
    by_rows: int = 1
    by_classes: int = 1
    tile: int | None = None  # rows per tile; all rows by default
    itemsize: int = 2  # bytes per parameter and feature; sums use single precision or the parameters' dtype if wider

    @property
    def own_rows(self) -> int:
        """The largest number of rows of a process."""
        return -(-self.rows // self.by_rows)

    @property
    def own_classes(self) -> int:
        """The largest number of classes of a process."""
        return -(-self.classes // self.by_classes)

    @property
    def tiles(self) -> int:
        """The number of tiles of a process."""
        return -(-self.own_rows // (self.tile or self.own_rows))

    @property
    def product(self) -> int:
        """The operations of one matrix product of a process."""
        return 2 * self.own_rows * self.width * self.own_classes

    @property
    def wide(self) -> int:
        """The bytes of an entry of a sum."""
        return max(self.itemsize, 4)


# --- operations, in matrix products per process -----------------------------------------------------------------------

LOSS, GRADIENTS, TEACHER, HESSIAN_PRODUCT = 1, 3, 1, 7


def curvature_products(columns: int) -> int:
    """Return the products of a Gauss-Newton product in the weight: the logits once, and two for each column."""
    return 1 + 2 * columns


# Bytes of the message that checks the consistency of arguments on the CPU, once for each dimension of the mesh.
ON_THE_CPU = 64

# --- bytes that one process passes to each collective -----------------------------------------------------------------


def of_list(rows: int, listed: int, *, directed: bool = False) -> list[int]:
    """Return the messages of a tile with a list: the largest logit; the listed logits and the sum of the others.

    With ``directed``, the second message also contains their directional derivatives.
    """
    return [8 * rows, 8 * rows * (listed + 1) * (2 if directed else 1)]


def of_distribution(rows: int, *, sides: int, directed: bool = False) -> list[int]:
    """Return the messages of a tile with a target over all classes; ``sides`` is 2 if the target is given by logits.

    They contain the largest logits; ``Σ e^z`` and the process of the largest logit; the loss, ``Σ(p − y)`` and, for
    each side, ``S`` and ``S`` without the largest class. With ``directed`` they also contain, for each side, ``p·ż``
    without the largest class and the ``ż`` of that class, and the sums of the directional derivatives of both sides.
    """
    sums = 8 * rows * (2 + (4 if directed else 2) * sides)
    return [8 * rows * sides, 16 * rows * sides, sums, *([16 * rows] if directed else [])]


def of_groups(
    rows: int, groups: int, several: int, *, sides: int, itemsize: int = 4, directed: bool = False
) -> list[int]:
    """Return the messages of a tile with a target of a ``ClassMap``; ``sides`` counts those with sharded classes.

    They contain the largest logits; for each side the largest parts of the groups with classes on ``several``
    processes, and a number for each of the ``groups``. With ``directed`` they also contain the directional derivatives
    of the groups. Entries have the size of the computation's dtype.
    """
    side = [rows * several] * (several > 0) + [rows * groups] * (2 if directed else 1)
    return [itemsize * number for number in (rows * sides, *side * sides)]


def of_gradients(step: Step) -> list[int]:
    """Return the messages that sum the features' gradient over classes, and the rounded weight's over rows."""
    features = [step.wide * step.own_rows * step.width] if step.by_classes > 1 else []
    weight = [step.itemsize * step.own_classes * step.width] if step.by_rows > 1 else []
    return features + weight


def on_the_wire(payload: int, ways: int) -> float:
    """Return the bytes that a process sends for a ring all-reduce of ``payload`` bytes."""
    return 2 * payload * (ways - 1) / ways


# --- a machine ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Assumed rates of matrix products, of links within a node and between nodes, and the latency of a message."""

    operations: float = 700e12  # per second, in bfloat16
    near: float = 450e9  # bytes per second and direction
    far: float = 50e9
    node: int = 8
    latency: float = 20e-6

    def seconds(self, payload: int, ways: int, messages: int = 1) -> float:
        """Return the seconds of an all-reduce within a node or between nodes."""
        if ways == 1:
            return 0.0
        rate = self.near if ways <= self.node else self.far
        return on_the_wire(payload, ways) / rate + messages * self.latency


def predicted(step: Step, machine: Machine) -> dict[str, float]:
    """Predict the seconds of each part and the bytes of memory of a loss of class indices with its gradients."""
    statistics = sum(of_list(step.own_rows, 1))
    sent = of_gradients(step)
    features = sent[0] if step.by_classes > 1 else 0
    weight = sent[-1] if step.by_rows > 1 else 0
    parameters = step.own_classes * step.width
    return {
        "products": GRADIENTS * step.product / machine.operations,
        "statistics": machine.seconds(statistics, step.by_classes, 2 * step.tiles),
        "features": machine.seconds(features, step.by_classes),
        # Processes that share the same rows are in one node; those that share the same classes are in different nodes.
        "weight": on_the_wire(weight, step.by_rows) / machine.far + machine.latency if weight else 0.0,
        "weight bytes": parameters * (step.itemsize + step.wide),
        "features bytes": step.own_rows * step.width * (step.itemsize + step.wide),
        "logits bytes": 4.0 * step.own_rows * step.own_classes,
    }


MILLION = Step(rows=2**22, width=8192, classes=2**20)
MESHES = ((1, 1024), (8, 128), (64, 16), (1024, 1))


def tiled(step: Step, budget: int = 2**30) -> Step:
    """Return the step with the largest tile of rows whose single-precision logits fit into a budget of bytes."""
    return Step(**{**vars(step), "tile": max(1, budget // (4 * step.own_classes))})


def print_scaling(meshes: Sequence[tuple[int, int]] = MESHES) -> None:
    """Print the prediction for 1,024 processes and a million classes, for several shapes of the mesh."""
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
