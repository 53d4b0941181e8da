"""
Embeddings of the same tokens from several tables: the fused lookup with its sorted backward pass beside the trainer's table(tokens).to(dtype), eager and compiled,
and beside a plain copy of the bytes that it has to move.

    python benchmarks/embedding_lookup.py             all sizes, on a GPU if there is one
    python benchmarks/embedding_lookup.py --quick     one size: under a minute on two cores
    python benchmarks/embedding_lookup.py --sizes N=65536,tables=4 N=32768,D=384,tables=1

One table, and benchmarks/results/embedding_lookup-<device>.json, written after every size. Arms take turns; the kernel's tests run first (on a CPU those of the
reference), and an arm is timed only if its results and gradients are those of the reference in float64. N tokens of V rows, the frequency of a row falling as
1 / rank (of 50,304 the first has 9 %), ranks in any order, which is harder than a vocabulary with frequent rows side by side; float32 tables, results in the
device's dtype (bfloat16 on a GPU). "% of copy": the bytes that kernels/embedding_lookup.py counts, without the sums of chunks and the sort, at the copy bandwidth
measured in the same run; the arm "copy" copies as many bytes with one call. Rows that repeat come from a cache, so forward an arm can pass 100 %.
"""

import sys
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.timing import Place, kernel_benchmark, measure_arms
from kernels.embedding_lookup import embedding_lookup, embedding_lookup_reference

import torch

FILE = "tests/kernels/test_embedding_lookup.py"
TESTS = {"cpu": [f"{FILE}::{name}" for name in ("test_reference_is_the_definition", "test_gradcheck", "test_auto_is_the_trainers_on_a_cpu")], "cuda": [FILE]}
sizes = lambda V, tokens, widths, tables: [dict(N=N, V=V, D=D, tables=K) for N, D, K in product(tokens, widths, tables)]
SIZES = {"cpu": sizes(8192, [4096], [256], [1, 3]), "cuda": sizes(50_304, [16_384, 65_536, 262_144], [768], [1, 3]) + sizes(50_304, [65_536], [384], [1, 3])}
QUICK = {"cpu": sizes(2048, [1024], [128], [2]), "cuda": sizes(50_304, [65_536], [768], [3])}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}  # relative RMS error of results and gradients


def make_inputs(N: int, V: int, D: int, tables: int, place: Place) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """(tokens (N), the tables (V, D) with a gradient, the gradients of their results)"""
    generator = torch.Generator(place.device).manual_seed(0)
    randn = lambda rows: [torch.randn(rows, D, device=place.device, generator=generator) for _ in range(tables)]
    ranks = torch.multinomial(1 / torch.arange(1, V + 1, device=place.device), N, replacement=True, generator=generator)
    tokens = torch.randperm(V, device=place.device, generator=generator)[ranks]
    return tokens, [x.requires_grad_() for x in randn(V)], [g.to(place.dtype) for g in randn(N)]


def contenders(tokens: torch.Tensor, place: Place) -> dict:
    """{arm: function(*tables) -> results}"""
    torch.compiler.reset()  # what is compiled for other sizes counts towards the number after which nothing more is
    arms = {"triton": lambda *tables: embedding_lookup(tokens, tables, place.dtype, "triton")} if place.device.type == "cuda" else {}
    trainer = lambda *tables: embedding_lookup_reference(tokens, tables, place.dtype)
    return arms | {"trainer, compiled": torch.compile(trainer, dynamic=False), "trainer": trainer}


def measure(place: Place, N: int, V: int, D: int, tables: int) -> list[dict]:
    """A row of results for every arm, forward and forward + backward."""
    e, (tokens, *inputs) = place.dtype.itemsize, make_inputs(N, V, D, tables, place)
    forward, backward = tables * N * D * (4 + e), tables * D * (N * e + 4 * V)
    wide = lambda *tables: embedding_lookup_reference(tokens, tables)
    return measure_arms(place, dict(N=N, V=V, D=D, tables=tables), contenders(tokens, place), inputs, wide, TOLERANCE[place.dtype],
                        (dict(moved=forward), dict(moved=forward + backward)))


if __name__ == "__main__":
    sys.exit(kernel_benchmark("embedding_lookup", __doc__, measure, TESTS, SIZES, QUICK))
