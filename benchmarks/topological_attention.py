"""
Topological attention beside softmax attention: every backend, PyTorch's attention, FlexAttention and the score matrix
in eager PyTorch.

    python -m benchmarks.topological_attention             T from 256 to 65,536 on a CPU, to 1,048,576 on a GPU;
                                                           forward, and forward + backward
    python -m benchmarks.topological_attention --quick     a few sizes, two minutes on two cores
    python -m benchmarks.topological_attention --sizes T=4096,width=128,heads=6 T=16384

One table, and benchmarks/results/topological_attention-<device>.json. Arms take turns at every length, so that a ratio
is of neighbours in time; what does not fit into memory says so. Softmax attention gets queries and keys of the values'
width; topological attention gets its two coordinates, and a decay. "% of bound": the least time that its matrix
products (softmax) or, on a GPU, its bytes (loglinear) take at the ceilings measured in the same run.
The kernel's tests run first, and no figure is printed if one fails.
"""

import sys
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.timing import Place, kernel_benchmark, rows_in_turn, sizes
from kernels.topological_attention import BACKENDS, topological_attention

TESTS = dict.fromkeys(("cpu", "cuda"), ["tests/kernels/topological_attention/test_topological_attention.py"])
SIZES = {
    "cpu": sizes("T heads width", *((T, 1, 64) for T in (256, 1024, 4096, 16_384, 65_536))),
    "cuda": sizes("T heads width", *((T, 12, 64) for T in (256, 1024, 2048, 4096, 8192, 16_384, 65_536, 262_144,
                                                           1_048_576))),
}
QUICK = {
    "cpu": sizes("T heads width", *((T, 1, 64) for T in (256, 4096, 16_384))),
    "cuda": sizes("T heads width", *((T, 12, 64) for T in (2048, 16_384, 65_536))),
}
SOFTMAX = "softmax, PyTorch"
QUADRATIC = 1 << 13  # no score matrix in memory above this length


def make_inputs(T: int, heads: int, width: int, place: Place) -> dict[str, torch.Tensor]:
    """
    One row of T tokens: coordinates a, b of unit variance, a decay g of about 1 / 100 a token, values v, and softmax
    attention's queries and keys q, k, all with gradients; the output's gradient.
    """
    random = torch.Generator(device="cpu").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).to(place.device)

    tensors = dict(a=draw(1, T, heads), b=draw(1, T, heads), g=-0.01 * draw(1, T, heads).exp())
    tensors |= {name: draw(1, T, heads, width).to(place.dtype) for name in ("v", "q", "k", "gradient")}
    return {name: x.requires_grad_(name != "gradient") for name, x in tensors.items()}


def swap(x: torch.Tensor) -> torch.Tensor:
    """(B, T, H, D) as (B, H, T, D) and back."""
    return x.transpose(1, 2)


def arms_of(x: dict[str, torch.Tensor], T: int, device: torch.device) -> dict:
    """{arm: (function to the output (1, T, H, D), its inputs that have gradients)}."""
    def softmax():
        return swap(F.scaled_dot_product_attention(*map(swap, (x["q"], x["k"], x["v"])), is_causal=True))

    arms = {SOFTMAX: (softmax, "qkv")}
    if device.type == "cuda":
        arms |= flex_arms(x, T)
    for backend in [*BACKENDS, "auto"]:
        if backend == "reference" and T > QUADRATIC or backend == "tiled" and device.type == "cpu":
            continue  # tiled is loglinear there
        arms[f"topological, {backend}"] = (
            partial(topological_attention, x["a"], x["b"], x["v"], log_decay=x["g"], backend=backend), "abgv")
    arms["key only"] = (
        partial(topological_attention, None, None, x["v"], log_decay=x["g"], key_bias=x["b"]), "bgv")
    return arms


def flex_arms(x: dict[str, torch.Tensor], T: int) -> dict:
    """
    FlexAttention on the same scores, which it must still follow a product of queries and keys for, and on softmax
    attention.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    causal = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    total = x["g"].detach().double().cumsum(1).float()[0].T.contiguous()
    a, b = (x[name].detach()[0].T.contiguous() for name in "ab")

    def distance(score, _b, h, i, j):
        return total[h, i] - total[h, j] - (a[h, i] - b[h, j]).abs()

    def flex(**options):
        return swap(compiled(*map(swap, (x["q"], x["k"], x["v"])), block_mask=causal, **options))

    return {"softmax, FlexAttention": (flex, "qkv"),
            "distance in FlexAttention": (partial(flex, score_mod=distance), "v")}


def bound_ms(arm: str, T: int, heads: int, width: int, element: int, backward: bool, limits: dict) -> float | None:
    """
    The least time: 2 causal products of 2 T^2 / 2 x width FLOPs forward and 5 backward, or loglinear's traffic; None
    where none is stated.
    """
    if arm.startswith(("softmax", "distance")):
        return 1000 * (7 if backward else 2) * T * T * width * heads / limits["flops"]
    if arm == "topological, loglinear":
        levels = max(0, T // 64 - 1).bit_length()
        passes = 4 if backward else 1
        return 1000 * passes * 4 * element * (width + 1) * (levels + 1) * T * heads / limits["bytes"]
    return None


def measure(place: Place, T: int, heads: int, width: int) -> list[dict]:
    """A row of results for every arm at this length, forward and forward + backward."""
    x = make_inputs(T, heads, width, place)
    arms = arms_of(x, T, place.device)
    element = x["v"].element_size()

    def forward(arm: str):
        with torch.no_grad():
            return arms[arm][0]()

    def both(arm: str):
        function, names = arms[arm]
        return torch.autograd.grad(function(), [x[name] for name in names], x["gradient"])

    def bound(arm: str, backward: bool) -> float | None:
        # a CPU's loops keep their rows in its caches: the traffic of all levels is no bound for them
        if place.device.type == "cpu" and arm != SOFTMAX:
            return None
        return bound_ms(arm, T, heads, width, element, backward, place.limits)

    rows = []
    for what, call in (("forward", forward), ("forward + backward", both)):
        rows += rows_in_turn(place, dict(T=T, heads=heads, width=width), what,
                             {arm: partial(call, arm) for arm in arms},
                             bound=partial(bound, backward=call is both), against=SOFTMAX)
    return rows


if __name__ == "__main__":
    sys.exit(kernel_benchmark("topological_attention", __doc__, measure, TESTS, SIZES, QUICK, seconds=2.0))
