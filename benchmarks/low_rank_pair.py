"""
A matrix of low rank times rows: the pair of products in one kernel, beside the two products, eager and compiled, and
beside the product with a dense matrix of the same sides, which the factors stand for.

    python -m benchmarks.low_rank_pair             all sizes, on a GPU if there is one
    python -m benchmarks.low_rank_pair --quick     one size: under a minute on two cores
    python -m benchmarks.low_rank_pair --sizes N=65536,n_in=768,k=128,n_out=768,sigma=1

One table, and benchmarks/results/low_rank_pair-<device>.json, written after every size. Arms take turns; the kernel's
tests run first (on a CPU those of the reference), and an arm is timed only if its result and gradients are those of the
reference in float64. sigma: 1 with a factor for each of the k numbers between, 0 without. "dense" computes another
thing; a CPU has no arm "triton". "% of product rate": the two products' FLOPs, 2 N k (n_in + n_out) forward and with
the backward pass three times as many, at the rate that a large product reaches in the same run. "% of copy": the bytes
that kernels/low_rank_pair.py counts for the pair, rows alone, at the copy bandwidth measured in the same run; the arm
"copy" copies as many bytes with one call.
"""

import sys
from functools import partial

import torch

from benchmarks.timing import Place, both_passes, compile_arms, kernel_benchmark, measure_arms, sizes
from kernels.low_rank_pair import low_rank_pair, low_rank_pair_reference

FILE = "tests/kernels/test_low_rank_pair.py"
CPU_TESTS = ("test_reference_is_the_definition", "test_gradcheck", "test_compiled_reference_equals_eager")
TESTS = {"cpu": [f"{FILE}::{name}" for name in CPU_TESTS], "cuda": [FILE]}
NAMES = "N n_in k n_out sigma"
SIZES = {
    "cpu": sizes(NAMES, (2048, 128, 32, 128, 1), (2048, 128, 32, 512, 0), (8192, 128, 32, 512, 1)),
    "cuda": sizes(NAMES, *((65_536, *shape) for shape in (
        (768, 64, 768, 0), (768, 128, 768, 0), (768, 128, 768, 1), (768, 192, 3072, 0), (3072, 192, 768, 0),
        (768, 256, 3072, 1), (1024, 256, 4096, 0)))),
}
QUICK = {"cpu": sizes(NAMES, (512, 128, 32, 512, 1)), "cuda": sizes(NAMES, (65_536, 768, 128, 3072, 1))}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}  # relative RMS error of the result and of each gradient
DENSE = "dense"


def make_inputs(place: Place, N: int, n_in: int, k: int, n_out: int, sigma: int) -> tuple[list, list]:
    """([x (N, n_in), down (k, n_in), up (n_out, k), sigma (k,) or None, with gradients], [the gradient of y])"""
    generator = torch.Generator(place.device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=place.device, generator=generator)

    tensors = [draw(N, n_in), draw(k, n_in) / n_in ** 0.5, draw(n_out, k) / k ** 0.5]
    if sigma:
        tensors.append(draw(k))
    return [x.to(place.dtype).requires_grad_() for x in tensors], [draw(N, n_out).to(place.dtype)]


def multiply_dense(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return x @ matrix.T


def contenders(place: Place) -> dict:
    """{arm: function(x, down, up, sigma) -> y}"""
    arms = compile_arms(reference=low_rank_pair_reference) | {"reference": low_rank_pair_reference}
    if place.device.type == "cuda":
        arms = {"triton": partial(low_rank_pair, backend="triton")} | arms
    return arms


def measure(place: Place, N: int, n_in: int, k: int, n_out: int, sigma: int) -> list[dict]:
    """A row of results for every arm, forward and forward + backward."""
    # the dense peer
    tensors, gradients = make_inputs(place, N, n_in, k, n_out, sigma)
    matrix = (tensors[2] @ tensors[1]).detach().requires_grad_()
    dense = (torch.no_grad()(lambda: multiply_dense(tensors[0], matrix)),
             lambda: both_passes(multiply_dense, [tensors[0], matrix], gradients))

    # the work of the pair: nothing kept forward; both passes keep h, write e and read both for the weights' gradients
    flops = 2 * N * k * (n_in + n_out)
    row = N * place.dtype.itemsize
    both = 3 * (n_in + n_out) + 4 * k
    work = dict(flops=flops, moved=row * (n_in + n_out)), dict(flops=3 * flops, moved=row * both)
    case = dict(N=N, n_in=n_in, k=k, n_out=n_out, sigma=sigma)
    return measure_arms(place, case, contenders(place), (tensors, gradients), low_rank_pair_reference,
                        TOLERANCE[place.dtype], work, unchecked={DENSE: dense}, against=DENSE)


if __name__ == "__main__":
    sys.exit(kernel_benchmark("low_rank_pair", __doc__, measure, TESTS, SIZES, QUICK, others=(DENSE,)))
