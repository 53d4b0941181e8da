"""
Embeddings of the same tokens from several tables: the fused lookup with its sorted backward pass beside the trainer's
table(tokens).to(dtype), eager and compiled, and beside a plain copy of the bytes that it has to move.

    python -m benchmarks.embedding_lookup             all sizes, on a GPU if there is one
    python -m benchmarks.embedding_lookup --quick     one size: under a minute on two cores
    python -m benchmarks.embedding_lookup --sizes N=65536,tables=4 N=32768,D=384,tables=1

One table, and benchmarks/results/embedding_lookup-<device>.json, written after every size. Arms take turns; the
kernel's tests run first (on a CPU those of the reference), and an arm is timed only if its results and gradients are
those of the reference in float64. N tokens of V rows, the frequency of a row falling as 1 / rank (of 50,304 the first
has 9 %), ranks in any order, which is harder than a vocabulary with frequent rows side by side; float32 tables, results
in the device's dtype (bfloat16 on a GPU). "% of copy": the bytes that kernels/embedding_lookup.py counts, without the
sums of chunks and the sort, at the copy bandwidth measured in the same run; the arm "copy" copies as many bytes with
one call. Rows that repeat come from a cache, so forward an arm can pass 100 %.
"""

import sys

import torch

from benchmarks.timing import Place, compile_arms, kernel_benchmark, measure_arms, sizes
from kernels.embedding_lookup import embedding_lookup, embedding_lookup_reference

FILE = "tests/kernels/test_embedding_lookup.py"
CPU_TESTS = ("test_reference_is_the_definition", "test_gradcheck", "test_auto_is_the_trainers_on_a_cpu")
TESTS = {"cpu": [f"{FILE}::{name}" for name in CPU_TESTS], "cuda": [FILE]}
NAMES = "N V D tables"
SIZES = {
    "cpu": sizes(NAMES, (4096, 8192, 256, 1), (4096, 8192, 256, 3)),
    "cuda": sizes(NAMES, *((N, 50_304, 768, K) for N in (16_384, 65_536, 262_144) for K in (1, 3)),
                  (65_536, 50_304, 384, 1), (65_536, 50_304, 384, 3)),
}
QUICK = {"cpu": sizes(NAMES, (1024, 2048, 128, 2)), "cuda": sizes(NAMES, (65_536, 50_304, 768, 3))}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}  # relative RMS error of results and gradients


def make_inputs(N: int, V: int, D: int, tables: int, place: Place) -> tuple[torch.Tensor, list, list]:
    """(tokens (N), the tables (V, D) with a gradient, the gradients of their results (N, D))"""
    generator = torch.Generator(place.device).manual_seed(0)
    ranks = torch.multinomial(1 / torch.arange(1, V + 1, device=place.device), N, replacement=True, generator=generator)
    tokens = torch.randperm(V, device=place.device, generator=generator)[ranks]

    def draw(rows: int) -> list[torch.Tensor]:
        return [torch.randn(rows, D, device=place.device, generator=generator) for _ in range(tables)]
    return tokens, [x.requires_grad_() for x in draw(V)], [g.to(place.dtype) for g in draw(N)]


def contenders(tokens: torch.Tensor, place: Place) -> dict:
    """{arm: function(*tables) -> results}"""
    def triton(*tables):
        return embedding_lookup(tokens, tables, place.dtype, "triton")

    def trainer(*tables):
        return embedding_lookup_reference(tokens, tables, place.dtype)

    arms = {"triton": triton} if place.device.type == "cuda" else {}
    return arms | compile_arms(trainer=trainer) | {"trainer": trainer}


def measure(place: Place, N: int, V: int, D: int, tables: int) -> list[dict]:
    """A row of results for every arm, forward and forward + backward."""
    tokens, *inputs = make_inputs(N, V, D, tables, place)
    element = place.dtype.itemsize
    forward, backward = tables * N * D * (4 + element), tables * D * (N * element + 4 * V)

    def reference(*tables):
        return embedding_lookup_reference(tokens, tables)
    return measure_arms(place, dict(N=N, V=V, D=D, tables=tables), contenders(tokens, place), inputs, reference,
                        TOLERANCE[place.dtype], (dict(moved=forward), dict(moved=forward + backward)))


if __name__ == "__main__":
    sys.exit(kernel_benchmark("embedding_lookup", __doc__, measure, TESTS, SIZES, QUICK))
