"""
Splanifold, backend "triton", products: forward and backward pass of G splanifolds side by side by tensor cores,
r (M, G, K) to (M, n) or (M, G n). basis_triton has the weights c_m of a token's matrices.

1. delta has sum 0, so matrices' rows may be centred: the gradient of delta then has sum 0 as well and
   dr = (1 + 2E) (d delta + dt / K) needs no sum but dt, and matrix r is matrix delta but for the rounding of the rows,
   whose sums are kept.
2. Products of one group ("concat", or G = 1): its c_m are the same for all channels, so r (tokens x K) meets all
   matrices of a tile of outputs side by side, as a plain matrix product does, and c_m weighs the results. Sums over
   groups: delta, times c_m, is one operand and one accumulator takes four products a block of channels. Backward,
   d delta = sum c_m x_m and dt = sum c_m' x_m . delta with x_m = grad matrix_m side by side; matrices: grad' (c_m
   delta), side by side, in splits of the tokens that are summed afterwards: no atomics, two runs agree bit by bit. The
   spine is one more product, of 2 S columns a group.
3. Six matrices, S > 2 and warps: three matrices a node, for the nodes that bound a segment of the tile's tokens, the
   other tokens' weights being 0.
4. K <= 8 in a sum: channels of several groups, each padded to a power of two, share a tile; their t come from a table
   that a first kernel writes, as always.

Products for one token, S = 2, without padding and corrections (six matrices for a warp, 3 S for S > 2, where four are
said; and 2 S for 4); a side-by-side product of three matrices has room for four, a third more:
    forward     2 G n (4 K + 4) FLOPs      backward    twice that
Bytes for one token at e bytes a value, N = n for a sum, else G n; what other tiles read again is the cache's, matrices
are not counted:
    forward     read 2 e G K + 4 G, write e N + 4 G
    backward    read e (3 G K + 3 N) + 16 G, write e G K + 4 G; where K is above a tile's channels, e G K more of both,
                and 8 bytes a block of channels and group
    kept for the backward pass: r and the controls. The stacked matrices are made from the controls in each pass, by
    elementwise operations in float32.

Status: never run on a GPU; the kernels are tested in Triton's interpreter and compiled ahead of time, and their launch
table is a choice, not a measurement. At the tested shapes no kernel spills on sm_90, but that of dr where 4. meets a
warp or S > 2.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import jit, tl, triton
from kernels.splanifold.basis_triton import (
    CORRECTION,
    FOUR,
    NODE,
    SPINE,
    Layout,
    basis,
    coefficients,
    combine,
    control_gradients,
    first_node,
    needs_four,
    power,
    scalars,
    uncorrected,
)

# ---- Triton kernels ---------------------------------------------------------
# A product contracts the channels of J groups: all G for mix "sum" (one product, Q = 1), one for "concat" (Q = G
# products). spine (Q, N, J 2 SP) and matrices (count, Q, N, channels) are stacked by _tables. Channels come in blocks
# of BLOCK_K: a piece of one group, or, PACKED, BLOCK_K / KP whole groups, each padded to KP channels. b_t is (rows, 1)
# or, PACKED, (rows, BLOCK_K). Rows are int64 and clamped to the last one.

@jit
def _channels(block, K: tl.constexpr, KP: tl.constexpr, J: tl.constexpr, BLOCK_K: tl.constexpr, PACKED: tl.constexpr):
    """
    Returns of a block of channels: group (a scalar unless PACKED), coordinate, which exist, and the column in the
    stacked matrices.
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
def _load_statistic(ptr, rows, group, G: tl.constexpr, J: tl.constexpr, PACKED: tl.constexpr):
    """
    Returns (rows, 1), PACKED (rows, channels): a statistic of each row's group; 1 for groups beyond the last, which
    need no corrections.
    """
    if PACKED:
        return tl.load(ptr + rows[:, None] * G + group[None, :], mask=(group < J)[None, :], other=1.0)
    else:
        return tl.load(ptr + rows * G + group)[:, None]


@jit
def _load_deviations(r_ptr, b_t, rows, group, k, valid, scale, shift, G: tl.constexpr, K: tl.constexpr,
                     WHOLE: tl.constexpr):
    """Returns delta (rows, channels); 0 where there is no channel. WHOLE: all exist."""
    ptrs = r_ptr + rows[:, None] * (G * K) + (group * K + k)[None, :]
    if WHOLE:
        return tl.load(ptrs).to(tl.float32) * scale - shift - b_t
    else:
        b_r = tl.load(ptrs, mask=valid[None, :], other=0.0).to(tl.float32)
        return tl.where(valid[None, :], b_r * scale - shift - b_t, 0.0)


@jit
def _begin_tile(r_ptr, stats_ptr, spine_ptr, matrices_ptr, M, K: tl.constexpr, N: tl.constexpr, SP: tl.constexpr,
                J: tl.constexpr, KP: tl.constexpr, BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr):
    """
    Returns where a program works in a grid of products x tiles of tokens x COLUMNS, the last fastest: product, column,
    the tile's tokens as they are and clamped, and the pointers moved to the product.
    """
    tiles = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    product, tile = (pid // COLUMNS // tiles).to(tl.int64), (pid // COLUMNS) % tiles
    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(offs_m, M - 1).to(tl.int64)
    r_ptr += product * (J * K)
    stats_ptr += product * J
    spine_ptr += product * (N * J * 2 * SP)
    matrices_ptr += product * (N * J * KP)
    return product, pid % COLUMNS, offs_m, rows, r_ptr, stats_ptr, spine_ptr, matrices_ptr


@jit
def _splanifold_stats_kernel(r_ptr, stats_ptr, items, scale, shift, inverse_delta_max2,
                             K: tl.constexpr, WARP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """
    Writes stats (2 with WARP, else 1; items): t, and s = 1 / sqrt(1 + (|delta| / delta_max)^2), of items rows of K
    coordinates.
    """
    # t
    offs, offs_k = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    ptrs = r_ptr + tl.minimum(offs, items - 1)[:, None] * K + offs_k[None, :]
    b_sum = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        b_sum += tl.load(ptrs + k0, mask=(k0 + offs_k < K)[None, :], other=0.0).to(tl.float32)
    b_t = tl.sum(b_sum, 1) * (scale / K) - shift
    tl.store(stats_ptr + offs, b_t, mask=offs < items)

    # s
    if WARP:
        b_square = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        for k0 in range(0, K, BLOCK_K):
            b_r = tl.load(ptrs + k0, mask=(k0 + offs_k < K)[None, :], other=0.0).to(tl.float32)
            b_delta = b_r * scale - shift - b_t[:, None]
            b_square += tl.where((k0 + offs_k < K)[None, :], b_delta * b_delta, 0.0)
        b_s = 1.0 / tl.sqrt(1.0 + tl.sum(b_square, 1) * inverse_delta_max2)
        tl.store(stats_ptr + items + offs, b_s, mask=offs < items)


@jit
def _add_products(b_acc, r_ptr, stats_ptr, matrices_ptr, rows, offs_n, items, node, scale, shift, eps2, G: tl.constexpr,
                  K: tl.constexpr, N: tl.constexpr, S: tl.constexpr, J: tl.constexpr, KP: tl.constexpr,
                  PACKED: tl.constexpr, WARP: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
                  PRECISION: tl.constexpr, KIND: tl.constexpr, COUNT: tl.constexpr):
    """
    Returns b_acc (rows, outputs) + sum over COUNT matrices of matrix_m (c_m delta), over several groups: one product a
    matrix and block of channels.
    """
    BLOCKS: tl.constexpr = (J * KP + BLOCK_K - 1) // BLOCK_K if PACKED else J * ((K + BLOCK_K - 1) // BLOCK_K)
    WHOLE: tl.constexpr = (not PACKED) and K % BLOCK_K == 0
    PRODUCTS: tl.constexpr = G // J
    for block in range(0, BLOCKS):
        group, k, valid, column = _channels(block, K, KP, J, BLOCK_K, PACKED)
        b_t = _load_statistic(stats_ptr, rows, group, G, J, PACKED)
        b_s = 1.0
        if WARP:
            b_s = _load_statistic(stats_ptr + items, rows, group, G, J, PACKED)
        b_delta = _load_deviations(r_ptr, b_t, rows, group, k, valid, scale, shift, G, K, WHOLE)
        matrix_ptrs = matrices_ptr + offs_n[:, None] * (J * KP) + column[None, :]
        for m in tl.static_range(COUNT):
            b_c = coefficients(b_t, b_s, m, node, eps2, K, S, KIND)[0]
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
    Returns b_acc (rows, outputs) + sum c_m x_m for products of one group, whose coefficients are the same for all
    channels, with x_m = matrix_m delta for the COUNT matrices of a kind, side by side in one product of WIDTH places.
    It takes r as it is: delta = scale r - shift - t, and sums has the sums of the matrices' rows.
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
    return b_acc + tl.sum(coefficients(b_t[:, None, :], b_s[:, None, :], offs_m[None, :, None], node, eps2, K, S,
                                        KIND)[0] * b_x, 1)


@jit
def _splanifold_fwd_kernel(r_ptr, stats_ptr, spine_ptr, matrices_ptr, sums_ptr, out_ptr, M, items, scale, shift, eps2,
                           threshold, G: tl.constexpr, K: tl.constexpr, N: tl.constexpr, S: tl.constexpr,
                           SP: tl.constexpr, J: tl.constexpr, KP: tl.constexpr, PACKED: tl.constexpr,
                           WARP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                           BLOCK_F: tl.constexpr, PRECISION: tl.constexpr):
    """Writes a tile of tokens and outputs. Grid: products x tiles of tokens x tiles of outputs, the last fastest."""
    N_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    PRODUCTS: tl.constexpr = G // J
    product, column, offs_m, rows, r_ptr, stats_ptr, spine_ptr, matrices_ptr = _begin_tile(
        r_ptr, stats_ptr, spine_ptr, matrices_ptr, M, K, N, SP, J, KP, BLOCK_M, N_TILES)
    offs_n = column * BLOCK_N + tl.arange(0, BLOCK_N)

    # the spine; which corrections, or which nodes, the tile's tokens need
    b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_state = tl.zeros([BLOCK_M, BLOCK_F], tl.int32)
    b_low = tl.full([BLOCK_M, BLOCK_F], S, tl.int32)
    for f0 in range(0, J * 2 * SP, BLOCK_F):
        offs_f = f0 + tl.arange(0, BLOCK_F)
        group, place = offs_f // (2 * SP), offs_f % (2 * SP)
        b_t = _load_statistic(stats_ptr, rows, group, G, J, True)
        b_h = basis(b_t, (place % SP)[None, :], (place >= SP)[None, :], S)[0]
        b_spine = tl.load(spine_ptr + offs_n[:, None] * (J * 2 * SP) + offs_f[None, :],
                          mask=(offs_n < N)[:, None] & (group < J)[None, :], other=0.0)
        b_acc = tl.dot(b_h.to(b_spine.dtype), tl.trans(b_spine), b_acc, input_precision=PRECISION)
        if S == 2 and not WARP:
            b_state = tl.maximum(b_state, tl.where((group < J)[None, :], uncorrected(b_t, eps2, threshold, K), 0))
        else:
            b_state = tl.maximum(b_state, tl.where((group < J)[None, :], first_node(b_t, S), 0))
            b_low = tl.minimum(b_low, tl.where((group < J)[None, :], first_node(b_t, S), S))

    # the matrices
    high = tl.max(tl.max(b_state, 1), 0)
    if J == 1:
        sums_ptr += product * N
        b_t = _load_statistic(stats_ptr, rows, 0, G, J, False)
        b_s = tl.full([1, 1], 1.0, tl.float32)
        if WARP:
            b_s = _load_statistic(stats_ptr + items, rows, 0, G, J, False)
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
def _sum_groups(b_x, GROUPS: tl.constexpr, SIZE: tl.constexpr, KP: tl.constexpr, PACKED: tl.constexpr):
    """
    Returns sums over the columns, (rows, 1); PACKED over each of GROUPS runs of SIZE columns, and handed to that
    group's KP channels, (rows, GROUPS KP).
    """
    if PACKED:
        b_sums = tl.sum(tl.reshape(b_x, [b_x.shape[0], GROUPS, SIZE]), 2)
        return tl.reshape(tl.broadcast_to(b_sums[:, :, None], [b_x.shape[0], GROUPS, KP]), [b_x.shape[0], GROUPS * KP])
    else:
        return tl.sum(b_x, 1)[:, None]


@jit
def _add_gradients(b_ddelta, b_dt, b_ds, grad_ptr, matrices_ptr, b_t, b_s, rows, node, eps2, valid, column,
                   G: tl.constexpr, K: tl.constexpr, N: tl.constexpr, S: tl.constexpr, J: tl.constexpr,
                   KP: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, KIND: tl.constexpr,
                   COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """
    Returns, with x_m = grad matrix_m (rows, channels) for the COUNT matrices of a kind, side by side in one product of
    WIDTH places: b_ddelta + sum c_m x_m, and by channel b_dt + sum dc_m / dt x_m and b_ds + sum dc_m / ds x_m.
    """
    # x_m
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

    # the sums
    b_x = tl.reshape(b_x, [BLOCK_M, WIDTH, BLOCK_K])
    b_c, b_ct, b_cs = coefficients(b_t[:, None, :], b_s[:, None, :], offs_m[None, :, None], node, eps2, K, S, KIND)
    return b_ddelta + tl.sum(b_c * b_x, 1), b_dt + tl.sum(b_ct * b_x, 1), b_ds + tl.sum(b_cs * b_x, 1)


@jit
def _splanifold_bwd_r_kernel(r_ptr, stats_ptr, spine_ptr, matrices_ptr, grad_ptr, dr_ptr, partial_ptr, M, items, scale,
                             shift, eps2, threshold, inverse_delta_max2, G: tl.constexpr, K: tl.constexpr,
                             N: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, J: tl.constexpr, KP: tl.constexpr,
                             PACKED: tl.constexpr, WARP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                             BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr, PRECISION: tl.constexpr):
    """
    Writes a tile of tokens and channels: dr where it holds whole groups, else scale d delta, with its shares of dt and
    (WARP) ds in partial (blocks of a group; 1 or 2; items), for the next kernel. Grid: products x tiles of tokens x
    blocks of channels, the last fastest.
    """
    CHUNKS: tl.constexpr = 1 if PACKED else (K + BLOCK_K - 1) // BLOCK_K
    BLOCKS: tl.constexpr = (J * KP + BLOCK_K - 1) // BLOCK_K if PACKED else J * CHUNKS
    GROUPS: tl.constexpr = BLOCK_K // KP if PACKED else 1
    PRODUCTS: tl.constexpr = G // J
    product, block, offs_m, rows, r_ptr, stats_ptr, spine_ptr, matrices_ptr = _begin_tile(
        r_ptr, stats_ptr, spine_ptr, matrices_ptr, M, K, N, SP, J, KP, BLOCK_M, BLOCKS)
    grad_ptr += product * N

    # d delta, and by channel dt and ds
    group, k, valid, column = _channels(block, K, KP, J, BLOCK_K, PACKED)
    b_t = _load_statistic(stats_ptr, rows, group, G, J, PACKED)
    b_s = tl.full([1, 1], 1.0, tl.float32)
    if WARP:
        b_s = _load_statistic(stats_ptr + items, rows, group, G, J, PACKED)
    b_ddelta = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    b_dt = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    b_ds = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    if S == 2 and not WARP:
        b_ddelta, b_dt, b_ds = _add_gradients(b_ddelta, b_dt, b_ds, grad_ptr, matrices_ptr, b_t, b_s, rows, 0, eps2,
                                              valid, column, G, K, N, S, J, KP, BLOCK_N, PRECISION, FOUR, 4, 4)
        if tl.max(tl.max(uncorrected(b_t, eps2, threshold, K), 1), 0) > 0:
            b_ddelta, b_dt, b_ds = _add_gradients(
                b_ddelta, b_dt, b_ds, grad_ptr, matrices_ptr + 4 * PRODUCTS * N * J * KP, b_t, b_s, rows, 0, eps2,
                valid, column, G, K, N, S, J, KP, BLOCK_N, PRECISION, CORRECTION, 2, 2)
    else:
        b_first = first_node(b_t, S)
        for node in range(tl.min(tl.min(b_first, 1), 0), tl.max(tl.max(b_first, 1), 0) + 2):
            b_ddelta, b_dt, b_ds = _add_gradients(
                b_ddelta, b_dt, b_ds, grad_ptr, matrices_ptr + node * (3 * PRODUCTS * N * J * KP), b_t, b_s, rows, node,
                eps2, valid, column, G, K, N, S, J, KP, BLOCK_N, PRECISION, NODE, 3, 4)
    b_delta = _load_deviations(r_ptr, b_t, rows, group, k, valid, scale, shift, G, K, False)
    b_dt = _sum_groups(b_dt * b_delta, GROUPS, KP, KP, PACKED)

    # the spine's share of dt
    if PACKED or block % CHUNKS == 0:
        SIZE: tl.constexpr = BLOCK_F // GROUPS
        offs_f, offs_n = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_N)
        place = offs_f % SIZE
        b_spine_t = b_t
        if PACKED:
            group_f = block * GROUPS + offs_f // SIZE
            b_spine_t = _load_statistic(stats_ptr, rows, group_f, G, J, True)
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
        b_ht = basis(b_spine_t, (place % SP)[None, :], (place >= SP)[None, :], S)[1]
        b_dt += _sum_groups(b_ht * b_x, GROUPS, SIZE, KP, PACKED)

    # dr, or its share
    inside = (offs_m < M)[:, None]
    dr_ptrs = dr_ptr + product * (J * K) + rows[:, None] * (G * K) + (group * K + k)[None, :]
    if CHUNKS == 1:
        if WARP:
            b_ds = _sum_groups(b_ds * b_delta, GROUPS, KP, KP, PACKED)
            b_ddelta -= b_delta * (b_ds * inverse_delta_max2 * b_s * b_s * b_s)
        tl.store(dr_ptrs, (scale * (b_ddelta + b_dt / K)).to(dr_ptr.dtype.element_ty), mask=inside & valid[None, :])
    else:
        tl.store(dr_ptrs, (scale * b_ddelta).to(dr_ptr.dtype.element_ty), mask=inside & valid[None, :])
        partial_ptr += (block % CHUNKS).to(tl.int64) * (2 if WARP else 1) * items
        partial_ptrs = partial_ptr + (product * J + rows * G + group)[:, None]
        tl.store(partial_ptrs, b_dt, mask=inside)
        if WARP:
            tl.store(partial_ptrs + items, _sum_groups(b_ds * b_delta, GROUPS, KP, KP, PACKED), mask=inside)


@jit
def _splanifold_bwd_rows_kernel(r_ptr, stats_ptr, partial_ptr, dr_ptr, items, scale, shift, inverse_delta_max2,
                                K: tl.constexpr, CHUNKS: tl.constexpr, WARP: tl.constexpr, BLOCK_M: tl.constexpr,
                                BLOCK_K: tl.constexpr):
    """Adds to dr what dt and ds bring to every coordinate of a group. Grid (blocks of items, blocks of coordinates)."""
    # dt and ds of whole groups
    offs = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = tl.minimum(offs, items - 1)
    b_dt = tl.zeros([BLOCK_M], tl.float32)
    b_ds = tl.zeros([BLOCK_M], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        b_dt += tl.load(partial_ptr + chunk * (2 if WARP else 1) * items + rows)
        if WARP:
            b_ds += tl.load(partial_ptr + (2 * chunk + 1) * items + rows)

    # dr
    inside = (offs < items)[:, None] & (offs_k < K)[None, :]
    places = rows[:, None] * K + offs_k[None, :]
    b_dr = tl.load(dr_ptr + places, mask=inside, other=0.0).to(tl.float32) + (b_dt * (scale / K))[:, None]
    if WARP:
        b_s = tl.load(stats_ptr + items + rows)
        b_r = tl.load(r_ptr + places, mask=inside, other=0.0).to(tl.float32)
        b_delta = b_r * scale - shift - tl.load(stats_ptr + rows)[:, None]
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
    Writes gradients of COUNT stacked matrices (for NODE of each of NODES nodes), or of the spine, for a tile of outputs
    and channels, over one split of the tokens: grad' (c_m delta), side by side in one product of WIDTH places. partial
    (splits, MATRICES, products, N, channels), from the first of these matrices on. Grid: nodes x products x splits x
    tiles of outputs x blocks of channels, the last fastest.
    """
    # where the program works
    SPAN: tl.constexpr = J * 2 * SP if KIND == SPINE else J * KP  # columns
    GATHER: tl.constexpr = PACKED or KIND == SPINE
    WHOLE: tl.constexpr = (not PACKED) and K % BLOCK_K == 0
    BLOCKS: tl.constexpr = (SPAN + BLOCK_K - 1) // BLOCK_K if GATHER else J * ((K + BLOCK_K - 1) // BLOCK_K)
    N_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    PRODUCTS: tl.constexpr = G // J
    pid = tl.program_id(0)
    block, pid = pid % BLOCKS, pid // BLOCKS
    offs_n, pid = (pid % N_TILES) * BLOCK_N + tl.arange(0, BLOCK_N), pid // N_TILES
    split, pid = (pid % splits).to(tl.int64), pid // splits
    product, node = (pid % PRODUCTS).to(tl.int64), pid // PRODUCTS
    r_ptr += product * (J * K)
    stats_ptr += product * J
    grad_ptr += product * N

    # its channels and tokens
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
            rows = tl.minimum(start + offs_m, M - 1).to(tl.int64)
            b_t = _load_statistic(stats_ptr, rows, group, G, J, GATHER)
            b_any = tl.maximum(b_any, uncorrected(b_t, eps2, threshold, K))
        if tl.max(tl.max(b_any, 1), 0) == 0:
            last = first

    # the product
    b_acc = tl.zeros([BLOCK_N, WIDTH * BLOCK_K], tl.float32)
    for start in range(first, last, BLOCK_M):
        rows = tl.minimum(start + offs_m, M - 1).to(tl.int64)
        b_t = _load_statistic(stats_ptr, rows, group, G, J, GATHER)
        if KIND == SPINE:
            b_x = basis(b_t, (k % SP)[None, :], (k >= SP)[None, :], S)[0]
        else:
            b_s = tl.full([1, 1], 1.0, tl.float32)
            if WARP:
                b_s = _load_statistic(stats_ptr + items, rows, group, G, J, PACKED)
            b_delta = _load_deviations(r_ptr, b_t, rows, group, k, valid, scale, shift, G, K, WHOLE)
            b_c = coefficients(b_t[:, None, :], b_s[:, None, :], offs_w[None, :, None], node, eps2, K, S, KIND)[0]
            b_x = tl.broadcast_to(b_c * b_delta[:, None, :], [BLOCK_M, WIDTH, BLOCK_K])
            b_x = tl.reshape(b_x, [BLOCK_M, WIDTH * BLOCK_K])
        b_grad = tl.load(grad_ptr + rows[:, None] * (PRODUCTS * N) + offs_n[None, :],
                         mask=(start + offs_m < M)[:, None] & (offs_n < N)[None, :], other=0.0)
        b_acc = tl.dot(tl.trans(b_grad), b_x.to(b_grad.dtype), b_acc, input_precision=PRECISION)

    columns = tl.reshape(offs_w[:, None] * (PRODUCTS * N * SPAN) + column[None, :], [WIDTH * BLOCK_K])
    exists = tl.reshape((offs_w < COUNT)[:, None] & valid[None, :], [WIDTH * BLOCK_K])
    partial_ptr += ((split * MATRICES + node * COUNT) * PRODUCTS + product) * N * SPAN
    tl.store(partial_ptr + offs_n[:, None] * SPAN + columns[None, :], b_acc,
             mask=(offs_n < N)[:, None] & exists[None, :])


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
LAUNCH = {
    (0, 2): dict(
        fwd=Tiles(128, 32, 32, 8, 3),
        fwd_groups=Tiles(64, 128, 32, 4, 2),
        bwd_r=Tiles(128, 32, 32, 8, 3),
        bwd_controls=Tiles(32, 128, 32, 8, 3),
    ),
    (9, 2): dict(
        fwd=Tiles(128, 64, 64, 8, 3),
        fwd_groups=Tiles(128, 128, 32, 4, 2),
        fwd_groups_narrow=Tiles(128, 128, 32, 8, 2),
        bwd_r=Tiles(128, 64, 64, 8, 3),
        bwd_r_narrow=Tiles(128, 32, 32, 8, 3),
        bwd_controls=Tiles(32, 128, 64, 8, 3),
        bwd_controls_narrow=Tiles(32, 128, 32, 8, 3),
    ),
    (10, 2): dict(
        fwd=Tiles(128, 32, 64, 8, 3),
        fwd_groups=Tiles(128, 128, 32, 8, 2),
        bwd_r=Tiles(128, 64, 32, 8, 3),
        bwd_controls=Tiles(32, 128, 64, 8, 3),
    ),
    (0, 4): dict(
        fwd=Tiles(64, 32, 32, 8, 2),
        fwd_groups=Tiles(64, 64, 32, 8, 2),
        bwd_r=Tiles(64, 32, 32, 8, 2),
        bwd_controls=Tiles(32, 64, 32, 8, 2),
    ),
}
ROWS, COLUMNS = 32, 256     # a tile of the passes over rows
SPLIT_TOKENS = 512          # the control gradients are cut into splits of so many tokens or more, where that makes
PROGRAMS = 132              # so many programs, about one for each multiprocessor of an H200


def _kinds(layout: Layout) -> list[tuple[int, int, int, int]]:
    """Returns (kind, matrices of it, places in a product side by side, nodes) as they are stacked."""
    if needs_four(layout):
        return [(FOUR.value, 4, 4, 1), (CORRECTION.value, 2, 2, 1)]
    return [(NODE.value, 3, 4, layout.S)]


def _blocks(layout: Layout, tiles: Tiles) -> dict:
    """Returns the tile's sizes, no larger than the problem."""
    block_k = tiles.channels if layout.PACKED else min(tiles.channels, power(layout.K, 16))
    return dict(BLOCK_M=tiles.tokens, BLOCK_N=min(tiles.outputs, power(layout.N, 16)), BLOCK_K=block_k)


def _tiles(name: str, layout: Layout, capability: int, dtype: torch.dtype) -> Tiles:
    """Returns the launch of fwd, bwd_r or bwd_controls on a card of that compute capability (90 for 9.0)."""
    launch = LAUNCH.get((capability // 10, dtype.itemsize), LAUNCH[0, dtype.itemsize])
    if name == "fwd" and layout.J > 1:
        name = "fwd_groups"
    if layout.PACKED or not needs_four(layout):
        name = f"{name}_narrow" if f"{name}_narrow" in launch else name
    tiles = launch[name]
    if layout.PACKED and not needs_four(layout):
        tiles = tiles._replace(tokens=tiles.tokens // 2)
    return tiles


def _capability(r: Tensor) -> int:
    return 10 * torch.cuda.get_device_capability(r.device)[0] if r.is_cuda else 0


def _constants(layout: Layout, dtype: torch.dtype, tiles: Tiles) -> dict:
    """Returns the kernels' sizes and switches."""
    return dict(**layout._asdict(), **_blocks(layout, tiles), PRECISION="tf32x3" if dtype == torch.float32 else "tf32")


def _features(layout: Layout, block_k: int) -> int:
    """Returns the spine features of a block of channels."""
    return block_k // layout.KP * 2 * layout.SP if layout.PACKED else power(2 * layout.SP, 16)


def _spine_columns(layout: Layout) -> int:
    """Returns how many of the spine features of all groups are taken at once."""
    return power(min(2 * layout.SP * layout.J, 32), 16)


def _stack(x: Tensor, layout: Layout) -> Tensor:
    """Makes (count, products, n, channels) of (count, G, n, K)."""
    if layout.J == 1:
        return x
    return F.pad(x, (0, layout.KP - layout.K)).transpose(1, 2).flatten(2).unsqueeze(1)


def _unstack(x: Tensor, layout: Layout) -> Tensor:
    """Undoes _stack."""
    if layout.J == 1:
        return x
    return x.squeeze(1).unflatten(2, (layout.G, layout.KP)).transpose(1, 2)[..., :layout.K]


def _tables(layout: Layout, dtype: torch.dtype, controls: tuple) -> tuple[Tensor, Tensor]:
    """
    Returns spine (products, n, J 2 SP) and matrices (6 or 3 S, products, n, channels) in a dtype. The matrices' rows
    have mean 0 over a group but for their rounding: delta does not notice, and the gradient of delta comes out with sum
    0.
    """
    spine, matrices = combine(layout, *controls)
    spine = F.pad(spine, (0, 0, 0, layout.SP - layout.S)).flatten(1, 2)
    spine = spine.unflatten(0, (-1, layout.J)).flatten(1, 2).transpose(1, 2)
    matrices = _stack(matrices - matrices.mean(-1, keepdim=True), layout)
    return spine.to(dtype).contiguous(), matrices.to(dtype).contiguous()


def _stats(r: Tensor, layout: Layout, expansion: float, delta_max: float) -> Tensor:
    """Returns (1 or 2, M, G) float32: t, and s if there is a warp."""
    items = r.shape[0] * layout.G
    block_k = min(power(layout.K), COLUMNS)
    block_m = min(ROWS * COLUMNS // block_k, 512)
    stats = torch.empty(1 + layout.WARP, *r.shape[:2], dtype=torch.float32, device=r.device)
    _splanifold_stats_kernel[(triton.cdiv(items, block_m),)](
        r, stats, items, 1 + 2 * expansion, expansion, delta_max ** -2, K=layout.K, WARP=layout.WARP, BLOCK_M=block_m,
        BLOCK_K=block_k, num_warps=4)
    return stats


def forward(r: Tensor, controls: tuple, layout: Layout, expansion: float, delta_max: float, eps: float) -> Tensor:
    """Returns splanifold's result for r (M, G, K), contiguous."""
    # what the kernel reads
    M, products = r.shape[0], layout.G // layout.J
    stats = _stats(r, layout, expansion, delta_max)
    spine, matrices = _tables(layout, r.dtype, controls)
    sums = matrices.sum(-1, dtype=torch.float32) if layout.J == 1 else None

    # its launch
    tiles = _tiles("fwd", layout, _capability(r), r.dtype)
    constants = _constants(layout, r.dtype, tiles)
    grid = products * triton.cdiv(M, tiles.tokens) * triton.cdiv(layout.N, constants["BLOCK_N"])
    out = torch.empty(M, products * layout.N, dtype=r.dtype, device=r.device)
    _splanifold_fwd_kernel[(grid,)](
        r, stats, spine, matrices, sums, out, M, M * layout.G, *scalars(r, expansion, eps), **constants,
        BLOCK_F=_spine_columns(layout), num_warps=tiles.warps, num_stages=tiles.stages)
    return out


def backward(grad: Tensor, r: Tensor, controls: tuple, layout: Layout, expansion: float, delta_max: float, eps: float,
             r_grad: bool, control_grads: bool) -> tuple[Tensor | None, tuple[Tensor, ...] | None]:
    """Returns the gradient of r and those of the controls, in float32; None where they are not asked for."""
    stats = _stats(r, layout, expansion, delta_max)
    d_r = d_controls = None
    if r_grad:
        d_r = _gradient_of_r(grad, r, stats, controls, layout, expansion, delta_max, eps)
    if control_grads:
        d_controls = _gradients_of_controls(grad, r, stats, layout, expansion, eps)
    return d_r, d_controls


def _gradient_of_r(grad: Tensor, r: Tensor, stats: Tensor, controls: tuple, layout: Layout, expansion: float,
                   delta_max: float, eps: float) -> Tensor:
    M, items = r.shape[0], r.shape[0] * layout.G
    spine, matrices = _tables(layout, r.dtype, controls)
    tiles = _tiles("bwd_r", layout, _capability(r), r.dtype)
    constants = _constants(layout, r.dtype, tiles)

    # blocks of channels; where a group has several, their shares of its dt and ds
    block_k = constants["BLOCK_K"]
    if layout.PACKED:
        chunks, blocks = 1, triton.cdiv(layout.J * layout.KP, block_k)
    else:
        chunks = triton.cdiv(layout.K, block_k)
        blocks = layout.J * chunks
    partial = torch.empty(chunks, *stats.shape, dtype=torch.float32, device=r.device) if chunks > 1 else None

    d_r = torch.empty_like(r)
    grid = layout.G // layout.J * triton.cdiv(M, tiles.tokens) * blocks
    _splanifold_bwd_r_kernel[(grid,)](
        r, stats, spine, matrices, grad, d_r, partial, M, items, *scalars(r, expansion, eps), delta_max ** -2,
        **constants, BLOCK_F=_features(layout, block_k), num_warps=tiles.warps, num_stages=tiles.stages)
    if chunks > 1:
        scale, shift, _, _ = scalars(r, expansion, eps)
        _splanifold_bwd_rows_kernel[(triton.cdiv(items, ROWS), triton.cdiv(layout.K, COLUMNS))](
            r, stats, partial, d_r, items, scale, shift, delta_max ** -2, K=layout.K, CHUNKS=chunks, WARP=layout.WARP,
            BLOCK_M=ROWS, BLOCK_K=COLUMNS, num_warps=4)
    return d_r


def _gradients_of_controls(grad: Tensor, r: Tensor, stats: Tensor, layout: Layout, expansion: float,
                           eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    M, products = r.shape[0], layout.G // layout.J
    tiles = _tiles("bwd_controls", layout, _capability(r), r.dtype)
    block_n, block_k = _blocks(layout, tiles)["BLOCK_N"], _blocks(layout, tiles)["BLOCK_K"]

    def make_partial(count: int, span: int, block_k: int) -> Tensor:
        """Returns room for the sums of every split of the tokens, (splits, count, products, n, span)."""
        tiles_of_one = products * triton.cdiv(layout.N, block_n) * triton.cdiv(span, block_k)
        splits = max(1, min(triton.cdiv(PROGRAMS, tiles_of_one), M // SPLIT_TOKENS))
        return torch.empty(splits, count, products, layout.N, span, dtype=torch.float32, device=r.device)

    def launch(kind: int, count: int, width: int, nodes: int, partial: Tensor, first: int, block_k: int):
        """Sums the gradients of a kind's matrices, which begin at `first`."""
        constants = _constants(layout, r.dtype, tiles) | dict(BLOCK_K=block_k)
        span, splits = partial.shape[-1], len(partial)
        split_tokens = triton.cdiv(triton.cdiv(M, splits), tiles.tokens) * tiles.tokens
        if kind == SPINE.value or layout.PACKED:
            blocks = triton.cdiv(span, block_k)
        else:
            blocks = layout.J * triton.cdiv(layout.K, block_k)
        grid = nodes * products * splits * triton.cdiv(layout.N, constants["BLOCK_N"]) * blocks
        _splanifold_bwd_controls_kernel[(grid,)](
            r, stats, grad, partial[:, first:], M, M * layout.G, *scalars(r, expansion, eps), splits, split_tokens,
            **constants, KIND=kind, COUNT=count, WIDTH=width, NODES=nodes, MATRICES=partial.shape[1],
            num_warps=tiles.warps, num_stages=tiles.stages)

    # the matrices
    partial = make_partial(6 if needs_four(layout) else 3 * layout.S, layout.J * layout.KP, block_k)
    first = 0
    for kind, count, width, nodes in _kinds(layout):
        launch(kind, count, width, nodes, partial, first, block_k)
        first += count * nodes

    # the spine
    columns = _spine_columns(layout)
    spine = make_partial(1, layout.J * 2 * layout.SP, columns)
    launch(SPINE.value, 1, 1, 1, spine, 0, columns)

    # the controls
    d_spine = spine.sum(0)[0].transpose(1, 2).reshape(layout.G, 2, layout.SP, layout.N)[:, :, :layout.S]
    return control_gradients(layout, d_spine, _unstack(partial.sum(0), layout))
