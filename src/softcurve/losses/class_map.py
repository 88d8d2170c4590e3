"""A map of two vocabularies into common groups, so that a model can be compared with a teacher of other classes.

The probability of a group is the sum of those of its classes, so its logit is their log-sum-exp:

    c_g = log Σ_{i in g} e^{z_i},     ∂c_g/∂z_i = e^{z_i − c_g}.

Merging classes never increases a divergence (data processing), so a divergence between groups bounds from below that
of any finer map.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple, NoReturn, TypeAlias

import torch
from torch import Tensor

from softcurve import checks
from softcurve.array_types import AnyInt, Column, Flags, Rows
from softcurve.losses.softmax import log_sum_exp, may_be_masked
from softcurve.losses.spec import LogitMap
from softcurve.losses.targets import Logits, Target
from softcurve.losses.topk import TopK
from softcurve.records import ShortRepr

Token: TypeAlias = str | bytes
Vocabulary: TypeAlias = Sequence[Token | None] | Mapping[Token, int]


class _SizeClass(NamedTuple):
    """Groups of nearly the same number of classes, at most ``size``."""

    classes: Tensor  # (groups · size,): those of the first group, of the second, ...
    size: int
    padding: Tensor | None  # (groups, size): the entries of ``classes`` that stand for none


@dataclass(frozen=True, eq=False)
class Groups:
    """The classes of one side by their groups, ``of (C,)``, for sums over the classes of every group.

    On a CPU, and on a GPU whose additions to one group would be atomic, gathering the classes of a group side by side
    is faster than scattering them, above all for one group of most classes. Groups whose sizes round up to the same
    power of two are gathered at once.
    """

    of: Tensor
    size_classes: tuple[_SizeClass, ...]
    place: Tensor | None  # (G,): where each group is among those of all size classes, if not in their order
    has_empty: bool  # whether a group has no class on this side; it is placed after all others

    @staticmethod
    def by(of: Tensor, count: int) -> Groups:
        """Gather the classes of ``count`` groups."""
        sizes = torch.bincount(of, minlength=count)
        order, starts = of.argsort(stable=True), sizes.cumsum(0) - sizes
        place, placed, size_classes, least = torch.full_like(sizes, -1), 0, [], 1
        while least <= len(of):
            groups = ((sizes >= least) & (sizes < 2 * least)).nonzero().squeeze(-1)
            if len(groups):
                size = int(sizes[groups].max())
                number = torch.arange(size, device=of.device)
                padding = number >= sizes[groups].unsqueeze(-1)
                classes = order[(starts[groups].unsqueeze(-1) + number).clamp(max=len(of) - 1)]
                size_classes.append(_SizeClass(classes.flatten(), size, padding if padding.any() else None))
                place[groups] = placed + torch.arange(len(groups), device=of.device)
                placed += len(groups)
            least *= 2
        place = torch.where(place < 0, placed, place)
        in_order = bool((place == torch.arange(count, device=of.device)).all())
        return Groups(of, tuple(size_classes), None if in_order else place, placed < count)

    def log_sum_exp(self, z: Rows) -> Tensor:
        """Return the logits of the groups, ``(..., G)``, from those of the classes; −inf where there is none."""
        return self._reduced(z, -torch.inf)

    def sums(self, values: Tensor) -> Tensor:
        """Return the sum over the classes of each group, ``(..., G)``."""
        return self._reduced(values, 0.0)

    def _reduced(self, values: Tensor, empty: float) -> Tensor:
        parts = []
        for classes, size, padding in self.size_classes:
            part = values.index_select(-1, classes)
            if size > 1:
                part = part.unflatten(-1, (-1, size))
                part = part if padding is None else part.masked_fill(padding, empty)
                part = part.sum(-1) if empty == 0 else log_sum_exp(part).squeeze(-1)
            parts.append(part)
        if self.has_empty:
            parts.append(values.new_full((*values.shape[:-1], 1), empty))
        merged = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return merged if self.place is None else merged.index_select(-1, self.place)

    def spread(self, values: Tensor) -> Tensor:
        """Return for each class the entry of its group, ``(..., C)``."""
        return values.index_select(-1, self.of)

    def shares(self, z: Rows, merged: Tensor) -> Tensor:
        """Return the share ``e^{z_i − c_g}`` of each class in its group, ``(..., C)``; 0 if all of it are masked."""
        shares = (z - self.spread(merged)).exp_()
        return shares.masked_fill_(z == -torch.inf, 0.0) if may_be_masked(merged) else shares


@dataclass(frozen=True, eq=False, repr=False)
class ClassMap(ShortRepr):
    """The groups that a model and a teacher with another vocabulary have in common.

    The probability of a group is the sum of the probabilities of its classes, on either side. Every divergence between
    the groups is defined, is ≥ 0, and is at most that of any finer map. A group with classes on one side only has no
    mass on the other: a divergence is infinite there as it is for classes without mass, for example the forward KL if
    the teacher has such a group, while a Jensen-Shannon divergence is finite. :meth:`of_tokens` therefore puts all
    tokens that are not shared into one group of both sides.

    Args:
        of_student: The group of each class of the model, integers of any dtype ``(C_student,)`` from 0 to ``G − 1``.
        of_teacher: The group of each class of the teacher, ``(C_teacher,)``.

    Raises:
        TypeError, ValueError: If a tensor is not one-dimensional or holds no integers ≥ 0, or if a number from 0 to
            the largest is the group of no class.

    Make it outside of a compiled function: it looks at the numbers once. :meth:`to` moves it to another device.

    Example:
        >>> class_map = softcurve.ClassMap.of_tokens(["a", "b", "ab"], ["b", "a", "ba", "c"])
        >>> teacher = softcurve.LinearTeacher(torch.randn(3, 8), torch.randn(4, 8))
        >>> x, w = torch.randn(3, 5), torch.randn(3, 5)
        >>> loss = softcurve.linear_kl_divergence(x, w, class_map.target(teacher))

    Source: the data-processing inequality, Cover and Thomas, "Elements of Information Theory", section 2.8.
    """

    of_student: AnyInt[Tensor, " student_classes"]
    of_teacher: AnyInt[Tensor, " teacher_classes"]
    count: int = field(init=False, repr=False)
    student: Groups = field(init=False, repr=False)
    teacher: Groups = field(init=False, repr=False)

    def __post_init__(self) -> None:
        sides = {name: _require_groups(name, getattr(self, name)) for name in ("of_student", "of_teacher")}
        used = torch.cat([*sides.values()]).unique()
        count = int(used[-1]) + 1
        if len(used) < count:
            missing = int((used != torch.arange(len(used), device=used.device)).int().argmax())
            raise ValueError(
                f"ClassMap groups must be numbered from 0 to the largest, {count - 1}, each with a class on one "
                f"side at least, got none in group {missing}; number them by torch.unique(..., return_inverse=True)"
            )
        student, teacher = (Groups.by(of, count) for of in sides.values())
        for name, value in {**sides, "count": count, "student": student, "teacher": teacher}.items():
            object.__setattr__(self, name, value)

    @staticmethod
    def of_tokens(
        student: Vocabulary, teacher: Vocabulary, *, student_classes: int | None = None,
        teacher_classes: int | None = None,
    ) -> ClassMap:  # fmt: skip
        """Make each shared token a group of its own, and all other classes of both sides one more.

        Args:
            student: The token of each class of the model: a sequence, where ``None`` is a class without a token, or a
                mapping of tokens to classes, as a tokenizer's ``get_vocab()``. Tokens must be written alike on both
                sides (``"Ġthe"`` is another token than ``"▁the"``). A token of several classes is not shared.
            teacher: The tokens of the teacher.
            student_classes: The number of classes of the model's head, by default as many as are named; classes
                without a token, such as the padding of a vocabulary, are not shared.
            teacher_classes: The same for the teacher.

        Raises:
            TypeError, ValueError: If a vocabulary is neither a sequence nor a mapping, if a token is neither ``str``
                nor ``bytes``, or if a vocabulary does not fit the number of classes.

        Example:
            >>> class_map = softcurve.ClassMap.of_tokens({"a": 0, "b": 1}, ["b", "<s>", "a"], student_classes=4)
            >>> class_map.of_student, class_map.of_teacher
            (tensor([0, 1, 2, 2]), tensor([1, 2, 0]))
        """
        of_student = _tokens_of_classes("student", student, student_classes)
        of_teacher = _tokens_of_classes("teacher", teacher, teacher_classes)
        both = [{token for token, n in Counter(of).items() if n == 1} - {None} for of in (of_student, of_teacher)]
        shared = [token for token in of_student if token in both[0] & both[1]]
        group = {token: number for number, token in enumerate(shared)}
        groups = ([group.get(token, len(group)) for token in of] for of in (of_student, of_teacher))
        return ClassMap(*(torch.tensor(each, dtype=torch.int64) for each in groups))

    def to(self, device: torch.device | str) -> ClassMap:
        """Return the map on a device."""
        return ClassMap(self.of_student.to(device), self.of_teacher.to(device))

    def target(self, teacher: Target) -> GroupedTarget | TopK:
        """Return a target that a model of the student's classes is compared with, by the groups.

        The losses take it in place of a teacher: ``kl_divergence``, ``js_divergence``, ``divergence``, their
        ``linear_`` forms and ``linear_distillation``. Scale, soft cap and temperature of both sides act on the classes,
        before they are merged; ``exclude`` leaves out classes of the model alone. Model and teacher receive gradients.

        The classes of a head and of a teacher may be distributed over processes. For each row they exchange a number
        for each group, of either side whose classes are distributed; a plain ``Probabilities`` or ``Logits`` sends
        nothing.

        A list does not say to which groups its bucket belongs. Known are the listed classes that are a group together
        with one class of the model, as the shared tokens of :meth:`of_tokens`: the target is the ``TopK`` of these
        classes of the model, and every other class of either side is in its bucket. Its divergences are at most those
        of the groups, at temperature 1; at others the rule of ``TopK`` for a bucket holds, over the model's classes.

        Args:
            teacher: ``Probabilities``, ``Logits``, a ``LinearTeacher``, a ``TopK`` with a bucket, or a target of your
                own over ``C_teacher`` classes.

        Raises:
            TypeError: If the teacher is no target, such as a plain tensor.
            ValueError: If it has another number of classes, or is a ``TopK`` with ``tail="renormalize"``, whose other
                classes have no probability to put into a bucket.
        """
        return self._shared_part_of(teacher) if isinstance(teacher, TopK) else GroupedTarget(teacher, self)

    def _shared_part_of(self, listed: TopK) -> TopK:
        """Return the list of the model's classes that share a group with one listed class each."""
        if listed.tail != "bucket":
            raise ValueError(
                "teacher of a ClassMap must be a TopK with tail='bucket', or give a probability to every class, got "
                f"tail={listed.tail!r}; pass TopK(indices, log_probs)"
            )
        zeros = self.of_student.new_zeros(self.count)
        sizes = [zeros.scatter_add(0, of, torch.ones_like(of)) for of in (self.of_student, self.of_teacher)]
        numbers = torch.arange(len(self.of_student), device=zeros.device)
        of_group = zeros.scatter(0, self.of_student, numbers)
        of_teacher = torch.where((sizes[0] == 1) & (sizes[1] == 1), of_group, -1)[self.of_teacher]
        indices = of_teacher[listed.listed_classes().clamp(0, len(of_teacher) - 1)]
        log_probs = torch.where(indices < 0, -torch.inf, listed.log_probs)
        # A malformed row becomes one entry of NaN, which a loss refuses unless the row does not count.
        malformed = listed.malformed(len(of_teacher)).unsqueeze(-1)
        nothing = torch.full_like(log_probs, -torch.inf).index_fill(-1, indices.new_zeros(1), torch.nan)
        return TopK(indices.clamp(min=0), torch.where(malformed, nothing, log_probs))


@dataclass(frozen=True, eq=False, repr=False)
class GroupedTarget(Target):
    """A teacher whose classes are merged into the groups of a :class:`ClassMap`; see :meth:`ClassMap.target`."""

    states_mass: ClassVar[bool] = True  # classes of the model that a row excludes are none of the teacher's

    teacher: Target
    class_map: ClassMap

    def __post_init__(self) -> None:
        teacher, classes = self.teacher, len(self.class_map.of_teacher)
        if not isinstance(teacher, Target):
            raise TypeError(
                "teacher must be one of softcurve.Probabilities, Logits, LinearTeacher, got "
                f"{type(teacher).__name__}; wrap the tensor to say what it holds"
            )
        if isinstance(teacher, TopK | GroupedTarget):  # of a TopK, ClassMap.target takes the part that is shared
            raise ValueError(
                f"teacher of a ClassMap must give a probability to every class, got {type(teacher).__name__}, "
                "which does not; pass Probabilities, Logits or a LinearTeacher"
            )
        if teacher.class_count != classes:
            raise ValueError(
                f"teacher must have the {classes} classes of ClassMap.of_teacher, got {teacher.class_count}; for a "
                "padded vocabulary pass teacher_classes to ClassMap.of_tokens"
            )

    @property
    def dtype(self) -> torch.dtype:  # noqa: D102
        return self.teacher.dtype

    @property
    def leading(self) -> torch.Size:  # noqa: D102
        return self.teacher.leading

    @property
    def class_count(self) -> int:  # noqa: D102
        return len(self.class_map.of_student)

    def require_values(self, classes: int, counted: Flags | None) -> None:  # noqa: D102
        self.teacher.require_values(self.teacher.class_count, counted)

    def malformed(self, classes: int) -> Flags:  # noqa: D102
        return self.teacher.malformed(self.teacher.class_count)

    def cleared(self, rows: Flags, classes: int) -> GroupedTarget:  # noqa: D102
        return replace(self, teacher=self.teacher.cleared(rows, self.teacher.class_count))

    def with_classes_last(self, dim: int) -> GroupedTarget:  # noqa: D102
        return replace(self, teacher=self.teacher.with_classes_last(dim))

    def logits(self, dtype: torch.dtype) -> Rows:
        """Raise ``ValueError``: the teacher has no logits of the model's classes."""
        raise ValueError(
            "a target of a ClassMap can be one side of a divergence; the other must have logits for all of the model's "
            "classes"
        )

    def distribution_against(self, z: Rows) -> tuple[Tensor, Tensor]:
        """Raise ``ValueError``: a group has no class of the model as its label."""
        self.refuse_labels()

    def refuse_labels(self) -> NoReturn:
        """Raise ``ValueError`` for a loss that compares the model with one of its own classes."""
        raise ValueError(
            "target must be over the model's own classes for a cross-entropy, got one of a ClassMap, whose groups are "
            "no classes; use a divergence, for example the forward KL, which has the gradients of the cross-entropy"
        )

    def tempered(self, z: Rows, logit_map: LogitMap) -> tuple[Tensor, Tensor]:
        """Return :meth:`against` of both sides after the ``logit_map``, which acts on classes and not on groups."""
        dtype = self._common_dtype(z)
        teacher = logit_map.shifted_value(self.teacher.logits(dtype).to(dtype))[0]
        return replace(self, teacher=Logits(teacher)).against(logit_map.shifted_value(z.to(dtype))[0])

    def against(self, z: Rows) -> tuple[Tensor, Tensor]:
        """Return the logits of the groups on both sides, ``(..., G)``, each less a constant of the row."""
        self.require_fit(z.shape)
        dtype = self._common_dtype(z)
        sides = ((self.class_map.student, z.to(dtype)), (self.class_map.teacher, self.teacher.logits(dtype).to(dtype)))
        model, target = (groups.log_sum_exp(logits - offset_of(logits)) for groups, logits in sides)
        return model, target


def offset_of(z: Rows) -> Column:
    """Return the largest logit of each row, or 0 if all are masked: a log-sum-exp would be rounded at its size."""
    top = z.detach().amax(-1, keepdim=True)
    return torch.where(top == -torch.inf, 0.0, top)


def _require_groups(name: str, groups: object) -> Tensor:
    """Return the group of each class as int64."""
    if not isinstance(groups, Tensor) or not checks.is_of_integers(groups):
        raise TypeError(
            f"ClassMap {name} must be a tensor of integers, the group of each class, got {checks.describe(groups)}; "
            "convert it with .long()"
        )
    if groups.ndim != 1 or not len(groups):
        raise ValueError(f"ClassMap {name} must have one group per class, shape (C,), got {checks.describe(groups)}")
    groups = groups.long()
    if int(groups.min()) < 0:
        raise ValueError(f"ClassMap {name} must hold groups >= 0, got {int(groups.min())}; give such classes a group")
    return groups


def _tokens_of_classes(name: str, vocabulary: Vocabulary, classes: int | None) -> list[Token | None]:
    """Return the token of each class, ``None`` where it has none."""
    if isinstance(vocabulary, str | bytes) or not isinstance(vocabulary, Sequence | Mapping):
        raise TypeError(
            f"{name} must be a sequence of tokens or a mapping of tokens to classes, got {type(vocabulary).__name__}; "
            "pass tokenizer.get_vocab()"
        )
    if classes is not None:
        checks.require_count(f"{name}_classes", classes, 1)
    listed = not isinstance(vocabulary, Mapping)
    pairs: list[tuple[Token | None, int]]
    if isinstance(vocabulary, Mapping):
        pairs = list(vocabulary.items())
    else:
        pairs = [(token, number) for number, token in enumerate(vocabulary)]
    for token, number in pairs:
        if not isinstance(token, str | bytes | None) or checks.as_integer(number) is None:
            raise TypeError(
                f"{name} must hold tokens (str, bytes, or None for no token), in a mapping with the integer number of "
                f"their class, got {token!r}{'' if listed else f' for {number!r}'}; pass tokenizer.get_vocab()"
            )
    count = max((number for _, number in pairs), default=-1) + 1 if classes is None else classes
    tokens: list[Token | None] = [None] * count
    for token, number in pairs:
        if not 0 <= number < count or tokens[number] is not None:
            raise ValueError(
                f"{name} must name classes from 0 to {count - 1}, each by one token, got {token!r} for {number}; pass "
                f"{name}_classes, the number of classes of the head"
            )
        tokens[number] = token
    return tokens
