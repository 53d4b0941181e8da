"""
Gated linear attention as loops for a CPU: four tokens at a time, whose sums with the state are added up in registers.

A scan of one row and head, for some columns x of the values, has a state S (x, y), y the channels of queries and keys:
    out_i[x] = sum over j <= i of E_ij (q_i . k_j) v_j[x]        E_ij: the product of the decays of tokens j + 1 to i
For four tokens i, j, with a_i the product of the decays from the first of the four to i:
    out_i = a_i S q_i + sum over j <= i of E_ij (q_i . k_j) v_j        S <- a_3 S + sum over j of E_3j v_j k_j'
A document's first token has a decay of 0. For two rows of S at a time the eight products with the queries are added up
while the rows are brought up to date, so that queries and keys are read once for both, and S once for four tokens.

The gradients are the same scan of other arguments, two of them from the last token to the first; u is that of out:
    dq = scan(u, v, k)        dk = reversed scan(v, u, q)        dv = reversed scan(k, q, u)
That of the logarithms of the decays, with s_i = (q_i . k_i) (u_i . v_i), the pair of a token with itself:
    dg_{t+1} = dg_t - (q_t . dq_t - s_t) + (k_t . dk_t - s_t)
    dg_p = e^{g_p} <S_p, R_p> at every CHUNK-th token from the end, 0 where e^{g_p} is 0 or next to it
S_p is the state that enters token p, which the forward scan stores, and R_p the one that the scan of dv has when it has
seen p: a difference of running sums spans CHUNK tokens at most, in float64. s_t is left out of both, not subtracted.

Decays and their products are float64. The state's factor is rounded so that the product of all of them so far is right
to half a unit in the last place, whatever the number of tokens.
"""

import numpy as np
from numba import prange

from kernels.loops import loop, parallel_loop, use_threads

CHUNK = 64      # tokens between stored states
WIDE = 256      # columns that are worked on at a time: rows of scratch memory have this length, known when compiled
LANES = 16      # channels are filled up to a multiple
# Less is 0 as a factor of the state, and once a chunk in it: products with denormal numbers are many times as slow on
# some CPUs.
LEAST = {4: 1e-35, 8: 1e-300}   # by the bytes of a number
FORGOTTEN = 1e-18   # a decay whose gradient is that far below those of its neighbours: 0, and sums begin anew there
NOTHING, STORE, MULTIPLY = 0, 1, 2     # what a scan does with its state once a chunk

# Where rows of scratch memory begin. Indices are unsigned: signed ones could count from the end, and the compiler would
# look at each, one number after another.
R1, R2, R3, R4, R5, R6, R7 = (np.uint64(row * WIDE) for row in range(1, 8))


@loop
def _fill(scratch, base, x, b, t, h, first, count):
    """
    Sets scratch, from base on, to x[b, t, h, first:first + count]: to 0 for tokens before the first, and up to a
    multiple of LANES.
    """
    base = np.uint64(base)
    first = np.uint64(first)
    known = np.uint64(0)
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
    """Returns q_i . k_j for j <= i: rows 0 to 3 from base on with rows 4 to 7."""
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
    """
    Takes rows x and x + 1 of the state through the four tokens: sums_i += row . q_i,
    row <- keep row + sum over j of v_j k_j.
    """
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
    """Adds what the four tokens see of the others of the four."""
    for x in range(np.uint64(width)):
        v0, v1, v2 = values[x], values[x + R1], values[x + R2]
        out[x + R1] += w10 * v0
        out[x + R2] += w20 * v0 + w21 * v1
        out[x + R3] += w30 * v0 + w31 * v1 + w32 * v2


@loop
def _dot(scratch, base, x, b, t, h, first, count):
    total = scratch.dtype.type(0)
    base = np.uint64(base)
    first = np.uint64(first)
    for c in range(np.uint64(count)):
        total += scratch[base + c] * x[b, t, h, first + c]
    return total


@loop
def _finish(out, values, base, weight, result, b, t, h, first, count):
    """Adds what a token sees of itself, with this weight; its row goes to result."""
    base, first = np.uint64(base), np.uint64(first)
    for c in range(np.uint64(count)):
        result[b, t, h, first + c] = out[base + c] + weight * values[base + c]


@loop
def _product(state, padded, states, n, first, width):
    """Returns the sum of the products of two states."""
    total = 0.0
    for x in range(width):
        of_row = state.dtype.type(0)
        row = np.uint64(x * padded)
        for y in range(np.uint64(states.shape[2])):
            of_row += state[row + y] * states[n, first + x, y]
        total += of_row
    return total


@loop
def _drop_least(state, least):
    zero = state.dtype.type(0)
    for i in range(len(state)):
        state[i] = zero if abs(state[i]) < least else state[i]


@loop
def _store(state, padded, states, n, first, width):
    for x in range(width):
        row = np.uint64(x * padded)
        for y in range(np.uint64(states.shape[2])):
            states[n, first + x, y] = state[row + y]


@loop
def _scan(query, key, value, decay, least, out, b, h, first, width, reverse, purpose, states, crossing, partner, ends):
    """
    Makes out[b, :, h, first:first + width], from the last token on with reverse. states (N, X, Y) are those before
    tokens T - CHUNK (n + 1): STORE writes them, MULTIPLY adds the decay there times their products with the state
    behind to crossing (N). Where there is room in ends (T), partner . out without what a token sees of itself is added
    to it.
    """
    # scratch memory
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
        # once a chunk
        if r > 0 and (r if reverse else T - r) % CHUNK == 0:
            n = (r if reverse else T - r) // CHUNK - 1
            _drop_least(state, least)
            if purpose == MULTIPLY:
                crossing[n] += decay[b, T - r, h] * _product(state, padded, states, n, first, width)
            elif purpose == STORE:
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
        if abs(keep) < least:
            keep, drift = kind(0), 1.0
        else:
            drift *= keep / kept

        # the four queries and keys, their products, and then with the decays to and from the state
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
            w10, w20, w21 = w10 + s10, w20 + s20, w21 + s21
            w30, w31, w32 = w30 + s30, w31 + s31, w32 + s32
            _scale(scratch, base, kind(c0), wide)
            _scale(scratch, base + WIDE, kind(c0 * c1), wide)
            _scale(scratch, base + 2 * WIDE, kind(c0 * c1 * c2), wide)
            _scale(scratch, base + 3 * WIDE, kind(kept), wide)
            _scale(scratch, base + 4 * WIDE, kind(c1 * c2 * c3), wide)
            _scale(scratch, base + 5 * WIDE, kind(c2 * c3), wide)
            _scale(scratch, base + 6 * WIDE, kind(c3), wide)

        # the state, two rows at a time
        for lane in range(4):
            _fill(values, lane * WIDE, value, b, t0 + lane * step, h, first, width)
        sums[:] = 0
        for tile in range(tiles):
            begin = tile * WIDE
            wide = min(WIDE, padded - begin)
            for x in range(0, width, 2):
                row = x * padded + begin
                _two_rows(state, row, row + padded, scratch, tile * 8 * WIDE, sums, values, x, keep, wide)

        # the outputs
        _add_earlier(sums, values, width, kind(c1) * w10, kind(c1 * c2) * w20, kind(c2) * w21,
                     kind(c1 * c2 * c3) * w30, kind(c2 * c3) * w31, kind(c3) * w32)
        for lane in range(4):
            t = t0 + lane * step
            if t >= 0:
                if len(ends):
                    ends[t] += _dot(sums, lane * WIDE, partner, b, t, h, first, width)
                weight = w00
                if lane == 1:
                    weight = w11
                if lane == 2:
                    weight = w22
                if lane == 3:
                    weight = w33
                _finish(sums, values, lane * WIDE, weight, out, b, t, h, first, width)


# A constant as an argument would make a further scan, compiled once more: `reverse` and `purpose` are values.


@loop
def _columns(query, key, value, decay, least, out, states, blocks, width, task):
    """Makes a block of out's columns of one row and head."""
    H, D = value.shape[2:]
    row = task // blocks
    first = task % blocks * width
    none = np.zeros(0)
    reverse, purpose = task < 0, STORE if states.shape[1] else NOTHING
    _scan(query, key, value, decay, least, out, row // H, row % H, first, min(width, D - first), reverse, purpose,
          states[row], none, value, none)


@loop
def _gradient(grad, query, key, value, decay, least, states, dquery, dkey, dvalue, crossing, ends, begins, task):
    """Makes dquery, dkey or dvalue of one row and head, and what the decays' gradient needs of it."""
    H, M = query.shape[2:]
    D = value.shape[3]
    row, which = task // 3, task % 3
    b, h = row // H, row % H
    none = np.zeros(0)
    state = states[row]
    across = crossing[row]
    reverse = which > 0
    purpose = MULTIPLY if which == 2 and len(across) else NOTHING
    if which == 0:
        for first in range(0, M, WIDE):
            _scan(grad, value, key, decay, least, dquery, b, h, first, min(WIDE, M - first), reverse, purpose,
                  state, across, query, ends[row])
    elif which == 1:
        for first in range(0, M, WIDE):
            _scan(value, grad, query, decay, least, dkey, b, h, first, min(WIDE, M - first), reverse, purpose,
                  state, across, key, begins[row])
    else:
        for first in range(0, D, WIDE):
            _scan(key, query, grad, decay, least, dvalue, b, h, first, min(WIDE, D - first), reverse, purpose,
                  state, across, value, none)


@loop
def _decay_gradient(crossing, ends, begins, decay, ddecay):
    """Makes ddecay (B, T, H) from what is added up for each token."""
    B, T, H = decay.shape
    for row in range(B * H):
        b, h = row // H, row % H
        total = 0.0
        for t in range(T):
            if t > 0 and (T - t) % CHUNK == 0:
                total = crossing[row, (T - t) // CHUNK - 1]
            if t == 0 or decay[b, t, h] < FORGOTTEN:
                total = 0.0
            ddecay[b, t, h] = total
            total += begins[row, t] - ends[row, t]


@parallel_loop
def _forward(query, key, value, decay, least, out, states, blocks, width):
    for task in prange(value.shape[0] * value.shape[2] * blocks):
        _columns(query, key, value, decay, least, out, states, blocks, width, np.int64(task))


@parallel_loop
def _backward(grad, query, key, value, decay, least, states, dquery, dkey, dvalue, crossing, ends, begins):
    for task in prange(3 * value.shape[0] * value.shape[2]):
        _gradient(grad, query, key, value, decay, least, states, dquery, dkey, dvalue, crossing, ends, begins,
                  np.int64(task))


def stored_states(T: int) -> int:
    """Returns how many states of a row and head forward() stores where the decays' gradient may be wanted."""
    return (T - 1) // CHUNK


def forward(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, decay: np.ndarray, out: np.ndarray, states: np.ndarray
):
    """
    Writes out (B, T, H, D) and states (B*H*N, D, M), N = stored_states(T) or 0. decay (B, T, H) float64, 0 at a
    document's start.
    """
    rows = value.shape[0] * value.shape[2]
    D = value.shape[3]
    states = states.reshape(rows, len(states) // rows, *states.shape[1:])

    # of one row and head the threads share the columns, in blocks that are worth a scan
    blocks = -(-D // WIDE)
    if rows * blocks < 2:
        blocks = max(1, min(4, D // 16))
    width = -(-D // blocks)
    blocks = -(-D // width)
    use_threads(rows * blocks)
    _forward(query, key, value, decay, LEAST[value.itemsize], out, states, blocks, width)


def backward(
    grad: np.ndarray, query: np.ndarray, key: np.ndarray, value: np.ndarray, decay: np.ndarray, states: np.ndarray,
    dquery: np.ndarray, dkey: np.ndarray, dvalue: np.ndarray, ddecay: np.ndarray
):
    """
    Writes the gradients; ddecay (B, T, H) float64, that of the decays' logarithms, unless it is empty: it needs the
    states that forward() has stored.
    """
    # what the decays' gradient is made of, for each token
    rows = value.shape[0] * value.shape[2]
    states = states.reshape(rows, len(states) // rows, *states.shape[1:])
    wanted = ddecay.size > 0
    tokens = value.shape[1] if wanted else 0
    ends = np.zeros((rows, tokens))
    begins = np.zeros((rows, tokens))
    crossing = np.zeros((rows, states.shape[1] if wanted else 0))

    # the gradients
    use_threads(3 * rows)
    least = LEAST[value.itemsize]
    _backward(grad, query, key, value, decay, least, states, dquery, dkey, dvalue, crossing, ends, begins)
    if wanted:
        _decay_gradient(crossing, ends, begins, decay, ddecay)
