"""
Gated linear attention: every backend beside its peers and beside the time that memory and arithmetic allow, and one step of decoding.

    python benchmarks/gated_linear_attention.py             all shapes, on a GPU if there is one
    python benchmarks/gated_linear_attention.py --quick     few shapes: two minutes on two cores

One table, and benchmarks/results/gated_linear_attention-<device>.json, written after every shape. Arms take turns; the kernel's tests run first, and at every
shape an arm is timed only if its output and gradients are those of the float64 form. Peers: fla-org/flash-linear-attention's simple gated linear attention
where it is installed, and the reference form compiled; causal softmax attention, with queries and keys as wide as the values, is another operation, for scale.
"% of bound": the larger of the bytes and the FLOPs that kernels/gated_linear_attention counts for chunks of 64, at the ceilings measured in the same run.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.timing import Place, both_passes, kernel_benchmark, measure_arms, rows_in_turn
from kernels.gated_linear_attention import gated_linear_attention, gated_linear_attention_reference, gated_linear_attention_step

import torch
import torch.nn.functional as F

TESTS = dict.fromkeys(("cpu", "cuda"), ["tests/kernels/test_gated_linear_attention.py"])
WIDTHS = {"cpu": [(64, 64, 4), (256, 65, 4), (16, 32, 4), (8, 8, 16)], "cuda": [(64, 64, 12), (64, 65, 12), (128, 128, 6), (256, 65, 12), (16, 17, 48)]}  # M, D, H
sizes = lambda lengths: {device: [dict(T=T, M=M, D=D, H=H) for M, D, H in WIDTHS[device] for T in lengths[device]] for device in WIDTHS}
SIZES = sizes({"cpu": [1024, 4096, 16_384, 65_536], "cuda": [1024, 4096, 16_384, 65_536, 262_144, 1_048_576]})
QUICK = sizes({"cpu": [1024, 8192], "cuda": [4096, 65_536]})
TOKENS = {"cpu": 1, "cuda": 65_536}  # at least, in rows of the length
QUADRATIC = 4096        # no T x T matrix above this length,
COMPILED = 1024         # and none compiled above this one
SOFTMAX_PAIRS = {"cpu": 1 << 31, "cuda": 1 << 39}  # no softmax attention of more, over all rows and heads
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}  # relative RMS error of the output and of each gradient
SOFTMAX, STEP = "softmax, PyTorch", "one step of decoding"


def make_inputs(B: int, T: int, H: int, M: int, D: int, place: Place) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """([query, key, value, log_decay, with gradients], [the output's gradient]); a decay of 1 / 100 a token."""
    generator = torch.Generator(place.device).manual_seed(0)
    draw = lambda width, scale=1.0: (scale * torch.randn(B, T, H, width, device=place.device, generator=generator)).to(place.dtype)
    inputs = [draw(M, M ** -0.5), draw(M), draw(D), -0.02 * torch.rand(B, T, H, device=place.device, generator=generator)]
    return [x.requires_grad_() for x in inputs], [draw(D)]


def backend(name: str):
    return lambda query, key, value, log_decay: gated_linear_attention(query, key, value, log_decay=log_decay, backend=name)


def flash_linear_attention(query, key, value, log_decay):
    from fla.ops.simple_gla import chunk_simple_gla
    return chunk_simple_gla(q=query, k=key, v=value, g=log_decay, scale=1.0)[0]


def softmax_attention(query, key, value):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)), is_causal=True).transpose(1, 2)


def contenders(T: int, place: Place) -> dict:
    """{arm: function(query, key, value, log_decay) -> out}"""
    cuda = place.device.type == "cuda"
    arms = {name: backend(name) for name in (("triton", "chunked") if cuda else ("loops", "chunked"))}
    if T <= QUADRATIC:
        arms["reference"] = gated_linear_attention_reference
    if cuda and T <= COMPILED:
        arms["reference, compiled"] = torch.compile(gated_linear_attention_reference, dynamic=False)
    if cuda and importlib.util.find_spec("fla"):
        arms["flash-linear-attention"] = flash_linear_attention
    return arms


def bound_ms(B: int, T: int, H: int, M: int, D: int, element: int, backward: bool, limits: dict) -> float:
    """The least time, of both passes with backward."""
    C, passes = 64, [(lambda C: 2 * C * (M + D) + 4 * M * D, lambda C: 3 * M + 3 * D + 2 * M * D / C)]
    if backward:
        passes.append((lambda C: 2 * C * (3 * M + 2 * D) + 8 * M * D, lambda C: 5 * M + 4 * D + 3 * M * D / C))
    return sum(1000 * B * T * H * max(flops(C) / limits["flops"], element * moved(C) / limits["bytes"]) for flops, moved in passes)


def measure(place: Place, T: int, M: int, D: int, H: int) -> list[dict]:
    """A row of results for every arm, forward and forward + backward, and for a step of decoding. Arms are checked on one row of at most 8,192 tokens."""
    B = -(-TOKENS[place.device.type] // T)
    case, inputs, width = dict(B=B, T=T, H=H, M=M, D=D), make_inputs(B, T, H, M, D, place), max(16, D // 16 * 16)
    softmax = {}
    if B * T * T * H <= SOFTMAX_PAIRS[place.device.type]:
        (*tensors, _), gradients = make_inputs(B, T, H, width, width, place)
        softmax[SOFTMAX] = torch.no_grad()(lambda: softmax_attention(*tensors)), lambda: both_passes(softmax_attention, tensors, gradients)
    work = tuple(dict(bound=lambda arm, backward=backward: bound_ms(B, T, H, M, D, place.dtype.itemsize, backward, place.limits)) for backward in (False, True))
    rows = measure_arms(place, case, contenders(T, place), inputs, backend("chunked"), TOLERANCE[place.dtype], work,
                        make_inputs(1, min(T, 8192), H, M, D, place), softmax)
    token, state = [x[:, 0].detach() for x in inputs[0]], torch.zeros(B, H, M, D, device=place.device)
    return rows + rows_in_turn(place._replace(seconds=place.seconds / 4), case, "forward", {STEP: lambda: gated_linear_attention_step(state, *token)})


if __name__ == "__main__":
    sys.exit(kernel_benchmark("gated_linear_attention", __doc__, measure, TESTS, SIZES, QUICK))
