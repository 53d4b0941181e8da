"""The elementwise parts of the optimizers' updates as loops: the package has the formulas."""

import math

import numpy as np
from numba import prange

from kernels.loops import loop, parallel_loop


@parallel_loop
def nesterov(gradient, momentum, mu, update):
    """momentum <- mu momentum + (1 - mu) gradient; update <- mu momentum + (1 - mu) gradient, of flat arrays."""
    mu = gradient.dtype.type(mu)
    new = gradient.dtype.type(1) - mu
    for i in prange(len(gradient)):
        step = new * gradient[i]
        momentum[i] = mu * momentum[i] + step
        update[i] = mu * momentum[i] + step


@loop
def _row_squares(u, squares):
    """Writes the sum of the squares of each row of u."""
    for r in range(u.shape[0]):
        row, total = u[r], u.dtype.type(0)
        for c in range(len(row)):
            total += row[c] * row[c]
        squares[r] = total


@loop
def _column_squares(u, squares):
    """Writes the sum of the squares of each column of u."""
    squares[:] = 0
    for r in range(u.shape[0]):
        row = u[r]
        for c in range(len(row)):
            squares[c] += row[c] * row[c]


@loop
def _step_row(w, u, factor, decay):
    """w <- w - (factor u + decay w where u w > 0)"""
    for c in range(len(w)):
        kept = w[c] * decay if u[c] * w[c] > 0 else w.dtype.type(0)
        w[c] -= factor * u[c] + kept


@loop
def _step_row_by_columns(w, u, factors, decay):
    """Does the same with a factor a column."""
    for c in range(len(w)):
        kept = w[c] * decay if u[c] * w[c] > 0 else w.dtype.type(0)
        w[c] -= factors[c] * u[c] + kept


@parallel_loop
def normalised_step(data, update, second, lr, decay, beta2):
    """
    Takes Muon's step of matrices (n, rows, columns). second is (n, rows) where rows are not fewer than columns, else
    (n, columns).
    """
    n, rows, columns = data.shape
    by_row = rows >= columns
    shape = math.sqrt(max(1.0, rows / columns))
    for k in prange(n):
        u, running = update[k], second[k]
        factors = np.ones(len(running), data.dtype)
        total, after = 0.0, 0.0     # the squares of all, before and after the factors

        # a factor a row or column, of the running mean squares
        if beta2 > 0:
            squares = np.empty_like(factors)
            if by_row:
                _row_squares(u, squares)
            else:
                _column_squares(u, squares)
            for i in range(len(running)):
                mean = squares[i] * len(running) / data.dtype.type(rows * columns)
                running[i] += data.dtype.type(1 - beta2) * (mean - running[i])
                factors[i] = data.dtype.type(1 / math.sqrt(max(running[i], 1e-10)))
                total += squares[i]
                after += squares[i] * factors[i] * factors[i]

        # the factor of all
        factor = lr * shape
        if beta2 > 0:
            factor *= math.sqrt(total) / max(math.sqrt(after), 1e-10)
        for i in range(len(factors)):
            factors[i] *= factor

        # the step
        for r in range(rows):
            if by_row:
                _step_row(data[k, r], u[r], factors[r], data.dtype.type(decay))
            else:
                _step_row_by_columns(data[k, r], u[r], factors, data.dtype.type(decay))


@parallel_loop
def adam(data, gradient, mean, square, lr, decay, beta1, beta2, correction1, correction2):
    """Takes Adam's step of flat arrays."""
    one, tiny = data.dtype.type(1), data.dtype.type(1e-10)
    new1, inverse1 = one - data.dtype.type(beta1), one / data.dtype.type(correction1)
    new2, inverse2 = one - data.dtype.type(beta2), one / data.dtype.type(correction2)
    lr, decay = data.dtype.type(lr), data.dtype.type(decay)
    for i in prange(len(data)):
        mean[i] += new1 * (gradient[i] - mean[i])
        square[i] += new2 * (gradient[i] * gradient[i] - square[i])
        update = (mean[i] * inverse1) / (math.sqrt(square[i] * inverse2) + tiny)
        kept = data[i] * decay if update * data[i] > 0 else data.dtype.type(0)
        data[i] -= lr * update + kept
