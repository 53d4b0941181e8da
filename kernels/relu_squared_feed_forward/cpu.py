"""The squared ReLU and its derivative as loops, each in the place of the product that it follows."""

import math

from numba import prange

from kernels.loops import parallel_loop


@parallel_loop
def square_positive(h):
    """h <- max(h, 0)^2 for h (N, H); NaN stays."""
    for i in prange(h.shape[0]):
        for j in range(h.shape[1]):
            value = h[i, j]
            if value < 0:
                value = h.dtype.type(0)
            h[i, j] = value * value


@parallel_loop
def times_slope(d, s):
    """d <- 2 sqrt(s) . d for d and s (N, H)."""
    for i in prange(d.shape[0]):
        for j in range(d.shape[1]):
            d[i, j] *= d.dtype.type(2) * math.sqrt(s[i, j])
