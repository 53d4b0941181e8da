"""
Scaled sums of two streams and the RMSNorm that follows, row by row: the package has the formulas.
"""

import math

from numba import prange

from kernels.loops import loop, parallel_loop


@loop
def _sum_of_row(x, y, a, b, z):
    """z <- a x + b y; returns the sum of its squares."""
    square = x.dtype.type(0)
    for i in range(len(z)):
        value = a * x[i] + b * y[i]
        z[i] = value
        square += value * value
    return square


@loop
def _scale_row(z, factor, h):
    for i in range(len(z)):
        h[i] = factor * z[i]


@parallel_loop
def forward(x, y, scales, eps, z, h, rho):
    """z = scales[0] x + scales[1] y of rows (N, D), its norm h, and rho (N)."""
    a, b = scales[0], scales[1]
    for row in prange(len(x)):
        square = _sum_of_row(x[row], y[row], a, b, z[row])
        rho[row] = x.dtype.type(1 / math.sqrt(square / x.shape[1] + eps))
        _scale_row(z[row], rho[row], h[row])


@loop
def _normed_gradient(gz, gh, h, rho, with_gz, g):
    """g <- the gradient of z: gz + rho (gh - h mean(gh h))."""
    along = g.dtype.type(0)
    for i in range(len(g)):
        along += gh[i] * h[i]
    along = g.dtype.type(along / len(g))
    if with_gz:
        for i in range(len(g)):
            g[i] = gz[i] + rho * (gh[i] - along * h[i])
    else:
        for i in range(len(g)):
            g[i] = rho * (gh[i] - along * h[i])


@loop
def _scaled_gradients(g, x, y, a, b, dx, dy):
    """dx <- a g, dy <- b g; returns <g, x> and <g, y>. dx may be g."""
    along_x, along_y = g.dtype.type(0), g.dtype.type(0)
    for i in range(len(g)):
        along_x += g[i] * x[i]
        along_y += g[i] * y[i]
    for i in range(len(g)):
        dy[i] = b * g[i]
    for i in range(len(g)):
        dx[i] = a * g[i]
    return along_x, along_y


@parallel_loop
def backward(gz, gh, x, y, scales, h, rho, dx, dy, dscales):
    """
    dx, dy and, for every row, dscales (N, 2) of the gradients gz of z, which may have no rows, and gh of h. Without
    rows in dy the sum is plain, and dx, the gradient of z, is that of both.
    """
    a, b = scales[0], scales[1]
    for row in prange(len(dx)):
        g = dx[row]
        _normed_gradient(gz[row] if len(gz) > 0 else gh[row], gh[row], h[row], rho[row], len(gz) > 0, g)
        if len(dy) > 0:
            dscales[row, 0], dscales[row, 1] = _scaled_gradients(g, x[row], y[row], a, b, dx[row], dy[row])
