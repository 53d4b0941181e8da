"""
Feed-forward with the squared ReLU: the fused kernels beside the reference, eager and compiled, and beside what the trainer runs.

    python benchmarks/relu_squared_feed_forward.py             all sizes, on a GPU if there is one
    python benchmarks/relu_squared_feed_forward.py --quick     one size, on a CPU nothing compiled: under a minute on two cores
    python benchmarks/relu_squared_feed_forward.py --sizes N=65536,D=768,H=3072 N=65536,D=1024,H=4096

One table, and benchmarks/results/relu_squared_feed_forward-<device>.json, written after every size. Arms take turns; the kernels' tests run first (on a CPU those
of the reference and of the loops), and an arm is timed only if its result and gradients are those of the reference in float64. "trainer, compiled" is the MLP of train_gpt.py, whose
squared ReLU is an autograd function. "% of product rate": the products' FLOPs, 4 N D H forward and with the backward pass three times as many, at the rate that a large
product reaches in the same run.
"""

import sys
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.timing import Place, kernel_benchmark, measure_arms
from kernels.relu_squared_feed_forward import relu_squared_feed_forward, relu_squared_feed_forward_reference
from train_gpt import ReLUSquared

import torch
import torch.nn.functional as F

FILE = "tests/kernels/test_relu_squared_feed_forward.py"
TESTS = {"cpu": [f"{FILE}::{name}" for name in ("test_reference_is_the_definition", "test_gradcheck", "test_loops")], "cuda": [FILE]}
sizes = lambda rows, shapes: [dict(N=N, D=D, H=H) for (D, H), N in product(shapes, rows)]
SIZES = {"cpu": sizes([2048, 8192], [(128, 512), (384, 1536)]), "cuda": sizes([16_384, 65_536, 262_144], [(384, 1536), (768, 3072), (1024, 4096)])}
QUICK = {"cpu": sizes([512], [(128, 512)]), "cuda": sizes([65_536], [(768, 3072)])}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}  # relative RMS error of the result and of each gradient


def make_inputs(N: int, D: int, H: int, place: Place) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """([x, fc, proj, with gradients], [gradient of y])"""
    generator = torch.Generator(place.device).manual_seed(0)
    draw = lambda *shape: torch.randn(shape, device=place.device, generator=generator)
    tensors = draw(N, D), draw(H, D) / D ** 0.5, draw(D, H) / H ** 0.5
    return [x.to(place.dtype).requires_grad_() for x in tensors], [draw(N, D).to(place.dtype)]


def trainer(x: torch.Tensor, fc: torch.Tensor, proj: torch.Tensor) -> torch.Tensor:
    return F.linear(ReLUSquared.apply(F.linear(x, fc)), proj)


def contenders(place: Place) -> dict:
    """{arm: function(x, fc, proj) -> y}"""
    torch.compiler.reset()  # what is compiled for other sizes counts towards the number after which nothing more is
    arms = {"triton": lambda *tensors: relu_squared_feed_forward(*tensors, backend="triton")} if place.device.type == "cuda" else {}
    if place.device.type == "cpu":
        arms = {"loops": lambda *tensors: relu_squared_feed_forward(*tensors, backend="loops"), "trainer": trainer}
    if place.device.type == "cuda" or not place.quick:
        arms |= {f"{name}, compiled": torch.compile(function, dynamic=False) for name, function in (("trainer", trainer), ("reference", relu_squared_feed_forward_reference))}
    return arms | {"reference": relu_squared_feed_forward_reference}


def measure(place: Place, N: int, D: int, H: int) -> list[dict]:
    """A row of results for every arm, forward and forward + backward."""
    flops, arms = 4 * N * D * H, contenders(place)
    return measure_arms(place, dict(N=N, D=D, H=H), arms, make_inputs(N, D, H, place), arms["reference"], TOLERANCE[place.dtype], (dict(flops=flops), dict(flops=3 * flops)))


if __name__ == "__main__":
    sys.exit(kernel_benchmark("relu_squared_feed_forward", __doc__, measure, TESTS, SIZES, QUICK))
