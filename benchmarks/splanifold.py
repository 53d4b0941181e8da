"""
Splanifold: every backend beside the feature form, the reference, eager and compiled, and a ReLU^2 MLP of as many parameters.

    python benchmarks/splanifold.py             all shapes, on a GPU if there is one
    python benchmarks/splanifold.py --quick     a few shapes and nothing compiled on a CPU: two minutes on two cores
    python benchmarks/splanifold.py --shapes dense,K4

One table, and benchmarks/results/splanifold-<device>.json, written after every shape. Arms take turns; the kernel's tests run first, and at every shape an arm
is timed only if its output and gradients are those of the float64 form. "feature" is the map as one would write it with PyTorch: six scalars times the
deviation, side by side, and one product. The MLP has the same inputs and outputs and no bias; one of as many parameters has as many FLOPs where S = 2 needs
six matrices. "% of product rate" and "% of copy": FLOPs of the matrices that a token meets (four where S = 2 and K >= 16, else six) and bytes of r, outputs,
controls and their gradients, each read or written once in a pass, at the ceilings measured in the same run.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.timing import ceilings, describe, in_turn, markdown, require_tests, save
from kernels.splanifold import SplanifoldControls, splanifold, splanifold_reference
from train_gpt import RunError

TESTS = {"cpu": ["tests/kernels/test_splanifold.py"], "cuda": ["tests/kernels/test_splanifold.py", "tests/kernels/test_splanifold_triton.py"]}
EPS = 1e-3


class Shape(NamedTuple):
    M: int
    G: int
    K: int
    N: int
    S: int = 2
    mix: str = "sum"


SHAPES = {
    "cpu": dict(dense=Shape(8192, 1, 256, 256), K32=Shape(8192, 8, 32, 32, mix="concat"), K2=Shape(8192, 128, 2, 2, mix="concat"),
                K3=Shape(8192, 64, 3, 4, mix="concat"), K4=Shape(8192, 64, 4, 4, mix="concat"), K4sum=Shape(4096, 32, 4, 256), pieces=Shape(4096, 1, 256, 256, S=5)),
    "cuda": dict(dense=Shape(65_536, 1, 768, 768), K32=Shape(65_536, 24, 32, 32, mix="concat"), K2=Shape(65_536, 384, 2, 2, mix="concat"),
                 K3=Shape(65_536, 256, 3, 3, mix="concat"), K4=Shape(65_536, 192, 4, 4, mix="concat"), K4sum=Shape(65_536, 64, 4, 768),
                 K2sum=Shape(65_536, 64, 2, 768), pieces=Shape(65_536, 1, 768, 768, S=5)),
}
QUICK = ("dense", "K32", "K4")
PRODUCTS = {"cpu": 1 << 27, "cuda": 1 << 33}  # no reference that forms more numbers, M G S N for each kind of matrix
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}  # relative RMS error of the output and of each gradient
MLP = "ReLU^2 MLP"


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """[r, the four controls, the output's gradient], all but the last with gradients."""
    M, G, K, N, S, mix = shape
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda *size, scale=1.0: (scale * torch.randn(*size, device=device, generator=generator)).to(dtype)
    inputs = [draw(M, G, K).sigmoid(), draw(G, S, N), *(draw(G, S, N, K, scale=K ** -0.5) for _ in range(3))]
    return [x.requires_grad_() for x in inputs] + [draw(M, N if mix == "sum" else G * N)]


def feature_form(r: torch.Tensor, controls: SplanifoldControls, mix: str) -> torch.Tensor:
    """S = 2: [c_1 delta, ..., c_6 delta] times the matrices side by side, one product (for "concat" one a group), and the spine's. Scalars in float32."""
    points, bases, point_tangents, base_tangents = controls
    wide = r.float()
    t = wide.mean(-1, keepdim=True)
    delta, total = (wide - t).to(r.dtype), r.shape[-1] * t
    alpha = total / (total.square() + EPS ** 2)
    h00, h01, h10, h11 = (1 + 2 * t) * (1 - t).square(), t.square() * (3 - 2 * t), t * (1 - t).square(), t.square() * (t - 1)
    scalars = torch.cat([h00, h01, h10, h11, alpha * h10, alpha * h11], -1).to(r.dtype)
    features = (scalars[..., None] * delta[..., None, :]).flatten(-2)  # (M, G, 6 K)
    matrices = torch.cat([x[:, i] for x in (bases, base_tangents, point_tangents) for i in (0, 1)], -1)  # (G, N, 6 K)
    spine = torch.cat([points, point_tangents.mean(-1)], 1)  # (G, 4, N)
    if mix == "sum":
        return features.flatten(1) @ matrices.transpose(1, 2).flatten(0, 1) + scalars[..., :4].flatten(1) @ spine.flatten(0, 1)
    return (torch.einsum("mgk,gnk->mgn", features, matrices) + torch.einsum("mgc,gcn->mgn", scalars[..., :4], spine)).flatten(1)


def backend(name: str):
    return lambda r, controls, mix: splanifold(r, controls, eps=EPS, mix=mix, backend=name)


def reference(r: torch.Tensor, controls: SplanifoldControls, mix: str) -> torch.Tensor:
    return splanifold_reference(r, controls, eps=EPS, mix=mix)


def contenders(shape: Shape, device: torch.device, compiled: bool) -> dict:
    """{arm: function(r, controls, mix) -> out}"""
    arms = {name: backend(name) for name in (["triton"] if device.type == "cuda" else []) + ["chunked"]}
    if shape.S == 2:
        arms["feature"] = feature_form
    if shape.M * shape.G * shape.S * shape.N <= PRODUCTS[device.type]:
        arms["reference"] = reference
        if compiled:
            arms["reference, compiled"] = torch.compile(reference, dynamic=False)
    return arms


def both_passes(function, inputs: list[torch.Tensor], mix: str) -> list[torch.Tensor]:
    r, *controls, grad = inputs
    out = function(r, SplanifoldControls(*controls), mix)
    return [out, *torch.autograd.grad(out, [r, *controls], grad)]


def mlp_passes(shape: Shape, inputs: list[torch.Tensor], device: torch.device, dtype: torch.dtype) -> tuple:
    """(forward, both passes) of an MLP with r's numbers as inputs and the controls' number of parameters."""
    r, *controls, grad = inputs
    x, width = r.detach().flatten(1).requires_grad_(), r.shape[1] * r.shape[2]
    hidden = max(1, round(sum(c.numel() for c in controls) / (width + grad.shape[1])))
    first, second = (torch.randn(size, device=device).mul_(size[1] ** -0.5).to(dtype).requires_grad_() for size in ((hidden, width), (grad.shape[1], hidden)))
    forward = lambda: (x @ first.t()).relu().square() @ second.t()
    return forward, lambda: torch.autograd.grad(forward(), [x, first, second], grad)


def fault(function, shape: Shape, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with an arm for at most 512 tokens, against the chunked form in float64; None if nothing is."""
    inputs = make_inputs(shape._replace(M=min(shape.M, 512)), device, dtype)
    expected = both_passes(backend("chunked"), [x.detach().double().requires_grad_(x.requires_grad) for x in inputs], shape.mix)
    try:
        errors = [((x.double() - y).norm() / y.norm()).item() for x, y in zip(both_passes(function, inputs, shape.mix), expected)]
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    wrong = not all(error < TOLERANCE[dtype] for error in errors)
    return f"wrong: relative RMS errors {', '.join(f'{error:.1e}' for error in errors)}" if wrong else None


def work(shape: Shape, element: int, backward: bool) -> tuple[int, int]:
    """(FLOPs, bytes) of the forward pass, of both with backward."""
    M, G, K, N, S, mix = shape
    matrices = 4 if S == 2 and K >= 16 else 6
    inputs, outputs, controls = M * G * K, M * N * (1 if mix == "sum" else G), G * S * N * (3 * K + 1)
    flops, numbers = 2 * M * G * N * (matrices * K + 4), inputs + outputs + controls
    return (3 * flops, element * (numbers + 2 * inputs + outputs + 2 * controls)) if backward else (flops, element * numbers)


def measure(name: str, shape: Shape, seconds: float, compiled: bool, device: torch.device, dtype: torch.dtype, limits: dict) -> list[dict]:
    """A row of results for every arm, forward and forward + backward."""
    case, inputs = dict(shape=name) | shape._asdict(), make_inputs(shape, device, dtype)
    arms = contenders(shape, device, compiled)
    faults = {arm: found for arm, function in arms.items() if (found := fault(function, shape, device, dtype))}
    rows = [case | dict(arm=arm, what="check", fault=found) for arm, found in faults.items()]
    mlp = mlp_passes(shape, inputs, device, dtype)
    for backward in (False, True):
        def call(arm, backward=backward):
            if backward:
                return both_passes(arms[arm], inputs, shape.mix)
            with torch.no_grad():
                return arms[arm](inputs[0], SplanifoldControls(*inputs[1:5]), shape.mix)
        def call_mlp(backward=backward):
            with torch.set_grad_enabled(backward):
                return mlp[backward]()
        times = in_turn({arm: lambda arm=arm: call(arm) for arm in arms if arm not in faults} | {MLP: call_mlp}, device, seconds)
        flops, moved = work(shape, dtype.itemsize, backward)
        feature = times.get("feature")
        for arm, found in times.items():
            row = case | dict(arm=arm, what="forward + backward" if backward else "forward")
            if isinstance(found, str):
                rows.append(row | dict(fault=found))
                continue
            shares = {} if arm == MLP else dict(product_share=1000 * flops / limits["flops"] / found["median"], copy_share=1000 * moved / limits["bytes"] / found["median"])
            rows.append(row | found | shares | dict(speedup=feature["median"] / found["median"] if isinstance(feature, dict) else None))
    return rows


def shown(rows: list[dict]) -> str:
    number = lambda row, name, form: form.format(row[name]) if row.get(name) is not None else "-"
    return markdown([{"shape": row["shape"], "M x G x K to N": f"{row['M']:,} x {row['G']} x {row['K']} to {row['N']}, {row['mix']}", "S": row["S"], "arm": row["arm"],
                      "pass": row["what"], "ms": row.get("fault") or number(row, "median", "{:.3g}"), "20 to 80 %": "-" if "fault" in row else f"{row['p20']:.3g} to {row['p80']:.3g}",
                      "n": row.get("n", "-"), "against feature": number(row, "speedup", "{:.2f}x"), "% of product rate": number(row, "product_share", "{:.0%}"),
                      "% of copy": number(row, "copy_share", "{:.0%}"), "peak MiB": row.get("peak_mib", "-")} for row in rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}, shorter timing")
    parser.add_argument("--shapes", type=lambda text: text.split(","), help="some of the shapes, by name")
    parser.add_argument("--seconds", type=float, help="of timing for each arm and shape (1; quick: 0.3)")
    parser.add_argument("--minutes", type=float, default=60.0, help="no shape begins later than this (60)")
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/)")
    given = parser.parse_args()
    device, start = torch.device("cuda" if torch.cuda.is_available() else "cpu"), time.monotonic()
    dtype, shapes = torch.bfloat16 if device.type == "cuda" else torch.float32, SHAPES[device.type]
    try:
        if unknown := [name for name in given.shapes or () if name not in shapes]:
            raise RunError(f"unknown shape {unknown[0]!r}; there are {', '.join(shapes)}")
        require_tests(*TESTS[device.type])
        limits, path = ceilings(device, dtype), None
        results = describe(device) | dict(dtype=str(dtype).removeprefix("torch."), ceilings=limits, rows=[], left_out=[])
        for name in given.shapes or (QUICK if given.quick else shapes):
            if time.monotonic() - start > 60 * given.minutes:
                results["left_out"].append(name)
                continue
            compiled = device.type == "cuda" or not given.quick
            results["rows"] += measure(name, shapes[name], given.seconds or (0.3 if given.quick else 1.0), compiled, device, dtype, limits)
            path = save("splanifold", results, given.output)
            print(f"{name} {tuple(shapes[name])}: done", flush=True)
        if path is None:
            raise RunError(f"--minutes {given.minutes:g} left no time for a shape after the tests; give more")
        save("splanifold", results, given.output)
    except RunError as error:
        print(f"splanifold.py: error: {error}", file=sys.stderr)
        return 1
    print(f"\n{shown(results['rows'])}\n\n{limits['flops'] / 1e12:.3g} TFLOP/s and {limits['bytes'] / 1e9:.3g} GB/s measured; {len(results['left_out'])} shapes left out; {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
