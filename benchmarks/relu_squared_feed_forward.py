"""
Feed-forward with the squared ReLU: the fused kernels beside the reference, eager and compiled, and beside what the trainer runs.

    python benchmarks/relu_squared_feed_forward.py             all sizes, on a GPU if there is one
    python benchmarks/relu_squared_feed_forward.py --quick     one size, on a CPU nothing compiled: under a minute on two cores
    python benchmarks/relu_squared_feed_forward.py --rows 65536 --shapes 768x3072,1024x4096

One table, and benchmarks/results/relu_squared_feed_forward-<device>.json, written after every size. Arms take turns; the kernels' tests run first (on a CPU those
of the reference), and an arm is timed only if its result and gradients are those of the reference in float64. "trainer, compiled" is the MLP of train_gpt.py, whose
squared ReLU is an autograd function. "forward" keeps what the backward pass needs. "% of product rate": the products' FLOPs, 4 N D H forward and with the backward
pass three times as many, at the rate that a large product reaches in the same run.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F

from benchmarks.timing import ceilings, describe, in_turn, markdown, require_tests, save
from kernels.relu_squared_feed_forward import relu_squared_feed_forward, relu_squared_feed_forward_reference
from train_gpt import ReLUSquared, RunError

FILE = "tests/kernels/test_relu_squared_feed_forward.py"
TESTS = {"cpu": [f"{FILE}::{name}" for name in ("test_reference_is_the_definition", "test_gradcheck")], "cuda": [FILE]}
ROWS = {"cpu": [1024], "cuda": [16_384, 65_536, 262_144]}
SHAPES = {"cpu": [(128, 512), (384, 1536)], "cuda": [(384, 1536), (768, 3072), (1024, 4096)]}
QUICK = {"cpu": ([512], [(128, 512)]), "cuda": ([65_536], [(768, 3072)])}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}  # relative RMS error of the result and of each gradient


def make_inputs(N: int, D: int, H: int, device: torch.device, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """([x, fc, proj with a gradient], gradient of y)"""
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda *shape: torch.randn(shape, device=device, generator=generator)
    tensors = draw(N, D), draw(H, D) / D ** 0.5, draw(D, H) / H ** 0.5
    return [x.to(dtype).requires_grad_() for x in tensors], draw(N, D).to(dtype)


def trainer(x: torch.Tensor, fc: torch.Tensor, proj: torch.Tensor) -> torch.Tensor:
    return F.linear(ReLUSquared.apply(F.linear(x, fc)), proj)


def contenders(device: torch.device, compiled: bool) -> dict:
    """{arm: function(x, fc, proj) -> y}"""
    torch.compiler.reset()  # what is compiled for other sizes counts towards the number after which nothing more is
    arms = {"triton": lambda *tensors: relu_squared_feed_forward(*tensors, backend="triton")} if device.type == "cuda" else {}
    if compiled:
        arms |= {f"{name}, compiled": torch.compile(function, dynamic=False) for name, function in (("trainer", trainer), ("reference", relu_squared_feed_forward_reference))}
    return arms | {"reference": relu_squared_feed_forward_reference}


def both_passes(function, tensors: list[torch.Tensor], dy: torch.Tensor) -> list[torch.Tensor]:
    y = function(*tensors)
    return [y, *torch.autograd.grad(y, tensors, dy)]


def fault(function, tensors: list[torch.Tensor], dy: torch.Tensor) -> str | None:
    """What is wrong with an arm, against the reference in float64; None if nothing is."""
    expected = both_passes(relu_squared_feed_forward_reference, [x.detach().double().requires_grad_() for x in tensors], dy.double())
    try:
        errors = [((x.double() - y).norm() / y.norm()).item() for x, y in zip(both_passes(function, tensors, dy), expected)]
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    wrong = not all(error < TOLERANCE[dy.dtype] for error in errors)
    return f"wrong: relative RMS errors {', '.join(f'{error:.1e}' for error in errors)}" if wrong else None


def measure(N: int, D: int, H: int, seconds: float, compiled: bool, device: torch.device, dtype: torch.dtype, limits: dict) -> list[dict]:
    """A row of results for every arm, forward and forward + backward."""
    case, (tensors, dy), arms = dict(N=N, D=D, H=H), make_inputs(N, D, H, device, dtype), contenders(device, compiled)
    faults = {arm: found for arm, function in arms.items() if (found := fault(function, tensors, dy))}
    rows = [case | dict(arm=arm, what="check", fault=found) for arm, found in faults.items()]
    for backward in (False, True):
        call = lambda function, backward=backward: both_passes(function, tensors, dy) if backward else function(*tensors)
        flops = 4 * N * D * H * (3 if backward else 1)
        for arm, found in in_turn({arm: lambda arm=arm: call(arms[arm]) for arm in arms if arm not in faults}, device, seconds).items():
            row = case | dict(arm=arm, what="forward + backward" if backward else "forward")
            rows.append(row | (dict(fault=found) if isinstance(found, str) else found | dict(product_share=1000 * flops / limits["flops"] / found["median"])))
    return rows


def shown(rows: list[dict]) -> str:
    number = lambda row, name, form: form.format(row[name]) if row.get(name) is not None else "-"
    return markdown([{"N x D x H": f"{row['N']:,} x {row['D']} x {row['H']}", "arm": row["arm"], "pass": row["what"], "ms": row.get("fault") or number(row, "median", "{:.3g}"),
                      "20 to 80 %": "-" if "fault" in row else f"{row['p20']:.3g} to {row['p80']:.3g}", "n": row.get("n", "-"),
                      "% of product rate": number(row, "product_share", "{:.0%}"), "peak MiB": row.get("peak_mib", "-")} for row in rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one size, shorter timing, on a CPU nothing compiled")
    parser.add_argument("--rows", type=lambda text: [int(part) for part in text.split(",")], help="N, tokens")
    parser.add_argument("--shapes", type=lambda text: [tuple(map(int, part.split("x"))) for part in text.split(",")], help="DxH, channels and hidden channels")
    parser.add_argument("--seconds", type=float, help="of timing for each arm and size (1; quick: 0.3)")
    parser.add_argument("--minutes", type=float, default=60.0, help="no size begins later than this (60)")
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/)")
    given = parser.parse_args()
    device, start = torch.device("cuda" if torch.cuda.is_available() else "cpu"), time.monotonic()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows, shapes = QUICK[device.type] if given.quick else (ROWS[device.type], SHAPES[device.type])
    try:
        if wrong := [shape for shape in given.shapes or () if len(shape) != 2]:
            raise RunError(f"--shapes takes DxH, as 768x3072; got {'x'.join(map(str, wrong[0]))}")
        require_tests(*TESTS[device.type])
        limits, path = ceilings(device, dtype), None
        results = describe(device) | dict(dtype=str(dtype).removeprefix("torch."), ceilings=limits, rows=[], left_out=[])
        for N, (D, H) in ((N, shape) for shape in given.shapes or shapes for N in given.rows or rows):
            if time.monotonic() - start > 60 * given.minutes:
                results["left_out"].append(dict(N=N, D=D, H=H))
                continue
            results["rows"] += measure(N, D, H, given.seconds or (0.3 if given.quick else 1.0), device.type == "cuda" or not given.quick, device, dtype, limits)
            path = save("relu_squared_feed_forward", results, given.output)
            print(f"{N:,} x {D} x {H}: done", flush=True)
        if path is None:
            raise RunError(f"--minutes {given.minutes:g} left no time for a size after the tests; give more")
        save("relu_squared_feed_forward", results, given.output)
    except RunError as error:
        print(f"relu_squared_feed_forward.py: error: {error}", file=sys.stderr)
        return 1
    print(f"\n{shown(results['rows'])}\n\n{limits['flops'] / 1e12:.3g} TFLOP/s of a large product; {len(results['left_out'])} sizes left out; {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
