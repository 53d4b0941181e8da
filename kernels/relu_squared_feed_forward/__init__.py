"""
Feed-forward with the squared ReLU, whose activation is made in the epilogues of the two products beside it.

    y = s proj'     s = max(x fc', 0)^2      rows x of D numbers, fc (H, D), proj (D_out, H)
    d = 2 sqrt(s) . (dy proj)                the gradient before the activation
    dx = d fc       dfc = d' x               dproj = dy' s

Two kernels, one for s and one for d, each a tiled product that stores its result once; the four other products are
PyTorch's. s alone is kept: max(x fc', 0) is sqrt(s), and the root halves the relative error of rounding s. The trap is
float16's range: an s below 3e-8, of products below 1.7e-4, is 0 and has no gradient, one below 6e-5 has lost bits, and
one above 65,504, of products above 255.9, is infinite. bfloat16 and float32 have none of this.

For N rows, e bytes a number and A = N H e bytes, passes over (N, H) matrices (those over x, y, dy, dx and the weights
are the same for both):
                 FLOPs                   fused                          compiled from PyTorch's operations
    forward      2 N H (D + D_out)       2A: write s; read s            4A: write x fc'; read it, write s; read s
    backward     4 N H (D + D_out)       5A: read s, write d;           7A: write dy proj; read it and x fc', write d;
                                             read d, d and s                read d, d and s
    kept                                 A and x                        2A and x: x fc' and s
A pass takes e rate / (2 D bandwidth) of a product's time, 0.4 at D = 768 in bfloat16 on a card of 300 FLOPs a byte: two
passes less, in each direction, pay for a product up to 1.8 times as slow as the library's.

Sources: So et al., Primer, arxiv.org/abs/2109.08668 (the squared ReLU).
Status: the CPU's loops are measured in benchmarks/results/; never run on a GPU; the kernels are tested in Triton's
interpreter and compiled ahead of time, and their launch table is a choice, not a measurement.
"""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.backend import (
    array,
    check_backend,
    check_device,
    check_dtype,
    check_no_float64,
    check_shape,
    cpu_operation,
    jit,
    loops_serve,
    parallel_loops,
    tl,
    triton,
    triton_operation,
    wide,
    wrap_triton,
)


def relu_squared_feed_forward_reference(x: Tensor, fc: Tensor, proj: Tensor) -> Tensor:
    """
    Returns relu_squared_feed_forward's y by PyTorch's operations: on any device, in any floating dtype, differentiable
    by autograd.
    """
    return F.linear(F.relu(F.linear(x, fc)).square(), proj)


# ---- Triton kernels ---------------------------------------------------------
# A program makes one tile (ROWS, COLUMNS) of an (N, H) matrix, the product of a (N, K) and b (K, H) with float32 sums.
# Rows from N on are read as row N - 1 and columns from H on as 0, and neither is written; the sum's tail is masked on
# both sides, as 0 times a NaN is one. Offsets are int64.

@jit
def _place(N, H: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """
    Returns rows and columns of this program's tile. GROUP rows of tiles are gone through column by column: programs
    that run together share operands in L2.
    """
    rows, columns = tl.cdiv(N, ROWS), (H + COLUMNS - 1) // COLUMNS
    i, j = tl.swizzle2d(tl.program_id(0) // columns, tl.program_id(0) % columns, rows, columns, GROUP)
    return i.to(tl.int64) * ROWS + tl.arange(0, ROWS), j.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)


@jit
def _product(a_ptr, a_row, b_ptr, b_inner, b_column, offs_n, offs_h, N, H: tl.constexpr, K: tl.constexpr,
             ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr):
    """
    The tile in float32. Neighbours in a row of a are neighbours in memory; those of b are b_inner and b_column apart.
    """
    offs_k = tl.arange(0, INNER)
    a_ptrs = a_ptr + tl.minimum(offs_n, N - 1)[:, None] * a_row + offs_k[None, :]
    b_ptrs = b_ptr + offs_k[:, None] * b_inner + offs_h[None, :] * b_column
    b_acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, K, INNER):
        if K % INNER == 0:
            b_a = tl.load(a_ptrs)
        else:
            b_a = tl.load(a_ptrs, mask=offs_k[None, :] < K - k, other=0.0)
        if K % INNER == 0 and H % COLUMNS == 0:
            b_b = tl.load(b_ptrs)
        else:
            b_b = tl.load(b_ptrs, mask=(offs_k < K - k)[:, None] & (offs_h < H)[None, :], other=0.0)
        b_acc = tl.dot(b_a, b_b, b_acc, input_precision=PRECISION)
        a_ptrs += INNER
        b_ptrs += INNER * b_inner
    return b_acc


@jit
def _results(offs_n, offs_h, N, H: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets of the tile in a contiguous (N, H) matrix, and which of them exist."""
    mask = (offs_n < N)[:, None]
    if H % COLUMNS != 0:
        mask = mask & (offs_h < H)[None, :]
    return offs_n[:, None] * H + offs_h[None, :], mask


@jit
def _relu_squared_feed_forward_fwd_kernel(x_ptr, fc_ptr, s_ptr, x_row, fc_row, N, H: tl.constexpr, K: tl.constexpr,
                                          ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
                                          GROUP: tl.constexpr, PRECISION: tl.constexpr):
    """s of x (N, K) and fc (H, K)."""
    offs_n, offs_h = _place(N, H, ROWS, COLUMNS, GROUP)
    b_s = _product(x_ptr, x_row, fc_ptr, 1, fc_row, offs_n, offs_h, N, H, K, ROWS, COLUMNS, INNER, PRECISION)
    b_s = tl.where(b_s < 0, 0.0, b_s)  # a maximum would lose a NaN
    offs, mask = _results(offs_n, offs_h, N, H, COLUMNS)
    tl.store(s_ptr + offs, (b_s * b_s).to(s_ptr.dtype.element_ty), mask=mask)


@jit
def _relu_squared_feed_forward_bwd_kernel(dy_ptr, proj_ptr, s_ptr, d_ptr, dy_row, proj_row, N, H: tl.constexpr,
                                          K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                                          INNER: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr):
    """d of dy (N, K), proj (K, H) and s (N, H)."""
    offs_n, offs_h = _place(N, H, ROWS, COLUMNS, GROUP)
    b_d = _product(dy_ptr, dy_row, proj_ptr, proj_row, 1, offs_n, offs_h, N, H, K, ROWS, COLUMNS, INNER, PRECISION)
    offs, mask = _results(offs_n, offs_h, N, H, COLUMNS)
    b_s = tl.load(s_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(d_ptr + offs, (2.0 * tl.sqrt(b_s) * b_d).to(d_ptr.dtype.element_ty), mask=mask)


# ---- Launches ---------------------------------------------------------------

# (major compute capability, bytes of a number): the launch of both kernels. Cards that are not named, consumer cards
# among them, take 8's.
LAUNCH = {
    (8, 2): dict(ROWS=128, COLUMNS=256, INNER=32, GROUP=8, num_warps=8, num_stages=4),
    (8, 4): dict(ROWS=128, COLUMNS=128, INNER=32, GROUP=8, num_warps=8, num_stages=3),
    (9, 2): dict(ROWS=128, COLUMNS=256, INNER=64, GROUP=8, num_warps=8, num_stages=4),
    (9, 4): dict(ROWS=128, COLUMNS=128, INNER=32, GROUP=8, num_warps=8, num_stages=4),
    (10, 2): dict(ROWS=128, COLUMNS=256, INNER=64, GROUP=8, num_warps=8, num_stages=4),
    (10, 4): dict(ROWS=128, COLUMNS=128, INNER=32, GROUP=8, num_warps=8, num_stages=4),
}


def _launch(capability: int, dtype: torch.dtype) -> dict:
    """Returns the launch for a compute capability (90 for 9.0)."""
    return LAUNCH.get((capability // 10, dtype.itemsize), LAUNCH[8, dtype.itemsize])


def _plan(result: Tensor, K: int) -> tuple[tuple[int], dict]:
    """
    Returns (grid, constants and options) of a kernel for a contiguous (N, H) result. Widths are numbers where
    torch.compile has symbols for them.
    """
    # the launch
    major, minor = torch.cuda.get_device_capability(result.device) if result.is_cuda else (0, 0)
    launch = _launch(10 * major + minor, result.dtype)

    # the grid
    N, H = result.shape[0], int(result.shape[1])
    grid = (triton.cdiv(N, launch["ROWS"]) * triton.cdiv(H, launch["COLUMNS"]),)

    # of float32 operands, as in PyTorch's products
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    return grid, dict(H=H, K=int(K), PRECISION=precision, **launch)


def _matrix(x: Tensor) -> Tensor:
    """Returns x as (N, D), with any row stride and neighbouring channels, in place where that is possible."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


# ---- Host functions, each the body of its registration ----------------------

@triton_operation("knotgpt::relu_squared_feed_forward", mutates_args=())
def _forward_op(x: Tensor, fc: Tensor, proj: Tensor) -> tuple[Tensor, Tensor]:
    """Returns y and s."""
    rows, fc = _matrix(x), _matrix(fc)
    s = x.new_empty(rows.shape[0], fc.shape[0])
    grid, constants = _plan(s, x.shape[-1])
    with torch.cuda.device_of(x):
        kernel = wrap_triton(_relu_squared_feed_forward_fwd_kernel)
        kernel[grid](rows, fc, s, rows.stride(0), fc.stride(0), rows.shape[0], **constants)
    return (s @ proj.T).view(*x.shape[:-1], proj.shape[0]), s


@_forward_op.register_fake
def _fake_forward(x, fc, proj):
    # Size.numel() would tie a compiled call to one N
    return x.new_empty(*x.shape[:-1], proj.shape[0]), x.new_empty(prod(x.shape[:-1]), fc.shape[0])


@triton_operation("knotgpt::relu_squared_feed_forward_backward", mutates_args=())
def _backward_op(dy: Tensor, proj: Tensor, s: Tensor) -> Tensor:
    """Returns d of dy (N, D_out)."""
    dy, proj = _matrix(dy), _matrix(proj)
    d = torch.empty_like(s)
    grid, constants = _plan(d, dy.shape[1])
    with torch.cuda.device_of(dy):
        kernel = wrap_triton(_relu_squared_feed_forward_bwd_kernel)
        kernel[grid](dy, proj, s, d, dy.stride(0), proj.stride(0), dy.shape[0], **constants)
    return d


@_backward_op.register_fake
def _fake_backward(dy, proj, s):
    return torch.empty_like(s)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, backward, dy, _):
    """Returns the gradients of x, fc and proj, None where one is not needed. backward(dy, proj, s) makes d."""
    x, fc, proj, s = ctx.saved_tensors
    needs_x, needs_fc, needs_proj = ctx.needs_input_grad
    dy = _matrix(dy)
    dx = dfc = dproj = None
    if needs_x or needs_fc:
        d = backward(dy, proj, s)
        dx = (d @ fc).view(x.shape) if needs_x else None
        dfc = d.T @ _matrix(x) if needs_fc else None
    if needs_proj:
        dproj = dy.T @ s
    return dx, dfc, dproj


def _backward(ctx, *gradients):
    return _gradients(ctx, _backward_op, *gradients)


_forward_op.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.knotgpt.relu_squared_feed_forward)
def _forward_flops(x, fc, proj, *_, out_shape=None, **__) -> int:
    return 2 * prod(x[:-1]) * fc[0] * (fc[1] + proj[0])


@register_flop_formula(torch.ops.knotgpt.relu_squared_feed_forward_backward)
def _backward_flops(dy, proj, *_, out_shape=None, **__) -> int:
    return 2 * dy[0] * proj[0] * proj[1]


# ---- The CPU's loops --------------------------------------------------------
# The products are PyTorch's. What follows each of two of them is done in its place, in one pass.

def _forward_body(x: Tensor, fc: Tensor, proj: Tensor) -> tuple[Tensor, Tensor]:
    """Returns y and s."""
    s = wide(_matrix(x) @ fc.T)
    parallel_loops("relu_squared_feed_forward.cpu").square_positive(array(s))
    s = s.to(x.dtype)
    return (s @ proj.T).view(*x.shape[:-1], proj.shape[0]), s


def _backward_body(dy: Tensor, proj: Tensor, s: Tensor) -> Tensor:
    """Returns d of dy (N, D_out)."""
    d = wide(dy @ proj)
    parallel_loops("relu_squared_feed_forward.cpu").times_slope(array(d), array(s))
    return d.to(s.dtype)


def _gradients_loops(ctx, *gradients):
    return _gradients(ctx, _backward_loops, *gradients)


_backward_loops = cpu_operation("knotgpt::relu_squared_feed_forward_loops_backward", _backward_body, _fake_backward)
_forward_loops = cpu_operation(
    "knotgpt::relu_squared_feed_forward_loops", _forward_body, _fake_forward, _save, _gradients_loops)
register_flop_formula(torch.ops.knotgpt.relu_squared_feed_forward_loops)(_forward_flops)
register_flop_formula(torch.ops.knotgpt.relu_squared_feed_forward_loops_backward)(_backward_flops)


# ---- Public function --------------------------------------------------------

BACKENDS = ("auto", "reference", "loops", "triton")


def relu_squared_feed_forward(x: Tensor, fc: Tensor, proj: Tensor, backend: str = "auto") -> Tensor:
    """
    Returns max(x fc', 0)^2 proj' of every row of x, (..., D_out), in x's dtype.

    x         (..., D)      bfloat16, float16, float32 or float64; any strides (a last axis that is not contiguous is
                            copied)
    fc        (H, D)        weights of the hidden layer, of x's dtype
    proj      (D_out, H)    weights of the output, of x's dtype
    backend   "reference": PyTorch's operations; "loops": the CPU's; "triton": fused, no float64; "auto": triton for
              CUDA tensors where it can, loops for a CPU's where Numba is, else reference

    The fused backends square in float32 at least and round once, to the activation that they keep
    for the backward pass: in float16 the gradient of one below 3e-8 is lost. float32 products use TF32 where
    torch.backends.cuda.matmul.allow_tf32 says so. Gradients for all three, once, and only those asked for. All backends
    work under torch.compile(fullgraph=True). ValueError that names the argument for a wrong shape, dtype, device or
    backend.
    """
    _check(x, fc, proj, backend)
    if backend == "auto":
        backend = _choose(x)
    if backend == "reference":
        return relu_squared_feed_forward_reference(x, fc, proj)
    operation = _forward_loops if backend == "loops" else _forward_op
    return operation(x, fc, proj)[0]


def _choose(x: Tensor) -> str:
    """Returns the backend of "auto"."""
    if x.is_cuda and triton is not None and x.dtype != torch.float64:
        return "triton"
    return "loops" if loops_serve(x) else "reference"


def _check(x, fc, proj, backend):
    """Raises relu_squared_feed_forward's ValueErrors."""
    check_shape("x", x, "(..., D)", (..., None))
    check_shape("fc", fc, "(H, D)", (None, x.shape[-1]))
    check_shape("proj", proj, "(D_out, H)", (None, fc.shape[0]))
    check_dtype("x", x)
    for name, weight in (("fc", fc), ("proj", proj)):
        check_dtype(name, weight, (x.dtype,), like="x")
        check_device(name, weight, "x", x)
    check_backend(backend, BACKENDS, x)
    if backend == "triton":
        check_no_float64(backend, [x.dtype])
