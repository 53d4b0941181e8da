"""
Splanifold: every backend beside the feature form, the reference, eager and compiled, and a ReLU^2 MLP of as many parameters.

    python benchmarks/splanifold.py             all shapes, on a GPU if there is one
    python benchmarks/splanifold.py --quick     a few shapes and nothing compiled on a CPU: two minutes on two cores
    python benchmarks/splanifold.py --sizes shape=dense shape=K4

One table, and benchmarks/results/splanifold-<device>.json, written after every shape. Arms take turns; the kernel's tests run first, and at every shape an arm
is timed only if its output and gradients are those of the float64 form. "feature" is the map as one would write it with PyTorch: six scalars times the
deviation, side by side, and one product. The MLP has the same inputs and outputs and no bias; one of as many parameters has as many FLOPs where S = 2 needs
six matrices. "% of product rate" and "% of copy": FLOPs of the matrices that a token meets (four where S = 2 and K >= 16, else six) and bytes of r, outputs,
controls and their gradients, each read or written once in a pass, at the ceilings measured in the same run.
"""

import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.timing import Place, kernel_benchmark, measure_arms
from kernels.backend import has_cpu_loops
from kernels.splanifold import SplanifoldControls, splanifold, splanifold_reference
from train_gpt import RunError

import torch

TESTS = {
    "cpu": ["tests/kernels/splanifold/test_splanifold.py", "tests/kernels/splanifold/test_cpu.py"],
    "cuda": ["tests/kernels/splanifold/test_splanifold.py", "tests/kernels/splanifold/test_triton.py"],
}
EPS = 1e-3


class Shape(NamedTuple):
    M: int
    G: int
    K: int
    N: int
    S: int = 2
    mix: str = "sum"


SHAPES = {
    "cpu": dict(dense=Shape(8192, 1, 256, 256), K32=Shape(8192, 8, 32, 32, mix="concat"), K2=Shape(8192, 128, 2, 2, mix="concat"),
                K3=Shape(8192, 64, 3, 4, mix="concat"), K4=Shape(8192, 64, 4, 4, mix="concat"),
                small=Shape(2048, 47, 2, 2, S=3, mix="concat"), dense16=Shape(2048, 16, 16, 16, S=5, mix="concat"), lowdim2=Shape(2048, 235, 2, 2, S=3, mix="concat"), K4sum=Shape(4096, 32, 4, 256), pieces=Shape(4096, 1, 256, 256, S=5)),
    "cuda": dict(dense=Shape(65_536, 1, 768, 768), K32=Shape(65_536, 24, 32, 32, mix="concat"), K2=Shape(65_536, 384, 2, 2, mix="concat"),
                 K3=Shape(65_536, 256, 3, 3, mix="concat"), K4=Shape(65_536, 192, 4, 4, mix="concat"), K4sum=Shape(65_536, 64, 4, 768),
                 K2sum=Shape(65_536, 64, 2, 768), pieces=Shape(65_536, 1, 768, 768, S=5)),
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
    draw = lambda *size, scale=1.0: (scale * torch.randn(*size, device=place.device, generator=generator)).to(place.dtype)
    inputs = [draw(M, G, K).sigmoid(), draw(G, S, N), *(draw(G, S, N, K, scale=K ** -0.5) for _ in range(3))]
    return [x.requires_grad_() for x in inputs], [draw(M, N if mix == "sum" else G * N)]


def feature_form(r: torch.Tensor, *controls: torch.Tensor, mix: str) -> torch.Tensor:
    """S = 2: [c_1 delta, ..., c_6 delta] times the matrices side by side, one product (for "concat" one a group), and the spine's. Scalars in float32."""
    points, bases, point_tangents, base_tangents = controls
    wide = r.float()
    t = wide.mean(-1, keepdim=True)
    delta, total = (wide - t).to(r.dtype), r.shape[-1] * t
    alpha = total / (total.square() + EPS ** 2)
    h00, h01, h10, h11 = (1 + 2 * t) * (1 - t).square(), t.square() * (3 - 2 * t), t * (1 - t).square(), t.square() * (t - 1)
    scalars = torch.cat([h00, h01, h10, h11, alpha * h10, alpha * h11], -1).to(r.dtype)
    features = (scalars[..., None] * delta[..., None, :]).flatten(-2)  # (M, G, 6 K)
    matrices = torch.cat([x[:, i] for x in (bases, base_tangents, point_tangents) for i in (0, 1)], -1)  # (G, N, 6 K)
    spine = torch.cat([points, point_tangents.mean(-1)], 1)  # (G, 4, N)
    if mix == "sum":
        return features.flatten(1) @ matrices.transpose(1, 2).flatten(0, 1) + scalars[..., :4].flatten(1) @ spine.flatten(0, 1)
    return (torch.einsum("mgk,gnk->mgn", features, matrices) + torch.einsum("mgc,gcn->mgn", scalars[..., :4], spine)).flatten(1)


def contenders(shape: Shape, place: Place, compiled: bool) -> dict:
    """{arm: function(r, *controls) -> out}"""
    backend = lambda name: lambda r, *controls: splanifold(r, SplanifoldControls(*controls), eps=EPS, mix=shape.mix, backend=name)
    reference = lambda r, *controls: splanifold_reference(r, SplanifoldControls(*controls), eps=EPS, mix=shape.mix)
    arms = {name: backend(name) for name in (["triton"] if place.device.type == "cuda" else []) + ["chunked"]}
    if place.device.type == "cpu" and has_cpu_loops() and shape.mix == "concat" and shape.K <= 16:
        arms["loops"] = backend("loops")
    if shape.S == 2:
        arms["feature"] = lambda *tensors: feature_form(*tensors, mix=shape.mix)
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
    first, second = (torch.randn(size, device=place.device).mul_(size[1] ** -0.5).to(place.dtype).requires_grad_() for size in ((hidden, width), (grad.shape[1], hidden)))
    forward = lambda: (x @ first.t()).relu().square() @ second.t()
    return torch.no_grad()(forward), lambda: torch.autograd.grad(forward(), [x, first, second], grad)


def work(shape: Shape, element: int, backward: bool) -> dict:
    """FLOPs and bytes of the forward pass, of both with backward."""
    M, G, K, N, S, mix = shape
    matrices = 4 if S == 2 and K >= 16 else 6
    inputs, outputs, controls = M * G * K, M * N * (1 if mix == "sum" else G), G * S * N * (3 * K + 1)
    flops, numbers = 2 * M * G * N * (matrices * K + 4), inputs + outputs + controls
    return dict(flops=3 * flops, moved=element * (numbers + 2 * inputs + outputs + 2 * controls)) if backward else dict(flops=flops, moved=element * numbers)


def measure(place: Place, shape: str) -> list[dict]:
    """A row of results for every arm, forward and forward + backward; arms are checked for at most 512 tokens."""
    if shape not in SHAPES[place.device.type]:
        raise RunError(f"unknown shape {shape!r}; there are {', '.join(SHAPES[place.device.type])}")
    return measure_shape(place, shape, SHAPES[place.device.type][shape])


def measure_shape(place: Place, name: str, shape: Shape) -> list[dict]:
    inputs, arms = make_inputs(shape, place), contenders(shape, place, place.device.type == "cuda" or not place.quick)
    return measure_arms(place, dict(shape=name) | shape._asdict(), arms, inputs, arms["chunked"], TOLERANCE[place.dtype], tuple(work(shape, place.dtype.itemsize, backward) for backward in (False, True)),
                        make_inputs(shape._replace(M=min(shape.M, 512)), place), {MLP: mlp_passes(inputs, place)}, against="feature")


if __name__ == "__main__":
    sys.exit(kernel_benchmark("splanifold", __doc__, measure, TESTS, SIZES, QUICK))
