"""
Topological attention, backend "loglinear" on a CPU: the exact O(T log T) sums of loglinear.py as
compiled loops, without a large tensor.

A row is one head of one sequence. Its tokens lie in chunks of CHUNK; pairs inside a chunk are a dense tile of scores.
Then come nodes of s = CHUNK, 2 CHUNK, ... tokens: the keys of the left node of each pair act on the queries of the
right one. A node has one list of its keys and its queries, sorted by coordinate, where a key comes before the queries
that equal it. The lists of two nodes are merged, and one walk through the result gives the sources (left keys) in
order and, for every target (right query), its rank r: the number of sources at or below it. With the potentials
p_j = b_j + G_j and q_j = -b_j + G_j of the sources, where G_j = c_j - F_j,
    U_r = sum over the first r sources of 2^(p_j - y_r) [v_j, 1]       y_r their largest p
    V_r = sum over the others of 2^(q_j - z_r) [v_j, 1]                z_r their largest q
are tables of rows of D + 1 numbers. Each row is made from its neighbour, and a target reads one row of both tables:
    2^(y_r - a_i + F_i) U_r + 2^(z_r + a_i + F_i) V_r
Sources go through in blocks whose tables stay in the second-level cache. Where there are several blocks, one walk down
all sources first gives the V that each block begins with.

Every exponent is a difference of float64 numbers. It is at most 0, because sums are scaled by their largest term so
far. Inside this file coordinates, decays and biases are multiplied by log2(e). The caller pads rows to a multiple
of 8 numbers.

Backward, with P_ij = 2^(s_ij - L_i), L_i = M_i + log2 Z_i, u_i = dOut_i, delta_i = u_i . out_i and
E_ij = P_ij (u_i . v_j - delta_i):
    da_i = sum over b_j > a_i of E_ij - sum over b_j < a_i of E_ij     from V and U of [v_j, 1]
    db_j = sum over a_i > b_j of E_ij - sum over a_i < b_j of E_ij     from V and U of [u_i, delta_i]
    dv_j = sum_i P_ij u_i                                              from the same tables
    dc_j = sum_i E_ij                                                  from the same tables
For keys, targets and sources are exchanged. Both tables are read, and equal coordinates are on neither side: where a
node has such pairs, each table is read with its own ranks, and what the pairs give to dv and dc is summed by itself.
So a distance of 0 has exactly no derivative.

Work: a level costs a token of a row 2 (D + 1) multiply-adds forward and 5 (D + 1) backward, 2 steps of a merge, and
forward about 4 exponentials, which are computed in vectors.

Tasks: a short row goes through all its steps in one task, if it is at most SUBTREE tokens long, or at most TASK_ROW
where there are rows enough for all threads. Longer rows go step by step, some rows at a time, and the threads share
each step; loops.run_stages runs the tasks. Where a sequence has several heads, a row's numbers are packed: they are
copied to an array where they lie one after another. Results are equal bit for bit whatever the number of threads.

Numbers that are not finite give NaN where the reference gives NaN, but for a NaN among the values of a key that weighs
less than NEGLIGIBLE: such rows are not read. Inside a tile 0 times NaN is NaN, as in the reference.

Memory: about 100 bytes for each token of the rows that are worked on at once (GROUP_TOKENS tokens, or one longer row,
or a short row a thread), the packed rows, and tables for each thread.

Source: the algorithm is ours; merging sorted halves is merge sort's; rows kept with the exponent of their maximum are
Milakov and Gimelshein's, arxiv.org/abs/1805.02867
"""

import functools
from typing import NamedTuple

import numpy as np

from kernels.loops import called_loop, inner_loop, loop, run_stages, thread_count
from kernels.simd import cast, distance, exp2, largest, load, madd, select, splat, store, total
from kernels.topological_attention.reference import CHUNK, LOG2_E, LOWEST

SUBTREE_LEVELS = 4
SUBTREE = CHUNK << SUBTREE_LEVELS   # tokens that one thread takes through their levels: they stay in its cache
TASK_ROW = 2048        # tokens of the longest row that one thread takes by itself where there are rows enough
GROUP_TOKENS = 1 << 13  # tokens of the rows that are worked on at once, unless one row has more
TABLE = 1 << 14         # numbers of a table of rows
NEGLIGIBLE = 2.0 ** -80     # a weight below which a target does not read a row

POSITION = (1 << 30) - 1    # of an item in a list: code << 32 | is_query << 30 | position

# what targets read
FORWARD = 0
QUERY_GRADIENT = 1
KEY_GRADIENT = 2

# from which tables they read it: U, V or both
UP = 1
DOWN = 2
BOTH = 3

# The kinds of steps. The upper triangles of a window come after all its lower ones, because they make gradients of
# another block's keys.
SUM_DECAYS, BEGIN, END, DECAY_GRADIENTS, LOWER, UPPER, SCAN, SCAN_UPPER, LEVEL = range(9)
_lanes = np.arange(8)
# of [key, query]: 1 where the query is at or after the key, and then 1 where it is before the key
TRIANGLES = np.stack((_lanes >= _lanes[:, None], _lanes < _lanes[:, None])).astype(np.float64).ravel()


class Matrix(NamedTuple):
    """Rows of D numbers: row i begins at data[base + i step]."""
    data: np.ndarray
    base: int
    step: int


class Side(NamedTuple):
    """The keys or the queries of a row. Arrays are indexed by position."""
    coordinate: np.ndarray      # float64
    bias: np.ndarray            # float64: what a source adds to its potential, a target to its scores
    unit: np.ndarray            # the number beside the D of each row: 1 of keys, delta of queries
    rows: Matrix                # v of keys, u of queries


class Sums(NamedTuple):
    """The sums that a pass makes for a row. Arrays are indexed by position."""
    highest: np.ndarray         # float64: M, the largest score so far; backward unused
    normalizer: np.ndarray      # Z so far; backward da
    key_gradient: np.ndarray    # db
    bias_gradient: np.ndarray   # dc
    rows: Matrix                # out; backward dv


class Work(NamedTuple):
    """A thread's own arrays. A block is a number of sources whose tables are made at one time."""
    source: np.ndarray          # (T + 8) int32: positions of sources in order
    target: np.ndarray          # (T + 8) int32: positions of targets in order
    rank: np.ndarray            # (T + 8) int32: of targets
    back: np.ndarray            # (T + 8) int32: of sources, how many targets come before them
    thin: np.ndarray            # (7, block + 16) float64: potentials and exponents
    factors: np.ndarray         # (4, block + 16): what rows are multiplied by
    table: np.ndarray           # (2, (block + 1) (D + 1)): U and V
    carried: np.ndarray         # ((blocks + 1) (D + 1)): V at the ends of blocks
    carried_potential: np.ndarray   # (blocks + 1) float64
    chunk: np.ndarray           # (5, CHUNK) float64, of a chunk's queries: coordinate, bias, document, M; one unused
    chunk_sums: np.ndarray      # (3, CHUNK), of a chunk's queries: Z or da, what is kept of the rows, delta
    tile: np.ndarray            # (CHUNK CHUNK): weights of [key, query]
    triangles: np.ndarray       # (2, 8, 8) float64, flat: TRIANGLES
    columns: np.ndarray         # (D CHUNK): u of a chunk's queries by columns


# ---- Rows of D numbers ------------------------------------------------------


@inner_loop
def _mix(y, i, keep, x, j, add, D):
    """y_i = keep y_i + add x_j, where a row is D numbers that begin at index i or j."""
    keep_all, add_all = splat(keep), splat(add)
    for d in range(0, D, 8):
        store(y, i + d, madd(keep_all, load(y, i + d), add_all * load(x, j + d)))


@inner_loop
def _next_row(table, to, by, keep, x, j, add, D):
    """table_to = keep table_by + add x_j, where a row is D numbers that begin at that index."""
    keep_all, add_all = splat(keep), splat(add)
    for d in range(0, D, 8):
        store(table, to + d, madd(keep_all, load(table, by + d), add_all * load(x, j + d)))


@inner_loop
def _copy(y, i, x, j, count):
    """Copies x[j:j + count] to y[i:i + count]. Numba takes seconds to compile an assignment of slices."""
    for k in range(count):
        y[i + k] = x[j + k]


@inner_loop
def _copy_row(y, i, x, j, D):
    """Copies the D numbers of x from j on to y from i on."""
    for d in range(0, D, 8):
        store(y, i + d, load(x, j + d))


@inner_loop
def _dot(x, i, y, j, D):
    """Returns the dot product of D numbers of x from i on and D numbers of y from j on."""
    sums = load(x, i) * load(y, j)
    for d in range(8, D, 8):
        sums = madd(load(x, i + d), load(y, j + d), sums)
    return total(sums)


@inner_loop
def _add_products(to, r, count, keep, weights, at, to_step, by_step, by, first, last, D):
    """
    Makes `count` rows of `to`, at most 4, from row r on. Row r + k becomes
        keep_k to_(r + k) + sum over x = first .. last - 1 of weights[at + k to_step + (x - first) by_step] by_x
    or the sum alone where keep is None. Four sums at a time stay in registers, so weights must be there for all four.
    """
    for d in range(0, D, 8):
        # the sums of 8 columns
        y0 = splat(weights.dtype.type(0))
        y1 = y0
        y2 = y0
        y3 = y0
        w = at
        for x in range(first, last):
            row = load(by.data, by.base + x * by.step + d)
            y0 = madd(splat(weights[w]), row, y0)
            y1 = madd(splat(weights[w + to_step]), row, y1)
            y2 = madd(splat(weights[w + 2 * to_step]), row, y2)
            y3 = madd(splat(weights[w + 3 * to_step]), row, y3)
            w += by_step

        # the sums go to their rows
        i = to.base + r * to.step + d
        for k in range(count):
            y = y0
            if k == 1:
                y = y1
            if k == 2:
                y = y2
            if k == 3:
                y = y3
            if keep is not None:
                y = madd(splat(keep[k]), load(to.data, i + k * to.step), y)
            store(to.data, i + k * to.step, y)


# ---- Lists of a node's keys and queries -------------------------------------


@called_loop
def _merge(x, y, to):
    """Merges the sorted lists x and y into `to`, without a branch that depends on their contents."""
    # the smaller of the two first items, until one list is used up
    i = j = k = 0
    while i < x.shape[0] and j < y.shape[0]:
        a, b = x[i], y[j]
        first = a < b
        to[k] = a if first else b
        i += np.int64(first)
        j += np.int64(not first)
        k += 1

    # the rest of the other list
    for rest in range(i, x.shape[0]):
        to[k] = x[rest]
        k += 1
    for rest in range(j, y.shape[0]):
        to[k] = y[rest]
        k += 1


@called_loop
def _sort_runs(codes, first, last, is_query, items, other, at):
    """
    Writes the sorted items of the positions first .. last - 1 to `items`, from index `at` on. The array `other`, which
    is as long, is overwritten. Codes are int32 numbers in the order of the coordinates, equal where those are equal.
    Inside a run of 16 items the rank of each is the number of smaller ones. A chunk has two runs, which are merged.
    """
    for start in range(first, last, 16):
        end = min(start + 16, last)

        # the items of a run
        for k in range(start, end):
            items[at + k - first] = (np.int64(codes[k]) << 32) | (is_query << 30) | k
        run = items[at + start - first:at + end - first]

        # and the same in order
        for k in range(run.shape[0]):
            item = run[k]
            rank = 0
            for x in run:
                rank += np.int64(x < item)
            other[at + start - first + rank] = item

    middle = at + min(16, last - first)
    end = at + last - first
    _merge(other[at:middle], other[middle:end], items[at:end])


@inner_loop
def _sort_chunk(lists, at, key_codes, key_first, key_last, query_codes, query_first, query_last):
    """Writes the sorted list of a chunk's keys and queries to lists[0], from index `at` on."""
    middle = at + key_last - key_first
    end = middle + query_last - query_first
    _sort_runs(key_codes, key_first, key_last, 0, lists[1], lists[0], at)
    _sort_runs(query_codes, query_first, query_last, 1, lists[1], lists[0], middle)
    _merge(lists[1, at:middle], lists[1, middle:end], lists[0, at:end])


@inner_loop
def _split(items, work, key_first, key_last, query_first, query_last):
    """
    Finds the sources and targets in a sorted list: its keys and its queries at these positions. Returns the number of
    sources, the number of targets, and whether a source equals a target. Sets work.source and work.target, in order,
    work.rank, the number of sources at or below each target, and work.back, the number of targets below each source.
    """
    source = work.source
    target = work.target
    rank = work.rank
    back = work.back
    sources = targets = 0
    code = np.int64(-1) << 40  # of the last source: no item has this one
    equal = False
    for item in items:
        # is it a source, a target, or neither?
        position, is_query = item & POSITION, (item >> 30) & 1
        is_source = (is_query == 0) & (position >= key_first) & (position < key_last)
        is_target = (is_query == 1) & (position >= query_first) & (position < query_last)

        # Every item is written to both lists, and only the counts tell which one stays: no branch.
        source[sources], back[sources] = position, targets
        sources += np.int64(is_source)
        target[targets], rank[targets] = position, sources
        targets += np.int64(is_target)
        code = (item >> 32) if is_source else code
        equal |= is_target & ((item >> 32) == code)
    return sources, targets, equal


@called_loop
def _other_ranks(key_codes, query_codes, work, sources, targets):
    """
    Changes work.rank to the number of sources below each target, and work.back to the number of targets at or below
    each source.
    """
    source = work.source
    target = work.target

    # sources below each target
    below = 0
    for t in range(targets):
        while below < sources and key_codes[source[below]] < query_codes[target[t]]:
            below += 1
        work.rank[t] = below

    # targets at or below each source
    below = 0
    for r in range(sources):
        while below < targets and query_codes[target[below]] <= key_codes[source[r]]:
            below += 1
        work.back[r] = below


# ---- Sources act on targets of another node ---------------------------------


@inner_loop
def _potentials(sources, order, first, count, potential, highest, sign):
    """
    Sets the potentials, sign x coordinate + bias, of `count` sources from order[first] on, and their running maximum
    `highest`. For sign 1 the maximum goes up from highest[0], which is there; for sign -1 down from highest[count].
    From the first NaN on it is NaN, so that no weight of one passes for negligible.
    """
    if sign > 0:  # p_j, upwards
        y = highest[0]
        for r in range(count):
            j = order[first + r]
            p = sources.bias[j] + sources.coordinate[j]
            y = y if p <= y or y != y else p
            potential[r], highest[r + 1] = p, y
    else:  # q_j, downwards
        y = highest[count]
        for r in range(count - 1, -1, -1):
            j = order[first + r]
            p = sources.bias[j] - sources.coordinate[j]
            y = y if p <= y or y != y else p
            potential[r], highest[r] = p, y


@inner_loop
def _factors(count, potential, highest, to, before, keep, add):
    """
    Sets the two factors of each step of a table: `keep`, by which the row before is multiplied, and `add`, by which the
    source is. Step r leads from the scale highest[r + before] to the scale highest[r + to].
    """
    for r in range(0, count, 8):
        y = load(highest, r + to)
        store(keep, r, exp2(cast(load(highest, r + before) - y, keep)))
        store(add, r, exp2(cast(load(potential, r) - y, add)))


@inner_loop
def _carry_down(sources, order, count, block, work, D):
    """Makes the V that each block of sources begins with, in work.carried, from the last block to the second."""
    potential = work.thin[1]
    highest = work.thin[3]
    keep = work.factors[2]
    add = work.factors[3]
    carried = work.carried
    rows = sources.rows
    E = D + 1
    for k in range((count - 1) // block, 0, -1):
        # the factors of the block's steps
        first = k * block
        n = min(block, count - k * block)
        highest[n] = work.carried_potential[k + 1]
        _potentials(sources, order, first, n, potential, highest, -1)
        _factors(n, potential, highest, 0, 1, keep, add)

        # V before the block's first source, from the V after its last one
        to = k * E
        _copy(carried, to, carried, to + E, E)
        for r in range(n - 1, -1, -1):
            j = order[first + r]
            _mix(carried, to, keep[r], rows.data, rows.base + j * rows.step, add[r], D)
            carried[to + D] = keep[r] * carried[to + D] + add[r] * sources.unit[j]
        work.carried_potential[k] = highest[0]


@inner_loop
def _tables(sides, sources, order, first, count, work, D):
    """
    Makes the tables of a block of sources. U goes on from the U in its table's first row, whose scale is
    work.thin[2, 0]; V goes down from the V in its table's last row, whose scale is work.thin[3, count].
    """
    rows = sources.rows
    E = D + 1
    up, down = work.table[0], work.table[1]
    keep_up, add_up = work.factors[0], work.factors[1]
    keep_down, add_down = work.factors[2], work.factors[3]

    # the factors of all steps
    if sides & UP:
        _potentials(sources, order, first, count, work.thin[0], work.thin[2], 1)
        _factors(count, work.thin[0], work.thin[2], 1, 0, keep_up, add_up)
    if sides & DOWN:
        _potentials(sources, order, first, count, work.thin[1], work.thin[3], -1)
        _factors(count, work.thin[1], work.thin[3], 0, 1, keep_down, add_down)

    # a row of each table at a time: the two do not wait for each other
    for k in range(count):
        if sides & UP:
            j, by = order[first + k], k * E
            keep, add = keep_up[k], add_up[k]
            _next_row(up, by + E, by, keep, rows.data, rows.base + j * rows.step, add, D)
            up[by + E + D] = keep * up[by + D] + add * sources.unit[j]
        if sides & DOWN:
            r = count - 1 - k
            j, to = order[first + r], r * E
            keep, add = keep_down[r], add_down[r]
            _next_row(down, to, to + E, keep, rows.data, rows.base + j * rows.step, add, D)
            down[to + D] = keep * down[to + E + D] + add * sources.unit[j]


@inner_loop
def _read(mode, sides, targets, sums, order, rank, first, last, before, work, D):
    """
    Lets the targets order[first:last] read the tables, whose first row is that of the rank `before`, and adds what they
    read to sums. The mode says what that is: FORWARD, QUERY_GRADIENT or KEY_GRADIENT.
    """
    E = D + 1
    rows = targets.rows
    out = sums.rows
    # a side that is not read has the weight 0, but its table must hold numbers
    up = work.table[0] if sides & UP else work.table[1]
    down = work.table[1] if sides & DOWN else work.table[0]
    y_up, y_down = work.thin[2], work.thin[3]
    keep = work.thin[4]
    add_up, add_down = work.thin[5], work.thin[6]
    kept = work.factors[0]
    weight_up, weight_down = work.factors[1], work.factors[2]
    piece = keep.shape[0] - 8
    for start in range(first, last, piece):
        n = min(piece, last - start)

        # the exponents of a piece of the targets, below the target's largest score so far
        for k in range(n):
            i, r = order[start + k], rank[start + k] - before
            x, bias = targets.coordinate[i], targets.bias[i]
            below = (y_up[r] - x) + bias if sides & UP else LOWEST
            above = (y_down[r] + x) + bias if sides & DOWN else LOWEST
            if mode == FORWARD:
                m = sums.highest[i]
                new = below if below > m else m
                new = above if above > new else new
                keep[k] = m - new
                below = below - new
                above = above - new
                sums.highest[i] = new
            add_up[k], add_down[k] = below, above

        # their weights
        for k in range(0, n, 8):
            store(weight_up, k, exp2(cast(load(add_up, k), weight_up)))
            store(weight_down, k, exp2(cast(load(add_down, k), weight_down)))
            if mode == FORWARD:
                store(kept, k, exp2(cast(load(keep, k), kept)))

        # one row of each table for every target
        for k in range(n):
            i, r = order[start + k], (rank[start + k] - before) * E
            a, b = weight_up[k], weight_down[k]
            row = rows.base + i * rows.step
            if a < NEGLIGIBLE and b < NEGLIGIBLE and (mode != FORWARD or kept[k] == 1):
                continue
            a_all, b_all = splat(a), splat(b)
            if mode == FORWARD:
                to, keep_all = out.base + i * out.step, splat(kept[k])
                for d in range(0, D, 8):
                    taken = madd(a_all, load(up, r + d), b_all * load(down, r + d))
                    store(out.data, to + d, madd(keep_all, load(out.data, to + d), taken))
                sums.normalizer[i] = kept[k] * sums.normalizer[i] + (a * up[r + D] + b * down[r + D])
                continue

            # P_ij u_i . v_j, summed over the sources of each side; the term of delta follows
            e_up, e_down = a * _dot(rows.data, row, up, r, D), b * _dot(rows.data, row, down, r, D)
            if mode == QUERY_GRADIENT:
                sums.normalizer[i] += (e_down - e_up) + targets.unit[i] * (a * up[r + D] - b * down[r + D])
                continue
            e_up, e_down = e_up - a * up[r + D], e_down - b * down[r + D]
            sums.key_gradient[i] += e_down - e_up
            sums.bias_gradient[i] += e_down + e_up
            to = out.base + i * out.step
            for d in range(0, D, 8):
                taken = madd(a_all, load(up, r + d), b_all * load(down, r + d))
                store(out.data, to + d, load(out.data, to + d) + taken)


@called_loop
def _act(mode, sides, sources, targets, sums, source, count, target, rank, readers, work, D):
    """
    Lets the sources act on the targets, one block of sources after another. Both are in the order of their coordinates:
    `source` and `target` hold their positions, `rank` the number of sources before each target.
    """
    E = D + 1
    up, down = work.table[0], work.table[1]
    block = work.thin.shape[1] - 16
    last = (count - 1) // block

    # before the first source U is 0, after the last one V is
    for d in range(E):
        work.carried[(last + 1) * E + d] = 0
        up[d] = 0
    work.thin[2, 0] = LOWEST
    work.carried_potential[last + 1] = LOWEST
    if sides & DOWN:
        _carry_down(sources, source, count, block, work, D)

    # block by block: the tables, and the targets whose ranks are in them
    done = np.int64(0)
    for k in range(last + 1):
        first = k * block
        n = min(block, count - k * block)
        if sides & DOWN:
            _copy(down, n * E, work.carried, (k + 1) * E, E)
            work.thin[3, n] = work.carried_potential[k + 1]
        _tables(sides, sources, source, first, n, work, D)
        until = done
        while until < readers and (k == last or rank[until] <= first + n):
            until += 1
        _read(mode, sides, targets, sums, target, rank, done, until, first, work, D)
        done = until
        if sides & UP:
            _copy(up, 0, up, n * E, E)
            work.thin[2, 0] = work.thin[2, n]


@called_loop
def _act_on_equals(keys, queries, sums, key_codes, query_codes, work, sources, targets, D):
    """
    Adds to dv and dc what pairs with equal coordinates give. For each coordinate that sources and targets share, the
    queries' rows [u_i, delta_i] are summed once, and every such key takes this sum.
    """
    table = work.table[0]
    source, target = work.source, work.target
    query_rows, key_rows = queries.rows, keys.rows
    first = 0
    t = 0
    while first < sources:
        # the keys of the next coordinate, source[first:last], and its queries, target[t:until]
        code, last = key_codes[source[first]], first
        while last < sources and key_codes[source[last]] == code:
            last += 1
        while t < targets and query_codes[target[t]] < code:
            t += 1
        until, highest = t, LOWEST
        while until < targets and query_codes[target[until]] == code:
            highest = max(highest, queries.bias[target[until]])
            until += 1

        # the queries' sum, scaled by their largest bias
        for d in range(D + 1):
            table[d] = 0
        for k in range(t, until):
            i = target[k]
            add = table.dtype.type(2.0 ** (queries.bias[i] - highest))
            _mix(table, 0, table.dtype.type(1), query_rows.data, query_rows.base + i * query_rows.step, add, D)
            table[D] += add * queries.unit[i]

        # every key takes it
        for k in range(first, last if until > t else first):
            j = source[k]
            weight, row = table.dtype.type(2.0 ** (keys.bias[j] + highest)), key_rows.base + j * key_rows.step
            _mix(sums.rows.data, sums.rows.base + j * sums.rows.step, table.dtype.type(1), table, 0, weight, D)
            sums.bias_gradient[j] += weight * (_dot(key_rows.data, row, table, 0, D) - table[D])
        first, t = last, until


# ---- Pairs inside a chunk ---------------------------------------------------


@inner_loop
def _take_queries(mode, queries, sums, start, query_first, query_last, fresh, work, D):
    """
    Copies a chunk's queries to work.chunk and work.chunk_sums, where vectors can read them. After the last query come
    queries that see no key. Backward, work.columns becomes their u by columns.
    """
    coordinate = work.chunk[0]
    bias = work.chunk[1]
    document = work.chunk[2]
    highest = work.chunk[3]
    delta = work.chunk_sums[2]

    # one number of each query
    for k in range(CHUNK):
        i = query_first + k
        inside = i < query_last
        coordinate[k] = queries.coordinate[i] if inside else 0.0
        bias[k] = queries.bias[i] if inside else -np.inf
        document[k] = start[i] if inside else 0.0
        highest[k] = sums.highest[i] if inside and not fresh and mode == FORWARD else LOWEST
        delta[k] = queries.unit[i] if inside and mode != FORWARD else 0.0

    # their rows, by columns
    if mode != FORWARD:
        rows, columns = queries.rows, work.columns
        for k in range(CHUNK):
            row = rows.base + (query_first + k) * rows.step
            for d in range(D):
                columns[d * CHUNK + k] = rows.data[row + d] if query_first + k < query_last else 0.0


@inner_loop
def _scores(keys, j, a, bias, document, in_documents, first, triangles, triangle):
    """
    Returns the scores of 8 queries and key j: -inf where the query does not see the key. The first query is `first`
    tokens before the key, so that the causal limit lies among the 8 only for first = 0 .. 7.
    """
    s = bias + splat(keys.bias[j]) - distance(a, splat(keys.coordinate[j]))
    if in_documents:
        s = select(splat(j + 0.5), document, s, splat(-np.inf))
    if 0 <= first < 8:
        s = select(load(triangles, triangle + 8 * first), splat(0.0), s, splat(-np.inf))
    return s


@inner_loop
def _chunk_forward(
    keys, queries, sums, start, key_first, key_last, query_first, query_last, shift, lower, fresh, work, D
):
    """
    Adds the pairs of a chunk's keys and queries to sums, or with `fresh` begins sums with them. A pair is query i and a
    key j with j + shift <= i where `lower`, else j + shift > i.
    """
    _take_queries(FORWARD, queries, sums, start, query_first, query_last, fresh, work, D)
    triangle = 0 if lower else 64
    in_documents = start[query_last - 1] > key_first
    tile = work.tile
    normalizer = work.chunk_sums[0]
    kept = work.chunk_sums[1]

    # the weights of 8 queries at a time
    for k in range(0, query_last - query_first, 8):
        a, bias, document = load(work.chunk[0], k), load(work.chunk[1], k), load(work.chunk[2], k)
        i = query_first + k
        first, last = (key_first, min(key_last, i + 8)) if lower else (max(key_first, i - shift), key_last)

        # M
        old = load(work.chunk[3], k)
        m = old
        for j in range(first, last):
            s = _scores(keys, j, a, bias, document, in_documents, j + shift - i, work.triangles, triangle)
            m = largest(s, m)

        # P and Z
        z = splat(tile.dtype.type(0))
        for j in range(first, last):
            s = _scores(keys, j, a, bias, document, in_documents, j + shift - i, work.triangles, triangle)
            p = exp2(cast(s - m, tile))
            store(tile, (j - key_first) * CHUNK + k, p)
            z = z + p
        store(work.chunk[3], k, m)
        store(normalizer, k, z)
        store(kept, k, exp2(cast(old - m, kept)))

    # the rows of 4 queries at a time
    for k in range(0, query_last - query_first, 4):
        i, count = query_first + k, min(4, query_last - query_first - k)
        first, last = (key_first, min(key_last, i + 4)) if lower else (max(key_first, i - shift), key_last)
        at = (first - key_first) * CHUNK + k
        if fresh:
            _add_products(sums.rows, i, count, None, tile, at, 1, CHUNK, keys.rows, first, last, D)
        else:
            _add_products(sums.rows, i, count, kept[k:k + 4], tile, at, 1, CHUNK, keys.rows, first, last, D)
        for n in range(count):
            sums.highest[i + n] = work.chunk[3, k + n]
            before = tile.dtype.type(0) if fresh else kept[k + n] * sums.normalizer[i + n]
            sums.normalizer[i + n] = before + normalizer[k + n]


@inner_loop
def _chunk_backward(keys, queries, sums, start, key_first, key_last, query_first, query_last, shift, lower, work, D):
    """Adds what the same pairs give to all gradients."""
    _take_queries(QUERY_GRADIENT, queries, sums, start, query_first, query_last, True, work, D)
    triangle = 0 if lower else 64
    in_documents = start[query_last - 1] > key_first
    tile = work.tile
    gradient = work.chunk_sums[0]
    delta = work.chunk_sums[2]
    columns = work.columns
    nothing = splat(tile.dtype.type(0))
    for k in range(CHUNK):
        gradient[k] = 0

    # P and E of each key and 8 queries at a time: da, db and dc
    for j in range(key_first, key_last):
        here = j + shift - query_first
        first, last = (here // 8 * 8, query_last - query_first) if lower else (0, min(CHUNK, here // 8 * 8 + 8))
        row = keys.rows.base + j * keys.rows.step
        of_coordinate = nothing
        of_bias = nothing
        for k in range(first, last, 8):
            a, bias, document = load(work.chunk[0], k), load(work.chunk[1], k), load(work.chunk[2], k)
            s = _scores(keys, j, a, bias, document, in_documents, here - k, work.triangles, triangle)
            p, product = exp2(cast(s, tile)), nothing - load(delta, k)
            for d in range(D):
                product = madd(splat(keys.rows.data[row + d]), load(columns, d * CHUNK + k), product)
            store(tile, (j - key_first) * CHUNK + k, p)
            e, b = p * product, splat(keys.coordinate[j])
            # both are e where a = b, and where one of them is NaN, as e is then
            below, above = select(b, a, nothing, e), select(a, b, nothing, e)
            store(gradient, k, load(gradient, k) + (above - below))
            of_coordinate = of_coordinate + (below - above)
            of_bias = of_bias + e
        sums.key_gradient[j] += total(of_coordinate)
        sums.bias_gradient[j] += total(of_bias)

    # dv: the rows of 4 keys at a time
    one = np.ones(4, tile.dtype)
    for k in range(0, key_last - key_first, 4):
        j, count = key_first + k, min(4, key_last - key_first - k)
        here = j + shift
        first, last = (max(query_first, here), query_last) if lower else (query_first, min(query_last, here + 3))
        at = k * CHUNK + first - query_first
        _add_products(sums.rows, j, count, one, tile, at, CHUNK, 1, queries.rows, first, last, D)

    for k in range(query_last - query_first):
        sums.normalizer[query_first + k] += gradient[k]


# ---- A triangle of pairs ----------------------------------------------------


class Triangle(NamedTuple):
    """The keys and queries of one block of tokens (lower), or a block's keys and the next block's queries (upper)."""
    lower: bool
    key_base: int       # the first token of the keys' block
    query_base: int     # of the queries' block
    key_count: int
    query_count: int
    at: int             # where its lists begin


@inner_loop
def _span(base, count, first, last):
    """Returns the first token and the end of a block's positions first .. last - 1, of which only `count` exist."""
    return base + min(first, count), base + min(last, count)


@inner_loop
def _list_of(lists, level, triangle, first, last):
    """Returns the sorted list, at this level, of the node of the positions first .. last - 1."""
    length = max(0, min(last, triangle.key_count) - first) + max(0, min(last, triangle.query_count) - first)
    at = triangle.at + 2 * first
    return lists[level % 2, at:at + length]


@inner_loop
def _meet(
    backward, keys, queries, sums, start, key_codes, query_codes, lists, level, triangle, first, middle, last, work, D
):
    """
    Brings two nodes of a level together: the positions first .. middle - 1 and middle .. last - 1. Their lists become
    one list of the next level, and the sources of one node act on the targets of the other.
    """
    # one list of both
    merged = _list_of(lists, level + 1, triangle, first, last)
    left = _list_of(lists, level, triangle, first, middle)
    if middle >= last:
        _copy(merged, 0, left, 0, left.shape[0])
        return
    _merge(left, _list_of(lists, level, triangle, middle, last), merged)

    # the keys and queries that make pairs, and the first token of their document
    if triangle.lower:
        key_first, key_last = _span(triangle.key_base, triangle.key_count, first, middle)
        query_first, query_last = _span(triangle.query_base, triangle.query_count, middle, last)
        document = start[query_first] if query_first < query_last else 0
    else:
        key_first, key_last = _span(triangle.key_base, triangle.key_count, middle, last)
        query_first, query_last = _span(triangle.query_base, triangle.query_count, first, middle)
        document = start[triangle.query_base]
    key_first = max(key_first, document)
    if key_first >= key_last or query_first >= query_last or start[query_first] > document:
        return
    if start[query_last - 1] > document:
        # The document ends among the queries: bisection finds its last one.
        inside, outside = query_first, query_last - 1
        while outside - inside > 1:
            half = (inside + outside) // 2
            if start[half] > document:
                outside = half
            else:
                inside = half
        query_last = outside

    # the sums
    sources, targets, equal = _split(merged, work, key_first, key_last, query_first, query_last)
    if sources == 0 or targets == 0:
        return
    if not backward:
        mode = np.int64(FORWARD)
        sides = np.int64(BOTH)
        _act(mode, sides, keys, queries, sums, work.source, sources, work.target, work.rank, targets, work, D)
        return

    # A key that equals a query is on neither side of it, because its distance has derivative 0. So V is read with the
    # number of keys at or below the query, and U with the number of keys below it: the second turn.
    for turn in range(2 if equal else 1):
        if turn == 1:
            _other_ranks(key_codes, query_codes, work, sources, targets)
        for mode in range(QUERY_GRADIENT, KEY_GRADIENT + 1):
            to_keys = mode == KEY_GRADIENT
            givers, takers = (queries, keys) if to_keys else (keys, queries)
            order, count, ranks = (work.target, targets, work.back) if to_keys else (work.source, sources, work.rank)
            readers, number = (work.source, sources) if to_keys else (work.target, targets)
            sides = BOTH
            if equal:
                sides = UP if (turn == 0) == to_keys else DOWN
            _act(mode, sides, givers, takers, sums, order, count, readers, ranks, number, work, D)
    if equal:
        _act_on_equals(keys, queries, sums, key_codes, query_codes, work, sources, targets, D)


# ---- A pass over all rows ---------------------------------------------------


class Inputs(NamedTuple):
    """
    Contiguous arrays. Floats have one dtype here and in Results and Gradients, but row_max is float64. What is absent
    has no heads. D is padded to a multiple of 8.
    """
    query: np.ndarray           # (B, T, H)
    key: np.ndarray             # (B, T, Hkv)
    value: np.ndarray           # (B T Hkv D)
    log_decay: np.ndarray       # (B, T, H)
    key_bias: np.ndarray        # (B, T, Hkv)
    start: np.ndarray           # (B, T) int32: the first token of each token's document
    query_codes: np.ndarray     # (B, T, H) int32: numbers in the order of a row's coordinates, equal where those are
    key_codes: np.ndarray       # (B, T, Hkv) int32


class Results(NamedTuple):
    """What the forward pass makes and the backward pass reads."""
    out: np.ndarray             # (B T H D)
    row_max: np.ndarray         # (B, H, T): M log2(e)
    normalizer: np.ndarray      # (B, H, T)


class Gradients(NamedTuple):
    """What the backward pass reads (upstream) and makes (the rest, which the caller fills with zeros)."""
    upstream: np.ndarray        # (B T H D)
    query: np.ndarray           # as Inputs' ...
    key: np.ndarray
    value: np.ndarray
    log_decay: np.ndarray
    key_bias: np.ndarray


@functools.cache
def no_gradients(number: np.dtype) -> Gradients:
    """Returns the Gradients of a forward pass: empty arrays of this dtype."""
    flat = np.empty(0, number)
    thin = np.empty((0, 0, 0), number)
    return Gradients(flat, thin, thin, flat, thin, thin)


class Row(NamedTuple):
    """
    A row that is worked on. Where a sequence has several heads, one head's rows lie far apart in memory. They are then
    packed: copied to arrays of the slot, where they lie one after another.
    """
    batch: int
    head: int
    key_head: int
    packed: bool
    value: Matrix       # v where the caller has it
    of_query: Matrix    # out, or backward u, where the caller has it
    result: Matrix      # out, or backward dv, where the caller wants it
    keys: Side
    queries: Side
    sums: Sums


@inner_loop
def _row(backward, inputs, results, gradients, wide, narrow, packed, number, head_of_group, D):
    """
    Returns row `number` of the B Hkv rows that one head of each group has, with the arrays of a slot. `head_of_group`
    is that head's number within its group of H / Hkv heads.
    """
    # which heads these are
    B, T, H = inputs.query.shape
    kv_heads = inputs.key.shape[2]
    batch, key_head = number // kv_heads, number % kv_heads
    head = key_head * (H // kv_heads) + head_of_group

    # where the caller has their rows
    value = Matrix(inputs.value, (batch * T * kv_heads + key_head) * D, kv_heads * D)
    by_query = (batch * T * H + head) * D
    of_query = Matrix(gradients.upstream if backward else results.out, by_query, H * D)
    result = Matrix(gradients.value, value.base, value.step) if backward else of_query

    # where the loops have them
    is_packed = packed.shape[1] > 0
    of_keys = value
    of_queries = of_query
    of_sums = result
    if is_packed:
        of_keys = Matrix(packed[0], 0, D)
        of_queries = Matrix(packed[1], 0, D)
        of_sums = Matrix(packed[2] if backward else packed[1], 0, D)
    keys = Side(wide[0], wide[1], narrow[0], of_keys)
    queries = Side(wide[2], wide[3], narrow[1], of_queries)
    sums = Sums(wide[4], narrow[2], narrow[3], narrow[4], of_sums)
    return Row(batch, head, key_head, is_packed, value, of_query, result, keys, queries, sums)


@called_loop
def _sum_decays(inputs, row):
    """Sets the queries' bias to F. The sum starts anew in every document, so no other document affects its rounding."""
    start = inputs.start[row.batch]
    log_decay = inputs.log_decay[row.batch, :, row.head]
    total_decay = 0.0
    for i in range(start.shape[0]):
        total_decay = 0.0 if start[i] == i else total_decay + log_decay[i] * LOG2_E
        row.queries.bias[i] = total_decay


@called_loop
def _begin(backward, inputs, results, row, first, last, D):
    """Fills the row's arrays for the tokens first .. last - 1."""
    keys = row.keys
    queries = row.queries
    sums = row.sums
    batch = row.batch
    head = row.head
    a = inputs.query[batch, :, head]
    b = inputs.key[batch, :, row.key_head]
    decays = inputs.log_decay.shape[2] > 0
    biased = inputs.key_bias.shape[2] > 0

    # coordinates and biases, times log2(e)
    for i in range(first, last):
        queries.coordinate[i] = a[i] * LOG2_E
        keys.coordinate[i] = b[i] * LOG2_E
        keys.bias[i] = 0
        keys.unit[i] = 1
        if not decays:
            queries.bias[i] = 0
    if biased:
        c = inputs.key_bias[batch, :, row.key_head]
        for i in range(first, last):
            keys.bias[i] = c[i] * LOG2_E
    if decays:
        for i in range(first, last):
            keys.bias[i] -= queries.bias[i]

    # rows of several heads are packed
    if row.packed:
        for i in range(first, last):
            _copy_row(keys.rows.data, i * D, row.value.data, row.value.base + i * row.value.step, D)
            if backward:
                _copy_row(queries.rows.data, i * D, row.of_query.data, row.of_query.base + i * row.of_query.step, D)
                for d in range(D):
                    sums.rows.data[i * D + d] = 0

    # backward: -L in the queries' biases, delta, and sums that begin as zeros
    if backward:
        row_max, normalizer = results.row_max[batch, head], results.normalizer[batch, head]
        for i in range(first, last):
            at = row.of_query.base + i * row.of_query.step
            queries.bias[i] -= row_max[i] + np.log2(normalizer[i])
            queries.unit[i] = _dot(row.of_query.data, at, results.out, at, D)
            sums.normalizer[i] = 0
            sums.key_gradient[i] = 0
            sums.bias_gradient[i] = 0


@called_loop
def _end(backward, inputs, results, gradients, row, first, last, D):
    """Writes the row's results for the tokens first .. last - 1 to the caller's arrays."""
    sums = row.sums
    result = row.result
    batch = row.batch
    head = row.head
    key_head = row.key_head

    # forward: out, M and Z
    if not backward:
        row_max, normalizer = results.row_max[batch, head], results.normalizer[batch, head]
        for i in range(first, last):
            at, to = sums.rows.base + i * sums.rows.step, result.base + i * result.step
            inverse = splat(sums.normalizer.dtype.type(1) / sums.normalizer[i])
            for d in range(0, D, 8):
                store(result.data, to + d, load(sums.rows.data, at + d) * inverse)
            row_max[i], normalizer[i] = sums.highest[i], sums.normalizer[i]
        return

    # backward: heads of one group come one after another, and add to the same keys
    grad_query, grad_key = gradients.query[batch, :, head], gradients.key[batch, :, key_head]
    biased = inputs.key_bias.shape[2] > 0
    for i in range(first, last):
        if row.packed:
            to = result.base + i * result.step
            for d in range(0, D, 8):
                store(result.data, to + d, load(result.data, to + d) + load(sums.rows.data, i * D + d))
        grad_query[i] = sums.normalizer[i]
        grad_key[i] += sums.key_gradient[i]
        if biased:
            gradients.key_bias[batch, i, key_head] += sums.bias_gradient[i]


@called_loop
def _sum_decay_gradients(inputs, gradients, row):
    """
    Sets dg_t = - sum over the document's j >= t of dc_j. At the document's first token it is 0, because no score
    contains that token's decay.
    """
    after = 0.0
    for i in range(inputs.query.shape[1] - 1, -1, -1):
        after += row.sums.bias_gradient[i]
        begins = inputs.start[row.batch, i] == i
        gradients.log_decay[row.batch, i, row.head] = 0.0 if begins else -after
        after = 0.0 if begins else after


@inner_loop
def _order_scan(work, first, last, step, readers_first, readers, readers_step, rank, rank_step, most):
    """
    Sets the orders of a scan. Sources are the positions from `first` to `last` (exclusive) by `step`, readers `readers`
    positions from `readers_first` by `readers_step`. Reader k has the rank min(rank + k rank_step, most).
    """
    for k in range(abs(last - first)):
        work.source[k] = first + k * step
    for k in range(readers):
        work.target[k] = readers_first + k * readers_step
        work.rank[k] = min(rank + k * rank_step, most)


@called_loop
def _scan(backward, row, start, window, task, work, D):
    """
    Without coordinates: lets a block's keys act on its queries, document by document. A block is as many tokens as the
    window. One table of running sums in the order of the tokens serves all queries; backward, the queries' sums in the
    other order serve all keys.
    """
    keys = row.keys
    queries = row.queries
    sums = row.sums
    first = task * window
    end = min(start.shape[0], first + window)

    # forward: sums begin here
    if not backward:
        for i in range(first, end):
            sums.highest[i] = LOWEST
            sums.normalizer[i] = 0
            at = sums.rows.base + i * sums.rows.step
            for d in range(D):
                sums.rows.data[at + d] = 0

    # tokens first .. last - 1 are of one document
    while first < end:
        last = first + 1
        while last < end and start[last] <= first:
            last += 1
        n = last - first
        if backward:
            _order_scan(work, last - 1, first - 1, -1, last - 1, n, -1, 1, 1, n)
        else:
            _order_scan(work, first, last, 1, first, n, 1, 1, 1, n)
        _act_in_order(backward, keys, queries, sums, n, n, work, D)
        first = last


@called_loop
def _scan_upper(backward, row, start, window, task, work, D):
    """Lets the keys of the block before act on the same queries: base + n sees keys from base + n + 1 - window on."""
    # the queries of the document that goes on from the block before, and its keys
    base = (task + 1) * window
    end = base + 1
    document = start[base]
    while end < min(start.shape[0], base + window) and start[end] == document:
        end += 1
    first = max(document, base + 1 - window)
    n = end - base
    if first >= base:
        return

    # keys go down from the block's end to the first one that a query sees; backward, queries go up to the last
    if backward:
        _order_scan(work, base, end, 1, first, base - first, 1, min(n, first - (base - window)), 1, n)
        _act_in_order(backward, row.keys, row.queries, row.sums, n, base - first, work, D)
    else:
        _order_scan(work, base - 1, first - 1, -1, end - 1, n, -1, window - n, 1, base - first)
        _act_in_order(backward, row.keys, row.queries, row.sums, base - first, n, work, D)


@inner_loop
def _act_in_order(backward, keys, queries, sums, count, readers, work, D):
    """Lets `count` sources act on `readers` targets in the orders of _order_scan: a target reads U alone."""
    mode = np.int64(KEY_GRADIENT) if backward else np.int64(FORWARD)
    sources, targets = (queries, keys) if backward else (keys, queries)
    _act(mode, np.int64(UP), sources, targets, sums, work.source, count, work.target, work.rank, readers, work, D)


class Plan(NamedTuple):
    """What every task of a pass gets. Each field is an array, because loops.run_stages passes only arrays to a task."""
    settings: np.ndarray        # (3) int64: whether the pass is the backward one, the window, D
    # (stages, 3) int64: the step, or -1 for all of them one after another; the first row; the head of each group
    stages: np.ndarray
    steps: np.ndarray           # (steps, 2) int64: the kind of each step of a row, and the number of its pieces
    query: np.ndarray           # 8 arrays of Inputs
    key: np.ndarray
    value: np.ndarray
    log_decay: np.ndarray
    key_bias: np.ndarray
    start: np.ndarray
    query_codes: np.ndarray
    key_codes: np.ndarray
    out: np.ndarray             # 3 of Results
    row_max: np.ndarray
    normalizer: np.ndarray
    upstream: np.ndarray        # 6 of Gradients
    grad_query: np.ndarray
    grad_key: np.ndarray
    grad_value: np.ndarray
    grad_decay: np.ndarray
    grad_bias: np.ndarray
    # arrays of the slots, as _row takes them apart; a slot is a row's, or a thread's that takes rows by itself
    wide: np.ndarray            # (slots, 5, T + CHUNK) float64
    narrow: np.ndarray          # (slots, 5, T + CHUNK)
    packed: np.ndarray          # (slots, 3, T D), or of no numbers: v, out or u, dv
    lists: np.ndarray           # (slots, 2, 2 (T + CHUNK)) int64: sorted lists of the nodes of a level and of the next
    orders: np.ndarray          # (threads, ...): as in Work
    thin: np.ndarray
    factors: np.ndarray
    tables: np.ndarray
    carried: np.ndarray
    potentials: np.ndarray
    chunk: np.ndarray
    chunk_sums: np.ndarray
    tiles: np.ndarray
    triangles: np.ndarray


@called_loop
def _task(stage, task, thread, plan):
    """Does one piece of one step of a row, or all pieces of all steps of a row."""
    # which row, and which piece
    step, first_row, head_of_group = plan.stages[stage]
    all_steps = step < 0
    pieces = 1 if all_steps else plan.steps[step, 1]
    number, piece = task // pieces, task % pieces
    slot = thread if all_steps else number
    backward = plan.settings[0] == 1
    window = plan.settings[1]
    D = plan.settings[2]

    # the row's arrays
    inputs = Inputs(
        plan.query, plan.key, plan.value, plan.log_decay, plan.key_bias, plan.start, plan.query_codes, plan.key_codes
    )
    results = Results(plan.out, plan.row_max, plan.normalizer)
    gradients = Gradients(
        plan.upstream, plan.grad_query, plan.grad_key, plan.grad_value, plan.grad_decay, plan.grad_bias
    )
    wide, narrow, packed = plan.wide[slot], plan.narrow[slot], plan.packed[slot]
    row_number = first_row + number
    row = _row(backward, inputs, results, gradients, wide, narrow, packed, row_number, head_of_group, D)

    # the thread's arrays
    orders = plan.orders[thread]
    tiles = plan.tiles[thread]
    tile = CHUNK * CHUNK
    work = Work(
        orders[0], orders[1], orders[2], orders[3],
        plan.thin[thread], plan.factors[thread], plan.tables[thread], plan.carried[thread], plan.potentials[thread],
        plan.chunk[thread], plan.chunk_sums[thread], tiles[:tile], plan.triangles, tiles[tile:]
    )

    # the step, or all of them
    for s in range(0 if all_steps else step, plan.steps.shape[0] if all_steps else step + 1):
        kind, pieces = plan.steps[s]
        for p in range(0 if all_steps else piece, pieces if all_steps else piece + 1):
            first, last = p * SUBTREE, min(inputs.query.shape[1], (p + 1) * SUBTREE)
            if kind == SUM_DECAYS:
                _sum_decays(inputs, row)
            elif kind == BEGIN:
                _begin(backward, inputs, results, row, first, last, D)
            elif kind == END:
                _end(backward, inputs, results, gradients, row, first, last, D)
            elif kind == DECAY_GRADIENTS:
                _sum_decay_gradients(inputs, gradients, row)
            elif kind == SCAN:
                _scan(backward, row, inputs.start[row.batch], window, p, work, D)
            elif kind == SCAN_UPPER:
                _scan_upper(backward, row, inputs.start[row.batch], window, p, work, D)
            else:
                _attend(kind, p, backward, window, inputs, row, plan.lists[slot], work, D)


@inner_loop
def _attend(kind, task, backward, window, inputs, row, lists, work, D):
    """
    Sums the pairs of one piece of a step. From kind LEVEL on a piece is a pair of nodes of that level above subtrees.
    Else it is a subtree or, where there is a window, a triangle of a block of queries.
    """
    keys = row.keys
    queries = row.queries
    sums = row.sums
    T = inputs.query.shape[1]
    start = inputs.start[row.batch]
    key_codes = inputs.key_codes[row.batch, :, row.key_head]
    query_codes = inputs.query_codes[row.batch, :, row.head]

    # a subtree: the positions first .. last - 1, from nodes of `size` tokens up to one node of `top`
    first = task * SUBTREE
    last = min(T, (task + 1) * SUBTREE)
    size = CHUNK
    top = SUBTREE
    level = 0
    triangle = Triangle(True, 0, 0, T, T, 0)
    if kind >= LEVEL:
        # a pair of nodes above subtrees
        level = SUBTREE_LEVELS + kind - LEVEL
        size = SUBTREE << (kind - LEVEL)
        first = task * 2 * size
        top = 2 * size
        last = min(T, first + top)
    elif window < T:
        # a triangle of a window
        lower = kind == LOWER
        base = task * window if lower else (task + 1) * window
        count = min(window, T - base)
        triangle = Triangle(lower, base if lower else base - window, base, count if lower else window, count, 2 * base)
        first, last, top = 0, triangle.key_count, triangle.key_count
        if not lower and start[base] >= base:
            return

    # chunks: pairs inside, and a sorted list of each
    for offset in range(first, last if kind < LEVEL else first, CHUNK):
        key_first, key_last = _span(triangle.key_base, triangle.key_count, offset, offset + CHUNK)
        query_first, query_last = _span(triangle.query_base, triangle.query_count, offset, offset + CHUNK)
        shift, lower = triangle.query_base - triangle.key_base, triangle.lower
        if key_first < key_last and query_first < query_last:
            if backward:
                _chunk_backward(
                    keys, queries, sums, start, key_first, key_last, query_first, query_last, shift, lower, work, D
                )
            else:
                fresh = lower  # the upper triangle adds to what the lower one has begun
                _chunk_forward(
                    keys, queries, sums, start, key_first, key_last, query_first, query_last, shift, lower, fresh,
                    work, D
                )
        at = triangle.at + 2 * offset
        _sort_chunk(lists, at, key_codes, key_first, key_last, query_codes, query_first, query_last)

    # pairs of nodes, level by level
    while size < top:
        for offset in range(first, last, 2 * size):
            middle = offset + size
            end = min(offset + 2 * size, last)
            _meet(
                backward, keys, queries, sums, start, key_codes, query_codes, lists, level, triangle,
                offset, middle, end, work, D
            )
        size = 2 * size
        level = level + 1


class Layout(NamedTuple):
    """What a pass needs beside the caller's arrays."""
    tasks: list[int]                # of each stage
    plan: tuple[np.ndarray, ...]    # the fields of Plan before those of Inputs
    space: tuple[np.ndarray, ...]   # the fields of Plan after those of Gradients


# Layouts of past passes by their sizes, for the next pass of the same sizes: a pass takes its layout out and puts it
# back, so that no other thread uses the same arrays. To make one takes as long as the loops of 100 tokens.
_layouts = {}
KEPT = 8                # layouts
KEPT_BYTES = 1 << 22    # most bytes of one that is kept


def topological_pass(backward: bool, inputs: Inputs, results: Results, gradients: Gradients, window: int, D: int):
    """
    Fills `results`; with `backward` it reads filled results and fills `gradients`. In the forward pass gradients may
    hold empty arrays. With empty codes there is no distance, and query and key only tell the numbers of heads.
    """
    B, T, H = inputs.query.shape
    number = inputs.value.dtype
    decays = inputs.log_decay.shape[2] > 0
    scans = not inputs.query_codes.size
    sizes = (backward, B, T, H, inputs.key.shape[2], window, D, decays, scans, number, thread_count())
    layout = _layouts.pop(sizes, None) or _layout(*sizes)
    plan = Plan._make((*layout.plan, *inputs, *results, *gradients, *layout.space))
    run_stages(_task, layout.tasks, plan, kind=number)

    # the layout is there for the next pass
    if sum(array.nbytes for array in layout.space) <= KEPT_BYTES:
        for oldest in list(_layouts)[:1 - KEPT]:
            _layouts.pop(oldest, None)
        _layouts[sizes] = layout


def _layout(
    backward: bool, B: int, T: int, H: int, kv_heads: int, window: int, D: int, decays: bool, scans: bool,
    number: np.dtype, threads: int
) -> Layout:
    """Returns the layout of a pass over B sequences of T tokens, with numbers of this dtype and so many threads."""
    rows = B * kv_heads

    # the steps of a row, and into how many pieces each is cut
    width = min(window, T)
    blocks = -(-T // width)
    subtrees = -(-T // SUBTREE)
    steps = [(SUM_DECAYS, int(decays)), (BEGIN, subtrees)]
    if scans:
        steps += [(SCAN, blocks), (SCAN_UPPER, blocks - 1)]
    else:
        steps += [(LOWER, subtrees if blocks == 1 else blocks), (UPPER, blocks - 1)]
    levels = (subtrees - 1).bit_length() if blocks == 1 and not scans else 0
    steps += [(LEVEL + level, -(-T // (2 * SUBTREE << level))) for level in range(levels)]
    steps += [(END, subtrees), (DECAY_GRADIENTS, int(decays and backward))]
    steps = [(kind, pieces) for kind, pieces in steps if pieces]

    # Rows that are short, and many enough for all threads, go through all steps by themselves; others go step by step,
    # some rows at a time.
    by_row = T <= SUBTREE or (T <= TASK_ROW and rows >= 4 * threads)
    slots = threads if by_row else max(1, min(rows, GROUP_TOKENS // T))
    heads_of_group = range(H // kv_heads)
    if by_row:
        stages = [(-1, 0, head) for head in heads_of_group]
        tasks = [rows] * len(stages)
    else:
        stages = [
            (step, first, head)
            for head in heads_of_group
            for first in range(0, rows, slots)
            for step in range(len(steps))
        ]
        tasks = [steps[step][1] * min(slots, rows - first) for step, first, _ in stages]

    # the arrays of slots and threads; a block is the sources whose tables are made at one time
    E = D + 1
    longest = blocks * width + CHUNK
    block = max(64, min(TABLE // D // 8 * 8, width))
    plan = (np.array((backward, width, D)), np.array(stages, np.int64), np.array(steps, np.int64))
    space = dict(
        wide=np.zeros((slots, 5, longest)),
        narrow=np.zeros((slots, 5, longest), number),
        packed=np.empty((slots, 3, T * D if H > 1 else 0), number),
        lists=np.empty((slots, 2, 2 * longest), np.int64),
        orders=np.empty((threads, 4, width + 8), np.int32),
        thin=np.zeros((threads, 7, block + 16)),
        factors=np.zeros((threads, 4, block + 16), number),
        tables=np.empty((threads, 2, (block + 1) * E), number),
        carried=np.empty((threads, (width // block + 3) * E), number),
        potentials=np.empty((threads, width // block + 3)),
        chunk=np.zeros((threads, 5, CHUNK)),
        chunk_sums=np.zeros((threads, 3, CHUNK), number),
        tiles=np.zeros((threads, CHUNK * CHUNK + CHUNK * D), number),
        triangles=TRIANGLES,
    )
    return Layout(tasks, plan, tuple(space[name] for name in Plan._fields[-len(space):]))


@loop
def _codes(bits, codes):
    """Turns the bits of float32 numbers into int32 codes of the same order."""
    for i in range(bits.shape[0]):
        x = bits[i]
        x = np.int32(0) if x == np.int32(-2147483648) else x  # -0 equals 0
        codes[i] = x if x >= 0 else x ^ np.int32(0x7FFFFFFF)


def order_codes(query: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Returns int32 codes of the queries' and of the keys' coordinates, in the shapes of both (B, T, ...). Codes are in
    the order of the coordinates, and equal where those are equal. For float32 they are made from the bits, else they
    are ranks.
    """
    if query.dtype == np.float32:
        codes = [np.empty(x.shape, np.int32) for x in (query, key)]
        for x, of in zip((query, key), codes):
            _codes(x.reshape(-1).view(np.int32), of.reshape(-1))
        return codes[0], codes[1]
    together = np.concatenate((query.ravel(), key.ravel())) + 0.0
    ranks = np.unique(together, return_inverse=True)[1].astype(np.int32).ravel()
    return ranks[:query.size].reshape(query.shape), ranks[query.size:].reshape(key.shape)
