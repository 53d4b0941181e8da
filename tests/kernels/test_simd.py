"""
Vectors of 8 numbers for Numba's loops: every function against NumPy, at odd offsets too, and the check of an array's
ends.
"""

import numpy as np
import pytest
import torch

numba = pytest.importorskip("numba")

from kernels import simd
from kernels.loops import loop
from kernels.topological_attention.reference import LOWEST
from tests.errors import float_bound
from tests.kernels.processes import run_process

FLOATS = (np.float32, np.float64)


def numbers(dtype, seed):
    """
    Numbers of all magnitudes: normal, subnormal, zeros of both signs, infinite, NaN; in another order for every seed.
    """
    generator = np.random.default_rng(seed)
    kind = np.finfo(dtype)
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, kind.tiny / 4, -kind.tiny / 4, kind.smallest_subnormal, kind.max,
               kind.min, 1.0, -1.0]
    usual = generator.standard_normal(400)
    wide = generator.standard_normal(88) * 2.0 ** generator.integers(-60, 60, 88)
    return generator.permutation(np.concatenate((special * 2, usual, wide)).astype(dtype))


@loop
def _apply(a, b, c, results, totals, narrow):
    for i in range(0, a.size, 8):
        x, y, z = simd.load(a, i), simd.load(b, i), simd.load(c, i)
        simd.store(results[0], i, x + y)
        simd.store(results[1], i, x - y)
        simd.store(results[2], i, x * y)
        simd.store(results[3], i, simd.madd(x, y, z))
        simd.store(results[4], i, simd.largest(x, y))
        simd.store(results[5], i, simd.distance(x, y))
        simd.store(results[6], i, simd.select(x, y, z, x))
        simd.store(results[7], i, simd.splat(a[i]))
        simd.store(narrow, i, simd.cast(x, narrow))
        totals[i // 8] = simd.total(x)


@pytest.mark.parametrize("dtype", FLOATS)
def test_operations(dtype):
    a, b, c = (numbers(dtype, seed) for seed in range(3))
    results, totals, narrow = np.empty((8, a.size), dtype), np.empty(a.size // 8, dtype), np.empty(a.size, np.float32)
    _apply(a, b, c, results, totals, narrow)
    with np.errstate(all="ignore"):
        larger, chosen, first = np.where(a > b, a, b), np.where(a > b, c, a), a[::8].repeat(8)
        exact = [a + b, a - b, a * b, None, larger, np.abs(a - b), chosen, first]
        for result, expected in zip(results, exact):
            if expected is not None:
                np.testing.assert_array_equal(result, expected)
        np.testing.assert_array_equal(narrow, a.astype(np.float32))

        # one rounding or two, of a product that may overflow between them
        product = a * b
        result, terms = results[3], np.abs(product) + np.abs(c)
        finite = np.isfinite(terms)
        error = np.abs(result[finite] - (product + c)[finite])
        assert (error <= 2 * np.finfo(dtype).eps * terms[finite] + np.finfo(dtype).smallest_subnormal).all()
        assert np.isnan(result[np.isnan(a) | np.isnan(b) | np.isnan(c)]).all()

        # sums in any order
        eights = a.reshape(-1, 8)
        absolute = np.abs(eights).sum(1)
        finite = np.isfinite(absolute)
        error = np.abs(totals[finite] - eights.sum(1)[finite])
        assert (error <= float_bound(8, torch.float32 if dtype == np.float32 else torch.float64)
                * absolute[finite]).all()
        assert np.isnan(totals[np.isnan(eights).any(1)]).all()


@loop
def _move(x, i, y, j):
    simd.store(y, j, simd.load(x, i))


@pytest.mark.parametrize("dtype", FLOATS)
def test_load_and_store_at_any_offset(dtype):
    """8 numbers and none beside them."""
    x = np.arange(40).astype(dtype)
    for i in range(33):
        for j in (0, 1, 3, 7, 12, 31, 32):
            y = np.full(40, -1, dtype)
            _move(x, i, y, j)
            expected = np.full(40, -1, dtype)
            expected[j:j + 8] = x[i:i + 8]
            np.testing.assert_array_equal(y, expected)


def check_exp2(function, dtype, least, greatest):
    """
    function(x, y) sets y to 2^x within 4 eps, also where that is subnormal (to the numbers there), to 0 below `least`
    and to infinity from `greatest` on, as it does for the infinities; NaN stays NaN.
    """
    x = np.concatenate((np.linspace(-1, 1, 4001), np.linspace(least - 3, greatest + 3, 20_001),
                        np.arange(-1100.0, 1100.0), numbers(dtype, 0), [LOWEST, -LOWEST],
                        np.nextafter(np.array([least, greatest], dtype), dtype(0))))
    x = np.pad(x.astype(dtype), (0, -x.size % 8))
    y = np.empty_like(x)
    function(x, y)
    kind = np.finfo(dtype)
    with np.errstate(all="ignore"):
        expected = np.exp2(x.astype(np.longdouble))
    assert np.isnan(y[np.isnan(x)]).all()
    assert (y[x < least] == 0).all() and (y[x >= greatest] == np.inf).all()
    inside = (x >= least) & (x < greatest)
    error = np.abs(y[inside] - expected[inside])
    assert (error <= 4 * kind.eps * expected[inside] + kind.smallest_subnormal).all()


@loop
def _exp2(x, y):
    for i in range(0, x.size, 8):
        simd.store(y, i, simd.exp2(simd.load(x, i)))


@pytest.mark.parametrize("dtype, least, greatest", [(np.float32, -126.5, 127.5), (np.float64, -1075.0, 1024.0)])
def test_exp2(dtype, least, greatest):
    check_exp2(_exp2, dtype, least, greatest)


OUTSIDE = """
from typing import NamedTuple
import numpy as np
import pytest
from kernels import simd
from kernels.loops import inner_loop, loop, run_stages

@loop
def read(x, i, y):
    simd.store(y, 0, simd.load(x, i))

@loop
def write(x, i, y):
    simd.store(x, i, simd.load(y, 0))

class State(NamedTuple):
    x: np.ndarray
    y: np.ndarray

@inner_loop
def read_in_a_stage(stage, task, thread, state):
    simd.store(state.y, 0, simd.load(state.x, 10 * task))

x, y = np.zeros(20), np.zeros(8)
for function in (read, write):
    for i in (0, 12):
        function(x, i, y)
    for i in (-1, 13, 20, 10**9):
        with pytest.raises(IndexError, match="outside its array"):
            function(x, i, y)
run_stages(read_in_a_stage, [1, 2], State(x, y))
with pytest.raises(IndexError, match="outside its array"):
    run_stages(read_in_a_stage, [2, 3], State(x, y))
"""


def test_bounds_are_checked_where_asked(tmp_path):
    """With NUMBA_BOUNDSCHECK=1 a vector outside its array is an error, also in a task of a stage."""
    script = tmp_path / "outside.py"
    script.write_text(OUTSIDE)
    run_process(script, cache=tmp_path, NUMBA_BOUNDSCHECK="1")
