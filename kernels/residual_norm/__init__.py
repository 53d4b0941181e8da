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
from typing import Optional

import torch
from torch import Tensor

from kernels.backend import (
    FLOATS,
    array,
    check_backend,
    check_device,
    check_dtype,
    check_option,
    check_positive,
    check_shape,
    cpu_operation,
    describe,
    jit,
    loops_serve,
    parallel_loops,
    tl,
    triton,
)


def residual_norm_reference(x: Tensor, y: Tensor, alpha: Tensor | None = None, beta: Tensor | None = None,
                            weight: Tensor | None = None, stream_scale: Tensor | None = None, eps: float = 1e-8,
                            eps_norm: float = 1e-6, eps_mode: str = "clamp") -> tuple[Tensor, Tensor]:
    """
    Returns residual_norm's (z, h), computed term by term: on any device, in any floating dtype, differentiable by
    autograd. It runs in the widest dtype among the arguments, float32 at least; z is rounded to x's before h is made of
    it.
    """
    # the dtype
    gains = [gain for gain in (alpha, beta, weight, stream_scale) if gain is not None]
    dtype = reduce(torch.promote_types, (gain.dtype for gain in gains), torch.promote_types(x.dtype, torch.float32))
    stream, branch = x.to(dtype), y.to(dtype)

    # z
    if alpha is None and beta is None:
        z = branch + (stream if stream_scale is None else stream_scale * stream)
    else:
        a, b, scale = (1.0 if gain is None else gain.to(dtype) for gain in (alpha, beta, stream_scale))
        n = stream.square().sum(-1, keepdim=True)
        c = (stream * branch).sum(-1, keepdim=True) / (n + eps if eps_mode == "add" else n.clamp_min(eps))
        z = (scale + c * (b - a)) * stream + a * branch
    z = z.to(x.dtype)

    # h
    wide = z.to(dtype)
    h = wide * (wide.square().mean(-1, keepdim=True) + eps_norm).rsqrt()
    return z, (h if weight is None else weight * h).to(x.dtype)


def scaled_sum_norm_reference(x: Tensor, y: Tensor, scales: Tensor, eps_norm: float = 1e-6) -> tuple[Tensor, Tensor]:
    """
    Returns (scales[0] x + scales[1] y, its norm), computed term by term, in the dtypes and with the rounding of
    residual_norm_reference.
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
    """Returns the offsets of tile i of the rows in their matrix, and which of them exist."""
    offs_d = i * BLOCK + tl.arange(0, BLOCK)
    mask = (offs_r < N)[:, None]
    if D % BLOCK != 0:
        mask = mask & (offs_d < D)[None, :]
    return offs_r[:, None] * stride + offs_d[None, :], mask


@jit
def _load_tile(ptr, i: tl.constexpr, offs_r, stride, N, D: tl.constexpr, BLOCK: tl.constexpr, POLICY: tl.constexpr):
    """Returns tile i of the rows of a matrix, 0 where there is none."""
    offs, mask = _place(i, offs_r, stride, N, D, BLOCK)
    return tl.load(ptr + offs, mask=mask, other=0.0, eviction_policy=POLICY)


@jit
def _store_tile(ptr, b_tile, i: tl.constexpr, offs_r, N, D: tl.constexpr, BLOCK: tl.constexpr):
    """Writes tile i of the rows of a contiguous matrix."""
    offs, mask = _place(i, offs_r, D, N, D, BLOCK)
    tl.store(ptr + offs, b_tile.to(ptr.dtype.element_ty), mask=mask)


@jit
def _load_gain(ptr, i: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
               POLICY: tl.constexpr):
    """
    Returns a gain for tile i: 1 without one, a number (COLUMNS = 1), or (ROWS, BLOCK), as a tile of other shape would
    be laid out otherwise.
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
def _load_gates(alpha_ptr, beta_ptr, i: tl.constexpr, D: tl.constexpr, ALPHA_COLUMNS: tl.constexpr,
                BETA_COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, POLICY: tl.constexpr):
    """Returns alpha and beta for tile i."""
    b_alpha = _load_gain(alpha_ptr, i, D, ALPHA_COLUMNS, ROWS, BLOCK, POLICY)
    b_beta = _load_gain(beta_ptr, i, D, BETA_COLUMNS, ROWS, BLOCK, POLICY)
    return b_alpha, b_beta


@jit
def _mix(b_x, b_y, b_c, b_scale, b_alpha, b_beta, MIX: tl.constexpr):
    """Returns z in float32."""
    if MIX:
        return (b_scale + b_c[:, None] * (b_beta - b_alpha)) * b_x.to(tl.float32) + b_alpha * b_y.to(tl.float32)
    else:
        return b_scale * b_x.to(tl.float32) + b_y.to(tl.float32)


@jit
def _residual_norm_fwd_kernel(x_ptr, y_ptr, alpha_ptr, beta_ptr, weight_ptr, scale_ptr, z_ptr, h_ptr, c_ptr, rho_ptr,
                              x_row, y_row, N, eps, eps_norm, D: tl.constexpr, ALPHA_COLUMNS: tl.constexpr,
                              BETA_COLUMNS: tl.constexpr, MIX: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr,
                              BLOCK: tl.constexpr):
    """Writes z, h and of every row c and rho. MIX: the residual is not plain."""
    TILES: tl.constexpr = (D + BLOCK - 1) // BLOCK
    offs_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    b_scale = _load_gain(scale_ptr, 0, D, 1, ROWS, BLOCK, "")

    # c
    b_c = tl.zeros((ROWS,), tl.float32)
    if MIX:
        b_xx, b_xy = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
        for i in tl.static_range(TILES):
            b_x = _load_tile(x_ptr, i, offs_r, x_row, N, D, BLOCK, "").to(tl.float32)
            b_xx += b_x * b_x
            b_xy += b_x * _load_tile(y_ptr, i, offs_r, y_row, N, D, BLOCK, "").to(tl.float32)
        b_n = tl.sum(b_xx, 1)
        b_c = tl.sum(b_xy, 1) / (b_n + eps if ADD else tl.maximum(b_n, eps))
        tl.store(c_ptr + offs_r, b_c, mask=offs_r < N)

    # z
    z, b_square = (), tl.zeros((ROWS, BLOCK), tl.float32)
    for i in tl.static_range(TILES):
        b_alpha, b_beta = _load_gates(alpha_ptr, beta_ptr, i, D, ALPHA_COLUMNS, BETA_COLUMNS, ROWS, BLOCK, "")
        b_x = _load_tile(x_ptr, i, offs_r, x_row, N, D, BLOCK, "evict_first")
        b_y = _load_tile(y_ptr, i, offs_r, y_row, N, D, BLOCK, "evict_first")
        z += (_mix(b_x, b_y, b_c, b_scale, b_alpha, b_beta, MIX).to(z_ptr.dtype.element_ty),)
        _store_tile(z_ptr, z[i], i, offs_r, N, D, BLOCK)
        b_z = z[i].to(tl.float32)
        b_square += b_z * b_z

    # h
    b_rho = tl.rsqrt(tl.sum(b_square, 1) / D + eps_norm)
    tl.store(rho_ptr + offs_r, b_rho, mask=offs_r < N)
    for i in tl.static_range(TILES):
        b_h = z[i].to(tl.float32) * b_rho[:, None] * _load_gain(weight_ptr, i, D, D, ROWS, BLOCK, "")
        _store_tile(h_ptr, b_h, i, offs_r, N, D, BLOCK)


@jit
def _begin_sums(ptr, D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """
    Returns sums over a program's rows that begin at 0: a tile for each of a row's; one for all of them where
    COLUMNS = 1; none without ptr.
    """
    sums = ()
    if ptr is not None:
        for _ in tl.static_range(1 if COLUMNS == 1 else (D + BLOCK - 1) // BLOCK):
            sums += (tl.zeros((ROWS,) if COLUMNS == 1 else (ROWS, BLOCK), tl.float32),)
    return sums


@jit
def _add_tile(sums, b_tile, i: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns the sums with tile i's summand added."""
    result = ()
    for j in tl.static_range(len(sums)):
        if COLUMNS == 1:
            result += (sums[j] + tl.sum(b_tile, 1),)
        else:
            result += (sums[j] + b_tile if j == i else sums[j],)
    return result


@jit
def _store_sums(ptr, sums, stride, D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Writes the program's row of partial sums."""
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
    Writes dx, dy and of every program a row of partial sums for the gains (those with a pointer). With MIX z comes from
    x, y and c; else z_ptr has it, and x is read for dscale. Without dy_ptr dx is dy's, too. gz_ptr is None where z has
    no gradient.
    """
    TILES: tl.constexpr = (D + BLOCK - 1) // BLOCK
    b_scale = _load_gain(scale_ptr, 0, D, 1, ROWS, BLOCK, "")
    dalpha = _begin_sums(dalpha_ptr, D, ALPHA_COLUMNS, ROWS, BLOCK)
    dbeta = _begin_sums(dbeta_ptr, D, BETA_COLUMNS, ROWS, BLOCK)
    dweight = _begin_sums(dweight_ptr, D, D, ROWS, BLOCK)
    dscale = _begin_sums(dscale_ptr, D, 1, ROWS, BLOCK)
    for step in range(tl.cdiv(N, ROWS * tl.num_programs(0))):
        offs_r = (tl.program_id(0).to(tl.int64) + step * tl.num_programs(0)) * ROWS + tl.arange(0, ROWS)
        b_rho = tl.load(rho_ptr + offs_r, mask=offs_r < N, other=0.0)
        if MIX:
            b_c = tl.load(c_ptr + offs_r, mask=offs_r < N, other=0.0)

        # gz + rho u, <u, z> and <x, x>
        without_norm, b_uz, b_n = (), tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
        for i in tl.static_range(TILES):
            b_gh = _load_tile(gh_ptr, i, offs_r, gh_row, N, D, BLOCK, "").to(tl.float32)
            if MIX:
                b_x = _load_tile(x_ptr, i, offs_r, x_row, N, D, BLOCK, "").to(tl.float32)
                b_y = _load_tile(y_ptr, i, offs_r, y_row, N, D, BLOCK, "")
                b_n += b_x * b_x
                b_alpha, b_beta = _load_gates(alpha_ptr, beta_ptr, i, D, ALPHA_COLUMNS, BETA_COLUMNS, ROWS, BLOCK, "")
                b_z = _mix(b_x, b_y, b_c, b_scale, b_alpha, b_beta, MIX).to(gh_ptr.dtype.element_ty).to(tl.float32)
            else:
                b_z = _load_tile(z_ptr, i, offs_r, D, N, D, BLOCK, "").to(tl.float32)
            b_u = b_gh * _load_gain(weight_ptr, i, D, D, ROWS, BLOCK, "")
            b_uz += b_u * b_z
            dweight = _add_tile(dweight, b_gh * (b_z * b_rho[:, None]), i, D)
            b_without = b_u * b_rho[:, None]
            if gz_ptr is not None:
                b_without += _load_tile(gz_ptr, i, offs_r, gz_row, N, D, BLOCK, "").to(tl.float32)
            without_norm += (b_without,)

        # g and gc
        g, b_gc, b_along = (), tl.zeros((ROWS, BLOCK), tl.float32), tl.sum(b_uz, 1) * b_rho * b_rho * b_rho / D
        for i in tl.static_range(TILES):
            if x_ptr is not None:
                b_x = _load_tile(x_ptr, i, offs_r, x_row, N, D, BLOCK, "evict_last").to(tl.float32)
            if MIX:
                b_y = _load_tile(y_ptr, i, offs_r, y_row, N, D, BLOCK, "evict_last").to(tl.float32)
                b_alpha, b_beta = _load_gates(alpha_ptr, beta_ptr, i, D, ALPHA_COLUMNS, BETA_COLUMNS, ROWS, BLOCK,
                                         "evict_last")
                b_z = _mix(b_x, b_y, b_c, b_scale, b_alpha, b_beta, MIX).to(gh_ptr.dtype.element_ty).to(tl.float32)
            else:
                b_z = _load_tile(z_ptr, i, offs_r, D, N, D, BLOCK, "evict_last").to(tl.float32)
            b_g = without_norm[i] - b_z * b_along[:, None]
            g += (b_g,)
            if x_ptr is not None:
                b_gx = b_g * b_x
                dscale = _add_tile(dscale, b_gx, i, 1)
            if MIX:
                dalpha = _add_tile(dalpha, b_g * (b_y - b_c[:, None] * b_x), i, ALPHA_COLUMNS)
                dbeta = _add_tile(dbeta, b_gx * b_c[:, None], i, BETA_COLUMNS)
                b_gc += b_gx * (b_beta - b_alpha)

        # dx and dy
        if MIX:
            b_n = tl.sum(b_n, 1)
            b_q = tl.sum(b_gc, 1) / (b_n + eps if ADD else tl.maximum(b_n, eps))
            b_back = 2.0 * b_q * b_c if ADD else tl.where(b_n > eps, 2.0 * b_q * b_c, 0.0)
            for i in tl.static_range(TILES):
                b_x = _load_tile(x_ptr, i, offs_r, x_row, N, D, BLOCK, "evict_first").to(tl.float32)
                b_y = _load_tile(y_ptr, i, offs_r, y_row, N, D, BLOCK, "evict_first").to(tl.float32)
                b_alpha, b_beta = _load_gates(alpha_ptr, beta_ptr, i, D, ALPHA_COLUMNS, BETA_COLUMNS, ROWS, BLOCK,
                                         "evict_first")
                _store_tile(dy_ptr, b_alpha * g[i] + b_q[:, None] * b_x, i, offs_r, N, D, BLOCK)
                b_dx = (b_scale + b_c[:, None] * (b_beta - b_alpha)) * g[i] + b_q[:, None] * b_y - b_back[:, None] * b_x
                _store_tile(dx_ptr, b_dx, i, offs_r, N, D, BLOCK)
        else:
            for i in tl.static_range(TILES):
                _store_tile(dx_ptr, b_scale * g[i], i, offs_r, N, D, BLOCK)
                if dy_ptr is not None:
                    _store_tile(dy_ptr, g[i], i, offs_r, N, D, BLOCK)

    # the gains' sums
    _store_sums(dalpha_ptr, dalpha, sums_row, D, ALPHA_COLUMNS, BLOCK)
    _store_sums(dbeta_ptr, dbeta, sums_row, D, BETA_COLUMNS, BLOCK)
    _store_sums(dweight_ptr, dweight, sums_row, D, D, BLOCK)
    _store_sums(dscale_ptr, dscale, sums_row, D, 1, BLOCK)


# ---- Launches ---------------------------------------------------------------

WIDEST = 4096       # most channels that a program's registers hold
PROGRAMS = 4        # of the backward pass, for each multiprocessor: each adds up the column sums of its rows


def _launch(D: int, crowded: bool = False) -> dict:
    """
    Returns the launch: three tiles a row at most, eight channels of each in a thread, so that at D = 768 a warp holds a
    row. crowded: two tiles, where registers hold the weight's sums beside others.
    """
    block = max(triton.next_power_of_2(-(-D // (2 if crowded else 3))), min(triton.next_power_of_2(D), 256))
    return dict(ROWS=max(1, 1024 // block), BLOCK=block, num_warps=max(4, block // 256))


def _constants(D: int, alpha: Tensor | None, beta: Tensor | None, add: bool) -> dict:
    """Returns the kernels' sizes and switches."""
    return dict(
        D=D,
        ALPHA_COLUMNS=1 if alpha is None else alpha.numel(),
        BETA_COLUMNS=1 if beta is None else beta.numel(),
        MIX=not (alpha is None and beta is None),
        ADD=add,
    )


def _matrix(x: Tensor | None) -> Tensor | None:
    """Returns x as (N, D), with any row stride and neighbouring channels, in place where that is possible."""
    if x is None:
        return None
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _vectors(*gains: Tensor | None) -> list[Tensor | None]:
    return [gain if gain is None else gain.contiguous() for gain in gains]


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _empty_results(x: Tensor, alpha: Tensor | None, beta: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns empty tensors for z, h, c (without numbers where the residual is plain) and rho."""
    # .numel() would tie a compiled graph to one number of rows
    rows = math.prod(x.shape[:-1])
    plain = alpha is None and beta is None
    z, h = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    return z, h, x.new_empty(0 if plain else rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)


def _sizes(gains: tuple[Tensor | None, ...], wanted: list[bool]) -> list[int]:
    """Returns the columns of the sums for each gain whose gradient is wanted."""
    return [gain.numel() for gain, is_wanted in zip(gains, wanted) if is_wanted]


def _empty_gradients(gh: Tensor, x: Tensor | None, gains: tuple[Tensor | None, ...],
                     wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns empty tensors for dx, dy (without numbers where it is dx) and the gains' sums."""
    dx = torch.empty(gh.shape, dtype=gh.dtype, device=gh.device)
    dy = torch.empty(0 if x is None else gh.shape, dtype=gh.dtype, device=gh.device)
    return dx, dy, gh.new_empty(sum(_sizes(gains, wanted)), dtype=torch.float32)


# ---- Host functions, each the body of its registration ----------------------

@torch.library.custom_op("knotgpt::residual_norm", mutates_args=())
def _forward_op(x: Tensor, y: Tensor, alpha: Optional[Tensor], beta: Optional[Tensor], weight: Optional[Tensor],
                scale: Optional[Tensor], eps: float, eps_norm: float,
                add: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns z, h, c and rho."""
    D = x.shape[-1]
    z, h, c, rho = _empty_results(x, alpha, beta)
    x, y = _matrix(x), _matrix(y)

    launch = _launch(D)
    constants = _constants(D, alpha, beta, add)
    grid = (triton.cdiv(len(x), launch["ROWS"]),)
    with torch.cuda.device_of(x):
        _residual_norm_fwd_kernel[grid](
            x, y, *_vectors(alpha, beta, weight, scale), z, h, c if constants["MIX"] else None, rho, _stride(x),
            _stride(y), len(x), eps, eps_norm, **constants, **launch)
    return z, h, c, rho


@_forward_op.register_fake
def _(x, y, alpha, beta, weight, scale, eps, eps_norm, add):
    return _empty_results(x, alpha, beta)


@torch.library.custom_op("knotgpt::residual_norm_backward", mutates_args=())
def _backward_op(gz: Optional[Tensor], gh: Tensor, x: Optional[Tensor], y: Optional[Tensor], z: Optional[Tensor],
                 alpha: Optional[Tensor], beta: Optional[Tensor], weight: Optional[Tensor], scale: Optional[Tensor],
                 c: Tensor, rho: Tensor, eps: float, add: bool, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dx, dy (empty where it is dx) and the sums over the rows for the gains whose gradient is wanted."""
    # arguments and results
    gains = alpha, beta, weight, scale
    sizes = _sizes(gains, wanted)
    dx, dy, sums = _empty_gradients(gh, x, gains, wanted)
    gz, gh, x, y = _matrix(gz), _matrix(gh), _matrix(x), _matrix(y)
    N, D = len(rho), gh.shape[-1]

    # the launch
    launch = _launch(D, crowded=wanted[2] and len(sizes) > 1)
    constants = _constants(D, alpha, beta, add)
    programs = triton.cdiv(N, launch["ROWS"])
    if sizes:
        processors = torch.cuda.get_device_properties(gh.device).multi_processor_count if gh.is_cuda else 1
        programs = min(programs, PROGRAMS * processors)

    # every program's sums, side by side for the gains
    partial = torch.empty(programs, len(sums), dtype=torch.float32, device=gh.device)
    columns = iter(partial.split(sizes, 1))
    with torch.cuda.device_of(gh):
        _residual_norm_bwd_kernel[(programs,)](
            gz, gh, x, y, z, *_vectors(*gains), c if constants["MIX"] else None, rho, dx, dy if len(dy) else None,
            *(next(columns) if is_wanted else None for is_wanted in wanted), _stride(gz), _stride(gh), _stride(x),
            _stride(y), len(sums), N, eps, **constants, **launch)
        if sizes:
            torch.sum(partial, 0, out=sums)
    return dx, dy, sums


@_backward_op.register_fake
def _(gz, gh, x, y, z, alpha, beta, weight, scale, c, rho, eps, add, wanted):
    return _empty_gradients(gh, x, (alpha, beta, weight, scale), wanted)


def _save(ctx, inputs, output):
    x, y, *gains, ctx.eps, _, ctx.add = inputs
    z, _, c, rho = output
    plain = gains[0] is None and gains[1] is None
    if plain:
        ctx.save_for_backward(None if gains[3] is None else x, None, z, *gains, c, rho)
    else:
        ctx.save_for_backward(x, y, None, *gains, c, rho)
    ctx.set_materialize_grads(False)


def _backward(ctx, gz, gh, *_):
    if gz is None and gh is None:
        return (None,) * 9
    *tensors, c, rho = ctx.saved_tensors
    gains = tensors[3:]
    wanted = list(ctx.needs_input_grad[2:6])
    if gh is None:
        gh = torch.zeros_like(gz)
    dx, dy, sums = _backward_op(gz, gh, *tensors, c, rho, ctx.eps, ctx.add, wanted)

    # the sums of every gain in its shape and dtype
    columns = iter(sums.split(_sizes(gains, wanted)))
    dgains = [next(columns).reshape(gain.shape).to(gain.dtype) if is_wanted else None
              for gain, is_wanted in zip(gains, wanted)]
    return dx, dx if tensors[0] is None else dy, *dgains, None, None, None


_forward_op.register_autograd(_backward, setup_context=_save)


# ---- The CPU's loops --------------------------------------------------------
# z = s_0 x + s_1 y, plain (1, 1) or with learned scales, and its norm.

def _sum_body(x: Tensor, y: Tensor, scales: Optional[Tensor], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns z, h and rho (N)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    z, h = (torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format) for _ in range(2))
    rho = z.new_empty(math.prod(x.shape[:-1]))
    parallel_loops("residual_norm.cpu").forward(
        *_row_arrays(x, y), _scale_array(scales, z), eps, *_row_arrays(z, h), rho.numpy())
    return z.to(x.dtype), h.to(x.dtype), rho


def _sum_backward_body(gz: Optional[Tensor], gh: Tensor, x: Optional[Tensor], y: Optional[Tensor],
                       scales: Optional[Tensor], h: Tensor, rho: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dx, dy and dscales. Of a plain sum dx is both gradients, and the others are empty."""
    dx = torch.empty(gh.shape, dtype=rho.dtype)
    dy = torch.empty(gh.shape if scales is not None else (0, gh.shape[-1]), dtype=rho.dtype)
    dscales = torch.empty(len(rho) if scales is not None else 0, 2, dtype=rho.dtype)
    gz, x, y = (dx.new_empty(0, gh.shape[-1]) if tensor is None else tensor for tensor in (gz, x, y))
    parallel_loops("residual_norm.cpu").backward(
        *_row_arrays(gz, gh, x, y), _scale_array(scales, dx), *_row_arrays(h), rho.numpy(), *_row_arrays(dx, dy),
        dscales.numpy())
    return dx.to(gh.dtype), dy.to(gh.dtype), dscales.sum(0)


def _row_arrays(*tensors: Tensor) -> list:
    """Returns each as an array of rows."""
    return [array(x.reshape(-1, x.shape[-1])) for x in tensors]


def _scale_array(scales: Tensor | None, like: Tensor):
    """Returns the scales, ones where there are none, as an array of like's dtype."""
    if scales is None:
        scales = torch.ones(2)
    return array(scales.to(like.dtype))


def _fake_sum(x, y, scales, eps):
    z, h = (torch.empty(x.shape, dtype=x.dtype) for _ in range(2))
    return z, h, torch.empty(math.prod(x.shape[:-1]), dtype=torch.promote_types(x.dtype, torch.float32))


def _fake_sum_backward(gz, gh, x, y, scales, h, rho):
    dx = torch.empty(gh.shape, dtype=gh.dtype)
    dy = torch.empty(gh.shape if scales is not None else (0, gh.shape[-1]), dtype=gh.dtype)
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
    if gh is None:
        gh = torch.zeros_like(gz)
    dx, dy, dscales = _sum_backward_loops(gz, gh, *inputs, scales, h, rho)
    return (dx, dx, None, None) if scales is None else (dx, dy, dscales.to(scales.dtype), None)


_sum_backward_loops = cpu_operation("knotgpt::scaled_sum_norm_loops_backward", _sum_backward_body, _fake_sum_backward)
_sum_loops = cpu_operation("knotgpt::scaled_sum_norm_loops", _sum_body, _fake_sum, _save_sum, _sum_gradients)


# ---- Public functions -------------------------------------------------------

def scaled_sum_norm(x: Tensor, y: Tensor, scales: Tensor | None = None, eps_norm: float = 1e-6,
                    backend: str = "auto") -> tuple[Tensor, Tensor]:
    """
    Returns (z, z / sqrt(mean(z^2) + eps_norm) of every row) with z = scales[0] x + scales[1] y: residual_norm's z
    without c, two scalars in the place of its gains.

    x, y      (..., D)   bfloat16, float16, float32 or float64, of one dtype; any strides (what is not contiguous is
                         copied)
    scales    (2,)       None: ones
    backend   "reference": PyTorch; "loops": the CPU's; "auto": loops for tensors on a CPU where Numba is, else without
              scales residual_norm's choice, else reference

    Gradients for x, y and scales, once. All backends work under torch.compile(fullgraph=True). ValueError that names
    the argument for a wrong shape, dtype or option.
    """
    _check(x, y, None, None, None, None, 1.0, eps_norm, "clamp", "auto" if backend == "loops" else backend)
    if scales is not None and (not isinstance(scales, Tensor) or scales.shape != (2,) or scales.dtype not in FLOATS):
        raise ValueError(f"scales must be None or a float tensor of shape (2,); got {describe(scales)}")
    if backend == "loops":
        check_backend(backend, ("loops",), x)
    if backend == "loops" or backend == "auto" and loops_serve(x):
        return _sum_loops(x, y, scales, float(eps_norm))[:2]
    if scales is None:
        return residual_norm(x, y, eps_norm=eps_norm, backend=backend)
    return scaled_sum_norm_reference(x, y, scales, eps_norm)


BACKENDS = ("auto", "reference", "triton")
EPS_MODES = ("clamp", "add")


def residual_norm(x: Tensor, y: Tensor, alpha: Tensor | None = None, beta: Tensor | None = None,
                  weight: Tensor | None = None, stream_scale: Tensor | None = None, eps: float = 1e-8,
                  eps_norm: float = 1e-6, eps_mode: str = "clamp", backend: str = "auto") -> tuple[Tensor, Tensor]:
    """
    Returns (z, h) of every row of D numbers, in x's dtype and shape:
        z = lam x + alpha . (y - c x) + beta . c x with c = <x, y> / n'      h = weight . z / sqrt(mean(z^2) + eps_norm)

    x, y           (..., D)      the residual stream and what joins it, of one dtype: bfloat16, float16, float32 or
                                 float64; any strides (a last axis that is not contiguous is copied)
    alpha, beta    one number    gain of what is across x and along x in y, 0-dim or (1,), or (D,) for one a channel;
                                 None: 1. Both None: z = lam x + y, which needs no c; gains of 1 give the same z, bit
                                 for bit
    weight         (D,)          the norm's gain; None: 1
    stream_scale   one number    lam; None: 1
    eps            > 0           n' = max(<x, x>, eps) for eps_mode "clamp", <x, x> + eps for "add": rows of zeros give
                                 z = alpha . y
    backend        "reference": PyTorch; "triton": fused, D <= 4096, no float64; "auto": triton for CUDA tensors where
                   it can, else reference

    The gains are best float32, whatever x is. Sums run in float32, in the
    reference in float64 where an argument has it. Gradients for x, y and the four gains, once. Both backends work under
    torch.compile(fullgraph=True). ValueError that names the argument for a wrong shape, dtype, device or option.
    """
    _check(x, y, alpha, beta, weight, stream_scale, eps, eps_norm, eps_mode, backend)
    if backend == "auto":
        fits = x.shape[-1] <= WIDEST and not _has_float64(x, alpha, beta, weight, stream_scale)
        backend = "triton" if x.is_cuda and triton is not None and fits else "reference"
    if backend == "reference":
        return residual_norm_reference(x, y, alpha, beta, weight, stream_scale, eps, eps_norm, eps_mode)
    z, h, _, _ = _forward_op(x, y, alpha, beta, weight, stream_scale, float(eps), float(eps_norm), eps_mode == "add")
    return z, h


def _has_float64(*tensors: Tensor | None) -> bool:
    return any(x is not None and x.dtype == torch.float64 for x in tensors)


def _check(x, y, alpha, beta, weight, stream_scale, eps, eps_norm, eps_mode, backend):
    """Raises residual_norm's ValueErrors."""
    # x and y
    check_shape("x", x, "(..., D)", (..., None))
    check_shape("y", y, "(..., D)", tuple(x.shape))
    check_dtype("y", y, (x.dtype,), like="x")

    # gains
    D = x.shape[-1]
    number = [(), (1,)]
    shapes = dict(alpha=[*number, (D,)], beta=[*number, (D,)], weight=[(D,)], stream_scale=number)
    gains = dict(alpha=alpha, beta=beta, weight=weight, stream_scale=stream_scale)
    for name, gain in gains.items():
        if gain is not None and (not isinstance(gain, Tensor) or tuple(gain.shape) not in shapes[name]):
            expected = " or ".join(map(str, shapes[name]))
            raise ValueError(f"{name} must be None or a tensor of shape {expected}; got {describe(gain)}")
    for name, tensor in dict(x=x, y=y, **gains).items():
        if tensor is not None:
            check_dtype(name, tensor)
            check_device(name, tensor, "x", x)

    # options
    check_positive("eps", eps)
    check_positive("eps_norm", eps_norm)
    check_option("eps_mode", eps_mode, EPS_MODES)
    check_backend(backend, BACKENDS, x)
    if backend == "triton" and (D > WIDEST or _has_float64(x, *gains.values())):
        raise ValueError(f"backend 'triton' takes at most {WIDEST} channels and no float64; got D = {D} and {x.dtype}: "
                         "use 'reference' or 'auto'")
