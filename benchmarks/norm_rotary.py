"""
RMS normalisation of heads and rotary positions in one pass: the fused kernel beside the trainer's two steps, beside the
reference, and beside a plain copy of the bytes that it has to move.

    python -m benchmarks.norm_rotary             all sizes, on a GPU if there is one
    python -m benchmarks.norm_rotary --quick     one size: under a minute on two cores
    python -m benchmarks.norm_rotary --sizes T=65536,D=64 T=65536,D=128

One table, and benchmarks/results/norm_rotary-<device>.json, written after every size. Arms take turns; the kernel's
tests run first (on a CPU those of the reference and of the loops), and an arm is timed only if its result and gradient
are those of the reference in float64. 6 heads (4 of track cpu), a row of all tokens, half of the pairs turn, tables in
float32, which "trainer", rotate(RMSNormalize(x)), rounds to x's dtype. "% of copy": the bytes that
kernels/norm_rotary counts, 2A forward and with the backward pass 5A, at the copy bandwidth measured in the same run;
the arm "copy" copies as many bytes with one call.
"""

import sys
from functools import partial

import torch

from benchmarks.timing import Place, compile_arms, kernel_benchmark, measure_arms, sizes
from kernels.norm_rotary import norm_rotary, norm_rotary_reference
from train_gpt import RMSNormalize, rotate

FILE = "tests/kernels/test_norm_rotary.py"
CPU_TESTS = ("test_reference_is_the_definition", "test_equals_the_trainer", "test_gradcheck", "test_loops")
TESTS = {"cpu": [f"{FILE}::{name}" for name in CPU_TESTS], "cuda": [FILE]}
SIZES = {
    "cpu": sizes("T H D", (2048, 4, 32), (2048, 6, 64), (16_384, 6, 64), (2048, 6, 128), (16_384, 6, 128)),
    "cuda": sizes("T H D", *((T, 6, D) for D in (64, 128) for T in (16_384, 65_536, 262_144))),
}
QUICK = {"cpu": sizes("T H D", (1024, 6, 128)), "cuda": sizes("T H D", (65_536, 6, 128))}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}  # relative RMS error of the result and of the gradient


def make_inputs(T: int, H: int, D: int, place: Place) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """([x (1, T, H, D) with a gradient, cosine and sine (T, D / 4) of the trainer's kind], [the gradient of y])"""
    generator = torch.Generator(place.device).manual_seed(0)
    x, g = (torch.randn(1, T, H, D, device=place.device, generator=generator).to(place.dtype) for _ in range(2))
    rates = (1 / 1024) ** torch.linspace(0, 1, D // 4, device=place.device)
    angles = torch.arange(T, device=place.device)[:, None] * rates
    return [x.requires_grad_(), angles.cos(), angles.sin()], [g]


def trainer(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    return rotate(RMSNormalize.apply(x), (cosine, sine))


def contenders(place: Place) -> dict:
    """{arm: function(x, cosine, sine) -> y}"""
    kernel = "triton" if place.device.type == "cuda" else "loops"
    arms = {kernel: partial(norm_rotary, backend=kernel)}
    compiled = compile_arms(trainer=trainer, reference=norm_rotary_reference)
    return arms | compiled | {"trainer": trainer, "reference": norm_rotary_reference}


def measure(place: Place, T: int, H: int, D: int) -> list[dict]:
    """A row of results for every arm, forward and forward + backward."""
    A = T * H * D * place.dtype.itemsize
    return measure_arms(place, dict(T=T, H=H, D=D), contenders(place), make_inputs(T, H, D, place),
                        norm_rotary_reference, TOLERANCE[place.dtype], (dict(moved=2 * A), dict(moved=5 * A)))


if __name__ == "__main__":
    sys.exit(kernel_benchmark("norm_rotary", __doc__, measure, TESTS, SIZES, QUICK))
