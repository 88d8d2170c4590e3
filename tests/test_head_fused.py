"""The head's Triton kernels: in the interpreter, through the compiler for real GPUs, and not there unless wanted.

The interpreter is chosen by the environment before Triton is imported, so its tests have a process of their own.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from softcurve import checks
from softcurve.head import backends, curvature, half, products
from softcurve.losses.divergences import CrossEntropy
from softcurve.losses.spec import LossSpec

from .cases import BY_NAME, along, everything, problem, tile_of
from .test_curvature_head import HEAD, directions, posed, whole, zeros_like

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

# All of the kernels' own tests, which see that none is left out; and what the head promises of exactness, in float32.
INTERPRETED = {
    "kernels": ["tests/interpreted_head.py"],
    "exactness": [
        "tests/test_exactness.py",
        "tests/test_head_exactness.py",
        "tests/test_exclude.py",
        "tests/test_log_probs.py",
        "-k",
        (
            "(test_confident_row and head and -9-) or a_bias_of_minus_infinity"
            " or (test_offset and float32 and 10000 and (index or smoothed or Logits or js))"
            " or test_offsets_and_half_precision or test_float32_is_right_relatively"
        ),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("part", INTERPRETED)
def test_in_the_interpreter(part: str) -> None:
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short"]
    # NumPy remarks on the infinities that Triton is told to leave out afterwards.
    command = [sys.executable, "-m", "pytest", *INTERPRETED[part], *options, "-W", "ignore::RuntimeWarning"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_triton_is_imported_only_when_wanted(run_python: Any) -> None:
    code = (
        "import sys, torch, softcurve\n"
        "softcurve.linear_cross_entropy(torch.eye(2), torch.eye(2), torch.tensor([0, 1]))\n"
        "print([name for name in sys.modules if name.startswith('softcurve.head.triton')])"
    )
    assert run_python(code).stdout.strip() == "[]"


def test_the_cpu_is_served_by_aten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not backends.serves(LossSpec(CrossEntropy(), "sparse"), torch.device("cpu"), torch.float32)
    assert backends.serves(LossSpec(CrossEntropy(), "sparse"), torch.device("cuda"), torch.float32)
    assert not backends.serves(LossSpec(CrossEntropy(), "sparse"), torch.device("cuda"), torch.float64)


@pytest.mark.parametrize(("beta", "alpha"), [(0.0, 1.0), (0.0, 0.5), (1.0, 1.0), (1.0, 0.5)])
def test_half_products_where_addmm_adds_to_half_precision_alone(
    beta: float, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(half, "_adds_into_float32", lambda device, dtype: False)
    monkeypatch.setattr(half, "_mm", lambda out, a, b: out.copy_(a.float() @ b.float()))
    monkeypatch.setattr(half, "STEP_ENTRIES", 20)  # two rows at a time
    a, b, out = torch.randn(7, 4).bfloat16(), torch.randn(4, 9).bfloat16(), torch.randn(7, 9)
    expected = (beta * out.double() + alpha * (a.double() @ b.double())).float()
    products.half_product(out, a, b, beta=beta, alpha=alpha)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


# --- for real GPUs -------------------------------------------------------------------------------------------------------

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}
COMPILED = (
    "cross_entropy-indices",
    "cross_entropy-float",
    "cross_entropy-Logits",
    "forward-Probabilities",
    "reverse-LinearTeacher",
    "js0.3-Logits",
)


class Launches:
    """What the head would launch: of every kernel and every set of its switches one signature."""

    def __init__(self) -> None:
        self.found: dict[Any, tuple[Any, dict[str, str], dict[Any, Any], dict[str, Any]]] = {}

    def record(self, kernel: Any, grid: Any, arguments: dict[str, Any], options: dict[str, Any]) -> None:
        assert set(arguments) == set(kernel.arg_names)
        signature: dict[str, str] = {}
        constants: dict[Any, Any] = {}
        for n, parameter in enumerate(kernel.params):
            value = arguments[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[parameter.name] = "constexpr"
                constants[(n,)] = value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = TYPES[value.dtype]
            elif isinstance(value, int):  # as Triton takes a stride beyond 2³¹
                signature[parameter.name] = "i64" if "stride" in parameter.name else "i32"
            else:
                signature[parameter.name] = "fp32"
        switches = [
            (p.name, arguments[p.name] if p.is_constexpr else arguments[p.name] is not None)
            for p in kernel.params
            if p.name not in SIZES
        ]
        narrow = any(part == TYPES[torch.bfloat16] for part in signature.values())
        key = (kernel.__module__, kernel.__name__, (*switches, ("NARROW", narrow)))
        self.found.setdefault(key, (kernel, signature, constants, options))


SIZES = ("ROWS", "BLOCK")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Of losses, gradients and products of every family, with all options; nothing runs, so their numbers are anything."""
    seen = Launches()
    monkeypatch.setattr(backends, "serves", lambda loss, device, dtype: dtype == torch.float32)
    monkeypatch.setattr(backends.kernels("math"), "run", seen.record)
    monkeypatch.setattr(checks, "explain_nan", lambda *_: None)
    # Nothing runs, so a product may be given what it cannot multiply here.
    monkeypatch.setattr(products, "is_half", lambda *_: False)
    monkeypatch.setattr(products, "to_features", lambda g, w, dtype, **_: g.new_zeros(len(g), w.shape[1], dtype=dtype))
    monkeypatch.setattr(products, "back_to_weight", lambda *_, **__: None)
    monkeypatch.setattr(products, "back_to_bias", lambda *_, **__: None)
    for name, narrow in itertools.product(COMPILED, (None, torch.bfloat16)):
        monkeypatch.setattr(backends, "residual_dtype", lambda *_, narrow=narrow: narrow)
        options = everything(BY_NAME[name])
        given = problem(BY_NAME[name], options, "sum", (5,), 3, 37)
        given = replace(
            given,
            weight=None if given.weight is None else given.weight.float(),
            arguments=tuple(a.detach().float().requires_grad_() for a in given.arguments),
        )
        loss, _ = given.ours(*given.arguments, return_stats=True)
        first = torch.autograd.grad(loss, given.arguments, create_graph=True, materialize_grads=True)
        torch.autograd.grad(along(first), given.arguments, materialize_grads=True)
        of_curvature = posed(name, "everything", "whole")
        of_curvature = replace(
            of_curvature,
            weight=None if of_curvature.weight is None else of_curvature.weight.float(),
            arguments=tuple(a.detach().float() for a in of_curvature.arguments),
        )
        head = [
            torch.randn_like(a)
            for name, a in zip(of_curvature.names, of_curvature.arguments, strict=True)
            if name in HEAD
        ]
        into = zeros_like([tuple(head)])
        curvature.add_products(whole(of_curvature), "hessian", directions([tuple(head)]), directions(into))
    lists = backends.kernels("sparse")
    z, out = torch.randn(5, 37), torch.empty(5, 37, dtype=torch.bfloat16)
    for cap in (None, 3.0):
        lists.exponentials(tile_of(z, out, cap))
    lists.rescale(out, torch.ones(5))
    return seen


@pytest.mark.skipif(platform.system() != "Linux", reason="Triton's own ptxas is a program for Linux")
@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_kernels_compile_for_a_gpu(launches: Launches, capability: int) -> None:
    """Every kernel; of its many sets of switches the one with most of them on, and on 90 for every family and dtype."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    richest: dict[Any, Any] = {}
    for module, name, switches in launches.found:
        settings = dict(switches)
        of_family = capability == 90 and name == "_residuals" and settings["NARROW"]
        kind = settings["FAMILY"] if of_family else settings.get("REDO")
        key = (module, name, kind, capability == 90 and settings["NARROW"])
        on = sum(bool(value) for value in settings.values())
        if on >= richest.get(key, (-1,))[0]:
            richest[key] = (on, (module, name, switches))
    assert {key[:2] for key in richest} == {key[:2] for key in launches.found}
    assert len({key[:2] for key in richest}) > 12
    for _, key in richest.values():
        kernel, signature, constants, options = launches.found[key]
        compiled = triton.compile(
            ASTSource(fn=kernel, signature=signature, constexprs=constants),
            target=GPUTarget("cuda", capability, 32),
            options=options,
        )
        assert compiled.asm["cubin"]
        # A row's place is counted in 64 bits.
        assert not [
            line for line in compiled.asm["ttir"].splitlines() if "muli" in line and "stride" in line and "i32" in line
        ]
