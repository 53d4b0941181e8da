"""
Topological attention, one token after another, on a CPU: the reads and the sorted runs of topological_attention_cache.py as compiled loops.

A query takes pieces of tokens, one after another, with the largest score so far m, the sum of weights z and the row out:
    m' = max(m, scores)     z <- e^{m - m'} z + sum of e^{score - m'} unit      out <- e^{m - m'} out + sum of e^{score - m'} row
A piece is up to TILE tokens in their order, or of a sorted run the block that the query's coordinate falls into with the sums of all blocks below it and of all
above it, two rows whose units are sums of weights. A run is read so where the query sees all of it, else token by token: windows and documents need nothing more.

A run is made by merging sorted halves of places; values stay where they are, in their order. Then each block's sums of [v, 1], seen from its largest potential
(weight + b from above, weight - b from below), and their running sums over the blocks, upwards and downwards. Exponents are differences of float64 numbers.

Source: the algorithm is ours; runs of doubling size: Bentley and Saxe, Decomposable searching problems I (1980); rows kept with the exponent of their maximum:
Milakov and Gimelshein, arxiv.org/abs/1805.02867
"""

from typing import NamedTuple

import numpy as np

from kernels.loops import exp2_f32, inner_loop, run_stages, thread_count
from kernels.simd import distance, exp2, largest, load, madd, peak, splat, store, total
from kernels.topological_attention_reference import LOG2_E, LOWEST

TILE = 128  # most tokens of a piece


class Sizes(NamedTuple):
    """Numbers that all tasks get. A token's place counts from its row's first token; place + origin is where it lies in an array of tokens."""
    kv_heads: int
    heads: int          # of queries
    weight_heads: int   # kv_heads, or heads where log-weights have as many
    queries: int        # the last tokens of a row
    D: int
    length: int         # tokens of a row, those that are forgotten included
    capacity: int       # of the arrays of tokens
    origin: int
    run_capacity: int   # of the array `order`
    run_origin: int
    block_capacity: int     # of the arrays of blocks
    block: int          # tokens of a block


class State(NamedTuple):
    """What tasks read and write: contiguous arrays, the large ones flat; absent ones are empty."""
    sizes: np.ndarray       # int64, as Sizes
    query: np.ndarray       # (B heads queries) float32
    first: np.ndarray       # (B queries) int64: the first place that a query sees
    key: np.ndarray         # (B kv_heads capacity) float32
    value: np.ndarray       # (B kv_heads capacity D) float32
    weight: np.ndarray      # (B weight_heads capacity) float32
    order: np.ndarray       # (B kv_heads run_capacity) int32: places of each run, by rising coordinate
    edge: np.ndarray        # (B kv_heads block_capacity) float32: the first coordinate of each block
    potential: np.ndarray   # (B weight_heads block_capacity 2) float64: of the sums over a run's blocks up to each, and from each
    unit: np.ndarray        # (B weight_heads block_capacity 2) float32: those sums' weights
    sums: np.ndarray        # (B weight_heads block_capacity 2 D) float32: and rows
    runs: np.ndarray        # (runs, 3) int64: the first place and the last + 1, and where its blocks begin
    steps: np.ndarray       # (steps, 3) int64: first, middle and last + 1 of two runs that are merged; first = middle of a run that is sorted
    scratch: np.ndarray     # (threads, most tokens of a run) int32
    scores: np.ndarray      # (threads, TILE + 16) float32
    rows: np.ndarray        # (threads, TILE + 16) int64: where the value of each begins
    logs: np.ndarray        # (threads, TILE + 16) float64
    out: np.ndarray         # (B queries heads D) float32


# ---- Reading


@inner_loop
def _add_rows(to, at, factors, values, rows, count, D):
    """to[at:at + D] += sum over k of factors[k] values[rows[k]:rows[k] + D], k below count, a multiple of 4"""
    for k in range(0, count, 4):
        f0, f1, f2, f3 = splat(factors[k]), splat(factors[k + 1]), splat(factors[k + 2]), splat(factors[k + 3])
        r0, r1, r2, r3 = rows[k], rows[k + 1], rows[k + 2], rows[k + 3]
        for d in range(0, D, 8):
            y = madd(f0, load(values, r0 + d), f1 * load(values, r1 + d))
            y = y + madd(f2, load(values, r2 + d), f3 * load(values, r3 + d))
            store(to, at + d, load(to, at + d) + y)


@inner_loop
def _scale(x, at, factor, D):
    for d in range(0, D, 8):
        store(x, at + d, splat(factor) * load(x, at + d))


@inner_loop
def _fill(scores, rows, count):
    """Tokens of no weight up to a multiple of 8; returns that."""
    filled = (count + 7) // 8 * 8
    for k in range(count, filled):
        scores[k], rows[k] = -np.inf, rows[0]
    return filled


@inner_loop
def _weigh(scores, count, highest):
    """Sets scores to e^{score - m}, m the largest of them and `highest`; returns m, e^{highest - m} and their sum."""
    m = splat(highest)
    for k in range(0, count, 8):
        m = largest(load(scores, k), m)
    new = peak(m)
    m, sums = splat(new), splat(np.float32(0))
    for k in range(0, count, 8):
        p = exp2((load(scores, k) - m) * splat(np.float32(LOG2_E)))
        store(scores, k, p)
        sums = sums + p
    return new, exp2_f32((highest - new) * np.float32(LOG2_E)), total(sums)


@inner_loop
def _score_in_order(scores, rows, count, query, key, key_at, weight, weight_at, value_at, D):
    """The scores of tokens that follow each other in the arrays, from these indices on."""
    coordinates, weighted = key.size > 0, weight.size > 0
    whole = count // 8 * 8
    for k in range(0, whole, 8):
        s = splat(np.float32(0))
        if weighted:
            s = load(weight, weight_at + k)
        if coordinates:
            s = s - distance(splat(query), load(key, key_at + k))
        store(scores, k, s)
    for k in range(whole, count):
        s = weight[weight_at + k] if weighted else np.float32(0)
        if coordinates:
            s -= abs(query - key[key_at + k])
        scores[k] = s
    for k in range(count):
        rows[k] = value_at + k * D


@inner_loop
def _block_of(edge, at, blocks, query):
    """The last of a run's blocks whose first coordinate is at or below the query's, else the first."""
    low, high = 0, blocks
    while high - low > 1:
        middle = (low + high) // 2
        below = edge[at + middle] <= query
        low, high = middle if below else low, high if below else middle
    return low


@inner_loop
def _read(stage, task, thread, state):
    """The row of one query of one head."""
    sizes = state.sizes
    kv_heads, heads, weight_heads, queries, D = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]
    length, capacity, origin, run_capacity, run_origin, block_capacity, block = sizes[5], sizes[6], sizes[7], sizes[8], sizes[9], sizes[10], sizes[11]
    batch, i, head = task // (heads * queries), task // heads % queries, task % heads
    key_row = batch * kv_heads + head // (heads // kv_heads)
    weight_row = batch * weight_heads + head // (heads // weight_heads)
    key, value, weight, order, out = state.key, state.value, state.weight, state.order, state.out
    scores, rows = state.scores[thread], state.rows[thread]
    query = state.query[(batch * heads + head) * queries + i] if key.size else np.float32(0)
    first, last = state.first[batch * queries + i], length - queries + i + 1
    weighted = weight.size > 0
    at = task * D
    for d in range(D):
        out[at + d] = 0
    highest, normalizer = np.float32(LOWEST), np.float32(0)
    for r in range(state.runs.shape[0] + 1):
        if r < state.runs.shape[0]:
            begin, end = state.runs[r, 0], state.runs[r, 1]
        else:  # the tail
            begin, end = (state.runs[r - 1, 1] if r else first), last
        if r < state.runs.shape[0] and begin >= first and end <= last:
            blocks, base = (end - begin) // block, state.runs[r, 2]
            own = _block_of(state.edge, key_row * block_capacity + base, blocks, query)
            place = key_row * run_capacity + run_origin + begin + own * block
            for k in range(block):
                token = order[place + k] + origin
                score = -abs(query - key[key_row * capacity + token])
                scores[k] = score + weight[weight_row * capacity + token] if weighted else score
                rows[k] = (key_row * capacity + token) * D
            count = _fill(scores, rows, block)
            new, keep, weights = _weigh(scores, count, highest)
            _scale(out, at, keep, D)
            _add_rows(out, at, scores, value, rows, count, D)
            highest, normalizer = new, keep * normalizer + weights
            for side in range(2):
                other = own - 1 + 2 * side
                if 0 <= other < blocks:
                    index = 2 * (weight_row * block_capacity + base + other) + side
                    score = np.float32(state.potential[index] + (query if side else -query))
                    new = max(highest, score)
                    keep, add = exp2_f32((highest - new) * np.float32(LOG2_E)), exp2_f32((score - new) * np.float32(LOG2_E))
                    for d in range(0, D, 8):
                        store(out, at + d, madd(splat(add), load(state.sums, index * D + d), splat(keep) * load(out, at + d)))
                    highest, normalizer = new, keep * normalizer + add * state.unit[index]
            continue
        begin, end = max(begin, first), min(end, last)
        for start in range(begin, end, TILE):
            n, token = min(TILE, end - start), start + origin
            _score_in_order(scores, rows, n, query, key, key_row * capacity + token, weight, weight_row * capacity + token, (key_row * capacity + token) * D, D)
            count = _fill(scores, rows, n)
            new, keep, weights = _weigh(scores, count, highest)
            _scale(out, at, keep, D)
            _add_rows(out, at, scores, value, rows, count, D)
            highest, normalizer = new, keep * normalizer + weights
    _scale(out, at, np.float32(1) / normalizer, D)


# ---- Sorted runs


@inner_loop
def _merge(order, at, first, middle, last, key, key_at, scratch):
    """The places of two runs, order[at + first:at + middle] and the rest to at + last, each by rising coordinate, into one."""
    n = middle - first
    for i in range(n):
        scratch[i] = order[at + first + i]
    i, j, to = 0, at + middle, at + first
    while i < n and j < at + last:
        a, b = scratch[i], order[j]
        left = key[key_at + a] <= key[key_at + b]
        order[to] = a if left else b
        i += np.int64(left)
        j += np.int64(not left)
        to += 1
    for rest in range(i, n):
        order[to] = scratch[rest]
        to += 1


@inner_loop
def _sum_blocks(state, begin, end, base, row, weight_row, thread):
    """The sums of a run's blocks, then over them."""
    sizes = state.sizes
    D, capacity, origin, run_capacity, run_origin = sizes[4], sizes[6], sizes[7], sizes[8], sizes[9]
    block_capacity, block = sizes[10], sizes[11]
    key, weight, order, potential, unit, sums = state.key, state.weight, state.order, state.potential, state.unit, state.sums
    factors, rows, logs = state.scores[thread], state.rows[thread], state.logs[thread]
    weighted, blocks = weight.size > 0, (end - begin) // block
    first = weight_row * block_capacity + base
    for b in range(blocks):
        place = row * run_capacity + run_origin + begin + b * block
        state.edge[row * block_capacity + base + b] = key[row * capacity + origin + order[place]]
        for side in range(2):
            index, y = 2 * (first + b) + side, LOWEST
            for k in range(block):
                token = order[place + k] + origin
                x = np.float64(key[row * capacity + token])
                log = -x if side else x
                if weighted:
                    log += weight[weight_row * capacity + token]
                logs[k], rows[k] = log, (row * capacity + token) * D
                y = log if log > y else y
            z = np.float32(0)
            for k in range(block):
                factors[k] = exp2_f32(np.float32((logs[k] - y) * LOG2_E))
                z += factors[k]
            for d in range(D):
                sums[index * D + d] = 0
            _add_rows(sums, index * D, factors, state.value, rows, block, D)
            potential[index], unit[index] = y, z
    for side in range(2):
        for b in range(1, blocks):
            step = -1 if side else 1
            index = 2 * (first + (blocks - 1 - b if side else b)) + side
            before = index - 2 * step
            y = max(potential[before], potential[index])
            keep, add = exp2_f32(np.float32((potential[before] - y) * LOG2_E)), exp2_f32(np.float32((potential[index] - y) * LOG2_E))
            for d in range(0, D, 8):
                store(sums, index * D + d, madd(splat(keep), load(sums, before * D + d), splat(add) * load(sums, index * D + d)))
            unit[index] = keep * unit[before] + add * unit[index]
            potential[index] = y


@inner_loop
def _arrange(stage, task, thread, state):
    """First the orders of a row of keys, then the sums of a row of weights."""
    sizes = state.sizes
    kv_heads, weight_heads = sizes[0], sizes[2]
    if stage == 0:
        key_at, at = task * sizes[6] + sizes[7], task * sizes[8] + sizes[9]
        for step in range(state.steps.shape[0]):
            first, middle, last = state.steps[step]
            if first < middle:
                _merge(state.order, at, first, middle, last, state.key, key_at, state.scratch[thread])
                continue
            width = 1
            while width < last - first:
                for start in range(first, last - width, 2 * width):
                    _merge(state.order, at, start, start + width, min(last, start + 2 * width), state.key, key_at, state.scratch[thread])
                width *= 2
        return
    row = task // weight_heads * kv_heads + task % weight_heads // (weight_heads // kv_heads)
    for r in range(state.runs.shape[0]):
        _sum_blocks(state, state.runs[r, 0], state.runs[r, 1], state.runs[r, 2], row, task, thread)


def state_of_threads(state: State | None) -> State:
    """A state with room for each thread and else empty: the one given if it has that."""
    threads = thread_count()
    if state is not None and len(state.rows) == threads:
        return state
    empty = np.empty(0, np.float32)
    return State(np.zeros(len(Sizes._fields), np.int64), empty, np.empty(0, np.int64), empty, empty, empty, np.empty(0, np.int32), empty, np.empty(0), empty, empty,
                 np.empty((0, 3), np.int64), np.empty((0, 3), np.int64), np.empty((threads, 0), np.int32), np.zeros((threads, TILE + 16), np.float32),
                 np.zeros((threads, TILE + 16), np.int64), np.zeros((threads, TILE + 16)), empty)


def read(state: State, tasks: int, tokens: int):
    """Fills out, B queries heads tasks, each of about so many rows of tokens. Threads where they win: from about 2,000 rows of 64 numbers on (two cores)."""
    run_stages(_read, [tasks], state, threads=tasks * tokens * state.sizes[4] > 1 << 17)


def arrange(state: State, rows: int, weight_rows: int):
    """Sorts and merges by steps, then makes the sums of the runs."""
    run_stages(_arrange, [rows, weight_rows], state)
