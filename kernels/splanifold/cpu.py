"""
Splanifolds of few coordinates, side by side, as loops for a CPU: 8 tokens of a group at a time, in registers and the
first-level cache. The package has the formula.

The last deviation is minus the sum of the others: a matrix times delta is its first K - 1 columns, less its last one,
times the first K - 1 deviations. With d those deviations, d~ the bent ones, a_i and b_i the weights of node i's value
and tangent (0 where it does not bound the token's segment):
    out_j = sum over i of a_i (P_ij + E_ij . d~) + b_i (mean P'_ij + E'_ij . d~ + alpha P'_ij . d)
A table (G, S, n, 2 + 3 (K - 1)) holds P_ij, mean P'_ij, E_ij, E'_ij and P'_ij; its gradient has the same form.

Tasks of some tokens run side by side. A task goes through all groups, so that the lines of r that neighbouring groups
share stay in a cache; each adds up its own gradient of the table.
"""

import numpy as np
from numba import prange

from kernels.loops import called_loop, inner_loop, parallel_loop, use_threads
from kernels.simd import distance, floor, largest, load, madd, root, select, splat, store, total

TOKENS = 128        # of a task, at least
MOST_TASKS = 64     # each has a gradient of the table

# Where `c` has 1 + 2E, E, eps^2, 1 / delta_max^2, S - 1 and 1 / K. c is an array of the numbers' dtype.
STRETCH, SHIFT, EPS2, BEND2, SEGMENTS, INVERSE_K = range(6)


@inner_loop
def _gather(x, first, g, scratch, base):
    """
    Writes group g's columns of 8 tokens of x (M, G, columns) to scratch from base on, one after another; the last token
    again beyond the end.
    """
    last = np.uint64(x.shape[0] - 1)
    for m in range(np.uint64(8)):
        row = min(np.uint64(first) + m, last)
        for k in range(np.uint64(x.shape[2])):
            scratch[np.uint64(base) + k * np.uint64(8) + m] = x[row, np.uint64(g), k]


@inner_loop
def _scatter(x, first, g, scratch, base):
    """Writes columns of 8 tokens, or of those that there are, from scratch to group g's in x (M, G, columns)."""
    for m in range(np.uint64(min(8, x.shape[0] - first))):
        for k in range(np.uint64(x.shape[2])):
            x[np.uint64(first) + m, np.uint64(g), k] = scratch[np.uint64(base) + k * np.uint64(8) + m]


@inner_loop
def _at(node, number, first, second, c):
    """Returns `first` where `node` is this number, `second` where it is the one before, else 0."""
    half, zero = splat(c.dtype.type(0.5)), splat(c.dtype.type(0))
    later = select(half, distance(node, splat(c.dtype.type(number - 1))), second, zero)
    return select(half, distance(node, splat(c.dtype.type(number))), first, later)


@inner_loop
def _locate(scratch, K, c):
    """Returns the mean of r's columns, which are at the beginning of scratch, t, the segment and tau."""
    mean = load(scratch, 0)
    for k in range(1, K):
        mean = mean + load(scratch, 8 * k)
    mean = mean * splat(c[INVERSE_K])
    t = mean * splat(c[STRETCH]) - splat(c[SHIFT])

    # the segment: the largest of a NaN and 0 is 0
    segments = splat(c[SEGMENTS])
    node = floor(t * segments)
    node = largest(node, splat(c.dtype.type(0)))
    last = segments - splat(c.dtype.type(1))
    node = select(node, last, last, node)
    return mean, t, node, t * segments - node


@inner_loop
def _deviate(scratch, mean, K, deltas, bents, c):
    """Writes all deviations and the K - 1 bent ones; returns the factor of the bend, 1 where there is none."""
    one = splat(c.dtype.type(1))
    square = splat(c.dtype.type(0))
    for k in range(K):
        delta = (load(scratch, 8 * k) - mean) * splat(c[STRETCH])
        square = madd(delta, delta, square)
        store(scratch, deltas + 8 * k, delta)
    warp = one
    if c[BEND2] > 0:
        warp = one / root(madd(square, splat(c[BEND2]), one))
    for k in range(K - 1):
        store(scratch, bents + 8 * k, load(scratch, deltas + 8 * k) * warp)
    return warp


@inner_loop
def _hermite(tau, c):
    """Returns h00, h01, h10 and h11."""
    one, two, three = splat(c.dtype.type(1)), splat(c.dtype.type(2)), splat(c.dtype.type(3))
    rest = one - tau
    square, rest_square = tau * tau, rest * rest
    h00 = rest_square * madd(two, tau, one)
    h01 = square * (three - two * tau)
    return h00, h01, tau * rest_square, square * (tau - one)


@inner_loop
def _slopes(tau, c):
    """Returns their derivatives by tau."""
    one, two, three = splat(c.dtype.type(1)), splat(c.dtype.type(2)), splat(c.dtype.type(3))
    rest = tau - one
    first = splat(c.dtype.type(6)) * tau * rest
    second = splat(c.dtype.type(-6)) * tau * rest
    return first, second, (three * tau - one) * rest, (three * tau - two) * tau


@called_loop
def _forward_group(r, table, out, first, end, g, c, scratch):
    """Writes out (M, G, n) of group g and the tokens from first to end."""
    # where scratch has what: r's columns first
    K, S, n, C = r.shape[2], table.shape[1], table.shape[2], table.shape[3]
    W = np.uint64(K - 1)
    deltas, bents, values = 8 * K, 16 * K, 24 * K
    tangents = values + 8 * S
    results = tangents + 8 * S
    flat = table.reshape(table.size)

    for m in range(first, end, 8):
        # the deviations, alpha and the nodes' weights
        _gather(r, m, g, scratch, 0)
        mean, t, node, tau = _locate(scratch, K, c)
        _deviate(scratch, mean, K, deltas, bents, c)
        sigma = t * splat(c.dtype.type(K))
        alpha = sigma / madd(sigma, sigma, splat(c[EPS2]))
        h00, h01, h10, h11 = _hermite(tau, c)
        for i in range(S):
            store(scratch, values + 8 * i, _at(node, i, h00, h01, c))
            store(scratch, tangents + 8 * i, _at(node, i, h10, h11, c))

        # the outputs
        for j in range(n):
            y = splat(c.dtype.type(0))
            for i in range(S):
                at = np.uint64(((g * S + i) * n + j) * C)
                by_bases = at + np.uint64(2)
                by_base_tangents, by_point_tangents = by_bases + W, by_bases + W + W
                a, b, p = splat(flat[at]), splat(flat[at + np.uint64(1)]), splat(c.dtype.type(0))
                for k in range(W):
                    bent = load(scratch, bents + 8 * k)
                    a = madd(splat(flat[by_bases + k]), bent, a)
                    b = madd(splat(flat[by_base_tangents + k]), bent, b)
                    p = madd(splat(flat[by_point_tangents + k]), load(scratch, deltas + 8 * k), p)
                y = madd(load(scratch, values + 8 * i), a, y)
                y = madd(load(scratch, tangents + 8 * i), madd(alpha, p, b), y)
            store(scratch, results + 8 * j, y)
        _scatter(out, m, g, scratch, results)


@inner_loop
def _add(scratch, index, x, y):
    """Adds x y to the vector at the index."""
    store(scratch, index, madd(x, y, load(scratch, index)))


@called_loop
def _backward_group(grad, r, table, dr, dtable, first, end, g, c, scratch):
    """Writes dr and dtable of group g and the tokens from first to end."""
    # where scratch has what: r's columns first, 8 numbers a sum of the table's last
    K, S, n, C = r.shape[2], table.shape[1], table.shape[2], table.shape[3]
    W = np.uint64(K - 1)
    deltas, bents, grads = 8 * K, 16 * K, 24 * K
    ddeltas = grads + 8 * n
    dbents = ddeltas + 8 * K
    sums = dbents + 8 * K
    zero, two = splat(c.dtype.type(0)), splat(c.dtype.type(2))
    flat = table.reshape(table.size)
    for x in range(S * n * C):
        store(scratch, sums + 8 * x, zero)

    for m in range(first, end, 8):
        # the gradient, 0 beyond the end
        _gather(r, m, g, scratch, 0)
        _gather(grad, m, g, scratch, grads)
        for j in range(np.uint64(n)):
            for lane in range(np.uint64(min(end - m, 8)), np.uint64(8)):
                scratch[np.uint64(grads) + np.uint64(8) * j + lane] = 0

        # the deviations, alpha and the nodes' weights
        mean, t, node, tau = _locate(scratch, K, c)
        warp = _deviate(scratch, mean, K, deltas, bents, c)
        sigma = t * splat(c.dtype.type(K))
        inverse = splat(c.dtype.type(1)) / madd(sigma, sigma, splat(c[EPS2]))
        alpha = sigma * inverse
        h00, h01, h10, h11 = _hermite(tau, c)
        s00, s01, s10, s11 = _slopes(tau, c)
        for k in range(K):
            store(scratch, ddeltas + 8 * k, zero)
            store(scratch, dbents + 8 * k, zero)

        # node by node the table's gradient, and those of deviations, tau and alpha
        dtau, dalpha = zero, zero
        for i in range(S):
            value, tangent = _at(node, i, h00, h01, c), _at(node, i, h10, h11, c)
            dvalue, dtangent = zero, zero
            for j in range(n):
                u = load(scratch, grads + 8 * j)
                u_value, u_tangent = u * value, u * tangent
                u_alpha = u_tangent * alpha

                x = (i * n + j) * C
                at = np.uint64(g * S * n * C + x)
                by_bases = at + np.uint64(2)
                by_base_tangents, by_point_tangents = by_bases + W, by_bases + W + W
                a, b, p = splat(flat[at]), splat(flat[at + np.uint64(1)]), zero
                to = sums + 8 * x
                store(scratch, to, load(scratch, to) + u_value)
                store(scratch, to + 8, load(scratch, to + 8) + u_tangent)
                for k in range(W):
                    bent, delta = load(scratch, bents + 8 * k), load(scratch, deltas + 8 * k)
                    base, base_tangent = splat(flat[by_bases + k]), splat(flat[by_base_tangents + k])
                    point_tangent = splat(flat[by_point_tangents + k])
                    a = madd(base, bent, a)
                    b = madd(base_tangent, bent, b)
                    p = madd(point_tangent, delta, p)
                    _add(scratch, to + 8 * (2 + k), u_value, bent)
                    _add(scratch, to + 8 * (2 + W + k), u_tangent, bent)
                    _add(scratch, to + 8 * (2 + W + W + k), u_alpha, delta)
                    _add(scratch, dbents + 8 * k, u_value, base)
                    _add(scratch, dbents + 8 * k, u_tangent, base_tangent)
                    _add(scratch, ddeltas + 8 * k, u_alpha, point_tangent)
                dvalue = madd(u, a, dvalue)
                dtangent = madd(u, madd(alpha, p, b), dtangent)
                dalpha = madd(u_tangent, p, dalpha)
            dtau = madd(dvalue, _at(node, i, s00, s01, c), dtau)
            dtau = madd(dtangent, _at(node, i, s10, s11, c), dtau)

        # of Sigma, and of the deviations by the bend
        dsigma = madd(dtau, splat(c[SEGMENTS] * c[INVERSE_K]), dalpha * (inverse - two * alpha * alpha))
        dwarp = zero
        if c[BEND2] > 0:
            for k in range(W):
                dwarp = madd(load(scratch, dbents + 8 * k), load(scratch, deltas + 8 * k), dwarp)
            dwarp = dwarp * warp * warp * warp * splat(c[BEND2])
        ddelta_sum = zero
        for k in range(K):
            x = madd(warp, load(scratch, dbents + 8 * k), load(scratch, ddeltas + 8 * k))
            x = x - dwarp * load(scratch, deltas + 8 * k)
            ddelta_sum = ddelta_sum + x
            store(scratch, ddeltas + 8 * k, x)

        # of r
        common = dsigma - ddelta_sum * splat(c[INVERSE_K])
        for k in range(K):
            store(scratch, ddeltas + 8 * k, (load(scratch, ddeltas + 8 * k) + common) * splat(c[STRETCH]))
        _scatter(dr, m, g, scratch, ddeltas)

    for i in range(S):
        for j in range(n):
            for x in range(C):
                dtable[g, i, j, x] = total(load(scratch, sums + 8 * ((i * n + j) * C + x)))


@parallel_loop
def _forward(r, table, out, c, tokens):
    K, S, n = r.shape[2], table.shape[1], table.shape[2]
    M = r.shape[0]
    for task in prange((M + tokens - 1) // tokens):
        scratch = np.empty(8 * (3 * K + 2 * S + n), r.dtype)
        first, end = task * tokens, min(task * tokens + tokens, M)
        for g in range(r.shape[1]):
            _forward_group(r, table, out, first, end, g, c, scratch)


@parallel_loop
def _backward(grad, r, table, dr, dtables, c, tokens):
    K, S, n = r.shape[2], table.shape[1], table.shape[2]
    for task in prange(dtables.shape[0]):
        scratch = np.empty(8 * (5 * K + n + S * n * table.shape[3]), r.dtype)
        first, end = task * tokens, min(task * tokens + tokens, r.shape[0])
        for g in range(r.shape[1]):
            _backward_group(grad, r, table, dr, dtables[task], first, end, g, c, scratch)


def _tokens(M: int) -> int:
    """Returns the tokens of a task, a multiple of 8. It depends on M alone, and so does the order of all sums."""
    return max(TOKENS, -(-M // MOST_TASKS // 8) * 8)


def forward(r: np.ndarray, table: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Returns out (M, G, n) of r (M, G, K). All arrays are contiguous and of one dtype."""
    out = np.empty((*r.shape[:2], table.shape[2]), r.dtype)
    tokens = _tokens(len(r))
    use_threads(-(-len(r) // tokens))
    _forward(r, table, out, c, tokens)
    return out


def backward(grad: np.ndarray, r: np.ndarray, table: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns dr (M, G, K) and the table's gradient, of grad (M, G, n)."""
    tokens = _tokens(len(r))
    dr = np.empty_like(r)
    dtables = np.empty((-(-len(r) // tokens), *table.shape), table.dtype)
    use_threads(len(dtables))
    _backward(grad, r, table, dr, dtables, c, tokens)
    return dr, dtables.sum(0)
