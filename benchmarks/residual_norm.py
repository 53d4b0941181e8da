"""
Residual and RMSNorm in one pass: the fused kernel beside the reference, eager and compiled, and beside a plain copy of the bytes that it has to move.

    python benchmarks/residual_norm.py             all forms and sizes, on a GPU if there is one
    python benchmarks/residual_norm.py --quick     one size, on a CPU one form: under a minute on two cores
    python benchmarks/residual_norm.py --sizes form=plain,N=65536,D=768 form=channel,N=65536,D=768

One table, and benchmarks/results/residual_norm-<device>.json, written after every size. Arms take turns; the kernel's tests run first (on a CPU those of the
reference and of the loops), and an arm is timed only if its results and gradients are those of the reference in float64. Forms: "plain" x + y, "scalar" and "channel" gains
alpha and beta, "weight" channel gains and a weight of the norm; on a CPU, whose loops serve these, "plain" and
"mix", a scale for each of x and y. "% of copy": the bytes that kernels/residual_norm.py counts, 4A forward and with the backward
pass 10A (plain: 8A), at the copy bandwidth measured in the same run; the arm "copy" copies as many bytes with one call.
"""

import sys
from functools import partial
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.timing import Place, kernel_benchmark, measure_arms
from kernels.residual_norm import residual_norm, residual_norm_reference, scaled_sum_norm
from train_gpt import RMSNormalize

import torch

FILE = "tests/kernels/test_residual_norm.py"
TESTS = {"cpu": [f"{FILE}::{name}" for name in ("test_reference_is_the_definition", "test_gradcheck", "test_compiled_reference_equals_eager", "test_loops")], "cuda": [FILE]}
FORMS = ("plain", "scalar", "channel", "weight")
MIX = "mix"         # the baseline's mix of two streams with learned scales, then the norm: a CPU's loops
CPU_FORMS = ("plain", MIX)
GAINS = dict(mix=("scales",), plain=(), scalar=("alpha", "beta"), channel=("alpha", "beta"), weight=("alpha", "beta", "weight"))
sizes = lambda forms, rows, widths: [dict(form=form, N=N, D=D) for form, D, N in product(forms, widths, rows)]
SIZES = {"cpu": sizes(CPU_FORMS, [2048], [128]) + sizes(CPU_FORMS, [4096, 16_384], [768]), "cuda": sizes(FORMS, [16_384, 65_536, 262_144], [768, 1024, 2048])}
QUICK = {"cpu": sizes([MIX], [4096], [768]), "cuda": sizes(FORMS, [65_536], [768])}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}  # relative RMS error of the results and of each gradient


def make_inputs(form: str, N: int, D: int, place: Place) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """([x, y and the form's gains, with gradients], [gradients of z and h])"""
    generator = torch.Generator(place.device).manual_seed(0)
    draw = lambda *shape: torch.randn(shape, device=place.device, generator=generator)
    gains = [1 + 0.1 * draw(*(() if form == "scalar" else (2,) if form == MIX else (D,))) for _ in GAINS[form]]
    return [x.requires_grad_() for x in (draw(N, D).to(place.dtype), draw(N, D).to(place.dtype), *gains)], [draw(N, D).to(place.dtype) for _ in range(2)]


def trainer(x: torch.Tensor, y: torch.Tensor, scales: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Block's own two steps."""
    z = x + y if scales is None else scales[0] * x + scales[1] * y
    return z, RMSNormalize.apply(z)


def contenders(form: str, place: Place) -> dict:
    """{arm: function(x, y, *gains) -> (z, h)}"""
    torch.compiler.reset()  # what is compiled for other sizes counts towards the number after which nothing more is
    by_name = lambda function, **options: lambda x, y, *gains: function(x, y, **dict(zip(GAINS[form], gains)), **options)
    arms = {"triton": by_name(residual_norm, backend="triton")} if place.device.type == "cuda" else {}
    if form in CPU_FORMS and place.device.type == "cpu":
        return dict(loops=partial(scaled_sum_norm, backend="loops"), trainer=trainer, reference=partial(scaled_sum_norm, backend="reference")) | {
            "trainer, compiled": torch.compile(trainer, dynamic=False)}
    return arms | {"reference, compiled": by_name(torch.compile(residual_norm_reference, dynamic=False)), "reference": by_name(residual_norm_reference)}


def measure(place: Place, form: str, N: int, D: int) -> list[dict]:
    """A row of results for every arm, forward and forward + backward. The sum of N D numbers of both signs counts as sqrt(N D) at least."""
    A, arms = N * D * place.dtype.itemsize, contenders(form, place)
    return measure_arms(place, dict(form=form, N=N, D=D), arms, make_inputs(form, N, D, place), arms["reference"], TOLERANCE[place.dtype],
                        (dict(moved=4 * A), dict(moved=(8 if form == "plain" else 10) * A)), least=lambda y: (N * D) ** 0.5 if y.numel() == 1 else 0.0)


if __name__ == "__main__":
    sys.exit(kernel_benchmark("residual_norm", __doc__, measure, TESTS, SIZES, QUICK))
