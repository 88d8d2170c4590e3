"""A small mutation test: each entry changes one formula of a copy of ``src/``, and the named tests must then fail.

Run ``python tests/mutants.py`` for all of the mutants, or name some of them. The same tests must pass on the unchanged
sources, which is checked once for each selection. The program ends with code 1 if the text of a mutant does not occur
exactly once in its file, if a selection runs no tests or fails without a mutant, or if a mutant survives.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "softcurve"
INTERPRETED = {"TRITON_INTERPRET": "1"}


@dataclass(frozen=True)
class Mutant:
    """One change of a formula in ``file``, and the arguments of pytest that must notice it."""

    name: str
    change: str
    file: str
    old: str
    new: str
    tests: str
    interpreted: bool = False

    def source(self) -> str:
        """Return the changed text of the file. Raises ``ValueError`` unless ``old`` occurs exactly once in it."""
        file = SOURCE / self.file
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        if (count := text.count(self.old)) != 1:
            raise ValueError(
                f"{self.name}: the text must occur once in {self.file}, but occurs {count} times: {self.old!r}; aim it "
                f"at the formula that its description says: {self.change}"
            )
        return text.replace(self.old, self.new)


MUTANTS = [
    # --- losses on logits
    Mutant("reverse-curve", "the curve of the reverse KL is p r instead of p (r + 1)", "losses/divergences.py",
           "_times_finite(pair.p, pair.log_ratio + 1)", "_times_finite(pair.p, pair.log_ratio)",
           "test_conformance.py -k 'everything_at_once and logits-reverse'"),
    Mutant("js-cross", "the cross term of JS loses its factor 1 - beta", "losses/divergences.py",
           "return -self.beta * (1 - self.beta) * harmonic", "return -self.beta * harmonic",
           "test_conformance.py -k 'everything_at_once and logits-js'"),
    Mutant("excess-series", "e^t - 1 - t is a difference also for small t", "losses/divergences.py",
           "near = t.abs() < 0.5\n    series", "near = t.abs() < 0.0\n    series", "test_exactness.py -k nearly_equal_logits"),
    Mutant("rest-cancels", "the sum without the largest class is total - 1", "losses/softmax.py",
           "    rest = torch.where(total < 2, torch.frac(exponentials).sum(-1, keepdim=True), total - 1)\n", "    rest = total - 1\n",
           "test_exactness.py -k 'test_confident_row and logits-Logits'"),
    Mutant("pair-constant", "the log-ratio keeps the rounding of two log-sum-exps", "losses/softmax.py",
           "constant = torch.log1p(near.sum(-1, keepdim=True)).detach()", "constant = torch.zeros_like(near.sum(-1, keepdim=True))",
           "test_exactness.py -k nearly_equal_logits"),
    Mutant("dense-surplus", "a confident class does not take up what the residual misses of 0", "losses/softmax.py",
           "surplus = torch.where(rows.rest < 1, residual.sum(-1, keepdim=True), 0.0)", "surplus = torch.zeros_like(rows.rest)",
           "test_exactness.py -k 'test_confident_row and logits-Logits'"),
    Mutant("hessian-score", "the Hessian product of a divergence loses p u S", "losses/softmax.py",
           "return change - pair.p * change.sum(-1, keepdim=True) - pair.p * u_p * total",
           "return change - pair.p * change.sum(-1, keepdim=True)", "test_conformance.py -k 'everything_at_once and logits-reverse'"),
    Mutant("cap-bend", "the second derivative of the soft cap has the other sign", "losses/spec.py",
           "return (-2 / self.softcap) * torch.tanh", "return (2 / self.softcap) * torch.tanh",
           "test_conformance.py -k 'everything_at_once and logits-cross_entropy'"),
    Mutant("z-loss-product", "the Hessian product of the z-loss loses p (p v)", "losses/rows.py",
           "(lse * softmax.centred(v, p) + mean)", "(lse * softmax.centred(v, p))",
           "test_conformance.py -k 'everything_at_once and logits-cross_entropy'"),
    Mutant("z-loss-offset", "the z-loss is on the log-sum-exp without what was taken off before the division by T",
           "losses/rows.py", "rows + self.z_loss * (softmax.softmax_rows(z).log_sum_exp + offset).square()",
           "rows + self.z_loss * softmax.softmax_rows(z).log_sum_exp.square()",
           "test_conformance.py -k 'equals_the_dense_loss and logits and cross_entropy-indices'"),
    Mutant("batchmean", "batchmean divides by the number of rows", "losses/reduction.py",
           "return leading[0] if len(leading) else 1", "return math.prod(leading)",
           "test_one_meaning.py -k batchmean"),
    Mutant("empty-mean", "a mean of nothing is 0", "losses/reduction.py", "torch.where(empty, math.nan,",
           "torch.where(empty, 0.0,", "test_conformance.py -k 'no_rows and logits-cross_entropy'"),
    Mutant("bucket-smoothing", "the bucket has the label smoothing of the listed classes too", "losses/topk.py",
           "total - listed.sum(-1, keepdim=True)",
           "total + 0 * listed.sum(-1, keepdim=True)", "test_conformance.py -k 'everything_at_once and logits-cross_entropy'"),
    Mutant("mask-smoothing", "a masked class has a share of label smoothing", "losses/targets.py",
           "unmasked = (z != -math.inf).to(dtype)", "unmasked = torch.ones_like(z).to(dtype)", "test_one_meaning.py -k share_of_smoothing"),
    Mutant("malformed-target", "a distribution of sample weight 0 is not cleared", "losses/targets.py",
           "rows = left_out & self.malformed(classes)", "rows = left_out & ~left_out",
           "test_one_meaning.py -k 'padding_rows and cross_entropy/renormalize'"),
    Mutant("smoothing-range", "the label smoothing may be up to 2", "losses/spec.py",
           '"label_smoothing", label_smoothing, 0.0, 1.0', '"label_smoothing", label_smoothing, 0.0, 2.0', "test_bad_input.py -k 'names_argument and label_smoothing'"),
    # --- the head's tiles
    Mutant("list-shift", "sums of earlier class blocks are not lowered to the new shift", "head/aten/sparse.py",
           "total=self.total * kept,", "total=self.total,",
           "test_conformance.py -k temperature_without"),
    Mutant("list-smoothing", "the listed classes keep their share of label smoothing in the residual", "head/sparse.py",
           "listed = listed - weight.unsqueeze(-1) * self._share_factor() * self._unless_excluded(self.share)", "listed = listed - 0.0 * self.share",
           "test_conformance.py -k 'everything_at_once and head-cross_entropy'"),
    Mutant("list-softmax", "the exponentials of torch's softmax are taken for those of z - max", "head/aten/sparse.py",
           "lowest = top.double() - shift.double().log()", "lowest = top.double()",
           "test_fast_forms.py -k test_head_with_few_logits"),
    Mutant("block-lower-top", "the lower of two blocks' largest classes is forgotten", "head/dense.py",
           "self.rest * before + torch.where(higher, before, now)", "self.rest * before", "test_conformance.py -k temperature_without"),
    Mutant("block-top", "the residual of a class above one half is s - p S, which cancels", "head/aten/dense_terms.py",
           "        gradient[row, column] = at_top[row, 0]\n", "        pass\n", "test_exactness.py -k 'test_confident_row and head'"),
    Mutant("block-surplus", "the rounding of both log-sum-exps stays in a divergence", "head/dense.py",
           "surplus.square() / 2)", "surplus.square() * 0)", "test_exactness.py -k nearly_equal_vocabulary"),
    Mutant("fast-balance", "a confident class does not take up what its row misses of 0", "head/fast_rows.py",
           "                _balance(z, e, confident)\n", "                pass\n", "test_exactness.py -k 'test_confident_row and head'"),
    Mutant("fast-near", "nearly equal rows stay with the fast formulas", "head/fast_rows.py",
           "LEAST_VALUE = 2e-2", "LEAST_VALUE = 0.0", "test_exactness.py -k small_divergences"),
    Mutant("fast-js", "the model's side of JS has the weight beta", "losses/fast_forms.py",
           "return -(beta * (to_target - constant) + (1 - beta) * to_model)",
           "return -(beta * (to_target - constant) + beta * to_model)",
           "test_exactness.py -k small_divergences"),
    Mutant("fast-others", "a confident row keeps the rounding of its differences of logits", "losses/fast_forms.py",
           "LEAST_OTHERS = 1e-9", "LEAST_OTHERS = 0.0", "test_fast_forms.py -k certain_rows"),
    Mutant("fast-least", "small divergences on logits stay with the fast formulas", "losses/fast_forms.py",
           "LEAST_LOSS = 0.1\n", "LEAST_LOSS = 0.0\n", "test_fast_forms.py -k 'every_kind or only_unsure'"),
    Mutant("fast-gradient", "gradients of nearly equal rows stay with the fast formulas", "losses/fast_forms.py",
           "\nLEAST = 0.1\n", "\nLEAST = 0.0\n", "test_fast_forms.py -k 'every_kind or only_unsure'"),
    Mutant("fast-surplus", "a confident class does not take up what its row misses of 0 in few passes",
           "losses/fast_forms.py", "    if confident.any():\n", "    if False:\n",
           "test_fast_forms.py -k test_confident_class"),
    Mutant("dim-exclude", "excluded classes are not moved with dim", "losses/targets.py",
           'or name == "exclude")', 'or name == "")', "test_dim.py -k moving"),
    Mutant("weight-tangent", "forward mode forgets the sample weights", "head/autograd.py",
           "total = total + (moves.row_weight * _finite_where_left_out(rows, tensors.row_weight)).sum()", "pass",
           "test_transforms.py -k 'gradcheck and head-cross_entropy-indices'"),
    Mutant("handed-over", "saved gradients are handed over where the graph is kept and hands them over again", "head/autograd.py",
           "return not torch._C._autograd._get_current_graph_task_keep_graph()", "return True", "test_head_transforms.py -k write"),
    # --- curvature, sharded heads, fits
    Mutant("curvature-bucket", "Gauss-Newton of a list keeps no spread of the unlisted classes", "head/sparse.py",
           "spread = p if mass is None else mass.double().sum(-1, keepdim=True) * p", "spread = torch.zeros_like(p)",
           "test_curvature_head.py -k 'products_and_diagonal and gauss_newton'"),
    Mutant("curvature-apart", "the product at a confident class is that of v itself", "head/sparse.py",
           "centred = (top * self.rest - others) * self.inverse", "centred = top", "test_curvature_head.py -k products_and_diagonal"),
    Mutant("shard-first", "uneven shards begin where even ones would", "processes.py",
           "min(most * rank, count)", "min(count // size * rank, count)", "test_head_processes.py -k 'one_process and 3'"),
    Mutant("shard-group", "a group on several processes has the part of one of them", "head/grouped.py",
           "total.log_().add_(buffer[rows])", "total.zero_().add_(buffer[rows])", "test_head_processes.py -k 'groups and 2'"),
    Mutant("shard-group-change", "the change of a group is that of one process's classes", "head/grouped.py",
           "sum_over([changes], group)", "changes", "test_head_processes.py -k 'groups and 2'"),
    Mutant("soft-labels-sweep", "a cut block of soft labels is that of another sweep", "head/composite.py",
           "if number == 0 or self.data.cuts_classes:", "if number == 0:", "test_distillation.py -k soft_labels_are"),
    Mutant("shard-rest", "the sums of the processes are added without a common maximum", "head/dense.py",
           "rests.append(side.rest * scale + ", "rests.append(side.rest + ", "test_head_processes.py -k 'one_process and 3'"),
    Mutant("shard-shift", "the tile of a process keeps its own shift after the merge", "head/sparse.py",
           "torch.where(swept.shift == NO_MASS, 1.0, torch.exp(swept.shift - self.shift))", "torch.ones_like(self.shift)",
           "test_head_processes.py -k 'one_process and 3'"),
    Mutant("conjugate", "successive directions are not conjugate", "curvature/algorithms/conjugate_gradients.py",
           "rho / last)", "rho / last / 2)",
           "test_curvature_solve.py -k distinct_eigenvalues"),
    Mutant("blocks-stale", "blocks are never computed anew", "fit/solver/newton.py",
           "if more > cost or not alike:", "if False:", "test_fit_convergence.py -k class_blocks_are"),
    Mutant("blocks-in-vain", "blocks are kept whatever they take", "fit/solver/newton.py",
           "if most < MOST_PRODUCTS and curvature.products - before >= most:", "if False:",
           "test_fit_convergence.py -k class_blocks_are"),
    Mutant("blocks-diagonal", "blocks keep the diagonal of the point where they are computed",
           "fit/solver/preconditioner.py",
           "self.scale = _reciprocal(curvature.diagonal(None), curvature).sqrt_()", "self.scale = self.scale.clone()",
           "test_solver.py -k another_point"),
    Mutant("blocks-rest", "a block of few rows has the whole diagonal beside its rows", "fit/solver/preconditioner.py",
           "rest = (1.0 - features.square().sum(1))", "rest = torch.ones_like(features[:, 0])",
           "test_solver.py -k few_rows_have"),
    Mutant("penalty", "the gradient of a fit has half of its penalty", "fit/solver/objective.py",
           "weight_out.add_(weight, alpha=penalty)", "weight_out.add_(weight, alpha=0.5 * penalty)", "test_solver.py -k the_objective"),
    Mutant("digest", "the digest of a checkpoint leaves out its tensors", "files/tensors.py",
           "state.update(bytes_of(", "hashlib.sha256().update(bytes_of(", "test_fit_checkpoint.py -k flipped_bit"),
    Mutant("checksum", "the checksum of a block of lists leaves out its indices", "losses/topk_shards.py",
           "zlib.crc32(bytes_of(log_probs[rows]), zlib.crc32(bytes_of(indices[rows])))",
           "zlib.crc32(bytes_of(log_probs[rows]))", "test_topk_cache.py -k flipped_bit"),
    # --- Triton
    Mutant("triton-guess", "a guess far from the largest logit stays", "head/triton/sparse.py",
           "for redo in (False, True):", "for redo in (False,):", "interpreted_head.py -k guess", True),
    Mutant("triton-reverse", "the cross term of the reverse KL is that of the forward one", "head/triton/dense_terms.py",
           "        cross = -p\n", "        cross = -y\n", "interpreted_head.py -k 'equals_the_dense_loss and reverse-Logits'", True),
    Mutant("triton-bend", "the second derivative of the soft cap has the other sign on lists", "head/triton/sparse.py",
           "bent = math.bend_ratio(raw, softcap)", "bent = -math.bend_ratio(raw, softcap)",
           "interpreted_head.py -k 'equals_the_dense_loss and indices'", True),
    Mutant("triton-pieces", "the sum of an earlier piece of a row is not lowered to the new maximum", "head/triton/sparse.py",
           "        sums = kept * sums + apart\n", "        sums = sums + apart\n", "interpreted_head.py -k 'equals_the_dense_loss and indices'", True),
    Mutant("triton-slope", "a Hessian product of many columns forgets the cap's slope", "head/triton/columns.py",
           "product * slope + bent", "product + bent", "interpreted_head.py -k curvature_products", True),
]  # fmt: skip


def run_tests(tests: str, interpreted: bool, mutant: Mutant | None = None) -> int:
    """Return the exit code of pytest on a copy of the sources, changed by the mutant if there is one."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "src"
        shutil.copytree(ROOT / "src", copy, ignore=shutil.ignore_patterns("__pycache__"))
        if mutant is not None:
            (copy / "softcurve" / mutant.file).write_text(mutant.source(), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=no"]
        command += [f"tests/{word}" if word.endswith(".py") else word for word in shlex.split(tests)]
        environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        if interpreted:
            command += ["-W", "ignore::RuntimeWarning"]
            environment |= INTERPRETED
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False).returncode


@cache
def unchanged(tests: str, interpreted: bool) -> int:
    """Return the exit code of a selection of tests on the unchanged sources, which is 5 if it has no test."""
    return run_tests(tests, interpreted)


def outcome(mutant: Mutant) -> str:
    """Return ``killed``, or what is wrong with the mutant or its tests."""
    if code := unchanged(mutant.tests, mutant.interpreted):
        return f"UNCHANGED SOURCES END WITH {code}"
    code = run_tests(mutant.tests, mutant.interpreted, mutant)
    return {0: "SURVIVED", 1: "killed"}.get(code, f"PYTEST ENDED WITH {code}")


def main(names: list[str]) -> int:
    """Run the named mutants, by default all, and return 1 unless each is killed."""
    if unknown := set(names) - {mutant.name for mutant in MUTANTS}:
        raise SystemExit(f"there is no mutant {', '.join(sorted(unknown))}")
    for mutant in MUTANTS:
        try:
            mutant.source()
        except ValueError as error:
            raise SystemExit(str(error)) from None
    alive = 0
    for mutant in MUTANTS:
        if not names or mutant.name in names:
            result = outcome(mutant)
            alive += result != "killed"
            sys.stdout.write(f"{mutant.name:20} {result:10} {mutant.tests:60} {mutant.change}\n")
            sys.stdout.flush()
    return min(alive, 1)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
