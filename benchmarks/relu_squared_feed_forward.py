"""
Feed-forward with the squared ReLU: the fused kernels beside the reference, eager and compiled, and beside what the
trainer runs.

    python -m benchmarks.relu_squared_feed_forward             all sizes, on a GPU if there is one
    python -m benchmarks.relu_squared_feed_forward --quick     one size, on a CPU nothing compiled: under a minute
    python -m benchmarks.relu_squared_feed_forward --sizes N=65536,D=768,H=3072 N=65536,D=1024,H=4096

One table, and benchmarks/results/relu_squared_feed_forward-<device>.json, written after every size. Arms take turns;
the kernels' tests run first (on a CPU those of the reference and of the loops), and an arm is timed only if its result
and gradients are those of the reference in float64. "trainer, compiled" is the MLP of train_gpt.py, whose squared ReLU
is an autograd function. "% of product rate": the products' FLOPs, 4 N D H forward and with the backward pass three
times as many, at the rate that a large product reaches in the same run.
"""

import sys
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.timing import Place, compile_arms, kernel_benchmark, measure_arms, sizes
from kernels.relu_squared_feed_forward import relu_squared_feed_forward, relu_squared_feed_forward_reference
from train_gpt import ReLUSquared

FILE = "tests/kernels/test_relu_squared_feed_forward.py"
CPU_TESTS = ("test_reference_is_the_definition", "test_gradcheck", "test_loops")
TESTS = {"cpu": [f"{FILE}::{name}" for name in CPU_TESTS], "cuda": [FILE]}
WIDTHS = (384, 1536), (768, 3072), (1024, 4096)  # of a GPU: D, H
SIZES = {
    "cpu": sizes("N D H", (2048, 128, 512), (8192, 128, 512), (2048, 384, 1536), (8192, 384, 1536)),
    "cuda": sizes("N D H", *((N, *width) for width in WIDTHS for N in (16_384, 65_536, 262_144))),
}
QUICK = {"cpu": sizes("N D H", (512, 128, 512)), "cuda": sizes("N D H", (65_536, 768, 3072))}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}  # relative RMS error of the result and of each gradient


def make_inputs(N: int, D: int, H: int, place: Place) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """([x, fc, proj, with gradients], [gradient of y])"""
    generator = torch.Generator(place.device).manual_seed(0)

    def draw(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, device=place.device, generator=generator)

    tensors = draw(N, D), draw(H, D) / D ** 0.5, draw(D, H) / H ** 0.5
    return [x.to(place.dtype).requires_grad_() for x in tensors], [draw(N, D).to(place.dtype)]


def trainer(x: torch.Tensor, fc: torch.Tensor, proj: torch.Tensor) -> torch.Tensor:
    return F.linear(ReLUSquared.apply(F.linear(x, fc)), proj)


def contenders(place: Place) -> dict:
    """{arm: function(x, fc, proj) -> y}"""
    cuda = place.device.type == "cuda"
    kernel = "triton" if cuda else "loops"
    arms = {kernel: partial(relu_squared_feed_forward, backend=kernel)}
    if not cuda:
        arms["trainer"] = trainer
    if cuda or not place.quick:
        arms |= compile_arms(trainer=trainer, reference=relu_squared_feed_forward_reference)
    return arms | {"reference": relu_squared_feed_forward_reference}


def measure(place: Place, N: int, D: int, H: int) -> list[dict]:
    """A row of results for every arm, forward and forward + backward."""
    flops = 4 * N * D * H
    return measure_arms(place, dict(N=N, D=D, H=H), contenders(place), make_inputs(N, D, H, place),
                        relu_squared_feed_forward_reference, TOLERANCE[place.dtype],
                        (dict(flops=flops), dict(flops=3 * flops)))


if __name__ == "__main__":
    sys.exit(kernel_benchmark("relu_squared_feed_forward", __doc__, measure, TESTS, SIZES, QUICK))
