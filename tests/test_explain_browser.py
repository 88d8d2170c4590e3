"""The page of `softcurve explain` in a browser: its numbers against float64 Python, its controls, and its isolation.

The numbers that the page's JavaScript shows are compared with autograd on dense formulas, for random states of all
controls. The tests are skipped where Chromium, its driver or selenium is missing. This page and the report of a fit are
also checked by axe-core, where the environment variable SOFTCURVE_AXE_CORE has the path of its axe.min.js.
"""

from __future__ import annotations

import math
import os
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from softcurve import reference
from softcurve.cli import explain
from softcurve.cli.explain.divergences import GRID, target_logits
from softcurve.cli.explain.network import Network, train
from softcurve.cli.main import app

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="Chromium or chromedriver is not installed")

AXE = os.environ.get("SOFTCURVE_AXE_CORE", "")
STATES = 25
WIDGETS = ("classes", "simplex", "modes", "digit", "vae")
SHAPES = {"classes": ("p", "y", "residual", "gradient", "fy", "fp", "gap", "share", "eigenJ", "eigenH", "J", "H")}

# Sets every control to a value of its own by what a user does, and returns the states and what the page then shows.
SET_CONTROLS = """
for (const [name, values] of Object.entries(arguments[0])) {
  const controls = window.softcurve[name].root.querySelectorAll("[data-control]");
  values.forEach((value, k) => {
    if (controls[k].type === "checkbox") controls[k].checked = value; else controls[k].value = value;
    controls[k].dispatchEvent(new Event("input", { bubbles: true }));
  });
}
if (arguments[1]) window.softcurve.digit.set({ pixels: arguments[1] });
const states = Object.fromEntries(Object.keys(arguments[0]).map((name) => [name, window.softcurve[name].state]));
return [states, window.softcurve.shown()];
"""
CONTROLS = """
return Object.fromEntries(arguments[0].map((name) => [name,
  [...window.softcurve[name].root.querySelectorAll("[data-control]")].map((control) => ({
    type: control.type, min: Number(control.min), max: Number(control.max), step: Number(control.step),
    options: control.options ? [...control.options].map((option) => option.value) : [],
  }))]));
"""


@dataclass
class Pages:
    driver: Any
    paths: dict[str, Path]  # by language, and that of the report of a fit
    network: Network

    def open(self, page: str, *, width: int = 1200, scheme: str = "light") -> Any:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(self.paths[page].as_uri())
        self.driver.execute_script("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        return self.driver


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pages]:
    folder = tmp_path_factory.mktemp("pages")
    network = train(0)
    paths = {lang: folder / f"{lang}.html" for lang in ("en", "zh")}
    sections = explain.measure(network, 0)
    for lang, path in paths.items():
        path.write_text(explain.render_explanation(network, sections, 0, lang), "utf-8")
    paths["report"] = folder / "head.html"
    fitted = CliRunner().invoke(app, ["fit", "--path", "0.1,1,10", "--out", str(folder / "head.safetensors")])
    assert fitted.exit_code == 0, fitted.output
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield Pages(driver, paths, network)
    driver.quit()


def formatted(value: float, form: str) -> str:
    """Format a number as the page does, where halves are rounded away from zero."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "+∞" if value > 0 else "−∞"
    size = Decimal(abs(value))
    if form == "count":
        return str(int(value))
    if form != "cell" and size < 1e-10:
        return "0"
    exponent = 0 if form == "cell" or 1e-3 <= size < 1e5 else math.floor(math.log10(size))
    places = Decimal("0.001") if form == "cell" else Decimal("0.01") if exponent else Decimal("0.0001")
    digits = size.scaleb(-exponent).quantize(places, ROUND_HALF_UP)
    sign = "−" if value < 0 and digits else ""
    return f"{sign}{digits}" + (f"e{'−' if exponent < 0 else '+'}{abs(exponent)}" if exponent else "")


def shown_as(value: float, form: str) -> set[str]:
    """Return what a number is shown as; two texts where rounding errors decide between them."""
    return {formatted(value * (1 + error), form) for error in (-1e-12, 0.0, 1e-12)}


def values_of(kind: str, log_p: Tensor, y: Tensor, beta: float = 0.5) -> Tensor:
    """Return a divergence of p from y, in nats, as a dense formula on which autograd can act."""
    p, log_y = log_p.exp(), y.log()
    if kind == "forward":
        return torch.xlogy(y, y).sum() - torch.where(y > 0, y * log_p, 0.0).sum()
    if kind == "reverse":
        return (p * (log_p - log_y)).sum()
    m = (1 - beta) * p + beta * y
    return beta * (torch.xlogy(y, y) - torch.xlogy(y, m)).sum() + (1 - beta) * (p * (log_p - m.log())).sum()


def nested(name: str, values: Tensor) -> dict[str, float]:
    """Return the elements of a tensor by the names that the page gives them."""
    return {
        ".".join((name, *map(str, index))): values[index].item() for index in np.ndindex(*values.shape)
    }  # fmt: skip


def expected_classes(state: dict[str, Any]) -> dict[str, float]:
    n, T = state["count"], state["temperature"]
    weights = torch.tensor(state["weight"][:n], dtype=torch.float64)
    y = weights / weights.sum() if weights.sum() else torch.full_like(weights, 1 / n)
    z = torch.tensor(state["z"][:n], dtype=torch.float64)

    def loss(logits: Tensor) -> Tensor:
        return values_of(state["kind"], (logits / T).log_softmax(-1), y, state["beta"])

    log_p = (z / T).log_softmax(-1)
    p = log_p.exp()
    (gradient,) = torch.autograd.grad(loss(z.requires_grad_()), z)
    hessian = torch.autograd.functional.hessian(loss, z.detach())
    if state["kind"] == "reverse" and (y == 0).any():  # infinite, and therefore without derivatives
        gradient, hessian = torch.full_like(gradient, math.nan), torch.full_like(hessian, math.nan)
    jacobian = torch.autograd.functional.jacobian(lambda logits: (logits / T).softmax(-1), z.detach())
    eigenvalues = torch.full_like(y, math.nan) if hessian.isnan().any() else torch.linalg.eigvalsh(hessian)
    fy, fp = -y.log2(), -log_p / math.log(2)
    share = torch.where(y > 0, y * (fp - fy), 0.0)
    i, j = (state[name] - 1 for name in ("i", "j"))
    values = {
        "Hp": reference.entropy(p).item(), "Hy": reference.entropy(y).item(), "bits": share.sum().item(),
        "ce": (reference.entropy(y) + values_of("forward", log_p, y)).item(), "entry": jacobian[i, j].item(),
    } | {kind: values_of(kind, log_p, y, state["beta"]).item() for kind in ("forward", "reverse", "js")}  # fmt: skip
    arrays = (p, y, p - y, gradient, fy, fp, fp - fy, share, torch.linalg.eigvalsh(jacobian), eigenvalues)
    for name, array in zip(SHAPES["classes"], (*arrays, jacobian, hessian), strict=True):
        values |= nested(name, array.detach())
    return values


def expected_simplex(state: dict[str, Any]) -> dict[str, float]:
    (p, y) = (
        torch.tensor([a, (1 - a) * b, (1 - a) * (1 - b)], dtype=torch.float64) for a, b in (state["p"], state["y"])
    )
    z = p.log().requires_grad_()
    value = values_of(state["kind"], z.log_softmax(-1), y, state["beta"])
    (gradient,) = torch.autograd.grad(value, z)
    motion = -reference.softmax_jacobian(p) @ gradient
    arrays = {"p": p, "y": y, "gradient": gradient, "motion": motion}
    return {"value": value.item()} | {key: v for name, a in arrays.items() for key, v in nested(name, a).items()}


def gaussian_fit(state: dict[str, Any], kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the divergence of a Gaussian on the bins from the target, its gradient and its probabilities."""
    y = target_logits().softmax(-1)
    theta = torch.tensor([state["mean"], math.log(state["width"])], dtype=torch.float64, requires_grad=True)
    log_p = (-(GRID - theta[0]).square() / (2 * (2 * theta[1]).exp())).log_softmax(-1)
    value = values_of(kind, log_p, y, state["beta"])
    return value.detach(), torch.autograd.grad(value, theta)[0], log_p.detach().exp()


def expected_modes(state: dict[str, Any]) -> dict[str, float]:
    _, gradient, p = gaussian_fit(state, state["kind"])
    values = {kind: gaussian_fit(state, kind)[0].item() for kind in ("forward", "reverse", "js")}
    mean = (p * GRID).sum()
    width = (p * (GRID - mean).square()).sum().sqrt()
    moments = {"mean": mean.item(), "width": width.item(), "steps": state["steps"]}
    return values | moments | nested("slope", gradient) | {"left": p[GRID < 0].sum().item()}


def expected_digit(state: dict[str, Any], network: Network) -> dict[str, float]:
    digits, index, kind = network.held_out, state["index"], state["kind"]
    x = torch.tensor(state["pixels"], dtype=torch.float64)[None] / 16
    label = state["label"] if state["target"] == "chosen" else int(digits.labels[index])
    y = digits.soft[index] if state["target"] == "soft" else torch.eye(10, dtype=torch.float64)[label]
    x.requires_grad_()
    e = network.features(x)
    z = network.head(e)
    log_p = z.log_softmax(-1)[0]
    p = log_p.exp()
    loss = values_of("forward" if kind == "ce" else kind, log_p, y)
    loss = loss + reference.entropy(y) if kind == "ce" else loss
    theta = dict(network.features.named_parameters())
    wanted = {
        "inZ": z, "inE": e, "inX": x, "inW": network.head.weight, "inB": network.head.bias,
        "inV": theta["hidden.weight"], "inA": theta["hidden.bias"],
    }  # fmt: skip
    gradients = dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))
    if not loss.isfinite():
        gradients = {name: torch.full_like(value, math.nan) for name, value in gradients.items()}
    in_p = reference.kl_gradient_in_first(p, y) if kind == "reverse" else reference.dL_dp(y, p)
    arrays = {"z": z[0], "p": p, "y": y, "inP": in_p, "inZ": gradients.pop("inZ")[0]}
    values = {"loss": loss.item(), "label": int(digits.labels[index]), "predicted": int(z.argmax())}
    values |= {f"norm-{name}": value.norm().item() for name, value in gradients.items()}
    return values | {key: v for name, a in arrays.items() for key, v in nested(name, a.detach()).items()}


def expected_vae(state: dict[str, Any]) -> dict[str, float]:
    m, log_s, n, log_t = theta = [
        torch.tensor(value, dtype=torch.float64, requires_grad=True)
        for value in (state["mean"], math.log(state["width"]), state["r"][0], math.log(state["r"][1]))
    ]
    # The integral of q (log q − log r) by the trapezoidal rule, which is exact to rounding for smooth densities.
    step = 0.01
    x = torch.arange(-60, 60, step, dtype=torch.float64)
    log_q, log_r = (-(((x - at) / log.exp()) ** 2) / 2 - log for at, log in ((m, log_s), (n, log_t)))
    value = step / math.sqrt(2 * math.pi) * (log_q.exp() * (log_q - log_r)).sum()
    gradient = torch.stack(torch.autograd.grad(value, theta))
    prior = gradient[2:] if state["learned"] else torch.zeros(2)
    places = {"mean": state["mean"], "width": state["width"], "r.0": state["r"][0], "r.1": state["r"][1]}
    return places | {"value": value.item()} | nested("slope", gradient[:2]) | nested("prior", prior)


def expected(states: dict[str, Any], network: Network) -> dict[str, float]:
    by_widget = {
        "classes": expected_classes(states["classes"]), "simplex": expected_simplex(states["simplex"]),
        "modes": expected_modes(states["modes"]), "digit": expected_digit(states["digit"], network),
        "vae": expected_vae(states["vae"]),
    }  # fmt: skip
    return {f"{widget}.{name}": value for widget, values in by_widget.items() for name, value in values.items()}


def random_value(control: dict[str, Any], rng: random.Random) -> object:
    if control["type"] == "checkbox":
        return rng.random() < 0.5
    if control["options"]:
        return rng.choice(control["options"])
    low, high, step = control["min"], control["max"], control["step"]
    share = rng.choice((0.0, 1.0)) if rng.random() < 0.15 else rng.random()  # the ends are of most interest
    return low + step * round(share * (high - low) / step)


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_every_number_is_that_of_float64_python(pages: Pages, lang: str) -> None:
    driver, rng = pages.open(lang), random.Random(lang)
    controls = driver.execute_script(CONTROLS, WIDGETS)
    seen = set()
    for state in range(STATES):
        values = {name: [random_value(each, rng) for each in of] for name, of in controls.items()}
        pixels = [rng.randint(0, 16) for _ in range(64)] if state % 2 else None
        states, shown = driver.execute_script(SET_CONTROLS, values, pixels)
        truth = expected(states, pages.network)
        assert {key for key, *_ in shown} == set(truth)
        for key, text, number, form in shown:
            value = float(number.replace("Infinity", "inf"))
            assert value == pytest.approx(truth[key], rel=1e-9, abs=1e-9, nan_ok=True), (state, key)
            assert text in shown_as(truth[key], form), (state, key, truth[key])
        seen |= set(truth)
    assert len(seen) > 300  # up to ten classes


# The forward KL matches the moments of the target; the reverse KL those of its left hump, but for the overlap.
@pytest.mark.parametrize(
    ("kind", "mean", "width"), [("forward", -0.5, 2.544), ("reverse", -2.5, 0.6), ("js", -2.5, 0.6)]
)
def test_the_fit_descends_step_by_step_to_a_minimum(pages: Pages, kind: str, mean: float, width: float) -> None:
    driver = pages.open("en")
    driver.execute_script("softcurve.modes.set({ kind: arguments[0], mean: -2, width: 1, steps: 0 })", kind)
    driver.find_element("css selector", "#play-modes [data-action=step]").click()
    assert driver.execute_script("return softcurve.modes.state.steps") == 1
    descent = driver.execute_script(
        """const press = document.querySelector("#play-modes [data-action=step]");
           return Array.from({ length: 25 }, () => { press.click(); return softcurve.modes.values.value; })"""
    )
    assert descent == sorted(descent, reverse=True)
    state, values = driver.execute_script("return [softcurve.modes.state, softcurve.modes.values]")
    assert gaussian_fit(state, kind)[1].abs().max().item() < 1e-6
    assert (values["mean"], values["width"]) == (pytest.approx(mean, abs=5e-3), pytest.approx(width, abs=5e-3))


def test_steps_of_the_vae_reach_the_prior_which_stays(pages: Pages) -> None:
    driver = pages.open("en")
    press = """for (let k = 0; k < 80; k += 1) document.querySelector("#play-vae [data-action=step]").click();
               return softcurve.vae.state"""
    state = driver.execute_script(press)
    assert state["r"] == [0, 1]
    assert (state["mean"], state["width"]) == (pytest.approx(0, abs=1e-4), pytest.approx(1, abs=1e-4))
    driver.execute_script("softcurve.vae.set({ mean: 1.5, width: 0.5, learned: true })")
    state = driver.execute_script(press)
    assert state["r"][0] > 0.1
    assert state["r"] == [pytest.approx(state["mean"], abs=1e-4), pytest.approx(state["width"], abs=1e-4)]


def test_everything_can_be_done_with_the_keyboard(pages: Pages) -> None:
    driver = pages.open("zh")
    slider = driver.find_element("css selector", "[data-control='z.0']")
    before = driver.execute_script("return softcurve.classes.values.p[0]")
    slider.send_keys(Keys.ARROW_RIGHT)
    assert driver.execute_script("return softcurve.classes.state.z[0]") == pytest.approx(2.1)
    assert driver.execute_script("return softcurve.classes.values.p[0]") > before
    driver.execute_script("document.querySelector('[data-pixel=\"0\"]').focus()")
    for key in (Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.SPACE):
        driver.switch_to.active_element.send_keys(key)
    state = driver.execute_script("return softcurve.digit.state")
    assert state["pixels"][9] == state["brush"] == 16
    assert driver.switch_to.active_element.accessible_name.endswith("16")
    operable = driver.find_elements("css selector", "input, select, button:not([data-pixel])")
    unnamed = [each.get_attribute("outerHTML") for each in operable if each.is_displayed() and not each.accessible_name]
    assert unnamed == []


# The keys that change a control, one of which must do so whatever its value is.
CHANGING = {
    "range": (Keys.ARROW_RIGHT, Keys.ARROW_LEFT),
    "number": (Keys.ARROW_UP, Keys.ARROW_DOWN),
    "checkbox": (Keys.SPACE,),
    "select-one": (Keys.ARROW_DOWN, Keys.ARROW_UP),
}


def test_every_control_and_every_button_works_with_the_keyboard(pages: Pages) -> None:
    driver = pages.open("en")
    show_all = """softcurve.classes.set({ count: 10, kind: "js" }); softcurve.simplex.set({ kind: "js" });
                  softcurve.modes.set({ kind: "js" }); softcurve.digit.set({ target: "chosen", pixels: Array(64).fill(8) });"""
    states = "return JSON.stringify(arguments[0].map((name) => softcurve[name].state))"
    driver.execute_script(show_all)
    controls = driver.find_elements("css selector", ".play [data-control]")
    buttons = driver.find_elements("css selector", ".play [data-action]")
    assert len(controls) > 40
    for each in (*controls, *buttons):
        driver.execute_script(
            show_all
        )  # the choice of a divergence hides β, and an unpainted digit has nothing to restore
        assert each.is_displayed()
        assert each.get_property("tabIndex") == 0
        before = driver.execute_script(states, WIDGETS)
        for key in CHANGING.get(each.get_property("type"), (Keys.ENTER,)):
            each.send_keys(key)
            if (after := driver.execute_script(states, WIDGETS)) != before:
                break
        assert after != before, each.get_attribute("outerHTML")


@pytest.mark.skipif(not AXE, reason="SOFTCURVE_AXE_CORE does not name axe-core's axe.min.js")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("page", "width"), [("en", 1200), ("zh", 375), ("report", 1200), ("report", 375)])
def test_axe_has_no_complaint(pages: Pages, page: str, width: int, scheme: str) -> None:
    pages.driver.execute_cdp_cmd(
        "Page.setBypassCSP", {"enabled": True}
    )  # the page's policy forbids scripts from outside
    driver = pages.open(page, width=width, scheme=scheme)
    driver.execute_script("if (window.softcurve) softcurve.classes.set({ count: 10 })")
    driver.execute_script(Path(AXE).read_text("utf-8"))
    driver.set_script_timeout(120)
    run = "axe.run().then((found) => arguments[0](found.violations.map((each) => [each.id, each.nodes[0].html])))"
    assert driver.execute_async_script(run) == []


@pytest.mark.parametrize("lang", ["en", "zh", "report"])
def test_the_page_fits_a_phone_loads_nothing_and_says_what_it_draws(pages: Pages, lang: str) -> None:
    driver = pages.open(lang, width=375)
    assert driver.execute_script("return document.documentElement.scrollWidth") == 375
    assert driver.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert pages.paths[lang].stat().st_size < 2_000_000
    drawings = driver.find_elements("css selector", "svg[role=img], canvas, img")
    assert all(each.accessible_name for each in drawings)
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
    urls = re.findall(r'"url":"(?!data:|file:)([^"]+)"', str(driver.get_log("performance")))
    assert [url for url in urls if url.startswith(("http", "ws"))] == []


def test_a_line_of_python_is_copied(pages: Pages) -> None:
    driver = pages.open("en")
    code = driver.find_element("css selector", "#softmax .code")
    driver.execute_script("window.written = []; navigator.clipboard.writeText = async (text) => written.push(text)")
    press = code.find_element("css selector", "button")
    press.send_keys(Keys.ENTER)
    assert driver.execute_script("return window.written") == ["reference.softmax(z)"]
    assert press.text == "Copied"
