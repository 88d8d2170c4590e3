"""The Python lines on the page: each is run when the page is written, and its result stands beside it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SETUP = """\
import math, torch, softcurve
from softcurve import reference
torch.set_default_dtype(torch.float64)
z = torch.tensor([2.0, 1.0, 0.1])  # logits of one sample
y = torch.tensor([0.7, 0.2, 0.1])  # its soft target
p = reference.softmax(z)
features = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Tanh())
head = torch.nn.Linear(2, 3)
x = torch.tensor([[0.5, -1.0, 2.0, 0.0]])
chain = softcurve.chain_rule(features, head, x, y.unsqueeze(0))
mu, sigma = 1.0, 0.5  # mean and standard deviation of the Gaussian q
delta = torch.tensor([0.1, 0.0, 0.0])  # a change of the logits
q, r = torch.tensor([0.90, 0.06, 0.04]), torch.tensor([0.2, 0.5, 0.3])  # a categorical q and its prior
"""

# By statement, or by statement and a number. The names are those of SETUP.
LINES = {
    "softmax": "reference.softmax(z)",
    "entry": "reference.softmax_derivative(p, 0, 1)",
    "jacobian": "softcurve.softmax_jacobian(z)",
    "rewritten": "-softcurve.entropy(y.log()) + softcurve.cross_entropy(z, y)",
    "entropy": "softcurve.entropy(y.log())",
    "cross-entropy": "reference.cross_entropy(y, p)",
    "loss": "softcurve.cross_entropy(z, y)",
    "one-hot": "softcurve.cross_entropy(z, torch.tensor(0))",
    "symmetric": "torch.equal(softcurve.softmax_jacobian(z), softcurve.softmax_jacobian(z).mT)",
    "identity": "softcurve.softmax_jacobian_product(z, y / p) - reference.basic_identity(y, p)",
    "gradient-p": "reference.dL_dp(y, p)",
    "gradient-z": "reference.dL_dz(y, p)",
    "hessian": "torch.func.jacrev(torch.func.grad(softcurve.cross_entropy))(z, y)",
    "gradient-e": "chain.dL_de",
    "gradient-x": "chain.dL_dx",
    "gradient-W": "chain.dL_dW",
    "gradient-theta": 'chain.dL_dtheta["0.weight"]',
    "kl": "softcurve.kl_divergence(y.log(), z)",
    "information": "(y * (-p.log2() + y.log2())).sum()",
    "bits": "softcurve.kl_divergence(y.log(), z, base=2)",
    "direction": "softcurve.kl_divergence(z, y.log())",
    "infinite": "softcurve.kl_divergence(torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).log())",
    "js": "softcurve.js_divergence(y.log(), z, beta=0.5)",
    "vae": "(mu**2 + sigma**2 - 1 - math.log(sigma**2)) / 2",
    "prior": "torch.tensor([mu, sigma**2 - 1])",
    "categorical-q": "reference.kl_gradient_in_first_logits(q, r)",
    "categorical-r": "reference.kl_gradient_in_second_logits(q, r)",
    "constant": "softcurve.cross_entropy(z, y) - softcurve.kl_divergence(y.log(), z)",
    "curvature": "softcurve.kl_divergence(z, z + delta)",
    "quadratic": "delta @ softcurve.softmax_jacobian_product(z, delta) / 2",
    "second-order": "torch.func.jacrev(torch.func.grad(softcurve.kl_divergence))(z, y.log())",
    "same": (
        "torch.func.grad(softcurve.cross_entropy)(z, y) "
        "- torch.func.grad(softcurve.kl_divergence, argnums=1)(y.log(), z)"
    ),
}


class Line(NamedTuple):
    """A line of Python and what it returns, in four decimals."""

    code: str
    result: str


def run_lines() -> dict[str, Line]:
    """Run the setup and every line; torch's generator and its default dtype keep their state."""
    dtype = torch.get_default_dtype()
    scope: dict[str, object] = {}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            exec(SETUP, scope)
            return {name: Line(code, _rounded(eval(code, scope))) for name, code in LINES.items()}
    finally:
        torch.set_default_dtype(dtype)


def _rounded(value: object) -> str:
    """Format numbers, also those of a tensor in its nested brackets, without a zero's minus sign."""
    if isinstance(value, Tensor):
        value = value.detach().tolist()
    if isinstance(value, list):
        return f"[{', '.join(map(_rounded, value))}]"
    if isinstance(value, float):
        return f"{0.0 if abs(value) < 5e-5 else value:.4f}"
    return str(value)
