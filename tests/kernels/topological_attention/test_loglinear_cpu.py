"""
Topological attention's loops on a CPU: random shapes and options against the reference in float64, equal results for
any number of threads, numbers that are not finite, the ends of arrays, the cache, memory. What both
backends of the operation owe is tested in test_topological_attention.py.
"""

import math
import random
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from kernels.backend import has_cpu_loops
from kernels.topological_attention import topological_attention_reference as reference
from kernels.topological_attention.reference import CHUNK
from tests.kernels.marks import slow
from tests.kernels.processes import run_process
from tests.kernels.topological_attention.test_topological_attention import (
    NAMES,
    check,
    inputs,
    loglinear,
    run,
    with_floats,
)

pytestmark = pytest.mark.skipif(not has_cpu_loops(), reason="needs Numba")


# ---- random shapes ----------------------------------------------------------


def random_case(seed, dtype):
    """
    Tensors in dtype, doc_start and window of a random shape with random options; small lengths are as frequent as large
    ones.
    """
    draw = random.Random(seed)
    T = round(math.exp(draw.uniform(0, math.log(700))))
    kv = draw.choice((1, 1, 2, 3))
    tensors, doc_start = inputs(
        T,
        B=draw.randint(1, 3), H=kv * draw.choice((1, 1, 2, 3)), kv=kv, D=draw.randint(1, 70), dtype=dtype,
        scale=draw.choice((1e-3, 0.3, 1, 10, 1e2, 1e4)), decay=draw.choice((0, 0, 0.02, 0.5, 20)),
        bias=draw.choice((0, 0, 1, 30)), docs=draw.choice((0, 0, 0.01, 0.1)), ties=draw.random() < 0.3,
        coordinates=draw.random() < 0.75, seed=seed
    )
    window = draw.choice((None, None, draw.randint(1, T), draw.randint(1, min(T, 80)), T + 5))
    return tensors, doc_start, window


@pytest.mark.parametrize("first", [0, *slow(*range(40, 300, 40))])
@with_floats
def test_random_shapes(relative_rms, dtype, first):
    for seed in range(first, first + 40):
        try:
            check(relative_rms, *random_case(seed, dtype))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error


@pytest.mark.slow
def test_nothing_is_read_outside_an_array(tmp_path):
    """The same shapes where every index is checked."""
    cases = [f"{Path(__file__)}::test_random_shapes[{dtype}-0]" for dtype in (torch.float32, torch.float64)]
    run_process(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "slow or not slow", *cases, cache=tmp_path,
        NUMBA_BOUNDSCHECK="1"
    )


# ---- threads ----------------------------------------------------------------


@pytest.mark.parametrize("coordinates", [True, False], ids=["coordinates", "key_only"])
@pytest.mark.parametrize("T, B, window, options", [
    (300, 5, None, dict(docs=0.01)),            # each row by itself
    (700, 2, None, dict(decay=0.1, bias=1.0)),  # the four rows by themselves for one thread, step by step for two
    (2100, 1, None, dict(H=4, ties=True)),      # levels above a subtree, several rows for a key head
    (2100, 5, None, dict(D=3, kv=1)),           # more tokens than are worked on at once
    (1500, 1, 200, dict(decay=0.1, docs=0.01, H=1, kv=1)),
])
def test_any_number_of_threads_gives_the_same_numbers(torch_threads, T, B, window, options, coordinates):
    tensors, doc_start = inputs(T, B=B, dtype=torch.float32, coordinates=coordinates, **options)
    results = []
    for threads in (1, 2, 2, 1):
        torch_threads(threads)
        results.append(run(loglinear, tensors, doc_start, window))
    for other in results[1:]:
        assert all(torch.equal(x, other[name]) for name, x in results[0].items())


def test_passes_that_run_at_once_do_not_share_memory(torch_threads):
    """A pass keeps its arrays for the next one of the same sizes, but two at once have different ones."""
    torch_threads(1)
    cases = [inputs(300, D=16, decay=0.1, dtype=torch.float32, seed=seed) for seed in range(4)]
    expected = [run(loglinear, *case) for case in cases]

    def repeat(i):
        return [run(loglinear, *cases[i]) for _ in range(10)]

    with ThreadPoolExecutor(len(cases)) as pool:
        for results, right in zip(pool.map(repeat, range(len(cases))), expected):
            assert all(torch.equal(result[name], right[name]) for result in results for name in right)


# ---- numbers that are not finite --------------------------------------------

STARTS = torch.tensor([0, 90])  # of the documents of these tests, of 200 tokens
WITHIN = 90                     # tokens of the document that has the bad number


def with_bad_number(name, bad, t, dtype, coordinates):
    """Tensors of 200 tokens whose `name` is `bad` at the token t, in the last column; and the same ones without."""
    tensors, _ = inputs(200, B=1, H=2, kv=1, D=8, dtype=dtype, decay=0.1, bias=1.0, coordinates=coordinates)
    clean = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
    with torch.no_grad():
        tensors[NAMES.index(name)][0, t].view(-1)[-1] = bad
    return tensors, clean


CASES = [
    (name, bad, coordinates)
    for name in NAMES
    for bad in (math.nan, math.inf, -math.inf)
    for coordinates in (True, False)
    if (coordinates or "coord" not in name) and (name, bad) != ("log_decay", math.inf)
]  # a decay is at most 0


def spoilt(name, t, window, out):
    """
    Where results and gradients may be asked to be NaN, by name, for a bad number at t of a document whose results by
    the reference are `out`: at queries whose result is not finite, at keys that they see. The reference itself spreads
    NaN to what is hidden: 0 times NaN.
    """
    index, window = torch.arange(WITHIN), window or WITHIN
    queries = ~out.isfinite().all(3) & (index >= t)[:, None]
    if name == "value":
        queries &= (index < t + window)[:, None]
    sees = (index <= index[:, None]) & (index > index[:, None] - window)
    keys = (sees.T.float() @ queries.float()) > 0
    decays = keys.flip(1).cummax(1).values.flip(1)
    decays[:, 0] = False
    keys = keys.any(2, keepdim=True)
    return dict(
        out=queries[..., None],
        query_coord=queries,
        key_coord=keys,
        value=keys[..., None],
        log_decay=decays,
        key_bias=keys,
    )


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("name, bad, coordinates", CASES)
@with_floats
def test_numbers_that_are_not_finite(dtype, name, bad, coordinates, window):
    """
    From the token with a bad number on, its document's results are NaN wherever the reference's are, and not finite
    wherever those are not; so are gradients. Nothing changes in a tile of scores without it: a chunk of tokens before
    it, and in another document a chunk after the first and after the window's end. (Within a tile hidden pairs have the
    weight 0, and 0 times NaN is NaN, as in the reference.)
    """
    doc_start = STARTS[torch.bucketize(torch.arange(200), STARTS, right=True) - 1][None].int()
    index = torch.arange(200)
    for t in (0, 5, 31, 47, 64, 89)[name == "log_decay":]:  # no score has a document's first decay
        tensors, clean = with_bad_number(name, bad, t, dtype, coordinates)
        got = run(loglinear, tensors, doc_start, window, dtype)
        usual = run(loglinear, clean, doc_start, window, dtype)
        alone = [None if x is None else x[:, :WITHIN].detach().double().requires_grad_() for x in tensors]
        expected = run(reference, alone, None, window, dtype)

        where = spoilt(name, t, window, expected["out"])
        for result, exact in expected.items():
            seen = got[result][:, :WITHIN]
            missing = where[result] & ((exact.isnan() & ~seen.isnan()) | (~exact.isfinite() & seen.isfinite()))
            assert not missing.any(), (dtype, t, result, missing.nonzero().tolist()[:5])

        before, elsewhere = index <= t - CHUNK, index >= max(WITHIN, t + (window or 0)) + CHUNK
        assert torch.equal(got["out"][:, before], usual["out"][:, before])
        for result, x in got.items():
            assert torch.equal(x[:, elsewhere], usual[result][:, elsewhere]), (dtype, t, result)


# ---- processes of their own -------------------------------------------------

CACHED = """
import sys
import torch
from kernels import loops
from kernels.topological_attention import loglinear_cpu as topological
from tests.errors import relative_rms
from tests.kernels.topological_attention.test_topological_attention import check, inputs

torch.set_num_threads(1)
check(relative_rms, *inputs(70, dtype=torch.float32))
functions = [topological._task, topological._codes, loops._run_alone]
print(*(f"{sum(f.stats.cache_hits.values())}/{sum(f.stats.cache_misses.values())}" for f in functions))
"""


@pytest.mark.slow
def test_loops_are_compiled_once(tmp_path):
    """The second process compiles nothing: it takes the loops from the cache and adds no file."""
    script, cache = tmp_path / "cached.py", tmp_path / "cache"
    script.write_text(CACHED)
    assert run_process(script, cache=cache).stdout.split() == ["0/1"] * 3
    files = sorted(cache.rglob("*.nb?"))
    assert run_process(script, cache=cache).stdout.split() == ["1/0"] * 3
    assert files and sorted(cache.rglob("*.nb?")) == files


# ---- memory -----------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 1000])
def test_a_long_row_takes_less_than_its_values(window):
    """NumPy's arrays, which are the loops' own, beside arguments and results, which are PyTorch's."""
    tensors, _ = inputs(16_384, B=1, H=1, kv=1, D=64, dtype=torch.float32)
    loglinear(*tensors, None, window).sum().backward()  # compiles
    size = tensors[2].numel() * tensors[2].element_size()
    tracemalloc.start()
    try:
        out = loglinear(*tensors, None, window)
        forward = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        out.sum().backward()
        backward = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 0 < forward < size and 0 < backward < size, (forward / size, backward / size)
