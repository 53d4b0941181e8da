"""
The elementwise parts of the optimizers: the CPU's loops beside the trainer's operations, eager and compiled, and beside
a plain copy of the bytes that they have to move.

    python -m benchmarks.optimizer_updates             all sizes; it measures a CPU, whatever else the machine has
    python -m benchmarks.optimizer_updates --quick     one size: under a minute on two cores
    python -m benchmarks.optimizer_updates --sizes N=12,rows=768,columns=3072

One table, and benchmarks/results/optimizer_updates-<device>.json, written after every size. Arms take turns; the loops'
tests run first, and an arm is timed only if its tensors are those of the reference in float64. Forms: "nesterov" and
"step", Muon's before and after its orthogonalisation, and "adam", of as many numbers. "% of copy": the bytes that
kernels/optimizer_updates counts, at the copy bandwidth measured in the same run; the arm "copy" copies as many
bytes.
"""

import os
import sys
from functools import partial

import torch

from benchmarks.timing import (
    Place,
    compile_arms,
    fault_of,
    fault_rows,
    faults_of,
    kernel_benchmark,
    rows_in_turn,
    sizes,
)
from kernels import optimizer_updates as updates

TESTS = dict.fromkeys(("cpu", "cuda"), ["tests/kernels/test_optimizer_updates.py"])
CPU = sizes("N rows columns", (16, 128, 128), (4, 512, 128), (4, 128, 512), (12, 768, 768))
SIZES = dict.fromkeys(("cpu", "cuda"), CPU)
QUICK = dict.fromkeys(("cpu", "cuda"), CPU[:1])
TOLERANCE = 1e-5  # relative RMS error of what is changed
MOVED = dict(nesterov=4, step=4, adam=7)  # times the bytes of a tensor
FORMS = dict(  # form: (function, its numbers); rates are so small that no number of steps changes what a step costs
    nesterov=("nesterov", (0.9,)),
    step=("normalised_step", (1e-6, 1e-7, 0.95)),
    adam=("adam_step", (1e-6, 1e-7, (0.8, 0.95), (0.9, 0.8))))


def make_inputs(N: int, rows: int, columns: int) -> dict:
    """{form: tensors}"""
    generator = torch.Generator().manual_seed(0)
    w, g, m, v = (torch.randn(N, rows, columns, generator=generator) for _ in range(4))
    second = v.square().mean(-1 if rows >= columns else -2, keepdim=True)
    adam = [x.flatten() for x in (w, g, m, v.square())]
    return dict(nesterov=[g, m], step=[w, g, second], adam=adam)


def update(name: str, numbers: tuple, *tensors: torch.Tensor):
    """A function of kernels/optimizer_updates on these tensors."""
    return getattr(updates, name)(*tensors, *numbers)


def changed(function, tensors: list) -> list:
    """What a call changes and returns, on copies."""
    copies = [x.clone() for x in tensors]
    result = function(*copies)
    return copies + ([] if result is None else [result])


@torch.no_grad()
def measure(place: Place, N: int, rows: int, columns: int) -> list[dict]:
    """A row of results for every form and arm."""
    results = []
    for form, tensors in make_inputs(N, rows, columns).items():
        # the arms
        name, numbers = FORMS[form]
        reference = partial(update, f"{name}_reference", numbers)
        arms = {"loops": partial(update, name, numbers), "trainer": reference}
        if not place.quick:
            arms |= compile_arms(trainer=reference)

        # those that are right, in turn
        case = dict(form=form, N=N, rows=rows, columns=columns)
        expected = changed(reference, [x.double() for x in tensors])
        faults = faults_of(arms, lambda function, tensors=tensors, expected=expected:
                           fault_of(lambda: changed(function, tensors), expected, TOLERANCE))
        calls = {arm: partial(function, *tensors) for arm, function in arms.items() if arm not in faults}
        results += fault_rows(case, faults)
        results += rows_in_turn(place, case, "step", calls, moved=4 * MOVED[form] * N * rows * columns)
    return results


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when PyTorch first looks for devices
    sys.exit(kernel_benchmark("optimizer_updates", __doc__, measure, TESTS, SIZES, QUICK,
                              names=("form", "N", "rows", "columns")))
