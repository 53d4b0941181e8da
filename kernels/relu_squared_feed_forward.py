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
                                           fused                                          compiled from PyTorch's
                                                                                          operations
    forward    2 N H (D + D_out) FLOPs     2A: write s; read s                            4A: write x fc'; read it,
                                                                                          write s; read s
    backward   4 N H (D + D_out) FLOPs     5A: read s, write d; read d, d and s           7A: write dy proj; read it and
                                                                                          x fc', write d; read d, d and
                                                                                          s
    kept                                   A and x                                        2A and x: x fc' and s
A pass takes e rate / (2 D bandwidth) of a product's time, 0.4 at D = 768 in bfloat16 on a card of 300 FLOPs a byte: two
passes less, in each direction, pay for a product up to 1.8 times as slow as the library's.

Sources: So et al., Primer, arxiv.org/abs/2109.08668 (the squared ReLU).
Status: the CPU's loops are measured in benchmarks/results/; never run on a GPU; the kernels are tested in Triton's
interpreter and compiled ahead of time, and their launch table is a choice, not a measurement.
"""

from math import prod
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.backend import array, cpu_operation, loops_serve, parallel_loops, wide

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:  # no Triton for this platform: the reference serves it
    triton, tl, jit = None, SimpleNamespace(constexpr=None), lambda function: function


def relu_squared_feed_forward_reference(x: Tensor, fc: Tensor, proj: Tensor) -> Tensor:
    """
    y in PyTorch's own operations: any device, any floating dtype, differentiable by autograd. Arguments as
    relu_squared_feed_forward's.
    """
    return F.linear(F.relu(F.linear(x, fc)).square(), proj)


# ---- Triton kernels ---------------------------------------------------------
# A program makes one tile (ROWS, COLUMNS) of an (N, H) matrix, the product of a (N, K) and b (K, H) with float32 sums.
# Rows from N on are read as row N - 1 and columns from H on as 0, and neither is written; the sum's tail is masked on
# both sides, as 0 times a NaN is one. Offsets are int64.

@jit
def _place(N, H: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """
    Rows and columns of this program's tile. GROUP rows of tiles are gone through column by column: programs that run
    together share operands in L2.
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
    """For a compute capability (90 for 9.0)."""
    return LAUNCH.get((capability // 10, dtype.itemsize), LAUNCH[8, dtype.itemsize])


def _plan(result: Tensor, K: int) -> tuple[tuple[int], dict]:
    """
    (grid, constants and options) of a kernel for a contiguous (N, H) result. Widths are numbers where torch.compile has
    symbols for them.
    """
    major, minor = torch.cuda.get_device_capability(result.device) if result.is_cuda else (0, 0)
    launch, (N, H) = _launch(10 * major + minor, result.dtype), result.shape
    # of float32 operands, as in PyTorch's products
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    return (triton.cdiv(N, launch["ROWS"]) * triton.cdiv(int(H), launch["COLUMNS"]),), dict(H=int(H), K=int(K),
            PRECISION=precision, **launch)


def _matrix(x: Tensor) -> Tensor:
    """(N, D) with any row stride and neighbouring channels, in place where that is possible."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


# ---- Host functions, each the body of its registration ----------------------

COMPILED = triton is not None and isinstance(_relu_squared_feed_forward_fwd_kernel, triton.JITFunction)
# torch.compile cannot look into an interpreted kernel
operator = torch.library.triton_op if COMPILED else torch.library.custom_op
wrap_triton = torch.library.wrap_triton if COMPILED else lambda kernel: kernel


@operator("knotgpt::relu_squared_feed_forward", mutates_args=())
def _forward_op(x: Tensor, fc: Tensor, proj: Tensor) -> tuple[Tensor, Tensor]:
    """y, s"""
    rows, fc = _matrix(x), _matrix(fc)
    s = x.new_empty(rows.shape[0], fc.shape[0])
    grid, constants = _plan(s, x.shape[-1])
    with torch.cuda.device_of(x):
        wrap_triton(_relu_squared_feed_forward_fwd_kernel)[grid](rows, fc, s, rows.stride(0), fc.stride(0),
                                                                 rows.shape[0], **constants)
    return (s @ proj.T).view(*x.shape[:-1], proj.shape[0]), s


@_forward_op.register_fake
def _(x, fc, proj):
    # Size.numel() would tie a compiled call to one N
    return x.new_empty(*x.shape[:-1], proj.shape[0]), x.new_empty(prod(x.shape[:-1]), fc.shape[0])


@operator("knotgpt::relu_squared_feed_forward_backward", mutates_args=())
def _backward_op(dy: Tensor, proj: Tensor, s: Tensor) -> Tensor:
    """d, of dy (N, D_out)"""
    dy, proj, d = _matrix(dy), _matrix(proj), torch.empty_like(s)
    grid, constants = _plan(d, dy.shape[1])
    with torch.cuda.device_of(dy):
        wrap_triton(_relu_squared_feed_forward_bwd_kernel)[grid](dy, proj, s, d, dy.stride(0), proj.stride(0),
                                                                 dy.shape[0], **constants)
    return d


@_backward_op.register_fake
def _(dy, proj, s):
    return torch.empty_like(s)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, backward, dy, _):
    """Those of x, fc and proj. backward: what makes d."""
    x, fc, proj, s = ctx.saved_tensors
    of_x, of_fc, of_proj = ctx.needs_input_grad
    dy = _matrix(dy)
    d = backward(dy, proj, s) if of_x or of_fc else None
    return (d @ fc).view(x.shape) if of_x else None, d.T @ _matrix(x) if of_fc else None, dy.T @ s if of_proj else None


_forward_op.register_autograd(lambda ctx, *gradients: _gradients(ctx, _backward_op, *gradients), setup_context=_save)


@register_flop_formula(torch.ops.knotgpt.relu_squared_feed_forward)
def _forward_flops(x, fc, proj, *_, out_shape=None, **__) -> int:
    return 2 * prod(x[:-1]) * fc[0] * (fc[1] + proj[0])


@register_flop_formula(torch.ops.knotgpt.relu_squared_feed_forward_backward)
def _backward_flops(dy, proj, *_, out_shape=None, **__) -> int:
    return 2 * dy[0] * proj[0] * proj[1]


# ---- The CPU's loops: the products are PyTorch's, and what follows each of two of them is done in its place, in one pass 

def _forward_body(x: Tensor, fc: Tensor, proj: Tensor) -> tuple[Tensor, Tensor]:
    """y, s"""
    s = wide(_matrix(x) @ fc.T)
    parallel_loops("relu_squared_feed_forward_loops").square_positive(array(s))
    s = s.to(x.dtype)
    return (s @ proj.T).view(*x.shape[:-1], proj.shape[0]), s


def _backward_body(dy: Tensor, proj: Tensor, s: Tensor) -> Tensor:
    """d, of dy (N, D_out)"""
    d = wide(dy @ proj)
    parallel_loops("relu_squared_feed_forward_loops").times_slope(array(d), array(s))
    return d.to(s.dtype)


def _fake_forward(x, fc, proj):
    return x.new_empty(*x.shape[:-1], proj.shape[0]), x.new_empty(prod(x.shape[:-1]), fc.shape[0])


_backward_loops = cpu_operation("knotgpt::relu_squared_feed_forward_loops_backward", _backward_body, lambda dy, proj,
                                s: torch.empty_like(s))
_forward_loops = cpu_operation("knotgpt::relu_squared_feed_forward_loops", _forward_body, _fake_forward, _save,
                               lambda ctx, *gradients: _gradients(ctx, _backward_loops, *gradients))
register_flop_formula(torch.ops.knotgpt.relu_squared_feed_forward_loops)(_forward_flops)
register_flop_formula(torch.ops.knotgpt.relu_squared_feed_forward_loops_backward)(_backward_flops)


# ---- Public function --------------------------------------------------------

BACKENDS = ("auto", "reference", "loops", "triton")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def relu_squared_feed_forward(x: Tensor, fc: Tensor, proj: Tensor, backend: str = "auto") -> Tensor:
    """
    max(x fc', 0)^2 proj' of every row of x, in x's dtype.

    x         (..., D)      bfloat16, float16, float32 or float64; any strides (a last axis that is not contiguous is
                            copied)
    fc        (H, D)        weights of the hidden layer, of x's dtype
    proj      (D_out, H)    weights of the output, of x's dtype
    backend   "reference": PyTorch's operations; "loops": the CPU's; "triton": fused, no float64; "auto": triton for
              CUDA tensors where it can, loops for a CPU's where Numba is, else reference

    Returns (..., D_out). The fused backends square in float32 at least and round once, to the activation that they keep
    for the backward pass: in float16 the gradient of one below 3e-8 is lost. float32 products use TF32 where
    torch.backends.cuda.matmul.allow_tf32 says so. Gradients for all three, once, and only those asked for. All backends
    work under torch.compile(fullgraph=True). ValueError that names the argument for a wrong shape, dtype, device or
    backend.
    """
    _check(x, fc, proj, backend)
    if backend == "auto":
        backend = "triton" if x.is_cuda and triton is not None and x.dtype != torch.float64 else "loops" if loops_serve(
            x) else "reference"
    if backend == "reference":
        return relu_squared_feed_forward_reference(x, fc, proj)
    operation = _forward_loops if backend == "loops" else _forward_op
    return operation(x, fc, proj)[0]


def _check(x, fc, proj, backend):
    if not isinstance(x, Tensor) or x.dim() < 1 or x.numel() == 0:
        raise ValueError(f"x must be a tensor (..., D), not empty; got {_describe(x)}")
    if not isinstance(fc, Tensor) or fc.dim() != 2 or fc.shape[1] != x.shape[-1] or fc.shape[0] == 0:
        raise ValueError(f"fc must be a tensor (H, D) with x's D = {x.shape[-1]}; got {_describe(fc)}")
    if not isinstance(proj, Tensor) or proj.dim() != 2 or proj.shape[1] != fc.shape[0] or proj.shape[0] == 0:
        raise ValueError(f"proj must be a tensor (D_out, H) with fc's H = {fc.shape[0]}; got {_describe(proj)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be bfloat16, float16, float32 or float64; got {x.dtype}")
    for name, weight in (("fc", fc), ("proj", proj)):
        if weight.dtype != x.dtype or weight.device != x.device:
            raise ValueError(
                f"{name} must have x's dtype and device, {x.dtype} on {x.device}; got {weight.dtype} on {weight.device}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend == "triton" and (triton is None or not x.is_cuda and COMPILED):
        raise ValueError(
            f"backend 'triton' needs CUDA tensors and Triton; got tensors on {x.device}: use 'reference' or 'auto'")
    if backend == "loops" and not loops_serve(x):
        raise ValueError(
            f"backend 'loops' needs tensors on a CPU and Numba; got tensors on {x.device}: use 'reference' or 'auto'")
    if backend == "triton" and x.dtype == torch.float64:
        raise ValueError("backend 'triton' takes no float64: use 'reference' or 'auto'")


def _describe(x) -> str:
    return str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__
