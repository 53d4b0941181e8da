"""
A matrix of low rank times the rows of x: two thin products, between which the rank's numbers stay on chip.

    h = x down'                       rows x of n_in numbers, down (k, n_in), h of k numbers
    y = (sigma * h) up'               up (n_out, k), sigma (k,) or nothing, y of n_out numbers

Backward, with g the gradient of y:
    e = g up,  dx = (sigma * e) down  the same operation, of g, up' and down'
    G = g' h,  dup = G sigma          (n_out, k), every column times its sigma
    dsigma = sum over n_out of up G   what is summed over the rows already
    ddown = sigma e' x                (k, n_in), every row times its sigma
h and e without sigma are what the weights' gradients need. A forward pass keeps h where up or sigma wants a gradient, a
backward pass writes e where down wants one: to write and read k numbers a row moves less than to make them again from
n_in or n_out, as k is below both in a matrix that is worth its factors.

For N rows, e bytes a number, each operand read from DRAM once (the weights, k (n_in + n_out) numbers, are the same for
all forms; of x and y n = n_in + n_out numbers a row):
                             FLOPs          the pair              two products          and sigma by itself
    forward, nothing kept    2 N k n        N e n                 N e (n + 2k)          2 N e k more
    forward, h kept          2 N k n        N e (n + k)           N e (n + 2k)          2 N e k more
    dx, e written            2 N k n        N e (n + k)           N e (n + 2k)          2 N e k more
    dup, ddown               2 N k n        N e (n + 2k)          N e (n + 2k)          2 N e k to 4 N e k more
At e = 2 a byte has about k FLOPs: below k = 300, the balance of a large card, the rows' bytes are the time, of which
the pair saves 2k / (n + 2k) where nothing is kept, half of that in training, more with sigma, and a launch or two. Of
a matrix 768 x 3072 and k = 192 that is 9 % and 5 %, of 768 x 768 and k = 192 20 % and 11 %. Against it stand the
padding of k to a power of two and the weights, which every program reads from L2: k / ROWS of the rows' bytes. Above
k = 256 in half precision and 128 in float32 h and the tiles leave no room on chip, and the two products serve.

Numerics: sums are float32. h is multiplied with sigma in float32 and rounded once to x's dtype, as the operand of the
second product; the two products round it twice. float32 is multiplied as such, or by TF32 where
torch.backends.cuda.matmul.allow_tf32 says so.

Source: Khodak et al., Initialization and Regularization of Factorized Neural Layers, arxiv.org/abs/2105.01029 (the
layer). The pair and its backward pass are derived here.
Status: never run on a GPU; the kernel is tested in Triton's interpreter and compiled ahead of time, and its launch
table is a choice, not a measurement.
"""

from math import prod
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
    jit,
    tl,
    triton,
    triton_operation,
    with_unit_stride,
    wrap_triton,
)


def low_rank_pair_reference(x: Tensor, down: Tensor, up: Tensor, sigma: Tensor | None = None) -> Tensor:
    """
    Returns low_rank_pair's y by two products: on any device, in any floating dtype, differentiable by autograd.
    """
    h = x @ down.T
    if sigma is not None:
        h = h * sigma
    return h @ up.T


# ---- Triton kernel ----------------------------------------------------------
# A program makes ROWS rows of y, all of their columns. RANK is k, filled up to a power of two. Rows from N on are read
# as row N - 1 and not written; what is beyond n_in is 0 on both sides of a product, as 0 times a NaN is one. Offsets
# are int64.


@jit
def _load_weight(ptr, offs_r, offs_c, row, column, rows, columns, EVEN: tl.constexpr):
    """Returns a block of a weight with any strides; 0 beyond so many rows and columns."""
    ptrs = ptr + offs_r.to(tl.int64)[:, None] * row + offs_c.to(tl.int64)[None, :] * column
    if EVEN:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=(offs_r < rows)[:, None] & (offs_c < columns)[None, :], other=0.0)


@jit
def _low_rank_pair_kernel(
    x_ptr, down_ptr, up_ptr, sigma_ptr, y_ptr, h_ptr, x_row, down_row, down_column, up_row, up_column, N,
    IN: tl.constexpr, OUT: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, INNER: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr
):
    """Makes y (N, OUT), and h (N, K) where there is a pointer for it."""
    # h
    offs_n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs_k = tl.arange(0, RANK)
    offs_i = tl.arange(0, INNER)
    x_ptrs = x_ptr + tl.minimum(offs_n, N - 1)[:, None] * x_row + offs_i[None, :]
    b_h = tl.zeros((ROWS, RANK), tl.float32)
    for start in range(0, IN, INNER):
        if IN % INNER == 0:
            b_x = tl.load(x_ptrs)
        else:
            b_x = tl.load(x_ptrs, mask=offs_i[None, :] < IN - start, other=0.0)
        b_down = _load_weight(down_ptr, offs_i + start, offs_k, down_column, down_row, IN, K,
                              (IN % INNER == 0) & (K == RANK))
        b_h = tl.dot(b_x, b_down, b_h, input_precision=PRECISION)
        x_ptrs += INNER

    # kept without sigma; an infinite x makes NaN beyond K
    mask = (offs_n < N)[:, None]
    if K != RANK:
        b_h = tl.where((offs_k < K)[None, :], b_h, 0.0)
    if h_ptr is not None:
        tl.store(h_ptr + offs_n[:, None] * K + offs_k[None, :], b_h.to(h_ptr.dtype.element_ty),
                 mask=mask & (offs_k < K)[None, :])
    if sigma_ptr is not None:
        b_h *= tl.load(sigma_ptr + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)[None, :]
    b_h = b_h.to(x_ptr.dtype.element_ty)

    # y, some columns at a time
    for start in range(0, OUT, COLUMNS):
        offs_c = start + tl.arange(0, COLUMNS)
        b_up = _load_weight(up_ptr, offs_k, offs_c, up_column, up_row, K, OUT, (OUT % COLUMNS == 0) & (K == RANK))
        b_y = tl.dot(b_h, b_up, input_precision=PRECISION).to(y_ptr.dtype.element_ty)
        y_ptrs = y_ptr + offs_n[:, None] * OUT + offs_c[None, :]
        if OUT % COLUMNS == 0:
            tl.store(y_ptrs, b_y, mask=mask)
        else:
            tl.store(y_ptrs, b_y, mask=mask & (offs_c < OUT)[None, :])


# ---- Host function and its registration -------------------------------------

# By the major number of the compute capability (0: any other) and the bytes of a number: the largest rank that an entry
# serves, and its launch. Chosen for what compiles without spills, not measured.
LAUNCH = {
    (0, 2): (
        (64, dict(ROWS=128, INNER=32, COLUMNS=64, num_warps=4, num_stages=3)),
        (128, dict(ROWS=64, INNER=32, COLUMNS=64, num_warps=4, num_stages=3)),
        (256, dict(ROWS=64, INNER=32, COLUMNS=32, num_warps=8, num_stages=2)),
    ),
    (9, 2): (
        (128, dict(ROWS=128, INNER=64, COLUMNS=64, num_warps=8, num_stages=3)),
        (256, dict(ROWS=128, INNER=64, COLUMNS=64, num_warps=8, num_stages=2)),
    ),
    (10, 2): (
        (128, dict(ROWS=128, INNER=64, COLUMNS=64, num_warps=8, num_stages=3)),
        (256, dict(ROWS=128, INNER=64, COLUMNS=64, num_warps=8, num_stages=2)),
    ),
    (0, 4): (
        (64, dict(ROWS=64, INNER=32, COLUMNS=64, num_warps=4, num_stages=2)),
        (128, dict(ROWS=32, INNER=32, COLUMNS=32, num_warps=4, num_stages=2)),
    ),
}


def _entries(capability: int, dtype: torch.dtype) -> tuple:
    """Returns the entries of LAUNCH for a compute capability (90 for 9.0)."""
    return LAUNCH.get((capability // 10, dtype.itemsize), LAUNCH[0, dtype.itemsize])


def _launch(capability: int, dtype: torch.dtype, k: int) -> dict:
    """Returns the tile sizes and options for rank k, which is not above _most_rank."""
    rank = max(16, triton.next_power_of_2(k))
    launch = next(launch for most, launch in _entries(capability, dtype) if rank <= most)
    return dict(RANK=rank, **launch)


def _most_rank(dtype: torch.dtype) -> int:
    """Returns the largest rank that the kernel takes, the same on all cards."""
    return LAUNCH[0, dtype.itemsize][-1][0]


def _weight(x: Tensor) -> Tensor:
    """Returns a weight, neighbours along one of its axes, in place where that is possible."""
    return x if 1 in x.stride() else x.contiguous()


def _rows(x: Tensor) -> Tensor:
    """Returns x as (N, D), with any row stride and neighbouring channels, in place where that is possible."""
    return with_unit_stride(x.reshape(-1, x.shape[-1]))


@triton_operation("knotgpt::low_rank_pair", mutates_args=())
def _pair_op(x: Tensor, down: Tensor, up: Tensor, sigma: Optional[Tensor], keep: bool) -> tuple[Tensor, Tensor]:
    """Returns y (..., n_out), and h (N, k) where it is to be kept, else (0, k)."""
    # operands, and widths that are numbers where torch.compile has symbols
    rows, down, up = _rows(x), _weight(down), _weight(up)
    N = rows.shape[0]
    k, n_in, n_out = int(down.shape[0]), int(down.shape[1]), int(up.shape[0])
    y = x.new_empty(*x.shape[:-1], n_out)
    h = x.new_empty(N if keep else 0, k)

    # the launch
    major, minor = torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)
    launch = _launch(10 * major + minor, x.dtype, k)
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    with torch.cuda.device_of(x):
        wrap_triton(_low_rank_pair_kernel)[(triton.cdiv(N, launch["ROWS"]),)](
            rows, down, up, with_unit_stride(sigma), y, h if keep else None, rows.stride(0), *down.stride(),
            *up.stride(), N, IN=n_in, OUT=n_out, K=k, PRECISION=precision, **launch)
    return y, h


@_pair_op.register_fake
def _(x, down, up, sigma, keep):
    # Size.numel() would tie a compiled call to one N
    return x.new_empty(*x.shape[:-1], up.shape[0]), x.new_empty(prod(x.shape[:-1]) if keep else 0, down.shape[0])


def _save(ctx, inputs, output):
    *tensors, ctx.keep = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, g, gh):
    """gh: the gradient of h, which a gradient of gradients has, else None. It counts where h was kept."""
    x, down, up, sigma, h = ctx.saved_tensors
    needs_x, needs_down, needs_up, needs_sigma, _ = ctx.needs_input_grad
    dx = ddown = dup = dsigma = None
    rows = _rows(x)

    # of x and down
    if g is not None and needs_x:
        dx, e = _pair_op(g, up.T, down.T, sigma, needs_down)
    elif g is not None and needs_down:
        e = _rows(g) @ up
    if g is not None and needs_down:
        ddown = e.T @ rows
        if sigma is not None:
            ddown = sigma[:, None] * ddown
    if gh is not None and ctx.keep:
        dx = _add(dx, (gh @ down).view(x.shape)) if needs_x else None
        ddown = _add(ddown, gh.T @ rows) if needs_down else None

    # of up and sigma
    if g is not None and (needs_up or needs_sigma):
        if not ctx.keep:
            h = rows @ down.T
        slope = _rows(g).T @ h
        if needs_up:
            dup = slope if sigma is None else slope * sigma
        if needs_sigma:
            dsigma = (up.float() * slope.float()).sum(0).to(sigma.dtype)
    return dx, ddown, dup, dsigma, None


def _add(x: Tensor | None, y: Tensor) -> Tensor:
    return y if x is None else x + y


_pair_op.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.knotgpt.low_rank_pair)
def _flops(x, down, up, *_, out_shape=None, **__) -> int:
    return 2 * prod(x[:-1]) * down[0] * (down[1] + up[0])


# ---- Public function --------------------------------------------------------

BACKENDS = ("auto", "reference", "triton")


def low_rank_pair(x: Tensor, down: Tensor, up: Tensor, sigma: Tensor | None = None, backend: str = "auto") -> Tensor:
    """
    Returns ((x down') * sigma) up' of every row of x, (..., n_out), in x's dtype.

    x         (..., n_in)    bfloat16, float16, float32 or float64; any strides (a last axis that is not contiguous is
                             copied); there may be no rows
    down      (k, n_in)      of x's dtype; weights that are contiguous along either axis are read as they are
    up        (n_out, k)     of x's dtype
    sigma     (k,)           of x's dtype; None: nothing is multiplied
    backend   "reference": two products; "triton": one kernel, k up to 256 in half precision and 128 in float32, no
              float64; "auto": triton for CUDA tensors where it can, else reference

    There are gradients for all four, only those asked for, and gradients of these. It works under
    torch.compile(fullgraph=True). Raises a ValueError that names the argument for a wrong shape, dtype, device or
    backend.
    """
    _check(x, down, up, sigma, backend)
    if backend == "auto":
        backend = "triton" if x.is_cuda and _fits(x, down) else "reference"
    if backend == "reference" or 0 in x.shape:  # without rows nothing can be launched
        return low_rank_pair_reference(x, down, up, sigma)
    weights = (up,) if sigma is None else (up, sigma)
    keep = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
    return _pair_op(x, down, up, sigma, keep)[0]


def _fits(x: Tensor, down: Tensor) -> bool:
    """Returns whether the kernel has an entry for this dtype and rank."""
    return triton is not None and x.dtype != torch.float64 and len(down) <= _most_rank(x.dtype)


def _check(x, down, up, sigma, backend):
    """Raises low_rank_pair's ValueErrors."""
    # shapes
    check_shape("down", down, "(k, n_in)", (None, None))
    k, n_in = down.shape
    has_no_rows = isinstance(x, Tensor) and 0 in x.shape[:-1] and x.shape[-1] == n_in
    if not has_no_rows:
        check_shape("x", x, "(..., n_in)", (..., n_in))
    check_shape("up", up, "(n_out, k)", (None, k))
    if sigma is not None:
        check_shape("sigma", sigma, "(k,)", (k,))

    # dtypes and devices
    check_dtype("x", x)
    for name, weight in (("down", down), ("up", up), ("sigma", sigma)):
        if weight is not None:
            check_dtype(name, weight, (x.dtype,), like="x")
            check_device(name, weight, "x", x)

    # backend
    check_backend(backend, BACKENDS, x)
    if backend == "triton":
        check_no_float64(backend, [x.dtype])
        if not _fits(x, down):
            raise ValueError(f"backend 'triton' takes a rank of at most {_most_rank(x.dtype)} in {x.dtype}; got {k}: "
                             "use 'reference' or 'auto'")
