"""
Gated linear attention: every backend beside its peers and beside the time that memory and arithmetic allow, and one step of decoding.

    python benchmarks/gated_linear_attention.py             all shapes, on a GPU if there is one
    python benchmarks/gated_linear_attention.py --quick     few shapes: two minutes on two cores

One table, and benchmarks/results/gated_linear_attention-<device>.json, written after every shape. Arms take turns; the kernel's tests run first, and at every
shape an arm is timed only if its output and gradients are those of the float64 form. Peers: fla-org/flash-linear-attention's simple gated linear attention
where it is installed, and the reference form compiled; causal softmax attention, with queries and keys as wide as the values, is another operation, for scale.
"% of bound": the larger of the bytes and the FLOPs that kernels/gated_linear_attention.py counts for chunks of 64, at the ceilings measured in the same run.
"""

import argparse
import importlib.util
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F

from benchmarks.timing import ceilings, describe, in_turn, markdown, require_tests, save
from kernels.gated_linear_attention import gated_linear_attention, gated_linear_attention_reference, gated_linear_attention_step
from train_gpt import RunError

TESTS = "tests/kernels/test_gated_linear_attention.py"
WIDTHS = {"cpu": [(64, 64, 4), (256, 65, 4), (16, 17, 16)], "cuda": [(64, 64, 12), (64, 65, 12), (128, 128, 6), (256, 65, 12), (16, 17, 48)]}  # M, D, H
LENGTHS = {"cpu": [1024, 4096, 16_384, 65_536], "cuda": [1024, 4096, 16_384, 65_536, 262_144, 1_048_576]}
QUICK = {"cpu": [1024, 8192], "cuda": [4096, 65_536]}
TOKENS = {"cpu": 1, "cuda": 65_536}  # at least, in rows of the length
QUADRATIC = 4096        # no T x T matrix above this length,
COMPILED = 1024         # and none compiled above this one
SOFTMAX_PAIRS = {"cpu": 1 << 31, "cuda": 1 << 39}  # no softmax attention of more, over all rows and heads
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}  # relative RMS error of the output and of each gradient
SOFTMAX, STEP = "softmax, PyTorch", "one step of decoding"


def make_inputs(B: int, T: int, H: int, M: int, D: int, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """[query, key, value, log_decay, the output's gradient], all but the last with gradients; a decay of 1 / 100 a token."""
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda width, scale=1.0: (scale * torch.randn(B, T, H, width, device=device, generator=generator)).to(dtype)
    inputs = [draw(M, M ** -0.5), draw(M), draw(D), -0.02 * torch.rand(B, T, H, device=device, generator=generator)]
    return [x.requires_grad_() for x in inputs] + [draw(D)]


def backend(name: str):
    return lambda query, key, value, log_decay: gated_linear_attention(query, key, value, log_decay=log_decay, backend=name)


def flash_linear_attention(query, key, value, log_decay):
    from fla.ops.simple_gla import chunk_simple_gla
    return chunk_simple_gla(q=query, k=key, v=value, g=log_decay, scale=1.0)[0]


def softmax_attention(query, key, value, log_decay):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)), is_causal=True).transpose(1, 2)


def contenders(B: int, T: int, H: int, device: torch.device) -> dict:
    """{arm: function(query, key, value, log_decay) -> out}"""
    cuda = device.type == "cuda"
    arms = {name: backend(name) for name in ("triton", "chunked") if cuda or name != "triton"}
    if T <= QUADRATIC:
        arms["reference"] = gated_linear_attention_reference
    if cuda and T <= COMPILED:
        arms["reference, compiled"] = torch.compile(gated_linear_attention_reference, dynamic=False)
    if cuda and importlib.util.find_spec("fla"):
        arms["flash-linear-attention"] = flash_linear_attention
    if B * T * T * H <= SOFTMAX_PAIRS[device.type]:
        arms[SOFTMAX] = softmax_attention
    return arms


def both_passes(function, inputs: list[torch.Tensor]) -> list[torch.Tensor | None]:
    *tensors, grad = inputs
    out = function(*tensors)
    return [out, *torch.autograd.grad(out, tensors, grad, allow_unused=True)]


def fault(function, T: int, H: int, M: int, D: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with an arm on one row of at most 8,192 tokens, against the chunked form in float64; None if nothing is."""
    inputs = make_inputs(1, min(T, 8192), H, M, D, device, dtype)
    expected = both_passes(backend("chunked"), [x.detach().double().requires_grad_(x.requires_grad) for x in inputs])
    try:
        errors = [((x.double() - y).norm() / y.norm()).item() for x, y in zip(both_passes(function, inputs), expected)]
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    wrong = not all(error < TOLERANCE[dtype] for error in errors)
    return f"wrong: relative RMS errors {', '.join(f'{error:.1e}' for error in errors)}" if wrong else None


def bound_ms(B: int, T: int, H: int, M: int, D: int, element: int, backward: bool, limits: dict) -> float:
    """The least time, of both passes with backward."""
    C, passes = 64, [(lambda C: 2 * C * (M + D) + 4 * M * D, lambda C: 3 * M + 3 * D + 2 * M * D / C)]
    if backward:
        passes.append((lambda C: 2 * C * (3 * M + 2 * D) + 8 * M * D, lambda C: 5 * M + 4 * D + 3 * M * D / C))
    return sum(1000 * B * T * H * max(flops(C) / limits["flops"], element * moved(C) / limits["bytes"]) for flops, moved in passes)


def measure(T: int, M: int, D: int, H: int, seconds: float, device: torch.device, dtype: torch.dtype, limits: dict) -> list[dict]:
    """A row of results for every arm, forward and forward + backward, and for a step of decoding."""
    B = -(-TOKENS[device.type] // T)
    case, rows = dict(B=B, T=T, H=H, M=M, D=D), []
    inputs, width = make_inputs(B, T, H, M, D, device, dtype), max(16, D // 16 * 16)
    softmax_inputs = make_inputs(B, T, H, width, width, device, dtype)
    arms = contenders(B, T, H, device)
    faults = {arm: found for arm, function in arms.items() if arm != SOFTMAX and (found := fault(function, T, H, M, D, device, dtype))}
    rows += [case | dict(arm=arm, what="check", fault=found) for arm, found in faults.items()]
    for backward in (False, True):
        def call(arm, backward=backward):
            own = softmax_inputs if arm == SOFTMAX else inputs
            if backward:
                return both_passes(arms[arm], own)
            with torch.no_grad():
                return arms[arm](*own[:-1])
        for arm, found in in_turn({arm: lambda arm=arm: call(arm) for arm in arms if arm not in faults}, device, seconds).items():
            row = case | dict(arm=arm, what="forward + backward" if backward else "forward")
            if isinstance(found, str):
                rows.append(row | dict(fault=found))
                continue
            share = None if arm == SOFTMAX else bound_ms(B, T, H, M, D, dtype.itemsize, backward, limits) / found["median"]
            rows.append(row | found | dict(bound_share=share))
    token, state = [x[:, 0].detach() for x in inputs[:4]], torch.zeros(B, H, M, D, device=device)
    [found] = in_turn({STEP: lambda: gated_linear_attention_step(state, *token)}, device, seconds / 4).values()
    rows.append(case | dict(arm=STEP, what="forward") | (dict(fault=found) if isinstance(found, str) else found))
    return rows


def shown(rows: list[dict]) -> str:
    number = lambda row, name, form: form.format(row[name]) if row.get(name) is not None else "-"
    return markdown([{"B": row["B"], "T": f"{row['T']:,}", "H": row["H"], "M": row["M"], "D": row["D"], "arm": row["arm"], "pass": row["what"],
                      "ms": row.get("fault") or number(row, "median", "{:.3g}"), "20 to 80 %": "-" if "fault" in row else f"{row['p20']:.3g} to {row['p80']:.3g}",
                      "n": row.get("n", "-"), "% of bound": number(row, "bound_share", "{:.0%}"), "peak MiB": row.get("peak_mib", "-")} for row in rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer lengths, shorter timing")
    parser.add_argument("--lengths", type=lambda text: [int(part) for part in text.split(",")], help="tokens of a row")
    parser.add_argument("--seconds", type=float, help="of timing for each arm and shape (1; quick: 0.3)")
    parser.add_argument("--minutes", type=float, default=60.0, help="no shape begins later than this (60)")
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/)")
    given = parser.parse_args()
    device, start = torch.device("cuda" if torch.cuda.is_available() else "cpu"), time.monotonic()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        require_tests(TESTS)
        limits, path = ceilings(device, dtype), None
        results = describe(device) | dict(dtype=str(dtype).removeprefix("torch."), ceilings=limits, rows=[], left_out=[])
        for M, D, H in WIDTHS[device.type]:
            for T in given.lengths or (QUICK if given.quick else LENGTHS)[device.type]:
                if time.monotonic() - start > 60 * given.minutes:
                    results["left_out"].append(dict(T=T, H=H, M=M, D=D))
                    continue
                results["rows"] += measure(T, M, D, H, given.seconds or (0.3 if given.quick else 1.0), device, dtype, limits)
                path = save("gated_linear_attention", results, given.output)
                print(f"T {T:,}, M {M}, D {D}, H {H}: done", flush=True)
        if path is None:
            raise RunError(f"--minutes {given.minutes:g} left no time for a shape after the tests; give more")
        save("gated_linear_attention", results, given.output)
    except RunError as error:
        print(f"gated_linear_attention.py: error: {error}", file=sys.stderr)
        return 1
    print(f"\n{shown(results['rows'])}\n\n{limits['flops'] / 1e12:.3g} TFLOP/s and {limits['bytes'] / 1e9:.3g} GB/s measured; {len(results['left_out'])} shapes left out; {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
