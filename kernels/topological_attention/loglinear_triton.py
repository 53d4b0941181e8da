"""
Topological attention, backend "loglinear" on a GPU: the exact O(T log T) algorithm of loglinear.py in Triton, forward
and backward.

    s_ij = -|a_i - b_j| + F_i - F_j + c_j        max(doc_start_i, i - window + 1) <= j <= i
    F_i = sum over t <= i of g_t                 g_t <= 0
    out_i = (1/Z_i) sum_j e^{s_ij - M_i} v_j     M_i = max_j s_ij     Z_i = sum_j e^{s_ij - M_i}

1.  Tokens lie in chunks of C. Pairs inside a chunk are dense tiles; at the level of node size s = C, 2C, ... the keys
    of a node act on the queries of its neighbour.
2.  Queries and keys are sorted once, by document and coordinate, and partitioned stably into nodes level by level, from
    the largest down.
3.  A level cuts the sorted keys of a node into blocks and the sorted queries into tiles. A tile meets the blocks that
    its coordinates overlap, about three, as dense tiles of e^{s_ij}. All blocks below act as one row and all blocks
    above as another, because there e^-|a - b| = e^-(a - x) e^-(x - b).
4.  Launches of a level: _partition; _ends, the sums [sum w v, sum w] of each block as seen from its upper and its lower
    end; _carry, their running sums over the node from either side, which overwrite them; _forward. No table of one row
    a key is written, and no rank is computed: a tile counts the blocks below and above.
5.  out is normalised at every moment, beside M and Z: a tile's rows are read, merged and written once a level.
6.  Every exponent is a difference inside a node against the maximum of its row or sum, with coordinates counted from
    the end of a block. F and what is combined with it is float64, kept as two float32 numbers, so that differences lose
    nothing. F is summed in integers: no rounding of one document reaches another.
7.  A window of W cuts the tokens into blocks of W: the lower triangle of each block (left keys, right queries), and the
    strictly upper triangle of its queries and the keys of the block before (right keys, left queries), which goes on
    from the same out, M and Z.
8.  Backward: the same levels twice, with queries as targets for da, and transposed (keys as targets, rows
    [dOut, -dOut.out] and weights e^{-M}/Z at the queries) for dv, db and dc. Both sides of a target are kept apart.
    Blocks of keys that all equal all the targets of a tile are skipped, as sgn(0) = 0, and join dv by a sum.
9.  Many equal coordinates cost no more: blocks that equal a tile's every coordinate are among the sums, never dense.
10. Which keys a query meets in dense tiles depends on its tile, so a later query can change an earlier one's rounding,
    and nothing more. Documents are isolated bit for bit, since their order does not depend on each other's coordinates.

Work for one token of one head (counted; e bytes an element of v, L levels, tiles of 64 and blocks of 32; the sorts and
what is one number a token are not counted):
    forward     (C + 100 L) D FLOPs, C / 2 + 48 L exponentials     e D (C / 128 + 1.25 L) + 4 D (1 + 1.1 L) bytes
    backward    three times the FLOPs, twice the exponentials      e D (C / 64 + 3.5 L) + 4 D (1 + 1.2 L) bytes
    memory beside out: D / 8 bytes for the sums of blocks, 16 to 32 for the orders; backward e D for dOut and 4 D for dv

Source: Moriondo, Topological Transformer (Tauformer), TechRxiv 176800983.30631144, for scores of scalars; the algorithm
and its gradient are ours. Online maximum: Milakov and Gimelshein, arxiv.org/abs/1805.02867.
Status: never run on a GPU; the kernels are tested in Triton's interpreter and compiled ahead of time, and their launch
table is a choice, not a measurement.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import jit, tl, triton
from kernels.segmented_scan import running
from kernels.topological_attention.reference import Arguments

# ---- Triton kernels: shared by the passes -----------------------------------
# rows = B H. order (2, rows, blocks, length): of queries, of keys, positions in a block of the window, sorted in each
# node. coordinates (2, rows, T); shifts (2, rows, T): the high and the low part of a float64. A block of `width` tokens
# has `length` positions, the last ones of them empty. LOWEST: e^LOWEST is no key.

LOWEST = tl.constexpr(-1e30)


@jit
def _place(index, T, width, blocks, length, size, LOWER: tl.constexpr, DIAGONAL: tl.constexpr):
    """
    Returns the index-th pair of nodes, or chunk: its row, then block and first position of its queries, and of its
    keys, and the last token before the boundary.
    """
    nodes = length // size if DIAGONAL else length // size // 2
    passes = blocks if LOWER else blocks - 1
    node, block, row = index % nodes, (index // nodes) % passes, (index // nodes // passes).to(tl.int64)
    if DIAGONAL:
        query_node, key_node = node, node
    elif LOWER:
        query_node, key_node = 2 * node + 1, 2 * node
    else:
        query_node, key_node = 2 * node, 2 * node + 1
    query_block = block if LOWER else block + 1
    boundary = block * width + query_node * size - 1 if LOWER else query_block * width - 1
    return row, query_block, query_node * size, block, key_node * size, boundary


@jit
def _positions(order_ptr, in_order, first, BLOCK: tl.constexpr, DIAGONAL: tl.constexpr):
    offs = first + tl.arange(0, BLOCK)
    if DIAGONAL:
        return offs
    else:
        return tl.load(order_ptr + in_order + offs)


@jit
def _load_shift(ptr, in_row, plane, b_token, mask):
    """Returns the high and the low part of the tokens' shift; zeros where there is none."""
    if ptr is None:
        b_zero = (b_token * 0).to(tl.float32)
        return b_zero, b_zero
    else:
        b_high = tl.load(ptr + in_row + b_token, mask=mask, other=0.0)
        return b_high, tl.load(ptr + plane + in_row + b_token, mask=mask, other=0.0)


@jit
def _from_boundary(b_high, b_low, decay_ptr, at_boundary, plane, QUERY: tl.constexpr):
    """Returns a query's or a key's share of a score, up to the boundary m: F_i - F_m, F_m - F_j + c_j."""
    if decay_ptr is not None:
        sign = -1.0 if QUERY else 1.0
        b_high += sign * tl.load(decay_ptr + at_boundary)
        b_low += sign * tl.load(decay_ptr + plane + at_boundary)
    return b_high + b_low


@jit
def _only_crossing(b_shift, doc_ptr, b_token, boundary, b_seen):
    """Returns the shift, but -inf for tokens that are not, or not of the document that crosses the boundary."""
    if doc_ptr is not None:
        b_seen = b_seen & (tl.load(doc_ptr + b_token, mask=b_seen, other=-1) == tl.load(doc_ptr + boundary + 1))
    return tl.where(b_seen, b_shift, float("-inf"))


@jit
def _targets(
    order_ptr, coord_ptr, shift_ptr, doc_ptr, in_order, in_row, plane, first, first_token, limit, boundary,
    BLOCK: tl.constexpr, DIAGONAL: tl.constexpr
):
    """
    Returns a tile of targets, from place `first` of a node's order on: positions, tokens, whether they take part,
    documents, coordinates, and the high and the low part of their shifts. first_token: of their block. limit: how many
    positions of the block there are.
    """
    b_position = _positions(order_ptr, in_order, first, BLOCK, DIAGONAL)
    b_token = first_token + b_position
    b_valid = b_position < limit
    b_doc = b_token
    if doc_ptr is not None:
        b_doc = tl.load(doc_ptr + b_token, mask=b_valid, other=-1)
        if not DIAGONAL:
            b_valid = b_valid & (b_doc == tl.load(doc_ptr + boundary + 1))
    b_x = tl.load(coord_ptr + in_row + b_token, mask=b_valid, other=0.0)
    b_high, b_low = _load_shift(shift_ptr, in_row, plane, b_token, b_valid)
    return b_position, b_token, b_valid, b_doc, b_x, b_high, b_low


@jit
def _scores(
    order_ptr, coord_ptr, shift_ptr, decay_ptr, doc_ptr, in_order, in_row, plane, first, first_token, limit, boundary,
    b_position, b_doc, b_x, b_high, b_low,
    BLOCK: tl.constexpr, LOWER: tl.constexpr, DIAGONAL: tl.constexpr, QUERIES: tl.constexpr
):
    """
    Returns a block of sources, keys or with QUERIES queries, from place `first` of a node's order on: tokens, whether
    they are there, coordinates, and the scores of targets x sources, -inf where there is no pair. b_position to b_low:
    the targets, as _targets returns them.
    """
    # the sources
    b_other = _positions(order_ptr, in_order, first, BLOCK, DIAGONAL)
    b_token = first_token + b_other
    b_seen = b_other < limit
    b_other_x = tl.load(coord_ptr + in_row + b_token, mask=b_seen, other=0.0)
    b_other_high, b_other_low = _load_shift(shift_ptr, in_row, plane, b_token, b_seen)
    if not DIAGONAL:
        b_other_high = _from_boundary(b_other_high, b_other_low, decay_ptr, in_row + boundary, plane, QUERIES)
        b_other_high = _only_crossing(b_other_high, doc_ptr, b_token, boundary, b_seen)

    # the scores
    b_score = b_high[:, None] + b_other_high[None, :]
    if DIAGONAL:
        b_score += b_low[:, None] + b_other_low[None, :]
    b_score = b_score - tl.abs(b_x[:, None] - b_other_x[None, :])

    # the pairs of a chunk
    if DIAGONAL:
        if QUERIES:
            b_query, b_key = b_other[None, :], b_position[:, None]
        else:
            b_query, b_key = b_position[:, None], b_other[None, :]
        b_allowed = b_seen[None, :] & ((b_key <= b_query) if LOWER else (b_key > b_query))
        if doc_ptr is not None:
            b_allowed = b_allowed & (b_doc[:, None] == tl.load(doc_ptr + b_token, mask=b_seen, other=-2)[None, :])
        b_score = tl.where(b_allowed, b_score, float("-inf"))
    return b_token, b_seen, b_other_x, b_score


@jit
def _begin(
    T, width, blocks, length, size, rows, BLOCK_T: tl.constexpr, LOWER: tl.constexpr, DIAGONAL: tl.constexpr
):
    """
    Returns where a program of a pass works: the pair of nodes, or chunk, and the tile in it; its row, the last token
    before the boundary, and whether there are no queries or no keys; then of the queries and of the keys the block's
    first token, the node's first position, the number of positions of the block, and where their order begins.
    """
    # the pair of nodes, and the tile
    pid = tl.program_id(0)
    tiles = size // BLOCK_T
    index, tile = pid // tiles, pid % tiles
    row, q_block, q_first, k_block, k_first, boundary = _place(
        index, T, width, blocks, length, size, LOWER, DIAGONAL
    )

    # their queries and keys
    q_limit, k_limit = tl.minimum(width, T - q_block * width), tl.minimum(width, T - k_block * width)
    absent = (q_first >= q_limit) | (k_first >= k_limit)
    in_queries, in_keys = (row * blocks + q_block) * length, ((rows + row) * blocks + k_block) * length
    return (
        index, tile, row, boundary, absent,
        q_block * width, q_first, q_limit, in_queries,
        k_block * width, k_first, k_limit, in_keys,
    )


@jit
def _chunk_keys(
    tile, count, b_doc, b_valid, doc_ptr, first_key,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, LOWER: tl.constexpr
):
    """Returns the first block of a chunk's keys that a tile of its queries meets, and the one after the last."""
    begin = 0 if LOWER else tile * BLOCK_T // BLOCK_S
    end = tl.cdiv((tile + 1) * BLOCK_T, BLOCK_S) if LOWER else count
    if LOWER and doc_ptr is not None:  # nothing before the tile's first document
        first_document = tl.min(tl.where(b_valid, b_doc, 2147483647), 0)
        begin = tl.maximum(first_document - first_key, 0) // BLOCK_S
    return begin, end


@jit
def _range_of(b_x, b_valid):
    """Returns the lowest and the highest coordinate of a tile; inf and -inf where it is empty."""
    lowest = tl.min(tl.where(b_valid, b_x, float("inf")), 0)
    return lowest, tl.max(tl.where(b_valid, b_x, float("-inf")), 0)


@jit
def _load_rows(ptr, b_at, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    offs_d = tl.arange(0, BLOCK_D)
    mask = mask[:, None]
    if D != BLOCK_D:
        mask = mask & (offs_d < D)[None, :]
    return tl.load(ptr + b_at[:, None] + offs_d[None, :], mask=mask, other=0.0)


@jit
def _store_rows(ptr, b_at, b_x, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    offs_d = tl.arange(0, BLOCK_D)
    mask = mask[:, None]
    if D != BLOCK_D:
        mask = mask & (offs_d < D)[None, :]
    tl.store(ptr + b_at[:, None] + offs_d[None, :], b_x.to(ptr.dtype.element_ty), mask=mask)


@jit
def _load_sum(
    x_ptr, m_ptr, z_ptr, e_ptr, at, present, D: tl.constexpr, D_STORED: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Returns a running sum: where its coordinate is, the exponent of its maximum, its last column, its row."""
    offs_d = tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + at, mask=present, other=0.0)
    m = tl.load(m_ptr + at, mask=present, other=LOWEST)
    z = tl.load(z_ptr + at, mask=present, other=0.0)
    b_e = tl.load(e_ptr + at * D_STORED + offs_d, mask=offs_d < tl.where(present, D, 0), other=0.0)
    return x, m, z, b_e


@jit
def _spans(x_ptr, at, total, count, lowest, highest, SEARCH: tl.constexpr):
    """
    Returns how many of a node's blocks end below `lowest`, end at most there, begin below `highest`, begin at most
    there. x_ptr: ends (total), then beginnings. Both rise: -inf where no key of a block is of the boundary's document
    and later ones are, inf where earlier ones are.
    """
    offs = tl.arange(0, SEARCH)
    b_end_below, b_end_upto = tl.zeros((SEARCH,), tl.int32), tl.zeros((SEARCH,), tl.int32)
    b_begin_below, b_begin_upto = tl.zeros((SEARCH,), tl.int32), tl.zeros((SEARCH,), tl.int32)
    for first in range(0, count, SEARCH):
        b_end = tl.load(x_ptr + at + first + offs, mask=first + offs < count, other=float("inf"))
        b_begin = tl.load(x_ptr + total + at + first + offs, mask=first + offs < count, other=float("inf"))
        b_end_below += (b_end < lowest).to(tl.int32)
        b_end_upto += (b_end <= lowest).to(tl.int32)
        b_begin_below += (b_begin < highest).to(tl.int32)
        b_begin_upto += (b_begin <= highest).to(tl.int32)
    return tl.sum(b_end_below, 0), tl.sum(b_end_upto, 0), tl.sum(b_begin_below, 0), tl.sum(b_begin_upto, 0)


# ---- Triton kernels: orders, and the sums of blocks -------------------------


@jit
def _partition_kernel(order_ptr, lefts_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """
    Splits each node of 2 size positions into its left and right half, in order. lefts: how many of all positions up to
    each one go left.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_position, b_lefts = tl.load(order_ptr + at), tl.load(lefts_ptr + at)
    node = at // (2 * size)
    b_lefts = b_lefts - node * size
    to = tl.where((b_position & size) == 0, b_lefts - 1, size + at - node * 2 * size - b_lefts)
    tl.store(out_ptr + node * 2 * size + to, b_position)


@jit
def _ends_kernel(
    order_ptr, coord_ptr, shift_ptr, decay_ptr, doc_ptr, rows_ptr, column_ptr, x_ptr, m_ptr, z_ptr, e_ptr,
    rows_b, rows_t, rows_h, heads, group, rows, total, T, width, blocks, length, size,
    D: tl.constexpr, D_STORED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    LOWER: tl.constexpr, QUERIES: tl.constexpr
):
    """
    Makes, for one block of sorted sources (keys, or with QUERIES queries), as seen from the last and from the first of
    its coordinates: x, that coordinate; m, the maximum of its log-weights; the sums of weights / e^m times rows, and
    times column (1 if there is none).
    """
    pid = tl.program_id(0)
    count = size // BLOCK
    row, q_block, q_first, k_block, k_first, boundary = _place(
        pid // count, T, width, blocks, length, size, LOWER, False
    )
    plane = tl.cast(rows, tl.int64) * T
    if (q_first < tl.minimum(width, T - q_block * width)) & (k_first < width):
        # the sources
        block, first = (q_block, q_first) if QUERIES else (k_block, k_first)
        in_row, b, h = row * T, row // heads, row % heads
        in_order = ((row if QUERIES else rows + row) * blocks + block) * length
        b_position = _positions(order_ptr, in_order, first + (pid % count) * BLOCK, BLOCK, False)
        b_token = block * width + b_position
        b_valid = b_position < tl.minimum(width, T - block * width)
        b_x = tl.load(coord_ptr + in_row + b_token, mask=b_valid, other=0.0)
        b_high, b_low = _load_shift(shift_ptr, in_row, plane, b_token, b_valid)
        b_w = _from_boundary(b_high, b_low, decay_ptr, in_row + boundary, plane, QUERIES)

        # only those of the document that crosses the boundary
        outside = float("inf")
        if doc_ptr is not None:
            crossing = tl.load(doc_ptr + b * T + boundary + 1)
            b_doc = tl.load(doc_ptr + b * T + b_token, mask=b_valid, other=2147483647)
            outside = tl.where(tl.min(b_doc, 0) < crossing, float("-inf"), float("inf"))
            b_valid = b_valid & (b_doc == crossing)

        # their rows and columns
        in_rows = rows_ptr + b * rows_b + (h // group) * rows_h
        b_rows = _load_rows(in_rows, b_token.to(tl.int64) * rows_t, b_valid, D, BLOCK_D).to(tl.float32)
        if column_ptr is None:
            b_column = tl.full((BLOCK,), 1.0, tl.float32)
        else:
            b_column = tl.load(column_ptr + in_row + b_token, mask=b_valid, other=0.0)

        # the sums from either side
        offs_d = tl.arange(0, BLOCK_D)
        low, high = _range_of(b_x, b_valid)
        for side in tl.static_range(2):
            b_reach = tl.where(b_valid, b_w - (high - b_x if side == 0 else b_x - low), float("-inf"))
            highest = tl.maximum(tl.max(b_reach, 0), LOWEST)
            b_factor = tl.exp(b_reach - highest)
            at = pid.to(tl.int64) + side * total
            tl.store(x_ptr + at, tl.where(low <= high, high if side == 0 else low, outside))
            tl.store(m_ptr + at, highest)
            tl.store(z_ptr + at, tl.sum(b_factor * b_column, 0))
            tl.store(e_ptr + at * D_STORED + offs_d, tl.sum(b_factor[:, None] * b_rows, 0), mask=offs_d < D)


@jit
def _carry_kernel(
    x_ptr, own_m_ptr, own_z_ptr, m_ptr, z_ptr, e_ptr, total, T, width, blocks, length, size,
    D: tl.constexpr, D_STORED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, LOWER: tl.constexpr
):
    """
    Makes the running sums over a node's blocks, each with its own: upwards as seen from a block's end (side 0),
    downwards from its beginning. e is overwritten.
    """
    index, side = tl.program_id(0), tl.program_id(1)
    offs_d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    row, q_block, q_first, k_block, k_first, boundary = _place(index, T, width, blocks, length, size, LOWER, False)
    if (q_first < tl.minimum(width, T - q_block * width)) & (k_first < width):
        count = size // BLOCK
        offs = tl.arange(0, GROUP)
        x, m, z = 0.0, tl.full((), LOWEST, tl.float32), 0.0
        b_sum = tl.zeros((BLOCK_D,), tl.float32)
        for first in range(0, count, GROUP):
            # a group of blocks
            b_block = first + offs
            b_inside = b_block < count
            b_at = side * total + index.to(tl.int64) * count + tl.where(side == 0, b_block, count - 1 - b_block)
            mask = b_inside[:, None] & (offs_d < D)[None, :]
            b_x = tl.load(x_ptr + b_at, mask=b_inside, other=0.0)
            b_m = tl.load(own_m_ptr + b_at, mask=b_inside, other=LOWEST)
            b_z = tl.load(own_z_ptr + b_at, mask=b_inside, other=0.0)
            b_e = tl.load(e_ptr + b_at[:, None] * D_STORED + offs_d[None, :], mask=mask, other=0.0)

            # what each block sees of the others of the group, and of the sum before it; one of no key has no coordinate
            b_before = (offs[:, None] >= offs[None, :]) & (b_m > LOWEST)[None, :]
            b_reach = tl.where(b_before, b_m[None, :] - tl.abs(b_x[:, None] - b_x[None, :]), float("-inf"))
            b_carried = tl.where(m > LOWEST, m - tl.abs(b_x - x), float("-inf"))
            b_highest = tl.maximum(tl.maximum(tl.max(b_reach, 1), b_carried), LOWEST)
            b_factor, b_carried = tl.exp(b_reach - b_highest[:, None]), tl.exp(b_carried - b_highest)

            # the sums
            b_z = tl.sum(b_factor * b_z[None, :], 1) + b_carried * z
            b_e = tl.dot(b_factor, b_e, b_carried[:, None] * b_sum[None, :], input_precision=PRECISION)
            tl.store(e_ptr + b_at[:, None] * D_STORED + offs_d[None, :], b_e, mask=mask)
            if tl.program_id(2) == 0:
                tl.store(m_ptr + b_at, b_highest, mask=b_inside)
                tl.store(z_ptr + b_at, b_z, mask=b_inside)

            # the last one is carried on
            b_last = offs == GROUP - 1
            x = tl.sum(tl.where(b_last, b_x, 0.0), 0)
            m = tl.sum(tl.where(b_last, b_highest, 0.0), 0)
            z = tl.sum(tl.where(b_last, b_z, 0.0), 0)
            b_sum = tl.sum(tl.where(b_last[:, None], b_e, 0.0), 0)


# ---- Triton kernels: the three passes ---------------------------------------


@jit
def _forward_kernel(
    order_ptr, coord_ptr, query_shift_ptr, key_shift_ptr, decay_ptr, doc_ptr, value_ptr, x_ptr, m_ptr, z_ptr, e_ptr,
    out_ptr, max_ptr, norm_ptr,
    value_b, value_t, value_h, heads, group, rows, total, T, width, blocks, length, size,
    D: tl.constexpr, D_STORED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    SEARCH: tl.constexpr, PRECISION: tl.constexpr, LOWER: tl.constexpr, DIAGONAL: tl.constexpr
):
    """
    Lets one tile of queries, sorted in their node, take in the keys of the neighbour; with DIAGONAL, in order, the keys
    of their own chunk.
    """
    (
        index, tile, row, boundary, absent, q_token, q_first, q_limit, in_queries, k_token, k_first, k_limit, in_keys
    ) = _begin(T, width, blocks, length, size, rows, BLOCK_T, LOWER, DIAGONAL)
    if absent:
        return
    count = size // BLOCK_S
    plane, in_row, b, h = tl.cast(rows, tl.int64) * T, row * T, row // heads, row % heads
    value_ptr += b * value_b + (h // group) * value_h
    if doc_ptr is not None:
        doc_ptr += b * T
    b_q, b_token, b_valid, b_doc, b_a, b_high, b_low = _targets(
        order_ptr, coord_ptr, query_shift_ptr, doc_ptr, in_queries, in_row, plane, q_first + tile * BLOCK_T, q_token,
        q_limit, boundary, BLOCK_T, DIAGONAL
    )

    # the blocks that it meets, and the rows of those below and above them
    if DIAGONAL:
        begin, end = _chunk_keys(tile, count, b_doc, b_valid, doc_ptr, k_token + k_first, BLOCK_T, BLOCK_S, LOWER)
        b_max, b_norm = tl.full((BLOCK_T,), LOWEST, tl.float32), tl.zeros((BLOCK_T,), tl.float32)
        b_out = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    else:
        lowest, highest = _range_of(b_a, b_valid)
        if lowest > highest:
            return
        at = index.to(tl.int64) * count
        _, begin, end, _ = _spans(x_ptr, at, total, count, lowest, highest, SEARCH)
        end = tl.maximum(begin, end)
        x_below, m_below, z_below, b_below = _load_sum(
            x_ptr, m_ptr, z_ptr, e_ptr, at + begin - 1, begin > 0, D, D_STORED, BLOCK_D
        )
        x_above, m_above, z_above, b_above = _load_sum(
            x_ptr, m_ptr, z_ptr, e_ptr, total + at + end, end < count, D, D_STORED, BLOCK_D
        )
        b_high = _from_boundary(b_high, b_low, decay_ptr, in_row + boundary, plane, True)
        b_from_below, b_from_above = m_below - (b_a - x_below) + b_high, m_above - (x_above - b_a) + b_high
        b_max = tl.maximum(tl.maximum(b_from_below, b_from_above), LOWEST)
        b_from_below, b_from_above = tl.exp(b_from_below - b_max), tl.exp(b_from_above - b_max)
        b_norm = b_from_below * z_below + b_from_above * z_above
        b_out = b_from_below[:, None] * b_below[None, :] + b_from_above[:, None] * b_above[None, :]

    # block by block
    for k in range(begin, end):
        b_key, b_seen, b_x, b_score = _scores(
            order_ptr, coord_ptr + plane, key_shift_ptr, decay_ptr, doc_ptr, in_keys, in_row, plane,
            k_first + k * BLOCK_S, k_token, k_limit, boundary, b_q, b_doc, b_a, b_high, b_low,
            BLOCK_S, LOWER, DIAGONAL, False
        )
        b_higher = tl.maximum(b_max, tl.max(b_score, 1))
        b_scale = tl.exp(b_max - b_higher)
        b_v = _load_rows(value_ptr, b_key.to(tl.int64) * value_t, b_seen, D, BLOCK_D)
        b_p = tl.exp(b_score - b_higher[:, None]).to(b_v.dtype)  # as the product has them: out is a mean of values
        b_norm = b_norm * b_scale + tl.sum(b_p.to(tl.float32), 1)
        b_out = tl.dot(b_p, b_v, b_out * b_scale[:, None], input_precision=PRECISION)
        b_max = b_higher

    # with what earlier launches have found
    b_rows = ((b * T + b_token) * heads + h) * D
    if not (DIAGONAL and LOWER):
        b_old_max = tl.load(max_ptr + in_row + b_token, mask=b_valid, other=LOWEST)
        b_old_norm = tl.load(norm_ptr + in_row + b_token, mask=b_valid, other=0.0)
        b_higher = tl.maximum(b_max, b_old_max)
        b_scale, b_old = tl.exp(b_max - b_higher), tl.exp(b_old_max - b_higher) * b_old_norm
        b_norm = b_norm * b_scale + b_old
        b_max = b_higher
        b_old_out = _load_rows(out_ptr, b_rows, b_valid, D, BLOCK_D)
        b_out = b_out * b_scale[:, None] + b_old_out * b_old[:, None]
    tl.store(max_ptr + in_row + b_token, b_max, mask=b_valid)
    tl.store(norm_ptr + in_row + b_token, b_norm, mask=b_valid)
    _store_rows(out_ptr, b_rows, b_out / tl.where(b_norm > 0, b_norm, 1.0)[:, None], b_valid, D, BLOCK_D)


@jit
def _upstream_kernel(
    grad_ptr, out_ptr, rows_ptr, column_ptr, grad_b, grad_t, grad_h, heads, T, count,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Makes dOut in the values' dtype (B, T, H, D), and -dOut.out (B, H, T)."""
    b_index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = b_index < count
    b_h, b_t, b_b = b_index % heads, b_index // heads % T, b_index // heads // T
    b_grad = _load_rows(grad_ptr, b_b * grad_b + b_t * grad_t + b_h * grad_h, mask, D, BLOCK_D)
    b_grad = b_grad.to(rows_ptr.dtype.element_ty)
    _store_rows(rows_ptr, b_index * D, b_grad, mask, D, BLOCK_D)
    b_product = b_grad.to(tl.float32) * _load_rows(out_ptr, b_index * D, mask, D, BLOCK_D)
    tl.store(column_ptr + (b_b * heads + b_h) * T + b_t, -tl.sum(b_product, 1), mask=mask)


@jit
def _query_grads_kernel(
    order_ptr, coord_ptr, query_shift_ptr, key_shift_ptr, decay_ptr, doc_ptr, value_ptr, x_ptr, m_ptr, z_ptr, e_ptr,
    upstream_ptr, column_ptr, dquery_ptr,
    value_b, value_t, value_h, heads, group, rows, total, T, width, blocks, length, size,
    D: tl.constexpr, D_STORED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    SEARCH: tl.constexpr, PRECISION: tl.constexpr, LOWER: tl.constexpr, DIAGONAL: tl.constexpr
):
    """
    Makes da of one tile of queries, as in _forward_kernel; query_shift has F - M - log Z.
    da_i = -sum_j sgn(a_i - b_j) E_ij.
    """
    (
        index, tile, row, boundary, absent, q_token, q_first, q_limit, in_queries, k_token, k_first, k_limit, in_keys
    ) = _begin(T, width, blocks, length, size, rows, BLOCK_T, LOWER, DIAGONAL)
    if absent:
        return
    count = size // BLOCK_S
    plane, in_row, b, h = tl.cast(rows, tl.int64) * T, row * T, row // heads, row % heads
    value_ptr += b * value_b + (h // group) * value_h
    if doc_ptr is not None:
        doc_ptr += b * T
    b_q, b_token, b_valid, b_doc, b_a, b_high, b_low = _targets(
        order_ptr, coord_ptr, query_shift_ptr, doc_ptr, in_queries, in_row, plane, q_first + tile * BLOCK_T, q_token,
        q_limit, boundary, BLOCK_T, DIAGONAL
    )
    b_column = tl.load(column_ptr + in_row + b_token, mask=b_valid, other=0.0)
    b_u = _load_rows(upstream_ptr, ((b * T + b_token) * heads + h) * D, b_valid, D, BLOCK_D)
    b_signed = tl.zeros((BLOCK_T,), tl.float32)

    # the blocks that it meets, and what those below and above them give
    if DIAGONAL:
        begin, end = _chunk_keys(tile, count, b_doc, b_valid, doc_ptr, k_token + k_first, BLOCK_T, BLOCK_S, LOWER)
        equal_from, equal = 0, 0
    else:
        lowest, highest = _range_of(b_a, b_valid)
        if lowest > highest:
            return
        at = index.to(tl.int64) * count
        begin, equal_to, equal_from, end = _spans(x_ptr, at, total, count, lowest, highest, SEARCH)
        equal = tl.where(lowest == highest, tl.maximum(equal_to - equal_from, 0), 0)
        x_below, m_below, z_below, b_below = _load_sum(
            x_ptr, m_ptr, z_ptr, e_ptr, at + begin - 1, begin > 0, D, D_STORED, BLOCK_D
        )
        x_above, m_above, z_above, b_above = _load_sum(
            x_ptr, m_ptr, z_ptr, e_ptr, total + at + end, end < count, D, D_STORED, BLOCK_D
        )
        b_high = _from_boundary(b_high, b_low, decay_ptr, in_row + boundary, plane, True)
        b_wide = b_u.to(tl.float32)
        b_factor = tl.exp(m_below - (b_a - x_below) + b_high)
        b_signed += b_factor * (tl.sum(b_wide * b_below[None, :], 1) + b_column * z_below)
        b_factor = tl.exp(m_above - (x_above - b_a) + b_high)
        b_signed -= b_factor * (tl.sum(b_wide * b_above[None, :], 1) + b_column * z_above)

    # block by block, but for those that equal all targets
    for i in range(begin, end - equal):
        k = i + tl.where(i >= equal_from, equal, 0)
        b_key, b_seen, b_x, b_score = _scores(
            order_ptr, coord_ptr + plane, key_shift_ptr, decay_ptr, doc_ptr, in_keys, in_row, plane,
            k_first + k * BLOCK_S, k_token, k_limit, boundary, b_q, b_doc, b_a, b_high, b_low,
            BLOCK_S, LOWER, DIAGONAL, False
        )
        b_v = _load_rows(value_ptr, b_key.to(tl.int64) * value_t, b_seen, D, BLOCK_D)
        b_e = tl.exp(b_score) * (tl.dot(b_u, tl.trans(b_v), input_precision=PRECISION) + b_column[:, None])
        b_above_key, b_below_key = b_a[:, None] > b_x[None, :], b_a[:, None] < b_x[None, :]
        b_signed += tl.sum(tl.where(b_above_key, b_e, tl.where(b_below_key, -b_e, 0.0)), 1)

    # with what earlier launches have found
    if not (DIAGONAL and LOWER):
        b_signed -= tl.load(dquery_ptr + in_row + b_token, mask=b_valid, other=0.0)
    tl.store(dquery_ptr + in_row + b_token, -b_signed, mask=b_valid)


@jit
def _key_grads_kernel(
    order_ptr, coord_ptr, query_shift_ptr, key_shift_ptr, decay_ptr, doc_ptr, value_ptr, x_ptr, m_ptr, z_ptr, e_ptr,
    upstream_ptr, column_ptr, dvalue_ptr, dkey_ptr, dbias_ptr,
    value_b, value_t, value_h, heads, group, rows, total, T, width, blocks, length, size,
    D: tl.constexpr, D_STORED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    SEARCH: tl.constexpr, PRECISION: tl.constexpr, LOWER: tl.constexpr, DIAGONAL: tl.constexpr
):
    """
    Makes dv, db and dc of one tile of keys, from the queries of the neighbour or of the chunk:
    db_j = sum_i sgn(a_i - b_j) E_ij, dc_j = sum_i E_ij.
    """
    (
        index, tile, row, boundary, absent, q_token, q_first, q_limit, in_queries, k_token, k_first, k_limit, in_keys
    ) = _begin(T, width, blocks, length, size, rows, BLOCK_T, LOWER, DIAGONAL)
    if absent:
        return
    count = size // BLOCK_S
    plane, in_row, b, h = tl.cast(rows, tl.int64) * T, row * T, row // heads, row % heads
    upstream_ptr += (b * T * heads + h) * D
    if doc_ptr is not None:
        doc_ptr += b * T
    b_k, b_token, b_valid, b_doc, b_x, b_high, b_low = _targets(
        order_ptr, coord_ptr + plane, key_shift_ptr, doc_ptr, in_keys, in_row, plane, k_first + tile * BLOCK_T, k_token,
        k_limit, boundary, BLOCK_T, DIAGONAL
    )
    value_ptr += b * value_b + (h // group) * value_h
    b_v = _load_rows(value_ptr, b_token.to(tl.int64) * value_t, b_valid, D, BLOCK_D)

    # the blocks that it meets, and what those below and above them give
    if DIAGONAL:
        begin = tile * BLOCK_T // BLOCK_S if LOWER else 0
        end = count if LOWER else tl.cdiv((tile + 1) * BLOCK_T, BLOCK_S)
        equal_from, equal_to, equal = 0, 0, 0
        b_dvalue = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        b_dkey, b_dbias = tl.zeros((BLOCK_T,), tl.float32), tl.zeros((BLOCK_T,), tl.float32)
    else:
        lowest, highest = _range_of(b_x, b_valid)
        if lowest > highest:
            return
        at = index.to(tl.int64) * count
        begin, equal_to, equal_from, end = _spans(x_ptr, at, total, count, lowest, highest, SEARCH)
        equal = tl.where(lowest == highest, tl.maximum(equal_to - equal_from, 0), 0)
        b_high, b_wide = _from_boundary(b_high, b_low, decay_ptr, in_row + boundary, plane, False), b_v.to(tl.float32)

        # below, for db
        x, m, z, b_row = _load_sum(x_ptr, m_ptr, z_ptr, e_ptr, at + begin - 1, begin > 0, D, D_STORED, BLOCK_D)
        b_dkey = -tl.exp(m - (b_x - x) + b_high) * (tl.sum(b_wide * b_row[None, :], 1) + z)

        # below or equal, for dv and dc
        upto = tl.where(equal > 0, equal_to, begin)
        x, m, z, b_row = _load_sum(x_ptr, m_ptr, z_ptr, e_ptr, at + upto - 1, upto > 0, D, D_STORED, BLOCK_D)
        b_factor = tl.exp(m - (b_x - x) + b_high)
        b_dvalue = b_factor[:, None] * b_row[None, :]
        b_dbias = b_factor * (tl.sum(b_wide * b_row[None, :], 1) + z)

        # above
        x, m, z, b_row = _load_sum(x_ptr, m_ptr, z_ptr, e_ptr, total + at + end, end < count, D, D_STORED, BLOCK_D)
        b_factor = tl.exp(m - (x - b_x) + b_high)
        b_dvalue += b_factor[:, None] * b_row[None, :]
        b_above = b_factor * (tl.sum(b_wide * b_row[None, :], 1) + z)
        b_dkey += b_above
        b_dbias += b_above

    # block by block, but for those that equal all targets
    for i in range(begin, end - equal):
        k = i + tl.where(i >= equal_from, equal, 0)
        b_query, b_seen, b_a, b_score = _scores(
            order_ptr, coord_ptr, query_shift_ptr, decay_ptr, doc_ptr, in_queries, in_row, plane,
            q_first + k * BLOCK_S, q_token, q_limit, boundary, b_k, b_doc, b_x, b_high, b_low,
            BLOCK_S, LOWER, DIAGONAL, True
        )
        b_column = tl.load(column_ptr + in_row + b_query, mask=b_seen, other=0.0)
        b_u = _load_rows(upstream_ptr, b_query.to(tl.int64) * heads * D, b_seen, D, BLOCK_D)
        b_p = tl.exp(b_score)
        b_e = b_p * (tl.dot(b_v, tl.trans(b_u), input_precision=PRECISION) + b_column[None, :])
        b_above_key, b_below_key = b_a[None, :] > b_x[:, None], b_a[None, :] < b_x[:, None]
        b_dkey += tl.sum(tl.where(b_above_key, b_e, tl.where(b_below_key, -b_e, 0.0)), 1)
        counted = tl.where((equal > 0) & (k < equal_to), 0.0, 1.0)  # else the sum up to the equal blocks has it
        b_dbias += tl.sum(b_e, 1) * counted
        b_dvalue = tl.dot((b_p * counted).to(b_u.dtype), b_u, b_dvalue, input_precision=PRECISION)

    # with what earlier launches have found
    b_rows = ((b * T + b_token) * heads + h) * D
    if not (DIAGONAL and LOWER):
        b_dvalue += _load_rows(dvalue_ptr, b_rows, b_valid, D, BLOCK_D)
        b_dkey += tl.load(dkey_ptr + in_row + b_token, mask=b_valid, other=0.0)
    _store_rows(dvalue_ptr, b_rows, b_dvalue, b_valid, D, BLOCK_D)
    tl.store(dkey_ptr + in_row + b_token, b_dkey, mask=b_valid)
    if dbias_ptr is not None:
        if not (DIAGONAL and LOWER):
            b_dbias += tl.load(dbias_ptr + in_row + b_token, mask=b_valid, other=0.0)
        tl.store(dbias_ptr + in_row + b_token, b_dbias, mask=b_valid)


# ---- Host functions ---------------------------------------------------------

# By bytes of an element of the values: tokens of a chunk (a power of two), targets and sources of a tile, blocks that
# _carry_kernel sums as a tile, and its warps. Not measured.
LAUNCH = {
    2: dict(chunk=512, tile=64, block=32, carry=64, carry_warps=8),
    4: dict(chunk=256, tile=32, block=32, carry=32, carry_warps=4),
}
SEARCH = 256            # ends of blocks that are compared at a time
UPSTREAM = 32           # tokens times heads of a program of _upstream_kernel


class _Work(NamedTuple):
    """What the launches of a pass share."""
    coordinates: Tensor         # (2, B H, T) float32: of queries, of keys
    decay: Tensor | None        # (2, B H, T) float32: F in its document, high and low part
    key_shift: Tensor | None    # (2, B H, T) float32: c - F, likewise
    doc: Tensor | None          # (B, T) int32
    width: int
    blocks: int
    length: int                 # chunk 2^L
    launch: dict

    @property
    def rows(self) -> int:
        """B H"""
        return self.coordinates.shape[1]

    @property
    def T(self) -> int:
        return self.coordinates.shape[2]


def _split(x: Tensor) -> Tensor:
    """Returns float64 (B, H, T) as (2, B H, T) float32: high and low part."""
    x = x.flatten(0, 1)
    high = x.float()
    return torch.stack((high, (x - high.double()).float()))


def _decay_sums(log_decay: Tensor, doc: Tensor | None) -> Tensor:
    """
    Returns F (B, H, T) float64, each document's from its own start: differences of integers, which have no rounding and
    so nothing of other documents.

    The integer part of g and 2^-42 of the rest are summed apart; 2^20 tokens fit. The error is at most T 2^-43.
    """
    g = log_decay.transpose(1, 2).double().clamp(min=-1e9)
    integer = g.floor()
    sums = [x.to(torch.int64).cumsum(-1) for x in (integer, ((g - integer) * 2.0 ** 42).round_())]
    if doc is not None:
        before = doc.long()[:, None].expand_as(g) - 1
        sums = [x - x.gather(-1, before.clamp(min=0)).masked_fill_(before < 0, 0) for x in sums]
    return sums[0].double() + sums[1].double() * 2.0 ** -42


def _work(x: Arguments) -> _Work:
    """Returns what the launches of a pass need of the arguments."""
    B, T, kv_heads, _ = x.value.shape
    heads = x.heads

    def by_head(of_keys: Tensor) -> Tensor:
        """(B, T, Hkv) -> (B, H, T)"""
        return of_keys.transpose(1, 2).repeat_interleave(heads // kv_heads, 1)

    # coordinates
    coordinates = x.value.new_zeros(2, B, heads, T, dtype=torch.float32)
    if x.query_coord is not None:
        coordinates[0] = x.query_coord.transpose(1, 2)
        coordinates[1] = by_head(x.key_coord)
        coordinates += 0.0  # -0.0 becomes 0.0, which it must not come before

    # F, and c - F
    doc = None if x.doc_start is None else x.doc_start.to(torch.int32).contiguous()
    decay = None if x.log_decay is None else _decay_sums(x.log_decay, doc)
    terms = []
    if x.key_bias is not None:
        terms.append(by_head(x.key_bias).double().clamp(min=-1e30))
    if decay is not None:
        terms.append(-decay)

    # the nodes
    launch = LAUNCH[x.value.element_size()]
    chunk = launch["chunk"]
    width = min(x.window or T, T)
    return _Work(
        coordinates=coordinates.flatten(1, 2),
        decay=None if decay is None else _split(decay),
        key_shift=_split(sum(terms)) if terms else None,
        doc=doc,
        width=width,
        blocks=-(-T // width),
        length=chunk << (-(-width // chunk) - 1).bit_length(),
        launch=launch,
    )


def _sorted(work: _Work) -> Tensor:
    """
    Returns (2, B H, blocks, length) int32: the positions of each block by document, coordinate and position; empty ones
    come last.
    """
    rows, T, width, blocks, length = work.rows, work.T, work.width, work.blocks, work.length

    # integers in the order of the coordinates, below those the documents
    bits = work.coordinates.view(torch.int32)
    keys = (bits ^ (bits >> 31).bitwise_and_(0x7FFFFFFF)).to(torch.int64) + 2 ** 31
    if work.doc is not None:
        first = torch.arange(T, device=bits.device, dtype=torch.int32) // width * width
        in_block = (work.doc - first).clamp_(min=0).long() << 32
        keys = keys.view(2, len(work.doc), -1, T).add_(in_block[:, None]).view(2, rows, T)

    # all blocks are sorted at once
    keys = F.pad(keys, (0, blocks * width - T), value=length << 32).unflatten(-1, (blocks, width))
    keys = F.pad(keys, (0, length - width), value=length << 32).flatten(0, 2)
    keys += torch.arange(len(keys), device=bits.device)[:, None] * ((length + 1) << 32)
    return (keys.flatten().sort(stable=True).indices % length).to(torch.int32).view(2, rows, blocks, length)


def _levels(work: _Work):
    """Yields (node size, order) from the largest nodes down."""
    chunk = work.launch["chunk"]
    size = work.length
    if size == chunk:
        return
    order = _sorted(work)
    while size > chunk:
        size //= 2
        lefts = ((order.flatten() & size) == 0).cumsum(0, dtype=torch.int32)
        halves = torch.empty_like(order)
        _partition_kernel[(order.numel() // chunk,)](order, lefts, halves, size, BLOCK=chunk)
        order = halves
        yield size, order


class _Sums(NamedTuple):
    """The ends of blocks of one level, (2, blocks of all nodes): upwards, downwards."""
    x: Tensor
    own_m: Tensor
    own_z: Tensor
    m: Tensor
    z: Tensor
    e: Tensor                   # (2, blocks, D rounded up)


def _empty_sums(work: _Work, D: int) -> _Sums:
    total = work.rows * work.blocks * work.length // 2 // work.launch["block"]
    thin = work.coordinates.new_empty(5, 2, total)
    return _Sums(*thin, thin.new_empty(2, total, -(-D // 4) * 4))


def _warps(D: int) -> int:
    """Returns the warps of a kernel with a sum of D columns for each target: what compiles without spills."""
    return 8 if D > 32 else 4


def _constants(D: int, dtype: torch.dtype) -> dict:
    precision = "tf32x3" if dtype == torch.float32 else "tf32"
    return dict(D=D, D_STORED=-(-D // 4) * 4, BLOCK_D=max(16, triton.next_power_of_2(D)), PRECISION=precision)


def _launches(work: _Work, size: int, tile: int, diagonal: bool) -> list[tuple[bool, int]]:
    """
    Returns (LOWER, programs of one a tile) of the triangles: of each block of the window, and of its queries and the
    keys of the block before.
    """
    nodes = work.length // size if diagonal else work.length // size // 2
    programs = work.rows * nodes * (size // tile)
    launches = [(True, programs * work.blocks), (False, programs * (work.blocks - 1))]
    return launches if work.blocks > 1 else launches[:1]


def _sum_blocks(
    work: _Work, sums: _Sums, order: Tensor, size: int, lower: bool, queries: bool, rows: Tensor, column: Tensor | None,
    shift: Tensor | None, heads: int, group: int, constants: dict
):
    """
    Makes the running sums over the blocks of a level's sources: keys, or with `queries` queries. Their rows are
    (B, T, heads / group, D), their column is (B H, T).
    """
    # the sums of each block
    launch, D = work.launch, constants["D"]
    shared = dict(D=D, D_STORED=constants["D_STORED"], BLOCK=launch["block"], LOWER=lower)
    sizes = sums.x.shape[1], work.T, work.width, work.blocks, work.length, size
    programs = dict(_launches(work, size, launch["block"], False))[lower]
    _ends_kernel[(programs,)](
        order, work.coordinates[0 if queries else 1], shift, work.decay, work.doc, rows, column,
        sums.x, sums.own_m, sums.own_z, sums.e, *rows.stride()[:3], heads, group, work.rows, *sizes,
        **shared, BLOCK_D=constants["BLOCK_D"], QUERIES=queries, num_warps=4
    )

    # over the blocks
    block_d = min(64, constants["BLOCK_D"])
    _carry_kernel[(programs * launch["block"] // size, 2, -(-D // block_d))](
        sums.x, sums.own_m, sums.own_z, sums.m, sums.z, sums.e, *sizes,
        **shared, BLOCK_D=block_d, GROUP=launch["carry"], PRECISION=constants["PRECISION"],
        num_warps=launch["carry_warps"], num_stages=2
    )


def serves(x: Arguments) -> bool:
    """
    Tells whether loglinear_forward and loglinear_backward take these arguments: on a GPU, no float64, rows of values of
    at most 512 bytes. Rows of more than 256 bytes compile with spills.
    """
    if triton is None or not x.value.is_cuda or x.dtype == torch.float64:
        return False
    return x.value.shape[-1] * x.value.element_size() <= 512


class _Pass:
    """Launches the kernels of a pass over queries or keys, level by level."""

    def __init__(self, x: Arguments):
        _, _, kv_heads, D = x.value.shape
        self.work = _work(x)
        self.heads = x.heads
        self.group = x.heads // kv_heads
        self.value = x.value if x.value.stride(-1) == 1 else x.value.contiguous()
        self.constants = _constants(D, x.value.dtype)
        self.sums = _empty_sums(self.work, D)

    def sum_keys(self, order: Tensor, size: int, lower: bool):
        """Makes the running sums of a level's keys."""
        _sum_blocks(
            self.work, self.sums, order, size, lower, False, self.value, None, self.work.key_shift,
            self.heads, self.group, self.constants
        )

    def run(
        self, kernel, query_shift: Tensor | None, others: tuple, warps: int, order: Tensor | None, size: int,
        lower: bool, programs: int
    ):
        """Launches one of the three kernels of a pass; without an order on chunks."""
        work, sums, launch = self.work, self.sums, self.work.launch
        kernel[(programs,)](
            order, work.coordinates, query_shift, work.key_shift, work.decay, work.doc, self.value,
            sums.x, sums.m, sums.z, sums.e, *others, *self.value.stride()[:3], self.heads, self.group, work.rows,
            sums.x.shape[1], work.T, work.width, work.blocks, work.length, size,
            **self.constants, BLOCK_T=launch["tile"], BLOCK_S=launch["block"], SEARCH=SEARCH,
            LOWER=lower, DIAGONAL=order is None, num_warps=warps, num_stages=2
        )


def loglinear_forward(x: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out (B, T, H, D) and Z (B, H, T) in float32, and M (B, H, T) in float64, as loglinear's _forward does."""
    B, T, _, D = x.value.shape
    launches = _Pass(x)
    work = launches.work
    out = x.value.new_empty(B, T, x.heads, D, dtype=torch.float32)
    row_max, normalizer = out.new_empty(2, B, x.heads, T)
    chunk, tile = work.launch["chunk"], work.launch["tile"]

    def run(order: Tensor | None, size: int, lower: bool, programs: int):
        launches.run(
            _forward_kernel, work.decay, (out, row_max, normalizer), _warps(D), order, size, lower, programs
        )

    with torch.cuda.device_of(x.value):
        for lower, programs in _launches(work, chunk, tile, True):
            run(None, chunk, lower, programs)
        for size, order in _levels(work):
            for lower, programs in _launches(work, size, tile, False):
                launches.sum_keys(order, size, lower)
                run(order, size, lower, programs)
    return out, row_max.double(), normalizer


def loglinear_backward(
    grad_out: Tensor, x: Arguments, out: Tensor, row_max: Tensor, normalizer: Tensor
) -> list[Tensor]:
    """Returns the gradients of the floating arguments, of those that are not None, as loglinear's _backward does."""
    B, T, heads, D = out.shape
    launches = _Pass(x)
    work, constants = launches.work, launches.constants
    chunk, tile = work.launch["chunk"], work.launch["tile"]

    # what the kernels read: dOut, -dOut.out, F - M - log Z
    grad = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
    upstream = x.value.new_empty(B, T, heads, D)
    column = out.new_empty(B, heads, T)
    shift = -row_max - normalizer.double().log()
    if work.decay is not None:
        shift += work.decay.double().sum(0).view(shift.shape)
    query_shift = _split(shift)

    # what they make, for each query head
    dvalue = torch.empty_like(out)
    dquery, dkey = out.new_empty(2, B, heads, T)
    dbias = None if x.log_decay is None and x.key_bias is None else torch.empty_like(dkey)

    def run_queries(*where):
        launches.run(_query_grads_kernel, query_shift, (upstream, column, dquery), 4, *where)

    def run_keys(*where):
        results = (upstream, column, dvalue, dkey, dbias)
        launches.run(_key_grads_kernel, query_shift, results, _warps(D), *where)

    with torch.cuda.device_of(x.value):
        count = B * T * heads
        _upstream_kernel[(-(-count // UPSTREAM),)](
            grad, out, upstream, column, *grad.stride()[:3], heads, T, count,
            D=D, BLOCK=UPSTREAM, BLOCK_D=constants["BLOCK_D"], num_warps=4
        )
        for lower, programs in _launches(work, chunk, tile, True):
            run_queries(None, chunk, lower, programs)
            run_keys(None, chunk, lower, programs)
        for size, order in _levels(work):
            for lower, programs in _launches(work, size, tile, False):
                launches.sum_keys(order, size, lower)
                run_queries(order, size, lower, programs)
                _sum_blocks(
                    work, launches.sums, order, size, lower, True, upstream, column, query_shift, heads, 1, constants
                )
                run_keys(order, size, lower, programs)
    return _gradients(x, dquery, dkey, dvalue, dbias)


def _gradients(x: Arguments, dquery: Tensor, dkey: Tensor, dvalue: Tensor, dbias: Tensor | None) -> list[Tensor]:
    """Returns loglinear_backward's result from (B, H, T), or for dvalue (B, T, H, D), of each query head."""
    _, T, kv_heads, _ = x.value.shape

    def of_keys(of_heads: Tensor) -> Tensor:
        """(B, H, T) -> (B, T, Hkv)"""
        return of_heads.unflatten(1, (kv_heads, -1)).sum(2).transpose(1, 2)

    # coordinates and values
    gradients = []
    if x.query_coord is not None:
        gradients.append((x.query_coord, dquery.transpose(1, 2)))
    if x.key_coord is not None:
        gradients.append((x.key_coord, of_keys(dkey)))
    grouped = x.heads > kv_heads
    gradients.append((x.value, dvalue.unflatten(2, (kv_heads, -1)).sum(3) if grouped else dvalue))

    # dg_t = -sum over the document's j >= t of dc_j; no score contains the decay of a document's first token
    if x.log_decay is not None:
        if x.doc_start is None:
            after = -running(torch.add, dbias.double(), None, backward=True)
            first = torch.zeros(1, dtype=torch.int64, device=after.device)
            after = after.index_fill_(-1, first, 0)
        else:
            starts = (x.doc_start == torch.arange(T, device=dbias.device))[:, None]
            after = -running(torch.add, dbias.double(), starts, backward=True)
            after = after.masked_fill_(starts, 0)
        gradients.append((x.log_decay, after.transpose(1, 2)))
    if x.key_bias is not None:
        gradients.append((x.key_bias, of_keys(dbias)))
    return [gradient.to(t.dtype, memory_format=torch.contiguous_format) for t, gradient in gradients]
