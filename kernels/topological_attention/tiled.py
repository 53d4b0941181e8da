"""
Topological attention, backend "tiled": dense tiles with no product of queries and keys and no exponential per pair.

    s_ij = -|a_i - b_j| + F_i - F_j + c_j     max(doc_start_i, i - window + 1) <= j <= i
    F_i = sum over t <= i of g_t
    out_i = (1 / Z_i) sum_j p_ij v_j          p_ij = e^{s_ij}     Z_i = sum_j p_ij
    a (B, T, H), b and c (B, T, Hkv), g (B, T, H), v (B, T, Hkv, D); Hkv divides H

A tile of keys whose coordinates spread over at most 40 is narrow. With m its middle, K its largest w_j = c_j - F_j, and
a_i' = a_i clamped to m +- 20,
    |a_i - b_j| = |a_i - a_i'| + |a_i' - b_j|
    p_ij = e^{F_i + K - |a_i - a_i'|} min( e^{a_i' - m} fall_j, e^{m - a_i'} rise_j )
    rise_j = e^{w_j - K + b_j - m}     fall_j = e^{w_j - K - b_j + m}
There are two factors a query and tile, two a key (computed once), and for a pair two products and a minimum. Every
factor that counts lies in float32's range:
  - a row's exponent is shifted by a reference of at most 40 above its best score: over narrow tiles that all of the
    block's rows see in full, the best of F_i + K - distance(a_i, [lowest b, highest b]), which needs no scores; over
    the other tiles (the diagonal, edges of documents and windows, tiles wider than 40) an online maximum, as those take
    an exponential a pair;
  - F is float64 and enters as the sum of two float32, so the precision of a difference does not depend on T; with
    documents each has its F.
Leading tiles whose every weight is below e^-75 of the reference (a decay or a bias) are skipped, in the backward pass
trailing ones below e^-50 (a decay).

Backward, from u_i = the gradient of out_i, delta_i = u_i . out_i and normalised p:
    ds_ij = p_ij (u_i . v_j - delta_i)        sigma_ij = sign(a_i - b_j), 0 at a tie
    dv_j = sum_i p_ij u_i                     dc_j = sum_i ds_ij
    db_j = sum_i sigma_ij ds_ij               da_i = -sum_j sigma_ij ds_ij
    dF_i = sum_j ds_ij - sum_j' ds_j'i
in one kernel over key blocks. Its row sums (da, dF) are added to 64-bit integers, so that their order does not matter
and two runs agree bit by bit.

Matrix products for a pair of a query and a key it sees, and head: 2 D FLOPs forward, 4 D backward (p u and u v');
softmax attention makes 4 D and 10 D. Other float32 operations for a pair in narrow tiles: 4 forward (2 products,
minimum, sum); 13 backward (3 for p, 2 for ds, 4 for its sign, 4 sums), 11 without decay and bias.
Bytes for a token and query head at e bytes a value, float32 coordinates, decay and bias, Hkv = H; what later blocks
read again from the cache is not counted:
    forward     read e D + 60, write e D + 44
    backward    read 6 e D + 192, write e D + 172
    kept for the backward pass: the arguments, out, and 8 bytes a token and head

Source: the definition is Moriondo, "Topological Transformer" (TechRxiv 176800983.30631144), with a decay and a bias
added; online maximum and recomputing backward after Dao et al., arxiv.org/abs/2205.14135 and arxiv.org/abs/2307.08691.
Status: never run on a GPU; the kernels are tested in Triton's interpreter and compiled ahead of time, and their launch
table is a choice by registers and shared memory, not a measurement.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.backend import jit, tl, triton, triton_serves
from kernels.segmented_scan import running, starts_of
from kernels.topological_attention.loglinear import topological_attention_loglinear
from kernels.topological_attention.reference import SCHEMA, Arguments

# ---- Triton kernels ---------------------------------------------------------


@jit
def _split(x):
    """Returns float64 as the sum of two float32."""
    high = x.to(tl.float32)
    return high, (x - high.to(tl.float64)).to(tl.float32)


@jit
def _tile_bounds(tiles_ptr, n_tiles, offs, end, b_q, b_high, b_low, HAS_WEIGHT: tl.constexpr):
    """
    Returns upper bounds (rows x tiles) of the scores of tiles, from their lowest and highest coordinate and largest
    weight; -3e38 beyond `end`.
    """
    in_range = offs < end
    lowest = tl.load(tiles_ptr + offs, mask=in_range, other=0.0)
    highest = tl.load(tiles_ptr + n_tiles + offs, mask=in_range, other=0.0)
    b_score = -tl.maximum(tl.maximum(lowest[None, :] - b_q[:, None], b_q[:, None] - highest[None, :]), 0.0)
    if HAS_WEIGHT:
        top_high = tl.load(tiles_ptr + 3 * n_tiles + offs, mask=in_range, other=0.0)
        top_low = tl.load(tiles_ptr + 4 * n_tiles + offs, mask=in_range, other=0.0)
        b_score += (b_high[:, None] + top_high[None, :]) + (b_low[:, None] + top_low[None, :])
    return tl.where(in_range[None, :], b_score, -3e38)


@jit
def _tile_weights(b_row, b_high, b_low, middle, b_rise, b_fall, HALF_SPREAD: tl.constexpr):
    """
    Returns e^{high + low + weight - |row - coord|} (rows x columns) without an exponential per pair. With r' = a row's
    coordinate clamped to middle +- HALF_SPREAD, which holds every column, |r - coord| = |r - r'| + |r' - coord|; rise
    and fall are the columns' factors about middle.
    """
    b_offset = tl.minimum(tl.maximum(b_row - middle, -HALF_SPREAD), HALF_SPREAD)
    b_base = (b_high - tl.abs((b_row - middle) - b_offset)) + b_low
    b_rising, b_falling = tl.exp(b_base - b_offset), tl.exp(b_base + b_offset)
    return tl.minimum(b_rising[:, None] * b_rise[None, :], b_falling[:, None] * b_fall[None, :])


@jit
def _load_rows(
    ptr, start, offs_rows, offs_d, D: tl.constexpr, BLOCK_D: tl.constexpr, STRIDE: tl.constexpr, T,
    MASK_ROWS: tl.constexpr
):
    """
    Returns rows start + offs_rows of a matrix with D columns, padded to BLOCK_D with zeros; rows from T on are 0 with
    MASK_ROWS.
    """
    ptrs = ptr + tl.full([], start, tl.int64) * STRIDE + offs_rows[:, None] * STRIDE + offs_d[None, :]
    if MASK_ROWS and D < BLOCK_D:
        return tl.load(ptrs, mask=(offs_rows < T - start)[:, None] & (offs_d < D)[None, :], other=0.0)
    if MASK_ROWS:
        return tl.load(ptrs, mask=(offs_rows < T - start)[:, None], other=0.0)
    if D < BLOCK_D:
        return tl.load(ptrs, mask=(offs_d < D)[None, :], other=0.0)
    return tl.load(ptrs)


@jit
def _row_zeros(dtype: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """
    Returns ROWS zeros in the registers where a tensor-core product has its rows. Added to a vector they put the weights
    made from it there too; without a product of queries and keys the compiler would otherwise compute the weights once
    for their sums and again for their product with the values.
    """
    return tl.sum(tl.dot(tl.zeros([ROWS, 16], dtype), tl.zeros([16, COLUMNS], dtype), input_precision="tf32x3"), 1)


@jit
def _topological_attention_tiled_keys_kernel(
    key_ptr, bias_ptr, decay_ptr, factors_ptr, tiles_ptr, T, n_tiles,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DECAY: tl.constexpr, BLOCK_N: tl.constexpr
):
    """
    Makes, for each key, padded to full tiles, with the weight w = c - F: b, rise = e^{(w - top) + (b - m)},
    fall = e^{(w - top) - (b - m)}, w as two float32. For each tile: lowest and highest b, their middle m, the largest
    weight top as two float32. Then for a coordinate a near m
        e^{w - |a - b|} = e^top min(rise e^{m - a}, fall e^{a - m})
    Grid (tiles, B HEADS); HEADS are the query heads if there is a decay, else the key heads.
    """
    # the keys and their weights
    tile, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = bh // HEADS, bh % HEADS
    rows = tl.minimum(tile * BLOCK_N + tl.arange(0, BLOCK_N), T - 1)  # the last key again where there is none
    key_offs = (batch * T + rows) * KEY_HEADS + head // (HEADS // KEY_HEADS)
    b_weight = tl.zeros([BLOCK_N], tl.float64)
    if HAS_BIAS:
        # -inf hides a key, but has no differences
        b_weight += tl.maximum(tl.load(bias_ptr + key_offs), -1e30).to(tl.float64)
    if HAS_DECAY:
        b_weight -= tl.load(decay_ptr + bh * T + rows)
    b_k = tl.load(key_ptr + key_offs)

    # their factors
    lowest, highest = tl.min(b_k), tl.max(b_k)
    middle, top = 0.5 * (lowest + highest), tl.max(b_weight)
    b_local = (b_weight - top).to(tl.float32)
    b_high, b_low = _split(b_weight)
    factors_ptr += (bh * n_tiles + tile) * (5 * BLOCK_N) + tl.arange(0, BLOCK_N)
    tl.store(factors_ptr, b_k)
    tl.store(factors_ptr + BLOCK_N, tl.exp(b_local + (b_k - middle)))
    tl.store(factors_ptr + 2 * BLOCK_N, tl.exp(b_local - (b_k - middle)))
    tl.store(factors_ptr + 3 * BLOCK_N, b_high)
    tl.store(factors_ptr + 4 * BLOCK_N, b_low)

    # the tile
    top_high, top_low = _split(top)
    tiles_ptr += bh * 5 * n_tiles + tile
    tl.store(tiles_ptr, lowest)
    tl.store(tiles_ptr + n_tiles, highest)
    tl.store(tiles_ptr + 2 * n_tiles, middle)
    tl.store(tiles_ptr + 3 * n_tiles, top_high)
    tl.store(tiles_ptr + 4 * n_tiles, top_low)


@jit
def _topological_attention_tiled_fwd_kernel(
    query_ptr, value_ptr, decay_ptr, first_ptr, factors_ptr, tiles_ptr, out_ptr, lse_ptr, stride_vb, stride_vh, T,
    n_tiles, shift,
    STRIDE_VT: tl.constexpr, HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, D: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_DECAY: tl.constexpr, HAS_FIRST: tl.constexpr, HALF_SPREAD: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_TILES: tl.constexpr
):
    """
    Makes out and its rows' log-sum-exp for one block of queries of one head. Grid (query blocks, the longest first;
    B HEADS).
    """
    # where the block is
    start_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    bh = tl.program_id(1).to(tl.int64)
    batch, head = bh // HEADS, bh % HEADS
    key_head = head // (HEADS // KEY_HEADS)
    factor_row = bh if HAS_DECAY else batch * KEY_HEADS + key_head
    factors_ptr += factor_row * n_tiles * (5 * BLOCK_N)
    tiles_ptr += factor_row * 5 * n_tiles
    value_ptr += batch * stride_vb + key_head * stride_vh
    offs_m = tl.minimum(start_m + tl.arange(0, BLOCK_M), T - 1)  # a row beyond the last repeats it
    last = tl.minimum(start_m + BLOCK_M, T) - 1
    offs_n, offs_d, offs_s = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_TILES)

    # its tiles of keys: those in [open_begin, open_end) are seen in full by every row
    tile_begin = 0
    open_begin = 0
    open_end = (start_m + 1) // BLOCK_N
    tile_end = last // BLOCK_N + 1
    if HAS_FIRST:
        tile_begin = tl.load(first_ptr + batch * T + start_m) // BLOCK_N
        open_begin = tl.cdiv(tl.load(first_ptr + batch * T + last), BLOCK_N)

    # its queries
    b_zero = _row_zeros(value_ptr.dtype.element_ty, BLOCK_M, BLOCK_N)
    b_q = tl.load(query_ptr + (batch * T + offs_m) * HEADS + head) + b_zero
    b_high = tl.zeros([BLOCK_M], tl.float32)
    b_low = tl.zeros([BLOCK_M], tl.float32)
    if HAS_DECAY:
        b_high, b_low = _split(tl.load(decay_ptr + bh * T + offs_m))

    # The run: the open tiles after the last wide one. Each row's reference there is its best bound, at most a tile's
    # spread above its best score.
    run_end = tl.maximum(open_end, open_begin)
    run_begin = open_begin
    for tile in range(open_begin, run_end, BLOCK_TILES):
        offs = tile + offs_s
        b_highest = tl.load(tiles_ptr + n_tiles + offs, mask=offs < run_end, other=0.0)
        b_spread = b_highest - tl.load(tiles_ptr + offs, mask=offs < run_end, other=0.0)
        run_begin = tl.maximum(run_begin, tl.max(tl.where(b_spread > 2 * HALF_SPREAD, offs + 1, 0)))
    b_bound = tl.full([BLOCK_M], -3e38, tl.float32)
    for tile in range(run_begin, run_end, BLOCK_TILES):
        b_scores = _tile_bounds(tiles_ptr, n_tiles, tile + offs_s, run_end, b_q, b_high, b_low, HAS_WEIGHT)
        b_bound = tl.maximum(b_bound, tl.max(b_scores, 1))

    # leading tiles that cannot reach e^-35 of any row's sum are left out
    if HAS_WEIGHT:
        relevant = tile_end
        for tile in range(tile_begin, tile_end, BLOCK_TILES):
            b_scores = _tile_bounds(tiles_ptr, n_tiles, tile + offs_s, tile_end, b_q, b_high, b_low, HAS_WEIGHT)
            b_most = tl.max(b_scores - b_bound[:, None], 0)
            b_counts = (tile + offs_s < tile_end) & (b_most > -75.0)
            relevant = tl.minimum(relevant, tl.min(tl.where(b_counts, tile + offs_s, tile_end)))
        tile_begin = tl.maximum(tile_begin, relevant)
    b_ref = b_bound - shift

    # Tiles that are masked or wide: an exponential a pair and an online maximum.
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    run_begin, run_end = tl.maximum(run_begin, tile_begin), tl.maximum(run_end, tile_begin)
    for slow in range(tile_begin, tile_end - (run_end - run_begin)):
        tile = slow + tl.where(slow < run_begin, 0, run_end - run_begin)
        keys = tile * BLOCK_N + offs_n
        factor_ptrs = factors_ptr + tile * (5 * BLOCK_N) + offs_n
        b_k = tl.load(factor_ptrs)
        b_v = _load_rows(value_ptr, tile * BLOCK_N, offs_n, offs_d, D, BLOCK_D, STRIDE_VT, T, True)
        b_score = -tl.abs(b_q[:, None] - b_k[None, :])
        if HAS_WEIGHT:
            b_weight_high, b_weight_low = tl.load(factor_ptrs + 3 * BLOCK_N), tl.load(factor_ptrs + 4 * BLOCK_N)
            b_score += (b_high[:, None] + b_weight_high[None, :]) + (b_low[:, None] + b_weight_low[None, :])
        b_allowed = keys[None, :] <= offs_m[:, None]
        if HAS_FIRST:
            b_allowed = b_allowed & (keys[None, :] >= tl.load(first_ptr + batch * T + offs_m)[:, None])
        b_score = tl.where(b_allowed, b_score, float("-inf"))
        b_new = tl.maximum(b_ref, tl.max(b_score, 1) - shift)
        b_keep = tl.exp(b_ref - b_new)
        b_p = tl.exp(b_score - b_new[:, None])
        b_sum = b_sum * b_keep + tl.sum(b_p, 1)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_keep[:, None], input_precision="tf32x3")
        b_ref = b_new

    # The run: no exponential a pair, and the reference stays.
    for tile in range(run_begin, run_end):
        factor_ptrs = factors_ptr + tile * (5 * BLOCK_N) + offs_n
        b_rise = tl.load(factor_ptrs + BLOCK_N)
        b_fall = tl.load(factor_ptrs + 2 * BLOCK_N)
        b_v = _load_rows(value_ptr, tile * BLOCK_N, offs_n, offs_d, D, BLOCK_D, STRIDE_VT, T, False)
        middle = tl.load(tiles_ptr + 2 * n_tiles + tile)
        b_tile_high = -b_ref
        b_tile_low = b_low
        if HAS_WEIGHT:
            b_tile_high += b_high + tl.load(tiles_ptr + 3 * n_tiles + tile)
            b_tile_low += tl.load(tiles_ptr + 4 * n_tiles + tile)
        b_p = _tile_weights(b_q, b_tile_high, b_tile_low, middle, b_rise, b_fall, HALF_SPREAD)
        b_sum += tl.sum(b_p, 1)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="tf32x3")

    # the results
    b_mine = start_m + tl.arange(0, BLOCK_M) < T
    tl.store(lse_ptr + bh * T + offs_m, b_ref.to(tl.float64) + tl.log(b_sum).to(tl.float64), mask=b_mine)
    out_ptr += ((batch * T + start_m) * HEADS + head) * D
    tl.store(
        out_ptr + tl.arange(0, BLOCK_M)[:, None] * (HEADS * D) + offs_d[None, :],
        b_acc / b_sum[:, None],
        mask=b_mine[:, None] & (offs_d < D)[None, :],
    )


@jit
def _topological_attention_tiled_bwd_queries_kernel(
    query_ptr, lse_ptr, decay_ptr, first_ptr, out_ptr, grad_ptr, rows_ptr, most_ptr, stride_gb, stride_gh, T, n_tiles,
    shift,
    STRIDE_GT: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_FIRST: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr
):
    """
    Makes, for each query, padded to full tiles: its coordinate, its weight F_i - lse_i + shift as two float32,
    delta_i = grad_i . out_i, the first key it sees. For each tile: the largest weight. Grid (tiles, B HEADS).
    """
    # the rows of out and of its gradient
    tile, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = bh // HEADS, bh % HEADS
    offs_m, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    out_ptr += (batch * T * HEADS + head) * D
    grad_ptr += batch * stride_gb + head * stride_gh
    b_o = _load_rows(out_ptr, tile * BLOCK_M, offs_m, offs_d, D, BLOCK_D, HEADS * D, T, True).to(tl.float32)
    b_do = _load_rows(grad_ptr, tile * BLOCK_M, offs_m, offs_d, D, BLOCK_D, STRIDE_GT, T, True).to(tl.float32)

    # the weights
    rows = tl.minimum(tile * BLOCK_M + offs_m, T - 1)
    b_weight = shift - tl.load(lse_ptr + bh * T + rows)
    if HAS_DECAY:
        b_weight += tl.load(decay_ptr + bh * T + rows)
        tl.store(most_ptr + bh * n_tiles + tile, tl.max(b_weight).to(tl.float32))
    b_high, b_low = _split(tl.where(tile * BLOCK_M + offs_m < T, b_weight, -1e30))

    # the results
    rows_ptr += (bh * n_tiles + tile) * (5 * BLOCK_M) + offs_m
    tl.store(rows_ptr, tl.load(query_ptr + (batch * T + rows) * HEADS + head))
    tl.store(rows_ptr + BLOCK_M, b_high)
    tl.store(rows_ptr + 2 * BLOCK_M, b_low)
    tl.store(rows_ptr + 3 * BLOCK_M, tl.sum(b_o * b_do, 1))
    if HAS_FIRST:
        tl.store(rows_ptr + 4 * BLOCK_M, tl.load(first_ptr + batch * T + rows).to(tl.float32, bitcast=True))


@jit
def _thread_sums(b_x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PAIRS: tl.constexpr):
    """
    Returns partial sums of columns, (ROWS / 8 / PAIRS, 8, COLUMNS), as far as they stay inside a thread: PAIRS = 2
    where a thread holds rows i and i + 8 of a product (mma and wgmma), 1 where it holds one row (tcgen05). What is left
    is summed once, after the loop.
    """
    return tl.sum(tl.reshape(b_x, [ROWS // 8 // PAIRS, PAIRS, 8, COLUMNS]), 1)


@jit
def _accumulate_gradients(
    b_p, b_vt, b_do, b_q, b_k, b_delta, scale, b_dv, b_dk, b_dw, sum_ptrs, decay_sums,
    HAS_WEIGHT: tl.constexpr, HAS_DECAY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAIRS: tl.constexpr
):
    """Adds one tile's share, queries x keys, to every gradient; returns b_dv, b_dk and b_dw."""
    b_dv = tl.dot(tl.trans(b_p.to(b_vt.dtype)), b_do, b_dv, input_precision="tf32x3")
    b_ds = b_p * (tl.dot(b_do, b_vt, input_precision="tf32x3") - b_delta[:, None])
    # ds times the derivative of the score with respect to the key's coordinate: 0 at a tie
    b_side = tl.where(b_q[:, None] > b_k[None, :], b_ds, tl.where(b_q[:, None] < b_k[None, :], -b_ds, 0.0))
    b_dk += _thread_sums(b_side, BLOCK_M, BLOCK_N, PAIRS)
    tl.atomic_add(sum_ptrs, (tl.sum(b_side, 1) * -scale).to(tl.int64), sem="relaxed")
    if HAS_WEIGHT:
        b_dw += _thread_sums(b_ds, BLOCK_M, BLOCK_N, PAIRS)
    if HAS_DECAY:
        tl.atomic_add(sum_ptrs + decay_sums, (tl.sum(b_ds, 1) * scale).to(tl.int64), sem="relaxed")
    return b_dv, b_dk, b_dw


@jit
def _topological_attention_tiled_bwd_keys_kernel(
    value_ptr, query_end_ptr, factors_ptr, key_tiles_ptr, rows_ptr, most_ptr, scale_ptr, grad_ptr, d_value_ptr,
    d_key_ptr, d_weight_ptr, sums_ptr, stride_vb, stride_vh, stride_gb, stride_gh, T, key_tiles, query_tiles, zero,
    STRIDE_VT: tl.constexpr, STRIDE_GT: tl.constexpr, HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, D: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_FIRST: tl.constexpr, HALF_SPREAD: tl.constexpr,
    UNSHIFT: tl.constexpr, PAIRS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_TILES: tl.constexpr
):
    """
    Makes the gradients of one block of keys from the queries of one head that see it, and adds to those queries'. Grid
    (key blocks, the longest first; B HEADS). zero: 0, unknown to the compiler: what is read at an address with it stays
    inside the loop, where registers are dearer than reads of shared memory. d_value and d_key: one per query head.
    """
    # where the block is, and its values
    key_tile = tl.program_id(0)
    start_n = key_tile * BLOCK_N
    bh = tl.program_id(1).to(tl.int64)
    batch, head = bh // HEADS, bh % HEADS
    key_head = head // (HEADS // KEY_HEADS)
    offs_n, offs_m = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    offs_d, offs_s = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_TILES)
    value_ptr += batch * stride_vb + key_head * stride_vh
    b_vt = tl.trans(_load_rows(value_ptr, start_n, offs_n, offs_d, D, BLOCK_D, STRIDE_VT, T, True))
    b_zero = _row_zeros(value_ptr.dtype.element_ty, BLOCK_M, BLOCK_N)

    # its tiles of queries: those in [open_begin, open_end) are full and see every key of the block
    tile_begin = start_n // BLOCK_M
    tile_end = tl.cdiv(T, BLOCK_M)
    open_begin = tl.cdiv(start_n + BLOCK_N - 1, BLOCK_M)
    open_end = T // BLOCK_M
    if HAS_FIRST:
        tile_end = tl.cdiv(tl.load(query_end_ptr + batch * T + tl.minimum(start_n + BLOCK_N, T) - 1), BLOCK_M)
        open_end = tl.load(query_end_ptr + batch * T + start_n) // BLOCK_M

    # what is read of its keys and of the queries
    factor_row = bh if HAS_DECAY else batch * KEY_HEADS + key_head
    key_ptrs = factors_ptr + (factor_row * key_tiles + key_tile) * (5 * BLOCK_N) + offs_n
    key_tile_ptr = key_tiles_ptr + factor_row * 5 * key_tiles + key_tile
    row_ptrs = rows_ptr + bh * query_tiles * (5 * BLOCK_M) + offs_m
    do_ptr = grad_ptr + batch * stride_gb + head * stride_gh
    sum_ptrs = sums_ptr + bh * query_tiles * (2 * BLOCK_M if HAS_DECAY else BLOCK_M) + offs_m
    spread = tl.load(key_tile_ptr + key_tiles) - tl.load(key_tile_ptr)
    middle = tl.load(key_tile_ptr + 2 * key_tiles)
    top_high = tl.load(key_tile_ptr + 3 * key_tiles)
    top_low = tl.load(key_tile_ptr + 4 * key_tiles)
    scale = tl.load(scale_ptr + bh)

    # trailing tiles whose every normalised weight is below e^-50 are left out
    if HAS_DECAY:
        relevant = tile_begin
        for tile in range(tile_begin, tile_end, BLOCK_TILES):
            offs = tile + offs_s
            b_most = tl.load(most_ptr + bh * query_tiles + offs, mask=offs < tile_end, other=float("-inf"))
            relevant = tl.maximum(relevant, tl.max(tl.where(b_most + top_high > -50.0, offs + 1, tile_begin)))
        tile_end = relevant
    fast_begin = tl.minimum(open_begin, tile_end)
    fast_end = tl.maximum(tl.where(spread <= 2 * HALF_SPREAD, tl.minimum(open_end, tile_end), 0), fast_begin)

    # tiles that are masked or wide: an exponential a pair
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dk = tl.zeros([BLOCK_M // 8 // PAIRS, 8, BLOCK_N], tl.float32)
    b_dw = tl.zeros([BLOCK_M // 8 // PAIRS, 8, BLOCK_N], tl.float32)
    for slow in range(tile_begin, tile_end - (fast_end - fast_begin)):
        tile = slow + tl.where(slow < fast_begin, 0, fast_end - fast_begin)
        row = row_ptrs + tile * (5 * BLOCK_M)
        b_q = tl.load(row) + b_zero
        b_k = tl.load(key_ptrs + tile * zero)
        b_do = _load_rows(do_ptr, tile * BLOCK_M, offs_m, offs_d, D, BLOCK_D, STRIDE_GT, T, True)
        b_high, b_key_high = tl.load(row + BLOCK_M), tl.load(key_ptrs + 3 * BLOCK_N + tile * zero)
        b_score = b_high[:, None] + b_key_high[None, :] - tl.abs(b_q[:, None] - b_k[None, :])
        b_low, b_key_low = tl.load(row + 2 * BLOCK_M), tl.load(key_ptrs + 4 * BLOCK_N + tile * zero)
        b_score += b_low[:, None] + b_key_low[None, :]
        b_allowed = (start_n + offs_n)[None, :] <= (tile * BLOCK_M + offs_m)[:, None]
        if HAS_FIRST:
            b_first = tl.load(row + 4 * BLOCK_M).to(tl.int32, bitcast=True)
            b_allowed = b_allowed & ((start_n + offs_n)[None, :] >= b_first[:, None])
        b_p = tl.where(b_allowed, tl.exp(b_score), 0.0)
        b_dv, b_dk, b_dw = _accumulate_gradients(
            b_p, b_vt, b_do, b_q, b_k, tl.load(row + 3 * BLOCK_M), scale, b_dv, b_dk, b_dw, sum_ptrs + tile * BLOCK_M,
            query_tiles * BLOCK_M, HAS_WEIGHT, HAS_DECAY, BLOCK_M, BLOCK_N, PAIRS
        )

    # the others: no exponential a pair
    for tile in range(fast_begin, fast_end):
        row = row_ptrs + tile * (5 * BLOCK_M)
        b_q = tl.load(row) + b_zero
        b_k = tl.load(key_ptrs + tile * zero)
        b_rise = tl.load(key_ptrs + BLOCK_N + tile * zero)
        b_fall = tl.load(key_ptrs + 2 * BLOCK_N + tile * zero)
        b_do = _load_rows(do_ptr, tile * BLOCK_M, offs_m, offs_d, D, BLOCK_D, STRIDE_GT, T, False)
        b_high, b_low = tl.load(row + BLOCK_M) + top_high, tl.load(row + 2 * BLOCK_M) + top_low
        b_p = _tile_weights(b_q, b_high, b_low, middle, b_rise, b_fall, HALF_SPREAD)
        b_dv, b_dk, b_dw = _accumulate_gradients(
            b_p, b_vt, b_do, b_q, b_k, tl.load(row + 3 * BLOCK_M), scale, b_dv, b_dk, b_dw, sum_ptrs + tile * BLOCK_M,
            query_tiles * BLOCK_M, HAS_WEIGHT, HAS_DECAY, BLOCK_M, BLOCK_N, PAIRS
        )

    # the results
    first_key = (batch * T + start_n) * HEADS + head
    in_range = offs_n < T - start_n
    if HAS_WEIGHT:
        tl.store(d_weight_ptr + bh * T + start_n + offs_n, tl.sum(tl.sum(b_dw, 0), 0) * UNSHIFT, mask=in_range)
    tl.store(d_key_ptr + first_key + offs_n * HEADS, tl.sum(tl.sum(b_dk, 0), 0) * UNSHIFT, mask=in_range)
    tl.store(
        d_value_ptr + first_key * D + offs_n[:, None] * (HEADS * D) + offs_d[None, :],
        b_dv * UNSHIFT,
        mask=in_range[:, None] & (offs_d < D)[None, :],
    )


# ---- Host functions ---------------------------------------------------------


class Tiles(NamedTuple):
    """A launch."""
    block_m: int    # queries a block
    block_n: int    # keys a block
    warps: int
    stages: int     # of the pipeline


# capability -> bytes of a value -> the widest D: the launch. A card takes the last row not above it; 120 (consumer
# cards) has 80's products and shared memory.
FORWARD_TILES = {
    80: {
        2: {16: Tiles(128, 64, 4, 2), 128: Tiles(128, 64, 8, 2), 256: Tiles(64, 64, 8, 2)},
        4: {16: Tiles(64, 32, 4, 2), 128: Tiles(64, 16, 4, 2), 256: Tiles(64, 16, 8, 2)},
    },
    90: {
        2: {128: Tiles(128, 64, 8, 3), 256: Tiles(128, 64, 8, 2)},
        4: {128: Tiles(128, 32, 8, 2), 256: Tiles(64, 16, 8, 2)},
    },
    100: {2: {256: Tiles(128, 64, 8, 2)}, 4: {128: Tiles(128, 32, 8, 2), 256: Tiles(64, 16, 8, 2)}},
}
BACKWARD_TILES = {
    80: {
        2: {16: Tiles(128, 64, 8, 2), 128: Tiles(32, 64, 4, 2), 256: Tiles(16, 64, 8, 2)},
        4: {128: Tiles(16, 32, 4, 2), 256: Tiles(16, 32, 8, 2)},
    },
    90: {
        2: {128: Tiles(128, 64, 8, 2), 256: Tiles(64, 64, 8, 2)},
        4: {64: Tiles(64, 32, 8, 2), 128: Tiles(16, 32, 4, 2), 256: Tiles(16, 32, 8, 2)},
    },
    100: {
        2: {256: Tiles(64, 64, 8, 2)},
        4: {64: Tiles(64, 32, 8, 2), 128: Tiles(16, 32, 4, 2), 256: Tiles(16, 32, 8, 2)},
    },
}
FORWARD_TILES[120] = FORWARD_TILES[80]
BACKWARD_TILES[120] = BACKWARD_TILES[80]
SCORE_TILES = 32        # tiles whose bounds are looked at together
GRID_LIMIT = 65535      # of a launch's second dimension


def tiles_for(table: dict, capability: int, dtype: torch.dtype, D: int) -> Tiles:
    """Returns the launch for a compute capability (90 for 9.0), value's dtype and D."""
    known = max(card for card in table if card <= max(capability, min(table)))
    launches = table[known][dtype.itemsize]
    return launches[min(width for width in launches if width >= D)]


def _capability(value: Tensor) -> int:
    major, minor = torch.cuda.get_device_capability(value.device) if value.is_cuda else (0, 0)
    return 10 * major + minor


class Operands(NamedTuple):
    """Arguments as the kernels take them: contiguous, but for value, which is so in D only."""
    query: Tensor           # (B, T, H) float32
    key: Tensor             # (B, T, Hkv) float32
    value: Tensor           # (B, T, Hkv, D)
    bias: Tensor | None     # (B, T, Hkv) float32: c
    decay: Tensor | None    # (B, H, T) float64: F, from each document's start
    first: Tensor | None    # (B, T) int32: the first key each query sees


def _document_starts(doc_start: Tensor | None) -> Tensor | None:
    return None if doc_start is None else starts_of(doc_start)[:, None]


def _operands(x: Arguments) -> Operands:
    """Returns the arguments as the kernels take them."""
    # the first key that each query sees
    B, T = x.value.shape[:2]
    first = None if x.doc_start is None else x.doc_start.to(torch.int32)
    if x.window is not None and x.window < T:
        begin = torch.arange(1 - x.window, T + 1 - x.window, device=x.value.device, dtype=torch.int32).clamp_(min=0)
        first = begin.expand(B, T) if first is None else torch.maximum(first, begin)

    # F
    decay = None
    if x.log_decay is not None:
        log_decay = x.log_decay.transpose(1, 2).to(torch.float64, memory_format=torch.contiguous_format)
        decay = running(torch.add, log_decay, _document_starts(x.doc_start))
    return Operands(
        query=x.query_coord.float().contiguous(),
        key=x.key_coord.float().contiguous(),
        value=x.value if x.value.stride(-1) == 1 else x.value.contiguous(),
        bias=None if x.key_bias is None else x.key_bias.float().contiguous(),
        decay=decay,
        first=None if first is None else first.contiguous(),
    )


def _limits(dtype: torch.dtype) -> tuple[float, float, float]:
    """
    Returns half the spread of a narrow tile in the forward pass, and the exponents that are added to the weights
    forward and backward. A row's reference is at most the spread above its best score, so weights lie in [e^-40, 1]:
    float16 has no room for that, and little for the normalised weights of a flat row.
    """
    return (6.0, 10.0, 9.7) if dtype == torch.float16 else (20.0, 0.0, 0.0)


def _constants(o: Operands, tiles: Tiles) -> dict:
    D = o.value.shape[3]
    return dict(
        HEADS=o.query.shape[2],
        D=D,
        BLOCK_D=max(16, triton.next_power_of_2(D)),
        HAS_DECAY=o.decay is not None,
        HAS_FIRST=o.first is not None,
        BLOCK_M=tiles.block_m,
    )


def _launch(o: Operands, tiles: Tiles) -> dict:
    return dict(
        KEY_HEADS=o.key.shape[2],
        HAS_WEIGHT=o.decay is not None or o.bias is not None,
        BLOCK_N=tiles.block_n,
        BLOCK_TILES=SCORE_TILES,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def _key_factors(o: Operands, block_n: int) -> tuple[Tensor, Tensor, int]:
    """Returns what _topological_attention_tiled_keys_kernel writes, and the number of tiles."""
    B, T, key_heads = o.key.shape
    heads = key_heads if o.decay is None else o.query.shape[2]
    n_tiles = triton.cdiv(T, block_n)
    factors = torch.empty(B, heads, n_tiles, 5, block_n, device=o.key.device)
    tiles = torch.empty(B, heads, 5, n_tiles, device=o.key.device)
    _topological_attention_tiled_keys_kernel[(n_tiles, B * heads)](
        o.key, o.bias, o.decay, factors, tiles, T, n_tiles,
        HEADS=heads, KEY_HEADS=key_heads, HAS_BIAS=o.bias is not None, HAS_DECAY=o.decay is not None,
        BLOCK_N=block_n, num_warps=1
    )
    return factors, tiles, n_tiles


def _forward(o: Operands, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Returns out (B, T, H, D) and its rows' log-sum-exp (B, H, T)."""
    B, T, H = o.query.shape
    half_spread, shift, _ = _limits(o.value.dtype)
    factors, key_tiles, n_tiles = _key_factors(o, tiles.block_n)
    out = torch.empty(B, T, H, o.value.shape[3], device=o.value.device, dtype=o.value.dtype)
    lse = torch.empty(B, H, T, device=o.value.device, dtype=torch.float64)
    _topological_attention_tiled_fwd_kernel[(triton.cdiv(T, tiles.block_m), B * H)](
        o.query, o.value, o.decay, o.first, factors, key_tiles, out, lse, o.value.stride(0), o.value.stride(2), T,
        n_tiles, shift,
        STRIDE_VT=o.value.stride(1), HALF_SPREAD=half_spread, **_constants(o, tiles), **_launch(o, tiles)
    )
    return out, lse


def rows_of_a_thread(capability: int) -> int:
    """Returns PAIRS of _thread_sums."""
    return 1 if 100 <= capability < 120 else 2


def _backward(o: Operands, out: Tensor, lse: Tensor, grad: Tensor, tiles: Tiles, pairs: int) -> tuple:
    """
    Returns the gradients of query (B, H, T), key (B, T, Hkv), value (B, T, Hkv, D), and the scores' gradient summed
    over queries and over keys (B, H, T), or None where there is no weight and no decay.
    """
    B, T, H = o.query.shape
    key_heads = o.key.shape[2]
    D = o.value.shape[3]
    device = o.value.device
    shift = _limits(o.value.dtype)[2]
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    factors, key_tiles, n_key_tiles = _key_factors(o, tiles.block_n)

    # what the other kernel reads of the queries
    n_tiles = triton.cdiv(T, tiles.block_m)
    rows = torch.empty(B, H, n_tiles, 5, tiles.block_m, device=device)
    most = None if o.decay is None else torch.empty(B, H, n_tiles, device=device)
    _topological_attention_tiled_bwd_queries_kernel[(n_tiles, B * H)](
        o.query, lse, o.decay, o.first, out, grad, rows, most, grad.stride(0), grad.stride(2), T, n_tiles, shift,
        STRIDE_GT=grad.stride(1), num_warps=4, **_constants(o, tiles)
    )

    # the results' arrays
    scale = _scale_of_sums(o, grad, shift)
    kinds = 1 if o.decay is None else 2
    sums = torch.zeros(B, H, kinds, n_tiles * tiles.block_m, device=device, dtype=torch.int64)
    d_value = torch.empty(B, T, H, D, device=device, dtype=o.value.dtype)
    d_key = torch.empty(B, T, H, device=device)
    d_weight = None if o.decay is None and o.bias is None else torch.empty(B, H, T, device=device)

    # the queries before query_end see the key
    query_end = None
    if o.first is not None:
        index = torch.arange(T, device=device, dtype=torch.int32).expand(B, T).contiguous()
        query_end = torch.searchsorted(o.first, index, right=True, out_int32=True)
    _topological_attention_tiled_bwd_keys_kernel[(n_key_tiles, B * H)](
        o.value, query_end, factors, key_tiles, rows, most, scale, grad, d_value, d_key, d_weight, sums,
        o.value.stride(0), o.value.stride(2), grad.stride(0), grad.stride(2), T, n_key_tiles, n_tiles, 0,
        STRIDE_VT=o.value.stride(1), STRIDE_GT=grad.stride(1), HALF_SPREAD=20.0, UNSHIFT=math.exp(-shift), PAIRS=pairs,
        **_constants(o, tiles), **_launch(o, tiles)
    )

    # heads of a group share their keys; sums of integers become those of numbers
    if H > key_heads:
        d_value = d_value.unflatten(2, (key_heads, -1)).sum(3, dtype=torch.float32).to(o.value.dtype)
        d_key = d_key.unflatten(2, (key_heads, -1)).sum(3)
    row_sums = (sums * (math.exp(-shift) / scale.double())[..., None, None])[..., :T].unbind(2)
    d_row = None if o.decay is None else row_sums[1]
    return row_sums[0], d_key, d_value, d_weight, d_row


def _scale_of_sums(o: Operands, grad: Tensor, shift: float) -> Tensor:
    """
    Returns, (B, H), what row sums are multiplied by as they become integers: a power of two, so that products with it
    are exact. Any partial row sum is at most 2 e^shift max |grad| max |v| <= 2^60 / scale.
    """
    group = o.query.shape[2] // o.key.shape[2]
    of_values = torch.linalg.vector_norm(o.value, dim=-1, dtype=torch.float32).amax(1).repeat_interleave(group, 1)
    of_grad = torch.linalg.vector_norm(grad, dim=-1, dtype=torch.float32).amax(1)
    largest = (of_values * of_grad * (2 * math.exp(shift))).clamp_min(1e-18)
    return 2.0 ** 59 / (largest / largest.frexp().mantissa)


# ---- Registration -----------------------------------------------------------


def _forward_body(*arguments) -> tuple[Tensor, Tensor]:
    """Returns out and the log-sum-exp of each row's scores, (B, H, T) float64."""
    x = Arguments(*arguments)
    D = x.value.shape[3]
    return _forward(_operands(x), tiles_for(FORWARD_TILES, _capability(x.value), x.value.dtype, D))


def _forward_fake(*arguments):
    x = Arguments(*arguments)
    B, T, H = x.query_coord.shape
    out = x.value.new_empty(B, T, H, x.value.shape[3])
    return out, x.query_coord.new_empty(B, H, T, dtype=torch.float64)


def _backward_body(*inputs) -> list[Tensor]:
    """
    Returns the gradients of the five floating arguments, of those that are not None. After the arguments come the
    results of the forward pass and the gradient of out.
    """
    *arguments, out, lse, grad = inputs
    x = Arguments(*arguments)
    capability = _capability(x.value)
    tiles = tiles_for(BACKWARD_TILES, capability, x.value.dtype, x.value.shape[3])
    d_query, d_key, d_value, d_weight, d_row = _backward(
        _operands(x), out, lse, grad, tiles, rows_of_a_thread(capability)
    )
    gradients = [(d_query.transpose(1, 2), x.query_coord), (d_key, x.key_coord), (d_value, x.value)]
    if x.log_decay is not None:  # dg_t = sum over j >= t of dF_j
        d_decay = running(torch.add, d_row - d_weight, _document_starts(x.doc_start), backward=True)
        gradients.append((d_decay.transpose(1, 2), x.log_decay))
    if x.key_bias is not None:
        of_keys = d_weight.unflatten(1, (x.key_coord.shape[2], -1)).sum(2)
        gradients.append((of_keys.transpose(1, 2), x.key_bias))
    return [gradient.to(t.dtype).contiguous() for gradient, t in gradients]


def _backward_fake(*inputs):
    return [t.new_empty(t.shape) for t in Arguments(*inputs[:-3]).floats if t is not None]


def _setup(ctx, inputs, output):
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx, grad, _):
    *inputs, out, lse = ctx.saved_tensors
    gradients = iter(_tiled_backward(*inputs, ctx.window, out, lse, grad))
    return *(None if x is None else next(gradients) for x in inputs[:5]), None, None


_tiled = torch.library.custom_op(
    "knotgpt::topological_attention_tiled", _forward_body, mutates_args=(), schema=f"({SCHEMA}) -> (Tensor, Tensor)"
)
_tiled_backward = torch.library.custom_op(
    "knotgpt::topological_attention_tiled_backward",
    _backward_body,
    mutates_args=(),
    schema=f"({SCHEMA}, Tensor out, Tensor lse, Tensor grad) -> Tensor[]",
)
_tiled.register_fake(_forward_fake)
_tiled_backward.register_fake(_backward_fake)
_tiled.register_autograd(_gradients, setup_context=_setup)


def _flops(shapes: Arguments, of_pair: int) -> int:
    """
    Returns the FLOPs of a pass from the shapes of its arguments: so many for a pair of a query and a key that it sees,
    head and number of a value. Documents are not looked at.
    """
    B, T, H = shapes.query_coord
    width = min(shapes.window or T, T)
    pairs = width * (width + 1) // 2 + (T - width) * width
    return of_pair * B * H * shapes.value[3] * pairs


@register_flop_formula(torch.ops.knotgpt.topological_attention_tiled)
def _(*shapes, out_shape=None, **_) -> int:
    return _flops(Arguments(*shapes), 2)


@register_flop_formula(torch.ops.knotgpt.topological_attention_tiled_backward)
def _(*shapes, out_shape=None, **_) -> int:
    return _flops(Arguments(*shapes[:-3]), 4)


def topological_attention_tiled(*arguments, **named) -> Tensor:
    """
    Returns topological_attention's result by this backend: bfloat16, float16 and float32 on CUDA, with coordinates,
    D <= 256 and B H <= 65,535. Everything else goes to the loglinear backend. It does not check the Arguments.

    The result (B, T, H, D) has value's dtype; scores and sums are float32, so that a weight's relative error is about
    1e-7 of the distance. Memory beyond arguments and results: 8 bytes a token and head until the backward pass; at work
    O(B T H), and a gradient of value for each query head. It is differentiable once.
    """
    x = Arguments(*arguments, **named)
    if _serves(x):
        return _tiled(*x)[0]
    return topological_attention_loglinear(*x)


def _serves(x: Arguments) -> bool:
    """Tells whether the kernels take these arguments."""
    if not triton_serves(x.value) or x.dtype != torch.float32 or x.query_coord is None:
        return False
    return len(x.value) * x.heads <= GRID_LIMIT and x.value.shape[3] <= 256
