"""
Splanifold, backend "triton": forward and backward pass of G splanifolds side by side on a GPU, r (M, G, K) to (M, n) or
(M, G n).

    t = mean_k u_k     delta = u - t     Sigma = K t     alpha = Sigma / (Sigma^2 + eps^2)     s = 1 / sqrt(1 + (|delta| / delta_max)^2)     u = (1 + 2E) r - E
    Phi = sum over nodes i of h_i P_i + h'_i mean_k P'_i + (s h_i E_i + s h'_i E'_i + alpha h'_i P'_i) delta

with h_i(t) and h'_i(t) the cubic Hermite weights of node i's value and tangent, 0 unless the node bounds t's segment:
per token and group one number c_m a matrix.
1. Two nodes, no warp: with beta = Sigma^2 / (Sigma^2 + eps^2), alpha h10 = beta / K (h00 - 2 h10) and alpha h11 = beta
   / K (h11 - h10), so that six matrices are four,
       A00 = E0 + P0' / K     A01 = E1     A10 = E0' - (2 P0' + P1') / K     A11 = E1' + P1' / K
   and (beta - 1) / K [(t - 1)^2 P0' + t (t - 1) P1'] delta, which only tiles compute where a token's 1 - beta, or its
   effect (1 - beta) |t - 1| / |t| on the derivative in t, is above 2^-13 for bfloat16, 2^-16 for float16 (1/32 of a
   unit roundoff, relative to the terms in P') and 2^-27 for float32 (1/8).
2. delta has sum 0, so matrices' rows may be centred: the gradient of delta then has sum 0 as well and dr = (1 + 2E) (d
   delta + dt / K) needs no sum but dt, and matrix r is matrix delta but for the rounding of the rows, whose sums are
   kept.
3. Products of one group ("concat", or G = 1): its c_m are the same for all channels, so r (tokens x K) meets all
   matrices of a tile of outputs side by side, as a plain matrix product does, and c_m weighs the results. Sums over
   groups: delta, times c_m, is one operand and one accumulator takes four products a block of channels. Backward, d
   delta = sum c_m x_m and dt = sum c_m' x_m . delta with x_m = grad matrix_m side by side; matrices: grad' (c_m delta),
   side by side, in splits of the tokens that are summed afterwards: no atomics, two runs agree bit by bit. The spine is
   one more product, of 2 S columns a group.
4. Six matrices, S > 2 and warps: three matrices a node, for the nodes that bound a segment of the tile's tokens, the
   other tokens' weights being 0.
5. K <= 8 in a sum: channels of several groups, each padded to a power of two, share a tile; their t come from a table
   that a first kernel writes, as always.
6. K <= 4 and n <= 8 in "concat", S = 2: a thread holds whole groups of a few tokens, all in registers and in float32,
   one kernel a pass.

Products for one token, S = 2, without padding and corrections (six matrices for a warp, 3 S for S > 2, where four are
said; and 2 S for 4):
    forward 2 G n (4 K + 4) FLOPs; backward twice that                     a side-by-side product of three matrices has
                                                                           room for four: a third more
    6.: forward 4 n K + 4 (K - 1) float32 multiply-adds a group, backward a little more than twice as many; corrections
    half as many again
Bytes for one token at e bytes a value, N = n for a sum, else G n; what other tiles read again is the cache's, matrices
are not counted:
    forward     read 2 e G K + 4 G, write e N + 4 G                        6.: read e G K, write e G n
    backward    read e (3 G K + 3 N) + 16 G, write e G K + 4 G             6.: read e G (K + n), write e G K + (6 K - 2) G n / 32
                where K is above a tile's channels, e G K more of both, and 8 bytes a piece and group
    kept for the backward pass: r and the controls. The stacked matrices are made from the controls in each pass, by
    elementwise operations in float32.

Source: Adams, K-Splanifolds, 2026, doi 10.5281/zenodo.18673034; the forms are ours.
Status: never run on a GPU; the kernels are tested in Triton's interpreter and compiled ahead of time, and their launch
table is a choice, not a measurement. At the tested shapes no kernel spills on sm_90, but that of dr where 5. meets a
warp or S > 2.
"""

import math
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:  # no Triton for this platform
    triton, tl, jit = None, SimpleNamespace(constexpr=lambda value: value), lambda function: function


# ---- Triton kernels ---------------------------------------------------------
# A product contracts the channels of J groups: all G for mix "sum" (one product, Q = 1), one for "concat" (Q = G
# products). spine (Q, N, J 2 SP) and matrices (count, Q, N, channels) are stacked by _tables. Channels come in blocks
# of BLOCK_K: a piece of one group, or, PACKED, BLOCK_K / KP whole groups, each padded to KP channels. b_t is (rows, 1)
# or, PACKED, (rows, BLOCK_K). Rows are int64 and clamped to the last one.

FOUR, CORRECTION, NODE, SPINE = (tl.constexpr(kind) for kind in range(4))  # which matrices share a deviation tile


@jit
def _first_node(b_t, S: tl.constexpr):
    """The node at which t's segment begins."""
    return tl.minimum(tl.maximum(tl.floor(b_t * (S - 1)), 0.0), S - 2.0).to(tl.int32)


@jit
def _basis(b_t, node, tangent, S: tl.constexpr):
    """
    Weight of a node's value, or where `tangent` of its tangent, at t, and its derivative in t: 0 for nodes that do not
    bound t's segment.
    """
    b_segment = _first_node(b_t, S).to(tl.float32)
    b_tau = b_t * (S - 1) - b_segment
    b_place = node - b_segment
    first, second = b_place == 0.0, b_place == 1.0
    b_rest = b_tau - 1.0
    b_rise, b_slope = b_tau * b_tau * (3.0 - 2.0 * b_tau), -6.0 * b_tau * b_rest
    b_value = tl.where(tangent, tl.where(first, b_tau * b_rest * b_rest, b_tau * b_tau * b_rest),
                       tl.where(first, 1.0 - b_rise, b_rise))
    b_derivative = tl.where(tangent, tl.where(first, b_rest * (3.0 * b_tau - 1.0), b_tau * (3.0 * b_tau - 2.0)),
                            tl.where(first, -b_slope, b_slope))
    return tl.where(first | second, b_value, 0.0), tl.where(first | second, b_derivative * (S - 1), 0.0)


@jit
def _coefficients(b_t, b_s, m, node, eps2, K: tl.constexpr, S: tl.constexpr, KIND: tl.constexpr):
    """c_m, dc_m / dt and dc_m / ds of matrix m of a kind (for NODE, of that node; its fourth is none)."""
    if KIND == FOUR:
        b_c, b_ct = _basis(b_t, m % 2, m >= 2, 2)
        return b_c, b_ct, b_c
    else:
        b_sigma = b_t * K
        b_inverse = 1.0 / (b_sigma * b_sigma + eps2)
        b_alpha = b_sigma * b_inverse
        if KIND == CORRECTION:  # (beta - 1) / K times (t - 1)^2 and t (t - 1)
            b_factor, b_factor_t = -(eps2 * b_inverse) / K, 2.0 * (eps2 * b_inverse) * b_alpha
            b_rest = b_t - 1.0
            b_p, b_pt = tl.where(m == 0, b_rest, b_t) * b_rest, tl.where(m == 0, 2.0 * b_rest, 2.0 * b_t - 1.0)
            b_c = b_factor * b_p
            return b_c, b_factor_t * b_p + b_factor * b_pt, b_c
        else:
            b_alpha_t = K * ((eps2 - b_sigma * b_sigma) * b_inverse) * b_inverse
            b_h, b_ht = _basis(b_t, node, m >= 1, S)
            b_h, b_ht = tl.where(m < 3, b_h, 0.0), tl.where(m < 3, b_ht, 0.0)
            return tl.where(m < 2, b_s, b_alpha) * b_h, tl.where(m < 2, b_s * b_ht,
                                                                 b_alpha * b_ht + b_alpha_t * b_h), tl.where(m < 2, b_h,
                    0.0)


@jit
def _uncorrected(b_t, eps2, threshold, K: tl.constexpr):
    """
    1 where four matrices are not enough: where 1 - beta, or its share of the derivative in t, (1 - beta) |t - 1| / |t|,
    is above the threshold.
    """
    b_sigma = b_t * K
    b_missing = eps2 / (b_sigma * b_sigma + eps2)
    return (b_missing * (tl.abs(b_t) + tl.abs(b_t - 1.0)) > threshold * tl.abs(b_t)).to(tl.int32)


@jit
def _channels(block, K: tl.constexpr, KP: tl.constexpr, J: tl.constexpr, BLOCK_K: tl.constexpr, PACKED: tl.constexpr):
    """
    Of a block of channels: group (a scalar unless PACKED), coordinate, which exist, and the column in the stacked
    matrices.
    """
    offs = tl.arange(0, BLOCK_K)
    if PACKED:
        column = block * BLOCK_K + offs
        group, k = column // KP, column % KP
        return group, k, (k < K) & (group < J), column
    else:
        CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
        group = block // CHUNKS
        k = (block % CHUNKS) * BLOCK_K + offs
        return group, k, k < K, group * K + k


@jit
def _statistic(ptr, rows, group, G: tl.constexpr, J: tl.constexpr, PACKED: tl.constexpr):
    """
    (rows, 1), PACKED (rows, channels): a statistic of each row's group; 1 for groups beyond the last, which need no
    corrections.
    """
    if PACKED:
        return tl.load(ptr + rows[:, None] * G + group[None, :], mask=(group < J)[None, :], other=1.0)
    else:
        return tl.load(ptr + rows * G + group)[:, None]


@jit
def _deviations(r_ptr, b_t, rows, group, k, valid, scale, shift, G: tl.constexpr, K: tl.constexpr, WHOLE: tl.constexpr):
    """delta (rows, channels); 0 where there is no channel. WHOLE: all exist."""
    ptrs = r_ptr + rows[:, None] * (G * K) + (group * K + k)[None, :]
    if WHOLE:
        return tl.load(ptrs).to(tl.float32) * scale - shift - b_t
    else:
        return tl.where(valid[None, :], tl.load(ptrs, mask=valid[None, :],
                                                other=0.0).to(tl.float32) * scale - shift - b_t, 0.0)


@jit
def _splanifold_stats_kernel(r_ptr, stats_ptr, items, scale, shift, inverse_delta_max2,
                             K: tl.constexpr, WARP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """
    stats (2 with WARP, else 1; items): t, and s = 1 / sqrt(1 + (|delta| / delta_max)^2), of items rows of K
    coordinates.
    """
    offs, offs_k = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    ptrs = r_ptr + tl.minimum(offs, items - 1)[:, None] * K + offs_k[None, :]
    b_sum = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        b_sum += tl.load(ptrs + k0, mask=(k0 + offs_k < K)[None, :], other=0.0).to(tl.float32)
    b_t = tl.sum(b_sum, 1) * (scale / K) - shift
    tl.store(stats_ptr + offs, b_t, mask=offs < items)
    if WARP:
        b_square = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        for k0 in range(0, K, BLOCK_K):
            b_delta = tl.load(ptrs + k0, mask=(k0 + offs_k < K)[None, :],
                              other=0.0).to(tl.float32) * scale - shift - b_t[:, None]
            b_square += tl.where((k0 + offs_k < K)[None, :], b_delta * b_delta, 0.0)
        tl.store(stats_ptr + items + offs, 1.0 / tl.sqrt(1.0 + tl.sum(b_square, 1) * inverse_delta_max2),
                 mask=offs < items)


@jit
def _add_products(b_acc, r_ptr, stats_ptr, matrices_ptr, rows, offs_n, items, node, scale, shift, eps2, G: tl.constexpr,
                  K: tl.constexpr, N: tl.constexpr, S: tl.constexpr, J: tl.constexpr, KP: tl.constexpr,
                  PACKED: tl.constexpr, WARP: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
                  PRECISION: tl.constexpr, KIND: tl.constexpr, COUNT: tl.constexpr):
    """
    b_acc (rows, outputs) + sum over COUNT matrices of matrix_m (c_m delta), over several groups: one product a matrix
    and block of channels.
    """
    BLOCKS: tl.constexpr = (J * KP + BLOCK_K - 1) // BLOCK_K if PACKED else J * ((K + BLOCK_K - 1) // BLOCK_K)
    WHOLE: tl.constexpr = (not PACKED) and K % BLOCK_K == 0
    PRODUCTS: tl.constexpr = G // J
    for block in range(0, BLOCKS):
        group, k, valid, column = _channels(block, K, KP, J, BLOCK_K, PACKED)
        b_t = _statistic(stats_ptr, rows, group, G, J, PACKED)
        b_s = 1.0
        if WARP:
            b_s = _statistic(stats_ptr + items, rows, group, G, J, PACKED)
        b_delta = _deviations(r_ptr, b_t, rows, group, k, valid, scale, shift, G, K, WHOLE)
        matrix_ptrs = matrices_ptr + offs_n[:, None] * (J * KP) + column[None, :]
        for m in tl.static_range(COUNT):
            b_c = _coefficients(b_t, b_s, m, node, eps2, K, S, KIND)[0]
            if WHOLE and N % BLOCK_N == 0:
                b_matrix = tl.load(matrix_ptrs + m * (PRODUCTS * N * J * KP))
            else:
                b_matrix = tl.load(matrix_ptrs + m * (PRODUCTS * N * J * KP),
                                   mask=(offs_n < N)[:, None] & valid[None, :], other=0.0)
            b_acc = tl.dot((b_c * b_delta).to(b_matrix.dtype), tl.trans(b_matrix), b_acc, input_precision=PRECISION)
    return b_acc


@jit
def _add_combination(b_acc, r_ptr, matrices_ptr, sums_ptr, b_t, b_s, rows, offs_n, node, scale, shift, eps2,
                     G: tl.constexpr, K: tl.constexpr, N: tl.constexpr, S: tl.constexpr, BLOCK_K: tl.constexpr,
                     PRECISION: tl.constexpr, KIND: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """
    b_acc (rows, outputs) + sum c_m x_m for products of one group, whose coefficients are the same for all channels,
    with x_m = matrix_m delta for the COUNT matrices of a kind, side by side in one product of WIDTH places. It takes r
    as it is: delta = scale r - shift - t, and sums has the sums of the matrices' rows.
    """
    BLOCK_M: tl.constexpr = b_acc.shape[0]
    BLOCK_N: tl.constexpr = b_acc.shape[1]
    offs_m, offs_k = tl.arange(0, WIDTH), tl.arange(0, BLOCK_K)
    outputs = tl.reshape(offs_m[:, None] * (G * N * K) + (offs_n * K)[None, :], [WIDTH * BLOCK_N])
    exists = tl.reshape((offs_m < COUNT)[:, None] & (offs_n < N)[None, :], [WIDTH * BLOCK_N])
    b_x = tl.zeros([BLOCK_M, WIDTH * BLOCK_N], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        b_r = tl.load(r_ptr + rows[:, None] * (G * K) + (k0 + offs_k)[None, :], mask=(k0 + offs_k < K)[None, :],
                      other=0.0)
        b_matrices = tl.load(matrices_ptr + outputs[:, None] + (k0 + offs_k)[None, :],
                             mask=exists[:, None] & (k0 + offs_k < K)[None, :], other=0.0)
        b_x = tl.dot(b_r, tl.trans(b_matrices), b_x, input_precision=PRECISION)
    b_sums = tl.load(sums_ptr + offs_m[:, None] * (G * N) + offs_n[None, :],
                     mask=(offs_m < COUNT)[:, None] & (offs_n < N)[None, :], other=0.0)
    b_x = tl.reshape(b_x, [BLOCK_M, WIDTH, BLOCK_N]) * scale - (b_t + shift)[:, None, :] * b_sums[None, :, :]
    return b_acc + tl.sum(_coefficients(b_t[:, None, :], b_s[:, None, :], offs_m[None, :, None], node, eps2, K, S,
                                        KIND)[0] * b_x, 1)


@jit
def _splanifold_fwd_kernel(r_ptr, stats_ptr, spine_ptr, matrices_ptr, sums_ptr, out_ptr, M, items, scale, shift, eps2,
                           threshold, G: tl.constexpr, K: tl.constexpr, N: tl.constexpr, S: tl.constexpr,
                           SP: tl.constexpr, J: tl.constexpr, KP: tl.constexpr, PACKED: tl.constexpr,
                           WARP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                           BLOCK_F: tl.constexpr, PRECISION: tl.constexpr):
    """A tile of tokens and outputs. Grid: products x tiles of tokens x tiles of outputs, the last fastest."""
    N_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    PRODUCTS: tl.constexpr = G // J
    tiles = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    product, tile = (pid // N_TILES // tiles).to(tl.int64), (pid // N_TILES) % tiles
    offs_n = (pid % N_TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(offs_m, M - 1).to(tl.int64)
    r_ptr += product * (J * K)
    stats_ptr += product * J
    spine_ptr += product * (N * J * 2 * SP)
    matrices_ptr += product * (N * J * KP)

    b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_state = tl.zeros([BLOCK_M, BLOCK_F], tl.int32)
    b_low = tl.full([BLOCK_M, BLOCK_F], S, tl.int32)
    for f0 in range(0, J * 2 * SP, BLOCK_F):
        offs_f = f0 + tl.arange(0, BLOCK_F)
        group, place = offs_f // (2 * SP), offs_f % (2 * SP)
        b_t = _statistic(stats_ptr, rows, group, G, J, True)
        b_h = _basis(b_t, (place % SP)[None, :], (place >= SP)[None, :], S)[0]
        b_spine = tl.load(spine_ptr + offs_n[:, None] * (J * 2 * SP) + offs_f[None, :],
                          mask=(offs_n < N)[:, None] & (group < J)[None, :], other=0.0)
        b_acc = tl.dot(b_h.to(b_spine.dtype), tl.trans(b_spine), b_acc, input_precision=PRECISION)
        if S == 2 and not WARP:
            b_state = tl.maximum(b_state, tl.where((group < J)[None, :], _uncorrected(b_t, eps2, threshold, K), 0))
        else:
            b_state = tl.maximum(b_state, tl.where((group < J)[None, :], _first_node(b_t, S), 0))
            b_low = tl.minimum(b_low, tl.where((group < J)[None, :], _first_node(b_t, S), S))

    high = tl.max(tl.max(b_state, 1), 0)
    if J == 1:
        sums_ptr += product * N
        b_t = _statistic(stats_ptr, rows, 0, G, J, False)
        b_s = tl.full([1, 1], 1.0, tl.float32)
        if WARP:
            b_s = _statistic(stats_ptr + items, rows, 0, G, J, False)
        if S == 2 and not WARP:
            b_acc = _add_combination(b_acc, r_ptr, matrices_ptr, sums_ptr, b_t, b_s, rows, offs_n, 0, scale, shift,
                                     eps2, G, K, N, S, BLOCK_K, PRECISION, FOUR, 4, 4)
            if high > 0:
                b_acc = _add_combination(b_acc, r_ptr, matrices_ptr + 4 * G * N * K, sums_ptr + 4 * G * N, b_t, b_s,
                                         rows, offs_n, 0, scale, shift, eps2, G, K, N, S, BLOCK_K, PRECISION,
                                         CORRECTION, 2, 2)
        else:
            # the nodes that bound a segment of the tile's tokens
            for node in range(tl.min(tl.min(b_low, 1), 0), high + 2):
                b_acc = _add_combination(b_acc, r_ptr, matrices_ptr + node * (3 * G * N * K),
                                         sums_ptr + node * (3 * G * N), b_t, b_s, rows, offs_n, node, scale, shift,
                                         eps2, G, K, N, S, BLOCK_K, PRECISION, NODE, 3, 4)
    elif S == 2 and not WARP:
        b_acc = _add_products(b_acc, r_ptr, stats_ptr, matrices_ptr, rows, offs_n, items, 0, scale, shift, eps2,
                              G, K, N, S, J, KP, PACKED, WARP, BLOCK_K, BLOCK_N, PRECISION, FOUR, 4)
        if high > 0:
            b_acc = _add_products(b_acc, r_ptr, stats_ptr, matrices_ptr + 4 * PRODUCTS * N * J * KP, rows, offs_n,
                                  items, 0, scale, shift, eps2, G, K, N, S, J, KP, PACKED, WARP, BLOCK_K, BLOCK_N,
                                  PRECISION, CORRECTION, 2)
    else:
        for node in range(tl.min(tl.min(b_low, 1), 0), high + 2):
            b_acc = _add_products(b_acc, r_ptr, stats_ptr, matrices_ptr + node * (3 * PRODUCTS * N * J * KP), rows,
                                  offs_n, items, node, scale, shift, eps2, G, K, N, S, J, KP, PACKED, WARP, BLOCK_K,
                                  BLOCK_N, PRECISION, NODE, 3)
    tl.store(out_ptr + (rows * PRODUCTS + product)[:, None] * N + offs_n[None, :], b_acc.to(out_ptr.dtype.element_ty),
             mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


@jit
def _group_sums(b_x, GROUPS: tl.constexpr, SIZE: tl.constexpr, KP: tl.constexpr, PACKED: tl.constexpr):
    """
    Sums over the columns, (rows, 1); PACKED over each of GROUPS runs of SIZE columns, and handed to that group's KP
    channels, (rows, GROUPS KP).
    """
    if PACKED:
        b_sums = tl.sum(tl.reshape(b_x, [b_x.shape[0], GROUPS, SIZE]), 2)
        return tl.reshape(tl.broadcast_to(b_sums[:, :, None], [b_x.shape[0], GROUPS, KP]), [b_x.shape[0], GROUPS * KP])
    else:
        return tl.sum(b_x, 1)[:, None]


@jit
def _grad_products(b_ddelta, b_dt, b_ds, grad_ptr, matrices_ptr, b_t, b_s, rows, node, eps2, valid, column,
                   G: tl.constexpr, K: tl.constexpr, N: tl.constexpr, S: tl.constexpr, J: tl.constexpr,
                   KP: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, KIND: tl.constexpr,
                   COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """
    With x_m = grad matrix_m (rows, channels) for the COUNT matrices of a kind, side by side in one product of WIDTH
    places: b_ddelta + sum c_m x_m, and by channel b_dt + sum dc_m / dt x_m and b_ds + sum dc_m / ds x_m.
    """
    PRODUCTS: tl.constexpr = G // J
    BLOCK_M: tl.constexpr = b_ddelta.shape[0]
    BLOCK_K: tl.constexpr = b_ddelta.shape[1]
    offs_m, offs_n = tl.arange(0, WIDTH), tl.arange(0, BLOCK_N)
    columns = tl.reshape(offs_m[:, None] * (PRODUCTS * N * J * KP) + column[None, :], [WIDTH * BLOCK_K])
    exists = tl.reshape((offs_m < COUNT)[:, None] & valid[None, :], [WIDTH * BLOCK_K])
    b_x = tl.zeros([BLOCK_M, WIDTH * BLOCK_K], tl.float32)
    for n0 in range(0, N, BLOCK_N):
        b_grad = tl.load(grad_ptr + rows[:, None] * (PRODUCTS * N) + (n0 + offs_n)[None, :],
                         mask=(n0 + offs_n < N)[None, :], other=0.0)
        b_matrices = tl.load(matrices_ptr + (n0 + offs_n)[:, None] * (J * KP) + columns[None, :],
                             mask=(n0 + offs_n < N)[:, None] & exists[None, :], other=0.0)
        b_x = tl.dot(b_grad, b_matrices, b_x, input_precision=PRECISION)
    b_x = tl.reshape(b_x, [BLOCK_M, WIDTH, BLOCK_K])
    b_c, b_ct, b_cs = _coefficients(b_t[:, None, :], b_s[:, None, :], offs_m[None, :, None], node, eps2, K, S, KIND)
    return b_ddelta + tl.sum(b_c * b_x, 1), b_dt + tl.sum(b_ct * b_x, 1), b_ds + tl.sum(b_cs * b_x, 1)


@jit
def _splanifold_bwd_r_kernel(r_ptr, stats_ptr, spine_ptr, matrices_ptr, grad_ptr, dr_ptr, partial_ptr, M, items, scale,
                             shift, eps2, threshold, inverse_delta_max2, G: tl.constexpr, K: tl.constexpr,
                             N: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, J: tl.constexpr, KP: tl.constexpr,
                             PACKED: tl.constexpr, WARP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                             BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr, PRECISION: tl.constexpr):
    """
    A tile of tokens and channels: dr where it holds whole groups, else scale d delta, with its shares of dt and (WARP)
    ds in partial (pieces of a group; 1 or 2; items), for the next kernel. Grid: products x tiles of tokens x blocks of
    channels, the last fastest.
    """
    CHUNKS: tl.constexpr = 1 if PACKED else (K + BLOCK_K - 1) // BLOCK_K
    BLOCKS: tl.constexpr = (J * KP + BLOCK_K - 1) // BLOCK_K if PACKED else J * CHUNKS
    GROUPS: tl.constexpr = BLOCK_K // KP if PACKED else 1
    PRODUCTS: tl.constexpr = G // J
    tiles = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    product, tile, block = (pid // BLOCKS // tiles).to(tl.int64), (pid // BLOCKS) % tiles, pid % BLOCKS
    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(offs_m, M - 1).to(tl.int64)
    r_ptr += product * (J * K)
    stats_ptr += product * J
    spine_ptr += product * (N * J * 2 * SP)
    matrices_ptr += product * (N * J * KP)
    grad_ptr += product * N

    group, k, valid, column = _channels(block, K, KP, J, BLOCK_K, PACKED)
    b_t = _statistic(stats_ptr, rows, group, G, J, PACKED)
    b_s = tl.full([1, 1], 1.0, tl.float32)
    if WARP:
        b_s = _statistic(stats_ptr + items, rows, group, G, J, PACKED)
    b_ddelta = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    b_dt = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    b_ds = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    if S == 2 and not WARP:
        b_ddelta, b_dt, b_ds = _grad_products(b_ddelta, b_dt, b_ds, grad_ptr, matrices_ptr, b_t, b_s, rows, 0, eps2,
                                              valid, column, G, K, N, S, J, KP, BLOCK_N, PRECISION, FOUR, 4, 4)
        if tl.max(tl.max(_uncorrected(b_t, eps2, threshold, K), 1), 0) > 0:
            b_ddelta, b_dt, b_ds = _grad_products(b_ddelta, b_dt, b_ds, grad_ptr,
                                                  matrices_ptr + 4 * PRODUCTS * N * J * KP, b_t, b_s, rows, 0, eps2,
                                                  valid, column, G, K, N, S, J, KP, BLOCK_N, PRECISION, CORRECTION, 2,
                                                  2)
    else:
        b_first = _first_node(b_t, S)
        for node in range(tl.min(tl.min(b_first, 1), 0), tl.max(tl.max(b_first, 1), 0) + 2):
            b_ddelta, b_dt, b_ds = _grad_products(b_ddelta, b_dt, b_ds, grad_ptr,
                                                  matrices_ptr + node * (3 * PRODUCTS * N * J * KP), b_t, b_s, rows,
                                                  node, eps2, valid, column, G, K, N, S, J, KP, BLOCK_N, PRECISION,
                                                  NODE, 3, 4)
    b_delta = _deviations(r_ptr, b_t, rows, group, k, valid, scale, shift, G, K, False)
    b_dt = _group_sums(b_dt * b_delta, GROUPS, KP, KP, PACKED)

    if PACKED or block % CHUNKS == 0:  # the spine's share
        SIZE: tl.constexpr = BLOCK_F // GROUPS
        offs_f, offs_n = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_N)
        place = offs_f % SIZE
        b_spine_t = b_t
        if PACKED:
            group_f = block * GROUPS + offs_f // SIZE
            b_spine_t = _statistic(stats_ptr, rows, group_f, G, J, True)
        else:
            group_f = group + offs_f // SIZE
        exists = (place < 2 * SP) & (group_f < J)
        b_x = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
        for n0 in range(0, N, BLOCK_N):
            b_grad = tl.load(grad_ptr + rows[:, None] * (PRODUCTS * N) + (n0 + offs_n)[None, :],
                             mask=(n0 + offs_n < N)[None, :], other=0.0)
            b_spine = tl.load(spine_ptr + (n0 + offs_n)[:, None] * (J * 2 * SP) + (group_f * (2 * SP) + place)[None, :],
                              mask=(n0 + offs_n < N)[:, None] & exists[None, :], other=0.0)
            b_x = tl.dot(b_grad, b_spine, b_x, input_precision=PRECISION)
        b_ht = _basis(b_spine_t, (place % SP)[None, :], (place >= SP)[None, :], S)[1]
        b_dt += _group_sums(b_ht * b_x, GROUPS, SIZE, KP, PACKED)

    inside = (offs_m < M)[:, None]
    dr_ptrs = dr_ptr + product * (J * K) + rows[:, None] * (G * K) + (group * K + k)[None, :]
    if CHUNKS == 1:
        if WARP:
            b_ddelta -= b_delta * (_group_sums(b_ds * b_delta, GROUPS, KP, KP,
                                               PACKED) * inverse_delta_max2 * b_s * b_s * b_s)
        tl.store(dr_ptrs, (scale * (b_ddelta + b_dt / K)).to(dr_ptr.dtype.element_ty), mask=inside & valid[None, :])
    else:
        tl.store(dr_ptrs, (scale * b_ddelta).to(dr_ptr.dtype.element_ty), mask=inside & valid[None, :])
        partial_ptrs = partial_ptr + (block % CHUNKS).to(tl.int64) * (2 if WARP
                                                                      else 1) * items + (product * J + rows * G
                + group)[:, None]
        tl.store(partial_ptrs, b_dt, mask=inside)
        if WARP:
            tl.store(partial_ptrs + items, _group_sums(b_ds * b_delta, GROUPS, KP, KP, PACKED), mask=inside)


@jit
def _splanifold_bwd_rows_kernel(r_ptr, stats_ptr, partial_ptr, dr_ptr, items, scale, shift, inverse_delta_max2,
                                K: tl.constexpr, CHUNKS: tl.constexpr, WARP: tl.constexpr, BLOCK_M: tl.constexpr,
                                BLOCK_K: tl.constexpr):
    """Adds to dr what dt and ds bring to every coordinate of a group. Grid (blocks of items, blocks of coordinates)."""
    offs, offs_k = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0,
                                                                       BLOCK_M), tl.program_id(1) * BLOCK_K + tl.arange(
        0, BLOCK_K)
    rows = tl.minimum(offs, items - 1)
    b_dt = tl.zeros([BLOCK_M], tl.float32)
    b_ds = tl.zeros([BLOCK_M], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        b_dt += tl.load(partial_ptr + chunk * (2 if WARP else 1) * items + rows)
        if WARP:
            b_ds += tl.load(partial_ptr + (2 * chunk + 1) * items + rows)
    inside = (offs < items)[:, None] & (offs_k < K)[None, :]
    places = rows[:, None] * K + offs_k[None, :]
    b_dr = tl.load(dr_ptr + places, mask=inside, other=0.0).to(tl.float32) + (b_dt * (scale / K))[:, None]
    if WARP:
        b_s = tl.load(stats_ptr + items + rows)
        b_delta = tl.load(r_ptr + places, mask=inside,
                          other=0.0).to(tl.float32) * scale - shift - tl.load(stats_ptr + rows)[:, None]
        b_dr -= b_delta * (b_ds * (scale * inverse_delta_max2) * b_s * b_s * b_s)[:, None]
    tl.store(dr_ptr + places, b_dr.to(dr_ptr.dtype.element_ty), mask=inside)


@jit
def _splanifold_bwd_controls_kernel(r_ptr, stats_ptr, grad_ptr, partial_ptr, M, items, scale, shift, eps2, threshold,
                                    splits, split_tokens, G: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
                                    S: tl.constexpr, SP: tl.constexpr, J: tl.constexpr, KP: tl.constexpr,
                                    PACKED: tl.constexpr, WARP: tl.constexpr, BLOCK_M: tl.constexpr,
                                    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
                                    KIND: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, NODES: tl.constexpr,
                                    MATRICES: tl.constexpr):
    """
    Gradients of COUNT stacked matrices (for NODE of each of NODES nodes), or of the spine, for a tile of outputs and
    channels, over one split of the tokens: grad' (c_m delta), side by side in one product of WIDTH places. partial
    (splits, MATRICES, products, N, channels), from the first of these matrices on. Grid: nodes x products x splits x
    tiles of outputs x blocks of channels, the last fastest.
    """
    SPAN: tl.constexpr = J * 2 * SP if KIND == SPINE else J * KP  # columns
    BLOCKS: tl.constexpr = (SPAN + BLOCK_K - 1) // BLOCK_K if PACKED or KIND == SPINE else J * (
        (K + BLOCK_K - 1) // BLOCK_K)
    N_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    PRODUCTS: tl.constexpr = G // J
    GATHER: tl.constexpr = PACKED or KIND == SPINE
    pid = tl.program_id(0)
    block, pid = pid % BLOCKS, pid // BLOCKS
    offs_n, pid = (pid % N_TILES) * BLOCK_N + tl.arange(0, BLOCK_N), pid // N_TILES
    split, pid = (pid % splits).to(tl.int64), pid // splits
    product, node = (pid % PRODUCTS).to(tl.int64), pid // PRODUCTS
    r_ptr += product * (J * K)
    stats_ptr += product * J
    grad_ptr += product * N

    if KIND == SPINE:
        column = block * BLOCK_K + tl.arange(0, BLOCK_K)
        group, k = column // (2 * SP), column % (2 * SP)
        valid = group < J
    else:
        group, k, valid, column = _channels(block, K, KP, J, BLOCK_K, PACKED)
    offs_m, offs_w = tl.arange(0, BLOCK_M), tl.arange(0, WIDTH)
    first, last = split * split_tokens, tl.minimum((split + 1) * split_tokens, M)
    if KIND == CORRECTION:  # nothing to do, mostly
        b_any = tl.zeros([BLOCK_M, BLOCK_K if GATHER else 1], tl.int32)
        for start in range(first, last, BLOCK_M):
            b_any = tl.maximum(b_any,
                               _uncorrected(_statistic(stats_ptr, tl.minimum(start + offs_m, M - 1).to(tl.int64), group,
                                                       G, J, GATHER), eps2, threshold, K))
        if tl.max(tl.max(b_any, 1), 0) == 0:
            last = first
    b_acc = tl.zeros([BLOCK_N, WIDTH * BLOCK_K], tl.float32)
    for start in range(first, last, BLOCK_M):
        rows = tl.minimum(start + offs_m, M - 1).to(tl.int64)
        b_t = _statistic(stats_ptr, rows, group, G, J, GATHER)
        if KIND == SPINE:
            b_x = _basis(b_t, (k % SP)[None, :], (k >= SP)[None, :], S)[0]
        else:
            b_s = tl.full([1, 1], 1.0, tl.float32)
            if WARP:
                b_s = _statistic(stats_ptr + items, rows, group, G, J, PACKED)
            b_delta = _deviations(r_ptr, b_t, rows, group, k, valid, scale, shift, G, K,
                                  (not PACKED) and K % BLOCK_K == 0)
            b_c = _coefficients(b_t[:, None, :], b_s[:, None, :], offs_w[None, :, None], node, eps2, K, S, KIND)[0]
            b_x = tl.reshape(tl.broadcast_to(b_c * b_delta[:, None, :], [BLOCK_M, WIDTH, BLOCK_K]),
                             [BLOCK_M, WIDTH * BLOCK_K])
        b_grad = tl.load(grad_ptr + rows[:, None] * (PRODUCTS * N) + offs_n[None, :],
                         mask=(start + offs_m < M)[:, None] & (offs_n < N)[None, :], other=0.0)
        b_acc = tl.dot(tl.trans(b_grad), b_x.to(b_grad.dtype), b_acc, input_precision=PRECISION)

    columns = tl.reshape(offs_w[:, None] * (PRODUCTS * N * SPAN) + column[None, :], [WIDTH * BLOCK_K])
    exists = tl.reshape((offs_w < COUNT)[:, None] & valid[None, :], [WIDTH * BLOCK_K])
    partial_ptr += ((split * MATRICES + node * COUNT) * PRODUCTS + product) * N * SPAN
    tl.store(partial_ptr + offs_n[:, None] * SPAN + columns[None, :], b_acc,
             mask=(offs_n < N)[:, None] & exists[None, :])


# Few coordinates, "concat": a thread holds whole groups. The deviations of a group have sum 0, so the last one is left
# out: matrix_m delta = sum over k < K - 1 of (column_k - column_K-1) delta_k. table ((K - 1) 6 + 4, N, G) float32:
# these columns, of every k those of the six matrices, then the spine. Every tile is (groups,), one for each of TOKENS
# tokens and each coordinate or output, in tuples: with tokens as a dimension the compiler may spread them over threads,
# and did.

@jit
def _load_values(ptr, items, inside, other: tl.constexpr, COUNT: tl.constexpr):
    """
    COUNT neighbouring values of each item as a tuple of float32 tiles, `other` outside; read as one word where COUNT is
    a power of two.
    """
    values = ()
    if COUNT & (COUNT - 1) == 0:
        offs = tl.arange(0, COUNT)[None, :]
        b_x = tl.load(ptr + items[:, None] * COUNT + offs, mask=inside[:, None], other=other).to(tl.float32)
        for i in tl.static_range(COUNT):
            values = values + (tl.sum(tl.where(offs == i, b_x, 0.0), 1),)
    else:
        for i in tl.static_range(COUNT):
            values = values + (tl.load(ptr + items * COUNT + i, mask=inside, other=other).to(tl.float32),)
    return values


@jit
def _store_values(ptr, items, inside, values, COUNT: tl.constexpr):
    if COUNT & (COUNT - 1) == 0:
        offs = tl.arange(0, COUNT)[None, :]
        b_x = tl.zeros([inside.shape[0], COUNT], tl.float32)
        for i in tl.static_range(COUNT):
            b_x = tl.where(offs == i, values[i][:, None], b_x)
        tl.store(ptr + items[:, None] * COUNT + offs, b_x.to(ptr.dtype.element_ty), mask=inside[:, None])
    else:
        for i in tl.static_range(COUNT):
            tl.store(ptr + items * COUNT + i, values[i].to(ptr.dtype.element_ty), mask=inside)


@jit
def _small_groups(r_ptr, start, offs_g, M, scale, shift, eps2, threshold, inverse_delta_max2, G: tl.constexpr,
                  K: tl.constexpr, WARP: tl.constexpr, TOKENS: tl.constexpr):
    """For the tokens from `start` on: t, s and delta (coordinates, then tokens), and where corrections are needed."""
    ts, factors, by_token = (), (), ()
    b_needed = tl.zeros([offs_g.shape[0]], tl.int32)
    for i in tl.static_range(TOKENS):
        inside = offs_g < tl.where(start + i < M, G, 0)
        # t = 0.5 outside: no coefficient can be NaN there
        b_r = _load_values(r_ptr, (start + i) * G + offs_g, inside, 0.5, K)
        b_sum = b_r[0]
        for k in tl.static_range(1, K):
            b_sum += b_r[k]
        b_t = b_sum * (scale / K) - shift
        b_square = tl.zeros_like(b_t)
        for k in tl.static_range(K):
            b_delta = b_r[k] * scale - shift - b_t
            b_square += b_delta * b_delta
            by_token = by_token + (b_delta,)
        ts = ts + (b_t,)
        if WARP:
            factors = factors + (1.0 / tl.sqrt(1.0 + b_square * inverse_delta_max2),)
        else:
            factors = factors + (1.0,)
            b_needed = tl.maximum(b_needed, tl.where(inside, _uncorrected(b_t, eps2, threshold, K), 0))
    deltas = ()
    for k in tl.static_range(K):
        for i in tl.static_range(TOKENS):
            deltas = deltas + (by_token[i * K + k],)
    return ts, factors, deltas, b_needed


@jit
def _small_coefficients(b_t, b_s, m: tl.constexpr, eps2, K: tl.constexpr, WARP: tl.constexpr):
    """_coefficients of the m-th of the six matrices."""
    if WARP:
        return _coefficients(b_t, b_s, m % 3, m // 3, eps2, K, 2, NODE)
    elif m < 4:
        return _coefficients(b_t, b_s, m, 0, eps2, K, 2, FOUR)
    else:
        return _coefficients(b_t, b_s, m - 4, 0, eps2, K, 2, CORRECTION)


@jit
def _small_add(outs, features, column_ptrs, in_table, G: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr):
    """outs (outputs, then tokens) + column feature."""
    added = ()
    for j in tl.static_range(N):
        b_column = tl.load(column_ptrs + j * G, mask=in_table, other=0.0)
        for i in tl.static_range(TOKENS):
            added = added + (outs[j * TOKENS + i] + features[i] * b_column,)
    return added


@jit
def _small_products(outs, table_ptrs, in_table, ts, factors, deltas, eps2, G: tl.constexpr, K: tl.constexpr,
                    N: tl.constexpr, WARP: tl.constexpr, TOKENS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr):
    """outs + sum over m from FIRST to LAST - 1 of matrix_m (c_m delta)."""
    for m in tl.static_range(FIRST, LAST):
        coefficients = ()
        for i in tl.static_range(TOKENS):
            coefficients = coefficients + (_small_coefficients(ts[i], factors[i], m, eps2, K, WARP)[0],)
        for k in tl.static_range(K - 1):
            features = ()
            for i in tl.static_range(TOKENS):
                features = features + (coefficients[i] * deltas[k * TOKENS + i],)
            outs = _small_add(outs, features, table_ptrs + (6 * k + m) * N * G, in_table, G, N, TOKENS)
    return outs


@jit
def _splanifold_small_fwd_kernel(r_ptr, table_ptr, out_ptr, M, scale, shift, eps2, threshold, inverse_delta_max2,
                                 G: tl.constexpr, K: tl.constexpr, N: tl.constexpr, WARP: tl.constexpr,
                                 TOKENS: tl.constexpr, BLOCK_G: tl.constexpr):
    """Grid: runs of TOKENS tokens x blocks of groups, the last fastest."""
    G_BLOCKS: tl.constexpr = (G + BLOCK_G - 1) // BLOCK_G
    pid = tl.program_id(0)
    start, offs_g = (pid // G_BLOCKS).to(tl.int64) * TOKENS, (pid % G_BLOCKS) * BLOCK_G + tl.arange(0, BLOCK_G)
    table_ptrs, in_table = table_ptr + offs_g, offs_g < G
    ts, factors, deltas, b_needed = _small_groups(r_ptr, start, offs_g, M, scale, shift, eps2, threshold,
                                                  inverse_delta_max2, G, K, WARP, TOKENS)
    outs = (tl.zeros([BLOCK_G], tl.float32),) * (N * TOKENS)
    for place in tl.static_range(4):
        features = ()
        for i in tl.static_range(TOKENS):
            features = features + (_basis(ts[i], place % 2, place >= 2, 2)[0],)
        outs = _small_add(outs, features, table_ptrs + (6 * (K - 1) + place) * N * G, in_table, G, N, TOKENS)
    if WARP:
        outs = _small_products(outs, table_ptrs, in_table, ts, factors, deltas, eps2, G, K, N, WARP, TOKENS, 0, 6)
    else:
        outs = _small_products(outs, table_ptrs, in_table, ts, factors, deltas, eps2, G, K, N, WARP, TOKENS, 0, 4)
        if tl.max(b_needed, 0) > 0:
            outs = _small_products(outs, table_ptrs, in_table, ts, factors, deltas, eps2, G, K, N, WARP, TOKENS, 4, 6)
    for i in tl.static_range(TOKENS):
        values = ()
        for j in tl.static_range(N):
            values = values + (outs[j * TOKENS + i],)
        _store_values(out_ptr, (start + i) * G + offs_g, offs_g < tl.where(start + i < M, G, 0), values, N)


@jit
def _small_gradients(sums, ddeltas, dts, dss, grads, table_ptrs, in_table, ts, factors, deltas, eps2, G: tl.constexpr,
                     K: tl.constexpr, N: tl.constexpr, WARP: tl.constexpr, TOKENS: tl.constexpr, FIRST: tl.constexpr,
                     LAST: tl.constexpr):
    """
    What the matrices from FIRST to LAST - 1 add to the sums over tokens of (c_m delta_k) grad_j (by m, k and j), to d
    delta (K - 1 a token), dt and ds.
    """
    all_sums = ()
    for m in tl.static_range(FIRST, LAST):
        coefficients = ()
        for i in tl.static_range(TOKENS):
            coefficients = coefficients + _small_coefficients(ts[i], factors[i], m, eps2, K, WARP)
        all_ddeltas = ()
        for k in tl.static_range(K - 1):
            products = (tl.zeros_like(ts[0]),) * TOKENS
            for j in tl.static_range(N):
                b_column = tl.load(table_ptrs + ((6 * k + m) * N + j) * G, mask=in_table, other=0.0)
                b_sum = sums[((m - FIRST) * (K - 1) + k) * N + j]
                added = ()
                for i in tl.static_range(TOKENS):
                    added = added + (products[i] + grads[i * N + j] * b_column,)
                    b_sum += coefficients[3 * i] * deltas[k * TOKENS + i] * grads[i * N + j]
                products = added
                all_sums = all_sums + (b_sum,)
            all_dts, all_dss = (), ()
            for i in tl.static_range(TOKENS):
                b_x = deltas[k * TOKENS + i] * products[i]
                all_dts, all_dss = all_dts + (dts[i] + coefficients[3 * i + 1] * b_x,), all_dss + (dss[i]
                        + coefficients[3 * i + 2] * b_x,)
                all_ddeltas = all_ddeltas + (ddeltas[k * TOKENS + i] + coefficients[3 * i] * products[i],)
            dts, dss = all_dts, all_dss
        ddeltas = all_ddeltas
    return all_sums, ddeltas, dts, dss


@jit
def _splanifold_small_bwd_kernel(r_ptr, table_ptr, grad_ptr, dr_ptr, partial_ptr, M, split_tokens, scale, shift, eps2,
                                 threshold, inverse_delta_max2, G: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
                                 WARP: tl.constexpr, TOKENS: tl.constexpr, BLOCK_G: tl.constexpr):
    """
    dr, and the table's gradient summed over a split of the tokens, partial (splits, table). Grid: splits x blocks of
    groups, the last fastest.
    """
    G_BLOCKS: tl.constexpr = (G + BLOCK_G - 1) // BLOCK_G
    MAIN: tl.constexpr = 6 if WARP else 4
    pid = tl.program_id(0)
    split, offs_g = (pid // G_BLOCKS).to(tl.int64), (pid % G_BLOCKS) * BLOCK_G + tl.arange(0, BLOCK_G)
    table_ptrs, in_table = table_ptr + offs_g, offs_g < G
    b_zero = tl.zeros([BLOCK_G], tl.float32)
    sums, spine, corrections = (b_zero,) * (MAIN * (K - 1) * N), (b_zero,) * (4 * N), (b_zero,) * (2 * (K - 1) * N)
    for start in range(split * split_tokens, tl.minimum((split + 1) * split_tokens, M), TOKENS):
        ts, factors, deltas, b_needed = _small_groups(r_ptr, start, offs_g, M, scale, shift, eps2, threshold,
                                                      inverse_delta_max2, G, K, WARP, TOKENS)
        grads = ()
        for i in tl.static_range(TOKENS):
            grads = grads + _load_values(grad_ptr, (start + i) * G + offs_g, offs_g < tl.where(start + i < M, G, 0),
                                         0.0, N)
        dts, dss, ddeltas = (b_zero,) * TOKENS, (b_zero,) * TOKENS, (b_zero,) * ((K - 1) * TOKENS)
        all_sums = ()
        for place in tl.static_range(4):
            weights = ()
            for i in tl.static_range(TOKENS):
                weights = weights + _basis(ts[i], place % 2, place >= 2, 2)
            for j in tl.static_range(N):
                b_column = tl.load(table_ptrs + ((6 * (K - 1) + place) * N + j) * G, mask=in_table, other=0.0)
                b_sum = spine[place * N + j]
                all_dts = ()
                for i in tl.static_range(TOKENS):
                    all_dts = all_dts + (dts[i] + weights[2 * i + 1] * grads[i * N + j] * b_column,)
                    b_sum += weights[2 * i] * grads[i * N + j]
                dts = all_dts
                all_sums = all_sums + (b_sum,)
        spine = all_sums
        sums, ddeltas, dts, dss = _small_gradients(sums, ddeltas, dts, dss, grads, table_ptrs, in_table, ts, factors,
                                                   deltas, eps2, G, K, N, WARP, TOKENS, 0, MAIN)
        if not WARP:
            if tl.max(b_needed, 0) > 0:
                corrections, ddeltas, dts, dss = _small_gradients(corrections, ddeltas, dts, dss, grads, table_ptrs,
                                                                  in_table, ts, factors, deltas, eps2, G, K, N, WARP,
                                                                  TOKENS, 4, 6)
        for i in tl.static_range(TOKENS):
            b_common = dts[i]
            for k in tl.static_range(K - 1):
                b_common -= ddeltas[k * TOKENS + i]
            b_common *= scale / K
            values = ()
            for k in tl.static_range(K):
                b_dr = b_common
                if k < K - 1:
                    b_dr += scale * ddeltas[k * TOKENS + i]
                if WARP:
                    b_dr -= deltas[k * TOKENS + i] * (dss[i] * (scale * inverse_delta_max2) * factors[i] * factors[i]
                                                      * factors[i])
                values = values + (b_dr,)
            _store_values(dr_ptr, (start + i) * G + offs_g, offs_g < tl.where(start + i < M, G, 0), values, K)
    partial_ptrs = partial_ptr + split * ((6 * (K - 1) + 4) * N * G) + offs_g
    for j in tl.static_range(N):
        for place in tl.static_range(4):
            tl.store(partial_ptrs + ((6 * (K - 1) + place) * N + j) * G, spine[place * N + j], mask=in_table)
        for k in tl.static_range(K - 1):
            for m in tl.static_range(MAIN):
                tl.store(partial_ptrs + ((6 * k + m) * N + j) * G, sums[(m * (K - 1) + k) * N + j], mask=in_table)
            for m in tl.static_range(6 - MAIN):
                tl.store(partial_ptrs + ((6 * k + MAIN + m) * N + j) * G, corrections[(m * (K - 1) + k) * N + j],
                         mask=in_table)


# ---- Host functions ---------------------------------------------------------

class Tiles(NamedTuple):
    """A launch: tokens, outputs and channels of a tile, warps, pipeline stages."""
    tokens: int
    outputs: int
    channels: int
    warps: int
    stages: int


# (major compute capability, 0: any other; bytes of a value): the most a tile has, by kernel, in "narrow" ones where six
# matrices, nodes or gathered statistics take more registers. Chosen for what compiles without spills, not measured.
LAUNCH = {(0, 2): dict(fwd=Tiles(128, 32, 32, 8, 3), fwd_groups=Tiles(64, 128, 32, 4, 2),
                       bwd_r=Tiles(128, 32, 32, 8, 3), bwd_controls=Tiles(32, 128, 32, 8, 3)),
          (9, 2): dict(fwd=Tiles(128, 64, 64, 8, 3), fwd_groups=Tiles(128, 128, 32, 4, 2),
                       bwd_r=Tiles(128, 64, 64, 8, 3), bwd_controls=Tiles(32, 128, 64, 8, 3),
                       fwd_groups_narrow=Tiles(128, 128, 32, 8, 2), bwd_r_narrow=Tiles(128, 32, 32, 8, 3),
                       bwd_controls_narrow=Tiles(32, 128, 32, 8, 3)),
          (10, 2): dict(fwd=Tiles(128, 32, 64, 8, 3), fwd_groups=Tiles(128, 128, 32, 8, 2),
                        bwd_r=Tiles(128, 64, 32, 8, 3), bwd_controls=Tiles(32, 128, 64, 8, 3)),
          (0, 4): dict(fwd=Tiles(64, 32, 32, 8, 2), fwd_groups=Tiles(64, 64, 32, 8, 2), bwd_r=Tiles(64, 32, 32, 8, 2),
                       bwd_controls=Tiles(32, 64, 32, 8, 2))}
ROWS, COLUMNS = 32, 256   # a tile of the passes over rows
# the control gradients are cut into so many programs, about one for each multiprocessor of an H200, where they have
PROGRAMS = 132
SPLIT_TOKENS = 512      # that many tokens or more
SMALL_FORWARD_TOKENS, SMALL_BACKWARD_TOKENS = 8, 2     # with few coordinates, tokens at a time
SMALL_SPLIT_TOKENS = 128                                # and of a program of the backward pass
THRESHOLD = {torch.bfloat16: 2.0 ** -13, torch.float16: 2.0 ** -16, torch.float32: 2.0 ** -27}
INTERPRETED = triton is not None and not isinstance(_splanifold_fwd_kernel, triton.JITFunction)


def _power(size: int, least: int = 1) -> int:
    """The smallest power of two that is size and `least` or more."""
    return max(least, 1 << (size - 1).bit_length())


class Layout(NamedTuple):
    """Sizes as the kernels have them: see the head of the kernels."""
    G: int
    K: int
    N: int
    S: int
    SP: int
    J: int
    KP: int
    PACKED: bool
    WARP: bool


def _layout(r: Tensor, points: Tensor, delta_max: float, mix: str) -> Layout:
    (_, G, K), (_, S, n) = r.shape, points.shape
    packed = mix == "sum" and G > 1 and K <= 8
    return Layout(G, K, n, S, _power(S), G if mix == "sum" else 1, _power(K) if packed else K, packed,
                  delta_max < math.inf)


def _four(layout: Layout) -> bool:
    return layout.S == 2 and not layout.WARP


def _kinds(layout: Layout) -> tuple:
    """(kind, matrices of it, places in a product side by side, nodes) as they are stacked."""
    return ((FOUR.value, 4, 4, 1), (CORRECTION.value, 2, 2, 1)) if _four(layout) else ((NODE.value, 3, 4, layout.S),)


def _blocks(layout: Layout, tiles: Tiles) -> dict:
    block_k = tiles.channels if layout.PACKED else min(tiles.channels, _power(layout.K, 16))
    return dict(BLOCK_M=tiles.tokens, BLOCK_N=min(tiles.outputs, _power(layout.N, 16)), BLOCK_K=block_k)


def _tiles(name: str, layout: Layout, capability: int, dtype: torch.dtype) -> Tiles:
    """The launch of fwd, bwd_r or bwd_controls on a card of that compute capability (90 for 9.0)."""
    launch = LAUNCH.get((capability // 10, dtype.itemsize), LAUNCH[0, dtype.itemsize])
    name += "_groups" if name == "fwd" and layout.J > 1 else ""
    tiles = launch.get(name + "_narrow", launch[name]) if layout.PACKED or not _four(layout) else launch[name]
    return tiles._replace(tokens=tiles.tokens // 2) if layout.PACKED and not _four(layout) else tiles


def _capability(r: Tensor) -> int:
    return 10 * torch.cuda.get_device_capability(r.device)[0] if r.is_cuda else 0


def _constants(layout: Layout, dtype: torch.dtype, tiles: Tiles) -> dict:
    return dict(**layout._asdict(), **_blocks(layout, tiles), PRECISION="tf32x3" if dtype == torch.float32 else "tf32")


def _features(layout: Layout, block_k: int) -> int:
    """Spine features of a block of channels."""
    return block_k // layout.KP * 2 * layout.SP if layout.PACKED else _power(2 * layout.SP, 16)


def _spine_columns(layout: Layout) -> int:
    """Of those of all groups so many at once."""
    return _power(min(2 * layout.SP * layout.J, 32), 16)


def _stacked(x: Tensor, layout: Layout) -> Tensor:
    """(count, G, n, K) to (count, products, n, channels)."""
    if layout.J == 1:
        return x
    return F.pad(x, (0, layout.KP - layout.K)).transpose(1, 2).flatten(2).unsqueeze(1)


def _unstacked(x: Tensor, layout: Layout) -> Tensor:
    """_stacked, undone."""
    if layout.J == 1:
        return x
    return x.squeeze(1).unflatten(2, (layout.G, layout.KP)).transpose(1, 2)[..., :layout.K]


def _combine(layout: Layout, points: Tensor, bases: Tensor, point_tangents: Tensor,
             base_tangents: Tensor) -> tuple[Tensor, Tensor]:
    """
    spine (G, 2, S, n), of points and mean tangents, and the matrices (6 or 3 S, G, n, K), from the controls in float32.
    """
    points, bases, point_tangents, base_tangents = (x.float() for x in (points, bases, point_tangents, base_tangents))
    if _four(layout):
        (E0, E1), (P0, P1), (D0, D1) = (x.unbind(1) for x in (bases, point_tangents, base_tangents))
        matrices = torch.stack((E0 + P0 / layout.K, E1, D0 - (2 * P0 + P1) / layout.K, D1 + P1 / layout.K, P0, P1))
    else:
        matrices = torch.stack((bases, base_tangents, point_tangents), 2).permute(1, 2, 0, 3, 4).flatten(0, 1)
    return torch.stack((points, point_tangents.mean(-1)), 1), matrices


def _control_gradients(layout: Layout, d_spine: Tensor, d_matrices: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the controls from those of _combine's results, all in float32."""
    K, (d_points, d_means) = layout.K, d_spine.unbind(1)
    if _four(layout):
        E0, E1, D0, D1, P0, P1 = d_matrices
        d_bases, d_base_tangents = torch.stack((E0, E1), 1), torch.stack((D0, D1), 1)
        d_point_tangents = torch.stack((P0 + (E0 - 2 * D0) / K, P1 + (D1 - D0) / K), 1)
    else:
        d_bases, d_base_tangents, d_point_tangents = d_matrices.unflatten(0, (layout.S, 3)).permute(1, 2, 0, 3,
                4).unbind(0)
    return d_points, d_bases, d_point_tangents + d_means[..., None] / K, d_base_tangents


def _tables(layout: Layout, dtype: torch.dtype, controls: tuple) -> tuple[Tensor, Tensor]:
    """
    spine (products, n, J 2 SP) and matrices (6 or 3 S, products, n, channels) in a dtype. The matrices' rows have mean
    0 over a group but for their rounding: delta does not notice, and the gradient of delta comes out with sum 0.
    """
    spine, matrices = _combine(layout, *controls)
    spine = F.pad(spine, (0, 0, 0, layout.SP - layout.S)).flatten(1, 2).unflatten(0, (-1, layout.J)).flatten(1,
            2).transpose(1, 2)
    return spine.to(dtype).contiguous(), _stacked(matrices - matrices.mean(-1, keepdim=True),
                                                  layout).to(dtype).contiguous()


def _small_table(layout: Layout, controls: tuple) -> Tensor:
    """table, see the kernels for few coordinates."""
    spine, matrices = _combine(layout, *controls)
    columns = (matrices[..., :-1] - matrices[..., -1:]).permute(3, 0, 2, 1).flatten(0, 1)
    return torch.cat((columns, spine.flatten(1, 2).permute(1, 2, 0)))


def _small_table_gradients(layout: Layout, d_table: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of _combine's results."""
    columns = d_table[:-4].unflatten(0, (layout.K - 1, 6)).permute(1, 3, 2, 0)
    return d_table[-4:].permute(2, 0, 1).unflatten(1, (2, 2)), torch.cat((columns, -columns.sum(-1, keepdim=True)), -1)


def _scalars(r: Tensor, expansion: float, eps: float) -> tuple:
    return 1 + 2 * expansion, expansion, eps ** 2, THRESHOLD[r.dtype]


def _stats(r: Tensor, layout: Layout, expansion: float, delta_max: float) -> Tensor:
    """(1 or 2, M, G) float32: t, and s if there is a warp."""
    items, block_k = r.shape[0] * layout.G, min(_power(layout.K), COLUMNS)
    block_m = min(ROWS * COLUMNS // block_k, 512)
    stats = torch.empty(1 + layout.WARP, *r.shape[:2], dtype=torch.float32, device=r.device)
    _splanifold_stats_kernel[(triton.cdiv(items, block_m),)](r, stats, items, 1 + 2 * expansion, expansion,
                                                             delta_max ** -2, K=layout.K, WARP=layout.WARP,
                                                             BLOCK_M=block_m, BLOCK_K=block_k, num_warps=4)
    return stats


def _forward(r: Tensor, controls: tuple, expansion: float, delta_max: float, eps: float, mix: str) -> Tensor:
    M, layout = r.shape[0], _layout(r, controls[0], delta_max, mix)
    if _is_small(layout):
        return _small_forward(r, controls, layout, expansion, delta_max, eps)
    tiles = _tiles("fwd", layout, _capability(r), r.dtype)
    stats, (spine, matrices) = _stats(r, layout, expansion, delta_max), _tables(layout, r.dtype, controls)
    sums, products = matrices.sum(-1, dtype=torch.float32) if layout.J == 1 else None, layout.G // layout.J
    out = torch.empty(M, products * layout.N, dtype=r.dtype, device=r.device)
    constants = _constants(layout, r.dtype, tiles)
    grid = products * triton.cdiv(M, tiles.tokens) * triton.cdiv(layout.N, constants["BLOCK_N"])
    _splanifold_fwd_kernel[(grid,)](
        r, stats, spine, matrices, sums, out, M, M * layout.G, *_scalars(r, expansion, eps), **constants,
        BLOCK_F=_spine_columns(layout), num_warps=tiles.warps, num_stages=tiles.stages)
    return out


def _gradient_of_r(grad: Tensor, r: Tensor, stats: Tensor, controls: tuple, layout: Layout, expansion: float,
                   delta_max: float, eps: float) -> Tensor:
    M, tiles, (spine, matrices) = r.shape[0], _tiles("bwd_r", layout, _capability(r), r.dtype), _tables(layout, r.dtype,
            controls)
    items, constants, (scale, shift, *_) = M * layout.G, _constants(layout, r.dtype, tiles), _scalars(r, expansion, eps)
    block_k = constants["BLOCK_K"]
    chunks = 1 if layout.PACKED else triton.cdiv(layout.K, block_k)
    blocks = triton.cdiv(layout.J * layout.KP, block_k) if layout.PACKED else layout.J * chunks
    d_r = torch.empty_like(r)
    partial = torch.empty(chunks, *stats.shape, dtype=torch.float32, device=r.device) if chunks > 1 else None
    _splanifold_bwd_r_kernel[(layout.G // layout.J * triton.cdiv(M, tiles.tokens) * blocks,)](r, stats, spine, matrices,
            grad, d_r, partial, M, items, *_scalars(r, expansion, eps), delta_max ** -2, **constants,
            BLOCK_F=_features(layout, block_k), num_warps=tiles.warps, num_stages=tiles.stages)
    if chunks > 1:
        _splanifold_bwd_rows_kernel[(triton.cdiv(items, ROWS), triton.cdiv(layout.K, COLUMNS))](r, stats, partial, d_r,
                items, scale, shift, delta_max ** -2, K=layout.K, CHUNKS=chunks, WARP=layout.WARP, BLOCK_M=ROWS,
                BLOCK_K=COLUMNS, num_warps=4)
    return d_r


def _gradients_of_controls(grad: Tensor, r: Tensor, stats: Tensor, layout: Layout, expansion: float,
                           eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    M, tiles, products = r.shape[0], _tiles("bwd_controls", layout, _capability(r), r.dtype), layout.G // layout.J

    def launch(kind: int, count: int, width: int, nodes: int, partial: Tensor, first: int, **given):
        constants = _constants(layout, r.dtype, tiles) | given
        span, splits = partial.shape[-1], len(partial)
        split_tokens = triton.cdiv(triton.cdiv(M, splits), tiles.tokens) * tiles.tokens
        blocks = layout.J * triton.cdiv(layout.K,
                                        constants[
            "BLOCK_K"]) if kind != SPINE.value and not layout.PACKED else triton.cdiv(span, constants["BLOCK_K"])
        _splanifold_bwd_controls_kernel[(nodes * products * splits * triton.cdiv(layout.N,
                                                                                 constants["BLOCK_N"]) * blocks,)](r,
                stats, grad, partial[:, first:], M, M * layout.G, *_scalars(r, expansion, eps), splits, split_tokens,
                **constants, KIND=kind, COUNT=count, WIDTH=width, NODES=nodes, MATRICES=partial.shape[1],
                num_warps=tiles.warps, num_stages=tiles.stages)

    def empty(count: int, span: int, block_k: int) -> Tensor:
        tiles_of_one = products * triton.cdiv(layout.N, _blocks(layout, tiles)["BLOCK_N"]) * triton.cdiv(span, block_k)
        splits = max(1, min(triton.cdiv(PROGRAMS, tiles_of_one), M // SPLIT_TOKENS))
        return torch.empty(splits, count, products, layout.N, span, dtype=torch.float32, device=r.device)

    partial = empty(6 if _four(layout) else 3 * layout.S, layout.J * layout.KP, _blocks(layout, tiles)["BLOCK_K"])
    first = 0
    for kind, count, width, nodes in _kinds(layout):
        launch(kind, count, width, nodes, partial, first)
        first += count * nodes
    spine = empty(1, layout.J * 2 * layout.SP, _spine_columns(layout))
    launch(SPINE.value, 1, 1, 1, spine, 0, BLOCK_K=_spine_columns(layout))
    d_spine = spine.sum(0)[0].transpose(1, 2).reshape(layout.G, 2, layout.SP, layout.N)[:, :, :layout.S]
    return _control_gradients(layout, d_spine, _unstacked(partial.sum(0), layout))


def _is_small(layout: Layout) -> bool:
    """Whether the kernels for few coordinates serve it."""
    return layout.J == 1 and layout.S == 2 and layout.K <= 4 and layout.N <= 8 and layout.G > 1


def _small_launch(layout: Layout, name: str) -> dict:
    """A thread for each group of a block."""
    block_g, tokens = _power(min(layout.G, 128),
                             32), SMALL_FORWARD_TOKENS if name == "small_fwd" else SMALL_BACKWARD_TOKENS
    return dict(G=layout.G, K=layout.K, N=layout.N, WARP=layout.WARP, TOKENS=tokens, BLOCK_G=block_g,
                num_warps=block_g // 32)


def _small_forward(r: Tensor, controls: tuple, layout: Layout, expansion: float, delta_max: float,
                   eps: float) -> Tensor:
    M, launch = r.shape[0], _small_launch(layout, "small_fwd")
    out = torch.empty(M, layout.G * layout.N, dtype=r.dtype, device=r.device)
    _splanifold_small_fwd_kernel[(triton.cdiv(M, launch["TOKENS"]) * triton.cdiv(layout.G, launch["BLOCK_G"]),)](
        r, _small_table(layout, controls), out, M, *_scalars(r, expansion, eps), delta_max ** -2, **launch)
    return out


def _small_backward(grad: Tensor, r: Tensor, controls: tuple, layout: Layout, expansion: float, delta_max: float,
                    eps: float) -> tuple[Tensor, ...]:
    M, launch, table = r.shape[0], _small_launch(layout, "small_bwd"), _small_table(layout, controls)
    splits = triton.cdiv(M, SMALL_SPLIT_TOKENS)
    d_r, partial = torch.empty_like(r), torch.empty(splits, *table.shape, dtype=torch.float32, device=r.device)
    _splanifold_small_bwd_kernel[(splits * triton.cdiv(layout.G, launch["BLOCK_G"]),)](
        r, table, grad, d_r, partial, M, SMALL_SPLIT_TOKENS, *_scalars(r, expansion, eps), delta_max ** -2, **launch)
    return d_r, *_control_gradients(layout, *_small_table_gradients(layout, partial.sum(0)))


def _backward(grad: Tensor, r: Tensor, controls: tuple, expansion: float, delta_max: float, eps: float, mix: str,
              r_grad: bool, control_grads: bool) -> list[Tensor]:
    """Gradients of r and the four controls, empty where not asked for."""
    layout, grad = _layout(r, controls[0], delta_max, mix), grad.contiguous()
    if _is_small(layout):
        d_r, *d_controls = _small_backward(grad, r, controls, layout, expansion, delta_max, eps)
    else:
        stats = _stats(r, layout, expansion, delta_max)
        d_r = _gradient_of_r(grad, r, stats, controls, layout, expansion, delta_max, eps) if r_grad else r.new_empty(0)
        d_controls = _gradients_of_controls(grad, r, stats, layout, expansion, eps) if control_grads else controls
    return [d_r if r_grad else r.new_empty(0),
            *(d.to(x.dtype).contiguous() if control_grads else x.new_empty(0) for d, x in zip(d_controls, controls))]


# ---- Registration -----------------------------------------------------------

@torch.library.custom_op("knotgpt::splanifold_triton", mutates_args=())
def _forward_op(r: Tensor, points: Tensor, bases: Tensor, point_tangents: Tensor, base_tangents: Tensor,
                expansion: float, delta_max: float, eps: float, mix: str) -> Tensor:
    with torch.cuda.device_of(r):
        return _forward(r.contiguous(), (points, bases, point_tangents, base_tangents), expansion, delta_max, eps, mix)


@_forward_op.register_fake
def _(r, points, bases, point_tangents, base_tangents, expansion, delta_max, eps, mix):
    return r.new_empty(r.shape[0], points.shape[2] * (1 if mix == "sum" else r.shape[1]))


@torch.library.custom_op("knotgpt::splanifold_triton_backward", mutates_args=())
def _backward_op(grad: Tensor, r: Tensor, points: Tensor, bases: Tensor, point_tangents: Tensor, base_tangents: Tensor,
                 expansion: float, delta_max: float, eps: float, mix: str, r_grad: bool,
                 control_grads: bool) -> list[Tensor]:
    with torch.cuda.device_of(r):
        return _backward(grad, r.contiguous(), (points, bases, point_tangents, base_tangents), expansion, delta_max,
                         eps, mix, r_grad, control_grads)


@_backward_op.register_fake
def _(grad, r, points, bases, point_tangents, base_tangents, expansion, delta_max, eps, mix, r_grad, control_grads):
    return [x.new_empty(x.shape if wanted else 0) for x,
            wanted in ((r, r_grad), *((x, control_grads) for x in (points, bases, point_tangents, base_tangents)))]


def _save(ctx, inputs, output):
    *tensors, expansion, delta_max, eps, mix = inputs
    ctx.settings = expansion, delta_max, eps, mix
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad):
    wanted = ctx.needs_input_grad
    gradients = _backward_op(grad, *ctx.saved_tensors, *ctx.settings, wanted[0], any(wanted[1:5]))
    return *(d if w else None for d, w in zip(gradients, wanted)), None, None, None, None


_forward_op.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.knotgpt.splanifold_triton)
def _forward_flops(r, points, bases, point_tangents, base_tangents, expansion, delta_max, *_, out_shape=None,
                   **__) -> int:
    (M, G, K), (_, S, n) = r, points
    return 2 * M * G * n * ((4 if S == 2 and delta_max == math.inf else 3 * S) * K + 2 * S)


@register_flop_formula(torch.ops.knotgpt.splanifold_triton_backward)
def _backward_flops(grad, *arguments, out_shape=None, **__) -> int:
    r_grad, control_grads = arguments[-2:]
    return (r_grad + control_grads) * _forward_flops(*arguments)


def splanifold_triton(r: Tensor, controls: tuple[Tensor, Tensor, Tensor, Tensor], expansion: float, delta_max: float,
                      eps: float, mix: str) -> Tensor:
    """
    splanifold by this backend: r (M, G, K) bfloat16, float16 or float32 on CUDA, controls (points (G, S, n), bases,
    point_tangents and base_tangents (G, S, n, K)) of any of these dtypes, any strides. What the arguments are is not
    checked here.

    Returns (M, n) for mix "sum", (M, G n) for "concat", in r's dtype. t, delta, s, alpha and all sums are float32; the
    operands of products have r's dtype, float32 ones as three TF32 products. Gradients for r and the controls, once,
    each in its tensor's dtype; those not needed are not computed, but for K <= 4 and n <= 8.
    """
    return _forward_op(r, *controls, float(expansion), float(delta_max), float(eps), mix)
