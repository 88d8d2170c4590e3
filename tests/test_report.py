"""The report of a fit: well-formed, alone, escaped, and whole in the odd cases."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from torch import Tensor

import softcurve
from softcurve.cli.options import FitOptions
from softcurve.cli.page.picture import Picture, decades, picture
from softcurve.cli.page.render import seconds, show
from softcurve.cli.report import FitReport, PathPoint, render_report
from softcurve.cli.report.conclusion import Recommendation, recommend
from softcurve.cli.report.sections import IN_A_TABLE
from softcurve.fit.coefficients import short_summary
from softcurve.fit.data.source import RowBlock
from softcurve.fit.diagnostics import Diagnostics, baseline_scores, diagnose
from softcurve.fit.fitting import Fit, fit_head
from softcurve.fit.head_spectrum import curvature_spectrum
from softcurve.fit.solver.newton import Step
from softcurve.fit.uncertainty import bootstrap_intervals

SECTIONS = [
    *("conclusion", "convergence", "calibration", "confusion", "classes", "coefficients", "curvature", "path"),
    *("hardest", "reproduction"),
]
NASTY = '<script>alert("x")</script> & \\(x\\) $y$ {{ z }} http://example.org'


@dataclass(eq=False)
class Held:
    features: Tensor
    target: Tensor
    classes: tuple[int | str, ...]
    in_memory: bool = True
    fingerprint: str = ""

    @property
    def rows(self) -> int:
        return len(self.features)

    @property
    def width(self) -> int:
        return self.features.shape[1]

    @property
    def double(self) -> bool:
        return True

    @property
    def kind(self) -> str:
        return "distributions" if self.target.is_floating_point() else "labels"

    def blocks(self, at_most: int) -> Iterator[RowBlock]:
        for start in range(0, self.rows, at_most):
            here = slice(start, start + at_most)
            yield RowBlock(start, self.features[here], self.target[here])


class Reader(HTMLParser):
    """Collects tags, attributes and text, and insists that tags are balanced."""

    VOID = frozenset({"meta", "img", "br", "source", "mspace"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def attributes(self, name: str, of: str | None = None) -> list[str]:
        return [
            value or "" for tag, found in self.tags for key, value in found.items() if key == name and of in (None, tag)
        ]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For pages whose charts are of no matter, and which take most of the time."""
    light, dark = (base64.b64encode(f"<svg>{name}</svg>".encode()).decode() for name in ("light", "dark"))
    drawn = Picture(f"data:image/svg+xml;base64,{light}", f"data:image/svg+xml;base64,{dark}")
    monkeypatch.setattr("softcurve.cli.page.picture.picture", lambda *arguments, **options: drawn)


def history(steps: int) -> tuple[Step, ...]:
    return tuple(Step(k, 0.5 + 2 ** (-k * k), 10.0 ** (-k), 7 * k, 0.01 * k, 0.0) for k in range(1, steps + 1))


def with_history(given: FitReport, steps: tuple[Step, ...]) -> FitReport:
    return replace(given, fit=replace(given.fit, history=steps))


def brief(classes: int = 3, **how: Any) -> FitReport:
    """With little to draw, for what is not about the charts."""
    return replace(with_history(report(classes, **how, curved=False), history(1)), path=())


def report(
    classes: int = 3,
    *,
    width: int = 16,
    soft: bool = False,
    scale: float = 2.0,
    rows: int = 60,
    nonnegative: bool = False,
    curved: bool = True,
) -> FitReport:
    features = torch.randn(rows, width, dtype=torch.float64)
    features = features.abs() if nonnegative else features
    weight, bias = scale * torch.randn(classes, width, dtype=torch.float64), torch.zeros(classes, dtype=torch.float64)
    z = features @ weight.T + torch.randn(rows, classes, dtype=torch.float64)
    source = Held(features, z.softmax(1) if soft else z.argmax(1), tuple(range(classes)))
    loss = "forward_kl" if soft else "cross_entropy"
    found = diagnose(source, weight, bias, loss)
    steps = history(6)
    return FitReport(
        options=FitOptions(data="rows.npz", loss=loss, tol=1e-6),
        fit=Fit(weight, bias, 0.5, 1e-9, 6, steps[-1].products, True, "converged", False, steps),
        seconds=0.25,
        features=width,
        classes=source.classes,
        kind=source.kind,
        train=found,
        baseline=baseline_scores(source, found.frequencies, loss),
        held=found,
        spectrum=curvature_spectrum(source, weight, bias, loss=loss) if curved else "none was wanted",
        path=tuple(PathPoint(10.0**k, 1 / (k + 4), 1 / (k + 3), 0.9, 2.0**k) for k in range(-2, 3)),
    )


def written(given: FitReport) -> tuple[str, Reader]:
    page = render_report(given)
    reader = Reader(page)
    check_alone(page, reader)
    assert reader.attributes("id", "section") == SECTIONS
    assert reader.attributes("href", "a") == [f"#{key}" for key in SECTIONS]
    return page, reader


def check_alone(page: str, reader: Reader) -> None:
    """Nothing is fetched, nothing is run, nothing is left raw."""
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in reader.tags}
    for name in ("src", "srcset"):
        assert all(re.match("data:image/(svg\\+xml|png);base64,", uri) for uri in reader.attributes(name))
    assert not any(name.startswith("on") for _, found in reader.tags for name in found)
    assert "url(" not in page
    assert "@import" not in page
    light, dark = reader.attributes("src", "img"), reader.attributes("srcset", "source")
    assert len(light) == len(dark)
    for uri in light + dark:
        if "svg" in uri[:20]:
            svg = base64.b64decode(uri.partition(",")[2]).decode()
            assert all(link.startswith(("#", "data:")) for link in re.findall(r'href="([^"]*)"', svg))
    assert all(len(alt) > 8 for alt in reader.attributes("alt", "img"))
    assert not re.search(r"\b(nan|None|Tensor)\b", "".join(reader.words))


def test_a_whole_report() -> None:
    page, reader = written(report())
    assert page.startswith("<!DOCTYPE html>")
    assert "light dark" in reader.attributes("content", "meta")
    assert "Converged in 250 ms, after 6 iterations" in reader.text
    assert "Not converged" not in reader.text
    parts = re.split(r'<section id="\w+">', page)[1:]
    assert ["<picture>" in part for part in parts] == [False, True, True, False, False, False, True, True, False, False]
    assert 'class="heat"' in parts[3]
    assert 'class="bar"' in parts[4]
    for fact in ("rows.npz", "auto", "cross entropy", f"softcurve {softcurve.__version__}", "16"):
        assert fact in reader.text
    assert len(set(reader.attributes("src", "img")) & set(reader.attributes("srcset", "source"))) == 0


@pytest.mark.usefixtures("undrawn")
def test_the_figures_are_those_of_the_diagnostics() -> None:
    given = brief()
    _, reader = written(given)
    for found in (given.train.loss, given.train.entropy, given.train.brier):
        assert f"{found:.5f}" in reader.text
    assert f"{100 * given.train.accuracy:.2f}\xa0%".replace("\xa0", " ") in reader.text
    for hard in given.train.hardest:
        assert f"{hard.el2n:.4f}" in reader.text


@pytest.mark.usefixtures("undrawn")
def test_the_conclusion_compares_with_the_baseline() -> None:
    given = brief()
    _, reader = written(given)
    _, part = reader.text.split("1. Conclusion")
    assert f"{given.baseline.loss:.4f}" in part
    assert given.held is not None
    ends = bootstrap_intervals(given.held.groups, seed=0)
    assert f"({ends.loss[0]:.4f} to {ends.loss[1]:.4f})" in part
    assert "only C = 1 was fitted" in part
    command = "softcurve fit rows.npz --tol 1e-06"
    assert command in part
    assert torch.__version__ in part


@pytest.mark.usefixtures("undrawn")
def test_coefficients_are_shown_where_they_are_few() -> None:
    x = torch.randn(60, 2, dtype=torch.float64)
    names = ("<a>", "b", "c")
    few = Held(x, torch.arange(60) % 3, names)
    for C, shown in ((1.0, names), (math.inf, names[1:])):
        fit = fit_head(few, C=C)
        options = {"loss": "cross_entropy", "C": C, "intercept": True, "tol": 1e-4, "budget": None}
        summary = short_summary(few, fit, **options)
        assert not isinstance(summary, str)
        assert summary.classes == shown
        given = brief()
        given = replace(given, options=replace(given.options, C=C), classes=names, coefficients=summary)
        _, reader = written(given)
        part = reader.text.split("6. Coefficients")[1].split("7. Curvature")[0]
        for row in summary.records():
            assert f"{row['standard_error']:.4g}" in part
            assert f"{row['z']:.2f}".replace("-", "−") in part
        assert ("relative to the class <a>" in part) == math.isinf(C)
        assert ("biases the coefficients" in part) == (C == 1.0)
    many = Held(torch.randn(60, 40, dtype=torch.float64), few.target, names)
    reason = short_summary(many, fit_head(many), **(options | {"C": 1.0}))
    assert isinstance(reason, str)
    assert "123 coefficients from 60 samples are too many" in reason
    copied = Held(torch.cat([x, x[:, :1]], 1), few.target, names)
    assert "singular at feature 'x2'" in str(short_summary(copied, fit_head(copied, C=math.inf), **options))
    _, reader = written(replace(brief(), coefficients=reason))
    assert f"No standard errors: {reason}." in reader.text


def with_losses(losses: dict[float, float], *, late: float = 0.0) -> FitReport:
    """With held-out losses by C; the fit of ``late`` has not converged, and the head, of C = 1, has a poor loss."""
    given = brief()
    points = [PathPoint(C, 0.1, loss, 0.9, 1.0, late != C, 0.1) for C, loss in losses.items()]
    assert given.held is not None
    return replace(given, held=replace(given.held, loss=9.0), path=tuple(points))


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("losses", "late", "chosen", "best", "says"),
    [
        ({0.01: 0.9, 0.1: 0.45, 10.0: 0.4, 100.0: 0.5}, 0.0, 0.1, 10.0, "smallest value whose held-out loss, 0.4500"),
        ({0.01: 0.9, 0.1: 0.51, 10.0: 0.4, 100.0: 0.5}, 0.0, 10.0, 10.0, "no smaller value is within one standard error"),
        ({0.01: 0.9, 0.1: 0.45, 10.0: 0.4, 100.0: 0.5}, 0.1, 10.0, 10.0, "fit again with --C 10"),
        ({100.0: 0.4, 0.01: 0.45, 10.0: 0.41}, 0.0, 0.01, 100.0, "--path may go on to smaller ones"),
        ({0.01: 0.9, 10.0: 0.9, 100.0: 0.4}, 0.0, 100.0, 100.0, "--path may go on to larger ones"),
        ({0.01: math.inf, 10.0: 0.4}, 0.0, 10.0, 10.0, "C = 10 by"),
    ],
)  # fmt: skip
def test_the_recommended_C_follows_the_one_standard_error_rule(
    losses: dict[float, float], late: float, chosen: float, best: float, says: str
) -> None:
    recommended = recommend(with_losses(losses, late=late))
    assert isinstance(recommended, Recommendation)
    assert (recommended.C, recommended.best_C) == (chosen, best)
    assert says in str(recommended)
    assert f"This head has C = 1; fit again with --C {chosen:g}." in str(recommended)
    assert "fit again" not in str(replace(recommended, fitted_C=chosen))


def test_there_is_no_recommended_C_without_a_choice() -> None:
    assert "no samples were held out" in str(recommend(replace(brief(), held=None)))
    assert "only C = 1 was fitted" in str(recommend(with_losses({1.0: 0.5})))
    worst = with_losses({1.0: math.inf, 2.0: math.inf})
    assert worst.held is not None
    none = replace(worst, held=replace(worst.held, loss=math.inf))
    assert "no fit converged" in str(recommend(none))


@pytest.mark.usefixtures("undrawn")
def test_names_are_escaped_and_shortened() -> None:
    given = brief()
    names = (NASTY, "long " * 2000, " \n\t")
    page, reader = written(replace(given, classes=names, options=replace(given.options, data=NASTY)))
    assert "<script" not in page
    assert NASTY in reader.text  # as the name of the data
    assert NASTY[:47] + "…" in reader.text  # as a class
    assert "long long lo…" in reader.text
    assert "&#92;(x&#92;)" in page
    assert "long " * 20 not in page
    assert "(no name)" in reader.text


@pytest.mark.parametrize("classes", [2, IN_A_TABLE, IN_A_TABLE + 1, 201, 2000])
def test_few_classes_and_many(classes: int) -> None:
    page, reader = written(brief(classes, rows=150))
    assert ('class="heat"' in page) == (classes <= IN_A_TABLE)
    assert any("Confusion matrix" in alt for alt in reader.attributes("alt")) == (IN_A_TABLE < classes <= 200)
    assert any("against its number of samples" in alt for alt in reader.attributes("alt")) == (classes > IN_A_TABLE)
    assert len(page) < 3_000_000


@pytest.mark.usefixtures("undrawn")
def test_soft_labels_have_their_divergence() -> None:
    given = brief(soft=True)
    _, reader = written(given)
    assert given.train.kl is not None
    assert f"{given.train.kl:.5f}" in reader.text
    assert "distributions" in reader.text


def test_without_held_out_rows_the_page_says_so() -> None:
    given = replace(
        brief(), held=None, path=(PathPoint(1.0, 0.5, None, None, 2.0), PathPoint(10.0, 0.4, None, None, 3.0))
    )
    _, reader = written(given)
    assert "No samples were held out" in reader.text
    assert not any("Held-out accuracy" in alt for alt in reader.attributes("alt"))


@pytest.mark.usefixtures("undrawn")
def test_a_fit_that_did_not_converge_says_so_first() -> None:
    given = brief()
    page, reader = written(replace(given, fit=replace(given.fit, converged=False, gradient_max=0.25)))
    assert page.index("Not converged.") < page.index("<dl")
    assert 'class="verdict broken"' in page
    assert "0.25 as the largest entry" in reader.text


@pytest.mark.usefixtures("undrawn")
def test_points_of_the_path_that_did_not_converge_are_marked() -> None:
    given = replace(brief(), path=tuple(PathPoint(C, 0.5, None, None, 2.0) for C in (1.0, 10.0, 100.0)))
    page, reader = written(given)
    assert "This fit did not converge" not in reader.text
    assert page.count("&nbsp;*") == 0
    page, reader = written(replace(given, path=(*given.path[:-1], replace(given.path[-1], converged=False))))
    assert "This fit did not converge" in reader.text
    assert page.count("&nbsp;*") == 1


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_short_history(steps: int) -> None:
    page, reader = written(with_history(brief(), history(steps)))
    part = page.split('<section id="calibration">')[0]
    assert ("<picture>" in part) == (steps == 2)
    assert ("nothing to draw" in reader.text) == (steps < 2)


def test_steps_with_zeros_and_infinities_are_left_out() -> None:
    steps = (Step(0, math.inf, math.inf, 0, 0.0, 0.0), *history(3), Step(4, 0.5, 0.0, 9, 0.1, 0.0))
    written(with_history(brief(), steps))


@pytest.mark.usefixtures("undrawn")
def test_a_perfect_head_confuses_nothing() -> None:
    source = Held(torch.eye(4, dtype=torch.float64), torch.arange(4), ("a", "b", "c", "d"))
    weight, bias = 1e4 * torch.eye(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    perfect = diagnose(source, weight, bias, "cross_entropy")
    spectrum = curvature_spectrum(source, weight, bias)
    given = replace(brief(4), classes=source.classes, train=perfect, held=None, spectrum=spectrum, path=())
    _, reader = written(given)
    assert "nothing is confused" in reader.text
    assert "every eigenvalue is zero" in reader.text
    assert "there is no path to draw" in reader.text


@pytest.mark.usefixtures("undrawn")
def test_a_spectrum_that_is_left_out_has_a_reason() -> None:
    _, reader = written(replace(brief(), spectrum="5,000 classes are too many"))
    assert "No spectrum: 5,000 classes are too many." in reader.text


@pytest.mark.usefixtures("undrawn")
def test_a_class_without_rows() -> None:
    source = Held(torch.eye(3, dtype=torch.float64), torch.tensor([0, 1, 1]), ("a", "b", "c"))
    found: Diagnostics = diagnose(source, torch.zeros(3, 3), torch.tensor([1.0, 0.0, 0.0]), "cross_entropy")
    _, reader = written(replace(brief(), classes=source.classes, train=found, held=None))
    assert "1 of 3 classes have no training sample." in reader.text
    assert "2 of 3 classes are never predicted." in reader.text


@pytest.mark.parametrize(
    ("width", "nonnegative", "pictured"), [(16, True, True), (16, False, False), (15, True, False), (9, True, False)]
)
def test_rows_are_pictures_where_they_can_be(width: int, nonnegative: bool, pictured: bool) -> None:
    _, reader = written(brief(width=width, nonnegative=nonnegative))
    assert any(uri.startswith("data:image/png") for uri in reader.attributes("src")) == pictured


def test_numbers_for_people() -> None:
    assert show(1234567, ",") == "1\u202f234\u202f567"
    assert [seconds(value) for value in (0.0521, 1.0, 119.0, 600.0, 10_000.0)] == [
        "52 ms",
        "1.0 s",
        "119.0 s",
        "10 min",
        "2.8 h",
    ]
    assert [show(value) for value in (999.4, 1000.0, -4321.0)] == ["999", "1000", "−4321"]


@pytest.mark.parametrize("values", [(3.0,), (2e-5, 3e-5), (1e-12, 1e3), (1.0, 1.0)])
def test_a_log_axis_always_has_two_labels(values: tuple[float, ...]) -> None:
    from matplotlib.figure import Figure

    def draw() -> Figure:
        axes = Figure().subplots()
        axes.plot(values)
        decades(axes.yaxis, values)
        assert len(axes.get_yticks()) >= 2
        assert axes.get_ylim()[0] <= min(values) <= max(values) <= axes.get_ylim()[1]
        return axes.figure

    picture(draw)
