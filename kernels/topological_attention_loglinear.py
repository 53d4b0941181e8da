"""
Topological attention, backend "loglinear": exact in O(T log T), and in O(T) without coordinates ("key only").

    s_ij = -|a_i - b_j| + F_i - F_j + c_j        max(doc_start_i, i - window + 1) <= j <= i        F_i = sum over t <= i of g_t, g_t <= 0
    out_i = (1/Z_i) sum_j e^{s_ij - M_i} v_j     M_i = max_j s_ij     Z_i = sum_j e^{s_ij - M_i}

Exact in O(T log T): e^-|a - b| is separable on either side of the query once keys are sorted. Tokens lie in chunks of C = 33..64 (T = C 2^L after padding);
pairs inside a chunk are a dense tile, and at each of L levels the keys of a node of s = C, 2C, ... T/2 tokens act on the queries of its right neighbour.
One sort of the keys is partitioned stably, level by level, as in a wavelet tree. Keys x_1 <= x_2 <= ... of a node with log-weights w have the sums
    U_r = sum over t <= r of e^{w_t + x_t - y_r} [v_t, 1]      y_r = max over t <= r of (w_t + x_t)          w_t = c_t + F_m - F_t, m the last token of the node
    V_r = sum over t >= r of e^{w_t - x_t - z_r} [v_t, 1]      z_r = max over t >= r of (w_t - x_t)
no factor above 1, for blocks of c = C / 4 keys as a product with a c x c tile, between blocks as a scan of block ends. A query with r keys at or below it reads
    e^{F_i - F_m - M_i} (e^{y_r - a_i} U_r + e^{z_{r+1} + a_i} V_{r+1})
On a GPU the same sums by topological_attention_loglinear_triton.py. A window of W cuts the tokens into blocks of W: the lower triangle of every block, and the strictly upper triangle of its queries and the keys before it.

Backward: with u_i = dOut_i / Z_i, delta_i = dOut_i . out_i / Z_i, p_ij = e^{s_ij - M_i} and E_ij = p_ij (u_i . v_j - delta_i)
    dv_j = sum_i p_ij u_i      da_i = -sum_j sgn(a_i - b_j) E_ij      db_j = sum_i sgn(a_i - b_j) E_ij      dc_j = sum_i E_ij      dg_t = -sum over j >= t of dc_j
where sgn(0) = 0. The sums over i are the same operator transposed (right queries act on left keys) on rows [u, -delta], each side of the key by itself.

Work for one token of one head (counted; e bytes an element; D + 1 columns a row, products and masked pairs included):
    forward    2 (C + c L)(D + 1) FLOPs and at most C + c L exponentials      backward   twice that
    bytes      forward about 4 e (D + 1)(L + 1): each level reads v, writes U and V and reads two rows of them for every second token; backward three times that

Source: Moriondo, Topological Transformer (Tauformer), TechRxiv 176800983.30631144, for scores of scalars; the algorithm and its gradient are ours. Sorted partitions
by bits of the position: Grossi, Gupta and Vitter, wavelet trees, 2003. Rows kept with the exponent of their maximum: Milakov and Gimelshein, arxiv.org/abs/1805.02867.
"""

import itertools, math
from collections.abc import Iterator
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.segmented_scan import TILES, running, segmented_scan, starts_of, sums_after


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def query_heads(query: Tensor | None, value: Tensor, log_decay: Tensor | None) -> int:
    return next((x.shape[2] for x in (query, log_decay) if x is not None), value.shape[2])


# Rows of D + 1 columns are kept in the compute dtype. What there is one of a token (coordinates, weights, potentials, shifts) is float64: exponents are
# differences of numbers up to 1e4 and more, and these arrays are a D-th of the work.

CHUNK = 64                  # most tokens in a chunk, whose pairs are a dense tile
BLOCKS = 4                  # blocks of sorted keys in a chunk's worth of them
TABLE_ROWS = 1 << 16        # rows of U and V that are made at a time, unless one level of one row has more: T
READ_TOKENS = 1 << 13       # tokens that read at a time
PART_TOKENS = 1 << 15       # tokens of rows that go through together
LOG2_E = math.log2(math.e)
LOWEST = -1e30              # the potential of no key at all: finite, as it is subtracted from itself


class _Triangle(NamedTuple):
    """Half of a square of scores of R rows, n queries and n keys: pairs of equal document with key position <= query position (lower) or > (upper)."""
    lower: bool
    query: Tensor | None            # (R, n) coordinates in the compute dtype; None: key only
    key: Tensor | None
    log_decay: Tensor | None        # (R, n) float64, of lower triangles; upper ones have it in their biases
    query_bias: Tensor | None       # (R, n) float64, as key_bias
    key_bias: Tensor | None
    query_doc: Tensor | None        # (R, n) int64: the start of the document, rising; in an upper triangle 1 on either side for what is in the document
    key_doc: Tensor | None          # of the boundary, 0 and 2 for the rest


class _Group(NamedTuple):
    """
    Levels of one pass. Sources are the keys, in the transposed operator the queries; with nodes of s tokens, those of one node of each pair act on the targets
    of the other. Of the R n tokens S = R n / 2 are sources of a level, node by node, sorted in each; as many are targets, by position.
    """
    sizes: list[int]                # s of each level
    order: Tensor                   # (levels, S) the sources' tokens
    coordinates: Tensor             # (levels, S) of the sources, in the compute dtype
    weight: Tensor | None           # (levels, S) float64: log-weights of the sources
    target_bias: Tensor | None      # (levels, S) float64: what is added to a target's scores
    ranks: Tensor                   # (1 or 2, levels, S): how many sources of the other node are <= the target [and how many are < it]

    def part(self, targets: slice) -> "_Group":
        return _Group(self.sizes, *(None if x is None else x[..., targets] for x in self[1:]))


def _geometry(length: int) -> tuple[int, int]:
    """(C, L): length <= C 2^L, C <= CHUNK and a multiple of BLOCKS where L > 0."""
    levels = ((length - 1) // CHUNK).bit_length()
    return (BLOCKS * -(-length // (BLOCKS << levels)) if levels else length), levels


def _halves(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(R, n, ...) -> the left and the right nodes of every pair, (R, P, size, ...) each."""
    return x.view(x.shape[0], -1, 2, size, *x.shape[2:]).unbind(2)


def _sum_given(*terms: Tensor | None) -> Tensor | None:
    given = [term for term in terms if term is not None]
    return sum(given[1:], given[0]) if given else None


def _masked(allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape, dtype=torch.float64, device=allowed.device).masked_fill_(~allowed, -math.inf)


def _level_biases(triangle: _Triangle, size: int, transposed: bool, row_max: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """
    What the level of node size s adds to the scores of its sources and of its targets, (R, P, s) each or None: F_i - F_m, F_m - F_j + c_j, -inf outside the
    document that crosses m; and -M_i where queries are the sources.
    """
    query_side = 1 if triangle.lower else 0
    half = lambda x, side: None if x is None else _halves(x, size)[side]
    query_terms, key_terms = [half(triangle.query_bias, query_side)], [half(triangle.key_bias, 1 - query_side)]
    if triangle.log_decay is not None:
        left, right = _halves(triangle.log_decay, size)
        query_terms.append(right.cumsum(-1))
        key_terms.append(sums_after(left))
    if triangle.query_doc is not None:
        query_doc, key_doc = half(triangle.query_doc, query_side), half(triangle.key_doc, 1 - query_side)
        crossing = query_doc[..., :1] if triangle.lower else 1
        query_terms.append(_masked(query_doc == crossing))
        key_terms.append(_masked(key_doc == crossing))
    if transposed:
        query_terms.append(-half(row_max, query_side))
    sources, targets = (query_terms, key_terms) if transposed else (key_terms, query_terms)
    return _sum_given(*sources), _sum_given(*targets)


def _sorted_with_ranks(source: Tensor, target: Tensor, source_doc: Tensor | None, target_doc: Tensor | None, strict: bool) -> tuple[Tensor, Tensor]:
    """
    order (R, n): source positions by document, then coordinate, then position. ranks (1 or 2, R, n): how many sources come at or before each target, and if
    strict also how many before it. Sources of other documents keep their places whatever their coordinates: documents are isolated bit for bit.
    """
    values, order = source.sort(stable=True)
    ranks = [torch.searchsorted(values, target.contiguous(), right=right) for right in ((True, False) if strict else (True,))]
    if source_doc is not None:
        n = source.shape[-1]
        composite, order = (source_doc * (n + 1) + torch.searchsorted(values, source)).sort(stable=True)
        ranks = [torch.searchsorted(composite, target_doc * (n + 1) + rank) for rank in ranks]
    return order, torch.stack(ranks)


def _levels(triangle: _Triangle, transposed: bool, strict: bool, chunk: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """
    (s, order (R, P, s), ranks (1 or 2, R, P, s)) from the largest nodes down, as in _Group but with positions in the row: one sort, then a stable partition by
    a bit of the position at every level, which the targets' ranks follow.
    """
    sides = [(triangle.key, triangle.key_doc), (triangle.query, triangle.query_doc)]
    (source, source_doc), (target, target_doc) = reversed(sides) if transposed else sides
    order, ranks = _sorted_with_ranks(source, target, source_doc, target_doc, strict)
    (R, size), n = source.shape, source.shape[1]
    while size > chunk:
        size //= 2
        order, ranks = order.view(R, -1, 2 * size), ranks.view(len(ranks), R, -1, 2 * size)
        is_left = order < torch.arange(size, n, 2 * size, device=order.device)[:, None]
        lefts = is_left.cumsum(-1)
        place = torch.where(is_left, lefts - 1, torch.arange(size, 3 * size, device=order.device) - lefts)
        order = torch.empty_like(order).scatter_(-1, place, order)
        left_ranks = F.pad(lefts, (1, 0)).expand(len(ranks), -1, -1, -1).gather(-1, ranks)
        if triangle.lower != transposed:
            yield size, order[..., :size], left_ranks[..., size:]
        else:
            yield size, order[..., size:], ranks[..., :size] - left_ranks[..., :size]
        ranks = torch.cat((left_ranks[..., :size], ranks[..., size:] - left_ranks[..., size:]), -1)


def _tiles(x: Tensor, weight: Tensor | None, up: Tensor, down: Tensor) -> Tensor:
    """Blocks of c sorted coordinates, with log-weights and potentials (blocks, c) float64 -> (blocks, 2, c, c): the factors of U and of V."""
    c = x.shape[-1]
    lower = torch.ones(c, c, dtype=x.dtype, device=x.device).tril_()
    sides = torch.stack((lower, lower.T))
    if weight is None:  # differences of coordinates, which need no float64
        return (x[:, :, None] - x[:, None, :]).abs_().mul_(-LOG2_E).exp2_()[:, None] * sides
    scaled = x.double() * LOG2_E
    exponent = torch.stack((weight + scaled, weight - scaled), 1)[:, :, None, :] - torch.stack((up, down), 1)[..., None]
    return exponent.add_(sides.log()).to(x.dtype).exp2_()


def _table(rows: Tensor, group: _Group, block: int, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """
    Running sums of a group's sources, in buffer, and each sum's potential. rows (tokens, E).

    For each block of c sources the sums U within the block, then V; after all blocks U over all the blocks of the node up to this one, then V from this one on;
    one row of zeros, whose potential is -inf.
    """
    count, S = group.order.shape
    blocks, sums, x = count * S // block, 2 * count * S, group.coordinates.double() * LOG2_E
    if group.weight is None:
        up, down = x, -x
    else:
        by_node = lambda potential: [row.view(-1, size) for row, size in zip(potential, group.sizes)]
        up = torch.cat([running(torch.maximum, row, None).flatten() for row in by_node(group.weight + x)]).clamp_(min=LOWEST)
        down = torch.cat([running(torch.maximum, row, None, backward=True).flatten() for row in by_node(group.weight - x)]).clamp_(min=LOWEST)
    thin = (group.order, group.coordinates, group.weight, up, down)
    order, coordinates, weight, up, down = (None if x is None else x.reshape(blocks, block) for x in thin)
    table, step = buffer[:sums + 2 * blocks + 1], max(1, TILES // block ** 2)
    local = table[:sums].view(blocks, 2 * block, -1)
    for lo in range(0, blocks, step):
        part = slice(lo, min(lo + step, blocks))
        tiles = _tiles(coordinates[part], None if weight is None else weight[part], up[part], down[part])
        picked = rows.index_select(0, order[part].flatten()).view(-1, block, rows.shape[-1])
        torch.bmm(tiles.flatten(1, 2), picked, out=local[part])
    index, node_blocks = torch.arange(S // block, device=rows.device), torch.tensor(group.sizes, device=rows.device)[:, None] // block
    first = (index - index % node_blocks).repeat(2, 1)  # the first block of each block's node, from either end
    ends = torch.cat((up[:, -1].view(count, -1), down[:, 0].view(count, -1).flip(1)))
    end_sums = torch.cat((local[:, block - 1].view(count, S // block, -1), local[:, block].view(count, S // block, -1).flip(1)))
    after_up, after_down = segmented_scan(ends, end_sums, first).chunk(2)
    table[sums:sums + blocks] = after_up.flatten(0, 1)
    table[sums + blocks:-1] = after_down.flip(1).flatten(0, 1)
    table[-1] = 0
    return table, torch.cat((torch.stack((up, down), 1).flatten(), up[:, -1], down[:, 0], up.new_full((1,), -math.inf)))


def _entries(group: _Group, inclusive: bool, block: int) -> Tensor:
    """
    (levels, S, 2, 2): the rows of their table that the targets read: U of the last source below and of all blocks before its block, V of the first source above
    and of all blocks after its; the table's last row where there is none. inclusive: sources that equal a target are below it, else neither below nor above.
    """
    count_below, count_up_to = group.ranks[0 if inclusive else 1], group.ranks[0]
    sums, sizes = count_below.numel(), torch.tensor(group.sizes, device=count_below.device)[:, None]
    blocks, none = sums // block, 2 * sums + 2 * (sums // block)
    target = torch.arange(sums, device=sizes.device).view(count_below.shape)
    node = target - target % sizes
    below, above = node + count_below - 1, node + count_up_to
    below_block, above_block = below // block, above // block
    columns = (torch.where(count_below > 0, below + block * below_block, none), torch.where(count_below > block, below_block + (2 * sums - 1), none),
               torch.where(count_up_to < sizes, above + block * (above_block + 1), none),
               torch.where(count_up_to < sizes - block, above_block + (2 * sums + blocks + 1), none))
    return torch.stack(columns, -1).unflatten(-1, (2, 2))


def _spread(x: Tensor, sizes: list[int], right: bool, out: Tensor):
    """x (levels, S, ...) of targets, which are right or left in their pairs of nodes, into out (tokens, levels, ...), where other tokens keep what they have."""
    for level, size in enumerate(sizes):
        out.unflatten(0, (-1, 2, size))[:, int(right), :, level] = x[level].unflatten(0, (-1, size))


def _groups(triangle: _Triangle, chunk: int, transposed: bool, strict: bool, row_max: Tensor | None) -> Iterator[tuple[_Group, int]]:
    """With the tokens that can go through together: whole pairs of the group's largest nodes."""
    source = triangle.query if transposed else triangle.key
    R, n = source.shape
    row_start, left = torch.arange(0, R * n, n, device=source.device)[:, None, None], (n // chunk).bit_length() - 1
    levels = _levels(triangle, transposed, strict, chunk)
    while left:
        span = chunk << left
        sizes, orders, ranks = zip(*itertools.islice(levels, max(1, min(left, TABLE_ROWS // span))))
        left -= len(sizes)
        order = torch.stack([(order + row_start).flatten() for order in orders])
        weights, target_biases = zip(*(_level_biases(triangle, size, transposed, row_max) for size in sizes))
        weight = None if weights[0] is None else torch.stack([x.gather(-1, order % size).flatten() for x, order, size in zip(weights, orders, sizes)])
        target_bias = None if target_biases[0] is None else torch.stack([x.flatten() for x in target_biases])
        group = _Group(sizes, order, source.flatten()[order], weight, target_bias, torch.stack([x.flatten(1) for x in ranks], 1))
        yield group, max(span, TABLE_ROWS // len(sizes) // span * span)


def _reads(triangle: _Triangle, rows: Tensor, chunk: int, transposed: bool = False, inclusive: tuple[bool, ...] = (True,), row_max: Tensor | None = None
           ) -> Iterator[tuple[slice, Tensor, list[tuple[Tensor, Tensor]]]]:
    """
    What the levels hand over, some levels l and some tokens m at a time: (tokens of the R n, table of rows, one (index, score) for each of inclusive, see
    _entries). A token takes table[index] times 2^score, the index (m, 2, 2 l) naming rows of sources below it, then above; the score (m, 2, 2 l), float64,
    still lacks the token's own coordinate. rows (R, n, E) are the keys', in the transposed operator the queries', whose weights are then lowered by row_max.
    """
    R, n, columns = rows.shape
    tokens, block = R * n, chunk // BLOCKS
    longest = max(n, min(TABLE_ROWS, tokens * (n // chunk).bit_length()))
    buffer = rows.new_empty(longest + longest // max(block, 1) + 1, columns)  # one for all: fresh memory costs as much as several passes over it
    for group, step in _groups(triangle, chunk, transposed, not all(inclusive), row_max):
        for start in range(0, tokens, step):
            part = group.part(slice(start // 2, (start + step) // 2))
            table, potential = _table(rows.view(tokens, columns), part, block, buffer)
            reads = []
            for own in inclusive:
                index = torch.full((2 * part.order.shape[1], 2, len(part.sizes), 2), len(table) - 1, device=rows.device)
                _spread(_entries(part, own, block), part.sizes, triangle.lower != transposed, index.transpose(1, 2))
                score = potential.index_select(0, index.flatten()).view(index.shape)
                if part.target_bias is not None:
                    bias = score.new_zeros(len(score), len(part.sizes))
                    _spread(part.target_bias, part.sizes, triangle.lower != transposed, bias)
                    score += bias[:, None, :, None]
                reads.append((index.flatten(2), score.flatten(2)))
            for lo in range(0, len(index), READ_TOKENS):
                some = slice(lo, min(lo + READ_TOKENS, len(index)))
                yield slice(start + some.start, start + some.stop), table, [(index[some], score[some]) for index, score in reads]


def _take(table: Tensor, index: Tensor, factors: Tensor) -> Tensor:
    """The sum of a target's factors times its rows: index, factors (m, 2, k) -> (m, E)."""
    return F.embedding_bag(index.flatten(1), table, mode="sum", per_sample_weights=factors.flatten(1))


def _factors(score: Tensor, target: Tensor, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
    """2^{score} for targets at these coordinates, lowered by shift: score (m, 2, k), which is overwritten, target, shift (m,), all float64."""
    lowered = (target, -target) if shift is None else (shift + target, shift - target)
    return score.sub_(torch.stack(lowered, -1)[..., None]).to(dtype).exp2_()


def _chunk_costs(triangle: _Triangle, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    """The pairs inside chunks, some chunks at a time: minus their scores (chunks, C, C), float64."""
    by_chunk = lambda x: None if x is None else x.view(-1, chunk)
    query, key = (by_chunk(x).double() * LOG2_E for x in (triangle.query, triangle.key))
    total = None if triangle.log_decay is None else running(torch.add, by_chunk(triangle.log_decay), starts_of(by_chunk(triangle.query_doc)))
    query_bias, key_bias = (_sum_given(by_chunk(bias), decay) for bias, decay in
                            ((triangle.query_bias, total), (triangle.key_bias, None if total is None else -total)))
    query_doc, key_doc = by_chunk(triangle.query_doc), by_chunk(triangle.key_doc)
    hidden = torch.ones(chunk, chunk, dtype=torch.bool, device=query.device).triu_(1)
    hidden = query.new_zeros(chunk, chunk).masked_fill_(hidden if triangle.lower else ~hidden, math.inf)
    step = max(1, TILES // chunk ** 2)
    for lo in range(0, len(query), step):
        part = slice(lo, min(lo + step, len(query)))
        costs = (query[part, :, None] - key[part, None, :]).abs_()
        if query_bias is not None:
            costs -= query_bias[part, :, None]
        if key_bias is not None:
            costs -= key_bias[part, None, :]
        if query_doc is not None:
            costs.masked_fill_(query_doc[part, :, None] != key_doc[part, None, :], math.inf)
        yield part, costs.add_(hidden)


def _apply(triangle: _Triangle, rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows (R, n, E) of the keys -> (sum over j of e^{s_ij - M_i} rows_j (R, n, E), M (R, n) float64: max of s_ij, LOWEST where a query sees no key)."""
    R, n, columns = rows.shape
    chunk, _ = _geometry(n)
    out, row_max = torch.empty_like(rows), rows.new_empty(R, n, dtype=torch.float64)
    out_chunks, max_chunks, row_chunks = out.view(-1, chunk, columns), row_max.view(-1, chunk), rows.view(-1, chunk, columns)
    for part, costs in _chunk_costs(triangle, chunk):
        least = costs.amin(-1).clamp_(max=-LOWEST)
        torch.bmm(torch.sub(least[..., None], costs, out=costs).to(rows.dtype).exp2_(), row_chunks[part], out=out_chunks[part])
        max_chunks[part] = -least
    query, totals, highest = (triangle.query.double() * LOG2_E).flatten(), out.flatten(0, 1), row_max.flatten()
    for tokens, table, ((index, score),) in _reads(triangle, rows, chunk):
        below, above = score[..., ::2].amax(-1).unbind(-1)  # the sums of whole blocks have no higher potential than those inside the next block
        higher = torch.maximum(highest[tokens], torch.maximum(below - query[tokens], above + query[tokens]))
        taken = _take(table, index, _factors(score, query[tokens], higher, rows.dtype))
        torch.addcmul(taken, totals[tokens], (highest[tokens] - higher).exp2_().to(rows.dtype)[:, None], out=totals[tokens])
        highest[tokens] = higher
    return out, row_max


def _apply_backward(triangle: _Triangle, rows: Tensor, out_rows: Tensor, row_max: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """out_rows (R, n, E) is [u, -delta] of the queries. Gradients of query and key coordinates (R, n), sum over i of p_ij out_rows_i (R, n, E)."""
    R, n, columns = rows.shape
    chunk, _ = _geometry(n)
    grad_rows, grad_query, grad_key = torch.empty_like(rows), rows.new_empty(R, n), rows.new_empty(R, n)
    by_chunk = lambda x: x.view(-1, chunk, *x.shape[2:])
    for part, costs in _chunk_costs(triangle, chunk):
        weights = costs.add_(by_chunk(row_max)[part, :, None]).neg_().to(rows.dtype).exp2_()
        torch.bmm(weights.mT, by_chunk(out_rows)[part], out=by_chunk(grad_rows)[part])
        signed = weights.mul_(by_chunk(out_rows)[part] @ by_chunk(rows)[part].mT)
        signed *= (by_chunk(triangle.query)[part, :, None] - by_chunk(triangle.key)[part, None, :]).sign_()
        by_chunk(grad_query)[part] = -signed.sum(-1)
        by_chunk(grad_key)[part] = signed.sum(-2)
    query, key = ((x.double() * LOG2_E).flatten() for x in (triangle.query, triangle.key))
    own, upstream, query_totals, key_totals, totals = (x.flatten(0, 1) for x in (rows, out_rows, grad_query, grad_key, grad_rows))
    slope, highest = rows.new_tensor([-1.0, 1.0])[:, None], row_max.flatten()  # of a score by the target's coordinate, sources below and above
    for tokens, table, ((index, score),) in _reads(triangle, rows, chunk, inclusive=(False,)):
        factors = _factors(score, query[tokens], highest[tokens], rows.dtype).mul_(slope)
        query_totals[tokens] += _take(table, index, factors).mul_(upstream[tokens]).sum(-1)
    for tokens, table, ((index, score), (strict_index, strict_score)) in _reads(triangle, out_rows, chunk, True, (True, False), row_max):
        totals[tokens] += _take(table, index, _factors(score, key[tokens], None, rows.dtype))
        factors = _factors(strict_score, key[tokens], None, rows.dtype).mul_(slope)
        key_totals[tokens] += _take(table, strict_index, factors).mul_(own[tokens]).sum(-1)
    return grad_query, grad_key, grad_rows


def _running_sums(potential: Tensor, rows: Tensor, doc: Tensor | None, backward: bool, own: bool) -> tuple[Tensor, Tensor]:
    """
    For each position the sum over all before it (backward: after it; own: with itself) in its document of e^{potential_t - y} rows_t, and y, their maximum.
    potential (R, n), doc (R, n) or None, rows (R, n, E).
    """
    turn = lambda x: x.flip(1) if backward else x
    potential, rows, starts = turn(potential), turn(rows), starts_of(None if doc is None else turn(doc))
    first = torch.zeros_like(potential, dtype=torch.int64)
    if starts is not None:
        first = torch.where(starts, torch.arange(rows.shape[1], device=rows.device), 0).cummax(-1).values
    highest = running(torch.maximum, potential, starts).clamp(min=LOWEST)
    sums = segmented_scan(highest, rows * (potential - highest).to(rows.dtype).exp2_()[..., None], first)
    if not own:
        sums, highest = F.pad(sums[:, :-1], (0, 0, 1, 0)), F.pad(highest[:, :-1], (1, 0), value=LOWEST)
    return turn(sums), turn(highest)


def _scan_potentials(triangle: _Triangle, like: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of queries and keys (R, n) without coordinates: s_ij is their sum; and the documents of a lower triangle."""
    total = None if triangle.log_decay is None else running(torch.add, triangle.log_decay, starts_of(triangle.query_doc))
    query = _sum_given(like.new_zeros(like.shape[:2], dtype=torch.float64), triangle.query_bias, total)
    key = _sum_given(like.new_zeros(like.shape[:2], dtype=torch.float64), triangle.key_bias, None if total is None else -total)
    if triangle.query_doc is None or triangle.lower:
        return query, key, triangle.query_doc
    return query.masked_fill(triangle.query_doc != 1, -math.inf), key.masked_fill(triangle.key_doc != 1, -math.inf), None


def _apply_scan(triangle: _Triangle, rows: Tensor) -> tuple[Tensor, Tensor]:
    """_apply without coordinates, in O(n)."""
    query, key, doc = _scan_potentials(triangle, rows)
    sums, highest = _running_sums(key, rows, doc, backward=not triangle.lower, own=triangle.lower)
    return sums, (query + highest).clamp_(min=LOWEST)


def _apply_scan_backward(triangle: _Triangle, out_rows: Tensor, row_max: Tensor) -> Tensor:
    query, key, doc = _scan_potentials(triangle, out_rows)
    sums, highest = _running_sums(query - row_max, out_rows, doc, backward=triangle.lower, own=triangle.lower)
    return sums * (key + highest).to(out_rows.dtype).exp2_()[..., None]


class _Part(NamedTuple):
    """Some rows of B and H, R = batches x heads, their T tokens in blocks of W, each padded to n."""
    batches: slice
    heads: slice
    kv_heads: slice
    repeats: int                    # rows that share a row of keys and values
    rows: Tensor                    # (R, T / W, n, D + 1): [v, 1], 0 in the padding
    triangles: list[tuple[_Triangle, slice, slice]]     # with the blocks of its queries and of its keys


def _parts(query, key, value, log_decay, key_bias, doc_start, window, heads) -> Iterator[_Part]:
    B, T, kv_heads, D = value.shape
    group, width, dtype = heads // kv_heads, min(window or T, T), compute_dtype(query, key, value, log_decay, key_bias)
    chunk, levels = _geometry(width)
    for batches, part_heads in _shares(B, heads, group, T):
        repeats = min(group, part_heads.stop - part_heads.start)
        part_kv = slice(part_heads.start // group, -(-part_heads.stop // group))
        rows_of = lambda x, of, dtype: None if x is None else x[batches, :, of].transpose(1, 2).to(dtype)
        by_query = lambda x, dtype: None if x is None else rows_of(x, part_heads, dtype).flatten(0, 1)
        by_key = lambda x, dtype: None if x is None else rows_of(x, part_kv, dtype)[:, :, None].expand(-1, -1, repeats, *[-1] * (x.dim() - 2)).flatten(0, 2)
        fold = lambda x, fill=0: None if x is None else _fold(x, width, chunk << levels, fill)
        values = by_key(value, dtype)
        rows = values.new_empty(len(values), -(-T // width), chunk << levels, D + 1)
        _fold(values, width, chunk << levels, out=rows[..., :D])
        rows[..., D] = 1
        doc = None if doc_start is None else doc_start[batches].to(torch.int64).repeat_interleave(part_heads.stop - part_heads.start, 0)
        a, b = fold(by_query(query, dtype)), fold(by_key(key, dtype))
        g, c = (None if x is None else x * LOG2_E for x in (fold(by_query(log_decay, torch.float64)), fold(by_key(key_bias, torch.float64))))
        yield _Part(batches, part_heads, part_kv, repeats, rows, _triangles(a, b, g, c, fold(doc, T), width, rows))


def _shares(B: int, heads: int, group: int, T: int) -> Iterator[tuple[slice, slice]]:
    """Rectangles of batches and heads of about PART_TOKENS tokens: whole groups of heads that share keys, or parts of one."""
    wanted = max(1, PART_TOKENS // T)
    if wanted >= heads:
        for start in range(0, B, wanted // heads):
            yield slice(start, min(start + wanted // heads, B)), slice(0, heads)
        return
    step = wanted // group * group or max(n for n in range(1, wanted + 1) if group % n == 0)
    for batch in range(B):
        for start in range(0, heads, step):
            yield slice(batch, batch + 1), slice(start, min(start + step, heads))


def _fold(x: Tensor, width: int, length: int, fill=0, out: Tensor | None = None) -> Tensor:
    """(R, T, ...) -> (R, T / width, length, ...), in out if given; what x does not reach is filled."""
    whole, rest = divmod(x.shape[1], width)
    if out is None:
        out = x.new_empty(x.shape[0], -(-x.shape[1] // width), length, *x.shape[2:])
    out[:, :, width:] = fill
    out[:, :whole, :width] = x[:, :whole * width].unflatten(1, (whole, width))
    if rest:
        out[:, whole, :rest] = x[:, whole * width:]
        out[:, whole, rest:] = fill
    return out


def _unfold(x: Tensor, width: int, T: int) -> Tensor:
    return x[:, :, :width].flatten(1, 2)[:, :T]


def _triangles(query, key, log_decay, key_bias, doc, width: int, rows: Tensor) -> list[tuple[_Triangle, slice, slice]]:
    """All as _fold returns them: the lower triangle of each block and, where there are several, the upper one of each block's queries and the keys before it."""
    R, blocks, length, _ = rows.shape
    flat = lambda x: None if x is None else x.flatten(0, 1)
    result = [(_Triangle(True, flat(query), flat(key), flat(log_decay), None, flat(key_bias), flat(doc), flat(doc)), slice(0, blocks), slice(0, blocks))]
    if blocks > 1:
        later, earlier = slice(1, blocks), slice(0, blocks - 1)
        pick = lambda x, part: None if x is None else x[:, part].flatten(0, 1).contiguous()
        inside = torch.arange(length, device=rows.device) < width
        query_doc, key_doc = torch.ones(R, blocks - 1, length, dtype=torch.int64, device=rows.device), inside.long().expand(R, blocks - 1, -1)
        if doc is not None:
            query_doc, key_doc = torch.where(doc[:, 1:] == doc[:, 1:, :1], 1, 2), ((doc[:, :-1] == doc[:, 1:, :1]) & inside).long()
        query_bias, decay_after = (None, None) if log_decay is None else (log_decay.cumsum(-1), sums_after(log_decay))
        triangle = _Triangle(False, pick(query, later), pick(key, earlier), None, pick(query_bias, later),
                             _sum_given(pick(key_bias, earlier), pick(decay_after, earlier)), flat(query_doc).contiguous(), flat(key_doc).contiguous())
        result.append((triangle, later, earlier))
    return result


def _forward(query, key, value, log_decay, key_bias, doc_start, window, heads) -> tuple[Tensor, Tensor, Tensor]:
    B, T, _, D = value.shape
    out = value.new_empty(B, T, heads, D, dtype=compute_dtype(query, key, value, log_decay, key_bias))
    row_max, normalizer = (out.new_empty(B, heads, T, dtype=dtype) for dtype in (torch.float64, out.dtype))
    for part in _parts(query, key, value, log_decay, key_bias, _simplified(doc_start), window, heads):
        rows, width, apply = part.rows, min(window or T, T), _apply_scan if query is None else _apply
        (lower, *_), *upper = part.triangles
        sums, highest = (x.unflatten(0, (len(rows), -1)) for x in apply(lower, rows.flatten(0, 1)))
        for triangle, queries, keys in upper:
            more, own = (x.unflatten(0, (len(rows), -1)) for x in apply(triangle, rows[:, keys].flatten(0, 1).contiguous()))
            together = torch.maximum(highest[:, queries], own)
            factors = [(x - together).exp2_().to(rows.dtype)[..., None] for x in (highest[:, queries], own)]
            sums[:, queries] = sums[:, queries] * factors[0] + more * factors[1]
            highest[:, queries] = together
        sums, shape = _unfold(sums, width, T), (part.batches.stop - part.batches.start, -1, T)
        torch.div(sums[..., :D].view(*shape, D), sums[..., D:].view(*shape, 1), out=out[part.batches, :, part.heads].transpose(1, 2))
        row_max[part.batches, part.heads] = _unfold(highest, width, T).view(shape)
        normalizer[part.batches, part.heads] = sums[..., D].view(shape)
    return out, row_max, normalizer


def _backward(grad_out, query, key, value, log_decay, key_bias, doc_start, window, out, row_max, normalizer) -> list[Tensor]:
    """Gradients of query, key, value, log_decay and key_bias, of those that are not None."""
    B, T, heads, D = out.shape
    dtype, width, doc_start = out.dtype, min(window or T, T), _simplified(doc_start)
    zeros = lambda x: None if x is None else torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    grad_query, grad_key, grad_value, grad_decay, grad_bias = map(zeros, (query, key, value, log_decay, key_bias))
    for part in _parts(query, key, value, log_decay, key_bias, doc_start, window, heads):
        rows = part.rows
        length, batches = rows.shape[2], part.batches.stop - part.batches.start
        upstream, result = (x[part.batches, :, part.heads].transpose(1, 2).flatten(0, 1) for x in (grad_out, out))
        inverse = normalizer[part.batches, part.heads].reshape(-1, T, 1).reciprocal()
        out_rows = torch.empty_like(rows)
        _fold(upstream * inverse, width, length, out=out_rows[..., :D])
        _fold((upstream * result).sum(-1, keepdim=True) * -inverse, width, length, out=out_rows[..., D:])
        highest = _fold(row_max[part.batches, part.heads].reshape(-1, T), width, length, math.inf)  # queries of the padding weigh nothing
        grad_rows = torch.zeros_like(rows)
        coordinates = [rows.new_zeros(rows.shape[:3]) for _ in range(2)]
        for triangle, queries, keys in part.triangles:
            of_keys, of_queries, own_highest = (x.flatten(0, 1).contiguous() for x in (rows[:, keys], out_rows[:, queries], highest[:, queries]))
            split = lambda x: x.unflatten(0, (len(rows), -1))
            if query is None:
                grad_rows[:, keys] += split(_apply_scan_backward(triangle, of_queries, own_highest))
                continue
            own = _apply_backward(triangle, of_keys, of_queries, own_highest)
            for total, blocks, gradient in zip((*coordinates, grad_rows), (queries, keys, keys), own):
                total[:, blocks] += split(gradient)
        by_row = lambda x: x.unflatten(0, (batches, -1))
        shared = lambda x: by_row(x).unflatten(1, (-1, part.repeats)).sum(2).transpose(1, 2)
        grad_value[part.batches, :, part.kv_heads] += shared(_unfold(grad_rows, width, T)[..., :D])
        if query is not None:
            grad_query[part.batches, :, part.heads] = by_row(_unfold(coordinates[0], width, T)).transpose(1, 2)
            grad_key[part.batches, :, part.kv_heads] += shared(_unfold(coordinates[1], width, T))
        if key_bias is None and log_decay is None:
            continue
        column_sums = _unfold((grad_rows * rows).sum(-1), width, T)
        if key_bias is not None:
            grad_bias[part.batches, :, part.kv_heads] += shared(column_sums)
        if log_decay is not None:
            index = torch.arange(T, device=out.device)
            first = torch.zeros_like(index).expand(batches, T) if doc_start is None else doc_start[part.batches]
            starts_here = first == index
            after = running(torch.add, by_row(column_sums.double()), None if doc_start is None else starts_here[:, None], backward=True)
            grad_decay[part.batches, :, part.heads] = -after.masked_fill_(starts_here[:, None], 0).transpose(1, 2).to(dtype)
    pairs = ((grad_query, query), (grad_key, key), (grad_value, value), (grad_decay, log_decay), (grad_bias, key_bias))
    return [gradient.to(x.dtype) for gradient, x in pairs if x is not None]


def _simplified(doc_start: Tensor | None) -> Tensor | None:
    """None where a glance shows a single document; a GPU would have to be waited for."""
    return None if doc_start is None or doc_start.device.type == "cpu" and not doc_start.any() else doc_start


def _passes(*tensors: Tensor | None):
    """The forward and the backward pass for query, key, value, log_decay and key_bias."""
    from kernels import topological_attention_loglinear_triton as on_gpu  # it imports this file
    return (on_gpu.loglinear_forward, on_gpu.loglinear_backward) if tensors[0] is not None and on_gpu.serves(*tensors) else (_forward, _backward)


@torch.library.custom_op("knotgpt::topological_attention", mutates_args=())
def _loglinear(query: Optional[Tensor], key: Optional[Tensor], value: Tensor, log_decay: Optional[Tensor], key_bias: Optional[Tensor],
               doc_start: Optional[Tensor], window: Optional[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(out, M, Z): out (B, T, H, D) and Z (B, H, T) in the compute dtype, M (B, H, T) float64 the shift of each row's exponents."""
    with torch.autocast(value.device.type, enabled=False):
        forward, _ = _passes(query, key, value, log_decay, key_bias)
        return forward(query, key, value, log_decay, key_bias, doc_start, window, query_heads(query, value, log_decay))


@_loglinear.register_fake
def _(query, key, value, log_decay, key_bias, doc_start, window):
    B, T, _, D = value.shape
    out = value.new_empty(B, T, query_heads(query, value, log_decay), D, dtype=compute_dtype(query, key, value, log_decay, key_bias))
    return out, *(out.new_empty(B, out.shape[2], T, dtype=dtype) for dtype in (torch.float64, out.dtype))


@torch.library.custom_op("knotgpt::topological_attention_backward", mutates_args=())
def _loglinear_backward(grad_out: Tensor, query: Optional[Tensor], key: Optional[Tensor], value: Tensor, log_decay: Optional[Tensor],
                        key_bias: Optional[Tensor], doc_start: Optional[Tensor], window: Optional[int], out: Tensor, row_max: Tensor,
                        normalizer: Tensor) -> list[Tensor]:
    with torch.autocast(value.device.type, enabled=False):
        _, backward = _passes(query, key, value, log_decay, key_bias)
        return backward(grad_out, query, key, value, log_decay, key_bias, doc_start, window, out, row_max, normalizer)


@_loglinear_backward.register_fake
def _(grad_out, query, key, value, log_decay, key_bias, doc_start, window, out, row_max, normalizer):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value, log_decay, key_bias) if x is not None]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)


def _autograd_backward(ctx, grad_out, *_):
    *inputs, out, row_max, normalizer = ctx.saved_tensors
    gradients = iter(_loglinear_backward(grad_out, *inputs, ctx.window, out, row_max, normalizer))
    return *(None if x is None else next(gradients) for x in inputs[:5]), None, None


_loglinear.register_autograd(_autograd_backward, setup_context=_setup_context)


def _flops(query, value, log_decay, window) -> int:
    """Products of one forward pass."""
    B, T, kv_heads, D = value
    heads = next((shape[2] for shape in (query, log_decay) if shape is not None), kv_heads)
    width = min(window or T, T)
    chunk, levels = _geometry(width)
    triangles = 2 * -(-T // width) - 1
    return 2 * B * heads * triangles * (chunk << levels) * (chunk + chunk // BLOCKS * levels if query is not None else chunk) * (D + 1)


@register_flop_formula(torch.ops.knotgpt.topological_attention)
def _(query, key, value, log_decay, key_bias, doc_start, window, *, out_shape=None, **_) -> int:
    return _flops(query, value, log_decay, window)


@register_flop_formula(torch.ops.knotgpt.topological_attention_backward)
def _(grad_out, query, key, value, log_decay, key_bias, doc_start, window, *_, out_shape=None, **__) -> int:
    return (1 if query is None else 2) * _flops(query, value, log_decay, window)


def topological_attention_loglinear(query: Tensor | None, key: Tensor | None, value: Tensor, log_decay: Tensor | None = None, key_bias: Tensor | None = None,
                                    doc_start: Tensor | None = None, window: int | None = None) -> Tensor:
    """topological_attention by this backend. What the arguments are is not checked here."""
    # The rounded result would not do for the backward pass: the gradient of log_decay is a running sum of differences from it.
    return _loglinear(query, key, value, log_decay, key_bias, doc_start, window)[0].to(value.dtype)
