"""
Splanifold: every backend beside the feature form, the reference, eager and compiled, and a ReLU^2 MLP of as many
parameters.

    python -m benchmarks.splanifold             all shapes, on a GPU if there is one
    python -m benchmarks.splanifold --quick     a few shapes and nothing compiled on a CPU: two minutes on two cores
    python -m benchmarks.splanifold --sizes shape=dense shape=K4

One table, and benchmarks/results/splanifold-<device>.json, written after every shape. Arms take turns; the kernel's
tests run first, and at every shape an arm is timed only if its output and gradients are those of the float64 form.
"feature" is the map as one would write it with PyTorch: six scalars times the deviation, side by side, and one product.
The MLP has the same inputs and outputs and no bias; one of as many parameters has as many FLOPs where S = 2 needs six
matrices. "% of product rate" and "% of copy": FLOPs of the matrices that a token meets (four where S = 2 and K >= 16,
else six) and bytes of r, outputs, controls and their gradients, each read or written once in a pass, at the ceilings
measured in the same run.
"""

import sys
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.timing import Place, kernel_benchmark, measure_arms
from kernels.backend import has_cpu_loops
from kernels.splanifold import SplanifoldControls, splanifold, splanifold_reference
from train_gpt import require

FOLDER = "tests/kernels/splanifold"
TESTS = {"cpu": [f"{FOLDER}/test_splanifold.py", f"{FOLDER}/test_cpu.py"],
         "cuda": [f"{FOLDER}/test_splanifold.py", f"{FOLDER}/test_triton.py"]}
EPS = 1e-3


class Shape(NamedTuple):
    """M tokens, G groups of K coordinates and N outputs, S nodes."""
    M: int
    G: int
    K: int
    N: int
    S: int = 2
    mix: str = "sum"


SHAPES = {
    "cpu": dict(
        dense=Shape(8192, 1, 256, 256), K32=Shape(8192, 8, 32, 32, mix="concat"),
        K2=Shape(8192, 128, 2, 2, mix="concat"), K3=Shape(8192, 64, 3, 4, mix="concat"),
        K4=Shape(8192, 64, 4, 4, mix="concat"), small=Shape(2048, 47, 2, 2, S=3, mix="concat"),
        dense16=Shape(2048, 16, 16, 16, S=5, mix="concat"), lowdim2=Shape(2048, 235, 2, 2, S=3, mix="concat"),
        K4sum=Shape(4096, 32, 4, 256), pieces=Shape(4096, 1, 256, 256, S=5)),
    "cuda": dict(
        dense=Shape(65_536, 1, 768, 768), K32=Shape(65_536, 24, 32, 32, mix="concat"),
        K2=Shape(65_536, 384, 2, 2, mix="concat"), K3=Shape(65_536, 256, 3, 3, mix="concat"),
        K4=Shape(65_536, 192, 4, 4, mix="concat"), K4sum=Shape(65_536, 64, 4, 768), K2sum=Shape(65_536, 64, 2, 768),
        pieces=Shape(65_536, 1, 768, 768, S=5)),
}
SIZES = {device: [dict(shape=name) for name in shapes] for device, shapes in SHAPES.items()}
QUICK = dict.fromkeys(SHAPES, [dict(shape=name) for name in ("dense", "K32", "K4")])
PRODUCTS = {"cpu": 1 << 27, "cuda": 1 << 33}  # no reference that forms more numbers, M G S N for each kind of matrix
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}  # relative RMS error of the output and of each gradient
MLP = "ReLU^2 MLP"


def make_inputs(shape: Shape, place: Place) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """([r, the four controls, with gradients], [the output's gradient])"""
    M, G, K, N, S, mix = shape
    generator = torch.Generator(place.device).manual_seed(0)

    def draw(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(*size, device=place.device, generator=generator)).to(place.dtype)

    inputs = [draw(M, G, K).sigmoid(), draw(G, S, N), *(draw(G, S, N, K, scale=K ** -0.5) for _ in range(3))]
    return [x.requires_grad_() for x in inputs], [draw(M, N if mix == "sum" else G * N)]


def feature_form(r: torch.Tensor, *controls: torch.Tensor, mix: str) -> torch.Tensor:
    """
    S = 2: [c_1 delta, ..., c_6 delta] times the matrices side by side, one product (for "concat" one a group), and the
    spine's. Scalars in float32.
    """
    # the six scalars of every token and group
    points, bases, point_tangents, base_tangents = controls
    wide = r.float()
    t = wide.mean(-1, keepdim=True)
    delta, total = (wide - t).to(r.dtype), r.shape[-1] * t
    alpha = total / (total.square() + EPS ** 2)
    h00, h01 = (1 + 2 * t) * (1 - t).square(), t.square() * (3 - 2 * t)
    h10, h11 = t * (1 - t).square(), t.square() * (t - 1)
    scalars = torch.cat([h00, h01, h10, h11, alpha * h10, alpha * h11], -1).to(r.dtype)

    # times the deviation: (M, G, 6 K) by (G, N, 6 K), and the spine (G, 4, N)
    features = (scalars[..., None] * delta[..., None, :]).flatten(-2)
    matrices = torch.cat([x[:, i] for x in (bases, base_tangents, point_tangents) for i in (0, 1)], -1)
    spine = torch.cat([points, point_tangents.mean(-1)], 1)
    if mix == "sum":
        deviation = features.flatten(1) @ matrices.transpose(1, 2).flatten(0, 1)
        return deviation + scalars[..., :4].flatten(1) @ spine.flatten(0, 1)
    deviation = torch.einsum("mgk,gnk->mgn", features, matrices)
    return (deviation + torch.einsum("mgc,gcn->mgn", scalars[..., :4], spine)).flatten(1)


def contenders(shape: Shape, place: Place, compiled: bool) -> dict:
    """{arm: function(r, *controls) -> out}"""
    def by_backend(name: str, r: torch.Tensor, *controls: torch.Tensor) -> torch.Tensor:
        return splanifold(r, SplanifoldControls(*controls), eps=EPS, mix=shape.mix, backend=name)

    def reference(r: torch.Tensor, *controls: torch.Tensor) -> torch.Tensor:
        return splanifold_reference(r, SplanifoldControls(*controls), eps=EPS, mix=shape.mix)

    backends = ("triton", "chunked") if place.device.type == "cuda" else ("chunked",)
    arms = {name: partial(by_backend, name) for name in backends}
    if place.device.type == "cpu" and has_cpu_loops() and shape.mix == "concat" and shape.K <= 16:
        arms["loops"] = partial(by_backend, "loops")
    if shape.S == 2:
        arms["feature"] = partial(feature_form, mix=shape.mix)
    if shape.M * shape.G * shape.S * shape.N <= PRODUCTS[place.device.type]:
        arms["reference"] = reference
        if compiled:
            arms["reference, compiled"] = torch.compile(reference, dynamic=False)
    return arms


def mlp_passes(inputs: tuple[list[torch.Tensor], list[torch.Tensor]], place: Place) -> tuple:
    """(forward, both passes) of an MLP with r's numbers as inputs and the controls' number of parameters."""
    (r, *controls), [grad] = inputs
    x, width = r.detach().flatten(1).requires_grad_(), r.shape[1] * r.shape[2]
    hidden = max(1, round(sum(c.numel() for c in controls) / (width + grad.shape[1])))

    def draw(rows: int, columns: int) -> torch.Tensor:
        matrix = torch.randn(rows, columns, device=place.device).mul_(columns ** -0.5)
        return matrix.to(place.dtype).requires_grad_()

    first, second = draw(hidden, width), draw(grad.shape[1], hidden)

    def forward() -> torch.Tensor:
        return (x @ first.t()).relu().square() @ second.t()
    return torch.no_grad()(forward), lambda: torch.autograd.grad(forward(), [x, first, second], grad)


def work_of(shape: Shape, element: int) -> tuple[dict, dict]:
    """FLOPs and bytes of the forward pass, and of both."""
    M, G, K, N, S, mix = shape
    matrices = 4 if S == 2 and K >= 16 else 6
    flops = 2 * M * G * N * (matrices * K + 4)
    inputs, controls = M * G * K, G * S * N * (3 * K + 1)
    outputs = M * N if mix == "sum" else M * N * G
    forward = inputs + outputs + controls
    backward = 2 * inputs + outputs + 2 * controls
    return (dict(flops=flops, moved=element * forward),
            dict(flops=3 * flops, moved=element * (forward + backward)))


def measure(place: Place, shape: str) -> list[dict]:
    """A row of results for every arm, forward and forward + backward; arms are checked for at most 512 tokens."""
    shapes = SHAPES[place.device.type]
    require(shape in shapes, f"unknown shape {shape!r}; there are {', '.join(shapes)}")
    return measure_shape(place, shape, shapes[shape])


def measure_shape(place: Place, name: str, shape: Shape) -> list[dict]:
    """measure() of a shape of any name."""
    inputs = make_inputs(shape, place)
    arms = contenders(shape, place, compiled=place.device.type == "cuda" or not place.quick)
    checked = make_inputs(shape._replace(M=min(shape.M, 512)), place)
    return measure_arms(place, dict(shape=name) | shape._asdict(), arms, inputs, arms["chunked"],
                        TOLERANCE[place.dtype], work_of(shape, place.dtype.itemsize), checked,
                        {MLP: mlp_passes(inputs, place)}, against="feature")


if __name__ == "__main__":
    sys.exit(kernel_benchmark("splanifold", __doc__, measure, TESTS, SIZES, QUICK))
