"""
RMS normalisation of heads and rotary positions in one pass: the fused kernel beside the trainer's two steps, beside the reference, and beside a plain copy of
the bytes that it has to move.

    python benchmarks/norm_rotary.py             all sizes, on a GPU if there is one
    python benchmarks/norm_rotary.py --quick     one size: under a minute on two cores
    python benchmarks/norm_rotary.py --sizes T=65536,D=64 T=65536,D=128

One table, and benchmarks/results/norm_rotary-<device>.json, written after every size. Arms take turns; the kernel's tests run first (on a CPU those of the
reference and of the loops), and an arm is timed only if its result and gradient are those of the reference in float64. 6 heads (4 of track cpu), a row of all tokens, half of the pairs turn,
tables in float32, which "trainer", rotate(RMSNormalize(x)), rounds to x's dtype. "% of copy": the bytes that
kernels/norm_rotary.py counts, 2A forward and with the backward pass 5A, at the copy bandwidth measured in the same run; the arm "copy" copies as many bytes
with one call.
"""

import sys
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.timing import Place, kernel_benchmark, measure_arms
from kernels.norm_rotary import norm_rotary, norm_rotary_reference
from train_gpt import RMSNormalize, rotate

import torch

FILE = "tests/kernels/test_norm_rotary.py"
TESTS = {"cpu": [f"{FILE}::{name}" for name in ("test_reference_is_the_definition", "test_equals_the_trainer", "test_gradcheck", "test_loops")], "cuda": [FILE]}
sizes = lambda tokens, widths, H=6: [dict(T=T, H=H, D=D) for D, T in product(widths, tokens)]
SIZES = {"cpu": sizes([2048], [32], 4) + sizes([2048, 16_384], [64, 128]), "cuda": sizes([16_384, 65_536, 262_144], [64, 128])}
QUICK = {"cpu": sizes([1024], [128]), "cuda": sizes([65_536], [128])}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}  # relative RMS error of the result and of the gradient


def make_inputs(T: int, H: int, D: int, place: Place) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """([x (1, T, H, D) with a gradient, cosine and sine (T, D / 4) of the trainer's kind], [the gradient of y])"""
    generator = torch.Generator(place.device).manual_seed(0)
    x, g = (torch.randn(1, T, H, D, device=place.device, generator=generator).to(place.dtype) for _ in range(2))
    angles = torch.arange(T, device=place.device)[:, None] * (1 / 1024) ** torch.linspace(0, 1, D // 4, device=place.device)
    return [x.requires_grad_(), angles.cos(), angles.sin()], [g]


def contenders(place: Place) -> dict:
    """{arm: function(x, cosine, sine) -> y}"""
    torch.compiler.reset()  # what is compiled for other sizes counts towards the number after which nothing more is
    arms = {"triton": lambda *tensors: norm_rotary(*tensors, backend="triton")} if place.device.type == "cuda" else {"loops": lambda *tensors: norm_rotary(*tensors, backend="loops")}
    trainer = lambda x, cosine, sine: rotate(RMSNormalize.apply(x), (cosine, sine))
    compiled = {f"{name}, compiled": torch.compile(function, dynamic=False) for name, function in (("trainer", trainer), ("reference", norm_rotary_reference))}
    return arms | compiled | {"trainer": trainer, "reference": norm_rotary_reference}


def measure(place: Place, T: int, H: int, D: int) -> list[dict]:
    """A row of results for every arm, forward and forward + backward."""
    A, arms = T * H * D * place.dtype.itemsize, contenders(place)
    return measure_arms(place, dict(T=T, H=H, D=D), arms, make_inputs(T, H, D, place), arms["reference"], TOLERANCE[place.dtype], (dict(moved=2 * A), dict(moved=5 * A)))


if __name__ == "__main__":
    sys.exit(kernel_benchmark("norm_rotary", __doc__, measure, TESTS, SIZES, QUICK))
