"""
Residual and RMSNorm in one pass: the fused kernel beside the reference, eager and compiled, and beside a plain copy of
the bytes that it has to move.

    python -m benchmarks.residual_norm             all forms and sizes, on a GPU if there is one
    python -m benchmarks.residual_norm --quick     one size, on a CPU one form: under a minute on two cores
    python -m benchmarks.residual_norm --sizes form=plain,N=65536,D=768 form=channel,N=65536,D=768

One table, and benchmarks/results/residual_norm-<device>.json, written after every size. Arms take turns; the kernel's
tests run first (on a CPU those of the reference and of the loops), and an arm is timed only if its results and
gradients are those of the reference in float64. Forms: "plain" x + y, "scalar" and "channel" gains alpha and beta,
"weight" channel gains and a weight of the norm; on a CPU, whose loops serve these, "plain" and "mix", a scale for each
of x and y. "% of copy": the bytes that kernels/residual_norm counts, 4A forward and with the backward pass 10A
(plain: 8A), at the copy bandwidth measured in the same run; the arm "copy" copies as many bytes with one call.
"""

import sys
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.timing import Place, compile_arms, kernel_benchmark, measure_arms, sizes
from kernels.residual_norm import residual_norm, residual_norm_reference, scaled_sum_norm
from train_gpt import RMSNormalize

FILE = "tests/kernels/test_residual_norm.py"
CPU_TESTS = ("test_reference_is_the_definition", "test_gradcheck", "test_compiled_reference_equals_eager",
             "test_loops")
TESTS = {"cpu": [f"{FILE}::{name}" for name in CPU_TESTS], "cuda": [FILE]}
FORMS = ("plain", "scalar", "channel", "weight")
MIX = "mix"         # the baseline's mix of two streams with learned scales, then the norm: a CPU's loops
CPU_FORMS = ("plain", MIX)
GAINS = dict(mix=("scales",), plain=(), scalar=("alpha", "beta"), channel=("alpha", "beta"),
             weight=("alpha", "beta", "weight"))
GPU_SIZES = [(N, D) for D in (768, 1024, 2048) for N in (16_384, 65_536, 262_144)]
SIZES = {
    "cpu": sizes("form N D", *((form, 2048, 128) for form in CPU_FORMS),
                 *((form, N, 768) for form in CPU_FORMS for N in (4096, 16_384))),
    "cuda": sizes("form N D", *((form, *size) for form in FORMS for size in GPU_SIZES)),
}
QUICK = {"cpu": sizes("form N D", (MIX, 4096, 768)),
         "cuda": sizes("form N D", *((form, 65_536, 768) for form in FORMS))}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}  # relative RMS error of the results and of each gradient


def make_inputs(form: str, N: int, D: int, place: Place) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """([x, y and the form's gains, with gradients], [gradients of z and h])"""
    generator = torch.Generator(place.device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=place.device, generator=generator)

    shape = {"scalar": (), MIX: (2,)}.get(form, (D,))
    gains = [1 + 0.1 * draw(*shape) for _ in GAINS[form]]
    x, y = draw(N, D).to(place.dtype), draw(N, D).to(place.dtype)
    return [tensor.requires_grad_() for tensor in (x, y, *gains)], [draw(N, D).to(place.dtype) for _ in range(2)]


def trainer(x: torch.Tensor, y: torch.Tensor, scales: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The two steps of a Block."""
    z = x + y if scales is None else scales[0] * x + scales[1] * y
    return z, RMSNormalize.apply(z)


def contenders(form: str, place: Place) -> dict:
    """{arm: function(x, y, *gains) -> (z, h)}"""
    def by_name(function: Callable) -> Callable:
        """With the form's gains as arguments of their names."""
        return lambda x, y, *gains: function(x, y, **dict(zip(GAINS[form], gains)))

    if form in CPU_FORMS and place.device.type == "cpu":
        arms = {"loops": partial(scaled_sum_norm, backend="loops"), "trainer": trainer,
                "reference": partial(scaled_sum_norm, backend="reference")}
        return arms | compile_arms(trainer=trainer)
    arms = {"triton": by_name(partial(residual_norm, backend="triton"))} if place.device.type == "cuda" else {}
    compiled = compile_arms(reference=residual_norm_reference)
    return arms | {name: by_name(function) for name, function in compiled.items()} | {
        "reference": by_name(residual_norm_reference)}


def measure(place: Place, form: str, N: int, D: int) -> list[dict]:
    """
    A row of results for every arm, forward and forward + backward. The sum of N D numbers of both signs counts as
    sqrt(N D) at least.
    """
    A = N * D * place.dtype.itemsize
    arms = contenders(form, place)
    work = dict(moved=4 * A), dict(moved=(8 if form == "plain" else 10) * A)
    return measure_arms(place, dict(form=form, N=N, D=D), arms, make_inputs(form, N, D, place), arms["reference"],
                        TOLERANCE[place.dtype], work, least=lambda y: (N * D) ** 0.5 if y.numel() == 1 else 0.0)


if __name__ == "__main__":
    sys.exit(kernel_benchmark("residual_norm", __doc__, measure, TESTS, SIZES, QUICK))
