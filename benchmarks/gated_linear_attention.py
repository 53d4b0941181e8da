"""
Gated linear attention: every backend beside its peers and beside the time that memory and arithmetic allow, and one
step of decoding.

    python -m benchmarks.gated_linear_attention             all shapes, on a GPU if there is one
    python -m benchmarks.gated_linear_attention --quick     few shapes: two minutes on two cores

One table, and benchmarks/results/gated_linear_attention-<device>.json, written after every shape. Arms take turns; the
kernel's tests run first, and at every shape an arm is timed only if its output and gradients are those of the float64
form. Peers: fla-org/flash-linear-attention's simple gated linear attention where it is installed, and the reference
form compiled; causal softmax attention, with queries and keys as wide as the values, is another operation, for scale.
"% of bound": the larger of the bytes and the FLOPs that kernels/gated_linear_attention counts for chunks of 64, at
the ceilings measured in the same run.
"""

import importlib.util
import sys
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.timing import Place, both_passes, kernel_benchmark, measure_arms, rows_in_turn, sizes
from kernels.gated_linear_attention import (
    gated_linear_attention,
    gated_linear_attention_reference,
    gated_linear_attention_step,
)

TESTS = dict.fromkeys(("cpu", "cuda"), ["tests/kernels/test_gated_linear_attention.py"])
WIDTHS = {  # M, D, H
    "cpu": [(64, 64, 4), (256, 65, 4), (16, 32, 4), (8, 8, 16)],
    "cuda": [(64, 64, 12), (64, 65, 12), (128, 128, 6), (256, 65, 12), (16, 17, 48)],
}


def sizes_of(lengths: dict[str, list[int]]) -> dict[str, list[dict]]:
    """Every width at every length, by the device's type."""
    return {device: sizes("T M D H", *((T, *width) for width in WIDTHS[device] for T in lengths[device]))
            for device in WIDTHS}


SIZES = sizes_of({"cpu": [1024, 4096, 16_384, 65_536], "cuda": [1024, 4096, 16_384, 65_536, 262_144, 1_048_576]})
QUICK = sizes_of({"cpu": [1024, 8192], "cuda": [4096, 65_536]})
TOKENS = {"cpu": 1, "cuda": 65_536}  # at least, in rows of the length
QUADRATIC = 4096        # no T x T matrix above this length,
COMPILED = 1024         # and none compiled above this one
SOFTMAX_PAIRS = {"cpu": 1 << 31, "cuda": 1 << 39}  # no softmax attention of more, over all rows and heads
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}  # relative RMS error of the output and of each gradient
SOFTMAX, STEP = "softmax, PyTorch", "one step of decoding"


def make_inputs(B: int, T: int, H: int, M: int, D: int, place: Place) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """([query, key, value, log_decay, with gradients], [the output's gradient]); a decay of 1 / 100 a token."""
    generator = torch.Generator(place.device).manual_seed(0)

    def draw(width: int, scale: float = 1.0) -> torch.Tensor:
        x = torch.randn(B, T, H, width, device=place.device, generator=generator)
        return (scale * x).to(place.dtype)

    inputs = [draw(M, M ** -0.5), draw(M), draw(D)]
    inputs.append(-0.02 * torch.rand(B, T, H, device=place.device, generator=generator))
    return [x.requires_grad_() for x in inputs], [draw(D)]


def by_backend(name: str, query, key, value, log_decay) -> torch.Tensor:
    return gated_linear_attention(query, key, value, log_decay=log_decay, backend=name)


def flash_linear_attention(query, key, value, log_decay) -> torch.Tensor:
    from fla.ops.simple_gla import chunk_simple_gla
    return chunk_simple_gla(q=query, k=key, v=value, g=log_decay, scale=1.0)[0]


def softmax_attention(query, key, value) -> torch.Tensor:
    heads_first = [x.transpose(1, 2) for x in (query, key, value)]
    return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)


def contenders(T: int, place: Place) -> dict:
    """{arm: function(query, key, value, log_decay) -> out}"""
    cuda = place.device.type == "cuda"
    arms = {name: partial(by_backend, name) for name in ("triton" if cuda else "loops", "chunked")}
    if T <= QUADRATIC:
        arms["reference"] = gated_linear_attention_reference
    if cuda and T <= COMPILED:
        arms["reference, compiled"] = torch.compile(gated_linear_attention_reference, dynamic=False)
    if cuda and importlib.util.find_spec("fla"):
        arms["flash-linear-attention"] = flash_linear_attention
    return arms


def bound_ms(B: int, T: int, H: int, M: int, D: int, element: int, backward: bool, limits: dict) -> float:
    """The least time, of both passes with backward; each takes that of its FLOPs or of its bytes."""
    C = 64
    passes = [(2 * C * (M + D) + 4 * M * D, 3 * M + 3 * D + 2 * M * D / C)]  # FLOPs and numbers of a token and head
    if backward:
        passes.append((2 * C * (3 * M + 2 * D) + 8 * M * D, 5 * M + 4 * D + 3 * M * D / C))
    return sum(1000 * B * T * H * max(flops / limits["flops"], element * moved / limits["bytes"])
               for flops, moved in passes)


def measure(place: Place, T: int, M: int, D: int, H: int) -> list[dict]:
    """
    A row of results for every arm, forward and forward + backward, and for a step of decoding. Arms are checked on one
    row of at most 8,192 tokens.
    """
    B = -(-TOKENS[place.device.type] // T)
    case, inputs = dict(B=B, T=T, H=H, M=M, D=D), make_inputs(B, T, H, M, D, place)

    # softmax attention beside it
    softmax = {}
    if B * T * T * H <= SOFTMAX_PAIRS[place.device.type]:
        width = max(16, D // 16 * 16)
        (*tensors, _), gradients = make_inputs(B, T, H, width, width, place)
        forward = torch.no_grad()(lambda: softmax_attention(*tensors))
        softmax[SOFTMAX] = forward, lambda: both_passes(softmax_attention, tensors, gradients)

    # whole rows
    element = place.dtype.itemsize
    bounds = [bound_ms(B, T, H, M, D, element, backward, place.limits) for backward in (False, True)]
    work = tuple(dict(bound=lambda arm, bound=bound: bound) for bound in bounds)
    rows = measure_arms(place, case, contenders(T, place), inputs, partial(by_backend, "chunked"),
                        TOLERANCE[place.dtype], work, make_inputs(1, min(T, 8192), H, M, D, place), softmax)

    # one token
    token, state = [x[:, 0].detach() for x in inputs[0]], torch.zeros(B, H, M, D, device=place.device)
    step = {STEP: lambda: gated_linear_attention_step(state, *token)}
    return rows + rows_in_turn(place._replace(seconds=place.seconds / 4), case, "forward", step)


if __name__ == "__main__":
    sys.exit(kernel_benchmark("gated_linear_attention", __doc__, measure, TESTS, SIZES, QUICK))
