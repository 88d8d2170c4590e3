"""Print every table: ``python -m bench [--rows N --classes C] [--repeats K]``."""

from __future__ import annotations

import argparse
import platform
from functools import partial

import torch

from bench import exactness, logits
from bench.measure import in_fresh_process, interleaved_medians


def main() -> None:
    """Speed and memory of the losses on dense logits, then exactness."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--classes", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, {threads} threads")
    print_speed_and_memory(options.rows, options.classes, options.repeats)
    print_exactness()


def print_speed_and_memory(rows: int, classes: int, repeats: int) -> None:
    """Loss and gradient (or Hessian product) of each case: seconds, their ratio, extra memory, error of the result."""
    print(f"\nforward and backward, ({rows}, {classes}) float32; extra memory includes the gradient\n")
    print("| loss | ours s | torch s | ratio | ours MB | torch MB | ours error | torch error |")
    print("|---|---|---|---|---|---|---|---|")
    for index, case in enumerate(logits.CASES):
        z, target = logits.inputs(rows, classes, case.soft)
        runs = {
            "ours": partial(logits.step, case.ours, z, target, case.order),
            "torchs": partial(logits.step, case.torchs, z, target, case.order),
        }
        seconds = interleaved_medians(runs, repeats)
        memory = {side: _extra_memory(index, side, rows, classes) for side in runs}
        errors = _errors(case, rows // 16, classes)
        print(
            f"| {case.name} | {seconds['ours']:.3f} | {seconds['torchs']:.3f} "
            f"| {seconds['ours'] / seconds['torchs']:.2f} | {memory['ours']:.0f} | {memory['torchs']:.0f} "
            f"| {errors['ours']:.1e} | {errors['torchs']:.1e} |",
            flush=True,
        )


def _extra_memory(index: int, side: str, rows: int, classes: int) -> float:
    code = (
        "from bench import logits, measure\n"
        f"case = logits.CASES[{index}]\n"
        "logits.step(case.ours, *logits.inputs(4, 50, case.soft), case.order)\n"
        "logits.step(case.torchs, *logits.inputs(4, 50, case.soft), case.order)\n"
        f"z, target = logits.inputs({rows}, {classes}, case.soft)\n"
        f"print(measure.extra_peak_of(lambda: logits.step(case.{side}, z, target, case.order)))\n"
    )
    return float(in_fresh_process(code))


def _errors(case: logits.Case, rows: int, classes: int) -> dict[str, float]:
    """‖g − g64‖ / ‖g64‖ of the gradient (or Hessian product), g64 being torch's in float64."""
    z, target = logits.inputs(rows, classes, case.soft)
    wide = z.detach().double().requires_grad_()
    truth = logits.step(case.torchs, wide, target.double() if case.soft else target, case.order)
    errors = {}
    for side, loss in (("ours", case.ours), ("torchs", case.torchs)):
        result = logits.step(loss, z, target, case.order).double()
        errors[side] = ((result - truth).norm() / truth.norm()).item()
    return errors


def print_exactness() -> None:
    """Relative errors where the textbook formula cancels."""
    print("\nfloat32 where the textbook formula cancels: relative errors\n")
    print("| what | truth | ours | torch | ours' error | torch's error |")
    print("|---|---|---|---|---|---|")
    for what, truth, ours, torchs in exactness.confident_rows() + exactness.nearly_equal():
        errors = (abs(ours / truth - 1), abs(torchs / truth - 1))
        print(f"| {what} | {truth:.7e} | {ours:.7e} | {torchs:.7e} | {errors[0]:.1e} | {errors[1]:.1e} |")


if __name__ == "__main__":
    main()
