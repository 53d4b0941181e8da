"""
The short convolution as loops for a CPU: four tokens at a time, with all their taps in one pass over the channels, so
that the four share what they read. Tokens at the edges of documents and rows go one by one, tap by tap.

Tasks of TOKENS tokens of one row run side by side; each writes its tokens and what they add to the taps' gradient.
x (B, L, C) holds lead = L - T tokens before the T of y and of positions. `width`, a tuple of min(n, MOST_WIDE) numbers,
is there for its length alone: it belongs to the type and is known when a loop is compiled, which then holds that many
products; taps beyond it have further passes.
"""

import numpy as np
from numba import prange

from kernels.loops import inline_loop, loop, parallel_loop, use_threads

TOKENS = 128    # of a task
MOST_WIDE = 4   # taps in one pass


@inline_loop
def _sees(positions, t, shift, lead):
    """Returns whether token t reads the one `shift` before it: one of its document, and of x."""
    return shift == 0 or (positions[t] >= shift and shift <= t + lead)


@loop
def _clear(out):
    for c in range(len(out)):
        out[c] = 0


@loop
def _add_product(out, x, y):
    for c in range(len(out)):
        out[c] += x[c] * y[c]


@loop
def _add_products(out, x, y):
    """Adds the products of four rows of x and y."""
    for c in range(len(out)):
        out[c] += x[0, c] * y[0, c] + x[1, c] * y[1, c] + (x[2, c] * y[2, c] + x[3, c] * y[3, c])


@loop
def _combine(out, first, taps, rows, row, step, width):
    """Sets out_{first+k} = sum over s < n of taps_{n-1-s} rows_{row + step s + k}, for k < 4."""
    # the first taps in one pass over the channels
    n = len(taps)
    out0 = out[first]
    out1 = out[first + 1]
    out2 = out[first + 2]
    out3 = out[first + 3]
    for c in range(len(out0)):
        sum0 = sum1 = sum2 = sum3 = taps.dtype.type(0)
        for s in range(len(width)):
            tap = taps[n - 1 - s, c]
            r = row + step * s
            sum0 += tap * rows[r, c]
            sum1 += tap * rows[r + 1, c]
            sum2 += tap * rows[r + 2, c]
            sum3 += tap * rows[r + 3, c]
        out0[c] = sum0
        out1[c] = sum1
        out2[c] = sum2
        out3[c] = sum3

    # the others tap by tap
    for s in range(len(width), n):
        for k in range(4):
            _add_product(out[first + k], taps[n - 1 - s], rows[row + step * s + k])


@loop
def _forward_task(x, taps, positions, y, width, b, first):
    """Makes the tokens first .. first + TOKENS - 1 of y, of one row."""
    n = len(taps)
    T = y.shape[1]
    lead = x.shape[1] - T
    x = x[b]
    y = y[b]
    positions = positions[b]
    end = min(first + TOKENS, T)
    t = first
    while t < end:
        # four tokens that see all taps
        seen = 0
        while seen < 4 and t + seen < end and _sees(positions, t + seen, n - 1, lead):
            seen += 1
        if seen == 4:
            _combine(y, t, taps, x, t + lead, -1, width)
            t += 4
            continue

        # or one
        _clear(y[t])
        for s in range(n):
            if _sees(positions, t, s, lead):
                _add_product(y[t], taps[n - 1 - s], x[t + lead - s])
        t += 1


@loop
def _backward_task(g, x, taps, positions, dx, sums, width, b, first):
    """Makes the tokens first .. first + TOKENS - 1 of dx, of one row, and sums (n, C), the taps' gradient from them."""
    n = len(taps)
    T = g.shape[1]
    lead = x.shape[1] - T
    end = min(first + TOKENS, x.shape[1])
    g = g[b]
    x = x[b]
    dx = dx[b]
    positions = positions[b]
    r = first
    for s in range(n):
        _clear(sums[s])
    while r < end:
        # four tokens of x, each read by all n from it on, which are n + 3
        t = r - lead
        seen = 0
        if r + 4 <= end and t >= 0 and t + n + 3 <= T:
            while seen < n + 3 and _sees(positions, t + seen, min(seen, n - 1), lead):
                seen += 1
        if seen == n + 3:
            _combine(dx, r, taps, g, t, 1, width)
            for s in range(n):
                _add_products(sums[n - 1 - s], x[r:r + 4], g[t + s:t + s + 4])
            r += 4
            continue

        # or one
        _clear(dx[r])
        for s in range(max(0, -t), min(n, T - t)):
            if _sees(positions, t + s, s, lead):
                _add_product(dx[r], taps[n - 1 - s], g[t + s])
                _add_product(sums[n - 1 - s], x[r], g[t + s])
        r += 1


@parallel_loop
def _forward(x, taps, positions, y, width):
    tasks = (y.shape[1] + TOKENS - 1) // TOKENS
    for task in prange(len(y) * tasks):
        _forward_task(x, taps, positions, y, width, task // tasks, task % tasks * TOKENS)


@parallel_loop
def _backward(g, x, taps, positions, dx, partial, width):
    tasks = (x.shape[1] + TOKENS - 1) // TOKENS
    for task in prange(len(x) * tasks):
        _backward_task(g, x, taps, positions, dx, partial[task], width, task // tasks, task % tasks * TOKENS)


def forward(x: np.ndarray, taps: np.ndarray, positions: np.ndarray, y: np.ndarray):
    """Writes y (B, T, C)."""
    use_threads(_tasks(y))
    _forward(x, taps, positions, y, _width(taps))


def backward(g: np.ndarray, x: np.ndarray, taps: np.ndarray, positions: np.ndarray, dx: np.ndarray) -> np.ndarray:
    """Writes dx (B, L, C). Returns what each task adds to the taps' gradient, (tasks, n, C)."""
    partial = np.empty((_tasks(x), *taps.shape), taps.dtype)
    use_threads(len(partial))
    _backward(g, x, taps, positions, dx, partial, _width(taps))
    return partial


def _tasks(x: np.ndarray) -> int:
    return len(x) * -(-x.shape[1] // TOKENS)


def _width(taps: np.ndarray) -> tuple[int, ...]:
    return (0,) * min(len(taps), MOST_WIDE)
