"""
Products with a random matrix of signs that is never stored: the loops or the Triton kernels beside the tables of plain
PyTorch, and beside a stored matrix where it fits.

    python -m benchmarks.sign_projection             all sizes, on a GPU if there is one
    python -m benchmarks.sign_projection --quick     one size: under a minute on two cores
    python -m benchmarks.sign_projection --sizes D=7000000,dim=512

One table, and benchmarks/results/sign_projection-<device>.json, written after every size. Arms take turns; the
operation's tests run first, and an arm is timed only if both of its products are those of the reference in float64.
"forward" is S phi of dim numbers, D results; "forward + backward" is that and S' g, its gradient. D is the number of
weights of the blocks, 580,608 of track cpu. "stored" multiplies a matrix of signs that is there in the inputs' dtype, D
dim numbers, and stands only at sizes where these take less than MOST_BYTES.
"""

import sys
from functools import partial

import torch

from benchmarks.timing import Place, both_passes, kernel_benchmark, measure_arms, sizes
from kernels.sign_projection import sign_bytes, sign_projection, signs_of_bytes

TESTS = dict.fromkeys(("cpu", "cuda"), ["tests/kernels/test_sign_projection.py"])
SIZES = {
    "cpu": sizes("D dim", (580_608, 72), (580_608, 512), (7_000_000, 72), (7_000_000, 512)),
    "cuda": sizes("D dim", (580_608, 512), (7_000_000, 512), (84_934_656, 512), (84_934_656, 2048)),
}
QUICK = {device: sizes[:1] for device, sizes in SIZES.items()}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}  # relative RMS error of either product
STORED = "stored"
MOST_BYTES = 2 ** 30
SEED = 1


def multiply_stored(matrix: torch.Tensor, phi: torch.Tensor) -> torch.Tensor:
    return matrix @ phi


def stored_matrix(D: int, dim: int, place: Place) -> torch.Tensor:
    """S (D, dim) in the place's dtype."""
    signs = signs_of_bytes(torch.zeros((), dtype=place.dtype, device=place.device))
    return signs[sign_bytes(0, D, dim, SEED, place.device) % 256].flatten(1)[:, :dim].contiguous()


def measure(place: Place, D: int, dim: int) -> list[dict]:
    """A row of results for every arm, forward and forward + backward."""
    # the inputs
    generator = torch.Generator(place.device).manual_seed(0)
    phi, g = (torch.randn(size, device=place.device, generator=generator).to(place.dtype) for size in (dim, D))
    tensors = [phi.requires_grad_()]

    # the arms
    kernel = "triton" if place.device.type == "cuda" else "loops"
    arms = {backend: partial(sign_projection, rows=D, seed=SEED, backend=backend) for backend in (kernel, "reference")}
    stored = {}
    if D * dim * place.dtype.itemsize < MOST_BYTES:
        product = partial(multiply_stored, stored_matrix(D, dim, place))
        stored[STORED] = torch.no_grad()(lambda: product(phi)), lambda: both_passes(product, tensors, [g])

    flops = 2 * D * dim
    return measure_arms(place, dict(D=D, dim=dim), arms, (tensors, [g]), arms["reference"], TOLERANCE[place.dtype],
                        (dict(flops=flops), dict(flops=2 * flops)), unchecked=stored, against="reference")


if __name__ == "__main__":
    sys.exit(kernel_benchmark("sign_projection", __doc__, measure, TESTS, SIZES, QUICK, others=(STORED,)))
