"""
The lane scan, a causal sum over time with fixed waves as weights: the kernel beside its other forms, the product with a
dense Toeplitz matrix, softmax attention of as many channels and FlexAttention.

    python -m benchmarks.lane_scan             512 to 65,536 tokens, on a GPU if there is one
    python -m benchmarks.lane_scan --quick     1,024 and 8,192 tokens
    python -m benchmarks.lane_scan --sizes T=4096,W=768,F=64

One table, and benchmarks/results/lane_scan-<device>.json, written after every size, with the exponents of the lane
scan's time over the number of tokens (a line through the logarithms). Arms take turns; the operator's tests run first,
and an arm is timed only if its result and gradients are those of the chunked form in float64. Attention has heads of
64 channels; compiled FlexAttention has no backward pass on a CPU. A step of decoding is one token after T others: of
the lane scan on its state, of softmax attention on T keys and values.
"""

import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.timing import Place, both_passes, kernel_benchmark, measure_arms, rows_in_turn, sizes
from kernels.lane_scan import harmonic_frequencies, lane_scan, lane_scan_step
from kernels.lane_scan.reference import pair_weights

TESTS = dict.fromkeys(("cpu", "cuda"), ["tests/kernels/test_lane_scan.py"])
LENGTHS = (512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)
SIZES = {  # T, W, F
    "cpu": sizes("T W F", *((T, 256, 64) for T in LENGTHS)),
    "cuda": sizes("T W F", *((T, W, 64) for W in (256, 768) for T in LENGTHS)),
}
QUICK = {device: sizes("T W F", (1024, 256, 64), (8192, 256, 64)) for device in SIZES}
TOKENS = {"cpu": 1, "cuda": 65_536}     # at least, in rows of the length
DENSE = 4096            # no Toeplitz matrix above this length
SOFTMAX_PAIRS = {"cpu": 1 << 31, "cuda": 1 << 39}  # no softmax attention of more, over all rows and heads
FLEX_PAIRS = {"cpu": 1 << 26, "cuda": 1 << 39}  # no FlexAttention of more, which takes many times as long on a CPU
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # relative RMS error of the output and of each gradient
HEAD_DIM = 64           # of attention
KERNELS = ("loops", "triton")
TOEPLITZ, SOFTMAX, FLEX = "dense Toeplitz product", "softmax, PyTorch", "FlexAttention, compiled"
STEP, SOFTMAX_STEP = "one step of decoding", "one step of softmax attention"
OTHERS = (SOFTMAX, FLEX, STEP, SOFTMAX_STEP)


def make_inputs(B: int, T: int, W: int, count: int, place: Place) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """([u (B, T, W) and gains (F,) with gradients], [the gradient of y])"""
    generator = torch.Generator(place.device).manual_seed(0)
    u, grad = (torch.randn(B, T, W, device=place.device, generator=generator).to(place.dtype) for _ in range(2))
    gain = torch.randn(count, device=place.device, generator=generator)
    return [u.requires_grad_(), gain.requires_grad_()], [grad]


def by_backend(name: str, frequencies: torch.Tensor, u: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return lane_scan(u, frequencies, gain, mean=True, backend=name)


def toeplitz(frequencies: torch.Tensor, u: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """The T x T matrix, made anew as its gains change in training, times u."""
    index = torch.arange(u.shape[1], device=u.device)
    weights = pair_weights(frequencies, gain[None], None, torch.zeros_like(index)[None], index[None])[0, 0]
    return (weights / (index[:, None] + 1)).to(u.dtype) @ u


def softmax_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def compile_flex(T: int, place: Place) -> Callable:
    """FlexAttention, causal, compiled for rows of T tokens."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=place.device.type)
    return torch.compile(partial(flex_attention, block_mask=mask), dynamic=False)


def attentions(B: int, T: int, W: int, place: Place) -> dict[str, tuple[Callable, Callable]]:
    """{arm: (forward, both passes)} of attention with as many channels, where it is not too long."""
    heads = W // HEAD_DIM
    pairs = B * heads * T * T
    functions = {}
    if pairs <= SOFTMAX_PAIRS[place.device.type]:
        functions[SOFTMAX] = softmax_attention
    if pairs <= FLEX_PAIRS[place.device.type]:
        functions[FLEX] = compile_flex(T, place)
    generator = torch.Generator(place.device).manual_seed(1)
    q, k, v, grad = (torch.randn(B, heads, T, HEAD_DIM, device=place.device, generator=generator).to(place.dtype)
                     for _ in range(4))
    tensors = [x.requires_grad_() for x in (q, k, v)]

    arms = {}
    for arm, function in functions.items():
        # on a CPU FlexAttention refuses tensors that want a gradient
        forward = torch.no_grad()(partial(function, *(x.detach() for x in tensors)))
        arms[arm] = forward, partial(both_passes, function, tensors, [grad])
    return arms


def contenders(T: int, frequencies: torch.Tensor, place: Place) -> dict[str, Callable]:
    """{arm: function(u, gain) -> y}"""
    kernel = "triton" if place.device.type == "cuda" else "loops"
    arms = {name: partial(by_backend, name, frequencies) for name in (kernel, "chunked")}
    if T <= DENSE:
        arms[TOEPLITZ] = partial(toeplitz, frequencies)
    return arms


def measure(place: Place, T: int, W: int, F: int) -> list[dict]:
    """
    A row of results for every arm, forward and forward + backward, and for steps of decoding. Arms are checked on one
    row of at most 8,192 tokens.
    """
    # whole rows
    B = -(-TOKENS[place.device.type] // T)
    case, inputs = dict(B=B, T=T, W=W, F=F), make_inputs(B, T, W, F, place)
    frequencies = harmonic_frequencies(F, 2 * T).to(place.device)
    F = len(frequencies)
    inputs[0][1] = inputs[0][1].detach()[:F].requires_grad_()
    checked = make_inputs(1, min(T, 8192), W, F, place)
    chunk = 64 if place.device.type == "cuda" else 32
    flops = B * T * W * (chunk + 8 * F)
    moved = B * T * W * place.dtype.itemsize
    work = dict(flops=flops, moved=2 * moved), dict(flops=3 * flops, moved=6 * moved)
    rows = measure_arms(place, case, contenders(T, frequencies, place), inputs,
                        partial(by_backend, "chunked", frequencies), TOLERANCE[place.dtype], work, checked,
                        attentions(B, T, W, place), against=SOFTMAX)

    # one token
    u, gain = (x.detach() for x in inputs[0])
    positions = torch.full((B, 1), T, device=place.device)
    _, state = lane_scan_step(None, u[:, :1], frequencies, gain, positions)
    q, k, v = (torch.randn(B, W // HEAD_DIM, n, HEAD_DIM, device=place.device).to(place.dtype) for n in (1, T, T))
    steps = {STEP: partial(lane_scan_step, state, u[:, :1], frequencies, gain, positions, mean=True),
             SOFTMAX_STEP: partial(torch.nn.functional.scaled_dot_product_attention, q, k, v)}
    return rows + rows_in_turn(place._replace(seconds=place.seconds / 4), case, "forward", steps, others=OTHERS)


def exponents(rows: list[dict]) -> dict:
    """{"exponents": {"W=256, F=64, forward": the slope of the kernel's time over tokens, in logarithms}}"""
    times = {}
    for row in rows:
        if row["arm"] in KERNELS and "median" in row:
            key = f"W={row['W']}, F={row['F']}, {row['what']}"
            times.setdefault(key, []).append((row["T"], row["median"] / row["B"]))
    slopes = {}
    for key, points in times.items():
        if len(points) > 1:
            tokens, ms = np.log(np.array(points)).T
            slopes[key] = round(float(np.polyfit(tokens, ms, 1)[0]), 3)
    return dict(exponents=slopes)


if __name__ == "__main__":
    sys.exit(kernel_benchmark("lane_scan", __doc__, measure, TESTS, SIZES, QUICK, others=OTHERS, facts=exponents))
