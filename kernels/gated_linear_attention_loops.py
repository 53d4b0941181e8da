"""
Gated linear attention as loops for a CPU: four tokens at a time, whose sums with the state stay in registers.

One scan, for one row and head and some columns x of the values, with the state S (x, y), y the channels of queries and keys:
    out_i[x] = sum over j <= i of E_ij (q_i . k_j) v_j[x]        E_ij: the product of the decays of the tokens j + 1 to i
    four tokens i, j:  out_i = a_i S q_i + sum over j <= i of E_ij (q_i . k_j) v_j        S <- a_3 S + sum over j of E_3j v_j k_j'
a_i the product of the decays from the first of the four to i. A document's first token has a decay of 0. Two rows of S at a time: for each of their channels y
the eight products with queries are added up in registers, and q and k are read once for both.

The gradients are the same scan with other arguments, of which two run from the last token to the first:
    dq = scan(u, v, k)        dk = reversed scan(v, u, q)        dv = reversed scan(k, q, u)        u: the gradient of out
The decays' gradient, with s_i = (q_i . k_i) (u_i . v_i), the pair of a token with itself:
    dg_{t+1} = dg_t - (q_t . dq_t - s_t) + (k_t . dk_t - s_t)        dg_p = e^{g_p} <S_p, R_p> every CHUNK tokens, 0 at a document's start
S_p the state that enters token p, which the forward scan stores, R_p the one that the scan of dv has when it has seen p: a difference of running sums spans
CHUNK tokens at most. The pairs of tokens with themselves are left out of both sums, not subtracted.

Decays are float64, and so are their products: the factor of the state is rounded so that the product of all of them is right to half a unit in the last place,
whatever the number of tokens.
"""

import numpy as np
from numba import prange

from kernels.loops import loop, parallel_loop, use_threads

CHUNK = 64      # tokens between stored states
WIDE = 256      # columns that are worked on at a time: rows of scratch memory have this length, which the compiler then knows
LANES = 16      # channels are filled up to a multiple
LEAST = 1e-35   # less is taken out of a state once a chunk: products with denormal numbers are many times as slow on some CPUs

# Where rows of scratch memory begin. Indices are unsigned: a signed one could count from the end, which the compiler would have to rule out number by number.
R1, R2, R3, R4, R5, R6, R7 = (np.uint64(row * WIDE) for row in range(1, 8))


@loop
def _fill(scratch, base, x, b, t, h, first, count):
    """scratch from base on: x[b, t, h, first:first + count], or 0 for a token before the first, and 0 up to a multiple of LANES."""
    base, first, known = np.uint64(base), np.uint64(first), np.uint64(0)
    if t >= 0:
        known = np.uint64(count)
        for c in range(known):
            scratch[base + c] = x[b, t, h, first + c]
    for c in range(known, np.uint64(-(-count // LANES) * LANES)):
        scratch[base + c] = 0


@loop
def _scale(scratch, base, factor, count):
    for c in range(np.uint64(base), np.uint64(base + count)):
        scratch[c] *= factor


@loop
def _dots(scratch, base, count):
    """q_i . k_j for j <= i: rows 0 to 3 from base on with rows 4 to 7."""
    s00 = s10 = s11 = s20 = s21 = s22 = s30 = s31 = s32 = s33 = scratch.dtype.type(0)
    for c in range(np.uint64(base), np.uint64(base + count)):
        q0, q1, q2, q3 = scratch[c], scratch[c + R1], scratch[c + R2], scratch[c + R3]
        k0, k1, k2, k3 = scratch[c + R4], scratch[c + R5], scratch[c + R6], scratch[c + R7]
        s00 += q0 * k0
        s10 += q1 * k0
        s11 += q1 * k1
        s20 += q2 * k0
        s21 += q2 * k1
        s22 += q2 * k2
        s30 += q3 * k0
        s31 += q3 * k1
        s32 += q3 * k2
        s33 += q3 * k3
    return s00, s10, s11, s20, s21, s22, s30, s31, s32, s33


@loop
def _two_rows(state, row, other, scratch, base, sums, values, x, keep, count):
    """Two rows of the state, x and x + 1: sums_i += row . q_i, row <- keep row + sum over j of v_j k_j, for the four tokens."""
    o0 = o1 = o2 = o3 = p0 = p1 = p2 = p3 = state.dtype.type(0)
    v0, v1, v2, v3 = values[x], values[WIDE + x], values[2 * WIDE + x], values[3 * WIDE + x]
    w0, w1, w2, w3 = values[x + 1], values[WIDE + x + 1], values[2 * WIDE + x + 1], values[3 * WIDE + x + 1]
    row, other, base = np.uint64(row), np.uint64(other), np.uint64(base)
    for i in range(np.uint64(count)):
        s, z, c = state[row + i], state[other + i], base + i
        q0, q1, q2, q3 = scratch[c], scratch[c + R1], scratch[c + R2], scratch[c + R3]
        k0, k1, k2, k3 = scratch[c + R4], scratch[c + R5], scratch[c + R6], scratch[c + R7]
        o0 += q0 * s
        o1 += q1 * s
        o2 += q2 * s
        o3 += q3 * s
        p0 += q0 * z
        p1 += q1 * z
        p2 += q2 * z
        p3 += q3 * z
        state[row + i] = keep * s + ((k0 * v0 + k1 * v1) + (k2 * v2 + k3 * v3))
        state[other + i] = keep * z + ((k0 * w0 + k1 * w1) + (k2 * w2 + k3 * w3))
    for lane, one, two in ((0, o0, p0), (1, o1, p1), (2, o2, p2), (3, o3, p3)):
        sums[lane * WIDE + x] += one
        sums[lane * WIDE + x + 1] += two


@loop
def _add_earlier(out, values, width, w10, w20, w21, w30, w31, w32):
    """What the four tokens see of the others of the four."""
    for x in range(np.uint64(width)):
        v0, v1, v2 = values[x], values[x + R1], values[x + R2]
        out[x + R1] += w10 * v0
        out[x + R2] += w20 * v0 + w21 * v1
        out[x + R3] += w30 * v0 + w31 * v1 + w32 * v2


@loop
def _dot(scratch, base, x, b, t, h, first, count):
    total, base, first = scratch.dtype.type(0), np.uint64(base), np.uint64(first)
    for c in range(np.uint64(count)):
        total += scratch[base + c] * x[b, t, h, first + c]
    return total


@loop
def _finish(out, values, base, own, result, b, t, h, first, count):
    """A token sees itself; its row goes to result."""
    base, first = np.uint64(base), np.uint64(first)
    for c in range(np.uint64(count)):
        result[b, t, h, first + c] = out[base + c] + own * values[base + c]


@loop
def _product(state, padded, states, n, first, width):
    """Sum of the products of two states."""
    total = 0.0
    for x in range(width):
        part, row = state.dtype.type(0), np.uint64(x * padded)
        for y in range(np.uint64(states.shape[2])):
            part += state[row + y] * states[n, first + x, y]
        total += part
    return total


@loop
def _drop_least(state):
    zero = state.dtype.type(0)
    for i in range(len(state)):
        state[i] = zero if abs(state[i]) < LEAST else state[i]


@loop
def _store(state, padded, states, n, first, width):
    for x in range(width):
        row = np.uint64(x * padded)
        for y in range(np.uint64(states.shape[2])):
            states[n, first + x, y] = state[row + y]


@loop
def _scan(query, key, value, decay, out, b, h, first, width, reverse, states, crossing, partner, ends):
    """
    out[b, :, h, first:first + width]; from the last token on with reverse. states (N, X, Y), the state before token T - CHUNK (n + 1) for every n, is written;
    or, where there is room in crossing (N), multiplied with the state behind those tokens. Where there is room in ends (T), partner . out without what a token
    sees of itself is added to it.
    """
    T, Y = query.shape[1], query.shape[3]
    kind = query.dtype.type
    tiles = (Y + WIDE - 1) // WIDE
    padded = -(-Y // LANES) * LANES
    state = np.zeros((width + width % 2) * padded, query.dtype)
    scratch = np.zeros(tiles * 8 * WIDE, query.dtype)
    values = np.zeros(4 * WIDE, query.dtype)
    sums = np.zeros(4 * WIDE, query.dtype)
    drift = 1.0     # product of the rounded factors of the state over the right one

    for r in range(0 if reverse else -(-T % 4), T, 4):
        if r > 0 and (r if reverse else T - r) % CHUNK == 0:
            n = (r if reverse else T - r) // CHUNK - 1
            _drop_least(state)
            if len(crossing):
                crossing[n] += decay[b, T - r, h] * _product(state, padded, states, n, first, width)
            elif len(states):
                _store(state, padded, states, n, first, width)

        # the decays between the four tokens, and their products
        t0, step = (T - 1 - r, -1) if reverse else (r, 1)
        late = 1 if reverse else 0      # the decay between t + 1 and t is t + 1's
        t1, t2, t3 = t0 + step, t0 + 2 * step, t0 + 3 * step
        c0 = decay[b, t0 + late, h] if 0 <= t0 and t0 + late < T else 1.0
        c1 = decay[b, t1 + late, h] if 0 <= t1 and (reverse or t0 >= 0) else 1.0
        c2 = decay[b, t2 + late, h] if 0 <= t2 and (reverse or t1 >= 0) else 1.0
        c3 = decay[b, t3 + late, h] if 0 <= t3 and (reverse or t2 >= 0) else 1.0
        kept = c0 * c1 * c2 * c3
        keep = kind(kept / drift)
        if abs(keep) < LEAST:
            keep, drift = kind(0), 1.0
        else:
            drift *= keep / kept

        w00 = w10 = w11 = w20 = w21 = w22 = w30 = w31 = w32 = w33 = kind(0)
        for tile in range(tiles):
            begin, base = tile * WIDE, tile * 8 * WIDE
            count = min(WIDE, Y - begin)
            wide = -(-count // LANES) * LANES
            for lane in range(4):
                t = t0 + lane * step
                _fill(scratch, base + lane * WIDE, query, b, t, h, begin, count)
                _fill(scratch, base + (4 + lane) * WIDE, key, b, t, h, begin, count)
            s00, s10, s11, s20, s21, s22, s30, s31, s32, s33 = _dots(scratch, base, wide)
            w00, w11, w22, w33 = w00 + s00, w11 + s11, w22 + s22, w33 + s33
            w10, w20, w21, w30, w31, w32 = w10 + s10, w20 + s20, w21 + s21, w30 + s30, w31 + s31, w32 + s32
            _scale(scratch, base, kind(c0), wide)
            _scale(scratch, base + WIDE, kind(c0 * c1), wide)
            _scale(scratch, base + 2 * WIDE, kind(c0 * c1 * c2), wide)
            _scale(scratch, base + 3 * WIDE, kind(kept), wide)
            _scale(scratch, base + 4 * WIDE, kind(c1 * c2 * c3), wide)
            _scale(scratch, base + 5 * WIDE, kind(c2 * c3), wide)
            _scale(scratch, base + 6 * WIDE, kind(c3), wide)

        for lane in range(4):
            _fill(values, lane * WIDE, value, b, t0 + lane * step, h, first, width)
        sums[:] = 0
        for tile in range(tiles):
            begin = tile * WIDE
            wide = min(WIDE, padded - begin)
            for x in range(0, width, 2):
                row = x * padded + begin
                _two_rows(state, row, row + padded, scratch, tile * 8 * WIDE, sums, values, x, keep, wide)
        _add_earlier(sums, values, width, kind(c1) * w10, kind(c1 * c2) * w20, kind(c2) * w21, kind(c1 * c2 * c3) * w30, kind(c2 * c3) * w31, kind(c3) * w32)
        for lane in range(4):
            t = t0 + lane * step
            if t >= 0:
                if len(ends):
                    ends[t] += _dot(sums, lane * WIDE, partner, b, t, h, first, width)
                own = w00 if lane == 0 else w11 if lane == 1 else w22 if lane == 2 else w33
                _finish(sums, values, lane * WIDE, own, out, b, t, h, first, width)


@parallel_loop
def _forward(query, key, value, decay, out, states, blocks, width):
    B, H, D, none = value.shape[0], value.shape[2], value.shape[3], np.zeros(0)
    for task in prange(B * H * blocks):
        row, first = task // blocks, task % blocks * width
        _scan(query, key, value, decay, out, row // H, row % H, first, min(width, D - first), False, states[row], none, value, none)


@parallel_loop
def _backward(grad, query, key, value, decay, states, dquery, dkey, dvalue, crossing, ends, begins):
    B, H = value.shape[0], value.shape[2]
    for task in prange(3 * B * H):
        _gradient(task % 3, task // 3, grad, query, key, value, decay, states, dquery, dkey, dvalue, crossing, ends, begins)


@loop
def _gradient(which, row, grad, query, key, value, decay, states, dquery, dkey, dvalue, crossing, ends, begins):
    """dquery, dkey or dvalue of one row and head."""
    H, M, D = query.shape[2], query.shape[3], value.shape[3]
    b, h, none, no_states = row // H, row % H, np.zeros(0), states[row, :0]
    if which == 0:
        for first in range(0, M, WIDE):
            _scan(grad, value, key, decay, dquery, b, h, first, min(WIDE, M - first), False, no_states, none, query, ends[row])
    elif which == 1:
        for first in range(0, M, WIDE):
            _scan(value, grad, query, decay, dkey, b, h, first, min(WIDE, M - first), True, no_states, none, key, begins[row])
    else:
        for first in range(0, D, WIDE):
            _scan(key, query, grad, decay, dvalue, b, h, first, min(WIDE, D - first), True, states[row], crossing[row], value, none)


@loop
def _decay_gradient(crossing, ends, begins, decay, ddecay):
    """ddecay (B, T, H) from what is added up for each token."""
    B, T, H = decay.shape
    for row in range(B * H):
        b, h, total = row // H, row % H, 0.0
        for t in range(T):
            if t > 0 and (T - t) % CHUNK == 0:
                total = crossing[row, (T - t) // CHUNK - 1]
            if t == 0 or decay[b, t, h] == 0.0:
                total = 0.0
            ddecay[b, t, h] = total
            total += begins[row, t] - ends[row, t]


def stored_states(T: int) -> int:
    """How many states forward() stores for one row and head, which is only needed for the decays' gradient."""
    return (T - 1) // CHUNK


def forward(query: np.ndarray, key: np.ndarray, value: np.ndarray, decay: np.ndarray, out: np.ndarray, states: np.ndarray):
    """Writes out (B, T, H, D) and states (B*H, N, D, M), N = stored_states(T) or 0. decay (B, T, H) float64, 0 at a document's start."""
    B, _, H, D = value.shape
    use_threads()
    blocks = -(-D // WIDE)
    if B * H * blocks < 2:      # threads would have nothing to do; the columns are independent
        blocks = max(blocks, min(4, -(-D // 16)))
    width = -(-D // blocks)
    _forward(query, key, value, decay, out, states, -(-D // width), width)


def backward(grad: np.ndarray, query: np.ndarray, key: np.ndarray, value: np.ndarray, decay: np.ndarray, states: np.ndarray, dquery: np.ndarray,
             dkey: np.ndarray, dvalue: np.ndarray, ddecay: np.ndarray):
    """Writes the gradients; ddecay (B, T, H) float64, of the decays' logarithms, where it is not empty and forward() has stored states."""
    rows, T = value.shape[0] * value.shape[2], value.shape[1]
    use_threads()
    ends, begins = np.zeros((2, rows, T if len(ddecay) else 0))
    crossing = np.zeros((rows, states.shape[1] if len(ddecay) else 0))
    _backward(grad, query, key, value, decay, states, dquery, dkey, dvalue, crossing, ends, begins)
    if len(ddecay):
        _decay_gradient(crossing, ends, begins, decay, ddecay)
