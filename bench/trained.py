"""Classes of a trained head that carry residual, and what it would save to leave the others out of the gradients.

The residual ``g = p − y`` of most classes is tiny in a trained model. The gradients ``g W`` and ``gᵀ e`` can leave out
the columns of a tile that are small in all of its rows, as the gradient filter of cut-cross-entropy does with whole
blocks below 2⁻¹² (Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2025). ``u`` below is the unit
roundoff of a dtype, by which the gradient is rounded anyway. The command

    python -m bench.trained FILE ... [--rows 1024] [--repeats 7]

reads heads that ``python -m bench.trained_heads`` has trained. It prints the share of classes that must stay so that
less than ``u`` of a gradient is lost, and the time of the products of a share of the classes relative to three whole
ones. Unless a bound is named, the classes are chosen by the exact error, which a criterion that saves time cannot know.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from bench.measure import interleaved, median_ratio, relative_error
from bench.tables import Record, machine, print_head, print_row

PARTS = ("train", "held_out")
DTYPES = (torch.bfloat16, torch.float32)
FILTER = 2.0**-12  # of cut-cross-entropy
STEPS = 128  # groups of classes that are left out one after the other
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)


class Rows(NamedTuple):
    """Rows of features ``(n, d)`` with class indices ``(n,)``, and the head ``(C, d)``, ``(C,)`` in the same dtype."""

    input: Tensor
    weight: Tensor
    bias: Tensor
    target: Tensor

    @staticmethod
    def read(path: Path, part: str, count: int, dtype: torch.dtype) -> Rows:
        """Return the first rows of a part of a file, rounded to ``dtype``."""
        tensors = load_file(path)
        names = f"{part}.input", "linear_weight", "linear_bias"
        input, weight, bias = (tensors[name].to(dtype) for name in names)
        return Rows(input[:count], weight, bias, tensors[f"{part}.target"][:count])

    def in_float64(self) -> Rows:
        """Return the same numbers in float64."""
        return Rows(self.input.double(), self.weight.double(), self.bias.double(), self.target)


class Gradients(NamedTuple):
    """The cross-entropy, summed over the rows, its residuals ``(n, C)`` and its gradients in features and weight."""

    loss: float
    residual: Tensor
    of_input: Tensor
    of_weight: Tensor


def gradients(rows: Rows) -> Gradients:
    """Return loss, residuals and gradients by the dense formulas."""
    log_p = F.log_softmax(F.linear(rows.input, rows.weight, rows.bias), -1)
    at_target = log_p.gather(1, rows.target[:, None])
    # p − 1 at the target by expm1: a confident row keeps its digits.
    residual = log_p.exp().scatter_(1, rows.target[:, None], at_target.expm1())
    return Gradients(-float(at_target.sum()), residual, residual @ rows.weight, residual.T @ rows.input)


# --- classes that must stay -------------------------------------------------------------------------------------------


def classes_for_each_row(rows: Rows, exact: Gradients, u: float) -> float:
    """Return the share of classes to keep for ``‖δ‖ ≤ u ‖g W‖`` in every row, ``δ`` being the part left out."""
    norms = exact.of_input.norm(dim=1, keepdim=True)
    terms = exact.residual.abs() * rows.weight.norm(dim=1) / norms
    return _kept(rows, exact, terms.amax(0).argsort(), lambda left: bool((left.norm(dim=1) <= u * norms[:, 0]).all()))


def classes_for_input(rows: Rows, exact: Gradients, u: float) -> float:
    """Return the share of classes to keep for ``‖δ‖ ≤ u ‖g W‖`` in the Frobenius norm of all rows."""
    terms = exact.residual.norm(dim=0) * rows.weight.norm(dim=1)
    return _kept(rows, exact, terms.argsort(), lambda left: float(left.norm()) <= u * float(exact.of_input.norm()))


def classes_by_bound(rows: Rows, exact: Gradients, u: float) -> float:
    """Return the share of classes to keep for ``‖Σ |g| ‖W‖‖ ≤ u ‖g W‖`` over those left out, in the norm of all rows.

    This bound of ``‖δ‖`` needs no product with the classes that are left out.
    """
    terms = exact.residual.abs() * rows.weight.norm(dim=1)
    sums = terms[:, terms.norm(dim=0).argsort()].cumsum(1).norm(dim=0)
    return 1 - float((sums <= u * exact.of_input.norm()).double().mean())


def classes_for_weight(exact: Gradients, u: float) -> float:
    """Return the share of classes to keep for ``‖δ‖ ≤ u ‖gᵀ e‖`` in the Frobenius norm; the others' rows become 0."""
    squares = exact.of_weight.square().sum(1).sort().values.cumsum(0)
    return 1 - float((squares <= u**2 * squares[-1]).double().mean())


def entries_for_each_row(rows: Rows, exact: Gradients, u: float) -> float:
    """Return the share of residuals to keep for ``Σ |g| ‖W‖ ≤ u ‖g W‖`` over those left out of each row.

    Rows choose their classes independently, so that no order of rows, smaller tile or block structure keeps fewer.
    """
    terms = exact.residual.abs() * rows.weight.norm(dim=1)
    return 1 - _left_out(terms, u * exact.of_input.norm(dim=1, keepdim=True))


def entries_for_each_class(rows: Rows, exact: Gradients, u: float) -> float:
    """Return the share of residuals to keep for ``Σ |g| ‖e‖ ≤ u ‖gᵀ e‖`` over those left out of each class."""
    terms = exact.residual.T.abs() * rows.input.norm(dim=1)
    return 1 - _left_out(terms, u * exact.of_weight.norm(dim=1, keepdim=True))


def _left_out(terms: Tensor, allowed: Tensor) -> float:
    sums = terms.sort(dim=1).values.cumsum(1)
    return float((sums <= allowed).double().mean())


def _kept(rows: Rows, exact: Gradients, order: Tensor, small: Callable[[Tensor], bool]) -> float:
    """Return the share of classes that stay if they are left out in this order while the part left out is small."""
    left, count = torch.zeros_like(exact.of_input), 0
    for group in order.tensor_split(min(STEPS, len(order))):
        left += exact.residual[:, group] @ rows.weight[group]
        if not small(left):
            break
        count += len(group)
    return 1 - count / len(order)


def share_record(rows: Rows) -> Record:
    """Return all shares for rows in one dtype, and errors: of the filter at 2⁻¹², and of torch's dense computation."""
    u, wide = torch.finfo(rows.input.dtype).eps / 2, rows.in_float64()
    exact = gradients(wide)
    kept = exact.residual.abs().amax(0) >= FILTER
    filtered_input = exact.residual[:, kept] @ wide.weight[kept]
    filtered_weight = torch.where(kept[:, None], exact.of_weight, 0.0)
    leaves = [tensor.detach().requires_grad_() for tensor in (rows.input, rows.weight)]
    dense = F.cross_entropy(F.linear(*leaves, rows.bias), rows.target, reduction="sum")
    of_input, of_weight = torch.autograd.grad(dense, leaves)
    by_class = (of_weight.double() - exact.of_weight).norm(dim=1) / exact.of_weight.norm(dim=1)
    return {
        "nats": exact.loss / len(rows.target),
        "each_row": classes_for_each_row(wide, exact, u),
        "input": classes_for_input(wide, exact, u),
        "bound": classes_by_bound(wide, exact, u),
        "weight": classes_for_weight(exact, u),
        "row_entries": entries_for_each_row(wide, exact, u),
        "class_entries": entries_for_each_class(wide, exact, u),
        "filter": float(kept.double().mean()),
        "filter_input": relative_error(filtered_input, exact.of_input),
        "filter_weight": relative_error(filtered_weight, exact.of_weight),
        "dense_input": relative_error(of_input, exact.of_input),
        "dense_weight": relative_error(of_weight, exact.of_weight),
        "dense_class": float(by_class.nanmedian()),
    }


# --- time -------------------------------------------------------------------------------------------------------------


class Products:
    """The three products of loss and gradients, whole and for the classes with the largest residuals.

    The matrices are in one dtype, and so are the results. The logits are always whole; they do not overwrite the
    residuals, which stay the same in all rounds.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows, self.residual = rows, gradients(rows).residual
        self.logits = torch.empty_like(self.residual)
        self.of_input, self.of_weight = torch.empty_like(rows.input), torch.empty_like(rows.weight)
        self.largest = self.residual.amax(0)

    def whole(self) -> None:
        """Compute ``e Wᵀ``, ``g W`` and ``gᵀ e``."""
        self._multiply_logits()
        torch.mm(self.residual, self.rows.weight, out=self.of_input)
        torch.mm(self.residual.T, self.rows.input, out=self.of_weight)

    def part(self, share: float, *, of_input: bool, of_weight: bool) -> None:
        """Select a share of the classes by the largest residual of each, and compute some products for them alone."""
        self._multiply_logits()
        count = max(1, round(share * len(self.largest)))
        chosen = self.residual.amax(0).topk(count).indices.sort().values
        residual = self.residual.index_select(1, chosen)
        if of_input:
            torch.mm(residual, self.rows.weight.index_select(0, chosen), out=self.of_input)
        else:
            torch.mm(self.residual, self.rows.weight, out=self.of_input)
        if of_weight:
            self.of_weight.zero_().index_copy_(0, chosen, residual.T @ self.rows.input)
        else:
            torch.mm(self.residual.T, self.rows.input, out=self.of_weight)

    def _multiply_logits(self) -> None:
        torch.mm(self.rows.input, self.rows.weight.T, out=self.logits)


WAYS = {"both": (True, True), "input": (True, False), "weight": (False, True)}


@torch.no_grad()
def time_records(rows: Rows, shares: Sequence[float], repeats: int) -> Iterator[Record]:
    """Yield the time for each share of the classes relative to the whole products, the median of the rounds' ratios."""
    products, whole = Products(rows), "whole"
    runs: dict[str, Callable[[], None]] = {whole: products.whole}
    for share in shares:
        for way, (of_input, of_weight) in WAYS.items():
            runs[f"{way} {share}"] = partial(products.part, share, of_input=of_input, of_weight=of_weight)
    seconds = interleaved(runs, repeats)
    for share in shares:
        yield {"share": share} | {way: median_ratio(seconds[f"{way} {share}"], seconds[whole]) for way in WAYS}


# --- the tables -------------------------------------------------------------------------------------------------------

REQUIRED = ("each_row", "input", "bound", "weight", "row_entries", "class_entries")
ERRORS = ("filter_input", "filter_weight", "dense_input", "dense_weight", "dense_class")


def print_shares(paths: Sequence[Path], count: int) -> None:
    """Print the shares that must stay and the errors, for each file, part and dtype."""
    print("\nshares of the classes (of the residuals) that must stay, and relative errors\n")
    print_head("head", "rows", "dtype", "nats", *REQUIRED, "filter", *ERRORS)
    for path in paths:
        for part in PARTS:
            for dtype in DTYPES:
                record = share_record(Rows.read(path, part, count, dtype))
                name = str(dtype).removeprefix("torch.")
                shares = [f"{record[column]:.3f}" for column in (*REQUIRED, "filter")]
                errors = [f"{record[column]:.1e}" for column in ERRORS]
                print_row(path.stem, part, name, f"{record['nats']:.2f}", *shares, *errors)


def print_times(paths: Sequence[Path], count: int, repeats: int) -> None:
    """Print the time of the products of a share of the classes relative to that of three whole products."""
    print("\ntime of products with a share of the classes in one gradient or both, relative to three whole products\n")
    print_head("head", "(rows, width, classes)", "dtype", "share", *WAYS)
    for path in paths:
        for dtype in DTYPES:
            rows, name = Rows.read(path, PARTS[0], count, dtype), str(dtype).removeprefix("torch.")
            shape = f"({len(rows.input)}, {rows.weight.shape[1]}, {rows.weight.shape[0]})"
            for record in time_records(rows, SHARES, repeats):
                print_row(path.stem, shape, name, f"{record['share']:.2f}", *(f"{record[way]:.2f}" for way in WAYS))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables of the files that are named."""
    parser = argparse.ArgumentParser(description="Measure what leaving classes out of a head's gradients would save.")
    parser.add_argument("files", nargs="+", type=Path, help="heads that python -m bench.trained_heads has written")
    parser.add_argument("--rows", type=int, default=1024, help="rows of a tile (1024)")
    parser.add_argument("--repeats", type=int, default=7, help="rounds of the times; 0 leaves them out (7)")
    parser.add_argument("--times-only", action="store_true", help="print no shares")
    chosen = parser.parse_args(arguments)
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    if not chosen.times_only:
        print_shares(chosen.files, chosen.rows)
    if chosen.repeats:
        print_times(chosen.files, chosen.rows, chosen.repeats)


if __name__ == "__main__":
    main()
