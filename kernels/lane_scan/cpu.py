"""
The lane scan as loops for a CPU: 16 channels at a time, in chunks of 32 tokens that begin where a document does.

A task is 16 channels of one head in one row. A chunk's inputs, outputs and the state lie one after another in scratch
memory that stays in the first-level cache. Of a chunk of n tokens that begins at t, with z_f the state in front of it
(the sum over s < t of e^{lambda_f (t - s)} u_s, lambda_f = -a_f + i w_f):
    y_{t+i} = sum over j <= i of kappa(i - j) u_{t+j} + sum over f of g_f Re(e^{lambda_f i} z_f)
    z_f <- e^{lambda_f n} z_f + sum over j of e^{lambda_f (n - j)} u_{t+j}
Each sum is a small product of matrices whose 8 to 16 results stay in registers: the tables of waves are read once for
16 channels. A document's last chunk makes no state, its first one reads none; no chunk has tokens of two documents. A
rotation is applied as the sum of its rounded numbers and of what their rounding has left out, since thousands of equal
rotations follow one another.

A table's columns are taken one by one: s <- s + g_k Phi_k(p_t) u_t and y_t <- y_t + Phi_k(p_t) s, with s in registers.

Reversed, with the same documents taken from their ends, a scan makes the gradient of u. Those of gains and decays come
of a further pass, with v_t the gradient of the sums, G_f = sum over i of e^{lambda_f i} v_{t+i}:
    dg_f = sum over pairs inside chunks by distance, kappa's derivative times v_i . u_j, + sum over chunks Re(G_f z_f)
    da_f = -g_f (the same, each pair times its distance), which takes G and z with distances in their sums as well
"""

from typing import NamedTuple

import numpy as np

from kernels.loops import called_loop, inner_loop, run_stages
from kernels.simd import load, madd, splat, store, total

CHUNK = 32      # tokens of a chunk, a multiple of 4
LANES = 16      # channels of a task, two vectors
STATE = 32      # numbers of a frequency's state: its real part in all channels, then its imaginary part

# Where rows of tables begin, and steps in them. Indices are unsigned: signed ones could count from an array's end, and
# each would be looked at.
U1, U2, U3 = np.uint64(1), np.uint64(2), np.uint64(3)


class Scan(NamedTuple):
    """What every task gets; of no numbers where it needs none. Each field is an array, as loops.run_stages has it."""
    sizes: np.ndarray       # (6) int64: T, W, H, F or K, the heads of waves, P
    flags: np.ndarray       # (3) int64, 1 or 0: reversed, the mean, the gradient of decays
    doc_start: np.ndarray   # (B T) int32
    u: np.ndarray           # (B T W)
    grad: np.ndarray        # (B T W), of gradients
    out: np.ndarray         # (B T W), of scans
    partial: np.ndarray     # (tasks, 2, F or K) float64, of gradients
    # tables, flat, as _wave_tables and scan() make them
    kernel: np.ndarray
    read: np.ndarray
    waves: np.ndarray
    rest: np.ndarray
    far: np.ndarray
    table: np.ndarray
    gain: np.ndarray


@inner_loop
def _channels(sizes, task):
    """Returns the batch row and the head of a task, its first channel and how many it has."""
    W, H = sizes[1], sizes[2]
    D = W // H
    blocks = -(-D // LANES)
    row = task // blocks
    head = row % H
    start = task % blocks * LANES
    return row // H, head, head * D + start, min(LANES, D - start)


# ---- A chunk's rows ---------------------------------------------------------


@inner_loop
def _copy_row(x, at, y, to, width, factor):
    """
    Writes `width` numbers of x from index `at` on, times a factor, to y from index `to` on. Rows of scratch memory are
    made of zeros, and stay 0 beyond the width.
    """
    if width == LANES:
        store(y, to, load(x, at) * splat(factor))
        store(y, to + 8, load(x, at + 8) * splat(factor))
    else:
        for c in range(np.uint64(width)):
            y[np.uint64(to) + c] = x[np.uint64(at) + c] * factor


@inner_loop
def _document(doc_start, b, end, T):
    """Returns the first token of the document whose last token is end - 1, whatever doc_start says from 0 on."""
    return min(max(doc_start[b * T + end - 1], 0), end - 1)


@inner_loop
def _factor(t, begin, mean, like):
    """Returns a token's factor of the mean, in the dtype of the array `like`."""
    return like.dtype.type(1.0 / (t - begin + 1)) if mean else like.dtype.type(1)


# ---- Waves ------------------------------------------------------------------


@inner_loop
def _inside(x, y, kernel, at, n):
    """Sets rows of y, y_i = sum over j <= i of kernel[at + i - j] x_j, for i < n rounded up to a multiple of 4."""
    k0 = splat(kernel[at])
    k1 = splat(kernel[at + U1])
    k2 = splat(kernel[at + U2])
    k3 = splat(kernel[at + U3])
    for i in range(0, n, 4):
        # the rows before the four
        a0 = splat(x.dtype.type(0))
        a1, b0, b1, c0, c1, d0, d1 = a0, a0, a0, a0, a0, a0, a0
        k = at + np.uint64(i)
        for j in range(i):
            x0, x1 = load(x, LANES * j), load(x, LANES * j + 8)
            weight = splat(kernel[k])
            a0, a1 = madd(weight, x0, a0), madd(weight, x1, a1)
            weight = splat(kernel[k + U1])
            b0, b1 = madd(weight, x0, b0), madd(weight, x1, b1)
            weight = splat(kernel[k + U2])
            c0, c1 = madd(weight, x0, c0), madd(weight, x1, c1)
            weight = splat(kernel[k + U3])
            d0, d1 = madd(weight, x0, d0), madd(weight, x1, d1)
            k -= U1

        # the four among themselves: no row is multiplied by 0, which would hand on what is not finite
        row = LANES * i
        x0, x1 = load(x, row), load(x, row + 8)
        a0, a1, b0, b1 = madd(k0, x0, a0), madd(k0, x1, a1), madd(k1, x0, b0), madd(k1, x1, b1)
        c0, c1, d0, d1 = madd(k2, x0, c0), madd(k2, x1, c1), madd(k3, x0, d0), madd(k3, x1, d1)
        x0, x1 = load(x, row + 16), load(x, row + 24)
        b0, b1 = madd(k0, x0, b0), madd(k0, x1, b1)
        c0, c1, d0, d1 = madd(k1, x0, c0), madd(k1, x1, c1), madd(k2, x0, d0), madd(k2, x1, d1)
        x0, x1 = load(x, row + 32), load(x, row + 40)
        c0, c1, d0, d1 = madd(k0, x0, c0), madd(k0, x1, c1), madd(k1, x0, d0), madd(k1, x1, d1)
        x0, x1 = load(x, row + 48), load(x, row + 56)
        d0, d1 = madd(k0, x0, d0), madd(k0, x1, d1)
        _store_four(y, row, a0, a1, b0, b1, c0, c1, d0, d1)


@inner_loop
def _store_four(y, row, a0, a1, b0, b1, c0, c1, d0, d1):
    """Writes four rows of 16 numbers, the first from index `row` on."""
    store(y, row, a0)
    store(y, row + 8, a1)
    store(y, row + 16, b0)
    store(y, row + 24, b1)
    store(y, row + 32, c0)
    store(y, row + 40, c1)
    store(y, row + 48, d0)
    store(y, row + 56, d1)


@inner_loop
def _add_state(state, y, read, at, n, F):
    """
    Adds to rows of y what they read from the state: sum over f of read_f,i . z_f. read (F, 2, CHUNK) from index `at`
    on: the weights of the real and of the imaginary parts.
    """
    for i in range(0, n, 4):
        row = LANES * i
        a0, a1, b0, b1 = load(y, row), load(y, row + 8), load(y, row + 16), load(y, row + 24)
        c0, c1, d0, d1 = load(y, row + 32), load(y, row + 40), load(y, row + 48), load(y, row + 56)
        k = at + np.uint64(i)
        for part in range(2 * F):
            z0, z1 = load(state, 16 * part), load(state, 16 * part + 8)
            weight = splat(read[k])
            a0, a1 = madd(weight, z0, a0), madd(weight, z1, a1)
            weight = splat(read[k + U1])
            b0, b1 = madd(weight, z0, b0), madd(weight, z1, b1)
            weight = splat(read[k + U2])
            c0, c1 = madd(weight, z0, c0), madd(weight, z1, c1)
            weight = splat(read[k + U3])
            d0, d1 = madd(weight, z0, d0), madd(weight, z1, d1)
            k += np.uint64(CHUNK)
        _store_four(y, row, a0, a1, b0, b1, c0, c1, d0, d1)


@inner_loop
def _rotate(state, waves, rest, at, F):
    """z_f <- e^{lambda_f n} z_f; waves and rest (F, 2, CHUNK + 1), index `at` is that of the distance n at f = 0."""
    step = np.uint64(CHUNK + 1)
    zero = splat(state.dtype.type(0))
    for f in range(F):
        cosine, sine = splat(waves[at]), splat(waves[at + step])
        more_cosine, more_sine = splat(rest[at]), splat(rest[at + step])
        for lane in range(0, LANES, 8):
            place = STATE * f + lane
            real, imaginary = load(state, place), load(state, place + LANES)
            new_real = madd(cosine, real, madd(more_cosine, real, zero - more_sine * imaginary)) - sine * imaginary
            small = madd(more_sine, real, more_cosine * imaginary)
            store(state, place, new_real)
            store(state, place + LANES, madd(sine, real, madd(cosine, imaginary, small)))
        at += step + step


@inner_loop
def _add_rows(state, x, weights, at, step, n, F):
    """
    z_f <- z_f + sum over j < n of weights_f[at + j step] x_j, two frequencies at a time. weights (F, 2, CHUNK + 1);
    step: 1, or -1 as an unsigned number.
    """
    row = np.uint64(CHUNK + 1)
    for f in range(0, F, 2):
        # the sums of two frequencies
        place = STATE * f
        a0, a1, b0, b1 = load(state, place), load(state, place + 8), load(state, place + 16), load(state, place + 24)
        c0, c1 = load(state, place + 32), load(state, place + 40)
        d0, d1 = load(state, place + 48), load(state, place + 56)

        # row by row
        k = at
        for j in range(n):
            x0, x1 = load(x, LANES * j), load(x, LANES * j + 8)
            weight = splat(weights[k])
            a0, a1 = madd(weight, x0, a0), madd(weight, x1, a1)
            weight = splat(weights[k + row])
            b0, b1 = madd(weight, x0, b0), madd(weight, x1, b1)
            weight = splat(weights[k + row + row])
            c0, c1 = madd(weight, x0, c0), madd(weight, x1, c1)
            weight = splat(weights[k + row + row + row])
            d0, d1 = madd(weight, x0, d0), madd(weight, x1, d1)
            k += step
        _store_four(state, place, a0, a1, b0, b1, c0, c1, d0, d1)
        at += row + row + row + row


@inner_loop
def _clear(x):
    for i in range(x.size):
        x[i] = 0


@called_loop
def _scan_waves(stage, task, thread, scan):
    """Makes out of a task's channels."""
    # the arrays, and where the head's tables are
    u, out, doc_start = scan.u, scan.out, scan.doc_start
    kernel, read, waves, rest = scan.kernel, scan.read, scan.waves, scan.rest
    T, W, F = scan.sizes[0], scan.sizes[1], scan.sizes[3]
    reverse, mean = scan.flags[0] == 1, scan.flags[1] == 1
    b, head, first, width = _channels(scan.sizes, task)
    kernel_at, read_at = np.uint64(head * CHUNK), np.uint64(head * F * 2 * CHUNK)
    waves_at = np.uint64(head % scan.sizes[4] * F * 2 * (CHUNK + 1))
    step = -1 if reverse else 1

    # scratch memory
    state = np.zeros(STATE * F, u.dtype)
    x = np.zeros(LANES * CHUNK, u.dtype)
    y = np.zeros(LANES * CHUNK, u.dtype)

    # document by document, from the last one on
    end = T
    while end > 0:
        begin = _document(doc_start, b, end, T)
        length = end - begin
        for done in range(0, length, CHUNK):
            n = min(CHUNK, length - done)
            t = end - 1 - done if reverse else begin + done
            at = (b * T + t) * W + first
            for i in range(n):
                factor = _factor(t + step * i, begin, mean and reverse, u)
                _copy_row(u, at + step * i * W, x, LANES * i, width, factor)

            # the outputs
            _inside(x, y, kernel, kernel_at, n)
            if done > 0:
                _add_state(state, y, read, read_at, n, F)
            for i in range(n):
                factor = _factor(t + step * i, begin, mean and not reverse, u)
                _copy_row(y, LANES * i, out, at + step * i * W, width, factor)

            # the state, where it will be read
            if done + n < length:
                if done == 0:
                    _clear(state)
                else:
                    _rotate(state, waves, rest, waves_at + np.uint64(n), F)
                _add_rows(state, x, waves, waves_at + np.uint64(n), np.uint64(-1), n, F)
        end = begin


@inner_loop
def _add_pairs(x, v, n, by_distance):
    """Adds v_i . x_j to by_distance[8 (i - j)] and the seven numbers behind it, for all j <= i < n."""
    for i in range(n):
        v0, v1 = load(v, LANES * i), load(v, LANES * i + 8)
        for j in range(i + 1):
            place = 8 * (i - j)
            sums = madd(v0, load(x, LANES * j), load(by_distance, place))
            store(by_distance, place, madd(v1, load(x, LANES * j + 8), sums))


@inner_loop
def _add_crossing(gathered, state, sums, F):
    """Adds Re(G_f z_f) to sums[8 f] and the seven numbers behind it."""
    zero = splat(state.dtype.type(0))
    for f in range(F):
        s = load(sums, 8 * f)
        for lane in range(0, LANES, 8):
            place = STATE * f + lane
            s = madd(load(gathered, place), load(state, place), s)
            s = madd(zero - load(gathered, place + LANES), load(state, place + LANES), s)
        store(sums, 8 * f, s)


@inner_loop
def _add_scaled(y, factor, x):
    """y <- y + factor x"""
    for i in range(0, x.size, 8):
        store(y, i, madd(splat(factor), load(x, i), load(y, i)))


@called_loop
def _sum_wave_gradients(stage, task, thread, scan):
    """
    Makes partial[task] (2, F): what a task's channels add to the gradient of the gains and, where it is wanted, to that
    of the decays, without its factor -gain. far: waves, each times its distance.
    """
    # the arrays, and where the head's tables are
    u, grad, doc_start, partial = scan.u, scan.grad, scan.doc_start, scan.partial[task]
    waves, rest, far = scan.waves, scan.rest, scan.far
    T, W, F = scan.sizes[0], scan.sizes[1], scan.sizes[3]
    mean, decay_grad = scan.flags[1] == 1, scan.flags[2] == 1
    b, head, first, width = _channels(scan.sizes, task)
    waves_at = np.uint64(head % scan.sizes[4] * F * 2 * (CHUNK + 1))

    # scratch memory: what the chunk's gradients gather, the state, both again with distances, and sums
    gathered = np.zeros(STATE * F, u.dtype)
    state = np.zeros(STATE * F, u.dtype)
    gathered_far = np.zeros(STATE * F if decay_grad else 0, u.dtype)
    state_far = np.zeros(STATE * F if decay_grad else 0, u.dtype)
    x = np.zeros(LANES * CHUNK, u.dtype)
    v = np.zeros(LANES * CHUNK, u.dtype)
    by_distance = np.zeros(8 * CHUNK, u.dtype)
    sums = np.zeros(8 * F, u.dtype)
    sums_far = np.zeros(8 * F, u.dtype)

    # document by document, from the last one on
    end = T
    while end > 0:
        begin = _document(doc_start, b, end, T)
        length = end - begin
        for done in range(0, length, CHUNK):
            n = min(CHUNK, length - done)
            t = begin + done
            at = (b * T + t) * W + first
            for i in range(n):
                _copy_row(u, at + i * W, x, LANES * i, width, u.dtype.type(1))
                _copy_row(grad, at + i * W, v, LANES * i, width, _factor(t + i, begin, mean, u))

            # the pairs inside, and those that cross the chunk's beginning
            _add_pairs(x, v, n, by_distance)
            if done > 0:
                _clear(gathered)
                _add_rows(gathered, v, waves, waves_at, U1, n, F)
                _add_crossing(gathered, state, sums, F)
                if decay_grad:
                    _clear(gathered_far)
                    _add_rows(gathered_far, v, far, waves_at, U1, n, F)
                    _add_crossing(gathered_far, state, sums_far, F)
                    _add_crossing(gathered, state_far, sums_far, F)

            # the states
            if done + n < length:
                ahead = waves_at + np.uint64(n)
                if done == 0:
                    _clear(state)
                    _clear(state_far)
                elif decay_grad:
                    _add_scaled(state_far, u.dtype.type(n), state)
                    _rotate(state_far, waves, rest, ahead, F)
                if done > 0:
                    _rotate(state, waves, rest, ahead, F)
                _add_rows(state, x, waves, ahead, np.uint64(-1), n, F)
                if decay_grad:
                    _add_rows(state_far, x, far, ahead, np.uint64(-1), n, F)
        end = begin

    # all of them
    distances = np.zeros(CHUNK)
    for k in range(CHUNK):
        distances[k] = total(load(by_distance, 8 * k))
    for f in range(F):
        of_gain, of_decay = np.float64(total(load(sums, 8 * f))), np.float64(total(load(sums_far, 8 * f)))
        k = waves_at + np.uint64(f * 2 * (CHUNK + 1))
        for distance in range(CHUNK):
            of_gain += distances[distance] * waves[k]
            of_decay += distances[distance] * far[k]
            k += U1
        partial[0, f] = of_gain
        partial[1, f] = of_decay


# ---- Tables -----------------------------------------------------------------


@inner_loop
def _scan_column(x, y, s0, s1, table, at, step, last, weight, n):
    """
    Takes n rows of x through one column of a table: s <- s + weight Phi_i x_i, y_i <- y_i + Phi_i s. Phi_i is
    table[min(at + i step, last)]. Returns s.
    """
    for i in range(n):
        value = table[np.uint64(min(at + i * step, last))]
        scaled, value = splat(value * weight), splat(value)
        row = LANES * i
        s0 = madd(scaled, load(x, row), s0)
        s1 = madd(scaled, load(x, row + 8), s1)
        store(y, row, madd(value, s0, load(y, row)))
        store(y, row + 8, madd(value, s1, load(y, row + 8)))
    return s0, s1


@called_loop
def _scan_table(stage, task, thread, scan):
    """Makes out of a task's channels."""
    # the arrays
    u, out, doc_start, table, gain = scan.u, scan.out, scan.doc_start, scan.table, scan.gain
    T, W, K, P = scan.sizes[0], scan.sizes[1], scan.sizes[3], scan.sizes[5]
    reverse, mean = scan.flags[0] == 1, scan.flags[1] == 1
    b, head, first, width = _channels(scan.sizes, task)
    step = -1 if reverse else 1

    # scratch memory
    state = np.zeros(LANES * K, u.dtype)
    x = np.zeros(LANES * CHUNK, u.dtype)
    y = np.zeros(LANES * CHUNK, u.dtype)

    # document by document, from the last one on
    end = T
    while end > 0:
        begin = _document(doc_start, b, end, T)
        length = end - begin
        _clear(state)
        for done in range(0, length, CHUNK):
            n = min(CHUNK, length - done)
            t = end - 1 - done if reverse else begin + done
            at = (b * T + t) * W + first
            for i in range(n):
                factor = _factor(t + step * i, begin, mean and reverse, u)
                _copy_row(u, at + step * i * W, x, LANES * i, width, factor)

            # column by column
            _clear(y)
            for k in range(K):
                place = LANES * k
                s0, s1 = _scan_column(x, y, load(state, place), load(state, place + 8), table, k * P + t - begin, step,
                                      k * P + P - 1, gain[head * K + k], n)
                store(state, place, s0)
                store(state, place + 8, s1)
            for i in range(n):
                factor = _factor(t + step * i, begin, mean and not reverse, u)
                _copy_row(y, LANES * i, out, at + step * i * W, width, factor)
        end = begin


@inner_loop
def _sum_column(x, v, s0, s1, sums, table, at, last, n):
    """s <- s + Phi_i x_i, sums <- sums + Phi_i s . v_i, for n rows of one column of a table. Returns s and sums."""
    for i in range(n):
        value = splat(table[np.uint64(min(at + i, last))])
        row = LANES * i
        s0 = madd(value, load(x, row), s0)
        s1 = madd(value, load(x, row + 8), s1)
        sums = madd(value, madd(s0, load(v, row), s1 * load(v, row + 8)), sums)
    return s0, s1, sums


@called_loop
def _sum_table_gradients(stage, task, thread, scan):
    """Makes partial[task, 0] (K,): what a task's channels add to the gradient of the gains."""
    # the arrays
    u, grad, doc_start, table, partial = scan.u, scan.grad, scan.doc_start, scan.table, scan.partial[task]
    T, W, K, P = scan.sizes[0], scan.sizes[1], scan.sizes[3], scan.sizes[5]
    mean = scan.flags[1] == 1
    b, _, first, width = _channels(scan.sizes, task)

    # scratch memory
    state = np.zeros(LANES * K, u.dtype)
    sums = np.zeros(8 * K, u.dtype)
    x = np.zeros(LANES * CHUNK, u.dtype)
    v = np.zeros(LANES * CHUNK, u.dtype)

    # document by document, from the last one on
    end = T
    while end > 0:
        begin = _document(doc_start, b, end, T)
        _clear(state)
        for t in range(begin, end, CHUNK):
            n = min(CHUNK, end - t)
            at = (b * T + t) * W + first
            for i in range(n):
                _copy_row(u, at + i * W, x, LANES * i, width, u.dtype.type(1))
                _copy_row(grad, at + i * W, v, LANES * i, width, _factor(t + i, begin, mean, u))
            for k in range(K):
                place = LANES * k
                s0, s1, of_column = _sum_column(x, v, load(state, place), load(state, place + 8), load(sums, 8 * k),
                                                table, k * P + t - begin, k * P + P - 1, n)
                store(state, place, s0)
                store(state, place + 8, s1)
                store(sums, 8 * k, of_column)
        end = begin
    for k in range(K):
        partial[0, k] = total(load(sums, 8 * k))


# ---- Host functions ---------------------------------------------------------


def _wave_tables(frequencies: np.ndarray, gain: np.ndarray, decay: np.ndarray | None, dtype: np.dtype) -> tuple:
    """
    Returns flat tables in dtype, for an even number of frequencies: kernel (H, CHUNK), kappa; read (H, F, 2, CHUNK),
    the waves of the distances from 0 on, times the gains; waves (H or 1, F, 2, CHUNK + 1), cosine and sine; rest, what
    rounding waves has left out; and the last as float64, not flat.
    """
    # waves
    if len(frequencies) % 2:
        frequencies = np.append(frequencies, 0.0)
        gain = np.pad(gain, ((0, 0), (0, 1)))
        decay = None if decay is None else np.pad(decay, ((0, 0), (0, 1)))
    distances = np.arange(CHUNK + 1.0)
    angles = 2 * np.pi * (frequencies[:, None] * distances % 1.0)
    waves = np.stack((np.cos(angles), np.sin(angles)), 1)[None]
    if decay is not None:
        waves = waves * np.exp(-decay[..., None, None] * distances)

    # in dtype
    read = gain[..., None, None] * waves[..., :-1]
    kernel = read[:, :, 0].sum(1)
    read[:, :, 1] *= -1
    rounded = waves.astype(dtype)
    tables = kernel.astype(dtype), read.astype(dtype), rounded, (waves - rounded).astype(dtype)
    return *(table.ravel() for table in tables), waves


def _run(function, u: np.ndarray, count: int, H: int, doc_start: np.ndarray, tasks: int, reverse: bool = False,
         mean: bool = False, decay_grad: bool = False, wave_heads: int = 1, P: int = 0, **arrays: np.ndarray):
    """Runs all tasks of a pass. count: F or K; arrays: the fields of Scan that it needs beside those of every pass."""
    nothing = np.empty(0, u.dtype)
    fields = dict.fromkeys(Scan._fields, nothing) | dict(partial=np.empty((0, 2, 0)))
    fields |= {name: array if name == "partial" else array.reshape(-1) for name, array in arrays.items()}
    fields |= dict(
        sizes=np.array([*u.shape[1:], H, count, wave_heads, P], np.int64),
        flags=np.array([reverse, mean, decay_grad], np.int64),
        doc_start=doc_start.reshape(-1),
        u=u.reshape(-1),
    )
    run_stages(function, [tasks], Scan(**fields), kind=u.dtype)


def _tasks(u: np.ndarray, H: int) -> int:
    """Returns how many tasks a pass has: each 16 channels of a head, or fewer, in one row."""
    return len(u) * H * -(-u.shape[2] // (H * LANES))


def scan(
    u: np.ndarray, features: np.ndarray, gain: np.ndarray, decay: np.ndarray | None, doc_start: np.ndarray,
    reverse: bool, mean: bool, out: np.ndarray
):
    """
    Writes out (B, T, W), contiguous as u is: the sums, or with `reverse` the gradient of u of which u is that of the
    sums. features (F,) or (P, K), gain and decay (H, F) float64; doc_start (B, T) int32.
    """
    H = len(gain)
    common = dict(H=H, doc_start=doc_start, tasks=_tasks(u, H), reverse=reverse, mean=mean, out=out)
    if features.ndim == 2:
        table, gains = (np.ascontiguousarray(x, u.dtype) for x in (features.T, gain))
        P, K = features.shape
        _run(_scan_table, u, K, P=P, table=table, gain=gains, **common)
        return
    kernel, read, rounded, rest, waves = _wave_tables(features, gain, decay, u.dtype)
    heads, F = waves.shape[:2]
    _run(_scan_waves, u, F, wave_heads=heads, kernel=kernel, read=read, waves=rounded, rest=rest, **common)


def gain_gradients(
    u: np.ndarray, g: np.ndarray, features: np.ndarray, gain: np.ndarray, decay: np.ndarray | None,
    doc_start: np.ndarray, mean: bool, decay_grad: bool
) -> np.ndarray:
    """Returns (2, H, F) float64: the gradients of the gains and, with decay_grad, of the decays; g: that of y."""
    H = len(gain)
    tasks = _tasks(u, H)
    common = dict(H=H, doc_start=doc_start, tasks=tasks, mean=mean, grad=g)
    if features.ndim == 2:
        P, K = features.shape
        partial = np.zeros((tasks, 2, K))
        table = np.ascontiguousarray(features.T, u.dtype)
        _run(_sum_table_gradients, u, K, P=P, table=table, partial=partial, **common)
    else:
        _, _, rounded, rest, waves = _wave_tables(features, gain, decay, u.dtype)
        heads, F = waves.shape[:2]
        partial = np.zeros((tasks, 2, F))
        far = (waves * np.arange(CHUNK + 1.0)).astype(u.dtype)
        _run(_sum_wave_gradients, u, F, wave_heads=heads, waves=rounded, rest=rest, far=far, partial=partial,
             decay_grad=decay_grad, **common)
    sums = partial.reshape(len(u), H, -1, 2, partial.shape[2]).sum((0, 2)).swapaxes(0, 1)[..., :features.shape[-1]]
    sums[1] *= -gain
    return sums
