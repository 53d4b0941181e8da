"""
Product of a matrix with its own transpose, half of which is computed: the two symmetric products of a step of Muon's
orthogonalisation.

    s = alpha x x' + beta a        x (m, k), a (m, m) symmetric, s (m, m)

A step of Polar Express takes x to p x with p = a I + b G + c G G and G = x x': G is the operation on x, and
b G + c G G = b G + c G G' that on G.

Of a square of T x T tiles, T = ceil(m / BLOCK), the T (T + 1) / 2 on and below the diagonal are computed; one below it
is written twice, the second time transposed, and in one on it the elements above are those below. So s is symmetric to
the last bit, which a product of tensor cores need not be, and a is read on and below its diagonal only. For a batch of
N, e bytes a number, where x is read from DRAM once (from L2 every program reads two blocks of rows):
    FLOPs     (T + 1) / T N m^2 k, and 3 N m^2 for alpha, beta, a      plain: 2 N m^2 k, 3 N m^2
    bytes     N e (m k + m^2), with a (T + 1) / (2 T) N e m^2 more     plain: N e (m k + m^2), with a N e m^2 more
In tiles of 128, m = 768 takes 58 % of the plain product's FLOPs and m = 1024 takes 56 %. In bfloat16 a byte has about m
/ 4 FLOPs where k = m, m / 5 with a, and m / 2 where k is far above m: at m = 768 a large card's memory and tensor cores
are near their balance, and what L2 still holds of x and a decides.

Sources: KellerJordan/modded-nanogpt, pull request 109 (half of the product, in Muon); Amsel et al., The Polar Express,
arxiv.org/abs/2505.16932.
Status: never run on a GPU; the kernel is tested in Triton's interpreter and compiled ahead of time, and its launch
table is a choice, not a measurement.
"""

from typing import Optional

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.backend import (
    check_backend,
    check_device,
    check_dtype,
    check_no_float64,
    check_shape,
    describe,
    jit,
    tl,
    triton,
)


def symmetric_product_reference(x: Tensor, a: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """
    Returns symmetric_product's result by the plain product: on any device, in any floating dtype, differentiable by
    autograd; symmetric to rounding only, and with all of a.
    """
    rows = x.reshape(-1, *x.shape[-2:])
    if a is None:
        summand, beta = x.new_zeros(1, 1, 1), 0.0
    else:
        summand = a.reshape(-1, *a.shape[-2:])
    s = torch.baddbmm(summand, rows, rows.mT, beta=beta, alpha=alpha)
    return s.view(*x.shape[:-1], x.shape[-2])


# ---- Triton kernel ----------------------------------------------------------
# A program makes a tile (BLOCK, BLOCK) and its mirror image of a matrix of the batch; sums are float32. EVEN_M, EVEN_K:
# m, k are multiples of their blocks, and nothing is masked along them. Row offsets are int64. One of a matrix' two
# strides is 1, which a launch makes a constant: either way loads are wide.

@jit
def _load_block(ptr, offs_r, offs_c, row, column, rows, columns, EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr):
    """Returns a block of a matrix of so many rows and columns; 0 outside."""
    ptrs = ptr + offs_r.to(tl.int64)[:, None] * row + offs_c.to(tl.int64)[None, :] * column
    if EVEN_ROWS and EVEN_COLUMNS:
        return tl.load(ptrs)
    elif EVEN_COLUMNS:
        return tl.load(ptrs, mask=(offs_r < rows)[:, None], other=0.0)
    else:
        return tl.load(ptrs, mask=(offs_r < rows)[:, None] & (offs_c < columns)[None, :], other=0.0)


@jit
def _store_tile(ptr, b_tile, offs_r, offs_c, m, EVEN_M: tl.constexpr):
    """Writes a tile of a contiguous (m, m) matrix."""
    ptrs = ptr + offs_r.to(tl.int64)[:, None] * m + offs_c[None, :]
    if EVEN_M:
        tl.store(ptrs, b_tile)
    else:
        tl.store(ptrs, b_tile, mask=(offs_r < m)[:, None] & (offs_c < m)[None, :])


@jit
def _symmetric_product_kernel(x_ptr, a_ptr, s_ptr, x_batch, x_row, x_column, a_batch, a_row, a_column, m, k, alpha,
                              beta, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_M: tl.constexpr,
                              EVEN_K: tl.constexpr):
    """Writes a tile of s and its mirror image."""
    # which tile (i, j), j <= i, by integers alone: rows r and tiles - 1 - r of the triangle of tiles fill a row of a
    # rectangle together
    tiles = tl.cdiv(m, BLOCK)
    width = tiles | 1
    area = width * ((tiles + 1) // 2)
    batch, place = (tl.program_id(0) // area).to(tl.int64), tl.program_id(0) % area
    r, column = place // width, place % width
    i = tl.where(column < tiles - r, tiles - 1 - r, width - 1 - tiles + r)
    j = tl.where(column < tiles - r, column, column - (tiles - r))

    # the product
    offs_i, offs_j = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    offs_k = tl.arange(0, BLOCK_K)
    x_ptr += batch * x_batch
    b_s = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, k, BLOCK_K):
        b_i = _load_block(x_ptr, offs_i, offs_k, x_row, x_column, m, k - start, EVEN_M, EVEN_K)
        b_j = _load_block(x_ptr, offs_j, offs_k, x_row, x_column, m, k - start, EVEN_M, EVEN_K)
        b_s = tl.dot(b_i, tl.trans(b_j), b_s, input_precision="ieee")
        x_ptr += BLOCK_K * x_column

    # alpha times it, and beta a
    b_s *= alpha
    if a_ptr is not None:
        b_a = _load_block(a_ptr + batch * a_batch, offs_i, offs_j, a_row, a_column, m, m, EVEN_M, EVEN_M)
        b_s += beta * b_a.to(tl.float32)

    # both tiles
    b_s, s_ptr = b_s.to(s_ptr.dtype.element_ty), s_ptr + batch * m * m
    if i == j:
        b_s = tl.where(offs_i[:, None] >= offs_j[None, :], b_s, tl.trans(b_s))
    else:
        _store_tile(s_ptr, tl.trans(b_s), offs_j, offs_i, m, EVEN_M)
    _store_tile(s_ptr, b_s, offs_i, offs_j, m, EVEN_M)


# ---- Host function and its registration -------------------------------------

# By the major number of the compute capability (0: any other) and the bytes of a number: BLOCK, BLOCK_K, warps and
# stages; the second where the first would make fewer programs than FEW, too few for a large card's multiprocessors.
# Chosen for what compiles without spills, not measured.
LAUNCH = {
    (0, 2): ((128, 32, 8, 4), (64, 64, 4, 4)),
    (9, 2): ((128, 64, 8, 4), (64, 64, 4, 4)),
    (10, 2): ((128, 64, 8, 4), (64, 64, 4, 4)),
    (0, 4): ((64, 32, 4, 3), (32, 32, 4, 3)),
}
FEW = 128


def _programs(N: int, m: int, block: int) -> int:
    """Returns how many tiles lie on and below the diagonals of N matrices."""
    tiles = -(-m // block)
    return N * tiles * (tiles + 1) // 2


def _launch(major: int, dtype: torch.dtype, N: int, m: int, k: int) -> dict:
    """Returns the kernel's constants for N products of (m, k) on a card of that compute capability (9 for 9.0)."""
    large, small = LAUNCH.get((major, dtype.itemsize), LAUNCH[0, dtype.itemsize])
    block, block_k, warps, stages = small if _programs(N, m, large[0]) < FEW else large
    return dict(BLOCK=block, BLOCK_K=block_k, EVEN_M=m % block == 0, EVEN_K=k % block_k == 0, num_warps=warps,
                num_stages=stages)


def _matrices(x: Tensor) -> Tensor:
    """Returns x as (N, rows, columns), neighbours along one of the last two axes, in place where that is possible."""
    x = x.reshape(-1, *x.shape[-2:])
    return x if 1 in x.stride()[1:] else x.contiguous()


@torch.library.custom_op("knotgpt::symmetric_product", mutates_args=())
def _product_op(x: Tensor, a: Optional[Tensor], alpha: float, beta: float) -> Tensor:
    """Returns s."""
    s = x.new_empty(*x.shape[:-1], x.shape[-2])
    x = _matrices(x)
    a_strides = (0, 0, 0)
    if a is not None:
        a = _matrices(a)
        a_strides = a.stride()

    major = torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 0
    launch = _launch(major, x.dtype, *x.shape)
    grid = (_programs(*x.shape[:2], launch["BLOCK"]),)
    with torch.cuda.device_of(x):
        _symmetric_product_kernel[grid](
            x, a, s, *x.stride(), *a_strides, *x.shape[1:], alpha, beta, **launch)
    return s


@_product_op.register_fake
def _(x, a, alpha, beta):
    return x.new_empty(*x.shape[:-1], x.shape[-2])


@register_flop_formula(torch.ops.knotgpt.symmetric_product)
def _flops(x, a, *_, **__) -> int:
    """Returns those of the plain product, so that counts compare."""
    return 2 * x.numel() * x[-2]


# ---- Public function --------------------------------------------------------

BACKENDS = ("auto", "reference", "triton")


def symmetric_product(x: Tensor, a: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0,
                      backend: str = "auto") -> Tensor:
    """
    Returns s = alpha x x' + beta a for every matrix of a batch, (..., m, m), contiguous, in x's dtype.

    x              (..., m, k)   bfloat16, float16, float32 or float64; any strides: matrices contiguous along either of
                                 the last two axes (x.mT of a contiguous tensor is, too) are read as they are, others
                                 are copied; best m and k are multiples of 16 (others load number by number)
    a              (..., m, m)   symmetric (not checked: the kernel reads it on and below its diagonal only), of x's
                                 leading dimensions and dtype; None: nothing
    alpha, beta    numbers       beta must be 0 where a is None; where it is 0, a is not read
    backend        "reference": torch.baddbmm, symmetric to rounding; "triton": half of the product, symmetric to the
                   last bit, no float64 and no gradient (an optimizer's operation, which needs none); "auto": triton for
                   CUDA tensors where it can, else reference

    Sums run in float32 and are rounded once; float32 is multiplied as
    such, without tensor cores. Both backends work under torch.compile(fullgraph=True). ValueError that names the
    argument for a wrong shape, dtype, device or option, or for a gradient asked of "triton".
    """
    _check(x, a, alpha, beta, backend)
    if backend == "auto":
        fits = x.dtype != torch.float64 and not _needs_gradient(x, a)
        backend = "triton" if x.is_cuda and triton is not None and fits else "reference"
    if backend == "reference":
        return symmetric_product_reference(x, a, alpha, beta)
    return _product_op(x, a if beta else None, float(alpha), float(beta))


def _needs_gradient(x: Tensor, a: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or a is not None and a.requires_grad)


def _check(x, a, alpha, beta, backend):
    """Raises symmetric_product's ValueErrors."""
    # matrices
    check_shape("x", x, "(..., m, k)", (..., None, None))
    check_dtype("x", x)
    if a is not None:
        check_shape("a", a, "(..., m, m)", (*x.shape[:-1], x.shape[-2]))
        check_dtype("a", a, (x.dtype,), like="x")
        check_device("a", a, "x", x)

    # numbers
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not isinstance(value, (int, float)):
            raise ValueError(f"{name} must be a number; got {describe(value)}")
    if a is None and beta:
        raise ValueError(f"beta must be 0 where a is None; got {beta}: give a")

    # backend
    check_backend(backend, BACKENDS, x)
    if backend == "triton":
        check_no_float64(backend, [x.dtype])
        if _needs_gradient(x, a):
            raise ValueError("backend 'triton' has no gradient, and x or a requires one: use 'reference' or 'auto', or "
                             "torch.no_grad()")
