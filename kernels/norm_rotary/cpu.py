"""Norm and rotation of every head as loops, one token after the other: the package has the formulas."""

import math

from numba import prange

from kernels.loops import parallel_loop


@parallel_loop
def forward(x, stride_b, stride_t, stride_h, cosine, sine, eps, y, rho):
    """
    Writes y (B, T, H, D) and rho (B, T, H) of x, flat with these strides. cosine and sine are (T, D / 2): 1 and 0 for
    pairs that stay. The halves of a head are slices of their own, as the compiler sees no contiguous loop in an index
    that it cannot prove to be positive.
    """
    B, T, H, D = y.shape
    half = D // 2
    for token in prange(B * T):
        b, t = token // T, token % T
        c, s = cosine[t], sine[t]
        for h in range(H):
            start = b * stride_b + t * stride_t + h * stride_h
            first, second = x[start:start + half], x[start + half:start + D]
            y_first, y_second = y[b, t, h, :half], y[b, t, h, half:]

            # the norm
            square = x.dtype.type(0)
            for i in range(half):
                square += first[i] * first[i] + second[i] * second[i]
            inverse = x.dtype.type(1 / math.sqrt(square / D + eps))
            rho[b, t, h] = inverse

            # the rotation
            for i in range(half):
                y_first[i] = inverse * (first[i] * c[i] + second[i] * s[i])
                y_second[i] = inverse * (second[i] * c[i] - first[i] * s[i])


@parallel_loop
def backward(g, stride_b, stride_t, stride_h, y, cosine, sine, rho, dx):
    """Writes dx (B, T, H, D) of the gradient g, flat with these strides, of y."""
    B, T, H, D = y.shape
    half = D // 2
    for token in prange(B * T):
        b, t = token // T, token % T
        c, s = cosine[t], sine[t]
        for h in range(H):
            start = b * stride_b + t * stride_t + h * stride_h
            first, second = g[start:start + half], g[start + half:start + D]
            y_first, y_second = y[b, t, h, :half], y[b, t, h, half:]
            dx_first, dx_second = dx[b, t, h, :half], dx[b, t, h, half:]

            # mean(g y)
            along = g.dtype.type(0)
            for i in range(half):
                along += first[i] * y_first[i] + second[i] * y_second[i]
            along, inverse = g.dtype.type(along / D), rho[b, t, h]

            # rho R'(g - w y mean(g y))
            for i in range(half):
                share = along / (c[i] * c[i] + s[i] * s[i])
                u, v = first[i] - share * y_first[i], second[i] - share * y_second[i]
                dx_first[i] = inverse * (u * c[i] - v * s[i])
                dx_second[i] = inverse * (v * c[i] + u * s[i])
