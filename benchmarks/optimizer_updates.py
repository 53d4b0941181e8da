"""
The elementwise parts of the optimizers: the CPU's loops beside the trainer's operations, eager and compiled, and beside
a plain copy of the bytes that they have to move.

    python benchmarks/optimizer_updates.py             all sizes; it measures a CPU, whatever else the machine has
    python benchmarks/optimizer_updates.py --quick     one size: under a minute on two cores
    python benchmarks/optimizer_updates.py --sizes N=12,rows=768,columns=3072

One table, and benchmarks/results/optimizer_updates-<device>.json, written after every size. Arms take turns; the loops'
tests run first, and an arm is timed only if its tensors are those of the reference in float64. Forms: "nesterov" and
"step", Muon's before and after its orthogonalisation, and "adam", of as many numbers. "% of copy": the bytes that
kernels/optimizer_updates.py counts, at the copy bandwidth measured in the same run; the arm "copy" copies as many
bytes.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.timing import Place, fault_of, kernel_benchmark, rows_in_turn
from kernels import optimizer_updates as updates

import torch

TESTS = dict.fromkeys(("cpu", "cuda"), ["tests/kernels/test_optimizer_updates.py"])
sizes = lambda *shapes: [dict(zip(("N", "rows", "columns"), shape)) for shape in shapes]
CPU = sizes((16, 128, 128), (4, 512, 128), (4, 128, 512), (12, 768, 768))
SIZES, QUICK = dict.fromkeys(("cpu", "cuda"), CPU), dict.fromkeys(("cpu", "cuda"), CPU[:1])
TOLERANCE = 1e-5  # relative RMS error of what is changed
A = dict(nesterov=4, step=4, adam=7)  # times the bytes of a tensor


def make_inputs(N: int, rows: int, columns: int) -> dict:
    """{form: tensors}"""
    generator = torch.Generator().manual_seed(0)
    w, g, m, v = (torch.randn(N, rows, columns, generator=generator) for _ in range(4))
    second = v.square().mean(-1 if rows >= columns else -2, keepdim=True)
    return dict(nesterov=[g, m], step=[w, g, second], adam=[w.flatten(), g.flatten(), m.flatten(), v.square().flatten()])


def functions(form: str) -> tuple:
    """(loops, reference) of tensors. Rates are so small that no number of steps changes what a step costs."""
    options = dict(nesterov=(0.9,), step=(1e-6, 1e-7, 0.95), adam=(1e-6, 1e-7, (0.8, 0.95), (0.9, 0.8)))[form]
    names = dict(nesterov="nesterov", step="normalised_step", adam="adam_step")[form]
    return tuple(lambda *tensors, function=getattr(updates, names + suffix): function(*tensors, *options) for suffix in ("", "_reference"))


def changed(function, tensors: list) -> list:
    """What a call changes and returns, on copies."""
    copies = [x.clone() for x in tensors]
    result = function(*copies)
    return copies + ([] if result is None else [result])


@torch.no_grad()
def measure(place: Place, N: int, rows: int, columns: int) -> list[dict]:
    """A row of results for every form and arm."""
    results = []
    torch.compiler.reset()  # what is compiled for other sizes counts towards the number after which nothing more is
    for form, tensors in make_inputs(N, rows, columns).items():
        loops, reference = functions(form)
        case, arms = dict(form=form, N=N, rows=rows, columns=columns), {"loops": loops, "trainer": reference}
        if not place.quick:
            arms["trainer, compiled"] = torch.compile(reference, dynamic=False)
        expected = changed(reference, [x.double() for x in tensors])
        faults = {arm: fault for arm, function in arms.items() if (fault := fault_of(lambda: changed(function, tensors), expected, TOLERANCE))}
        results += [case | dict(arm=arm, what="check", fault=fault) for arm, fault in faults.items()]
        calls = {arm: lambda function=function: function(*tensors) for arm, function in arms.items() if arm not in faults}
        results += rows_in_turn(place, case, "step", calls, moved=4 * A[form] * N * rows * columns)
    return results


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when PyTorch first looks for devices
    sys.exit(kernel_benchmark("optimizer_updates", __doc__, measure, TESTS, SIZES, QUICK, names=("form", "N", "rows", "columns")))
