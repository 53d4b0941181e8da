"""
Are probability maps without exponentials faster than softmax? Rows of scores; whether they are less over-confident is
studies/probability_maps.py's question.

    python -m benchmarks.probability_maps             2^22 scores in rows of 16 to 50,257
    python -m benchmarks.probability_maps --quick     a reduced run: proves that it runs, measures nothing

p = map(x) for 2^22 scores in rows of n, eager and compiled, each against softmax of the same kind; forward, and forward
+ backward. One table, and benchmarks/results/probability_maps-<device>.json; the maps' tests run first.
Source: the claim is lof310/projects' of an unpublished normaliser.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

from benchmarks.timing import describe, in_turn, markdown, require_tests, save
from data.command_line import run_script
from kernels.probability_maps import MAPS, probability_map

TESTS = ["tests/kernels/test_probability_maps.py"]
SIZES = (16, 64, 256, 1024, 50_257)
COMPILED = ("softmax", "max_shift_rational", "stablemax", "squareplus")


def functions_of(name: str, x: torch.Tensor, grad: torch.Tensor, compiled: bool) -> dict:
    """{(map, part): function} of scores x (rows, n) and the gradient of their probabilities."""
    function = partial(probability_map, name=name)
    if compiled:
        function = torch.compile(lambda x: probability_map(x, name), dynamic=False)
    return {(name, "forward"): lambda: function(x.detach()),
            (name, "both"): lambda: torch.autograd.grad(function(x), x, grad)}


def measure(device: torch.device, sizes=SIZES, numbers: int = 1 << 22, seconds: float = 0.5,
            compiled: bool = True) -> list[dict]:
    """A row for each size, map and kind: milliseconds forward and forward + backward."""
    torch._dynamo.config.recompile_limit = 64  # one function's code stands for all maps: beyond it would run eagerly
    kinds = dict(eager=tuple(MAPS))
    if compiled:
        kinds["compiled"] = COMPILED
    rows = []
    for n in sizes:
        x = torch.randn(max(1, numbers // n), n, device=device, requires_grad=True)
        grad = torch.randn_like(x)
        for kind, names in kinds.items():
            functions = {}
            for name in names:
                functions |= functions_of(name, x, grad, kind == "compiled")
            times = in_turn(functions, device, seconds)
            rows += [dict(n=n, kind=kind, map=name, part=part, ms=ms) for (name, part), ms in times.items()]
    return rows


def shown(rows: list[dict]) -> str:
    """The rows as Markdown, each beside softmax of its kind."""
    def median(row: dict) -> float:
        return row["ms"]["median"] if isinstance(row["ms"], dict) else float("nan")

    softmax = {(row["n"], row["kind"], row["part"]): median(row) for row in rows if row["map"] == "softmax"}
    lines = {}
    for row in rows:
        ratio = median(row) / softmax[row["n"], row["kind"], row["part"]]
        line = lines.setdefault((row["n"], row["kind"], row["map"]), dict(n=row["n"], kind=row["kind"], map=row["map"]))
        title = "forward (against softmax)" if row["part"] == "forward" else "forward + backward"
        line[title] = f"{median(row):.3g} ms ({ratio:.2f})"
    return markdown(list(lines.values()))


def run(options: argparse.Namespace):
    """Measure, write and print."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    require_tests(*TESTS)
    rows = measure(device, SIZES[:1], 1 << 12, 0.001, compiled=False) if options.quick else measure(device)
    path = save("probability_maps", describe(device) | dict(quick=options.quick, speed=rows), options.output)
    print(f"{shown(rows)}\n{path}")


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0, 1 for a fault (one line on stderr), 130 when interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a reduced run that proves nothing but that it runs")
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/)")
    options = parser.parse_args(argv)
    return run_script("probability_maps.py", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
