"""
Residual with separate gains for the part of y along x and the part across it, and the RMSNorm that follows, in one pass
over memory.

    c = <x, y> / n'      n' = max(<x, x>, eps), or <x, x> + eps      lam: stream_scale      rows x, y of D numbers
    z = lam x + alpha . (y - c x) + beta . c x = (lam + c (beta - alpha)) . x + alpha . y
    h = weight . z rho   rho = (mean(z^2) + eps_norm)^-1/2, of z as it is rounded

alpha, beta: 1, a number or a number a channel. Where neither is given the residual is plain, z = lam x + y, and there
is no c. Backward, with gz and gh the gradients of z and h, u = weight . gh, m = 1 where n' depends on x, else 0:
    g = gz + rho (u - z rho^2 <u, z> / D)      gc = <g, (beta - alpha) . x>
    dy = alpha . g + (gc / n') x               dx = (lam + c (beta - alpha)) . g + (gc / n') (y - 2 m c x)
    dalpha = sum over rows of g . (y - c x)    dbeta of c (g . x)    dweight of gh . z rho    dlam of <g, x>

For N rows of D numbers, A = N D e bytes at e bytes a number, operations counted for channel gates with a weight
(scalars and 4 to 8 bytes a row aside):
    forward    4A: read x, y, write z, h                      14 N D FLOPs
    backward   6A: read x, y, gz, gh, write dx, dy            45 N D FLOPs, and 24 D bytes a program for the column sums
    plain      4A; 4A: read z, gz, gh, write dx = dy          5 N D; 10 N D
    kept for the backward pass: x, y, and c and rho of every row; plain: z and rho, with lam x too
Two to three FLOPs a byte in bfloat16: bound by memory. Of a plain residual with lam the backward pass moves 6A. A gain
of the first layer's input (x0) is left out: this trainer mixes it into the stream at the head of a block, before the
residual.

Sources: lof310/projects (the two gains, in prose; the equations are derived here); Orthogonal Residual Update,
arxiv.org/abs/2505.11881 (alpha = 1, beta = 0); Zhang and Sennrich, Root Mean Square Layer Normalization,
arxiv.org/abs/1910.07467.
Status: the CPU's loops are measured in benchmarks/results/; never run on a GPU; the kernels are tested in Triton's
interpreter and compiled ahead of time, and their launch table is a choice, not a measurement.
"""

import math
from functools import reduce
from types import SimpleNamespace
from typing import Optional

import torch
from torch import Tensor

from kernels.backend import array, cpu_operation, loops_serve, parallel_loops

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:  # no Triton for this platform: the reference serves it
    triton, tl, jit = None, SimpleNamespace(constexpr=None), lambda function: function


def residual_norm_reference(x: Tensor, y: Tensor, alpha: Tensor | None = None, beta: Tensor | None = None,
                            weight: Tensor | None = None, stream_scale: Tensor | None = None, eps: float = 1e-8,
                            eps_norm: float = 1e-6, eps_mode: str = "clamp") -> tuple[Tensor, Tensor]:
    """
    (z, h) term by term: any device, any floating dtype, differentiable by autograd. Arguments as residual_norm's.

    Runs in the widest dtype among the arguments, float32 at least; z is rounded to x's before h is made of it.
    """
    dtype = reduce(torch.promote_types,
                   (gain.dtype for gain in (alpha, beta, weight, stream_scale) if gain is not None),
                   torch.promote_types(x.dtype, torch.float32))
    stream, branch = x.to(dtype), y.to(dtype)
    if alpha is None and beta is None:
        z = branch + (stream if stream_scale is None else stream_scale * stream)
    else:
        a, b, scale = (1.0 if gain is None else gain.to(dtype) for gain in (alpha, beta, stream_scale))
        n = stream.square().sum(-1, keepdim=True)
        c = (stream * branch).sum(-1, keepdim=True) / (n + eps if eps_mode == "add" else n.clamp_min(eps))
        z = (scale + c * (b - a)) * stream + a * branch
    z = z.to(x.dtype)
    wide = z.to(dtype)
    h = wide * (wide.square().mean(-1, keepdim=True) + eps_norm).rsqrt()
    return z, (h if weight is None else weight * h).to(x.dtype)


def scaled_sum_norm_reference(x: Tensor, y: Tensor, scales: Tensor, eps_norm: float = 1e-6) -> tuple[Tensor, Tensor]:
    """
    (scales[0] x + scales[1] y, its norm) term by term, in the dtypes and with the rounding of residual_norm_reference.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, scales.dtype), torch.float32)
    z = (scales[0] * x.to(dtype) + scales[1] * y.to(dtype)).to(x.dtype)
    wide = z.to(dtype)
    return z, (wide * (wide.square().mean(-1, keepdim=True) + eps_norm).rsqrt()).to(x.dtype)


# ---- Triton kernels ---------------------------------------------------------
# A program works on ROWS rows at a time, in tiles (ROWS, BLOCK) that cover their D channels; sums are float32. Rows
# from N on and channels from D on are read as 0 and not written. Row offsets are int64. Gains are tensors of 1 or D
# numbers. x, y and the gains are read again for every step over the rows at hand: they stay in L1, and registers are
# what is short. The eviction policies differ so that the compiler does not make one reading of them.

@jit
def _place(i: tl.constexpr, offs_r, stride, N, D: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets of tile i of the rows in their matrix, and which of them exist."""
    offs_d = i * BLOCK + tl.arange(0, BLOCK)
    mask = (offs_r < N)[:, None]
    if D % BLOCK != 0:
        mask = mask & (offs_d < D)[None, :]
    return offs_r[:, None] * stride + offs_d[None, :], mask


@jit
def _tile(ptr, i: tl.constexpr, offs_r, stride, N, D: tl.constexpr, BLOCK: tl.constexpr, POLICY: tl.constexpr):
    offs, mask = _place(i, offs_r, stride, N, D, BLOCK)
    return tl.load(ptr + offs, mask=mask, other=0.0, eviction_policy=POLICY)


@jit
def _store_tile(ptr, b_tile, i: tl.constexpr, offs_r, N, D: tl.constexpr, BLOCK: tl.constexpr):
    """To rows of a contiguous matrix."""
    offs, mask = _place(i, offs_r, D, N, D, BLOCK)
    tl.store(ptr + offs, b_tile.to(ptr.dtype.element_ty), mask=mask)


@jit
def _gain(ptr, i: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
          POLICY: tl.constexpr):
    """
    A gain's part of tile i: 1 without one, a number (COLUMNS = 1), or (ROWS, BLOCK), as a tile of other shape would be
    laid out otherwise.
    """
    if ptr is None:
        return 1.0
    elif COLUMNS == 1:
        return tl.load(ptr).to(tl.float32)
    else:
        offs_d = i * BLOCK + tl.arange(0, BLOCK)
        offs_d = tl.broadcast_to(offs_d[None, :], (ROWS, BLOCK))
        if D % BLOCK != 0:
            return tl.load(ptr + offs_d, mask=offs_d < D, other=0.0, eviction_policy=POLICY).to(tl.float32)
        else:
            return tl.load(ptr + offs_d, eviction_policy=POLICY).to(tl.float32)


@jit
def _gates(alpha_ptr, beta_ptr, i: tl.constexpr, D: tl.constexpr, ALPHA_COLUMNS: tl.constexpr,
           BETA_COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, POLICY: tl.constexpr):
    return _gain(alpha_ptr, i, D, ALPHA_COLUMNS, ROWS, BLOCK, POLICY), _gain(beta_ptr, i, D, BETA_COLUMNS, ROWS, BLOCK,
                                                                             POLICY)


@jit
def _mixed(b_x, b_y, b_c, b_scale, b_alpha, b_beta, MIX: tl.constexpr):
    """z in float32."""
    if MIX:
        return (b_scale + b_c[:, None] * (b_beta - b_alpha)) * b_x.to(tl.float32) + b_alpha * b_y.to(tl.float32)
    else:
        return b_scale * b_x.to(tl.float32) + b_y.to(tl.float32)


@jit
def _residual_norm_fwd_kernel(x_ptr, y_ptr, alpha_ptr, beta_ptr, weight_ptr, scale_ptr, z_ptr, h_ptr, c_ptr, rho_ptr,
                              x_row, y_row, N, eps, eps_norm, D: tl.constexpr, ALPHA_COLUMNS: tl.constexpr,
                              BETA_COLUMNS: tl.constexpr, MIX: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr,
                              BLOCK: tl.constexpr):
    """z, h and of every row c and rho. MIX: the residual is not plain."""
    TILES: tl.constexpr = (D + BLOCK - 1) // BLOCK
    offs_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    b_scale = _gain(scale_ptr, 0, D, 1, ROWS, BLOCK, "")
    b_c = tl.zeros((ROWS,), tl.float32)
    if MIX:
        b_xx, b_xy = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
        for i in tl.static_range(TILES):
            b_x = _tile(x_ptr, i, offs_r, x_row, N, D, BLOCK, "").to(tl.float32)
            b_xx += b_x * b_x
            b_xy += b_x * _tile(y_ptr, i, offs_r, y_row, N, D, BLOCK, "").to(tl.float32)
        b_n = tl.sum(b_xx, 1)
        b_c = tl.sum(b_xy, 1) / (b_n + eps if ADD else tl.maximum(b_n, eps))
        tl.store(c_ptr + offs_r, b_c, mask=offs_r < N)

    z, b_square = (), tl.zeros((ROWS, BLOCK), tl.float32)
    for i in tl.static_range(TILES):
        b_alpha, b_beta = _gates(alpha_ptr, beta_ptr, i, D, ALPHA_COLUMNS, BETA_COLUMNS, ROWS, BLOCK, "")
        b_x, b_y = _tile(x_ptr, i, offs_r, x_row, N, D, BLOCK, "evict_first"), _tile(y_ptr, i, offs_r, y_row, N, D,
                BLOCK, "evict_first")
        z += (_mixed(b_x, b_y, b_c, b_scale, b_alpha, b_beta, MIX).to(z_ptr.dtype.element_ty),)
        _store_tile(z_ptr, z[i], i, offs_r, N, D, BLOCK)
        b_z = z[i].to(tl.float32)
        b_square += b_z * b_z
    b_rho = tl.rsqrt(tl.sum(b_square, 1) / D + eps_norm)
    tl.store(rho_ptr + offs_r, b_rho, mask=offs_r < N)
    for i in tl.static_range(TILES):
        _store_tile(h_ptr, z[i].to(tl.float32) * b_rho[:, None] * _gain(weight_ptr, i, D, D, ROWS, BLOCK, ""), i,
                    offs_r, N, D, BLOCK)


@jit
def _no_sums(ptr, D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """
    Sums over a program's rows so far, of nothing: a tile for each of the row's; one for all of them where COLUMNS = 1;
    none without ptr.
    """
    sums = ()
    if ptr is not None:
        for _ in tl.static_range(1 if COLUMNS == 1 else (D + BLOCK - 1) // BLOCK):
            sums += (tl.zeros((ROWS,) if COLUMNS == 1 else (ROWS, BLOCK), tl.float32),)
    return sums


@jit
def _added(sums, b_tile, i: tl.constexpr, COLUMNS: tl.constexpr):
    """sums with tile i's summand added."""
    result = ()
    for j in tl.static_range(len(sums)):
        if COLUMNS == 1:
            result += (sums[j] + tl.sum(b_tile, 1),)
        else:
            result += (sums[j] + b_tile if j == i else sums[j],)
    return result


@jit
def _store_sums(ptr, sums, stride, D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """The program's row of partial sums."""
    if ptr is not None:
        ptr += tl.program_id(0) * stride
        if COLUMNS == 1:
            tl.store(ptr, tl.sum(sums[0], 0))
        else:
            for i in tl.static_range(len(sums)):
                offs_d = i * BLOCK + tl.arange(0, BLOCK)
                tl.store(ptr + offs_d, tl.sum(sums[i], 0), mask=offs_d < D)


@jit
def _residual_norm_bwd_kernel(gz_ptr, gh_ptr, x_ptr, y_ptr, z_ptr, alpha_ptr, beta_ptr, weight_ptr, scale_ptr, c_ptr,
                              rho_ptr, dx_ptr, dy_ptr, dalpha_ptr, dbeta_ptr, dweight_ptr, dscale_ptr, gz_row, gh_row,
                              x_row, y_row, sums_row, N, eps, D: tl.constexpr, ALPHA_COLUMNS: tl.constexpr,
                              BETA_COLUMNS: tl.constexpr, MIX: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr,
                              BLOCK: tl.constexpr):
    """
    dx, dy and of every program a row of partial sums for the gains (those with a pointer). With MIX z comes from x, y
    and c; else z_ptr has it, and x is read for dscale. Without dy_ptr dx is dy's, too. gz_ptr: None where z has no
    gradient.
    """
    TILES: tl.constexpr = (D + BLOCK - 1) // BLOCK
    b_scale = _gain(scale_ptr, 0, D, 1, ROWS, BLOCK, "")
    dalpha = _no_sums(dalpha_ptr, D, ALPHA_COLUMNS, ROWS, BLOCK)
    dbeta = _no_sums(dbeta_ptr, D, BETA_COLUMNS, ROWS, BLOCK)
    dweight = _no_sums(dweight_ptr, D, D, ROWS, BLOCK)
    dscale = _no_sums(dscale_ptr, D, 1, ROWS, BLOCK)
    for step in range(tl.cdiv(N, ROWS * tl.num_programs(0))):
        offs_r = (tl.program_id(0).to(tl.int64) + step * tl.num_programs(0)) * ROWS + tl.arange(0, ROWS)
        b_rho = tl.load(rho_ptr + offs_r, mask=offs_r < N, other=0.0)
        if MIX:
            b_c = tl.load(c_ptr + offs_r, mask=offs_r < N, other=0.0)
        part, b_uz, b_n = (), tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
        for i in tl.static_range(TILES):
            b_gh = _tile(gh_ptr, i, offs_r, gh_row, N, D, BLOCK, "").to(tl.float32)
            if MIX:
                b_x = _tile(x_ptr, i, offs_r, x_row, N, D, BLOCK, "").to(tl.float32)
                b_y = _tile(y_ptr, i, offs_r, y_row, N, D, BLOCK, "")
                b_n += b_x * b_x
                b_alpha, b_beta = _gates(alpha_ptr, beta_ptr, i, D, ALPHA_COLUMNS, BETA_COLUMNS, ROWS, BLOCK, "")
                b_z = _mixed(b_x, b_y, b_c, b_scale, b_alpha, b_beta, MIX).to(gh_ptr.dtype.element_ty).to(tl.float32)
            else:
                b_z = _tile(z_ptr, i, offs_r, D, N, D, BLOCK, "").to(tl.float32)
            b_u = b_gh * _gain(weight_ptr, i, D, D, ROWS, BLOCK, "")
            b_uz += b_u * b_z
            dweight = _added(dweight, b_gh * (b_z * b_rho[:, None]), i, D)
            b_part = b_u * b_rho[:, None]
            if gz_ptr is not None:
                b_part += _tile(gz_ptr, i, offs_r, gz_row, N, D, BLOCK, "").to(tl.float32)
            part += (b_part,)

        g, b_gc, b_along = (), tl.zeros((ROWS, BLOCK), tl.float32), tl.sum(b_uz, 1) * b_rho * b_rho * b_rho / D
        for i in tl.static_range(TILES):
            if x_ptr is not None:
                b_x = _tile(x_ptr, i, offs_r, x_row, N, D, BLOCK, "evict_last").to(tl.float32)
            if MIX:
                b_y = _tile(y_ptr, i, offs_r, y_row, N, D, BLOCK, "evict_last").to(tl.float32)
                b_alpha, b_beta = _gates(alpha_ptr, beta_ptr, i, D, ALPHA_COLUMNS, BETA_COLUMNS, ROWS, BLOCK,
                                         "evict_last")
                b_z = _mixed(b_x, b_y, b_c, b_scale, b_alpha, b_beta, MIX).to(gh_ptr.dtype.element_ty).to(tl.float32)
            else:
                b_z = _tile(z_ptr, i, offs_r, D, N, D, BLOCK, "evict_last").to(tl.float32)
            b_g = part[i] - b_z * b_along[:, None]
            g += (b_g,)
            if x_ptr is not None:
                b_gx = b_g * b_x
                dscale = _added(dscale, b_gx, i, 1)
            if MIX:
                dalpha = _added(dalpha, b_g * (b_y - b_c[:, None] * b_x), i, ALPHA_COLUMNS)
                dbeta = _added(dbeta, b_gx * b_c[:, None], i, BETA_COLUMNS)
                b_gc += b_gx * (b_beta - b_alpha)
        if MIX:
            b_n = tl.sum(b_n, 1)
            b_q = tl.sum(b_gc, 1) / (b_n + eps if ADD else tl.maximum(b_n, eps))
            b_back = 2.0 * b_q * b_c if ADD else tl.where(b_n > eps, 2.0 * b_q * b_c, 0.0)
            for i in tl.static_range(TILES):
                b_x = _tile(x_ptr, i, offs_r, x_row, N, D, BLOCK, "evict_first").to(tl.float32)
                b_y = _tile(y_ptr, i, offs_r, y_row, N, D, BLOCK, "evict_first").to(tl.float32)
                b_alpha, b_beta = _gates(alpha_ptr, beta_ptr, i, D, ALPHA_COLUMNS, BETA_COLUMNS, ROWS, BLOCK,
                                         "evict_first")
                _store_tile(dy_ptr, b_alpha * g[i] + b_q[:, None] * b_x, i, offs_r, N, D, BLOCK)
                b_dx = (b_scale + b_c[:, None] * (b_beta - b_alpha)) * g[i] + b_q[:, None] * b_y - b_back[:, None] * b_x
                _store_tile(dx_ptr, b_dx, i, offs_r, N, D, BLOCK)
        else:
            for i in tl.static_range(TILES):
                _store_tile(dx_ptr, b_scale * g[i], i, offs_r, N, D, BLOCK)
                if dy_ptr is not None:
                    _store_tile(dy_ptr, g[i], i, offs_r, N, D, BLOCK)
    _store_sums(dalpha_ptr, dalpha, sums_row, D, ALPHA_COLUMNS, BLOCK)
    _store_sums(dbeta_ptr, dbeta, sums_row, D, BETA_COLUMNS, BLOCK)
    _store_sums(dweight_ptr, dweight, sums_row, D, D, BLOCK)
    _store_sums(dscale_ptr, dscale, sums_row, D, 1, BLOCK)


# ---- Launches ---------------------------------------------------------------

WIDEST = 4096       # most channels that a program's registers hold
PROGRAMS = 4        # of the backward pass, for each multiprocessor: each adds up its rows' part of the column sums


def _launch(D: int, crowded: bool = False) -> dict:
    """
    Three tiles a row at most, eight channels of each in a thread: at D = 768 a warp holds a row. Two where registers
    hold the weight's sums beside others.
    """
    block = max(triton.next_power_of_2(-(-D // (2 if crowded else 3))), min(triton.next_power_of_2(D), 256))
    return dict(ROWS=max(1, 1024 // block), BLOCK=block, num_warps=max(4, block // 256))


def _constants(D: int, alpha: Tensor | None, beta: Tensor | None, add: bool) -> dict:
    columns = lambda gain: 1 if gain is None else gain.numel()
    return dict(D=D, ALPHA_COLUMNS=columns(alpha), BETA_COLUMNS=columns(beta), MIX=not (alpha is None and beta is None),
                ADD=add)


def _matrix(x: Tensor | None) -> Tensor | None:
    """(N, D) with any row stride and neighbouring channels, in place where that is possible."""
    x = x if x is None else x.reshape(-1, x.shape[-1])
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _vectors(*gains: Tensor | None) -> list[Tensor | None]:
    return [gain if gain is None else gain.contiguous() for gain in gains]


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _empty_results(x: Tensor, alpha: Tensor | None, beta: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # .numel() would tie a compiled graph to one number of rows
    rows, plain = math.prod(x.shape[:-1]), alpha is None and beta is None
    z, h = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    return z, h, x.new_empty(0 if plain else rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)


def _sizes(gains: tuple[Tensor | None, ...], wanted: list[bool]) -> list[int]:
    """Columns of the sums for each gain whose gradient is wanted."""
    return [gain.numel() for gain, own in zip(gains, wanted) if own]


def _empty_gradients(gh: Tensor, x: Tensor | None, gains: tuple[Tensor | None, ...],
                     wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    dx, dy = (torch.empty(shape, dtype=gh.dtype, device=gh.device)
              for shape in (gh.shape, 0 if x is None else gh.shape))
    return dx, dy, gh.new_empty(sum(_sizes(gains, wanted)), dtype=torch.float32)


# ---- Host functions, each the body of its registration ----------------------

@torch.library.custom_op("knotgpt::residual_norm", mutates_args=())
def _forward_op(x: Tensor, y: Tensor, alpha: Optional[Tensor], beta: Optional[Tensor], weight: Optional[Tensor],
                scale: Optional[Tensor], eps: float, eps_norm: float, add: bool) -> tuple[Tensor, Tensor, Tensor,
        Tensor]:
    """z, h, c, rho"""
    D, results = x.shape[-1], _empty_results(x, alpha, beta)
    x, y, launch, constants, (z, h, c, rho) = _matrix(x), _matrix(y), _launch(D), _constants(D, alpha, beta,
            add), results
    with torch.cuda.device_of(x):
        _residual_norm_fwd_kernel[(triton.cdiv(len(x), launch["ROWS"]),)](x, y, *_vectors(alpha, beta, weight, scale),
                                                                          z, h, c if constants["MIX"] else None, rho,
                                                                          _stride(x), _stride(y), len(x), eps, eps_norm,
                                                                          **constants, **launch)
    return results


@_forward_op.register_fake
def _(x, y, alpha, beta, weight, scale, eps, eps_norm, add):
    return _empty_results(x, alpha, beta)


@torch.library.custom_op("knotgpt::residual_norm_backward", mutates_args=())
def _backward_op(gz: Optional[Tensor], gh: Tensor, x: Optional[Tensor], y: Optional[Tensor], z: Optional[Tensor],
                 alpha: Optional[Tensor], beta: Optional[Tensor], weight: Optional[Tensor], scale: Optional[Tensor],
                 c: Tensor, rho: Tensor, eps: float, add: bool, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dy (empty where it is dx), sums over the rows for the gains whose gradient is wanted"""
    gains = alpha, beta, weight, scale
    D, results, sizes = gh.shape[-1], _empty_gradients(gh, x, gains, wanted), _sizes(gains, wanted)
    gz, gh, x, y, N, (dx, dy, sums) = _matrix(gz), _matrix(gh), _matrix(x), _matrix(y), len(rho), results
    launch, constants = _launch(D, wanted[2] and len(sizes) > 1), _constants(D, alpha, beta, add)
    programs = triton.cdiv(N, launch["ROWS"])
    if sizes:
        programs = min(programs, PROGRAMS * (torch.cuda.get_device_properties(gh.device).multi_processor_count
                                             if gh.is_cuda else 1))
    partial = torch.empty(programs, len(sums), dtype=torch.float32, device=gh.device)
    parts = iter(partial.split(sizes, 1))
    with torch.cuda.device_of(gh):
        _residual_norm_bwd_kernel[(programs,)](gz, gh, x, y, z, *_vectors(*gains), c if constants["MIX"] else None, rho,
                                               dx, dy if len(dy) else None,
                                               *(next(parts) if own else None for own in wanted), _stride(gz),
                                               _stride(gh), _stride(x), _stride(y), len(sums), N, eps, **constants,
                                               **launch)
        if sizes:
            torch.sum(partial, 0, out=sums)
    return results


@_backward_op.register_fake
def _(gz, gh, x, y, z, alpha, beta, weight, scale, c, rho, eps, add, wanted):
    return _empty_gradients(gh, x, (alpha, beta, weight, scale), wanted)


def _save(ctx, inputs, output):
    x, y, *gains, ctx.eps, _, ctx.add = inputs
    z, _, c, rho = output
    plain = gains[0] is None and gains[1] is None
    ctx.save_for_backward(None if plain and gains[3] is None else x, None if plain else y, z if plain else None, *gains,
                          c, rho)
    ctx.set_materialize_grads(False)


def _backward(ctx, gz, gh, *_):
    if gz is None and gh is None:
        return (None,) * 9
    *tensors, c, rho = ctx.saved_tensors
    gains, wanted = tensors[3:], list(ctx.needs_input_grad[2:6])
    dx, dy, sums = _backward_op(gz, torch.zeros_like(gz) if gh is None else gh, *tensors, c, rho, ctx.eps, ctx.add,
                                wanted)
    parts = iter(sums.split(_sizes(gains, wanted)))
    dgains = (next(parts).reshape(gain.shape).to(gain.dtype) if own else None for gain, own in zip(gains, wanted))
    return dx, dx if tensors[0] is None else dy, *dgains, None, None, None


_forward_op.register_autograd(_backward, setup_context=_save)


# ---- The CPU's loops: z = s_0 x + s_1 y, plain (1, 1) or with learned scales, and its norm 

def _sum_body(x: Tensor, y: Tensor, scales: Optional[Tensor], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """z, h and rho (N)"""
    dtype = torch.promote_types(x.dtype, torch.float32)
    z, h = (torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format) for _ in range(2))
    rho = z.new_empty(math.prod(x.shape[:-1]))
    parallel_loops("residual_norm_loops").forward(*_row_arrays(x, y), _scale_array(scales, z), eps, *_row_arrays(z, h),
                                                  rho.numpy())
    return z.to(x.dtype), h.to(x.dtype), rho


def _sum_backward_body(gz: Optional[Tensor], gh: Tensor, x: Optional[Tensor], y: Optional[Tensor],
                       scales: Optional[Tensor], h: Tensor, rho: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dy and dscales; of a plain sum dx is both, and the others are empty"""
    dx, dy = torch.empty(gh.shape, dtype=rho.dtype), torch.empty(gh.shape if scales is not None else (0, gh.shape[-1]),
                                                                 dtype=rho.dtype)
    dscales = torch.empty(len(rho) if scales is not None else 0, 2, dtype=rho.dtype)
    gz, x, y = (dx.new_empty(0, gh.shape[-1]) if tensor is None else tensor for tensor in (gz, x, y))
    parallel_loops("residual_norm_loops").backward(*_row_arrays(gz, gh, x, y), _scale_array(scales, dx),
                                                   *_row_arrays(h), rho.numpy(), *_row_arrays(dx, dy), dscales.numpy())
    return dx.to(gh.dtype), dy.to(gh.dtype), dscales.sum(0)


def _row_arrays(*tensors: Tensor) -> list:
    """Each as an array of rows."""
    return [array(x.reshape(-1, x.shape[-1])) for x in tensors]


def _scale_array(scales: Tensor | None, like: Tensor):
    return array((torch.ones(2) if scales is None else scales).to(like.dtype))


def _fake_sum(x, y, scales, eps):
    z, h = (torch.empty(x.shape, dtype=x.dtype) for _ in range(2))
    return z, h, torch.empty(math.prod(x.shape[:-1]), dtype=torch.promote_types(x.dtype, torch.float32))


def _fake_sum_backward(gz, gh, x, y, scales, h, rho):
    dx, dy = torch.empty(gh.shape, dtype=gh.dtype), torch.empty(gh.shape if scales is not None else (0, gh.shape[-1]),
                                                                dtype=gh.dtype)
    return dx, dy, torch.empty(2, dtype=rho.dtype)


def _save_sum(ctx, inputs, output):
    x, y, scales, _ = inputs
    scaled = scales is not None
    ctx.save_for_backward(x if scaled else None, y if scaled else None, scales, *output[1:])
    ctx.set_materialize_grads(False)


def _sum_gradients(ctx, gz, gh, _):
    *inputs, scales, h, rho = ctx.saved_tensors
    if gz is None and gh is None:
        return (None,) * 4
    dx, dy, dscales = _sum_backward_loops(gz, torch.zeros_like(gz) if gh is None else gh, *inputs, scales, h, rho)
    return (dx, dx, None, None) if scales is None else (dx, dy, dscales.to(scales.dtype), None)


_sum_backward_loops = cpu_operation("knotgpt::scaled_sum_norm_loops_backward", _sum_backward_body, _fake_sum_backward)
_sum_loops = cpu_operation("knotgpt::scaled_sum_norm_loops", _sum_body, _fake_sum, _save_sum, _sum_gradients)


# ---- Public functions -------------------------------------------------------

def scaled_sum_norm(x: Tensor, y: Tensor, scales: Tensor | None = None, eps_norm: float = 1e-6,
                    backend: str = "auto") -> tuple[Tensor, Tensor]:
    """
    (z, z / sqrt(mean(z^2) + eps_norm) of every row), z = scales[0] x + scales[1] y: residual_norm's z without c, two
    scalars in the place of its gains.

    x, y      (..., D)   bfloat16, float16, float32 or float64, of one dtype; any strides (what is not contiguous is
                         copied)
    scales    (2,)       None: ones
    backend   "reference": PyTorch; "loops": the CPU's; "auto": loops for tensors on a CPU where Numba is, else without
              scales residual_norm's choice, else reference

    Gradients for x, y and scales, once. All backends work under torch.compile(fullgraph=True). ValueError that names
    the argument for a wrong shape, dtype or option.
    """
    _check(x, y, None, None, None, None, 1.0, eps_norm, "clamp", "auto" if backend == "loops" else backend)
    if scales is not None and (not isinstance(scales, Tensor) or scales.shape != (2,) or scales.dtype not in DTYPES):
        raise ValueError(f"scales must be None or a tensor of shape (2,); got {_describe(scales)}")
    if backend == "loops" and not loops_serve(x):
        raise ValueError(
            f"backend 'loops' needs tensors on a CPU and Numba; got tensors on {x.device}: use 'reference' or 'auto'")
    if backend == "loops" or backend == "auto" and loops_serve(x):
        return _sum_loops(x, y, scales, float(eps_norm))[:2]
    if scales is None:
        return residual_norm(x, y, eps_norm=eps_norm, backend=backend)
    return scaled_sum_norm_reference(x, y, scales, eps_norm)


BACKENDS = ("auto", "reference", "triton")
EPS_MODES = ("clamp", "add")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def residual_norm(x: Tensor, y: Tensor, alpha: Tensor | None = None, beta: Tensor | None = None,
                  weight: Tensor | None = None, stream_scale: Tensor | None = None, eps: float = 1e-8,
                  eps_norm: float = 1e-6, eps_mode: str = "clamp", backend: str = "auto") -> tuple[Tensor, Tensor]:
    """
    (z, h): z = lam x + alpha . (y - c x) + beta . c x with c = <x, y> / n', and h = weight . z / sqrt(mean(z^2) +
    eps_norm), of every row of D numbers.

    x, y           (..., D)      the residual stream and what joins it, of one dtype: bfloat16, float16, float32 or
                                 float64; any strides (a last axis that is not contiguous is copied)
    alpha, beta    one number    gain of y's part across x and along x, 0-dim or (1,), or (D,) for one a channel; None:
                                 1. Both None: z = lam x + y, which needs no c; gains of 1 give the same z, bit for bit
    weight         (D,)          the norm's gain; None: 1
    stream_scale   one number    lam; None: 1
    eps            > 0           n' = max(<x, x>, eps) for eps_mode "clamp", <x, x> + eps for "add": rows of zeros give
                                 z = alpha . y
    backend        "reference": PyTorch; "triton": fused, D <= 4096, no float64; "auto": triton for CUDA tensors where
                   it can, else reference

    Returns z and h in x's dtype and shape. The gains are best float32, whatever x is. Sums run in float32, in the
    reference in float64 where an argument has it. Gradients for x, y and the four gains, once. Both backends work under
    torch.compile(fullgraph=True). ValueError that names the argument for a wrong shape, dtype, device or option.
    """
    _check(x, y, alpha, beta, weight, stream_scale, eps, eps_norm, eps_mode, backend)
    if backend == "auto":
        backend = "triton" if x.is_cuda and triton is not None and x.shape[-1] <= WIDEST and not _has_float64(x, alpha,
                beta, weight, stream_scale) else "reference"
    if backend == "reference":
        return residual_norm_reference(x, y, alpha, beta, weight, stream_scale, eps, eps_norm, eps_mode)
    z, h, _, _ = _forward_op(x, y, alpha, beta, weight, stream_scale, float(eps), float(eps_norm), eps_mode == "add")
    return z, h


def _has_float64(*tensors: Tensor | None) -> bool:
    return any(x is not None and x.dtype == torch.float64 for x in tensors)


def _check(x, y, alpha, beta, weight, stream_scale, eps, eps_norm, eps_mode, backend):
    if not isinstance(x, Tensor) or x.dim() < 1 or x.numel() == 0:
        raise ValueError(f"x must be a tensor (..., D), not empty; got {_describe(x)}")
    if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
        raise ValueError(
            f"y must have x's shape and dtype, {tuple(x.shape)} and {x.dtype}; got {_describe(y)}{f' and {y.dtype}' if isinstance(y, Tensor) else ''}")
    D, number = x.shape[-1], ((), (1,))
    for name, gain, shapes in (("alpha", alpha, (*number, (D,))), ("beta", beta, (*number, (D,))),
                               ("weight", weight, ((D,),)), ("stream_scale", stream_scale, number)):
        if gain is not None and (not isinstance(gain, Tensor) or tuple(gain.shape) not in shapes):
            raise ValueError(
                f"{name} must be None or a tensor of shape {' or '.join(map(str, shapes))}; got {_describe(gain)}")
    for name, tensor in (("x", x), ("y", y), ("alpha", alpha), ("beta", beta), ("weight", weight),
                         ("stream_scale", stream_scale)):
        if tensor is not None and tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be bfloat16, float16, float32 or float64; got {tensor.dtype}")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}; got {tensor.device}")
    for name, value in (("eps", eps), ("eps_norm", eps_norm)):
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be above 0 and finite; got {value}")
    if eps_mode not in EPS_MODES:
        raise ValueError(f"eps_mode must be {' or '.join(EPS_MODES)}; got {eps_mode!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend == "triton" and (triton is None or not (x.is_cuda or _interpreted())):
        raise ValueError(
            f"backend 'triton' needs CUDA tensors and Triton; got tensors on {x.device}: use 'reference' or 'auto'")
    if backend == "triton" and (D > WIDEST or _has_float64(x, alpha, beta, weight, stream_scale)):
        raise ValueError(
            f"backend 'triton' takes at most {WIDEST} channels and no float64; got D = {D} and {x.dtype}: use 'reference' or 'auto'")


def _interpreted() -> bool:
    return not isinstance(_residual_norm_fwd_kernel, triton.JITFunction)


def _describe(x) -> str:
    return str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__
