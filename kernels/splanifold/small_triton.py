"""
Splanifold, backend "triton", small groups: K <= 4 coordinates, n <= 8 outputs, "concat", S = 2. A thread holds whole
groups of a few tokens, all in registers and in float32, one kernel a pass. basis_triton has the weights c_m of a
token's matrices.

The deviations of a group have sum 0, so the last one is left out:
    matrix_m delta = sum over k < K - 1 of (column_k - column_K-1) delta_k
For one token and group:
    forward     4 n K + 4 (K - 1) multiply-adds in float32; read e K, write e n bytes at e bytes a value
    backward    a little more than twice as many; read e (K + n), write e K + (6 K - 2) n / 32
    corrections half as many multiply-adds again

Status: never run on a GPU; the kernels are tested in Triton's interpreter and compiled ahead of time, and the tokens of
a thread are a choice, not a measurement.
"""

import torch
from torch import Tensor

from kernels.backend import jit, tl, triton
from kernels.splanifold.basis_triton import (
    CORRECTION,
    FOUR,
    NODE,
    Layout,
    basis,
    coefficients,
    combine,
    control_gradients,
    power,
    scalars,
    uncorrected,
)

# ---- Triton kernels ---------------------------------------------------------
# table ((K - 1) 6 + 4, N, G) float32: the columns above, of every k those of the six matrices, then the spine. Every
# tile is (groups,), one for each of TOKENS tokens and each coordinate or output, in tuples: with tokens as a dimension
# the compiler may spread them over threads, and did.

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
            b_needed = tl.maximum(b_needed, tl.where(inside, uncorrected(b_t, eps2, threshold, K), 0))
    deltas = ()
    for k in tl.static_range(K):
        for i in tl.static_range(TOKENS):
            deltas = deltas + (by_token[i * K + k],)
    return ts, factors, deltas, b_needed


@jit
def _small_coefficients(b_t, b_s, m: tl.constexpr, eps2, K: tl.constexpr, WARP: tl.constexpr):
    """_coefficients of the m-th of the six matrices."""
    if WARP:
        return coefficients(b_t, b_s, m % 3, m // 3, eps2, K, 2, NODE)
    elif m < 4:
        return coefficients(b_t, b_s, m, 0, eps2, K, 2, FOUR)
    else:
        return coefficients(b_t, b_s, m - 4, 0, eps2, K, 2, CORRECTION)


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
            features = features + (basis(ts[i], place % 2, place >= 2, 2)[0],)
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
                weights = weights + basis(ts[i], place % 2, place >= 2, 2)
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

FORWARD_TOKENS = 8      # at a time
BACKWARD_TOKENS = 2
SPLIT_TOKENS = 128      # of a program of the backward pass


def serves(layout: Layout) -> bool:
    """Returns whether these kernels are made for such sizes."""
    return layout.J == 1 and layout.S == 2 and layout.K <= 4 and layout.N <= 8 and layout.G > 1


def _launch(layout: Layout, tokens: int) -> dict:
    """Returns the launch with a thread for each group of a block and so many tokens at a time."""
    block_g = power(min(layout.G, 128), 32)
    return dict(G=layout.G, K=layout.K, N=layout.N, WARP=layout.WARP, TOKENS=tokens, BLOCK_G=block_g,
                num_warps=block_g // 32)


def forward(r: Tensor, controls: tuple, layout: Layout, expansion: float, delta_max: float, eps: float) -> Tensor:
    """Returns splanifold's result for r (M, G, K), contiguous."""
    M = r.shape[0]
    launch = _launch(layout, FORWARD_TOKENS)
    grid = triton.cdiv(M, launch["TOKENS"]) * triton.cdiv(layout.G, launch["BLOCK_G"])
    out = torch.empty(M, layout.G * layout.N, dtype=r.dtype, device=r.device)
    _splanifold_small_fwd_kernel[(grid,)](
        r, _table(layout, controls), out, M, *scalars(r, expansion, eps), delta_max ** -2, **launch)
    return out


def backward(grad: Tensor, r: Tensor, controls: tuple, layout: Layout, expansion: float, delta_max: float,
             eps: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Returns the gradient of r and those of the controls, in float32."""
    M = r.shape[0]
    table = _table(layout, controls)
    splits = triton.cdiv(M, SPLIT_TOKENS)
    d_r = torch.empty_like(r)
    partial = torch.empty(splits, *table.shape, dtype=torch.float32, device=r.device)

    launch = _launch(layout, BACKWARD_TOKENS)
    _splanifold_small_bwd_kernel[(splits * triton.cdiv(layout.G, launch["BLOCK_G"]),)](
        r, table, grad, d_r, partial, M, SPLIT_TOKENS, *scalars(r, expansion, eps), delta_max ** -2, **launch)
    return d_r, control_gradients(layout, *_table_gradients(layout, partial.sum(0)))


def _table(layout: Layout, controls: tuple) -> Tensor:
    """Returns the kernels' table."""
    spine, matrices = combine(layout, *controls)
    columns = (matrices[..., :-1] - matrices[..., -1:]).permute(3, 0, 2, 1).flatten(0, 1)
    return torch.cat((columns, spine.flatten(1, 2).permute(1, 2, 0)))


def _table_gradients(layout: Layout, d_table: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of combine's results."""
    columns = d_table[:-4].unflatten(0, (layout.K - 1, 6)).permute(1, 3, 2, 0)
    spine = d_table[-4:].permute(2, 0, 1).unflatten(1, (2, 2))
    return spine, torch.cat((columns, -columns.sum(-1, keepdim=True)), -1)
