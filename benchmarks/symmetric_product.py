"""
Muon's symmetric products: half of the product by the kernel, beside torch.baddbmm (cuBLAS), which computes all of it;
and the orthogonalisation made of either.

    python -m benchmarks.symmetric_product             all shapes, on a GPU if there is one
    python -m benchmarks.symmetric_product --quick     one shape: under a minute on two cores
    python -m benchmarks.symmetric_product --sizes N=12,m=768,k=3072 N=8,m=384,k=384

One table, and benchmarks/results/symmetric_product-<device>.json, written after every shape N x m x k. Arms take turns;
the kernel's tests run first (on a CPU those of the reference), and an arm is timed only if its result is right: a
product within rounding of float64's, an orthogonalisation no farther from float64's than 1.5 times the trainer's own.
Forms: "gram" x x'; "polynomial" b gram + c gram gram'; "orthogonalize" the five steps of train_gpt.orthogonalize, ten
of their fifteen products symmetric; "orthogonalize, compiled" as the optimizer runs it. "baddbmm" is the reference and
the peer; a CPU has no other arm.

"% of product rate": FLOPs of the PLAIN products for a second, 2 N m^2 k each, over the rate of a large product measured
in the same run. The kernel computes little more than half of a product, so it can show up to 200 %, an
orthogonalisation of square matrices up to 150 %; what it runs at is a kernel's share times (T + 1) / (2 T), T = ceil(m
/ its tile).
"""

import sys
from functools import partial
from unittest.mock import patch

import torch

import train_gpt
from benchmarks.timing import Place, fault_of, fault_rows, faults_of, kernel_benchmark, rows_in_turn, sizes
from kernels.symmetric_product import symmetric_product
from train_gpt import POLAR_EXPRESS, orthogonalize

FILE = "tests/kernels/test_symmetric_product.py"
CPU_TESTS = ("test_reference_is_the_definition", "test_gradcheck", "test_compiled_reference_equals_eager")
TESTS = {"cpu": [f"{FILE}::{name}" for name in CPU_TESTS], "cuda": [FILE]}
SIZES = {
    "cpu": sizes("N m k", (2, 256, 256), (2, 256, 1024)),
    "cuda": sizes("N m k", (12, 768, 768), (12, 768, 3072), (16, 1024, 1024), (16, 1024, 4096), (8, 384, 384),
                  (8, 384, 1536)),
}
QUICK = {"cpu": sizes("N m k", (2, 96, 160)), "cuda": sizes("N m k", (12, 768, 3072))}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-3}  # relative RMS error of a product
PEER = "baddbmm"


def orthogonalize_symmetric(matrices: torch.Tensor, backend: str = "auto", function=orthogonalize) -> torch.Tensor:
    """train_gpt.orthogonalize, or `function` made of it, with its symmetric products made by symmetric_product."""
    with patch.object(train_gpt, "symmetric_product", partial(symmetric_product, backend=backend)):
        return function(matrices)


def forms(N: int, m: int, k: int) -> dict:
    """{form: (function(x, backend), FLOPs of its plain products)}; x (N, m, k)."""
    _, b, c = POLAR_EXPRESS[0]
    gram, polynomial = 2 * N * m * m * k, 2 * N * m ** 3
    torch.compiler.reset()  # what is compiled for other sizes counts towards the number after which nothing more is
    compiled = {backend: torch.compile(lambda x: orthogonalize(x), dynamic=False)
                for backend in ("triton", "reference")}

    def orthogonalize_compiled(x, backend):
        return orthogonalize_symmetric(x, backend, compiled[backend])

    return {"gram": (lambda x, backend: symmetric_product(x, backend=backend), gram),
            "polynomial": (lambda x, backend: symmetric_product(x, x, c, b, backend), polynomial),
            "orthogonalize": (orthogonalize_symmetric, 5 * (2 * gram + polynomial)),
            "orthogonalize, compiled": (orthogonalize_compiled, 5 * (2 * gram + polynomial))}


def expected_of(form: str, function, x: torch.Tensor) -> tuple[torch.Tensor, float]:
    """(the result in float64, the relative RMS error that an arm may have)"""
    if not form.startswith("orthogonalize"):
        return function(x.double(), "reference"), TOLERANCE[x.dtype]
    true = orthogonalize(x.double())
    return true, 1.5 * ((orthogonalize(x).double() - true).norm() / true.norm()).item()


@torch.no_grad()
def measure(place: Place, N: int, m: int, k: int) -> list[dict]:
    """A row of results for every form and arm."""
    generator = torch.Generator(place.device).manual_seed(0)
    x = torch.randn(N, m, k, device=place.device, generator=generator).to(place.dtype)
    unit = (x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02)).contiguous()
    backends = {PEER: "reference"}
    if place.device.type == "cuda":
        backends = {"triton": "triton"} | backends

    # every form, of the arms that are right
    rows = []
    for form, (function, flops) in forms(N, m, k).items():
        case, matrices = dict(form=form, N=N, m=m, k=k), unit
        if form == "polynomial":
            matrices = symmetric_product(unit, backend="reference")
        true, tolerance = expected_of(form, function, matrices)
        calls = {arm: partial(function, matrices, backend) for arm, backend in backends.items()}
        faults = faults_of(calls, lambda call, true=true, tolerance=tolerance:
                           fault_of(lambda: [call()], [true], tolerance))
        rows += fault_rows(case, faults)
        right = {arm: call for arm, call in calls.items() if arm not in faults}
        rows += rows_in_turn(place, case, "step", right, flops)
    return rows


if __name__ == "__main__":
    sys.exit(kernel_benchmark("symmetric_product", __doc__, measure, TESTS, SIZES, QUICK,
                              names=("form", "N", "m", "k")))
