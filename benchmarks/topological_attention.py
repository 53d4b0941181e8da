"""
Topological attention beside softmax attention: every backend, PyTorch's attention, FlexAttention and the score matrix in eager PyTorch.

    python benchmarks/topological_attention.py                       T from 256 to 65,536 on a CPU, to 1,048,576 on a GPU; forward, and forward + backward
    python benchmarks/topological_attention.py --quick               a few sizes, two minutes on two cores
    python benchmarks/topological_attention.py --sizes T=4096,width=128,heads=6 T=16384

One table, and benchmarks/results/topological_attention-<device>.json. Arms take turns at every length, so that a ratio is of neighbours in time; what does
not fit into memory says so. Softmax attention gets queries and keys of the values' width; topological attention gets its two coordinates, and a decay.
"% of bound": the least time that its matrix products (softmax) or, on a GPU, its bytes (loglinear) take at the ceilings measured in the same run.
The kernel's tests run first, and no figure is printed if one fails.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.timing import Place, kernel_benchmark, rows_in_turn
from kernels.topological_attention import BACKENDS, topological_attention

import torch
import torch.nn.functional as F

TESTS = dict.fromkeys(("cpu", "cuda"), ["tests/kernels/topological_attention/test_topological_attention.py"])
HEADS = {"cpu": 1, "cuda": 12}
sizes = lambda lengths: {device: [dict(T=T, heads=HEADS[device], width=64) for T in lengths[device]] for device in HEADS}
SIZES = sizes({"cpu": [256, 1024, 4096, 16384, 65536], "cuda": [256, 1024, 2048, 4096, 8192, 16384, 65536, 262144, 1048576]})
QUICK = sizes({"cpu": [256, 4096, 16384], "cuda": [2048, 16384, 65536]})
SOFTMAX = "softmax, PyTorch"
QUADRATIC = 1 << 13  # no score matrix in memory above this length


def inputs(T: int, heads: int, width: int, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """One row of T tokens: coordinates of unit variance, a decay of about 1 / 100 a token, values, and softmax attention's queries and keys."""
    random = torch.Generator(device="cpu").manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=random).to(device)
    tensors = dict(a=draw(1, T, heads), b=draw(1, T, heads), g=-0.01 * draw(1, T, heads).exp())
    tensors |= {name: draw(1, T, heads, width).to(dtype) for name in ("v", "q", "k", "gradient")}
    return {name: x.requires_grad_(name != "gradient") for name, x in tensors.items()}


def arms_of(x: dict[str, torch.Tensor], T: int, device: torch.device) -> dict:
    """{arm: (function to the output (1, T, H, D), its inputs that have gradients)}."""
    heads_first = lambda t: t.transpose(1, 2)
    arms = {SOFTMAX: (lambda: heads_first(F.scaled_dot_product_attention(*map(heads_first, (x["q"], x["k"], x["v"])), is_causal=True)), "qkv")}
    if device.type == "cuda":
        arms |= flex_arms(x, T)
    for backend in [*BACKENDS, "auto"]:
        if backend == "reference" and T > QUADRATIC or backend == "tiled" and device.type == "cpu":  # there it is loglinear
            continue
        arms[f"topological, {backend}"] = (lambda backend=backend: topological_attention(x["a"], x["b"], x["v"], log_decay=x["g"], backend=backend), "abgv")
    arms["key only"] = (lambda: topological_attention(None, None, x["v"], log_decay=x["g"], key_bias=x["b"]), "bgv")
    return arms


def flex_arms(x: dict[str, torch.Tensor], T: int) -> dict:
    """FlexAttention on the same scores, which it must still follow a product of queries and keys for, and on softmax attention."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    causal = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device="cuda")
    compiled, first = torch.compile(flex_attention, dynamic=False), lambda t: t.transpose(1, 2)
    total = x["g"].detach().double().cumsum(1).float()[0].T.contiguous()
    a, b = (x[name].detach()[0].T.contiguous() for name in "ab")
    distance = lambda score, _b, h, i, j: total[h, i] - total[h, j] - (a[h, i] - b[h, j]).abs()
    return {"softmax, FlexAttention": (lambda: first(compiled(*map(first, (x["q"], x["k"], x["v"])), block_mask=causal)), "qkv"),
            "distance in FlexAttention": (lambda: first(compiled(*map(first, (x["q"], x["k"], x["v"])), score_mod=distance, block_mask=causal)), "v")}


def bound_ms(arm: str, T: int, heads: int, width: int, element: int, backward: bool, limits: dict) -> float | None:
    """The least time: 2 causal products of 2 T^2 / 2 x width FLOPs forward and 5 backward, or loglinear's traffic; None where none is stated."""
    if arm.startswith(("softmax", "distance")):
        return 1000 * (7 if backward else 2) * T * T * width * heads / limits["flops"]
    if arm == "topological, loglinear":
        levels = max(0, T // 64 - 1).bit_length()
        return 1000 * (4 if backward else 1) * 4 * element * (width + 1) * (levels + 1) * T * heads / limits["bytes"]
    return None


def measure(place: Place, T: int, heads: int, width: int) -> list[dict]:
    """A row of results for every arm at this length, forward and forward + backward."""
    rows, x = [], inputs(T, heads, width, place.device, place.dtype)
    for backward in (False, True):
        def call(function, names, backward=backward):
            if not backward:
                with torch.no_grad():
                    return function()
            return torch.autograd.grad(function(), [x[name] for name in names], x["gradient"])
        arms = {arm: lambda function=function, names=names: call(function, names) for arm, (function, names) in arms_of(x, T, place.device).items()}
        # a CPU's loops keep their rows in its caches: the traffic of all levels is no bound for them
        counted = lambda arm: place.device.type == "cuda" or arm == SOFTMAX
        bound = lambda arm, backward=backward: counted(arm) and bound_ms(arm, T, heads, width, x["v"].element_size(), backward, place.limits)
        rows += rows_in_turn(place, dict(T=T, heads=heads, width=width), "forward + backward" if backward else "forward", arms, bound=bound, against=SOFTMAX)
    return rows


if __name__ == "__main__":
    sys.exit(kernel_benchmark("topological_attention", __doc__, measure, TESTS, SIZES, QUICK, seconds=2.0))
