"""Loss and gradient of softcapped logits in their place: the package has the formulas."""

import math

import numpy as np
from numba import prange

from kernels.loops import LOG2_E, exp2_f32, inline_loop, parallel_loop

ONE = np.float32(1)
LOWEST, HIGHEST = np.int32(-2**31), np.int32(2**31 - 1)


@inline_loop
def _cap(s, softcap, towards):
    """
    Returns (c tanh(s / c), its slope) from e = 2^(-2 |s| log2(e) / c), `towards` times |s| being that exponent: the
    slope, 4 e / (1 + e)^2, keeps its digits where tanh is near 1. softcap 0: (s, 1).
    """
    e = exp2_f32(towards * abs(s))
    inverse = ONE / (ONE + e)
    z = softcap * ((ONE - e) * inverse)
    z = -z if s < 0 else z
    return (z, np.float32(4) * e * inverse * inverse) if softcap > 0 else (s, ONE)


@inline_loop
def _largest(row):
    """
    Returns the largest of a row of float32, or a NaN: by integers in the order of the floats, whose maximum is
    vectorised, as one of numbers that may be NaN is not.
    """
    bits, largest = row.view(np.int32), LOWEST
    for v in range(len(bits)):
        largest = max(largest, np.int32(bits[v] ^ ((bits[v] >> np.int32(31)) & HIGHEST)))
    return np.int32(largest ^ ((largest >> np.int32(31)) & HIGHEST)).view(np.float32)


@parallel_loop
def loss_and_gradient(s, targets, softcap, with_gradient, loss):
    """
    Writes the loss (n) of logits s (n, V) before the cap, float32, and with_gradient their gradient in the place of s.
    As the cap is monotone, the largest capped logit is that of the largest one, which bounds the exponentials. A target
    outside 0 .. V - 1 makes a loss of NaN.
    """
    c = np.float32(softcap)
    towards = np.float32(-2 / softcap) * LOG2_E if softcap > 0 else np.float32(0)
    for i in prange(s.shape[0]):
        # the largest logit and the target's
        row, target = s[i], targets[i]
        top = _cap(_largest(row), c, towards)[0]
        inside = 0 <= target < len(row)
        target_z, target_slope = _cap(row[target], c, towards) if inside else (np.float32(np.nan), ONE)

        # the sum of the exponentials, and the gradient
        total = np.float32(0)
        if with_gradient:
            for v in range(len(row)):
                z, slope = _cap(row[v], c, towards)
                p = exp2_f32((z - top) * LOG2_E)
                total += p
                row[v] = p * slope
            share = ONE / total
            for v in range(len(row)):
                row[v] *= share
            if inside:
                row[target] -= target_slope
        else:
            for v in range(len(row)):
                total += exp2_f32((_cap(row[v], c, towards)[0] - top) * LOG2_E)
        loss[i] = top + np.float32(math.log(total)) - target_z
