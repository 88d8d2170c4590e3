"""`softcurve explain`: the page, its record, and what is left behind when it fails."""

from __future__ import annotations

import base64
import html
import json
import math
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from softcurve.cli import explain
from softcurve.cli.explain.divergences import explain_targets
from softcurve.cli.explain.lines import LINES, SETUP
from softcurve.cli.explain.network import Network, train
from softcurve.cli.page.picture import Picture
from softcurve.cli.page.render import Check, Section, render_page, show
from softcurve.cli.printing import finite

from .cli_output import run_tables

SEED = 3
# The sections, in the order of the note, and in each the statements.
STATEMENTS = {
    "notation": (),
    "probabilities": ("model", "softmax", "entry", "jacobian", "spectrum"),
    "decomposition": ("rewritten", "entropy", "cross-entropy", "roles"),
    "chain": ("loss", "symmetric", "identity", "gradient-p", "gradient-z"),
    "gradients": ("gradient-e", "gradient-x", "gradient-W", "gradient-theta"),
    "relative-entropy": ("kl", "information"),
    "directions": ("direction", "reference", "lost", "supervised", "infinite", "covering", "seeking", "minimising"),
    "autoencoder": ("vae", "prior", "categorical"),
    "equivalence": ("kl-loss", "constant", "same"),
    "minimum": ("curvature", "second-order", "cancellation"),
    "checks": (),
}
GRADIENTS = (
    "dL_dp",
    "dL_dz",
    "dL_de",
    "dL_dx",
    "dL_dW",
    "dL_db",
    "dL_dtheta[hidden.weight]",
    "dL_dtheta[hidden.bias]",
)


class Reader(HTMLParser):
    """Collects the tags, their attributes and the text of a page, and insists that tags are balanced."""

    VOID = frozenset({"meta", "img", "br", "source", "input"})

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
        if self.open[-1:] not in (["script"], ["style"]):
            self.words.append(data)

    def attributes(self, name: str, of: str | None = None) -> list[str]:
        return [
            value or "" for tag, found in self.tags for key, value in found.items() if key == name and of in (None, tag)
        ]


@dataclass
class Run:
    out: Path
    record: dict[str, object]
    page: str
    reader: Reader
    measured: tuple[Network, list[Section]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    torch.set_num_threads(2)
    state = torch.get_rng_state()
    out = tmp_path_factory.mktemp("explain") / "page.html"
    measure, measured = explain.measure, []

    def kept(network: Network, seed: int) -> list[Section]:
        measured.extend((network, measure(network, seed)))
        return measured[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explain, "measure", kept)
        record = explain.write_explanation(out, seed=SEED)
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), state)
    page = out.read_text("utf-8")
    return Run(out, record, page, Reader(page), tuple(measured))


def test_the_page_is_whole_and_alone_in_its_folder(run: Run) -> None:
    assert [path.name for path in run.out.parent.iterdir()] == ["page.html"]
    assert run.page.startswith("<!DOCTYPE html>")
    assert run.reader.attributes("lang", "html") == ["en"]
    assert "width=device-width, initial-scale=1" in run.reader.attributes("content", "meta")
    assert "light dark" in run.reader.attributes("content", "meta")


def test_every_statement_is_there_in_the_order_of_the_note(run: Run) -> None:
    assert run.reader.attributes("id", "section") == list(STATEMENTS)
    nav = run.page.partition("<nav")[2].partition("</nav>")[0]
    assert re.findall(r'href="#([\w-]+)"', nav) == list(STATEMENTS)
    for part, statements in zip(run.page.split("<section id=")[1:], STATEMENTS.values(), strict=True):
        assert tuple(re.findall(r'<div class="statement" id="([\w-]+)">', part)) == statements
        for each in part.split('<div class="statement"')[1:]:
            assert "<p>" in each
    ids = run.reader.attributes("id")
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in run.reader.attributes("href")} <= set(ids)  # links, and glyphs of formulas


def test_every_interactive_part_is_there_with_its_controls(run: Run) -> None:
    parts = re.findall(r'<figure class="play" id="play-(\w+)"', run.page)
    assert parts == ["classes", "digit", "simplex", "modes", "vae"]
    for part in run.page.split('<figure class="play"')[1:]:
        assert "data-control=" in part
        assert "data-show=" in part
        assert "<figcaption" in part


def test_nothing_is_fetched(run: Run) -> None:
    assert not {"link", "iframe", "object", "embed", "math"} & {tag for tag, _ in run.reader.tags}
    for name in ("src", "srcset"):
        assert all(value.startswith("data:image/svg+xml;base64,") for value in run.reader.attributes(name))
    assert run.reader.attributes("src", "script") == []
    assert all(value.startswith("#") for value in run.reader.attributes("href"))
    assert "default-src 'none'" in "".join(run.reader.attributes("content", "meta"))
    assert "url(" not in run.page
    assert "@import" not in run.page
    assert not re.search("https?://", run.page)
    assert len(run.page.encode()) < 2_000_000


def test_pictures_come_in_two_schemes_with_a_text_and_load_nothing(run: Run) -> None:
    light, dark = run.reader.attributes("src", "img"), run.reader.attributes("srcset", "source")
    assert len(light) == len(dark) == 7
    assert not set(light) & set(dark)
    assert all(len(alt) > 8 for alt in run.reader.attributes("alt", "img"))
    assert len(run.reader.attributes("alt", "img")) == 7
    for uri in light + dark:
        svg = base64.b64decode(uri.partition(",")[2]).decode()
        assert all(link.startswith(("#", "data:")) for link in re.findall(r'href="([^"]*)"', svg))


def test_every_line_of_python_gives_the_result_beside_it(run: Run) -> None:
    blocks = re.findall(r'<div class="code"><div><code>(.*?)</code> <span class="result">(.*?)</span>', run.page)
    shown = {html.unescape(code): result for code, result in blocks}
    assert set(shown) == set(LINES.values())
    assert f"<code>{SETUP}</code>" in run.page.replace("&#34;", '"')
    p = [math.exp(value) / sum(map(math.exp, (2.0, 1.0, 0.1))) for value in (2.0, 1.0, 0.1)]
    y = [0.7, 0.2, 0.1]
    kl = sum(t * math.log(t / q) for t, q in zip(y, p, strict=True))
    assert shown["reference.softmax(z)"] == "[" + ", ".join(f"{value:.4f}" for value in p) + "]"
    assert shown["softcurve.kl_divergence(y.log(), z)"] == f"{kl:.4f}"
    assert shown["softcurve.kl_divergence(y.log(), z, base=2)"] == f"{kl / math.log(2):.4f}"
    assert shown["reference.softmax_derivative(p, 0, 1)"] == f"{-p[0] * p[1]:.4f}"
    for zero in ("identity", "same"):
        assert shown[LINES[zero]] == "[0.0000, 0.0000, 0.0000]"
    assert shown[LINES["infinite"]] == "inf"


def test_formulas_are_drawn_with_each_glyph_once(run: Run) -> None:
    assert len(re.findall('<svg class="tex" role="img" aria-label="[^"]+"', run.page)) > 100
    drawn = re.findall(r'<symbol id="(g\d+)"', run.page)
    assert len(drawn) == len(set(drawn)) > 40
    assert set(re.findall(r'<use href="#(g\d+)"', run.page)) == set(drawn)


def test_the_chinese_page_has_the_same_structure_and_numbers(run: Run) -> None:
    page = explain.render_explanation(*run.measured, SEED, "zh")
    reader = Reader(page)
    assert reader.attributes("lang", "html") == ["zh"]
    glyphs = [
        {name for name in each.attributes("id") if re.fullmatch(r"g-?\d+", name)} for each in (reader, run.reader)
    ]
    ids = [[name for name in each.attributes("id") if name not in glyphs[0]] for each in (reader, run.reader)]
    formulas = [set(re.findall('<svg class="tex" role="img" aria-label="([^"]+)"', each)) for each in (page, run.page)]
    for pair in (glyphs, ids, formulas):  # sentences may name formulas in another order
        assert pair[0] == pair[1]
    for name in ("data-control", "data-show", "data-action"):
        assert reader.attributes(name) == run.reader.attributes(name)
    code = [re.findall("<code>(.*?)</code>", each, re.DOTALL) for each in (page, run.page)]
    assert code[0] == code[1]
    numbers = [re.findall(r'<td class="number">([^<]+)', each) for each in (page, run.page)]
    assert numbers[0] == numbers[1]
    english = "".join(run.reader.words)
    chinese = "".join(reader.words)
    assert len(re.findall("[\u4e00-\u9fff]", english)) == 0
    assert len(re.findall("[\u4e00-\u9fff]", chinese)) > 1500
    # What is left in Latin letters is code, symbols and terms of the field, never a sentence.
    text = re.sub(r"(?s)<(style|script|code|svg)\b.*?</\1>|<[^>]+>", " ", page)
    assert re.findall(r"[a-z]{3,}(?: [a-z]{2,}){2,}", text) == []


def test_both_languages_have_the_same_texts(run: Run) -> None:
    english, chinese = (explain.read_texts(lang) for lang in ("en", "zh"))
    names = {check["name"] for check in run.record["checks"]}
    assert set(chinese["checks"]) == names
    for texts in (english, chinese):
        texts.pop("checks")
    assert {key: set(part) for key, part in english.items()} == {key: set(part) for key, part in chinese.items()}
    for key, part in english.items():
        for name, words in part.items():
            assert sorted(re.findall(r"\{\{.*?\}\}", words)) == sorted(re.findall(r"\{\{.*?\}\}", chinese[key][name]))


def test_no_formula_or_placeholder_is_left_raw(run: Run) -> None:
    text = "".join(run.reader.words)
    assert "\\" not in text
    assert "{{" not in text
    assert "&gt;" not in text
    assert not re.search(r"\b(nan|None|Tensor)\b", text)


def test_the_record_is_json_and_everything_held(run: Run) -> None:
    assert json.loads(json.dumps(run.record, allow_nan=False)) == run.record
    assert run.record["all_within_bounds"] is True
    assert run.record["seed"] == SEED
    assert run.record["page"] == str(run.out)
    assert run.record["held_out_accuracy"] > 0.9
    assert all(check["held"] is True for check in run.record["checks"])
    assert f"All {len(run.record['checks'])} numerical checks passed" in run.page


def test_every_check_is_on_the_page(run: Run) -> None:
    text = "".join(run.reader.words)
    assert all(check["name"] in text for check in run.record["checks"])


def test_the_terminal_counts_the_checks_and_names_those_that_fail(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(explain, "write_explanation", lambda out, *, seed, lang: run.record)
    page = str(tmp_path / "page.html")
    shown = run_tables("explain", "--out", page)
    total = len(run.record["checks"])
    assert re.search(rf"all +│ +{total} │ +{total} │", shown)
    assert shown.splitlines()[-1] == page
    assert "failed" not in shown
    assert all(title in shown for title in ("The chain rule", "The Jacobian", "The VAE"))
    broken = [check | {"held": False} for check in run.record["checks"]]
    monkeypatch.setattr(explain, "write_explanation", lambda out, *, seed, lang: run.record | {"checks": broken})
    shown = run_tables("explain", "--out", page)
    assert re.search(rf"all +│ +{total} │ +0 │", shown)
    assert broken[0]["name"].split(":")[0] in shown


@pytest.mark.parametrize(
    ("target", "losses"),
    [("hard", ("cross_entropy", "forward_kl")), ("soft", ("cross_entropy", "forward_kl", "reverse_kl"))],
)
def test_every_gradient_is_within_1e_12_of_autograd(run: Run, target: str, losses: tuple[str, ...]) -> None:
    deviations = run.record["chain"]["deviations"][target]
    assert tuple(deviations) == losses
    for found in deviations.values():
        assert set(found) == {"loss", *GRADIENTS}
        assert all(0 <= value <= 1e-12 for value in found.values())


def test_shapes_follow_the_chain(run: Run) -> None:
    shapes = run.record["chain"]["shapes"]
    n = shapes["x"][0]
    assert shapes["x"] == shapes["dL_dx"] == [n, 64]
    assert shapes["e"] == shapes["dL_de"] == [n, 32]
    assert shapes["z"] == shapes["dL_dz"] == shapes["p"] == shapes["dL_dp"] == [n, 10]
    assert shapes["loss"] == [n]
    assert shapes["W"] == shapes["dL_dW"] == [10, 32]
    assert shapes["b"] == shapes["dL_db"] == [10]
    assert shapes["theta[hidden.weight]"] == shapes["dL_dtheta[hidden.weight]"] == [32, 64]


def test_eigenvalues_are_those_of_the_jacobian_by_numpy(run: Run) -> None:
    p = np.array(run.record["jacobian"]["p"])
    expected = np.linalg.eigvalsh(np.diag(p) - np.outer(p, p))
    np.testing.assert_allclose(run.record["jacobian"]["eigenvalues"], expected, rtol=0, atol=1e-15)
    ordered = np.sort(p)
    assert (expected[1:] >= ordered[:-1] - 1e-15).all()
    assert (expected <= ordered + 1e-15).all()


def test_kl_is_cross_entropy_less_the_entropy_in_both_units(run: Run) -> None:
    values = run.record["targets"]["values"]
    for found in values.values():
        assert found["cross_entropy"] - found["entropy"] == pytest.approx(found["divergence"], abs=1e-14)
    for name, bits in values["bits"].items():
        assert bits * math.log(2) == pytest.approx(values["nats"][name], abs=1e-14)
    assert 0 < values["nats"]["divergence"] < run.record["targets"]["divergence_first"]


def test_forward_covers_and_reverse_seeks(run: Run) -> None:
    found = run.record["directions"]
    assert found["half_half_against_one_zero_bits"] == "inf"
    assert found["one_zero_against_half_half_bits"] == 1.0
    assert run.record["chain"]["reverse_kl_of_hard_targets"] == "inf"
    fits = found["fits"]
    # The moments of 0.6 N(−2.5, 0.6²) + 0.4 N(2.5, 0.8²) by hand; the bins change them little.
    assert fits["forward"]["mean"] == pytest.approx(-0.5, abs=1e-3)
    assert fits["forward"]["deviation"] ** 2 == pytest.approx(0.6 * 0.36 + 0.4 * 0.64 + 6.25 - 0.25, rel=1e-3)
    assert fits["reverse"]["mean"] == pytest.approx(-2.5, abs=0.05)
    assert fits["reverse"]["deviation"] == pytest.approx(0.6, abs=0.05)
    minima = [fit["reverse"] for name, fit in fits.items() if name.startswith("reverse")]
    assert minima == sorted(minima)


def test_kl_falls_as_its_quadratic_model(run: Run) -> None:
    found = run.record["minimum"]
    assert found["slope"] == pytest.approx(1, abs=0.02)
    assert found["divergence"][0] == pytest.approx(found["quadratic_model"][0], rel=1e-3)
    ratio = found["divergence"][4] / found["divergence"][0]
    assert ratio == pytest.approx(100, rel=1e-2)
    assert all(row["softcurve"] < row["textbook"] for row in found["float32_errors"])


def test_only_q_moves_unless_the_prior_is_learned(run: Run) -> None:
    runs = run.record["vae"]["runs"]
    assert runs["fixed"]["first_gradient_in_prior"] is None
    assert runs["fixed"]["prior_moved"] == 0
    assert runs["fixed"]["q_at_the_end"] == pytest.approx([0.2, 0.5, 0.3], abs=1e-6)
    assert runs["learned"]["first_gradient_in_prior"] > 0
    assert runs["learned"]["prior_moved"] > 0.02
    assert runs["cross_entropy"]["q_at_the_end"][1] > 0.95


def test_the_same_seed_gives_the_same_figures_and_pictures(run: Run) -> None:
    torch.set_num_threads(1)
    again = train(SEED)
    explained = explain_targets(again)
    assert finite(explained.figures, str) == run.record["targets"]
    picture = explained.values["picture"]
    assert isinstance(picture, Picture)
    assert picture.light in run.page
    assert picture.dark in run.page
    other = train(SEED + 1)
    assert finite(explain_targets(other).figures, str) != run.record["targets"]


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range_is_refused(tmp_path: Path, seed: int) -> None:
    with pytest.raises(ValueError, match="seed must be from 0"):
        explain.write_explanation(tmp_path / "page.html", seed=seed)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_target_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain, "train", lambda seed: pytest.fail("work was done for nothing"))
    with pytest.raises((ValueError, OSError), match="is a folder"):
        explain.write_explanation(tmp_path)
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match="there is no folder"):
        explain.write_explanation(tmp_path / "missing" / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failure_leaves_everything_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(seed: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(explain, "train", interrupted)
    old = tmp_path / "old.html"
    old.write_text("an older page")
    for out in (old, tmp_path / "new.html"):
        with pytest.raises(KeyboardInterrupt):
            explain.write_explanation(out)
    assert [path.name for path in tmp_path.iterdir()] == ["old.html"]
    assert old.read_text() == "an older page"


def test_a_broken_bound_is_said_on_the_page() -> None:
    checks = [Check("holds", 1e-16, "≤", 1e-12), Check("does not", 2.0, "≤", 1.0)]
    facts = {
        "checks": checks,
        "seed": 0,
        "hidden": 32,
        "accuracy": 0.9,
        "digits": 360,
        "training_steps": 1,
        "softcurve": "0",
        "torch": "0",
        "play_data": "{}",
    }
    for lang, sentence in (("en", "1 of 2 numerical checks failed"), ("zh", "共 2 项数值检验中有 1 项未通过")):
        assert sentence in render_page("softcurve.cli.explain", "page.html.j2", [], explain.read_texts(lang), **facts)


@pytest.mark.parametrize(
    ("measured", "relation", "bound", "held"),
    [
        (1.0, "≤", 1.0, True),
        (1.1, "≤", 1.0, False),
        (1.0, "≥", 1.0, True),
        (0.9, "≥", 1.0, False),
        (math.inf, "=", math.inf, True),
        (math.nan, "=", math.nan, False),
        (math.nan, "≤", 1.0, False),
        (math.nan, "≥", 1.0, False),
    ],
)
def test_a_check_holds_only_if_its_bound_does(measured: float, relation: str, bound: float, held: bool) -> None:
    assert Check("name", measured, relation, bound).held is held


def test_numbers_are_written_for_people() -> None:
    assert show(0.0) == "0"
    assert show(1e-12) == "10<sup>−12</sup>"
    assert show(-1.23e-16) == "−1.2&nbsp;·&nbsp;10<sup>−16</sup>"
    assert show(-1e-15) == "−10<sup>−15</sup>"
    assert show(0.0335) == "0.0335"
    assert show(math.inf) == "+∞"
    assert show(math.nan) == show(math.nan, ".2f") == "NaN"
    assert show(-0.5, ".2f") == "−0.50"
    assert show(-math.inf, ".4f") == "−∞"


def test_figures_are_valid_json() -> None:
    figures = {"a": (1.0, math.inf), "b": {"c": -math.inf, "d": math.nan, "e": None}, 2: [True, 3]}
    assert finite(figures, str) == {"a": [1.0, "inf"], "b": {"c": "-inf", "d": "nan", "e": None}, "2": [True, 3]}
