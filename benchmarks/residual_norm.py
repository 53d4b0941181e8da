"""
Residual and RMSNorm in one pass: the fused kernel beside the reference, eager and compiled, and beside a plain copy of the bytes that it has to move.

    python benchmarks/residual_norm.py             all forms and sizes, on a GPU if there is one
    python benchmarks/residual_norm.py --quick     one size, on a CPU one form: under a minute on two cores
    python benchmarks/residual_norm.py --rows 16384,65536 --widths 768 --forms plain,channel

One table, and benchmarks/results/residual_norm-<device>.json, written after every size. Arms take turns; the kernel's tests run first (on a CPU those of the
reference), and an arm is timed only if its results and gradients are those of the reference in float64. Forms: "plain" x + y, "scalar" and "channel" gains
alpha and beta, "weight" channel gains and a weight of the norm. "forward" keeps what the backward pass needs. "% of copy": the bytes that
kernels/residual_norm.py counts, 4A forward and with the backward pass 10A (plain: 8A), at the copy bandwidth measured in the same run; the arm "copy" copies
as many bytes with one call.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.timing import ceilings, describe, in_turn, markdown, require_tests, save
from kernels.residual_norm import residual_norm, residual_norm_reference
from train_gpt import RunError

FILE = "tests/kernels/test_residual_norm.py"
TESTS = {"cpu": [f"{FILE}::{name}" for name in ("test_reference_is_the_definition", "test_gradcheck", "test_compiled_reference_equals_eager")], "cuda": [FILE]}
FORMS = ("plain", "scalar", "channel", "weight")
ROWS = {"cpu": [4096, 16_384], "cuda": [16_384, 65_536, 262_144]}
WIDTHS = {"cpu": [768], "cuda": [768, 1024, 2048]}
QUICK = {"cpu": ([4096], [768], ["scalar"]), "cuda": ([65_536], [768], list(FORMS))}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}  # relative RMS error of the results and of each gradient
COPY = "copy"


def make_inputs(form: str, N: int, D: int, device: torch.device, dtype: torch.dtype) -> tuple[dict, list[torch.Tensor]]:
    """({argument: tensor with a gradient}, [gradients of z and h])"""
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda *shape: torch.randn(shape, device=device, generator=generator)
    tensors = dict(x=draw(N, D).to(dtype), y=draw(N, D).to(dtype))
    if form != "plain":
        tensors |= {name: 1 + 0.1 * draw(*(() if form == "scalar" else (D,))) for name in ("alpha", "beta")}
    if form == "weight":
        tensors["weight"] = 1 + 0.1 * draw(D)
    return {name: x.requires_grad_() for name, x in tensors.items()}, [draw(N, D).to(dtype) for _ in range(2)]


def contenders(device: torch.device) -> dict:
    """{arm: function(**tensors) -> (z, h)}"""
    torch.compiler.reset()  # what is compiled for other sizes counts towards the number after which nothing more is
    arms = {"triton": lambda **tensors: residual_norm(**tensors, backend="triton")} if device.type == "cuda" else {}
    return arms | {"reference, compiled": torch.compile(residual_norm_reference, dynamic=False), "reference": residual_norm_reference}


def both_passes(function, tensors: dict, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    results = function(**tensors)
    return [*results, *torch.autograd.grad(results, list(tensors.values()), gradients)]


def fault(function, inputs: tuple) -> str | None:
    """What is wrong with an arm, against the reference in float64; None if nothing is. The sum of N D numbers of both signs counts as sqrt(N D) at least."""
    tensors, gradients = inputs
    wide = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    expected = both_passes(residual_norm_reference, wide, [g.double() for g in gradients])
    least = lambda y: tensors["x"].numel() ** 0.5 if y.numel() == 1 else 0.0
    try:
        errors = [((x.double() - y).norm() / y.norm().clamp_min(least(y))).item() for x, y in zip(both_passes(function, *inputs), expected)]
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    wrong = not all(error < TOLERANCE[tensors["x"].dtype] for error in errors)
    return f"wrong: relative RMS errors {', '.join(f'{error:.1e}' for error in errors)}" if wrong else None


def measure(form: str, N: int, D: int, seconds: float, device: torch.device, dtype: torch.dtype, limits: dict) -> list[dict]:
    """A row of results for every arm, forward and forward + backward."""
    case, inputs, arms = dict(form=form, N=N, D=D), make_inputs(form, N, D, device, dtype), contenders(device)
    faults = {arm: found for arm, function in arms.items() if (found := fault(function, inputs))}
    rows = [case | dict(arm=arm, what="check", fault=found) for arm, found in faults.items()]
    for backward in (False, True):
        moved = N * D * dtype.itemsize * ((8 if form == "plain" else 10) if backward else 4)
        source, target = (torch.zeros(moved // 2, dtype=torch.int8, device=device) for _ in range(2))
        call = lambda arm, backward=backward: both_passes(arms[arm], *inputs) if backward else arms[arm](**inputs[0])
        calls = {arm: lambda arm=arm: call(arm) for arm in arms if arm not in faults} | {COPY: lambda: target.copy_(source)}
        for arm, found in in_turn(calls, device, seconds).items():
            row = case | dict(arm=arm, what="forward + backward" if backward else "forward")
            rows.append(row | (dict(fault=found) if isinstance(found, str) else found | dict(copy_share=1000 * moved / limits["bytes"] / found["median"])))
    return rows


def shown(rows: list[dict]) -> str:
    number = lambda row, name, form: form.format(row[name]) if row.get(name) is not None else "-"
    return markdown([{"form": row["form"], "N x D": f"{row['N']:,} x {row['D']}", "arm": row["arm"], "pass": row["what"], "ms": row.get("fault") or number(row, "median", "{:.3g}"),
                      "20 to 80 %": "-" if "fault" in row else f"{row['p20']:.3g} to {row['p80']:.3g}", "n": row.get("n", "-"),
                      "% of copy": number(row, "copy_share", "{:.0%}"), "peak MiB": row.get("peak_mib", "-")} for row in rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(part) for part in text.split(",")]
    parser.add_argument("--quick", action="store_true", help="one size, shorter timing, on a CPU one form")
    parser.add_argument("--rows", type=numbers, help="N, tokens")
    parser.add_argument("--widths", type=numbers, help="D, channels")
    parser.add_argument("--forms", type=lambda text: text.split(","), help=f"some of {', '.join(FORMS)}")
    parser.add_argument("--seconds", type=float, help="of timing for each arm and size (1; quick: 0.3)")
    parser.add_argument("--minutes", type=float, default=60.0, help="no size begins later than this (60)")
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/)")
    given = parser.parse_args()
    device, start = torch.device("cuda" if torch.cuda.is_available() else "cpu"), time.monotonic()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows, widths, forms = QUICK[device.type] if given.quick else (ROWS[device.type], WIDTHS[device.type], FORMS)
    try:
        if unknown := [form for form in given.forms or () if form not in FORMS]:
            raise RunError(f"unknown form {unknown[0]!r}; there are {', '.join(FORMS)}")
        require_tests(*TESTS[device.type])
        limits, path = ceilings(device, dtype), None
        results = describe(device) | dict(dtype=str(dtype).removeprefix("torch."), ceilings=limits, rows=[], left_out=[])
        for form, N, D in ((form, N, D) for form in given.forms or forms for D in given.widths or widths for N in given.rows or rows):
            if time.monotonic() - start > 60 * given.minutes:
                results["left_out"].append(dict(form=form, N=N, D=D))
                continue
            results["rows"] += measure(form, N, D, given.seconds or (0.3 if given.quick else 1.0), device, dtype, limits)
            path = save("residual_norm", results, given.output)
            print(f"{form}, {N:,} x {D}: done", flush=True)
        if path is None:
            raise RunError(f"--minutes {given.minutes:g} left no time for a size after the tests; give more")
        save("residual_norm", results, given.output)
    except RunError as error:
        print(f"residual_norm.py: error: {error}", file=sys.stderr)
        return 1
    print(f"\n{shown(results['rows'])}\n\n{limits['bytes'] / 1e9:.3g} GB/s copied; {len(results['left_out'])} sizes left out; {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
