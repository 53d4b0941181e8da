"""
Topological attention, one token after another, on a CPU: the reads and the sorted runs of cache.py as compiled loops.

A query takes pieces of tokens, one after another, with the largest score so far m, the sum of weights z and the row
out:
    m' = max(m, scores)
    z <- e^{m - m'} z + sum of e^{score - m'} unit
    out <- e^{m - m'} out + sum of e^{score - m'} row
A piece is up to TILE tokens in their order, whose units are 1. Of a sorted run it is the block that the query's
coordinate falls into, with the sums of all blocks below it and of all above it: two rows whose units are sums of
weights. A run is read so where the query sees all of it, else token by token: windows and documents need nothing more.

A run is made by merging sorted halves of positions; values stay where they are, in their order. Then come each block's
sums of [v, 1], seen from its largest potential (weight + b from above, weight - b from below), and their running sums
over the blocks, upwards and downwards. Exponents are differences of float64 numbers.

Source: the algorithm is ours; runs of doubling size: Bentley and Saxe, Decomposable searching problems I (1980); rows
kept with the exponent of their maximum: Milakov and Gimelshein, arxiv.org/abs/1805.02867
"""

from typing import NamedTuple

import numpy as np

from kernels.loops import exp2_f32, inner_loop, run_stages, thread_count
from kernels.simd import distance, exp2, largest, load, madd, peak, splat, store, total
from kernels.topological_attention.reference import LOG2_E, LOWEST

TILE = 128              # most tokens of a piece
SCRATCH = TILE + 16     # numbers of a thread's arrays for a piece
THREADED = 1 << 17      # numbers of values from which on threads win: 2,000 rows of 64, measured on two cores


class Sizes(NamedTuple):
    """
    Numbers that all tasks get. A token's position counts from its row's first token; position + origin is its index in
    an array of tokens.
    """
    kv_heads: int
    heads: int              # of queries
    weight_heads: int       # kv_heads, or heads where log-weights have as many
    queries: int            # the last tokens of a row
    D: int
    length: int             # tokens of a row, those that are forgotten included
    capacity: int           # of the arrays of tokens
    origin: int
    run_capacity: int       # of the array `order`
    run_origin: int
    block_capacity: int     # of the arrays of blocks
    block: int              # tokens of a block


class State(NamedTuple):
    """What tasks read and write: contiguous arrays, the large ones flat; absent ones are empty."""
    sizes: np.ndarray       # int64, as Sizes
    query: np.ndarray       # (B heads queries) float32
    first: np.ndarray       # (B queries) int64: the first position that a query sees
    key: np.ndarray         # (B kv_heads capacity) float32
    value: np.ndarray       # (B kv_heads capacity D) float32
    weight: np.ndarray      # (B weight_heads capacity) float32
    order: np.ndarray       # (B kv_heads run_capacity) int32: positions of each run, by rising coordinate
    edge: np.ndarray        # (B kv_heads block_capacity) float32: the first coordinate of each block
    # (B weight_heads block_capacity 2) float64: of the sums over a run's blocks up to each, and from each
    potential: np.ndarray
    unit: np.ndarray        # (B weight_heads block_capacity 2) float32: those sums' weights
    sums: np.ndarray        # (B weight_heads block_capacity 2 D) float32: those sums' rows
    runs: np.ndarray        # (runs, 3) int64: the first position, the end, and where its blocks begin
    # (steps, 3) int64: first position, middle and end of two runs that are merged; first = middle of a run to be sorted
    steps: np.ndarray
    scratch: np.ndarray     # (threads, most tokens of a run) int32
    scores: np.ndarray      # (threads, SCRATCH) float32
    rows: np.ndarray        # (threads, SCRATCH) int64: where the value of each token begins
    logs: np.ndarray        # (threads, SCRATCH) float64
    out: np.ndarray         # (B queries heads D) float32


@inner_loop
def _sizes_of(state):
    """Returns the state's Sizes."""
    s = state.sizes
    return Sizes(s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11])


# ---- Reading ----------------------------------------------------------------


@inner_loop
def _add_rows(to, at, factors, values, rows, count, D):
    """Adds sum over k of factors[k] values[rows[k]:rows[k] + D] to to[at:at + D], k below count, a multiple of 4."""
    for k in range(0, count, 4):
        f0, f1 = splat(factors[k]), splat(factors[k + 1])
        f2, f3 = splat(factors[k + 2]), splat(factors[k + 3])
        r0, r1 = rows[k], rows[k + 1]
        r2, r3 = rows[k + 2], rows[k + 3]
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
    """Adds tokens of no weight up to a multiple of 8, which it returns."""
    filled = (count + 7) // 8 * 8
    for k in range(count, filled):
        scores[k] = -np.inf
        rows[k] = rows[0]
    return filled


@inner_loop
def _weigh(scores, count, highest):
    """Sets scores to e^{score - m}, m the largest of them and `highest`; returns m, e^{highest - m} and their sum."""
    m = splat(highest)
    for k in range(0, count, 8):
        m = largest(load(scores, k), m)
    new = peak(m)
    m = splat(new)
    sums = splat(np.float32(0))
    for k in range(0, count, 8):
        p = exp2((load(scores, k) - m) * splat(np.float32(LOG2_E)))
        store(scores, k, p)
        sums = sums + p
    return new, exp2_f32((highest - new) * np.float32(LOG2_E)), total(sums)


@inner_loop
def _score_in_order(scores, rows, count, query, key, key_at, weight, weight_at, value_at, D):
    """Sets the scores and rows of tokens that follow each other in the arrays, from these indices on."""
    coordinates = key.size > 0
    weighted = weight.size > 0

    # 8 scores at a time, and the rest one by one
    vectors = count // 8 * 8
    for k in range(0, vectors, 8):
        s = splat(np.float32(0))
        if weighted:
            s = load(weight, weight_at + k)
        if coordinates:
            s = s - distance(splat(query), load(key, key_at + k))
        store(scores, k, s)
    for k in range(vectors, count):
        s = weight[weight_at + k] if weighted else np.float32(0)
        if coordinates:
            s -= abs(query - key[key_at + k])
        scores[k] = s

    for k in range(count):
        rows[k] = value_at + k * D


@inner_loop
def _block_of(edge, at, blocks, query):
    """Returns the last of a run's blocks whose first coordinate is at or below the query's, else the first block."""
    low = 0
    high = blocks
    while high - low > 1:
        middle = (low + high) // 2
        below = edge[at + middle] <= query
        low = middle if below else low
        high = high if below else middle
    return low


@inner_loop
def _read(stage, task, thread, state):
    """Makes the row of one query of one head."""
    # which query, and where its keys and weights are
    sizes = _sizes_of(state)
    D = sizes.D
    batch = task // (sizes.heads * sizes.queries)
    i = task // sizes.heads % sizes.queries
    head = task % sizes.heads
    key_row = batch * sizes.kv_heads + head // (sizes.heads // sizes.kv_heads)
    weight_row = batch * sizes.weight_heads + head // (sizes.heads // sizes.weight_heads)
    first = state.first[batch * sizes.queries + i]
    last = sizes.length - sizes.queries + i + 1
    key = state.key
    value = state.value
    weight = state.weight
    order = state.order
    out = state.out
    scores = state.scores[thread]
    rows = state.rows[thread]
    query = np.float32(0)
    if key.size:
        query = state.query[(batch * sizes.heads + head) * sizes.queries + i]
    weighted = weight.size > 0

    # nothing is read yet
    at = task * D
    for d in range(D):
        out[at + d] = 0
    highest = np.float32(LOWEST)
    normalizer = np.float32(0)
    runs = state.runs.shape[0]
    for r in range(runs + 1):
        if r < runs:
            begin, end = state.runs[r, 0], state.runs[r, 1]
        else:  # the tokens after the last run
            begin, end = (state.runs[r - 1, 1] if r else first), last

        if r < runs and begin >= first and end <= last:
            # a run that is seen as a whole: the query's block
            blocks = (end - begin) // sizes.block
            base = state.runs[r, 2]
            query_block = _block_of(state.edge, key_row * sizes.block_capacity + base, blocks, query)
            in_order = key_row * sizes.run_capacity + sizes.run_origin + begin + query_block * sizes.block
            for k in range(sizes.block):
                token = order[in_order + k] + sizes.origin
                score = -abs(query - key[key_row * sizes.capacity + token])
                scores[k] = score + weight[weight_row * sizes.capacity + token] if weighted else score
                rows[k] = (key_row * sizes.capacity + token) * D
            count = _fill(scores, rows, sizes.block)
            new, keep, weights = _weigh(scores, count, highest)
            _scale(out, at, keep, D)
            _add_rows(out, at, scores, value, rows, count, D)
            highest, normalizer = new, keep * normalizer + weights

            # and the sums of the blocks on either side
            for side in range(2):
                other = query_block - 1 + 2 * side
                if 0 <= other < blocks:
                    index = 2 * (weight_row * sizes.block_capacity + base + other) + side
                    score = np.float32(state.potential[index] + (query if side else -query))
                    new = max(highest, score)
                    keep = exp2_f32((highest - new) * np.float32(LOG2_E))
                    add = exp2_f32((score - new) * np.float32(LOG2_E))
                    for d in range(0, D, 8):
                        kept = splat(keep) * load(out, at + d)
                        store(out, at + d, madd(splat(add), load(state.sums, index * D + d), kept))
                    highest, normalizer = new, keep * normalizer + add * state.unit[index]
            continue

        # else token by token, in their order
        begin = max(begin, first)
        end = min(end, last)
        for start in range(begin, end, TILE):
            n = min(TILE, end - start)
            key_at = key_row * sizes.capacity + start + sizes.origin
            weight_at = weight_row * sizes.capacity + start + sizes.origin
            _score_in_order(scores, rows, n, query, key, key_at, weight, weight_at, key_at * D, D)
            count = _fill(scores, rows, n)
            new, keep, weights = _weigh(scores, count, highest)
            _scale(out, at, keep, D)
            _add_rows(out, at, scores, value, rows, count, D)
            highest, normalizer = new, keep * normalizer + weights
    _scale(out, at, np.float32(1) / normalizer, D)


# ---- Sorted runs ------------------------------------------------------------


@inner_loop
def _merge(order, at, first, middle, last, key, key_at, scratch):
    """
    Merges two runs, the positions order[at + first:at + middle] and those from there to at + last, each by rising
    coordinate, into one.
    """
    # the first run makes room
    n = middle - first
    for i in range(n):
        scratch[i] = order[at + first + i]

    # the smaller of the two first positions, until one run is used up
    i = 0
    j = at + middle
    to = at + first
    while i < n and j < at + last:
        a, b = scratch[i], order[j]
        left = key[key_at + a] <= key[key_at + b]
        order[to] = a if left else b
        i += np.int64(left)
        j += np.int64(not left)
        to += 1

    # what is left of the first run; what is left of the second one is there
    for rest in range(i, n):
        order[to] = scratch[rest]
        to += 1


@inner_loop
def _sum_block(state, sizes, order_at, row, weight_row, index, side, thread):
    """Makes the sums of one block, seen from one side: sums, potential and unit at this index."""
    D = sizes.D
    key = state.key
    factors = state.scores[thread]
    rows = state.rows[thread]
    logs = state.logs[thread]
    weighted = state.weight.size > 0

    # the logarithms of the weights, and their largest
    y = LOWEST
    for k in range(sizes.block):
        token = state.order[order_at + k] + sizes.origin
        x = np.float64(key[row * sizes.capacity + token])
        log = -x if side else x
        if weighted:
            log += state.weight[weight_row * sizes.capacity + token]
        logs[k] = log
        rows[k] = (row * sizes.capacity + token) * D
        y = log if log > y else y

    # the sums, scaled by it
    z = np.float32(0)
    for k in range(sizes.block):
        factors[k] = exp2_f32(np.float32((logs[k] - y) * LOG2_E))
        z += factors[k]
    for d in range(D):
        state.sums[index * D + d] = 0
    _add_rows(state.sums, index * D, factors, state.value, rows, sizes.block, D)
    state.potential[index] = y
    state.unit[index] = z


@inner_loop
def _sum_blocks(state, begin, end, base, row, weight_row, thread):
    """Makes the sums of a run's blocks, then their running sums."""
    sizes = _sizes_of(state)
    D = sizes.D
    potential = state.potential
    unit = state.unit
    sums = state.sums
    blocks = (end - begin) // sizes.block
    first = weight_row * sizes.block_capacity + base

    # of each block
    for b in range(blocks):
        order_at = row * sizes.run_capacity + sizes.run_origin + begin + b * sizes.block
        edge = state.key[row * sizes.capacity + sizes.origin + state.order[order_at]]
        state.edge[row * sizes.block_capacity + base + b] = edge
        for side in range(2):
            _sum_block(state, sizes, order_at, row, weight_row, 2 * (first + b) + side, side, thread)

    # over the blocks, upwards for side 0 and downwards for side 1
    for side in range(2):
        for b in range(1, blocks):
            step = -1 if side else 1
            index = 2 * (first + (blocks - 1 - b if side else b)) + side
            before = index - 2 * step
            y = max(potential[before], potential[index])
            keep = exp2_f32(np.float32((potential[before] - y) * LOG2_E))
            add = exp2_f32(np.float32((potential[index] - y) * LOG2_E))
            for d in range(0, D, 8):
                added = splat(add) * load(sums, index * D + d)
                store(sums, index * D + d, madd(splat(keep), load(sums, before * D + d), added))
            unit[index] = keep * unit[before] + add * unit[index]
            potential[index] = y


@inner_loop
def _arrange(stage, task, thread, state):
    """Makes, in the first stage, the orders of a row of keys, and in the second one the sums of a row of weights."""
    sizes = _sizes_of(state)
    if stage == 0:
        # `task` is a row of keys: runs are merged, a new one is sorted by merging runs of 1, 2, 4, .. tokens
        key_at = task * sizes.capacity + sizes.origin
        at = task * sizes.run_capacity + sizes.run_origin
        scratch = state.scratch[thread]
        for step in range(state.steps.shape[0]):
            first, middle, last = state.steps[step]
            if first < middle:
                _merge(state.order, at, first, middle, last, state.key, key_at, scratch)
                continue
            width = 1
            while width < last - first:
                for start in range(first, last - width, 2 * width):
                    end = min(last, start + 2 * width)
                    _merge(state.order, at, start, start + width, end, state.key, key_at, scratch)
                width *= 2
        return

    # `task` is a row of weights
    batch = task // sizes.weight_heads
    row = batch * sizes.kv_heads + task % sizes.weight_heads // (sizes.weight_heads // sizes.kv_heads)
    for r in range(state.runs.shape[0]):
        _sum_blocks(state, state.runs[r, 0], state.runs[r, 1], state.runs[r, 2], row, task, thread)


# ---- Host functions ---------------------------------------------------------


def state_of_threads(state: State | None) -> State:
    """Returns a state with room for each thread and else empty: this one, if it has that."""
    threads = thread_count()
    if state is not None and len(state.rows) == threads:
        return state
    floats = np.empty(0, np.float32)
    integers = np.empty(0, np.int64)
    return State(
        sizes=np.zeros(len(Sizes._fields), np.int64),
        query=floats,
        first=integers,
        key=floats,
        value=floats,
        weight=floats,
        order=np.empty(0, np.int32),
        edge=floats,
        potential=np.empty(0),
        unit=floats,
        sums=floats,
        runs=integers.reshape(0, 3),
        steps=integers.reshape(0, 3),
        scratch=np.empty((threads, 0), np.int32),
        scores=np.zeros((threads, SCRATCH), np.float32),
        rows=np.zeros((threads, SCRATCH), np.int64),
        logs=np.zeros((threads, SCRATCH)),
        out=floats,
    )


def read(state: State, tasks: int, tokens: int):
    """Fills `out`: B queries heads tasks, each of which reads about so many rows of tokens."""
    run_stages(_read, [tasks], state, threads=tasks * tokens * state.sizes[4] > THREADED, kind=State)


def arrange(state: State, rows: int, weight_rows: int):
    """Sorts and merges by steps, then makes the sums of the runs."""
    run_stages(_arrange, [rows, weight_rows], state, kind=State)
