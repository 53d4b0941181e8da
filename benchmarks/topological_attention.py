"""
Topological attention beside softmax attention: every backend, PyTorch's attention, FlexAttention and the score matrix in eager PyTorch.

    python benchmarks/topological_attention.py                       T from 256 to 65,536 on a CPU, to 1,048,576 on a GPU; forward, and forward + backward
    python benchmarks/topological_attention.py --quick               a few sizes, two minutes on two cores
    python benchmarks/topological_attention.py --lengths 4096,16384 --width 128 --heads 6

One table, and benchmarks/results/topological_attention-<device>.json. Arms take turns at every length, so that a ratio is of neighbours in time; what does
not fit into memory says so. Softmax attention gets queries and keys of the values' width; topological attention gets its two coordinates, and a decay.
"% of bound": the least time that its matrix products (softmax) or its bytes (loglinear) take at the ceilings measured in the same run.
The kernel's tests run first, and no figure is printed if one fails.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F

from benchmarks.timing import ceilings, describe, in_turn, markdown, require_tests, save
from kernels.topological_attention import BACKENDS, topological_attention
from train_gpt import RunError

TESTS = "tests/kernels/test_topological_attention.py"
LENGTHS = {"cpu": [256, 1024, 4096, 16384, 65536], "cuda": [256, 1024, 2048, 4096, 8192, 16384, 65536, 262144, 1048576]}
QUICK = {"cpu": [256, 4096, 16384], "cuda": [2048, 16384, 65536]}
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
    arms = {"softmax, PyTorch": (lambda: heads_first(F.scaled_dot_product_attention(*map(heads_first, (x["q"], x["k"], x["v"])), is_causal=True)), "qkv")}
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


def measure(T: int, given: argparse.Namespace, device: torch.device, dtype: torch.dtype, limits: dict) -> list[dict]:
    """A row of results for every arm at this length, forward and forward + backward."""
    rows, x = [], inputs(T, given.heads, given.width, device, dtype)
    for backward in (False, True):
        def call(function, names, backward=backward):
            if not backward:
                with torch.no_grad():
                    return function()
            return torch.autograd.grad(function(), [x[name] for name in names], x["gradient"])
        arms = {arm: lambda function=function, names=names: call(function, names) for arm, (function, names) in arms_of(x, T, device).items()}
        times = in_turn(arms, device, given.seconds)
        softmax = times["softmax, PyTorch"]
        for arm, found in times.items():
            row = dict(T=T, arm=arm, what="forward + backward" if backward else "forward")
            if isinstance(found, str):
                rows.append(row | dict(fault=found))
                continue
            bound = bound_ms(arm, T, given.heads, given.width, x["v"].element_size(), backward, limits)
            rows.append(row | found | dict(bound_share=bound and bound / found["median"], speedup=None if isinstance(softmax, str) else softmax["median"] / found["median"]))
            print(shown(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def shown(rows: list[dict]) -> str:
    number = lambda row, name, form: form.format(row[name]) if row.get(name) is not None else "-"
    return markdown([{"T": f"{row['T']:,}", "arm": row["arm"], "pass": row["what"], "ms": row.get("fault") or number(row, "median", "{:.3g}"),
                      "20 to 80 %": "-" if "fault" in row else f"{row['p20']:.3g} to {row['p80']:.3g}", "n": row.get("n", "-"),
                      "against softmax": number(row, "speedup", "{:.2f}x"), "% of bound": number(row, "bound_share", "{:.0%}"), "peak MiB": row.get("peak_mib", "-")} for row in rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer lengths, shorter timing")
    parser.add_argument("--lengths", type=lambda text: [int(part) for part in text.split(",")], help="tokens of a row")
    parser.add_argument("--heads", type=int, help="heads (CPU 1; GPU 768 / width)")
    parser.add_argument("--width", type=int, default=64, help="of a value (default: 64)")
    parser.add_argument("--seconds", type=float, help="of timing for each arm and length (2; quick: 0.5)")
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/)")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    given.heads = given.heads or (max(1, 768 // given.width) if device.type == "cuda" else 1)
    given.seconds = given.seconds or (0.5 if given.quick else 2.0)
    try:
        require_tests(TESTS)
        limits = ceilings(device, dtype)
        results = describe(device) | dict(heads=given.heads, width=given.width, dtype=str(dtype).removeprefix("torch."), ceilings=limits, rows=[])
        for T in given.lengths or (QUICK if given.quick else LENGTHS)[device.type]:
            results["rows"] += measure(T, given, device, dtype, limits)
            path = save("topological_attention", results, given.output)
    except RunError as error:
        print(f"topological_attention.py: error: {error}", file=sys.stderr)
        return 1
    print(f"\n{shown(results['rows'])}\n\n{limits['flops'] / 1e12:.3g} TFLOP/s and {limits['bytes'] / 1e9:.3g} GB/s measured; {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
