"""``softcurve spectrum`` as a user sees it: figures against dense matrices, pictures, refusals."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from softcurve.cli.main import app
from softcurve.fit.saved_head import SavedHead

from .cli_output import run_both, run_json
from .gathered import load_rows

ROWS, WIDTH, CLASSES = 23, 4, 3
GENERATOR = np.random.default_rng(5)
FEATURES = GENERATOR.normal(size=(ROWS, WIDTH))
WEIGHT = GENERATOR.normal(size=(CLASSES, WIDTH))
BIAS = GENERATOR.normal(size=CLASSES)
SOFT = GENERATOR.dirichlet(np.full(CLASSES, 0.7), size=ROWS)
INDEX = GENERATOR.integers(0, CLASSES, size=ROWS)
NAMES = ("b", "[red]a", "c")  # not sorted: the head's order counts
LABELS = np.array(NAMES)[INDEX]
PARAMETERS = CLASSES * (WIDTH + 1)

MLP = """
import torch
from torch import nn

def make():
    features = nn.Sequential(nn.Linear(3, 2, dtype=torch.float64), nn.Tanh())
    head = nn.Linear(2, 3, dtype=torch.float64)
    x = torch.randn(11, 3, dtype=torch.float64)
    return features, head, list(zip(x.split(6), (torch.arange(11) % 3).split(6)))

def single():
    features, head, data = make()
    return features.float(), head.float(), [({"input": x.float()}, y) for x, y in data]

def soft():
    features, head, data = make()
    return features, head, [(x, torch.softmax(x.float(), dim=1)) for x, _ in data]

def few():
    features, head, data = make()
    features = nn.Sequential(nn.Linear(3, 40, dtype=torch.float64), nn.Tanh())
    head = nn.Linear(40, 3, dtype=torch.float64)
    return features, head, [(x[:1], y[:1]) for x, y in data]

def flat():
    features, head, data = make()
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    return nn.Identity(), head, [(features(x).detach(), y) for x, y in data]
"""

WRONG = """
import sys
from torch import nn

VALUE = 3

def bad_return():
    return nn.Identity(), 1, []

def nothing():
    pass

def once():
    return nn.Identity(), nn.Linear(2, 2), (batch for batch in [])

def empty():
    return nn.Identity(), nn.Linear(2, 2), []

def broken():
    raise KeyError("weights")

def leaves():
    sys.exit("no licence")

class Careless(nn.Module):
    def forward(self, x):
        raise KeyError("missing")

def careless():
    import torch
    return Careless(), nn.Linear(2, 2), [(torch.ones(5, 2), torch.zeros(5, dtype=torch.long))]

def wide():
    import torch
    return nn.Linear(3, 2), nn.Linear(2, 2), [(torch.ones(5, 4), torch.zeros(5, dtype=torch.long))]

def infinite():
    import torch
    return nn.Identity(), nn.Linear(2, 2), [(torch.full((5, 2), float("nan")), torch.zeros(5, dtype=torch.long))]

def labelled():
    import torch
    return nn.Identity(), nn.Linear(2, 2), [(torch.ones(5, 2), torch.zeros(5, dtype=torch.long))]
"""


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in ("mlp", "wrong", "broken_module", "package", "package.inner"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def save_head(path="head.safetensors", loss="cross_entropy", dtype=torch.float64):
    SavedHead(torch.tensor(WEIGHT, dtype=dtype), torch.tensor(BIAS, dtype=dtype), NAMES, loss, 1.0).save(path)


@pytest.fixture
def labels():
    save_head()
    np.savez("labels.npz", features=FEATURES, target=LABELS)
    return "head.safetensors", "labels.npz"


@pytest.fixture
def soft():
    save_head()
    save_file({"features": torch.tensor(FEATURES), "target": torch.tensor(SOFT)}, "soft.safetensors")
    return "head.safetensors", "soft.safetensors"


@pytest.fixture
def mlp():
    Path("mlp.py").write_text(MLP)


@pytest.fixture
def wrong():
    Path("wrong.py").write_text(WRONG)


def quick(arguments):
    """Without a density, which takes the most time, unless the arguments speak of it."""
    return ("spectrum", *arguments, *(() if {"--probes", "--out"} & set(arguments) else ("--probes", 0)))


def run(*arguments):
    return run_json(*quick(arguments))


def both(*arguments):
    return run_both(*quick(arguments))


def refused(*arguments):
    """The message of a run that must be refused in one line, and leave the folder as it was."""
    before = {name: os.stat(name).st_mtime_ns for name in os.listdir()}
    done = CliRunner().invoke(app, ["spectrum", *map(str, arguments)])
    assert done.exit_code == 2, done.output
    assert isinstance(done.exception, SystemExit)
    assert done.stdout == ""
    assert {name: os.stat(name).st_mtime_ns for name in os.listdir()} == before
    return done.stderr


def softmax(logits):
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def sandwich(features, blocks):
    """``Σ_i blocks_i ⊗ [e;1][e;1]ᵀ / n``, class by class: the head's parameters in another order."""
    e = np.column_stack([features, np.ones(len(features))])
    return sum(np.kron(block, np.outer(row, row)) for block, row in zip(blocks, e, strict=True)) / len(e)


def covariances(p):
    return [np.diag(row) - np.outer(row, row) for row in p]


def probabilities():
    return softmax(FEATURES @ WEIGHT.T + BIAS)


def agrees(record, matrix, k=10, rel=1e-10):
    """Eigenvalues and the exact trace are those of a dense matrix, and the record says so of itself."""
    expected = np.linalg.eigvalsh(matrix)[::-1]
    scale = np.abs(expected).max()
    k = min(k, len(matrix))
    assert record["parameters"] == len(matrix)
    np.testing.assert_allclose(record["eigenvalues"], expected[:k], rtol=0, atol=rel * scale)
    assert max(record["residuals"]) <= 1e-7 * scale
    assert (record["trace_method"], record["trace_standard_error"]) == ("exact", 0.0)
    assert record["trace"] == pytest.approx(np.trace(matrix), rel=1e-12, abs=1e-12)
    if record["trace"] > 0:
        share = expected[:k].sum() / np.trace(matrix)
        assert record["share_of_trace"] == pytest.approx(share, rel=1e-8)
        assert record["share_of_trace_standard_error"] == 0.0


def autograd_hessian(value, *parameters):
    """Dense, by torch alone, of a function of flat float64 parameters."""
    flat = torch.cat([parameter.reshape(-1) for parameter in parameters])
    sizes = [parameter.numel() for parameter in parameters]
    shapes = [parameter.shape for parameter in parameters]

    def of_flat(vector):
        return value(*(part.reshape(shape) for part, shape in zip(vector.split(sizes), shapes, strict=True)))

    return torch.autograd.functional.hessian(of_flat, flat).numpy()


def head_loss(divergence):
    """The mean over rows of ``divergence(log p, y)`` of the saved head on the soft targets."""
    x, y = torch.tensor(FEATURES), torch.tensor(SOFT)

    def value(weight, bias):
        return divergence(torch.log_softmax(x @ weight.T + bias, dim=1), y).sum(dim=1).mean()

    return autograd_hessian(value, torch.tensor(WEIGHT), torch.tensor(BIAS))


def js(log_p, y):
    p = log_p.exp()
    m = (p + y) / 2
    return (p * (log_p - m.log()) + y * (y.log() - m.log())) / 2


def test_a_saved_head_and_the_table(labels):
    record, table = both(*labels, "--probes", 6)
    agrees(record, sandwich(FEATURES, covariances(probabilities())))
    assert len(record["eigenvalues"]) == len(record["residuals"]) == 10
    assert (record["command"], record["model"], record["data"]) == ("spectrum", *labels)
    assert (record["matrix"], record["loss"], record["dtype"]) == ("ggn", "cross_entropy", "float64")
    assert (record["rows"], record["classes"], record["picture"]) == (ROWS, CLASSES, None)
    density = record["density"]
    assert record["products"] == sum(
        [record["eigenvalues_products"], record["trace_products"], density["products"]]
    )  # fmt: skip
    assert 0 < record["passes"] <= record["products"]
    assert record["seconds"] > 0
    assert (density["probes"], density["steps"]) == (6, PARAMETERS)
    assert density["lowest"] == pytest.approx(0, abs=1e-12)
    assert density["highest"] == pytest.approx(record["eigenvalues"][0], rel=1e-9)
    assert list(density["quantiles"].values()) == sorted(density["quantiles"].values())
    assert re.search(r"parameters +│ 15 ", table)
    assert re.search(rf"│ +1 │ +{record['eigenvalues'][0]:.8g} │", table)
    assert "share of the 10 largest" in table
    assert sorted(os.listdir()) == ["head.safetensors", "labels.npz"]


def test_digits():
    head = SavedHead(torch.tensor(np.random.default_rng(0).normal(size=(10, 64))) / 4, torch.zeros(10).double(),
                     tuple(range(10)), "cross_entropy", 1.0)  # fmt: skip
    head.save("head.safetensors")
    rows = load_rows("digits")
    e = np.column_stack([rows.features, np.ones(len(rows))])
    p = softmax(rows.features @ head.weight.numpy().T)
    blocks = [[(e * ((p[:, i] * ((i == j) - p[:, j])) / len(e))[:, None]).T @ e for j in range(10)] for i in range(10)]
    matrix = np.block(blocks)
    record, table = both("head.safetensors", "digits", "-k", 5)
    expected = np.linalg.eigvalsh(matrix)[::-1]
    np.testing.assert_allclose(record["eigenvalues"], expected[:5], rtol=1e-10)
    assert (record["trace_method"], record["trace_products"]) == ("xtrace", 64)
    error = record["trace_standard_error"]
    assert 0 < error < 0.05 * np.trace(matrix)
    assert abs(record["trace"] - np.trace(matrix)) < 5 * error
    assert record["share_of_trace_standard_error"] == pytest.approx(record["share_of_trace"] * error / record["trace"])
    assert record["density"] is None
    assert "quantiles" not in table


def test_every_matrix_of_cross_entropy(soft):
    p = probabilities()
    ggn = sandwich(FEATURES, covariances(p))
    outer = sandwich(FEATURES, [np.outer(row, row) for row in p - SOFT])
    for matrix, dense in {"ggn": ggn, "hessian": ggn, "fisher": ggn, "empirical-fisher": outer}.items():
        record, table = both(*soft, "--matrix", matrix)
        agrees(record, dense)
        assert f"{matrix} of cross_entropy" in table


@pytest.mark.parametrize(
    ("loss", "divergence"),
    [
        ("forward_kl", lambda log_p, y: y * (y.log() - log_p)),
        ("reverse_kl", lambda log_p, y: log_p.exp() * (log_p - y.log())),
        ("js", js),
    ],
)
def test_the_hessian_of_every_divergence(soft, loss, divergence):
    record = run(*soft, "--matrix", "hessian", "--loss", loss, "--top", PARAMETERS)
    assert record["loss"] == loss
    agrees(record, head_loss(divergence), k=PARAMETERS)


def test_the_loss_is_that_of_the_fit_unless_it_is_given(labels, soft):
    save_head(loss="reverse_kl")
    record = run(*soft, "--matrix", "hessian")
    assert record["loss"] == "reverse_kl"
    agrees(record, head_loss(lambda log_p, y: log_p.exp() * (log_p - y.log())))
    assert run(*soft, "--loss", "forward_kl")["loss"] == "forward_kl"
    assert run(*labels)["loss"] == "cross_entropy"
    assert "infinite for labels" in refused(*labels, "--loss", "reverse_kl")


def test_labels_are_the_distributions_that_are_one_at_a_class(labels):
    np.save("hot.npy", np.eye(CLASSES)[INDEX])
    hot = run(*labels, "--loss", "js", "--matrix", "empirical-fisher", "--target", "hot.npy")
    record = run(*labels, "--loss", "js", "--matrix", "empirical-fisher")
    assert record["eigenvalues"] == hot["eigenvalues"]
    residual = probabilities() - np.eye(CLASSES)[INDEX]
    outer = sandwich(FEATURES, [np.outer(row, row) for row in residual])
    agrees(run(*labels, "--matrix", "empirical-fisher"), outer)


def test_the_method_is_the_one_that_is_asked_for():
    Path("larger.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def make():\n"
        "    y = torch.arange(40) % 7\n"
        "    return nn.Identity(), nn.Linear(9, 7).double(), [(torch.randn(40, 9).double(), y)]\n"
    )
    found = {name: run("larger.py:make", "-k", 2, "--method", name, "--probes", 0) for name in ("lanczos", "lobpcg")}
    assert {name: record["eigenvalues_method"] for name, record in found.items()} == {n: n for n in found}
    np.testing.assert_allclose(*(record["eigenvalues"] for record in found.values()), rtol=1e-6)


def test_options_reach_the_computation(labels):
    matrix = sandwich(FEATURES, covariances(probabilities()))
    record = run(*labels, "-k", 99, "--batch-size", 5, "--products", 12, "--probes", 3, "--steps", 4, "--seed", 2)
    assert len(record["eigenvalues"]) == PARAMETERS
    assert sum(record["eigenvalues"]) == pytest.approx(np.trace(matrix), rel=1e-10)
    assert (record["trace_method"], record["trace_products"], record["seed"]) == ("xtrace", 12, 2)
    assert (record["density"]["probes"], record["density"]["steps"]) == (3, 4)
    other = run(*labels, "-k", 2, "--products", 12, "--seed", 3, "--method", "lanczos", "--dtype", "float32")
    assert other["trace"] != record["trace"]
    assert (other["dtype"], other["eigenvalues_method"]) == ("float32", "dense")
    np.testing.assert_allclose(other["eigenvalues"], record["eigenvalues"][:2], rtol=1e-5)
    loose = run(*labels, "-k", 1, "--tol", 0.5)
    assert loose["eigenvalues"][0] == pytest.approx(record["eigenvalues"][0], rel=0.5)


def test_the_dtype_of_the_head_is_the_default(labels):
    save_head(dtype=torch.float32)
    assert run(*labels)["dtype"] == "float32"
    p = softmax(FEATURES @ np.float32(WEIGHT).astype(float).T + np.float32(BIAS))
    agrees(run(*labels, "--dtype", "float64"), sandwich(FEATURES, covariances(p)))


def made_network(seed=0):
    """What ``make`` of the module returns under the seed."""
    torch.manual_seed(seed)
    scope = {}
    exec(MLP, scope)
    return scope["make"]()


def dense_network(features, head, data, *, hessian):
    x = torch.cat([batch for batch, _ in data])
    y = torch.cat([target for _, target in data])
    parameters = [each.detach() for each in (*features.parameters(), *head.parameters())]

    def logits(w1, b1, w2, b2):
        return torch.tanh(x @ w1.T + b1) @ w2.T + b2

    if hessian:
        return autograd_hessian(
            lambda *each: -torch.log_softmax(logits(*each), 1)[range(len(y)), y].mean(), *parameters
        )
    jacobian = torch.func.jacrev(logits, argnums=(0, 1, 2, 3))(*parameters)
    jacobian = torch.cat([part.reshape(len(x), 3, -1) for part in jacobian], dim=2).numpy()
    p = softmax(logits(*parameters).numpy())
    return sum(j.T @ block @ j for j, block in zip(jacobian, covariances(p), strict=True)) / len(p)


@pytest.mark.parametrize("matrix", ["ggn", "hessian"])
def test_the_network_of_a_function(mlp, matrix):
    record, table = both("mlp.py:make", "--matrix", matrix, "--seed", 4)
    agrees(record, dense_network(*made_network(4), hessian=matrix == "hessian"))
    assert (record["rows"], record["data"], record["loss"]) == (None, None, "cross_entropy")
    assert not re.search(r"│ samples ", table)


def test_the_function_is_found_by_path_and_by_module(mlp):
    Path("package").mkdir()
    Path("package/__init__.py").touch()
    Path("package/inner.py").write_text(MLP)
    Path("sibling.py").write_text("SIZE = 3\n")
    Path("uses.py").write_text("import sibling\nfrom mlp import make\nassert sibling.SIZE == 3\n")
    records = [run(f"{source}:make") for source in ("mlp.py", Path("mlp.py").resolve(), "package.inner", "uses.py")]
    assert {tuple(record["eigenvalues"]) for record in records} == {tuple(records[0]["eigenvalues"])}


def test_the_dtype_of_a_network_and_its_inputs(mlp):
    single = run("mlp.py:single", "-k", 3)
    double = run("mlp.py:single", "-k", 3, "--dtype", "float64")
    assert (single["dtype"], double["dtype"]) == ("float32", "float64")
    np.testing.assert_allclose(single["eigenvalues"], double["eigenvalues"], rtol=1e-4)
    exact = np.linalg.eigvalsh(dense_network(*made_network(), hessian=False))[::-1][:3]
    np.testing.assert_allclose(double["eigenvalues"], exact, rtol=1e-5)
    assert run("mlp.py:soft", "--loss", "reverse_kl")["loss"] == "reverse_kl"


def test_repeated_eigenvalues_are_all_found(mlp):
    # At zero weights p is uniform, so that every eigenvalue stands twice: diag(p) − ppᵀ has 1/3 twice and 0.
    record = run("mlp.py:flat", "-k", 3)
    first, second, third = record["eigenvalues"]
    assert second == pytest.approx(first, rel=1e-10)
    assert third < 0.9 * first


def test_a_rank_below_the_eigenvalues_asked_for(mlp):
    # Two rows of three classes: rank 4.
    record = run("mlp.py:few", "-k", 6)
    assert record["parameters"] == 283
    assert sum(record["eigenvalues"][:4]) == pytest.approx(record["trace"], rel=1e-10)
    assert record["eigenvalues"][3] > 1e-6
    np.testing.assert_allclose(record["eigenvalues"][4:], 0, atol=1e-12)


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG\r\n"), (".svg", b"<?xml"), (".PDF", b"%PDF")])
def test_the_picture(labels, suffix, start):
    out = Path(f"density{suffix}")
    out.write_bytes(b"what stood here before")
    record, shown = both(*labels, "--probes", 2, "--out", out, "--overwrite")
    assert record["picture"] == str(out)
    assert shown.splitlines()[-1] == str(out)
    assert out.read_bytes().startswith(start)
    assert out.stat().st_size > 5000
    assert sorted(os.listdir()) == sorted(["head.safetensors", "labels.npz", out.name])


def test_the_picture_marks_the_eigenvalues(labels):
    record = run(*labels, "-k", 4, "--probes", 2, "--out", "density.svg")
    assert "4 largest eigenvalues" in Path("density.svg").read_text()
    run(*labels, "-k", 1, "--steps", 1, "--probes", 1, "--out", "density.svg", "--overwrite")
    assert "largest eigenvalue" in Path("density.svg").read_text()
    assert record["density"]["highest"] == pytest.approx(record["eigenvalues"][0], rel=1e-9)


def test_progress_is_shown_where_it_is_asked_for(labels):
    done = CliRunner().invoke(
        app, ["spectrum", *labels, "--progress", "--batch-size", "9", "--probes", "1", "--steps", "2"]
    )
    assert done.exit_code == 0
    assert "over the data" in done.stderr
    assert json.loads(done.stdout)["rows"] == ROWS


def test_a_trace_that_is_not_positive_has_no_shares(soft):
    # Where the model is sure of what the target excludes, the reverse KL is concave.
    np.save("far.npy", softmax(-3 * (FEATURES @ WEIGHT.T + BIAS)))
    record, table = both(*soft, "--target", "far.npy", "--loss", "reverse_kl", "--matrix", "hessian")
    assert record["trace"] < 0
    assert record["share_of_trace"] is None
    assert "the trace is not positive" in table


SAVED = ["head.safetensors", "labels.npz"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "MODEL"),
        (["head.safetensors"], "data: head.safetensors is a head without samples; give them as the second argument"),
        (["none.safetensors", "labels.npz"], "head: there is no file none.safetensors"),
        (["soft.safetensors", "labels.npz"], "soft.safetensors is not a head that can be used"),
        (["head.safetensors", "none.npz"], "data: there is no file none.npz"),
        (["head.safetensors", "features.npy"], "data: features.npy has no targets; give them in an .npy file by --target"),
        (["head.safetensors", "digits"], "features of digits must have 4 columns, .*; got 64"),
        (["head.safetensors", "other.npz"], r"be labels of the head's 3 classes .* the first, 'z', in row 0: leave the target out"),
        ([*SAVED, "--loss", "reverse_kl"], "infinite for labels"),
        ([*SAVED, "--loss", "hinge"], "'hinge'"),
        ([*SAVED, "--matrix", "kfac"], "'kfac'"),
        ([*SAVED, "--method", "power"], "'power'"),
        ([*SAVED, "--dtype", "float16"], "'float16'"),
        ([*SAVED, "--top", "0"], "--top"),
        ([*SAVED, "--products", "3"], "--products"),
        ([*SAVED, "--steps", "0"], "--steps"),
        ([*SAVED, "--batch-size", "0"], "--batch-size"),
        ([*SAVED, "--tol", "nan"], "--tol must be a number between 0 and 1; got nan"),
        ([*SAVED, "--tol", "-1"], "--tol must be a number between 0 and 1; got -1"),
        ([*SAVED, "--seed", str(2**63)], r"--seed must be below 2\*\*63"),
        ([*SAVED, "--out", "p.jpg"], "--out: p.jpg must end in .png, .svg, .pdf"),
        ([*SAVED, "--out", "none/p.png"], "--out: there is no folder none"),
        ([*SAVED, "--out", "p.png", "--probes", "0"], "there is no density to draw in p.png; give --probes 1 or more"),
        (["head.safetensors", "huge.npz"], "head.safetensors: .*(infinit|NaN)"),
        (["wrong.py"], "model: wrong.py must be a head that ends in .safetensors, or FILE.py:function"),
        (["wrong.py:"], "model: wrong.py: must be a head"),
        (["none.py:make"], "model: there is no file none.py; check the path"),
        (["folder/none:make"], "model: folder/none must end in .py"),
        (["no_such_package.inner:make"], "no_such_package.inner cannot be imported: ModuleNotFoundError: No module named"),
        (["wrong.py:make"], "model: wrong.py has no function 'make'; it has 'bad_return', 'nothing', 'once'"),
        (["wrong.py:VALUE"], "model: wrong.py has no function 'VALUE'"),
        (["wrong.py:bad_return"], r"wrong.py:bad_return must return \(features, head, data\), .*; got \(Identity, int, list\)"),
        (["wrong.py:nothing"], "wrong.py:nothing must return .*; got NoneType"),
        (["wrong.py:once"], "wrong.py:once must return re-iterable data, .*; got a one-time generator"),
        (["wrong.py:empty"], "wrong.py:empty: data must hold a row that counts, got none"),
        (["wrong.py:broken"], r"wrong.py:broken raised KeyError: 'weights' \(wrong.py, line 20\)"),
        (["wrong.py:leaves"], r"wrong.py:leaves raised SystemExit: no licence \(wrong.py, line 23\)"),
        (["wrong.py:careless"], r"wrong.py:careless: KeyError: 'missing' \(wrong.py, line 27\)"),
        (["wrong.py:wide"], "wrong.py:wide: .*5x4 and 3x2"),
        (["wrong.py:infinite"], "wrong.py:infinite: .*(infinit|NaN)"),
        (["wrong.py:labelled", "--loss", "js"], "wrong.py:labelled: target must be a distribution, got class indices"),
        (["wrong.py:labelled", "labels.npz"], "data: wrong.py:labelled brings data of its own; leave labels.npz out"),
        (["wrong.py:labelled", "--target", "features.npy"], "--target: wrong.py:labelled brings data of its own"),
        (["wrong.py:labelled", "--batch-size", "5"], "--batch-size: wrong.py:labelled brings data of its own"),
        (["broken_module.py:make"], r"broken_module.py cannot be imported: ModuleNotFoundError: No module named 'no_such_thing' \(broken_module.py, line 2\)"),
        (["syntax.py:make"], r"syntax.py cannot be imported: SyntaxError: .*\(syntax.py, line 1\)"),
        (["exits.py:make"], "exits.py cannot be imported: SystemExit: 3"),
    ],
)  # fmt: skip
def test_refusals_name_what_is_wrong(labels, soft, wrong, arguments, message):
    np.save("features.npy", FEATURES)
    np.savez("other.npz", X=FEATURES, y=np.full(ROWS, "z"))
    np.savez("huge.npz", X=np.full((ROWS, WIDTH), 1.7e308), y=LABELS)
    Path("broken_module.py").write_text("\nimport no_such_thing\n")
    Path("syntax.py").write_text("def make(:\n")
    Path("exits.py").write_text("raise SystemExit(3)\n")
    text = refused(*arguments)
    if text.startswith("softcurve: "):
        assert text.count("\n") == 1
    # rich folds a usage error into a box: undo it.
    assert re.search(message, " ".join(re.sub("[│╭╮╰╯─]", " ", text).split()))


def test_nothing_is_drawn_where_the_computation_fails(wrong):
    Path("density.png").write_bytes(b"what stood here before")
    refused("wrong.py:infinite", "--probes", 1, "--out", "density.png")
    assert Path("density.png").read_bytes() == b"what stood here before"


def test_a_picture_that_fails_leaves_what_stood_there(labels, monkeypatch):
    Path("density.png").write_bytes(b"what stood here before")

    def fail(self, file, **options):
        file.write(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    assert (
        refused(*labels, "--probes", 1, "--steps", 2, "--out", "density.png", "--overwrite")
        == "softcurve: the disk is full\n"
    )
    assert Path("density.png").read_bytes() == b"what stood here before"


def test_a_fault_of_the_program_is_not_hidden(labels, monkeypatch):
    def fault(self, **options):
        raise AssertionError("a fault")

    monkeypatch.setattr("softcurve.curvature.operator.SymmetricOperator.trace", fault)
    done = CliRunner().invoke(app, ["spectrum", *labels])
    assert isinstance(done.exception, AssertionError)


def test_without_matplotlib_the_refusal_comes_first(labels, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = refused(*labels, "--out", "density.png")
    assert "needs matplotlib, " in message
    assert "pip install -e '.[app]'" in message
