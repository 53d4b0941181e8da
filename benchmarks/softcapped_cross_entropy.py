"""
Cross-entropy of softcapped logits: the fused kernel beside the trainer's loss and the reference with all logits at once, both compiled.

    python benchmarks/softcapped_cross_entropy.py             all sizes, on a GPU if there is one
    python benchmarks/softcapped_cross_entropy.py --quick     one small size: under a minute
    python benchmarks/softcapped_cross_entropy.py --tokens 65536 --widths 768,1024 --vocabularies 50304

One table, and benchmarks/results/softcapped_cross_entropy-<device>.json, written after every size. Arms take turns; the kernel's tests run first (on a CPU those of
the reference), and an arm is timed only if its loss and gradients are those of the reference in float64. "forward": the loss alone, without gradients; "forward +
backward": with both. Weights are float32, as the trainer's. "% of products": the time that the 2 N D V FLOPs of the logits, or the 6 N D V of all three products,
would take at the rate of a large product measured in the same run.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.timing import ceilings, describe, in_turn, markdown, require_tests, save
from kernels.softcapped_cross_entropy import softcapped_cross_entropy, softcapped_cross_entropy_reference
from train_gpt import RunError, SoftcappedCrossEntropy, loss_of_chunk

FILE = "tests/kernels/test_softcapped_cross_entropy.py"
TESTS = {"cpu": [f"{FILE}::{name}" for name in ("test_reference_is_the_definition", "test_gradcheck", "test_compiled_reference_equals_eager")], "cuda": [FILE]}
SIZES = {"cpu": ([512, 2048], [64], [4096]), "cuda": ([16_384, 65_536], [768, 1024], [50_304])}  # tokens, widths, vocabularies
QUICK = {"cpu": ([256], [64], [1024]), "cuda": ([16_384], [768], [50_304])}
SOFTCAP, CHUNK = 15.0, 4096
FP8 = "triton, fp8"
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, FP8: 1e-1}  # relative RMS error of each gradient; of the loss a tenth


def make_inputs(N: int, D: int, V: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weight, targets, for logits of standard deviation 1."""
    generator = torch.Generator(device).manual_seed(0)
    x, weight = torch.randn(N, D, device=device, generator=generator).to(dtype), torch.randn(V, D, device=device, generator=generator) / D ** 0.5
    return x.requires_grad_(), weight.requires_grad_(), torch.randint(0, V, (N,), device=device, generator=generator)


def trainer_loss(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """LanguageModelHead's sum, with and without gradients."""
    if torch.is_grad_enabled():
        return SoftcappedCrossEntropy.apply(x, weight, targets, SOFTCAP, CHUNK)
    weight = weight.type_as(x)
    return sum(loss_of_chunk(part, weight, target, SOFTCAP)[0] for part, target in zip(x.split(CHUNK), targets.split(CHUNK)))


def contenders(device: torch.device) -> dict:
    """{arm: function(x, weight, targets) -> loss}"""
    torch.compiler.reset()  # what is compiled for other sizes counts towards the number after which nothing more is
    arms = {"triton": partial(softcapped_cross_entropy, softcap=SOFTCAP, chunk=CHUNK, backend="triton")} if device.type == "cuda" else {}
    if device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
        arms[FP8] = partial(arms["triton"], fp8=True)
    reference = partial(softcapped_cross_entropy_reference, softcap=SOFTCAP)
    return arms | {"trainer, compiled": torch.compile(trainer_loss, dynamic=False), "reference, compiled": torch.compile(reference, dynamic=False)}


def both_passes(function, inputs: tuple) -> list[torch.Tensor]:
    loss = function(*inputs)
    return [loss, *torch.autograd.grad(loss, inputs[:2])]


def loss_alone(function, inputs: tuple) -> torch.Tensor:
    with torch.no_grad():
        return function(*inputs)


def exact(inputs: tuple, rows: int = CHUNK) -> list[torch.Tensor]:
    """both_passes of the reference in float64, on the weight in x's dtype, some rows at a time."""
    x, weight, targets = inputs[0].detach(), inputs[1].detach().to(inputs[0].dtype).double().requires_grad_(), inputs[2]
    parts = [both_passes(partial(softcapped_cross_entropy_reference, softcap=SOFTCAP), (part.double().requires_grad_(), weight, target))
             for part, target in zip(x.split(rows), targets.split(rows))]
    losses, dx, dw = zip(*parts)
    return [torch.stack(losses).sum().detach(), torch.cat(dx), sum(dw)]


def fault(function, inputs: tuple, expected: list[torch.Tensor], tolerance: float) -> str | None:
    """What is wrong with an arm; None if nothing is."""
    try:
        results = [loss_alone(function, inputs), *both_passes(function, inputs)]
        errors = [((x.double() - y).norm() / y.norm()).item() for x, y in zip(results, [expected[0], *expected])]
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    wrong = not all(error < limit for error, limit in zip(errors, [tolerance / 10] * 2 + [tolerance] * 2))
    return f"wrong: relative RMS errors {', '.join(f'{error:.1e}' for error in errors)}" if wrong else None


def measure(N: int, D: int, V: int, seconds: float, device: torch.device, dtype: torch.dtype, limits: dict) -> list[dict]:
    """A row of results for every arm, forward and forward + backward."""
    case, inputs, arms = dict(N=N, D=D, V=V), make_inputs(N, D, V, device, dtype), contenders(device)
    expected = exact(inputs)
    faults = {arm: found for arm, function in arms.items() if (found := fault(function, inputs, expected, TOLERANCE[FP8 if arm == FP8 else dtype]))}
    del expected
    rows = [case | dict(arm=arm, what="check", fault=found) for arm, found in faults.items()]
    for what, call, products in (("forward", loss_alone, 1), ("forward + backward", both_passes, 3)):
        calls = {arm: partial(call, function, inputs) for arm, function in arms.items() if arm not in faults}
        for arm, found in in_turn(calls, device, seconds).items():
            row, ideal = case | dict(arm=arm, what=what), 1000 * products * 2 * N * D * V / limits["flops"]
            rows.append(row | (dict(fault=found) if isinstance(found, str) else found | dict(product_share=ideal / found["median"])))
    return rows


def shown(rows: list[dict]) -> str:
    number = lambda row, name, form: form.format(row[name]) if row.get(name) is not None else "-"
    return markdown([{"N x D x V": f"{row['N']:,} x {row['D']} x {row['V']:,}", "arm": row["arm"], "pass": row["what"],
                      "ms": row.get("fault") or number(row, "median", "{:.3g}"), "20 to 80 %": "-" if "fault" in row else f"{row['p20']:.3g} to {row['p80']:.3g}",
                      "n": row.get("n", "-"), "% of products": number(row, "product_share", "{:.0%}"), "peak MiB": row.get("peak_mib", "-")} for row in rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(part) for part in text.split(",")]
    parser.add_argument("--quick", action="store_true", help="one size, shorter timing")
    parser.add_argument("--tokens", type=numbers, help="N")
    parser.add_argument("--widths", type=numbers, help="D, channels")
    parser.add_argument("--vocabularies", type=numbers, help="V, with padding")
    parser.add_argument("--seconds", type=float, help="of timing for each arm and size (1; quick: 0.3)")
    parser.add_argument("--minutes", type=float, default=60.0, help="no size begins later than this (60)")
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/)")
    given = parser.parse_args()
    device, start = torch.device("cuda" if torch.cuda.is_available() else "cpu"), time.monotonic()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens, widths, vocabularies = (QUICK if given.quick else SIZES)[device.type]
    try:
        require_tests(*TESTS[device.type])
        limits, path = ceilings(device, dtype), None
        results = describe(device) | dict(dtype=str(dtype).removeprefix("torch."), ceilings=limits, rows=[], left_out=[])
        for V, D, N in ((V, D, N) for V in given.vocabularies or vocabularies for D in given.widths or widths for N in given.tokens or tokens):
            if time.monotonic() - start > 60 * given.minutes:
                results["left_out"].append(dict(N=N, D=D, V=V))
                continue
            results["rows"] += measure(N, D, V, given.seconds or (0.3 if given.quick else 1.0), device, dtype, limits)
            path = save("softcapped_cross_entropy", results, given.output)
            print(f"{N:,} x {D} x {V:,}: done", flush=True)
        if path is None:
            raise RunError(f"--minutes {given.minutes:g} left no time for a size after the tests; give more")
        save("softcapped_cross_entropy", results, given.output)
    except RunError as error:
        print(f"softcapped_cross_entropy.py: error: {error}", file=sys.stderr)
        return 1
    print(f"\n{shown(results['rows'])}\n\n{limits['flops'] / 1e12:.3g} TFLOP/s of a large product; {len(results['left_out'])} sizes left out; {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
